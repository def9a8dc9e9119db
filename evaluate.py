"""Section 4 of the paper, on the built-in world: who prefers what, the metadata, the reward model, the alignment tax.

    python evaluate.py                              # writes out/report.md, out/report.json, out/figures/

Test prompts are of customers whose prompts stages 1 to 3 never saw (the web may hold the same words). Labelers are the
programs of data/tinyworld: those who wrote training data, and held-out ones. Every interval is 95%, mean +- 1.96
standard errors over prompts (items).
"""

import json
import random
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import Ranks, UserError
from data import readers
from data.tinyworld import labelers, web
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel, gather_logprobs, generate


@dataclass(frozen=True)
class Config:
    data: str = "data/tinyworld"  # the dataset's folder
    out: str = "out"  # where the stages' runs are, and the report goes
    prompts: int = 2000  # test prompts
    judges: int = 3  # labelers of each kind who compare two responses to a prompt
    max_new_tokens: int = 48  # the longest response
    batch_size: int = 128  # responses sampled at a time
    seed: int = 0  # of the samples, of who judges, of the order of presentation
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one

    def __post_init__(self):
        if min(self.prompts, self.judges, self.max_new_tokens, self.batch_size) < 1:
            raise ValueError("every size is at least 1")
        if self.judges > min(map(len, labelers.team())):
            raise ValueError(f"--judges {self.judges} are more than there are")


# The five models, in the same order and colours everywhere; the colours differ in grey too.
MODELS = ("GPT", "GPT prompted", "SFT", "PPO", "PPO-ptx")
RUNS = {"GPT": "base", "SFT": "sft", "PPO": "ppo_noptx", "PPO-ptx": "ppo"}  # folders below out
NEXT_WORD = "next word"  # the zero-shot task on held-out pages of the web
TEAMS = ("training labelers", "held-out labelers")
COLOURS = dict(zip(MODELS, ("#bdbdbd", "#e6ab02", "#66a61e", "#7570b3", "#a6004d")))


# ---------------------------------------------------------------- measures

def mean_and_error(numbers):
    """-> (mean, half the width of its 95% interval, how many)."""
    n = len(numbers)
    if n == 0:
        return None, None, 0
    mean = sum(numbers) / n
    variance = sum((x - mean) ** 2 for x in numbers) / max(1, n - 1)
    return mean, 1.96 * (variance / n) ** 0.5, n


def compare(judge, prompt, asks, ours, theirs, rng):
    """How much of a win ours is over theirs: 1, 0 or, for a tie, 1/2. Which of them the judge reads first is a coin's
    choice: a judge that always takes the first gives 50% in the long run."""
    swap = rng.random() < 0.5
    first, second = judge(prompt, asks, [theirs, ours] if swap else [ours, theirs])
    won = 0.5 if first == second else float(first > second)
    return 1 - won if swap else won


def win_rates(records, ours, theirs, team, judges, seed):
    """One number a prompt: the mean over `judges` labelers of the team, drawn for the prompt, of `compare`."""
    result = []
    for record, a, b in zip(records, ours, theirs):
        rng = random.Random(f"{seed}/judges/{record['prompt']}")
        votes = [compare(lambda *x, who=who: who.impressions(*x, seed="evaluation"), record["prompt"], record["asks"],
                         a, b, rng) for who in rng.sample(team, judges)]
        result.append(sum(votes) / judges)
    return result


def pair_accuracy(numbers, ranks):
    """Over the pairs that the ranks do not tie: (how many, how many `numbers` order as the ranks do; ties count half)."""
    pairs = right = 0
    for i in range(len(ranks)):
        for j in range(len(ranks)):
            if ranks[i] < ranks[j]:
                pairs += 1
                right += 0.5 if numbers[i] == numbers[j] else numbers[i] > numbers[j]
    return pairs, right


@torch.no_grad()
def choose(model, tasks, tokenizer, device):
    """The index of the choice of each task that is the likeliest continuation, by summed log-probability."""
    rows = [(tokenizer.encode(task["context"]), tokenizer.encode(choice), (i, c))
            for i, task in enumerate(tasks) for c, choice in enumerate(task["choices"])]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))  # rows of like length together: little padding
    scores = {}  # (task, choice) -> summed log-probability
    for first in range(0, len(rows), 256):
        chosen = rows[first : first + 256]
        tokens, where = readers.batch_of([row[:2] for row in chosen], tokenizer.end_of_text, device)
        logprobs = gather_logprobs(model(tokens, where), tokens.roll(-1, dims=1)[where])  # (N,)
        for row, part in zip(chosen, logprobs.split([len(row[1]) for row in chosen])):
            scores[row[2]] = part.sum().item()
    return [max(range(len(task["choices"])), key=lambda c: scores[i, c]) for i, task in enumerate(tasks)]


def first_lines(model, tasks, tokenizer):
    """What greedy decoding says on each task's context, up to the end of the line."""
    longest = max(len(tokenizer.encode(task["target"])) for task in tasks) + 4
    contexts, lines = [tokenizer.encode(task["context"]) for task in tasks], []
    for i in range(0, len(tasks), 256):
        chosen = contexts[i : i + 256]
        said = generate(model, chosen, longest, torch.zeros(len(chosen), longest), temperature=0)
        lines += [tokenizer.decode(ids).split("\n")[0] for ids in said]
    return lines


def answer_tasks(model, tasks, tokenizer, device):
    """Zero-shot: 1 or 0 for each task. With choices: is the right one the likeliest? With a target: is it, exactly, the
    line that greedy decoding goes on with?"""
    right = [0.0] * len(tasks)
    with_choices = [i for i, task in enumerate(tasks) if task.get("choices")]
    for i, choice in zip(with_choices, choose(model, [tasks[i] for i in with_choices], tokenizer, device)):
        right[i] = float(choice == tasks[i]["answer"])
    with_target = [i for i, task in enumerate(tasks) if not task.get("choices")]
    if with_target:
        for i, line in zip(with_target, first_lines(model, [tasks[i] for i in with_target], tokenizer)):
            right[i] = float(line.strip() == tasks[i]["target"].strip())
    return right


@torch.no_grad()
def next_words(model, pages, tokenizer, device):
    """As LAMBADA, but for every word: of each page, given as a (context, target) pair, the share of target tokens that
    are the likeliest after those before them."""
    shares = []
    for first in range(0, len(pages), 100):
        tokens, where = readers.batch_of(pages[first : first + 100], tokenizer.end_of_text, device)
        right = model(tokens, where).argmax(-1) == tokens.roll(-1, dims=1)[where]  # (N,)
        shares += [part.float().mean().item() for part in right.split(where.sum(1).tolist())]
    return shares


@torch.no_grad()
def score(model, records, responses, tokenizer, device):
    """The reward model's score of each response, at its end of text."""
    episodes = [readers.episode(r["prompt"], text, tokenizer) for r, text in zip(records, responses)]
    # Broken characters take more tokens read back than they took when sampled; what no longer fits is cut.
    episodes = [(prompt, said[: model.config.context - len(prompt)]) for prompt, said in episodes]
    result = [0.0] * len(episodes)
    order = sorted(range(len(episodes)), key=lambda i: len(episodes[i][0]) + len(episodes[i][1]))
    for first in range(0, len(order), 128):
        chosen = order[first : first + 128]
        scores = readers.last_scores(model, [episodes[i] for i in chosen], tokenizer.end_of_text, device)
        for i, x in zip(chosen, scores.tolist()):
            result[i] = x
    return result


# ---------------------------------------------------------------- what is measured of what

def load(kind, run, tokenizer, config, ranks, name="model.pt"):
    path = f"{config.out}/{run}/{name}"
    return common.load_model(kind, path, f"make {run.split('_')[0]}", tokenizer).to(ranks.device).eval()


def respond(model, records, split, name, config, tokenizer):
    """One response at temperature 1 to each record's prompt."""
    prompted = name == "GPT prompted"
    texts = [web.with_prefix(r["prompt"]) if prompted else r["prompt"] for r in records]
    prompts = readers.encode_prompts([{"prompt": t} for t in texts], tokenizer,
                                     model.config.context - config.max_new_tokens - 1, f"{config.data}/prompts.{split}.jsonl")
    responses = []
    for i in tqdm(range(-(-len(prompts) // config.batch_size)), desc=f"sampling {name}"):
        chosen = prompts[i * config.batch_size : (i + 1) * config.batch_size]
        numbers = common.generator(config.seed, f"respond {name}", i)
        uniforms = torch.rand(len(chosen), config.max_new_tokens, generator=numbers)
        responses += [tokenizer.decode(r) for r in generate(model, chosen, config.max_new_tokens, uniforms)]
    return [web.reply_in(r) for r in responses] if prompted else responses


def preferences(records, responses, config):
    """{model: {team: (win rate over SFT, error, n)}}"""
    teams = dict(zip(TEAMS, labelers.team()))
    return {name: {team: mean_and_error(win_rates(records, responses[name], responses["SFT baseline"], people,
                                                  config.judges, config.seed)) for team, people in teams.items()}
            for name in MODELS}


def metadata_rates(records, responses):
    """{rate: {model: (mean, error, n)}}, the four of Figure 4."""
    seen = {name: [labelers.metadata(r["prompt"], r["asks"], text) for r, text in zip(records, responses[name])]
            for name in MODELS}
    return {rate: {name: mean_and_error([float(m[rate]) for m in seen[name] if m[rate] is not None]) for name in MODELS}
            for rate in seen["SFT"][0]}


def reward_model_report(model, config, tokenizer, ranks):
    """On unseen customers' prompts: how often the reward model orders a pair as its labeler did; how often another
    labeler of the same kind does; how often the true average preference does, which is the ceiling."""
    records = readers.read_jsonl(f"{config.data}/comparisons.valid.jsonl", "judged", "make comparisons")
    flat = [(r, text) for r in records for text in r["responses"]]
    scores = iter(score(model, [r for r, _ in flat], [text for _, text in flat], tokenizer, ranks.device))
    teams = dict(zip(TEAMS, labelers.team()))
    team_of = {labeler.name: team for team, people in teams.items() for labeler in people}
    shares = {team: defaultdict(list) for team in teams}
    for r in records:
        numbers = [next(scores) for _ in r["responses"]]
        if r["labeler"] not in team_of:
            raise UserError(f"{config.data}/comparisons.valid.jsonl: {r['labeler']} is no labeler of this world")
        team, rng = team_of[r["labeler"]], random.Random(f"{config.seed}/agreement/{r['prompt']}")
        colleague = rng.choice([who for who in teams[team] if who.name != r["labeler"]])
        judged = {
            "reward model": numbers,
            "ceiling": [labelers.true_worth(r["prompt"], r["asks"], text) for text in r["responses"]],
            "agreement": colleague.impressions(r["prompt"], r["asks"], r["responses"], "agreement"),
        }
        for what, values in judged.items():
            shares[team][what].append(pair_accuracy(values, r["ranks"]))
    return {team: {what: ratio(counts) for what, counts in kinds.items()} for team, kinds in shares.items()}


def ratio(counts):
    """[(pairs, right) of a prompt] -> (right / pairs, error over prompts, pairs): a ratio estimator, as pairs of one
    prompt are not independent."""
    pairs, right = sum(n for n, _ in counts), sum(r for _, r in counts)
    if not pairs:
        return None, None, 0
    share, m = right / pairs, len(counts)
    variance = sum((r - share * n) ** 2 for n, r in counts) / max(1, m - 1) / m / (pairs / m) ** 2
    return share, 1.96 * variance ** 0.5, pairs


def alignment_tax(models, config, tokenizer, ranks):
    """Zero-shot accuracy by task and model, and on the abilities together what RL took and the pretraining mix gave
    back, item by item."""
    path = f"{config.data}/tasks.test.jsonl"
    tasks, context = readers.read_jsonl(path, "tasks"), models["GPT"].config.context
    for number, task in enumerate(tasks, 1):
        longest = max(len(tokenizer.encode(text)) for text in task.get("choices") or [task["target"]]) + 4
        if len(tokenizer.encode(task["context"])) + longest > context:
            raise UserError(f"{path}:{number}: the task does not fit the context of {context}")
    text = readers.PretrainingText(f"{config.data}/pretrain.valid.bin", tokenizer, context)
    pages = text.pairs(range(min(len(text), 1000)))
    results = {name: answer_tasks(models[name], tasks, tokenizer, ranks.device) +
               next_words(models[name], pages, tokenizer, ranks.device) for name in RUNS}
    kinds = [task["task"] for task in tasks] + [NEXT_WORD] * len(pages)  # of the items
    table = {kind: {name: mean_and_error([x for x, k in zip(right, kinds) if k == kind])
                    for name, right in results.items()} for kind in dict.fromkeys(kinds)}
    able = [i for i, kind in enumerate(kinds) if kind in web.ABILITIES or kind == NEXT_WORD]
    table["all abilities"] = {name: mean_and_error([right[i] for i in able]) for name, right in results.items()}
    change = lambda a, b: mean_and_error([results[a][i] - results[b][i] for i in able])
    compared = (("PPO", "SFT"), ("PPO-ptx", "SFT"), ("PPO-ptx", "PPO"), ("PPO", "GPT"), ("PPO-ptx", "GPT"))
    changes = {f"{a} - {b}": change(a, b) for a, b in compared}
    return table, changes


def read_log(config, run):
    path = Path(config.out) / run / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; `make {run.split('_')[0]}` makes it")
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise UserError(f"{path}: not JSON Lines") from None


def sft_epochs(reward_model, config, tokenizer, ranks):
    """For each epoch's checkpoint: validation loss, and the reward model's score by which to choose (section 3.4)."""
    records = readers.read_jsonl(f"{config.data}/prompts.valid.jsonl", "requests")[:300]
    rows = []
    for entry in read_log(config, "sft"):
        if "epoch" in entry:
            model = load(GPT, "sft", tokenizer, config, ranks, f"epoch{entry['epoch']}.pt")
            texts = respond(model, records, "valid", f"SFT epoch {entry['epoch']}", config, tokenizer)
            rows.append((entry["epoch"], entry["valid_loss"],
                         *mean_and_error(score(reward_model, records, texts, tokenizer, ranks.device))[:2]))
    return rows


# ---------------------------------------------------------------- the report

def percent(number, signed=False):
    if number[0] is None:
        return "-"
    return f"{100 * number[0]:{'+' if signed else ''}.1f} ± {100 * number[1]:.1f}%"


def table(header, rows):
    lines = ["| " + " | ".join(map(str, header)) + " |", "|" + "---|" * len(header)]
    shown = lambda cell: f"{cell:.2f}" if isinstance(cell, float) else str(cell)
    return "\n".join(lines + ["| " + " | ".join(map(shown, row)) + " |" for row in rows])


def way_to_ceiling(by):
    """How far the reward model comes from guessing to what the true average preference would score."""
    return f"{(by['reward model'][0] - 0.5) / (by['ceiling'][0] - 0.5):.0%}" if by["ceiling"][0] not in (None, 0.5) else "-"


def headline(results):
    """The claims of the paper that a run is judged by, in a few rows: printed, and at the head of the report. All
    preferences here are held-out labelers'."""
    held_out = {name: by["held-out labelers"] for name, by in results["preference"].items()}
    made_up = results["metadata"]["makes things up (closed domain, less is better)"]
    tasks, changes = results["zero-shot"]
    drop, back = (tasks["all abilities"][a][0] - tasks["all abilities"]["PPO"][0] for a in ("SFT", "PPO-ptx"))
    reward = results["reward model"]["training labelers"]
    return [
        *((f"{name} preferred to SFT{' (itself: 50%)' * (name == 'SFT')}", percent(held_out[name])) for name in MODELS),
        ("reward model, unseen prompts (ceiling)", f"{percent(reward['reward model'])} ({percent(reward['ceiling'])})"),
        ("reward model's way from 50% to the ceiling", way_to_ceiling(reward)),
        ("two training labelers agree", percent(reward["agreement"])),
        ("makes things up, closed domain: SFT", percent(made_up["SFT"])),
        ("makes things up, closed domain: PPO-ptx", percent(made_up["PPO-ptx"])),
        ("zero-shot tasks, PPO less SFT", percent(changes["PPO - SFT"], True)),
        ("zero-shot tasks, PPO-ptx less SFT", percent(changes["PPO-ptx - SFT"], True)),
        ("of PPO's drop, PPO-ptx gives back", f"{back / drop:.0%}" if drop > changes["PPO - SFT"][1] else "no drop"),
    ]


def write_report(results, records, responses, config):
    prefer, meta, reward, (tasks, changes) = (results[k] for k in ("preference", "metadata", "reward model", "zero-shot"))
    samples, rng = [], random.Random(config.seed)
    for use_case in dict.fromkeys(r["use_case"] for r in records):
        i = rng.choice([i for i, r in enumerate(records) if r["use_case"] == use_case])
        quoted = "\n".join(f"- **{name}**: {' / '.join(responses[name][i].splitlines()) or '(nothing)'}" for name in MODELS)
        samples.append(f"**{use_case}**\n\n```\n{records[i]['prompt'].rstrip()}\n```\n\n{quoted}")
    sections = [
        "# Report",
        f"{len(records):,} test prompts of {len({r['user'] for r in records})} customers never trained on; the labelers are "
        "programs (data/tinyworld/labelers.py). Intervals are 95%; one of ± 0 says only that all were alike. Rates and tasks "
        "are judged by the world itself, without a labeler's noise.",
        table(["in short (preferences by held-out labelers)", ""], headline(results)),
        "## Preferred to SFT (figures 1 and 3)",
        table(["model", *TEAMS, "reward-model score", "true average preference"],
              [[name, *(percent(prefer[name][team]) for team in TEAMS), results["reward model score"][name][0],
                results["true worth"][name][0]] for name in MODELS]),
        "A tie counts half. The row SFT compares two samples of the same model. The last column is known only because the "
        "labelers are programs.\n\n![win rates](figures/preference.png)",
        "## Metadata (figure 4)",
        table(["rate", *MODELS], [[rate, *(percent(by[name]) for name in MODELS)] for rate, by in meta.items()]),
        "![metadata](figures/metadata.png)",
        "## Reward model on unseen prompts (section 3.3)",
        table(["pairs ranked by", "reward model", "another labeler agrees", "ceiling: the true average preference",
               "of the way from 50% to the ceiling"],
              [[team, percent(reward[team]["reward model"]), percent(reward[team]["agreement"]),
                percent(reward[team]["ceiling"]), way_to_ceiling(reward[team])] for team in reward]),
        "## Zero-shot tasks: the alignment tax (figure 25)",
        table(["task", *RUNS], [[kind, *(percent(by[name]) for name in RUNS)] for kind, by in tasks.items()]),
        table(["change, all abilities, item by item", ""], [[what, percent(x, True)] for what, x in changes.items()]),
        "Bias: how often the stereotype is the likelier; 50% is no bias. Toxicity: how often a kind reply "
        "is likelier than an insult. Next word: the share of tokens of held-out web pages that the model "
        "holds for the likeliest. All abilities: the first five and the next word, each item (a task or a page) once.",
        "![alignment tax](figures/tax.png)",
        "## SFT epochs (section 3.4)",
        table(["epoch", "validation loss", "reward-model score"],
              [[epoch, f"{loss:.4f}", f"{mean:.2f} ± {error:.2f}"] for epoch, loss, mean, error in results["sft epochs"]]),
        "The last is used.",
        "## Training",
        "![training](figures/training.png)",
        "## Samples",
        *samples,
    ]
    out = Path(config.out)
    text = "\n\n".join(sections) + "\n"
    common.write_atomically(out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    record = json.dumps({**results, "config": asdict(config)}, indent=1)
    common.write_atomically(out / "report.json", lambda path: path.write_text(record))


def bars(axis, groups, values, names, label):
    """Grouped bars with error bars. values[group][name] = (mean, error, n)."""
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        points = [(g + (k - (len(names) - 1) / 2) * width, *values[group][name][:2]) for g, group in enumerate(groups)
                  if values[group][name][0] is not None]
        if not points:
            continue
        x, y, error = zip(*points)
        axis.bar(x, [100 * v for v in y], width * 0.92, yerr=[100 * e for e in error], label=name, capsize=2,
                 color=COLOURS[name], edgecolor="black", linewidth=0.5)
    axis.set_xticks(range(len(groups)), groups)
    axis.set(ylabel=label, ylim=(0, 105))
    axis.spines[["top", "right"]].set_visible(False)


def draw(results, config):
    import matplotlib  # only figures need it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(config.out) / "figures"
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

    by_team = {team: {name: by[team] for name, by in results["preference"].items()} for team in TEAMS}
    bar_figure("preference", TEAMS, by_team, MODELS, "preferred to SFT (%), 95% intervals", 7)
    bar_figure("tax", [*web.ABILITIES, NEXT_WORD, "all abilities"], results["zero-shot"][0], tuple(RUNS), "zero-shot accuracy (%), 95% intervals", 9)

    figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), sharey=True)
    for axis, (rate, by) in zip(axes, results["metadata"].items()):
        bars(axis, [rate.replace(" (", "\n(")], {rate.replace(" (", "\n("): by}, MODELS, "responses (%), 95% intervals" if axis is axes[0] else "")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="upper center", frameon=False, fontsize=8)
    save(figure, "metadata", rect=(0, 0, 1, 0.93))

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for name in ("PPO", "PPO-ptx"):
        log = read_log(config, RUNS[name])
        for axis, key, label in zip(axes, ("reward", "kl", "entropy"), (
                "reward-model score", "KL from SFT (nats a response)", "entropy (nats a token)")):
            axis.plot([x["step"] for x in log], [x[key] for x in log], label=name, color=COLOURS[name],
                      linestyle="--" if name == "PPO" else "-")
            axis.set(xlabel="PPO iteration", ylabel=label)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    save(figure, "training")


def main(config):
    ranks = Ranks(config.device)
    if ranks.size > 1:
        raise UserError("evaluation takes one process, without torchrun")
    tokenizer = Tokenizer.load(config.data)
    models = {name: load(GPT, folder, tokenizer, config, ranks) for name, folder in RUNS.items()}
    reward_model = load(ScalarModel, "reward", tokenizer, config, ranks)
    records = readers.read_jsonl(f"{config.data}/prompts.test.jsonl", "requests")[: config.prompts]
    for name, kind in (("prompts.valid", "requests"), ("comparisons.valid", "judged"), ("tasks.test", "tasks")):
        readers.read_jsonl(f"{config.data}/{name}.jsonl", kind)  # what is missing is said before minutes of sampling
    for run in ("sft", "ppo", "ppo_noptx"):
        read_log(config, run)

    models |= {"GPT prompted": models["GPT"], "SFT baseline": models["SFT"]}
    responses = {name: respond(models[name], records, "test", name, config, tokenizer)
                 for name in (*MODELS, "SFT baseline")}
    results = {
        "preference": preferences(records, responses, config),
        "metadata": metadata_rates(records, responses),
        "reward model": reward_model_report(reward_model, config, tokenizer, ranks),
        "reward model score": {name: mean_and_error(score(reward_model, records, responses[name], tokenizer, ranks.device))
                               for name in MODELS},
        "true worth": {name: mean_and_error([labelers.true_worth(r["prompt"], r["asks"], text) for r, text in
                                             zip(records, responses[name])]) for name in MODELS},
        "zero-shot": alignment_tax(models, config, tokenizer, ranks),
        "sft epochs": sft_epochs(reward_model, config, tokenizer, ranks),
    }
    draw(results, config)
    write_report(results, records, responses, config)
    for what, number in headline(results):
        print(f"{what:<48}{number}")
    print(f"{config.out}/report.md has the rest")


if __name__ == "__main__":
    common.launch(main, Config)
