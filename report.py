"""Tables and figures of an evaluation: report.md and figures/ out of report.json and the runs' logs, nothing measured anew.

    python report.py --out out                      # evaluate.py calls it at its end
"""

import html
import json
from dataclasses import dataclass
from pathlib import Path

import common
from common import UserError

# The five models, in the same order and colours everywhere; the colours differ in grey too.
MODELS = ("GPT", "GPT prompted", "SFT", "PPO", "PPO-ptx")
COLOURS = dict(zip(MODELS, ("#bdbdbd", "#e6ab02", "#66a61e", "#7570b3", "#a6004d")))
MADE_UP = "makes things up (closed domain, less is better)"  # of the metadata


@dataclass(frozen=True)
class Config:
    out: str = "out"  # where the runs and report.json are, and the report goes


def read_log(out, run):
    path = Path(out) / run / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; in the default run `make {run.split('_')[0]}` makes it")
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise UserError(f"{path}: not JSON Lines") from None


# ---------------------------------------------------------------- tables

def percent(number, signed=False):
    if number is None or number[0] is None:
        return "-"
    return f"{100 * number[0]:{'+' if signed else ''}.1f} ± {100 * number[1]:.1f}%"


def table(header, rows):
    lines = ["| " + " | ".join(map(str, header)) + " |", "|" + "---|" * len(header)]
    shown = lambda cell: f"{cell:.2f}" if isinstance(cell, float) else str(cell)
    return "\n".join(lines + ["| " + " | ".join(map(shown, row)) + " |" for row in rows])


def judges_of(results):
    """Who compared the models: teams of labelers, or a reward model and people."""
    return list(dict.fromkeys(judge for by in results["preference"].values() for judge in by))


def way_to_ceiling(by):
    """How far the reward model comes from guessing to what the true average preference would score."""
    return f"{(by['reward model'][0] - 0.5) / (by['ceiling'][0] - 0.5):.0%}" if by["ceiling"][0] not in (None, 0.5) else "-"


def headline(results):
    """The claims of the paper that a run is judged by, in a few rows: printed, and at the head of the report. In the
    built-in world the preferences here are held-out labelers'."""
    judges = judges_of(results)[-1:] if results["world"] else judges_of(results)
    rows = [(f"{name} preferred to SFT{' (itself: 50%)' * (name == 'SFT')}" + f", {judge}" * (not results["world"]),
             percent(by[judge])) for judge in judges for name, by in results["preference"].items() if judge in by]
    for team, by in results["reward model"].items():
        if results["world"] and team == "training labelers":
            rows += [("reward model, unseen prompts (ceiling)", f"{percent(by['reward model'])} ({percent(by['ceiling'])})"),
                     ("reward model's way from 50% to the ceiling", way_to_ceiling(by)),
                     ("two training labelers agree", percent(by["agreement"]))]
        elif not results["world"]:
            rows += [(f"{who} on unseen prompts, {team}", percent(share)) for who, share in by.items()]
    if "metadata" in results:
        rows += [(f"makes things up, closed domain: {name}", percent(results["metadata"][MADE_UP][name]))
                 for name in ("SFT", "PPO-ptx")]
    if results["zero-shot"]:
        tasks, changes = results["zero-shot"]
        rows += [(f"zero-shot tasks, {name} less SFT", percent(changes[f"{name} - SFT"], True))
                 for name in ("PPO", "PPO-ptx") if f"{name} - SFT" in changes]
        if "PPO - SFT" in changes and "PPO-ptx - PPO" in changes:
            drop, back = (tasks["all abilities"][a][0] - tasks["all abilities"]["PPO"][0] for a in ("SFT", "PPO-ptx"))
            rows.append(("of PPO's drop, PPO-ptx gives back",
                         f"{back / drop:.0%}" if drop > changes["PPO - SFT"][1] else "no drop"))
    return rows


ABOUT_WORLD = ("the labelers are programs (data/tinyworld/labelers.py). Intervals are 95%; one of ± 0 says only that all "
               "were alike. Rates and tasks are judged by the world itself, without a labeler's noise.")
ABOUT_JUDGES = {
    "judge": "The judge is a reward model, another than the one that trained the policies. It is no person: it shares their "
             "beginnings and whatever its data missed.",
    "people": "People are those who filled in pairs.csv.",
}


def sections(results):
    prefer, rewards, names = results["preference"], results["reward model"], list(results["preference"])
    judges = judges_of(results)
    yield "# Report"
    yield (f"{results['prompts']:,} test prompts of {results['customers']} customers or conversations never trained on; " + (
        ABOUT_WORLD if results["world"] else " ".join(["intervals are 95%.", *(ABOUT_JUDGES[judge] for judge in judges)])))
    yield table(["in short" + " (preferences by held-out labelers)" * results["world"], ""], headline(results))
    yield "## Preferred to SFT (figures 1 and 3)"
    yield table(["model", *judges, *results["scores"]],
                [[name, *(percent(prefer[name].get(judge)) for judge in judges),
                  *(by[name][0] for by in results["scores"].values())] for name in names])
    yield "A tie counts half. The row SFT compares two samples of the same model." + (
        " The last column is known only because the labelers are programs." * results["world"])
    if judges:
        yield "![win rates](figures/preference.png)"
    if "metadata" in results:
        yield "## Metadata (figure 4)"
        yield table(["rate", *names], [[rate, *(percent(by[name]) for name in names)]
                                       for rate, by in results["metadata"].items()])
        yield "![metadata](figures/metadata.png)"
    if rewards:
        yield "## Reward model on unseen prompts (section 3.3)"
        who = list(next(iter(rewards.values())))
        shown = {"agreement": "another labeler agrees", "ceiling": "ceiling: the true average preference"}
        way = results["world"]  # to the ceiling, which only the built-in world has
        yield table(["pairs ranked by", *(shown.get(name, name) for name in who)] + ["of the way from 50% to the ceiling"] * way,
                    [[team, *(percent(by[name]) for name in who)] + ([way_to_ceiling(by)] if way else [])
                     for team, by in rewards.items()])
    if results["zero-shot"]:
        tasks, changes = results["zero-shot"]
        models = list(tasks["all abilities"])
        yield "## Zero-shot tasks: the alignment tax (figure 25)"
        yield table(["task", *models], [[kind, *(percent(by[name]) for name in models)] for kind, by in tasks.items()])
        if changes:
            yield table(["change, all abilities, item by item", ""], [[what, percent(x, True)] for what, x in changes.items()])
        yield ("Bias: how often the stereotype is the likelier; 50% is no bias. Toxicity: how often a kind reply "
               "is likelier than an insult. " * results["world"] +
               "Next word: the share of tokens of held-out web pages that the model holds for the likeliest. All abilities: "
               "the tasks, those of safety apart, and the next word, each item (a task or a page) once.")
        yield "![alignment tax](figures/tax.png)"
    yield "## SFT epochs (section 3.4)"
    yield table(["epoch", "validation loss", "reward-model score"],
                [[epoch, f"{loss:.4f}", f"{mean:.2f} ± {error:.2f}"] for epoch, loss, mean, error in results["sft epochs"]])
    yield "The last is used."
    if results["runs"]:
        yield "## Training"
        yield "![training](figures/training.png)"
    yield "## Samples"
    for use_case, prompt, said in results["samples"]:
        quoted = "\n".join(f"- **{name}**: {' / '.join(text.splitlines()) or '(nothing)'}" for name, text in said.items())
        yield f"**{use_case}**\n\n```\n{prompt.rstrip()}\n```\n\n{quoted}"


# ---------------------------------------------------------------- figures

def bars(axis, groups, values, names, label):
    """Grouped bars with error bars. values[group][name] = (mean, error, n)."""
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        points = [(g + (k - (len(names) - 1) / 2) * width, *values[group][name][:2]) for g, group in enumerate(groups)
                  if name in values[group] and values[group][name][0] is not None]
        if not points:
            continue
        x, y, error = zip(*points)
        axis.bar(x, [100 * v for v in y], width * 0.92, yerr=[100 * e for e in error], label=name, capsize=2,
                 color=COLOURS[name], edgecolor="black", linewidth=0.5)
    axis.set_xticks(range(len(groups)), groups)
    axis.set(ylabel=label, ylim=(0, 105))
    axis.spines[["top", "right"]].set_visible(False)


def draw(results, out):
    import matplotlib  # only figures need it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder, names = Path(out) / "figures", list(results["preference"])
    folder.mkdir(parents=True, exist_ok=True)

    def save(figure, name, rect=(0, 0, 1, 1)):
        figure.tight_layout(rect=rect)
        common.write_atomically(folder / f"{name}.png", lambda path: figure.savefig(path, dpi=150, format="png"))
        plt.close(figure)

    def bar_figure(name, groups, values, names, label, width):
        figure, axis = plt.subplots(figsize=(width, 3.6))
        bars(axis, groups, values, names, label)
        axis.axhline(50, color="black", linewidth=0.8, linestyle=":", visible=name == "preference")
        axis.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.17), frameon=False, fontsize=8)
        save(figure, name)

    judges = judges_of(results)
    if judges:
        by_judge = {judge: {name: by[judge] for name, by in results["preference"].items() if judge in by} for judge in judges}
        bar_figure("preference", judges, by_judge, names, "preferred to SFT (%), 95% intervals", 7)
    if results["zero-shot"]:
        tasks = {kind: by for kind, by in results["zero-shot"][0].items() if kind not in results["safety"]}
        bar_figure("tax", list(tasks), tasks, list(tasks["all abilities"]), "zero-shot accuracy (%), 95% intervals", 9)

    if "metadata" in results:
        figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), sharey=True)
        for axis, (rate, by) in zip(axes, results["metadata"].items()):
            rate = rate.replace(" (", "\n(")
            bars(axis, [rate], {rate: by}, names, "responses (%), 95% intervals" if axis is axes[0] else "")
        figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="upper center", frameon=False, fontsize=8)
        save(figure, "metadata", rect=(0, 0, 1, 0.93))

    if results["runs"]:
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
        for name, run in results["runs"].items():
            log = read_log(out, run)
            for axis, key, label in zip(axes, ("reward", "kl", "entropy"), (
                    "reward-model score less penalties", "KL from SFT (nats a response)", "entropy (nats a token)")):
                axis.plot([x["step"] for x in log], [x[key] for x in log], label=name, color=COLOURS[name],
                          linestyle="--" if name == "PPO" else "-")
                axis.set(xlabel="PPO iteration", ylabel=label)
                axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False)
        save(figure, "training")


# ---------------------------------------------------------------- one response, token by token

STYLE = """body { font: 16px/1.6 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
pre, .response { white-space: pre-wrap; background: #f4f4f4; padding: 0.6em; border-radius: 4px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: 0.1em 0.7em; text-align: right }"""


def token_page(path, prompt, texts, table):
    """Write a page without scripts: the response, each token colored by its advantage, and {column: a number per token}."""
    largest = max(map(abs, table["advantage"])) or 1.0
    spans, rows = [], ["<tr><th>token</th>" + "".join(f"<th>{name}</th>" for name in table) + "</tr>"]
    for i, text in enumerate(texts):
        advantage = table["advantage"][i]
        color = f"rgba({'0,140,60' if advantage > 0 else '200,0,0'},{0.6 * abs(advantage) / largest:.2f})"
        spans.append(f'<span style="background:{color}" title="advantage {advantage:.3f}">{html.escape(text)}</span>')
        numbers = "".join(f"<td>{column[i]:.3f}</td>" for column in table.values())
        rows.append(f'<tr><td style="background:{color}"><code>{html.escape(repr(text))}</code></td>{numbers}</tr>')
    page = (f'<!doctype html><meta charset="utf-8"><title>A response, token by token</title><style>{STYLE}</style>'
            f'<h1>A response, token by token</h1><pre>{html.escape(prompt)}</pre><div class="response">{"".join(spans)}</div>'
            f'<p>Color: the advantage, green above 0, red below.</p><table>{"".join(rows)}</table>')
    common.write_atomically(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8", errors="replace"))


def main(config):
    path = Path(config.out) / "report.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; evaluate.py makes it")
    try:
        results = json.loads(path.read_text())
        text = "\n\n".join(sections(results)) + "\n"
        draw(results, config.out)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no report of evaluate.py; run that again") from None
    common.write_atomically(Path(config.out) / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    for what, number in headline(results):
        print(f"{what:<52}{number}")
    print(f"{config.out}/report.md has the rest")


if __name__ == "__main__":
    common.launch(main, Config)
