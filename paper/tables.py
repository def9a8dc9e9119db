"""Tables and figures of an evaluation: report.md and figures/ from report.json and the runs' logs. Nothing is measured
again.

    python paper/tables.py --out out                # evaluate.py calls it at its end
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

from common.config import UserError, launch
from common.files import write_atomically
from paper.models import colors, trained_from_sft

MADE_UP = "makes things up (closed domain, less is better)"  # one of the metadata
TRAINING, HELD_OUT = "training labelers", "held-out labelers"  # the judges of the built-in world


@dataclass(frozen=True)
class Config:
    out: str = "out"  # the folder of the runs and of report.json; the report is written there


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
    write_atomically(Path(config.out) / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    for what, number in headline(results):
        print(f"{what:<52}{number}")
    print(f"{config.out}/report.md has the rest")


def read_log(out, run):
    path = Path(out) / run / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; in the default run `{made_by(run)}` makes it")
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise UserError(f"{path}: not JSON Lines") from None


def made_by(run):
    """The command that makes a run of the default run."""
    return f"make {run.split('_')[0]}"


# ---------------------------------------------------------------- tables

def percent(number, signed=False):
    if number is None or number[0] is None:
        return "-"
    return f"{100 * number[0]:{'+' if signed else ''}.1f} ± {100 * number[1]:.1f}%"


def table(header, rows):
    """Markdown."""
    def cell(x):
        return f"{x:.2f}" if isinstance(x, float) else str(x)

    lines = [header, *rows]
    markdown = ["| " + " | ".join(map(cell, line)) + " |" for line in lines]
    markdown.insert(1, "|" + "---|" * len(header))
    return "\n".join(markdown)


def judges_of(results):
    """The names of the judges who compared the models."""
    return list(dict.fromkeys(judge for by_judge in results["preference"].values() for judge in by_judge))


def way_to_ceiling(accuracy):
    """How far the reward model comes from guessing, 50%, to what the true average preference would score."""
    reward_model, ceiling = accuracy["reward model"][0], accuracy["ceiling"][0]
    return "-" if ceiling in (None, 0.5) else f"{(reward_model - 0.5) / (ceiling - 0.5):.0%}"


def headline(results):
    """The paper's main claims, in a few rows: printed, and at the top of the report."""
    rows = preference_rows(results) + reward_model_rows(results)
    if "metadata" in results:
        rows += [(f"makes things up, closed domain: {name}", percent(results["metadata"][MADE_UP][name]))
                 for name in ("SFT", "PPO-ptx")]
    return rows + (tax_rows(*results["zero-shot"]) if results["zero-shot"] else [])


def preference_rows(results):
    """Win rates. In the built-in world only those by held-out labelers."""
    rows = []
    for judge in [HELD_OUT] if results["world"] else judges_of(results):
        for name, by_judge in results["preference"].items():
            if judge in by_judge:
                text = f"{name} preferred to SFT" + (" (itself: 50%)" if name == "SFT" else "")
                rows.append((text if results["world"] else f"{text}, {judge}", percent(by_judge[judge])))
    return rows


def reward_model_rows(results):
    rows = []
    for team, by_judge in results["reward model"].items():
        if not results["world"]:
            rows += [(f"{judge} on unseen prompts, {team}", percent(share)) for judge, share in by_judge.items()]
        elif team == TRAINING:
            rows += [("reward model, unseen prompts (ceiling)",
                      f"{percent(by_judge['reward model'])} ({percent(by_judge['ceiling'])})"),
                     ("reward model's way from 50% to the ceiling", way_to_ceiling(by_judge)),
                     ("two training labelers agree", percent(by_judge["agreement"]))]
    return rows


def tax_rows(tasks, changes):
    rows = [(f"zero-shot tasks, {name} minus SFT", percent(changes[f"{name} - SFT"], True))
            for name in trained_from_sft() if f"{name} - SFT" in changes]
    if "PPO - SFT" in changes and "PPO-ptx - PPO" in changes:
        sft, ppo, ppo_ptx = (tasks["all abilities"][name][0] for name in ("SFT", "PPO", "PPO-ptx"))
        drop, regained = sft - ppo, ppo_ptx - ppo
        certain = drop > changes["PPO - SFT"][1]  # larger than its interval
        rows.append(("of PPO's drop, PPO-ptx gives back", f"{regained / drop:.0%}" if certain else "no drop"))
    return rows


# ---------------------------------------------------------------- sections of report.md

ABOUT_WORLD = ("the labelers are programs (data/tinyworld/labelers.py). Intervals are 95%; ± 0 says nothing: all "
               "items were alike, or of one customer. Rates and tasks are judged by the world's rules, without a labeler's noise.")
ABOUT_JUDGES = {
    "judge": "The judge is a reward model, but not the one that trained the policies. It is no person: it started from "
             "the same SFT model and may share its mistakes.",
    "people": "People are those who filled in pairs.csv.",
}


def sections(results):
    """The paragraphs of report.md."""
    yield "# Report"
    yield from summary_section(results)
    yield from preference_section(results)
    if "metadata" in results:
        yield from metadata_section(results)
    if results["reward model"]:
        yield from reward_model_section(results)
    if results["zero-shot"]:
        yield from tax_section(results)
    yield "## SFT epochs (section 3.4)"
    yield table(["epoch", "validation loss", "reward-model score"],
                [[epoch, f"{loss:.4f}", f"{mean:.2f} ± {error:.2f}"]
                 for epoch, loss, mean, error in results["sft epochs"]])
    yield "The last epoch is used."
    if results["runs"]:
        yield "## Training"
        yield "![training](figures/training.png)"
    yield "## Samples"
    for use_case, prompt, responses in results["samples"]:
        lines = "\n".join(f"- **{name}**: {' / '.join(text.splitlines()) or '(nothing)'}"
                          for name, text in responses.items())
        yield f"**{use_case}**\n\n```\n{prompt.rstrip()}\n```\n\n{lines}"


def summary_section(results):
    about = [ABOUT_WORLD] if results["world"] else [
        "intervals are 95%.", *(ABOUT_JUDGES[judge] for judge in judges_of(results) if judge in ABOUT_JUDGES)]
    yield (f"{results['prompts']:,} test prompts of {results['customers']} customers or conversations never trained on"
           f"; {' '.join(about)}")
    title = "in short (preferences by held-out labelers)" if results["world"] else "in short"
    yield table([title, ""], headline(results))


def preference_section(results):
    judges = judges_of(results)
    yield "## Preferred to SFT (figures 1 and 3)"
    yield table(["model", *judges, *results["scores"]],
                [[name, *(percent(by_judge.get(judge)) for judge in judges),
                  *(by_model[name][0] for by_model in results["scores"].values())]
                 for name, by_judge in results["preference"].items()])
    note = "A tie counts half. The row SFT compares two samples of the same model."
    yield note + (" The last column is known only because the labelers are programs." if results["world"] else "")
    if judges:
        yield "![win rates](figures/preference.png)"


def metadata_section(results):
    names = list(results["preference"])
    yield "## Metadata (figure 4)"
    yield table(["rate", *names], [[rate, *(percent(by_model[name]) for name in names)]
                                   for rate, by_model in results["metadata"].items()])
    yield "![metadata](figures/metadata.png)"


def reward_model_section(results):
    by_team = results["reward model"]
    judges = list(next(iter(by_team.values())))
    titles = {"agreement": "another labeler agrees", "ceiling": "ceiling: the true average preference"}
    header = ["pairs ranked by", *(titles.get(judge, judge) for judge in judges)]
    rows = [[team, *(percent(by_judge[judge]) for judge in judges)] for team, by_judge in by_team.items()]
    if results["world"]:  # only the built-in world has a ceiling
        header.append("of the way from 50% to the ceiling")
        rows = [[*row, way_to_ceiling(by_judge)] for row, by_judge in zip(rows, by_team.values())]
    yield "## Reward model on unseen prompts (section 3.3)"
    yield table(header, rows)


def tax_section(results):
    tasks, changes = results["zero-shot"]
    names = list(tasks["all abilities"])
    yield "## Zero-shot tasks: the alignment tax (figure 25)"
    yield table(["task", *names], [[kind, *(percent(by_model[name]) for name in names)]
                                   for kind, by_model in tasks.items()])
    if changes:
        yield table(["change, all abilities, item by item", ""],
                    [[what, percent(change, True)] for what, change in changes.items()])
    note = ("Next word: the share of tokens of held-out web pages to which the model gives the highest probability. "
            "All abilities: the next word and all tasks except those of safety; each item (a task or a page) counts "
            "once.")
    safety = ("Bias: how often the stereotype is more likely; 50% is no bias. Toxicity: how often a kind reply is more "
              "likely than an insult. ")
    yield safety + note if results["world"] else note
    yield "![alignment tax](figures/tax.png)"


# ---------------------------------------------------------------- figures

def bars(axis, groups, values, names, label):
    """Grouped bars with error bars, in percent. values[group][name] = (mean, error, n)."""
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        points = [(g + (k - (len(names) - 1) / 2) * width, *values[group][name][:2]) for g, group in enumerate(groups)
                  if name in values[group] and values[group][name][0] is not None]
        if not points:
            continue
        x, y, error = zip(*points)
        axis.bar(x, [100 * v for v in y], width * 0.92, yerr=[100 * e for e in error], label=name, capsize=2,
                 color=colors()[name], edgecolor="black", linewidth=0.5)
    axis.set_xticks(range(len(groups)), groups)
    axis.set(ylabel=label, ylim=(0, 105))
    axis.spines[["top", "right"]].set_visible(False)


def smooth(values):
    """The mean over a window around each value, of about a tenth of them."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw(results, out):
    """figures/*.png"""
    import matplotlib  # only figures need it

    matplotlib.use("Agg")
    (Path(out) / "figures").mkdir(parents=True, exist_ok=True)
    names, judges = list(results["preference"]), judges_of(results)
    if judges:
        by_judge = {judge: {name: rates[judge] for name, rates in results["preference"].items() if judge in rates}
                    for judge in judges}
        draw_bars(out, "preference", by_judge, names, "preferred to SFT (%), 95% intervals", width=7, line_at=50)
    if results["zero-shot"]:
        tasks = {kind: by_model for kind, by_model in results["zero-shot"][0].items() if kind not in results["safety"]}
        draw_bars(out, "tax", tasks, list(tasks["all abilities"]), "zero-shot accuracy (%), 95% intervals", width=9)
    if "metadata" in results:
        draw_metadata(out, results["metadata"], names)
    if results["runs"]:
        draw_training(out, {name: read_log(out, run) for name, run in results["runs"].items()})


def save(figure, out, name, rect=(0, 0, 1, 1)):
    import matplotlib.pyplot as plt

    figure.tight_layout(rect=rect)
    path = Path(out) / "figures" / f"{name}.png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)


def draw_bars(out, name, values, names, label, width, line_at=None):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(width, 3.6))
    bars(axis, list(values), values, names, label)
    if line_at is not None:
        axis.axhline(line_at, color="black", linewidth=0.8, linestyle=":")
    axis.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.17), frameon=False, fontsize=8)
    save(figure, out, name)


def draw_metadata(out, rates, names):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(rates), figsize=(11, 3.2), sharey=True)
    for axis, (rate, by_model) in zip(axes, rates.items()):
        rate = rate.replace(" (", "\n(")
        bars(axis, [rate], {rate: by_model}, names, "responses (%), 95% intervals" if axis is axes[0] else "")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="upper center", frameon=False, fontsize=8)
    save(figure, out, "metadata", rect=(0, 0, 1, 0.93))


def draw_training(out, logs):
    """What PPO logs: thin lines, with the smoothed curve over them. logs: {model: lines}."""
    import matplotlib.pyplot as plt

    labels = {"score": "mean score", "kl": "KL from SFT (nats per response)", "entropy": "entropy (nats per token)"}
    figure, axes = plt.subplots(1, len(labels), figsize=(11, 3.2))
    for axis, (key, label) in zip(axes, labels.items()):
        for name, log in logs.items():
            steps, values, color = [line["step"] for line in log], [line[key] for line in log], colors()[name]
            axis.plot(steps, values, color=color, linewidth=0.6, alpha=0.5)
            axis.plot(steps, smooth(values), color=color, linewidth=1.8, label=name,
                      linestyle="--" if name == "PPO" else "-")
        axis.set(xlabel="PPO iteration", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    if logs:
        axes[0].legend(frameon=False)
    save(figure, out, "training")


if __name__ == "__main__":
    launch(main, Config)
