"""The paper's figures, measured in the built-in world: report.md and figures/ from the files of paper/measure.py and
from the runs' logs.

    python paper/report.py --out out/paper          # `make paper` calls it at its end; nothing is trained or sampled
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

from common.config import UserError, launch
from common.files import write_atomically
from paper import results
from paper.models import colors
from paper.results import Claim, Measurements, above, alike, all_of, any_of, below, estimate, plain, seeds_of
from paper.tables import percent, read_log, table


@dataclass(frozen=True)
class Config:
    out: str = "out/paper"  # the folder of the runs and of measured/; the report is written there
    data: str = "data/tinyworld"  # the dataset's folder


# The paper's models: the files of their measurements, and line styles that differ when printed in gray.
FILES = {"GPT": "base/model", "GPT prompted": "base/prompted", "SFT": "sft/model", "PPO": "ppo_noptx/model",
         "PPO-ptx": "ppo/model"}
STYLES = {"GPT": ":o", "GPT prompted": "-.s", "SFT": "--^", "PPO": "-D", "PPO-ptx": "-o"}
MODELS = tuple(FILES)
COLORS = colors()
HELD_OUT, TRAINING = "preferred by held-out labelers", "preferred by training labelers"


# ---------------------------------------------------------------- figures

class Figure:
    """A PNG in figures/, drawn by matplotlib: `with Figure(...) as axes:` a list of axes."""

    def __init__(self, config, name, width=7.0, panels=1, height=3.6):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        self.path, self.plt = Path(config.out) / "figures" / f"{name}.png", plt
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.figure, axes = plt.subplots(1, panels, figsize=(width, height), squeeze=False)
        self.axes = list(axes[0])
        for axis in self.axes:
            axis.spines[["top", "right"]].set_visible(False)

    def __enter__(self):
        return self.axes

    def __exit__(self, kind, *_):
        if kind is None:
            entries = {label: handle for axis in self.figure.axes
                       for handle, label in zip(*axis.get_legend_handles_labels())}
            if entries:
                self.figure.legend(entries.values(), entries, ncols=5, loc="upper center", frameon=False, fontsize=8)
            self.figure.tight_layout(rect=(0, 0, 1, 0.92 if entries else 1))
            write_atomically(self.path, lambda path: self.figure.savefig(path, dpi=150, format="png"))
        self.plt.close(self.figure)


def line(axis, x, numbers, name, style=None, color=None, scale=100, **more):
    """A line with error bars through numbers[i] = (mean, error, ...) at x[i]."""
    axis.errorbar(x, [scale * n[0] for n in numbers], [scale * n[1] for n in numbers], fmt=style or STYLES[name],
                  color=color or COLORS[name], label=name, markeredgecolor="black", markeredgewidth=0.5, markersize=5,
                  capsize=2, **more)


def by_size(axis, m, **more):
    """The axis of the sizes, in parameters."""
    axis.set(xscale="log", xlabel="model (parameters)", **more)
    axis.set_xticks([m.parameters[size] for size in m.sizes],
                    [f"{size}\n({short(m.parameters[size])})" for size in m.sizes])
    axis.minorticks_off()


def places(m, name):
    """The x coordinates of a model's points on that axis, shifted a little so that no model hides another."""
    return [m.parameters[size] * 1.05 ** (MODELS.index(name) - 2) for size in m.sizes]


def short(n):
    return f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"


def columns(axis, names, numbers, colors, scale=100):
    axis.bar(range(len(names)), [scale * n[0] for n in numbers], 0.7, yerr=[scale * n[1] for n in numbers], capsize=3,
             color=colors, edgecolor="black", linewidth=0.5)
    axis.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=8)


# ---------------------------------------------------------------- the sections
# Each yields Markdown, and claims.

def preference(m, config):
    largest, smallest = m.sizes[-1], m.sizes[0]
    rates = {judge: {size: {name: m.mean(size, file, judge) for name, file in FILES.items()} for size in m.sizes}
             for judge in (TRAINING, HELD_OUT)}
    with Figure(config, "figure1", 9, 2) as axes:
        for axis, (judge, by) in zip(axes, rates.items()):
            for name in MODELS:
                line(axis, places(m, name), [by[size][name] for size in m.sizes], name)
            axis.axhline(50, color="black", linewidth=0.8, linestyle=":")
            by_size(axis, m, title=judge.partition(" ")[2], ylim=(0, 100),
                    ylabel="preferred to the largest SFT (%)" if axis is axes[0] else "")
    yield "## Figures 1 and 3: preferred to the largest SFT model"
    yield "![win rates by size](figures/figure1.png)"
    for judge, by in rates.items():
        yield table([judge.partition(" ")[2], *MODELS],
                    [[f"{size}, {m.parameters[size]:,} parameters, {seeds_of(by[size]['SFT'])}",
                      *(percent(by[size][name]) for name in MODELS)] for size in m.sizes])
    yield ("One reward model, of the laptop's size, serves all. The baseline is one sample of the largest SFT model, "
           "not the one measured as SFT.")
    steps = [("GPT prompted", "GPT"), ("SFT", "GPT prompted"), ("PPO", "SFT"), ("PPO-ptx", "SFT")]
    for size in m.sizes:
        changes = [m.change(size, FILES[better], FILES[worse], HELD_OUT) for better, worse in steps]
        yield Claim(f"GPT < GPT prompted < SFT < PPO, PPO-ptx ({size})", "so at every size",
                    "steps of " + ", ".join(f"{100 * x[0]:+.1f}" for x in changes), all_of(*map(above, changes)))
        mixed = m.change(size, FILES["PPO-ptx"], FILES["PPO"], HELD_OUT)
        yield Claim(f"pretraining gradients change preference little, by less than 5% ({size})", "no large change",
                    percent(mixed, True), alike(mixed, 0.05))
        apart = estimate([[a - b for a, b in zip(held_out, training)] for [held_out], [training] in zip(
            *(m.items(size, [FILES["PPO-ptx"]], judge) for judge in (HELD_OUT, TRAINING)))])
        yield Claim(f"held-out labelers prefer PPO-ptx about as much as training labelers, within 5% ({size})",
                    "about as much", percent(apart, True), alike(apart, 0.05))
    for size, theirs, in_paper in ((smallest, "GPT", "preferred"), (largest, "GPT", "85% ± 3%"),
                                   (largest, "GPT prompted", "71% ± 4%")):
        number = m.duel(size, FILES["PPO-ptx"], largest, FILES[theirs])
        which = "the smallest" if size == smallest else "the largest"
        yield Claim(f"{which} PPO-ptx is preferred to the largest {theirs}", in_paper, percent(number),
                    above(number, 0.5))


def metadata(m, config):
    keys = [key for key in m.read(f"{m.seeds[m.sizes[0]][0]}/sft/model")["numbers"] if key.startswith("metadata: ")]
    size = "laptop"  # which has several seeds
    rates = {key: {name: m.mean(size, FILES[name], key) for name in MODELS} for key in keys}
    with Figure(config, "figure4", 11, 4) as axes:
        for axis, (key, by) in zip(axes, rates.items()):
            columns(axis, MODELS, [by[name] for name in MODELS], [COLORS[name] for name in MODELS])
            axis.set_title(key.partition(": ")[2].replace(" (", "\n("), fontsize=9)
            axis.set(ylim=(0, 105), ylabel="responses (%)" if axis is axes[0] else "")
            axis.tick_params(axis="x", rotation=60)
    yield "## Figure 4: metadata"
    yield "![metadata](figures/figure4.png)"
    yield table([f"rate ({size}, {seeds_of(rates[keys[0]]['SFT'])})", *MODELS],
                [[key.partition(": ")[2], *(percent(by[name]) for name in MODELS)] for key, by in rates.items()])
    task, constraint, up, fits = keys
    for key, text in ((task, "attempts the task"), (constraint, "keeps constraints"),
                      (fits, "fits a customer assistant")):
        change = m.change(size, FILES["PPO"], FILES["GPT"], key)
        yield Claim(f"PPO {text} more often than GPT", "yes", percent(change, True), above(change))
    change = m.change(size, FILES["PPO-ptx"], FILES["GPT"], up)
    yield Claim("in closed domains PPO-ptx makes things up less often than GPT", "21% against 41%",
                f"{percent(rates[up]['PPO-ptx'])} against {percent(rates[up]['GPT'])}", below(change))


def public_data(m, config):
    largest = m.sizes[-1]
    group, numbers, chosen = m.seeds[largest][0], {}, {}
    for mix in ("flan", "t0"):
        files = sorted(path.stem for path in (m.folder / group / mix).glob("epoch*.json"))
        if not files:
            raise UserError(f"{m.folder / group / mix} holds no measurements; `make paper` makes them")
        numbers = {file: m.read(f"{group}/{mix}/{file}")["numbers"] for file in files}
        scores = {file: estimate([numbers[file]["score, validation prompts"]])[0] for file in files}
        chosen[mix] = f"{group}/{mix}/{max(scores, key=scores.get)}"
    numbers = {name: m.mean(largest, file, "rating") for name, file in FILES.items()}
    numbers |= {f"{mix.upper()}-like": estimate([m.read(file)["numbers"]["rating"]]) for mix, file in chosen.items()}
    names = ["GPT", "GPT prompted", "FLAN-like", "T0-like", "SFT", "PPO", "PPO-ptx"]
    with Figure(config, "figure5a") as (axis,):
        columns(axis, names, [numbers[name] for name in names], [COLORS.get(name, "#1f78b4") for name in names],
                scale=1)
        axis.set(ylabel="rating, 1 to 7 (held-out labelers)", ylim=(1, 7))
    yield "## Figure 5a: ratings, compared with models of public tasks"
    yield "![ratings](figures/figure5a.png)"
    yield table(["model", "rating"], [[name, plain(numbers[name])] for name in names])
    best = ", ".join(file.rpartition("/")[2] for file in chosen.values())
    yield ("At the largest size, one seed. Each model of public tasks is its checkpoint with the best reward-model "
           f"score on validation prompts: {best} (FLAN-like, T0-like).")
    for mix, in_paper in (("flan", "78% ± 4%"), ("t0", "79% ± 4%")):
        file = f"{mix}/{chosen[mix].rpartition('/')[2]}"
        gpt, prompted, sft = (m.change(largest, file, FILES[name], "rating") for name in ("GPT", "GPT prompted", "SFT"))
        yield Claim(f"the {mix.upper()}-like model rates above GPT and below SFT", "yes",
                    f"{plain(gpt, True)} and {plain(sft, True)}", all_of(above(gpt), below(sft)))
        yield Claim("and like GPT prompted, within 0.5", "on par", plain(prompted, True), alike(prompted, 0.5))
        number = m.duel(largest, FILES["PPO-ptx"], largest, file)
        yield Claim(f"PPO-ptx is preferred to the {mix.upper()}-like model (arXiv, 4.1)", in_paper, percent(number),
                    above(number, 0.5))


def truth(m, config):
    models = list(MODELS)
    with Figure(config, "figure5b", 10, len(m.sizes)) as axes:
        for axis, size in zip(axes, m.sizes):
            truthful, both = ([m.mean(size, FILES[name], key) for name in models]
                              for key in ("truthful", "truthful and informative"))
            axis.bar(range(len(models)), [100 * n[0] for n in truthful], 0.8, color="#eeeeee", edgecolor="gray",
                     linewidth=0.5)
            columns(axis, models, both, [COLORS[name] for name in models])
            label = "answers (%): truthful (gray),\nand informative (color)" if axis is axes[0] else ""
            axis.set(title=size, ylim=(0, 100), ylabel=label)
            axis.tick_params(axis="x", rotation=60)
    yield "## Figure 5b: truth"
    yield "![truth](figures/figure5b.png)"

    def both_rates(size, name):
        return " / ".join(percent(m.mean(size, FILES[name], key)) for key in ("truthful", "truthful and informative"))

    yield table(["truthful / truthful and informative", *models],
                [[size, *(both_rates(size, name) for name in models)] for size in m.sizes])
    yield ("Questions that the world's people commonly answer wrong. Unlike TruthfulQA's, these questions are known to "
           "the models: customers ask about all facts, and labelers' demonstrations and rankings prefer the truth. So "
           "this shows if the models learn what labelers prefer, not if it generalizes to other questions.")
    for size in m.sizes:
        change = m.change(size, FILES["PPO"], FILES["GPT"], "truthful and informative")
        yield Claim(f"PPO is truthful and informative more often than GPT ({size})", "yes", percent(change, True),
                    above(change))
    change = m.change(m.sizes[0], FILES["PPO-ptx"], FILES["GPT"], "truthful and informative")
    yield Claim("the smallest PPO-ptx is so slightly less often", "slightly less", percent(change, True), below(change))


def toxicity(m, config):
    models = [name for name in MODELS if name != "GPT prompted"]
    rules = ("no prompt", "respectful prompt", "biased prompt")
    size = "laptop"  # which has several seeds
    rates = {rule: {name: m.mean(size, FILES[name], f"toxic, {rule}") for name in models} for rule in rules}
    with Figure(config, "figure5c", 9, 3) as axes:
        for axis, (rule, by) in zip(axes, rates.items()):
            columns(axis, models, list(by.values()), [COLORS[name] for name in models])
            axis.set(title=rule, ylim=(0, 100), ylabel="replies that insult (%)" if axis is axes[0] else "")
    yield "## Figure 5c: toxicity (and, when asked for it, section 5.2)"
    yield "![toxicity](figures/figure5c.png)"
    yield table([f"replies that insult ({size}, {seeds_of(rates['no prompt']['SFT'])})", *models],
                [[rule, *(percent(by[name]) for name in models)] for rule, by in rates.items()])
    yield ("The next reply in a forum that begins with no rule, with a rule to be respectful, or with permission to be "
           "rude. Nine in ten of the web's replies follow such a rule, so with permission a model can hardly be more "
           "toxic than GPT.")
    none, respectful, biased = (m.change(size, FILES["PPO-ptx"], FILES["GPT"], f"toxic, {rule}") for rule in rules)
    by_model = rates["respectful prompt"]
    relative = by_model["PPO-ptx"][0] / max(1e-9, by_model["GPT"][0]) - 1
    yield Claim("asked to be respectful, PPO-ptx is less toxic than GPT", "about 25% fewer",
                f"{percent(respectful, True)}, or {relative:+.0%}", below(respectful))
    yield Claim("without a prompt there is no advantage, within 5%", "none", percent(none, True), alike(none, 0.05))
    yield Claim("asked to be biased, it is more toxic than GPT", "more", percent(biased, True), above(biased))


def bias(m, config):
    models = [name for name in MODELS if name != "GPT prompted"]
    rows = {size: {name: (m.mean(size, FILES[name], "stereotype preferred"),
                          m.mean(size, FILES[name], "bias entropy"))
                   for name in models} for size in m.sizes}
    with Figure(config, "bias", 5) as (axis,):
        for name in models:
            line(axis, places(m, name), [rows[size][name][0] for size in m.sizes], name)
        axis.axhline(50, color="black", linewidth=0.8, linestyle=":")
        by_size(axis, m, ylabel="stereotype more likely (%)", ylim=(0, 105))
    yield "## Bias pairs: a stereotype and its opposite (appendix E)"
    yield "![bias](figures/bias.png)"
    yield table(["stereotype more likely / entropy of the choice, bits", *models],
                [[size, *(f"{percent(by[name][0])} / {plain(by[name][1])}" for name in models)]
                 for size, by in rows.items()])
    yield ("Intervals are over the towns that people have stereotypes about, because the pairs of one town are "
           "similar. ± 0 means that all pairs gave the same result, so that no verdict is possible.")
    for size in m.sizes:
        change = m.change(size, FILES["PPO-ptx"], FILES["GPT"], "stereotype preferred")
        yield Claim(f"PPO-ptx is as biased as GPT, within 10% ({size})", "no significant improvement",
                    percent(change, True), alike(change, 0.1) if change[1] else None)


def labeler_groups(m, config):
    folders = sorted((Path(config.out) / m.seeds["laptop"][0]).glob("fold*"))
    rows = [read_log(folder.parent, folder.name)[-1] for folder in folders]
    if not rows:
        raise UserError(f"{config.out} holds no fold*; `make paper` makes them")
    numbers = {labelers: estimate([[row[key]] for row in rows])
               for labelers, key in (("seen labelers", "valid_accuracy"), ("unseen labelers", "held_out_accuracy"))}
    gap = estimate([[row["valid_accuracy"] - row["held_out_accuracy"]] for row in rows])
    with Figure(config, "labelers", 4.5) as (axis,):
        columns(axis, list(numbers), list(numbers.values()), ["#bdbdbd", "#a6004d"])
        axis.set(ylabel="pairs ordered as the labeler did (%)", ylim=(50, 90))
    yield "## Reward models and labelers whose rankings they never saw (appendix E)"
    yield "![groups of labelers](figures/labelers.png)"
    yield table(["accuracy on unseen prompts", f"mean of {len(rows)} folds"],
                [[name, percent(x)] for name, x in numbers.items()])
    yield "Intervals over the folds. Each reward model is trained without the rankings of a fifth of the labelers."
    yield Claim("accuracy on unseen labelers is within 5% of that on seen ones", "69.6 ± 0.9% against 72.4 ± 0.4%",
                f"{percent(numbers['unseen labelers'])} against {percent(numbers['seen labelers'])}", alike(gap, 0.05))


def tax(m, config):
    keys, runs, size = m.abilities(), {"PPO": "ppo_noptx", "PPO-ptx": "ppo"}, "laptop"
    steps = sorted(int(path.stem[9:]) for path in (m.folder / m.seeds[size][0] / "ppo").glob("iteration*.json"))
    last = len(read_log(Path(config.out) / m.seeds[size][0], "ppo"))
    change = {}  # {model: [change since SFT at each step]}
    for name, run in runs.items():
        files = ["sft/model", *(f"{run}/iteration{n}" for n in steps), f"{run}/model"]
        change[name] = [m.change(size, file, "sft/model", keys) for file in files]
    models = [name for name in MODELS if name != "GPT prompted"]
    tasks = {key: {name: m.mean(size, FILES[name], key) for name in models} for key in [*keys, tuple(keys)]}
    with Figure(config, "tax", 5.5) as (axis,):
        for name in runs:
            line(axis, [0, *steps, last], change[name], name)
        axis.axhline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="PPO iteration", ylabel="zero-shot tasks, minus SFT's (points)")
    yield "## The alignment tax over the course of training (4.2)"
    yield "![alignment tax](figures/tax.png)"
    yield table(["change of all abilities since SFT", *(f"iteration {n}" for n in (*steps, last))],
                [[name, *(percent(x, True) for x in change[name][1:])] for name in runs])
    yield table(["at the end", *models],
                [[key.partition(": ")[2] if isinstance(key, str) else "all abilities", *map(percent, by.values())]
                 for key, by in tasks.items()])
    yield (f"At the laptop's size, {seeds_of(change['PPO'][-1])}. The weights are PPO's averages, which lag behind: at "
           "iteration 26 more than a third of the average is still SFT's weights.")
    gpt, drop = m.change(size, FILES["PPO"], FILES["GPT"], keys), change["PPO"][-1]
    yield Claim("PPO loses on the tasks against GPT", "it does", percent(gpt, True), below(gpt))
    yield Claim("and against SFT", results.ELSEWHERE, percent(drop, True), below(drop))
    most = m.weighted(size, [(1, FILES["PPO-ptx"]), (-0.5, FILES["PPO"]), (-0.5, "sft/model")], keys)
    yield Claim("PPO-ptx gives back more than half of what PPO loses against SFT", "most of it",
                f"{percent(most, True)} above half", above(most) if below(drop) else None)


def coefficients(m, config):
    keys, size = m.abilities(), "laptop"
    group = m.seeds[size][0]

    def found(prefix):
        names = [path.name for path in (m.folder / group).glob(f"{prefix}*")]
        return {float(name.removeprefix(prefix)): name for name in names}

    sweeps = {  # coefficient -> the run's folder; the default run's two policies belong to both
        "pretraining coefficient (β = 0.1)": dict(sorted((found("ppo_ptx") | {0.0: "ppo_noptx", 0.5: "ppo"}).items())),
        "KL coefficient (no pretraining gradients)": dict(sorted((found("ppo_kl") | {0.1: "ppo_noptx"}).items()))}
    change = {what: {x: m.change(size, f"{run}/model", "sft/model", keys) for x, run in runs.items()}
              for what, runs in sweeps.items()}
    score = {what: {x: m.mean(size, f"{run}/model", "score") for x, run in runs.items()}
             for what, runs in sweeps.items()}
    with Figure(config, "coefficients", 9, 2) as axes:
        for axis, (what, runs) in zip(axes, sweeps.items()):
            x = [max(value, 0.02) for value in runs]  # 0 at the left edge of a logarithmic axis
            line(axis, x, list(change[what].values()), "zero-shot tasks, minus SFT's", "-o", COLORS["PPO-ptx"])
            axis.axhline(0, color="black", linewidth=0.8, linestyle=":")
            axis.set(xscale="log", xlabel=what, ylabel="tasks, minus SFT's (points)")
            axis.set_xticks(x, [f"{value:g}" for value in runs], minor=False)
            axis.minorticks_off()
            right = axis.twinx()
            beside = [1.1 * value for value in x]  # so that neither's error bars hide the other's
            line(right, beside, list(score[what].values()), "reward-model score", "--s", "#666666", scale=1)
            right.set(ylabel="reward-model score")
    yield "## Coefficients (4.2, appendix E)"
    yield "![coefficients](figures/coefficients.png)"
    for what, runs in sweeps.items():
        yield table([what, *(f"{x:g}" for x in runs)],
                    [["tasks, minus SFT's", *(percent(change[what][x], True) for x in runs)],
                     ["reward-model score", *(plain(score[what][x]) for x in runs)]])
    yield f"At the laptop's size, {seeds_of(next(iter(score[what].values())))}."
    mix, _ = sweeps
    taxed = below(change[mix][0.0])  # without a tax there is nothing to undo

    def works(run):
        """Does it regain more than half of PPO's loss on the tasks, and keep four fifths of PPO's gain in reward?"""
        back = m.weighted(size, [(1, f"{run}/model"), (-0.5, "ppo_noptx/model"), (-0.5, "sft/model")], keys)
        kept = m.weighted(size, [(1, f"{run}/model"), (-0.8, "ppo_noptx/model"), (-0.2, "sft/model")], "score")
        return all_of(above(back), above(kept))

    def verdicts(by_coefficient):
        words = {True: "yes", False: "no", None: "open"}
        return ", ".join(f"{x:g}: {words[verdict]}" for x, verdict in by_coefficient.items())

    mixes, kls = ({x: works(run) for x, run in runs.items() if run != "ppo_noptx"} for runs in sweeps.values())
    yield Claim("the pretraining mix gives more than half of the loss back and keeps four fifths of the reward",
                "it works", verdicts(mixes), any_of(*mixes.values()) if taxed else None)
    larger = {x: v for x, v in kls.items() if x > 0.1}
    none = {True: False, False: True, None: None}[any_of(*larger.values())]
    yield Claim("no larger KL coefficient does", "none does", verdicts(larger), none if taxed else None)


def overoptimization(m, config):
    size, true = "laptop", "truly preferred"
    group = m.seeds[size][0]
    names = {"ppo_long": "PPO with the KL penalty", "ppo_long_kl0": "PPO without it"}
    paths, points = {}, {}
    for run, name in names.items():
        steps = sorted(int(path.stem[9:]) for path in (m.folder / group / run).glob("iteration*.json"))
        paths[name] = ["sft/model", *(f"{run}/iteration{n}" for n in steps), f"{run}/model"]
        points[name] = [tuple(m.mean(size, file, key) for key in ("kl", "score", true)) for file in paths[name]]
    ns = sorted(int(key.split()[2][:-1]) for key in m.read(f"{group}/bestof")["numbers"] if key.endswith(": score"))
    points["best of n"] = [((math.log(n) - (n - 1) / n, 0.0), m.mean(size, "bestof", f"best of {n}: score"),
                            m.mean(size, "bestof", f"best of {n}: {true}")) for n in ns]
    styles = {"PPO with the KL penalty": ("-D", COLORS["PPO"]), "PPO without it": ("--o", "#d95f02"),
              "best of n": (":s", "#1b9e77")}
    with Figure(config, "overoptimization", 9, 2) as axes:
        for name, (style, color) in styles.items():
            x = [max(0.0, p[0][0]) ** 0.5 for p in points[name]]
            line(axes[0], x, [p[1] for p in points[name]], name, style, color, scale=1)
            line(axes[1], x, [p[2] for p in points[name]], name, style, color)
        for axis, label in zip(axes, ("reward-model score", "truly preferred to the largest SFT (%)")):
            axis.set(xlabel="√KL from SFT (√nats per response), linear up to 2", ylabel=label)
            axis.set_xscale("symlog", linthresh=2)
            axis.set_xticks([0, 0.5, 1, 1.5, 2, 4, 8, 16], ["0", "0.5", "1", "1.5", "2", "4", "8", "16"])
            axis.minorticks_off()
    yield "## Over-optimization of the reward model (3.4)"
    yield "![over-optimization](figures/overoptimization.png)"
    for name in names.values():
        yield table([name, *(file.split("/")[1] if file.startswith("ppo") else "SFT" for file in paths[name])],
                    [["KL, nats", *(plain(p[0]) for p in points[name])],
                     ["reward-model score", *(plain(p[1]) for p in points[name])],
                     ["truly preferred", *(percent(p[2]) for p in points[name])]])
    yield table(["best of n", *map(str, ns)],
                [["KL, nats: log n - (n - 1) / n", *(f"{p[0][0]:.2f}" for p in points["best of n"])],
                 ["reward-model score", *(plain(p[1]) for p in points["best of n"])],
                 ["truly preferred", *(percent(p[2]) for p in points["best of n"])]])
    seeds = "; ".join(f"{name}: {seeds_of(p[-1][1])}" for name, p in points.items())
    yield ("True preference is what labelers would say on average and without noise. It is known only because they are "
           "programs, and no model sees it. The runs are three times as long as the default's. Best of n needs no "
           f"training, but n times the sampling; it is measured on half of the prompts. {seeds}.")
    kept, free = (paths[name] for name in names.values())
    some, others = slice(0, None, 2), slice(1, None, 2)  # prompts on which the peak is found, and judged
    peak = max(free, key=lambda file: m.weighted(size, [(1, file)], true, some)[0])
    fall, rise = m.change(size, free[-1], peak, true, others), m.change(size, free[-1], free[len(free) // 2], "score")
    middle = free[len(free) // 2].partition("/")[2]
    yield Claim(f"without the KL penalty the reward-model score goes on rising after {middle}", results.ELSEWHERE,
                plain(rise, True), above(rise))
    yield Claim("and true preference falls behind its peak (Stiennon et al. 2020 see that)", results.ELSEWHERE,
                f"{percent(fall, True)} since {peak.partition('/')[2]}", False if peak == free[-1] else below(fall))
    gain = m.change(size, kept[-1], free[-1], true)
    yield Claim("the KL penalty mitigates over-optimization: more true preference at the end with it than without",
                "it does (3.4)", percent(gain, True), above(gain))


def sft_epochs(m, config):
    size = "laptop"
    groups = [group for group in m.seeds[size] if (m.folder / group / "sft16").exists()]
    logs = [[row for row in read_log(Path(config.out) / group, "sft16") if "epoch" in row]
            for group in groups or m.seeds[size]]
    losses = [estimate([[log[i]["valid_loss"]] for log in logs]) for i in range(len(logs[0]))]
    kept = (m.folder / m.seeds[size][0] / "sft16").glob("epoch*.json")
    epochs = [*sorted(int(path.stem[5:]) for path in kept), len(losses)]
    files = [f"sft16/epoch{n}" for n in epochs[:-1]] + ["sft16/model"]
    scores = [m.mean(size, file, "score, validation prompts") for file in files]
    with Figure(config, "epochs", 5.5) as (axis,):
        line(axis, range(1, len(losses) + 1), losses, "validation loss", "--^", COLORS["SFT"], scale=1)
        axis.set(xlabel="SFT epoch", ylabel="validation loss (nats a token)")
        right = axis.twinx()
        line(right, [n + 0.2 for n in epochs], scores, "reward-model score", "-s", "#666666", scale=1)
        right.set(ylabel="reward-model score, validation prompts")
    yield "## SFT epochs (3.4)"
    yield "![SFT epochs](figures/epochs.png)"

    def exact(number, sign=""):
        mean, error, seeds = number
        return f"{mean:{sign}.4f} ± {error:.4f}" if seeds > 1 else f"{mean:{sign}.4f}"  # one seed has no interval

    yield table(["epoch", *map(str, epochs)], [["validation loss", *(exact(losses[n - 1]) for n in epochs)],
                                               ["reward-model score", *map(plain, scores)]])
    yield f"At the laptop's size, {seeds_of(scores[-1])}; dropout 0.2 (C.1)."
    lowest = min(range(len(losses)), key=lambda i: losses[i][0]) + 1
    # Since the first epoch.
    rises = [estimate([[log[i]["valid_loss"] - log[0]["valid_loss"]] for log in logs]) for i in (1, -1)]
    verdict = all_of(*map(above, rises)) if rises[0][2] > 1 else None  # one seed has no interval
    yield Claim("SFT overfits on validation loss after 1 epoch: it is higher after 2 epochs, and after 16",
                "it rises after 1 epoch",
                f"{exact(rises[0], '+')} and {exact(rises[1], '+')}; lowest after epoch {lowest}", verdict)
    climb = m.change(size, files[-1], "sft16/epoch1", "score, validation prompts")
    yield Claim("reward-model score is higher after 16 epochs than after 1", "higher", plain(climb, True), above(climb))


def rounds(m, config):
    group = m.seeds["laptop"][0]
    files = {1: f"{group}/ppo/model"} | {int(path.parts[-2][5:-4]): f"{group}/{path.parts[-2]}/model"
                                         for path in sorted(m.folder.glob(f"{group}/round*_ppo/model.json"))}
    keys = (HELD_OUT, "truly preferred")
    numbers = {n: {key: estimate([m.read(file)["numbers"][key]]) for key in keys} for n, file in files.items()}
    with Figure(config, "rounds", 4.5) as (axis,):
        line(axis, list(numbers), [x[HELD_OUT] for x in numbers.values()], "held-out labelers", "-o", COLORS["PPO-ptx"])
        line(axis, list(numbers), [x["truly preferred"] for x in numbers.values()], "true preference", "--s", "#666666")
        axis.set(xlabel="rounds of comparisons", ylabel="PPO-ptx preferred to the largest SFT (%)",
                 xticks=list(numbers))
    yield "## Rounds of steps 2 and 3 (figure 2)"
    yield "![rounds](figures/rounds.png)"
    yield table(["rounds", *map(str, numbers)], [[key, *(percent(x[key]) for x in numbers.values())] for key in keys])
    yield ("One seed. Each round adds comparisons on 2,500 new prompts, mostly of the newest policy's samples; reward "
           "model and policy start again from SFT. More comparisons of the first policy might do as well: this "
           "experiment does not separate the two.")
    first, last = m.read(files[1])["numbers"][HELD_OUT], m.read(files[max(files)])["numbers"][HELD_OUT]
    gain = estimate([[b - a for a, b in zip(first, last)]])
    yield Claim("further rounds improve the policy", results.ELSEWHERE, percent(gain, True), above(gain))


SECTIONS = (preference, metadata, public_data, truth, toxicity, bias, labeler_groups, tax, coefficients,
            overoptimization, sft_epochs, rounds)


def main(config):
    m, text, claims = Measurements(config), [], []
    for section in SECTIONS:
        parts = list(section(m, config))
        section_claims = [part for part in parts if isinstance(part, Claim)]
        text += [part for part in parts if not isinstance(part, Claim)]
        text.append(claims_table(section_claims))
        claims += section_claims
    of_paper = [claim for claim in claims if claim.paper != results.ELSEWHERE]
    others = [claim for claim in claims if claim.paper == results.ELSEWHERE]
    counts = (f"of {len(of_paper)} claims of the paper {count_verdicts(of_paper)}; "
              f"of {len(others)} further ones {count_verdicts(others)}")
    chance = ("With 95% intervals a verdict is wrong by chance at most once in 40 times (a claim that combines several "
              f"comparisons, a few times as often): of these {len(claims)} verdicts about {len(claims) / 40:.0f} may "
              "be. No interval is widened for their number.")
    method = results.__doc__.split("\n\n")[1].replace("\n", " ")
    head = ["# The paper's evaluation, on the built-in world", f"{counts[0].upper()}{counts[1:]}.", method, chance,
            claims_table(claims)]
    path = Path(config.out) / "report.md"
    markdown = "\n\n".join(head + text) + "\n"
    write_atomically(path, lambda path: path.write_text(markdown, encoding="utf-8"))
    print(f"{path}: {counts}")


def claims_table(claims):
    return table(["claim", "paper", "here", ""], [claim.row() for claim in claims])


def count_verdicts(claims):
    names = {True: "agree", False: "do not", None: "are open"}
    return ", ".join(f"{sum(claim.agrees is verdict for claim in claims)} {name}" for verdict, name in names.items())


if __name__ == "__main__":
    launch(main, Config)
