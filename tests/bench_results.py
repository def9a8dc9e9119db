"""Results of tests/bench.py: the machine they come from, the file they go to, and the table that compares machines."""

import contextlib
import json
import os
import platform
import re
from importlib import metadata

import torch

from common.files import write_atomically

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides how fast matrix products are


def machine():
    """What a result depends on besides the code."""
    name, flags = platform.processor(), ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines())
        fields = {field.strip(): value.strip() for field, value in fields.items()}
        name = f"{fields.get('model name', name)}, model {fields.get('model', '?')}"  # virtual machines shorten the name
        flags = fields.get("flags", "")
    return dict(cpu=name, flags=[flag for flag in CPU_FLAGS if flag in flags.split()], cores=os.cpu_count(),
                threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 2),
                **{package: version(package) for package in ("torch", "transformers", "trl")})


def version(package):
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)


def title(machine):
    """Heads its column, and names its file."""
    parts = [machine["cpu"]]
    if machine["threads"] != machine["cores"]:
        parts.append(f"{machine['threads']} threads")
    if machine["path"]:
        parts.append(f"path {machine['path']}")
    if machine["quick"]:
        parts.append("quick")
    return ", ".join(parts)


def file_name(machine):
    name = re.sub(r"\((r|tm)\)", "", title(machine).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json"


class Results:
    """The rows of one machine. Each is printed and written as soon as it is measured, so a stopped run keeps its rows."""

    def __init__(self, machine, folder):
        self.path, self.machine, self.rows = folder / file_name(machine), machine, {}
        if self.path.exists():
            earlier = json.loads(self.path.read_text())
            if earlier["machine"] | {"load": None} == machine | {"load": None}:
                self.rows = {(row["what"], row["against"]): row for row in earlier["rows"]}
        show("what", "against", "ours", "theirs", "ratio", "aim", "our memory", "theirs")
        show(*["---"] * 8)

    def add(self, what, against, unit, ours, theirs=None, ratio=None, limit=False, aim="", memory=()):
        """ours, theirs: numbers of `unit`; ratio: a fraction of a limit, if `limit`; memory: bytes, ours first."""
        row = dict(what=what, against=against, unit=unit, ours=ours, theirs=theirs, ratio=ratio, limit=limit, aim=aim,
                   memory=memory, load=self.machine["load"])
        self.rows[what, against] = row
        write_atomically(self.path, lambda path: path.write_text(
            json.dumps(dict(machine=self.machine, rows=list(self.rows.values())), indent=1)))
        show(what, against, f"{number(ours)} {unit}", "" if theirs is None else number(theirs), quotient(row), aim,
             *(f"{size / 2**30:.2f} GiB" for size in memory), *[""] * (2 - len(memory)))


def number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.2f}"


def quotient(row):
    if row["ratio"] is None:
        return ""
    return f"{row['ratio']:.0%}" if row["limit"] else f"{row['ratio']:.2f}×"


def show(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def cell(row):
    """A row of results in one cell of --table: 2.10× (10,403 : 4,950 tokens/s; 0.72 : 0.68 GiB)"""
    sides = [number(row[side]) for side in ("ours", "theirs") if row[side] is not None]
    text = f"{' : '.join(sides)} {row['unit']}"
    if row["memory"]:
        text += f"; {' : '.join(f'{size / 2**30:.2f}' for size in row['memory'])} GiB"
    return f"{quotient(row)} ({text})" if row["ratio"] is not None else text


def print_table(paths):
    """Print the results of several files as a Markdown table: a row per measurement, a column per machine."""
    results = [json.loads(path.read_text()) for path in paths]
    machines = [result["machine"] for result in results]
    show("measurement", "against", *map(title, machines))
    show(*["---"] * (2 + len(results)))
    for what, text in (("PyTorch", lambda m: m["torch"]), ("instructions", lambda m: " ".join(m["flags"])),
                       ("threads, cores", lambda m: f"{m['threads']}, {m['cores']}"), ("load at the start", lambda m: str(m["load"]))):
        show(what, "", *map(text, machines))
    columns = [{(row["what"], row["against"]): row for row in result["rows"]} for result in results]
    for what, against in dict.fromkeys(key for column in columns for key in column):
        show(what, against, *(cell(column[what, against]) if (what, against) in column else "" for column in columns))
