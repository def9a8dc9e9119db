"""What each stage trains on, by step: a function of the step and the seed alone, so that a resumed run sees the same batches.
"""

import torch

from common.config import UserError
from common.seeds import generator
from data import readers

REWARD_DATA = ("demonstrations.train", "comparisons.train", "comparisons.valid")


def shuffled(items, count, i, seed, purpose, epoch):
    """Batch i of `count` items, in the epoch's random order."""
    order = torch.randperm(len(items), generator=generator(seed, purpose, epoch))
    return [items[j] for j in order[i * count : (i + 1) * count].tolist()]


class SFTData:
    """Demonstrations and pretraining text, as pairs of (context ids, target ids)."""

    def __init__(self, config, tokenizer, context):
        self.config, self.demonstrations, self.text = config, [], None
        self.files = [f"{config.data}/tokenizer.json"]  # that decide the result
        if config.pretrain_mix < 1:
            self.demonstrations = load_demonstrations(config.data, "train", tokenizer, context)
            self.valid = load_demonstrations(config.data, "valid", tokenizer, context)
            self.files += [f"{config.data}/demonstrations.{split}.jsonl" for split in ("train", "valid")]
        if config.pretrain_mix:
            self.text = readers.PretrainingText(f"{config.data}/pretrain.train.bin", tokenizer, context)
            self.files.append(f"{config.data}/pretrain.train.bin")
        if config.pretrain_mix == 1:
            held_out = readers.PretrainingText(f"{config.data}/pretrain.valid.bin", tokenizer, context)
            self.valid = held_out.pairs(range(min(len(held_out), 500)))
            self.files.append(f"{config.data}/pretrain.valid.bin")
        self.demonstration_rows = config.batch_size - config.pretrain_rows
        rows = len(self.demonstrations or self.text)
        self.steps_per_epoch = rows // (self.demonstration_rows or config.batch_size)
        if self.steps_per_epoch == 0:
            raise UserError(f"{rows} rows are less than one batch of {config.batch_size}")

    def batch(self, step):
        """The global batch of a step: demonstrations in this epoch's random order, and pretraining rows."""
        config, pairs = self.config, []
        if self.demonstration_rows:
            epoch, i = divmod(step, self.steps_per_epoch)
            pairs = shuffled(self.demonstrations, self.demonstration_rows, i, config.seed, "sft epoch", epoch)
        if config.pretrain_rows:
            pairs = pairs + self.text.pairs(self.text.draw(config.pretrain_rows, config.seed, config.stage, step))
        return pairs


def load_demonstrations(data, split, tokenizer, context):
    """-> examples (prompt ids, response ids). UserError if one does not fit the context."""
    path = f"{data}/demonstrations.{split}.jsonl"
    records = readers.read_jsonl(path, "demonstrations")
    examples = [readers.example(r["prompt"], r["response"], tokenizer) for r in records]
    for number, (prompt, response) in enumerate(examples, 1):
        if len(prompt) + len(response) > context:
            raise UserError(f"{path}:{number}: {len(prompt)} tokens of prompt and {len(response)} of response do not fit "
                            f"the context of {context}")
    return examples


def load_comparisons(data, split, tokenizer, context):
    """-> a list of (K examples, ranks (K,), labeler), in the file's order."""
    path, result = f"{data}/comparisons.{split}.jsonl", []
    for number, r in enumerate(readers.read_jsonl(path, "comparisons", "make comparisons"), 1):
        examples = [readers.example(r["prompt"], response, tokenizer) for response in r["responses"]]
        longest = max(map(readers.length, examples))
        if longest > context:
            raise UserError(f"{path}:{number}: {longest} tokens do not fit the context of {context}")
        result.append((examples, torch.tensor(r["ranks"]), r["labeler"]))
    return result


def steps_per_epoch(comparisons, config):
    """UserError if there is not one batch, or no pair to learn from."""
    if len(comparisons) < config.batch_size:
        raise UserError(f"{len(comparisons)} comparisons are less than one batch of {config.batch_size} prompts")
    if all((ranks == ranks[0]).all() for _, ranks, _ in comparisons):
        raise UserError(f"{config.data}/comparisons.train.jsonl: every pair of responses is tied")
    return len(comparisons) // config.batch_size


def demonstrations_that_fit(path, tokenizer, context):
    """-> at most 1,000 demonstrations that fit the context, as examples."""
    examples = [readers.example(r["prompt"], r["response"], tokenizer) for r in readers.read_jsonl(path, "demonstrations")]
    examples = [pair for pair in examples if readers.length(pair) <= context][:1000]
    if not examples:
        raise UserError(f"{path}: no demonstration fits the context of {context}")
    return examples


class PPOData:
    """Prompts for rollouts, and rows of pretraining text for PPO-ptx."""

    def __init__(self, config, tokenizer, context, reward_context):
        """context: of the policy; reward_context: of the reward model, which reads a truncated response with an end of text."""
        self.config = config
        path = f"{config.data}/prompts.train.jsonl"
        records = readers.read_jsonl(path, "prompts")
        maximum = min(context, reward_context - 1) - config.max_new_tokens
        self.prompts = readers.encode_prompts(records, tokenizer, maximum, path)
        self.files = [path]  # that decide the result
        if len(self.prompts) < config.batch_size:
            raise UserError(f"{path}: {len(self.prompts)} prompts are less than one batch of {config.batch_size}")
        if config.pretraining_rows:
            self.text = readers.PretrainingText(f"{config.data}/pretrain.train.bin", tokenizer, context)
            self.files.append(f"{config.data}/pretrain.train.bin")

    def batch(self, iteration, runtime):
        """This rank's share of the iteration's minibatches: a list of prompts and uniform numbers (prompts, max_new_tokens)
        per minibatch. No prompt occurs twice in a pass over them."""
        config = self.config
        pass_, i = divmod(iteration, len(self.prompts) // config.batch_size)
        prompts = shuffled(self.prompts, config.batch_size, i, config.seed, "ppo pass", pass_)
        numbers = generator(config.seed, "rollout", iteration)
        uniforms = torch.rand(config.batch_size, config.max_new_tokens, generator=numbers)
        mine = runtime.local_rows(config.minibatch_size)
        starts = range(0, config.batch_size, config.minibatch_size)
        return ([prompts[start : start + config.minibatch_size][mine] for start in starts],
                [uniforms[start : start + config.minibatch_size][mine] for start in starts])

    def pretraining_batches(self, step, end_of_text, runtime):
        """This rank's pretraining rows for one update, as micro-batches."""
        n = self.config.pretraining_rows
        if not n:
            return []
        pairs = self.text.pairs(self.text.draw(n, self.config.seed, "ppo", step))[runtime.local_rows(n)]
        return [readers.make_batch(part, end_of_text, runtime.device)
                for part in runtime.micro_batches(pairs, n, readers.length)]
