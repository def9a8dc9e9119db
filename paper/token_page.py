"""An HTML page of one response, token by token. It needs no scripts."""

import html
from pathlib import Path

from common.files import write_atomically

STYLE = """
body { font: 16px/1.6 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
pre, .response { white-space: pre-wrap; background: #f4f4f4; padding: 0.6em; border-radius: 4px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: 0.1em 0.7em; text-align: right }
"""


def print_tokens(texts, table):
    """A line per token with its numbers. table: {column: one number per token}."""
    print(f"{'token':<16}" + "".join(f"{name:>11}" for name in table))
    for i, text in enumerate(texts):
        print(f"{text!r:<16}" + "".join(f"{column[i]:>11.3f}" for column in table.values()))


def write_token_page(path, prompt, texts, table):
    """The response, each token colored by its advantage, above a table. texts: one per token; table: {column: one
    number per token}."""
    largest = max(map(abs, table["advantage"])) or 1.0
    header = "".join(f"<th>{name}</th>" for name in table)
    spans, rows = [], [f"<tr><th>token</th>{header}</tr>"]
    for i, text in enumerate(texts):
        advantage = table["advantage"][i]
        rgb = "0,140,60" if advantage > 0 else "200,0,0"
        color = f"rgba({rgb},{0.6 * abs(advantage) / largest:.2f})"
        title = f"advantage {advantage:.3f}"
        spans.append(f'<span style="background:{color}" title="{title}">{html.escape(text)}</span>')
        numbers = "".join(f"<td>{column[i]:.3f}</td>" for column in table.values())
        token = f'<td style="background:{color}"><code>{html.escape(repr(text))}</code></td>'
        rows.append(f"<tr>{token}{numbers}</tr>")
    page = (f'<!doctype html><meta charset="utf-8"><title>A response, token by token</title><style>{STYLE}</style>'
            f'<h1>A response, token by token</h1><pre>{html.escape(prompt)}</pre>'
            f'<div class="response">{"".join(spans)}</div>'
            f'<p>Color: the advantage, green above 0, red below.</p><table>{"".join(rows)}</table>')
    write_atomically(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8", errors="replace"))
