"""Section 4 of the paper: who prefers what, the metadata, the reward model, the alignment tax.

    python evaluate.py                              # writes out/report.md, out/report.json, out/figures/
    torchrun --nproc_per_node=8 evaluate.py
    python evaluate.py --data data/oasst --out out/oasst --judge out/oasst/judge/model.pt --base gpt2

Test prompts are of customers whose prompts stages 1 to 3 never saw (the web may hold the same words). In the built-in world
labelers are programs: those who wrote training data, and held-out ones. On real data nobody is at hand: a reward model
that trained no policy judges (--judge), and pairs.csv is written out for people. Every interval is 95%, mean +- 1.96
standard errors. Numbers of one customer, or of tasks that ask about one thing, are not independent: errors are over customers
and over such groups of tasks. report.py makes tables and figures of the results.
"""

import hashlib
import json
import random
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import common
import report
from common import Machine, Ranks, UserError
from data import download, pairs, readers
from data.tinyworld import labelers, web
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel, generate


@dataclass(frozen=True)
class Config:
    data: str = "data/tinyworld"  # the dataset's folder
    out: str = "out"  # where the stages' runs are, and the report goes
    prompts: int = 2000  # test prompts
    judges: int = 3  # labelers of each kind who compare two responses to a prompt (built-in world)
    judge: str = ""  # a reward model that no policy was trained on, in the labelers' place
    base: str = ""  # GPT-2's weights for the model GPT, by name or path, instead of out/base/model.pt
    pairs: int = 100  # pairs of each model with SFT that are written out for people to judge (real data)
    max_new_tokens: int = 48  # the longest response
    batch_size: int = 128  # responses sampled at a time
    seed: int = 0  # of the samples, of who judges, of the order of presentation
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one

    def __post_init__(self):
        if min(self.prompts, self.judges, self.max_new_tokens, self.batch_size) < 1 or self.pairs < 0:
            raise ValueError("every size is at least 1, --pairs at least 0")
        if self.judges > min(map(len, labelers.team())):
            raise ValueError(f"--judges {self.judges} are more than there are")


MODELS = report.MODELS
RUNS = {"GPT": "base", "SFT": "sft", "PPO": "ppo_noptx", "PPO-ptx": "ppo"}  # folders below out
BASELINE = "SFT baseline"  # another sample of the SFT model, which everything is compared with
NEXT_WORD = "next word"  # the zero-shot task on held-out pages of the web
TEAMS = ("training labelers", "held-out labelers")


# ---------------------------------------------------------------- measures

def ratio(counts, groups=None):
    """counts: (pairs, right) of each item; groups: whose it is -> (right / pairs, half the width of its 95% interval, pairs).

    Items of one group are not independent, so the error is over the groups' totals (a ratio estimator, as groups differ in
    size): saying everything twice changes nothing. Without `groups` each item is a group of its own."""
    totals = defaultdict(lambda: (0, 0.0))
    for (n, r), group in zip(counts, range(len(counts)) if groups is None else groups, strict=True):
        if n:
            totals[group] = totals[group][0] + n, totals[group][1] + r
    pairs, m = sum(n for n, _ in totals.values()), len(totals)
    if not pairs:
        return None, None, 0
    share = sum(r for _, r in totals.values()) / pairs
    variance = sum((r - share * n) ** 2 for n, r in totals.values()) / max(1, m - 1) / m / (pairs / m) ** 2
    return share, 1.96 * variance ** 0.5, pairs


def mean_and_error(numbers, groups=None):
    """-> (mean, half the width of its 95% interval, how many); groups as in `ratio`."""
    return ratio([(1, x) for x in numbers], groups)


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


def distinct(tasks):
    """Each task once, however often it was drawn."""
    return list({(task["task"], task["context"], task.get("target"), *task.get("choices", ())): task for task in tasks}.values())


@torch.no_grad()
def choice_logprobs(model, tasks, tokenizer, device):
    """For each task with choices, the log-probability of each as the continuation, summed over its tokens."""
    rows = [(tokenizer.encode(task["context"]), tokenizer.encode(choice), (i, c))
            for i, task in enumerate(tasks) for c, choice in enumerate(task["choices"])]
    rows.sort(key=readers.length)  # rows of like length together: little padding
    scores = {}  # (task, choice) -> summed log-probability
    for first in range(0, len(rows), 256):
        chosen = rows[first : first + 256]
        tokens, where = readers.batch_of([row[:2] for row in chosen], tokenizer.end_of_text, device)
        logprobs = model(tokens, where)  # (N,)
        for row, part in zip(chosen, logprobs.split([len(row[1]) for row in chosen])):
            scores[row[2]] = part.sum().item()
    return [[scores[i, c] for c in range(len(task["choices"]))] for i, task in enumerate(tasks)]


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
    for i, logprobs in zip(with_choices, choice_logprobs(model, [tasks[i] for i in with_choices], tokenizer, device)):
        right[i] = float(logprobs.index(max(logprobs)) == tasks[i]["answer"])
    with_target = [i for i, task in enumerate(tasks) if not task.get("choices")]
    if with_target:
        for i, line in zip(with_target, first_lines(model, [tasks[i] for i in with_target], tokenizer)):
            right[i] = float(line.strip() == tasks[i]["target"].strip())
    return right


@torch.no_grad()
def next_words(model, pages, tokenizer, device):
    """As LAMBADA, but for every word: of each page, given as a (context, target) pair, the share of target tokens that
    are the likeliest after those before them."""
    shares, longest = [], max((len(page[1]) for page in pages), default=0)
    batch = max(1, min(100, 2**28 // max(1, longest * tokenizer.vocab_size)))  # pages whose logits take a gigabyte at most
    for first in range(0, len(pages), batch):
        tokens, where = readers.batch_of(pages[first : first + batch], tokenizer.end_of_text, device)
        right = model.unembed(model.hidden(tokens)[where]).argmax(-1) == tokens.roll(-1, dims=1)[where]  # (N,)
        shares += [part.float().mean().item() for part in right.split(where.sum(1).tolist())]
    return shares


@torch.no_grad()
def score(model, records, responses, tokenizer, device):
    """The reward model's score of each response, at its end of text."""
    episodes = []
    for r, text in zip(records, responses):
        prompt, response = readers.episode(r["prompt"], text, tokenizer)
        room = model.config.context - len(prompt) - 1  # broken characters can outgrow it, read back
        episodes.append((prompt, response[:-1][:room] + response[-1:]))
    result = [0.0] * len(episodes)
    order = sorted(range(len(episodes)), key=lambda i: readers.length(episodes[i]))
    for first in range(0, len(order), 128):
        chosen = order[first : first + 128]
        scores = readers.last_scores(model, [episodes[i] for i in chosen], tokenizer.end_of_text, device)
        for i, x in zip(chosen, scores.tolist()):
            result[i] = x
    return result


# ---------------------------------------------------------------- what is measured of what

def load_models(config, tokenizer, ranks, world):
    """-> {name: model} of RUNS. In the built-in world all must be there; on real data what was not trained is left out."""
    models = {}
    for name, run in RUNS.items():
        path = f"{config.out}/{run}/model.pt"
        if name == "GPT" and config.base:
            path = ranks.first(lambda: download.weights(config.base, tokenizer))
        if not world and name != "SFT" and not Path(path).exists():
            if ranks.main:
                print(f"{path} is not there: {name} is left out")
        else:
            models[name] = common.load_model(GPT, path, f"make {run.split('_')[0]}", tokenizer).to(ranks.device).eval()
    return models


def respond(speakers, records, split, config, tokenizer, ranks):
    """{name: one response at temperature 1 to each record's prompt} for {name: model}; ranks share the batches."""
    prompts = {}
    for name, model in speakers.items():
        texts = [web.with_prefix(r["prompt"]) if name == "GPT prompted" else r["prompt"] for r in records]
        prompts[name] = readers.encode_prompts([{"prompt": t} for t in texts], tokenizer, model.config.context -
                                               config.max_new_tokens - 1, f"{config.data}/prompts.{split}.jsonl")
    batches = [(name, i) for name in speakers for i in range(-(-len(records) // config.batch_size))]
    bar = tqdm(total=len(batches), desc="sampling", disable=not ranks.main)

    def sample(job):
        name, i = batches[job]
        chosen = prompts[name][i * config.batch_size : (i + 1) * config.batch_size]
        numbers = common.generator(config.seed, f"respond {name}", i)
        uniforms = torch.rand(len(chosen), config.max_new_tokens, generator=numbers)
        with ranks.autocast():
            said = generate(speakers[name], chosen, config.max_new_tokens, uniforms)
        bar.update(ranks.size)
        return [tokenizer.decode(r) for r in said]

    responses = {name: [] for name in speakers}
    for (name, _), said in zip(batches, ranks.spread(len(batches), sample)):
        responses[name] += [web.reply_in(text) for text in said] if name == "GPT prompted" else said
    bar.close()
    return responses


def asked_labelers(records, responses, config):
    """{model: {team: (win rate over SFT, error, n)}}, by the labelers of the built-in world."""
    teams, users = dict(zip(TEAMS, labelers.team())), [r["user"] for r in records]
    return {name: {team: mean_and_error(win_rates(records, responses[name], responses[BASELINE], people,
                                                  config.judges, config.seed), users) for team, people in teams.items()}
            for name in responses if name != BASELINE}


def asked_model(scores, users):
    """{model: (win rate over SFT, error, n)}, by a reward model's {model: scores}; equal scores are half a win."""
    wins = {name: [(a > b) + 0.5 * (a == b) for a, b in zip(scores[name], scores[BASELINE])] for name in scores}
    return {name: mean_and_error(wins[name], users) for name in wins if name != BASELINE}


def metadata_rates(records, responses):
    """{rate: {model: (mean, error, n)}}, the four of Figure 4. A rate counts the responses to which it applies."""
    seen = {name: [labelers.metadata(r["prompt"], r["asks"], text) for r, text in zip(records, responses[name])]
            for name in MODELS}
    users = [r["user"] for r in records]
    return {rate: {name: ratio([(m[rate] is not None, float(m[rate] or 0)) for m in seen[name]], users) for name in MODELS}
            for rate in seen["SFT"][0]}


def ranked_by_models(models, records, tokenizer, ranks):
    """For the comparisons on unseen customers' prompts: {who: [(pairs, pairs ordered as the labeler did) a prompt]} of each
    reward model in {who: model}."""
    flat = [(r, text) for r in records for text in r["responses"]]
    shares = {}
    for who, model in models.items():
        with ranks.autocast():
            scores = iter(score(model, [r for r, _ in flat], [text for _, text in flat], tokenizer, ranks.device))
        shares[who] = [pair_accuracy([next(scores) for _ in r["responses"]], r["ranks"]) for r in records]
    return shares


def ranked_by_labelers(records, teams, config):
    """The same of another labeler of the same kind and of the true average preference, which is the ceiling."""
    team_of = {labeler.name: team for team, people in teams.items() for labeler in people}
    shares = {"agreement": [], "ceiling": []}
    for r in records:
        if r["labeler"] not in team_of:
            raise UserError(f"{config.data}/comparisons.valid.jsonl: {r['labeler']} is no labeler of this world")
        rng = random.Random(f"{config.seed}/agreement/{r['prompt']}")
        colleague = rng.choice([who for who in teams[team_of[r["labeler"]]] if who.name != r["labeler"]])
        impressions = colleague.impressions(r["prompt"], r["asks"], r["responses"], "agreement")
        worth = [labelers.true_worth(r["prompt"], r["asks"], text) for text in r["responses"]]
        shares["agreement"].append(pair_accuracy(impressions, r["ranks"]))
        shares["ceiling"].append(pair_accuracy(worth, r["ranks"]))
    return shares


def reward_model_report(models, config, tokenizer, ranks, world):
    """{whose rankings: {who: (share of pairs ordered alike, error, pairs)}}, on unseen customers' prompts, apart for labelers
    whose rankings were trained on and for others."""
    path = f"{config.data}/comparisons.valid.jsonl"
    if not world and not Path(path).is_file():
        return {}
    records = readers.read_jsonl(path, "judged" if world else "comparisons", "make comparisons")
    shares = ranked_by_models(models, records, tokenizer, ranks)
    if world:
        teams = dict(zip(TEAMS, labelers.team()))
        shares |= ranked_by_labelers(records, teams, config)
        trained = {labeler.name for labeler in teams[TEAMS[0]]}
    else:
        trained = {r["labeler"] for r in readers.read_jsonl(f"{config.data}/comparisons.train.jsonl", "comparisons")}
    result = {}
    for team, inside in zip(TEAMS, (True, False)):
        chosen = [i for i, r in enumerate(records) if (r["labeler"] in trained) == inside]
        if world or chosen:
            users = [records[i].get("user", records[i]["prompt"]) for i in chosen]  # nobody's prompt stands for itself
            result[team] = {who: ratio([counts[i] for i in chosen], users) for who, counts in shares.items()}
    return result


def alignment_tax(models, config, tokenizer, ranks):
    """Zero-shot accuracy by task and model, and on the abilities together what RL took and the pretraining mix gave
    back, item by item. The tasks are those of tasks.test.jsonl, each once, and, as another, the next word of
    pretrain.valid.bin; None if the dataset has neither. Errors are over contexts, which several tasks may share, and over
    documents, which may be of several pages."""
    path, text = Path(f"{config.data}/tasks.test.jsonl"), Path(f"{config.data}/pretrain.valid.bin")
    context = min(model.config.context for model in models.values())
    tasks = readers.read_jsonl(path, "tasks") if path.is_file() else []
    for number, task in enumerate(tasks, 1):
        longest = max(len(tokenizer.encode(text)) for text in task.get("choices") or [task["target"]]) + 4
        if len(tokenizer.encode(task["context"])) + longest > context:
            raise UserError(f"{path}:{number}: the task does not fit the context of {context}")
    tasks, pages, documents = distinct(tasks), [], []
    if text.is_file():
        held_out = readers.PretrainingText(text, tokenizer, context)
        pages, documents = held_out.pairs(range(min(len(held_out), 1000))), held_out.documents[:1000]
    if not tasks and not pages:
        return None
    names = list(models)

    def take(i):
        with ranks.autocast():
            return (answer_tasks(models[names[i]], tasks, tokenizer, ranks.device) +
                    next_words(models[names[i]], pages, tokenizer, ranks.device))

    results = dict(zip(names, ranks.spread(len(names), take)))
    # Of each item its kind, and what it is about.
    groups = [(task["task"], task["context"]) for task in tasks] + [(NEXT_WORD, document) for document in documents]

    def over(items, numbers):
        return mean_and_error([numbers[i] for i in items], [groups[i] for i in items])

    items = {}  # {kind: its items}
    for i, (kind, _) in enumerate(groups):
        items.setdefault(kind, []).append(i)
    items["all abilities"] = able = [i for i, (kind, _) in enumerate(groups) if kind not in web.SAFETY]
    table = {kind: {name: over(chosen, right) for name, right in results.items()} for kind, chosen in items.items()}
    compared = (("PPO", "SFT"), ("PPO-ptx", "SFT"), ("PPO-ptx", "PPO"), ("PPO", "GPT"), ("PPO-ptx", "GPT"))
    changes = {f"{a} - {b}": over(able, [x - y for x, y in zip(results[a], results[b])])
               for a, b in compared if a in results and b in results}
    return table, changes


def sft_epochs(reward_model, records, config, tokenizer, ranks):
    """For each epoch's checkpoint: validation loss, and the reward model's score by which to choose (section 3.4)."""
    rows = []
    for entry in report.read_log(config.out, "sft"):
        if "epoch" in entry:
            name = f"SFT epoch {entry['epoch']}"
            path = f"{config.out}/sft/epoch{entry['epoch']}.pt"
            model = common.load_model(GPT, path, "make sft", tokenizer).to(ranks.device).eval()
            texts = respond({name: model}, records, "valid", config, tokenizer, ranks)[name]
            with ranks.autocast():
                scores = score(reward_model, records, texts, tokenizer, ranks.device)
            rows.append((entry["epoch"], entry["valid_loss"], *mean_and_error(scores, [r["user"] for r in records])[:2]))
    return rows


# ---------------------------------------------------------------- the evaluation

def main(config):
    ranks = Ranks(Machine(device=config.device))
    tokenizer = Tokenizer.load(config.data)
    path = f"{config.data}/prompts.test.jsonl"
    world = not config.judge and "asks" in readers.read_jsonl(path, "prompts")[0]  # its labelers are programs
    kind = "requests" if world else "prompts"
    records = readers.read_jsonl(path, kind)[: config.prompts]
    models = load_models(config, tokenizer, ranks, world)
    load = lambda path, made_by: common.load_model(ScalarModel, path, made_by, tokenizer).to(ranks.device).eval()
    reward_models = {"reward model": load(f"{config.out}/reward/model.pt", "make reward")}
    if config.judge:
        reward_models["judge"] = load(config.judge, "reward.py")
        check_judge(config)
    valid = readers.read_jsonl(f"{config.data}/prompts.valid.jsonl", kind)[:300]
    if world:  # what is missing is said before minutes of sampling
        readers.read_jsonl(f"{config.data}/comparisons.valid.jsonl", "judged")
        readers.read_jsonl(f"{config.data}/tasks.test.jsonl", "tasks")
    for name in models:
        if name != "GPT":
            report.read_log(config.out, RUNS[name])

    table = Path(config.out) / "pairs.csv"
    fingerprints = {name: fingerprint(models[name]) for name in models}
    people = {} if world else pairs.read(table, BASELINE, fingerprints)

    users = [r["user"] for r in records]
    speakers = {name: models[name] for name in MODELS if name in models}
    if world:
        speakers = {name: models["GPT" if name == "GPT prompted" else name] for name in MODELS}
    responses = respond(speakers | {BASELINE: models["SFT"]}, records, "test", config, tokenizer, ranks)
    scored = [(who, name) for who in reward_models for name in responses]

    def judge(i):
        who, name = scored[i]
        with ranks.autocast():
            return score(reward_models[who], records, responses[name], tokenizer, ranks.device)

    scores = {who: {} for who in reward_models}
    for (who, name), numbers in zip(scored, ranks.spread(len(scored), judge)):
        scores[who][name] = numbers
    if world:
        preference = asked_labelers(records, responses, config)
    else:
        judged = {"judge": asked_model(scores["judge"], users)} if config.judge else {}
        judged["people"] = {name: mean_and_error(*zip(*votes)) for name, votes in people.items()}
        if not people and ranks.main:
            rows, sides = pairs.draw(records, responses, "SFT", BASELINE, config.pairs, config.seed)
            pairs.write(table, rows, sides, fingerprints)
            print(f"{table}: {len(rows)} pairs for people to judge; with answers in its last column, run this again")
        preference = {name: {who: by[name] for who, by in judged.items() if name in by} for name in speakers}
    results = {
        "prompts": len(records), "customers": len({r["user"] for r in records}), "world": world,
        "preference": preference,
        "reward model": reward_model_report(reward_models, config, tokenizer, ranks, world),
        "scores": {f"{who}'s score": {name: mean_and_error(by[name], users) for name in speakers} for who, by in scores.items()},
        "zero-shot": alignment_tax(models, config, tokenizer, ranks),
        "sft epochs": sft_epochs(reward_models["reward model"], valid, config, tokenizer, ranks),
        "safety": list(web.SAFETY),
        "runs": {name: RUNS[name] for name in models if name.startswith("PPO")},
        "samples": samples(records, responses, speakers, config),
        "config": asdict(config),
    }
    if world:
        worth = lambda name: [labelers.true_worth(r["prompt"], r["asks"], text) for r, text in zip(records, responses[name])]
        results["metadata"] = metadata_rates(records, responses)
        results["scores"]["true average preference"] = {name: mean_and_error(worth(name), users) for name in speakers}
    if ranks.main:
        common.write_atomically(Path(config.out) / "report.json", lambda path: path.write_text(json.dumps(results, indent=1)))
        report.main(report.Config(out=config.out))


def check_judge(config):
    """UserError where the judge started from the same random head (reward.start_model) as the reward model that trained the
    policies, or is that model: it would reward whatever of that head the policies have learned."""
    paths = [config.judge, f"{config.out}/reward/model.pt"]
    heads = [common.load_checkpoint(path, "reward.py").get("head_seed") for path in paths]
    for path, head in zip(paths, heads):
        if head is None:
            raise UserError(f"{path} does not say which random head it started from; train it again with this reward.py")
    if heads[0] == heads[1]:
        raise UserError(f"--judge {config.judge} is the reward model that trained the policies, or started from the same random "
                        "head; a judge is another one, trained on other comparisons")


def fingerprint(model):
    """Tells the weights of two models apart."""
    total = hashlib.sha256()
    for weight in model.state_dict().values():
        total.update(weight.cpu().numpy().tobytes())
    return total.hexdigest()


def samples(records, responses, names, config):
    """One prompt of each use case, and what each model says to it."""
    result, rng = [], random.Random(config.seed)
    for use_case in dict.fromkeys(r.get("use_case", "") for r in records):
        i = rng.choice([i for i, r in enumerate(records) if r.get("use_case", "") == use_case])
        result.append((use_case, records[i]["prompt"], {name: responses[name][i] for name in names}))
    return result


if __name__ == "__main__":
    common.launch(main, Config)
