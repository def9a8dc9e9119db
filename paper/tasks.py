"""Zero-shot tasks: the abilities whose loss is the alignment tax (section 4.2), and how a model answers them.

A task has a `context` and either `choices` with the index of the right one, `answer`, or a `target`, the line to
continue with.
"""

from pathlib import Path

import torch

from common.config import UserError
from data import readers
from model import generate
from paper.models import MODELS, trained_from_sft
from paper.stats import mean_and_error

NEXT_WORD = "next word"  # one more task: predict each token of held-out pages
SAFETY = ("truth", "toxicity", "toxicity, respectful prompt", "bias")  # reported, but not part of the abilities


def distinct(tasks):
    """Each task once, also if it was drawn several times."""
    unique = {}
    for task in tasks:
        unique[task["task"], task["context"], task.get("target"), *task.get("choices", ())] = task
    return list(unique.values())


def load_tasks(path, tokenizer, context):
    """The distinct tasks of a file; none if there is no file. UserError if one does not fit the context."""
    tasks = readers.read_jsonl(path, "tasks") if Path(path).is_file() else []
    for number, task in enumerate(tasks, 1):
        longest = max(len(tokenizer.encode(text)) for text in task.get("choices") or [task["target"]]) + 4
        if len(tokenizer.encode(task["context"])) + longest > context:
            raise UserError(f"{path}:{number}: the task does not fit the context of {context}")
    return distinct(tasks)


def load_pages(path, tokenizer, context):
    """At most 1,000 rows of held-out text, as (context, target) pairs, and the number of each one's document."""
    if not Path(path).is_file():
        return [], []
    text = readers.PretrainingText(path, tokenizer, context)
    return text.pairs(range(min(len(text), 1000))), text.documents[:1000]


@torch.no_grad()
def choice_logprobs(model, tasks, tokenizer, device):
    """For each task with choices, the log-probability of each choice after the context, summed over its tokens."""
    rows = []  # (context ids, choice ids, (task, choice))
    for i, task in enumerate(tasks):
        context = tokenizer.encode(task["context"])
        rows += [(context, tokenizer.encode(choice), (i, c)) for c, choice in enumerate(task["choices"])]
    rows.sort(key=readers.length)  # rows of similar length together: little padding
    sums = {}  # (task, choice): log-probability
    for start in range(0, len(rows), 256):
        chosen = rows[start : start + 256]
        batch = readers.make_batch([row[:2] for row in chosen], tokenizer.end_of_text, device)
        logprobs = torch.where(batch.mask, model(batch.tokens, batch.positions), 0.0)  # (B, R)
        for row, total in zip(chosen, logprobs.sum(1).tolist()):
            sums[row[2]] = total
    return [[sums[i, c] for c in range(len(task["choices"]))] for i, task in enumerate(tasks)]


def greedy_lines(model, tasks, tokenizer, runtime):
    """How greedy decoding continues each task's context, up to the end of the line."""
    longest = max(len(tokenizer.encode(task["target"])) for task in tasks) + 4
    contexts, lines = [tokenizer.encode(task["context"]) for task in tasks], []
    for start in range(0, len(tasks), 256):
        chosen = contexts[start : start + 256]
        with runtime.sampling(model) as sampler:
            responses = generate(sampler, chosen, longest, torch.zeros(len(chosen), longest), temperature=0)
        lines += [tokenizer.decode(ids).split("\n")[0] for ids in responses]
    return lines


def answer_tasks(model, tasks, tokenizer, runtime):
    """1.0 or 0.0 for each task. With choices: is the right one the most likely? With a target: does greedy decoding
    continue with exactly that line?"""
    correct = [0.0] * len(tasks)
    with_choices = [i for i, task in enumerate(tasks) if task.get("choices")]
    with runtime.autocast():
        all_logprobs = choice_logprobs(model, [tasks[i] for i in with_choices], tokenizer, runtime.device)
    for i, logprobs in zip(with_choices, all_logprobs):
        correct[i] = float(logprobs.index(max(logprobs)) == tasks[i]["answer"])
    with_target = [i for i, task in enumerate(tasks) if not task.get("choices")]
    if with_target:
        for i, line in zip(with_target, greedy_lines(model, [tasks[i] for i in with_target], tokenizer, runtime)):
            correct[i] = float(line.strip() == tasks[i]["target"].strip())
    return correct


@torch.no_grad()
def next_words(model, pages, tokenizer, device):
    """Like LAMBADA, but for every word: of each page, a (context, target) pair, the share of target tokens that are
    the most likely ones after the tokens before them."""
    shares, longest = [], max((len(page[1]) for page in pages), default=0)
    # Pages per batch, so that the logits take at most a gigabyte.
    size = max(1, min(100, 2**28 // max(1, longest * tokenizer.vocab_size)))
    for start in range(0, len(pages), size):
        batch = readers.make_batch(pages[start : start + size], tokenizer.end_of_text, device)
        predictions = model(batch.tokens).argmax(-1).gather(1, batch.positions)  # (B, R)
        correct = (predictions == batch.tokens.gather(1, batch.positions + 1)) & batch.mask
        shares += (correct.sum(1) / batch.mask.sum(1)).tolist()
    return shares


# ---------------------------------------------------------------- the alignment tax

def alignment_tax(models, config, tokenizer, runtime):
    """Zero-shot accuracy: {task: {model: accuracy}}, and the changes of all abilities together, item by item: {"PPO -
    SFT": change}. Items are the tasks of tasks.test.jsonl, each once, and pages of pretrain.valid.bin, whose next
    words are one more task; None if the dataset has neither. Standard errors are over contexts, which several tasks
    may share, and over documents, which may have several pages."""
    names = [entry.name for entry in MODELS if entry.name in models and not entry.few_shot]
    context = min(models[name].config.context for name in names)
    items = load_tasks(f"{config.data}/tasks.test.jsonl", tokenizer, context)
    pages, documents = load_pages(f"{config.data}/pretrain.valid.bin", tokenizer, context)
    if not items and not pages:
        return None

    def answer(i):
        model = models[names[i]]
        correct = answer_tasks(model, items, tokenizer, runtime)
        with runtime.autocast():
            return correct + next_words(model, pages, tokenizer, runtime.device)

    if runtime.config.shard:  # each model takes all ranks
        correct = [answer(i) for i in range(len(names))]
    else:
        correct = runtime.distribute(len(names), answer)
    correct = dict(zip(names, correct))  # {model: one number per item}
    groups = [(task["task"], task["context"]) for task in items] + [(NEXT_WORD, document) for document in documents]

    def mean_over(chosen, numbers):
        return mean_and_error([numbers[i] for i in chosen], [groups[i] for i in chosen])

    kinds = {}  # {task: its items}
    for i, (kind, _) in enumerate(groups):
        kinds.setdefault(kind, []).append(i)
    kinds["all abilities"] = abilities = [i for i, (kind, _) in enumerate(groups) if kind not in SAFETY]
    table = {kind: {name: mean_over(chosen, correct[name]) for name in names} for kind, chosen in kinds.items()}
    trained = trained_from_sft()
    compared = [(name, "SFT") for name in trained] + [("PPO-ptx", "PPO")] + [(name, "GPT") for name in trained]
    changes = {f"{a} - {b}": mean_over(abilities, [x - y for x, y in zip(correct[a], correct[b])])
               for a, b in compared if a in names and b in names}
    return table, changes
