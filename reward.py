"""Stage 2, the reward model: the K-choose-2 ranking loss, equation 1 (section 3.4, C.2).

    python reward.py                                # sft + comparisons -> reward on the laptop
    torchrun --nproc_per_node=8 reward.py

The score of a response is the scalar head's output at its last token, the end of text. All
responses to a prompt are in one batch element: each is read once, and every pair of them is a
comparison. (Shuffled pairs would show each response K - 1 times per epoch, and the model would
overfit: 3.4.)

Departure from the paper: starts from the SFT model (the paper: a GPT-3 tuned on public NLP data).

Shapes: P prompts of the batch with K responses each (K varies), B responses in all, T tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.checkpoints import load_model
from common.config import check_range, launch
from common.files import digest
from common.learner import Learner, cosine
from common.run import Run
from common.runtime import Runtime, RuntimeConfig
from common.seeds import seed_torch
from data import batches, readers
from data.tokenizer import Tokenizer
from model import ScalarModel


@dataclass(frozen=True)
class Config(RuntimeConfig):
    data: str = "data/tinyworld"  # the dataset's folder
    out: str = "out/reward"  # the run's folder
    init: str = "out/sft/model.pt"  # the SFT model to start from
    epochs: int = 1  # more overfit fast (C.2: 1)
    batch_size: int = 8  # prompts per step (C.2: 64)
    lr: float = 1e-3  # peak learning rate, falling to a tenth by a cosine (C.2: 9e-6)
    seed: int = 0  # of the head's initialization and the order of the data

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "epochs", "batch_size", low=1)
        check_range(self, "lr", low=0)


def ranking_loss(rewards, ranks):
    """Equation 1 for one prompt: the mean of -log sigmoid(r_w - r_l) over the pairs in which w is
    ranked above l. rewards (K,) floats, ranks (K,) integers, 1 is best.

    Tied pairs are dropped, also from the number to divide by, which is then C(K, 2) minus the ties.
    Ranks [1, 2, 2] have two pairs, (0, 1) and (0, 2). Without a pair the loss is 0.
    Returns (loss, number of pairs, in how many of them r_w > r_l)."""
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    above = ranks[:, None] < ranks[None, :]  # (K, K): w in the row is preferred to l in the column
    margins = (rewards[:, None] - rewards[None, :])[above]  # (pairs,)
    pairs = margins.numel()
    loss = -F.logsigmoid(margins).sum() / max(1, pairs)
    return loss, pairs, int((margins > 0).sum())


def has_pairs(ranks):
    return bool((ranks != ranks[0]).any())


def start_model(config, tokenizer, runtime):
    """The SFT model with a new random head, and the seed of that head.

    The seed depends on the comparisons, because evaluate.py's judge is trained on other comparisons
    from the same SFT model. If both had the same initial head, the judge would reward whatever the
    policy had learned about it."""
    comparisons = digest(f"{config.data}/comparisons.train.jsonl", "make comparisons")
    head_seed = seed_torch(config.seed, f"reward head for {comparisons}")
    model = load_model(ScalarModel, config.init, "make sft", tokenizer, runtime, new_head=True,
                       dropout=0.0)
    return model, head_seed


def train_step(learner, comparisons, lr, end_of_text):
    """One update on the global batch of comparisons. Returns the numbers to log. The loss
    is computed on the CPU: many operations on few numbers are slow on a GPU."""
    runtime = learner.runtime
    mine = comparisons[runtime.local_rows(len(comparisons))]
    (prompts,) = runtime.all_reduce(sum(has_pairs(ranks) for _, ranks, _ in mine))
    total, pairs, right = 0.0, 0, 0
    for part in learner.accumulate(runtime.micro_batches(mine, len(comparisons), longest)):
        examples = [example for examples, _, _ in part for example in examples]
        scores = readers.last_scores(learner, examples, end_of_text, runtime.device)  # (B,)
        by_prompt = scores.cpu().split([len(examples) for examples, _, _ in part])  # P of (K,)
        loss = 0.0
        for rewards, (_, ranks, _) in zip(by_prompt, part):
            prompt_loss, n, n_right = ranking_loss(rewards, ranks)
            loss, pairs, right = loss + prompt_loss, pairs + n, right + n_right
        learner.backward(loss / max(1, prompts))  # each prompt counts once, whatever its K
        total += loss.item()
    total, pairs, right = runtime.all_reduce(total, pairs, right)
    return dict(loss=total / max(1, prompts), accuracy=right / max(1, pairs), pairs=pairs, lr=lr,
                grad_norm=learner.step(lr))


def longest(comparison):
    return max(map(readers.length, comparison[0]))


@torch.no_grad()
def validate(model, comparisons, seen, end_of_text, runtime):
    """-> the mean loss per prompt, and the accuracy on pairs ranked by labelers in `seen` and by
    others (None if there are no such pairs)."""
    total = prompts = 0
    pairs, right = {True: 0, False: 0}, {True: 0, False: 0}  # whether the labeler is in `seen`
    for [(examples, ranks, labeler)], counts in runtime.local_batches(comparisons, 1):
        with runtime.autocast():
            scores = readers.last_scores(model, examples, end_of_text, runtime.device)
        if counts:
            loss, n, n_right = ranking_loss(scores.cpu(), ranks)
            total, prompts = total + loss.item(), prompts + (n > 0)
            pairs[labeler in seen] += n
            right[labeler in seen] += n_right
    total, prompts, *counts = runtime.all_reduce(total, prompts, pairs[True], right[True],
                                                 pairs[False], right[False])
    accuracies = [right / pairs if pairs else None for pairs, right in (counts[:2], counts[2:])]
    return total / max(1, prompts), *accuracies


@torch.no_grad()
def demonstration_score(model, examples, end_of_text, runtime):
    """Mean score of demonstrations: the bias to subtract before RL (C.2)."""
    total = 0.0
    for part, counts in runtime.local_batches(examples, 32):
        with runtime.autocast():
            scores = readers.last_scores(model, part, end_of_text, runtime.device)
        total += scores.sum().item() * counts
    return runtime.all_reduce(total)[0] / len(examples)


def main(config):
    runtime = Runtime(config)
    runtime.check_batch_size(config.batch_size, "batch_size")
    tokenizer = Tokenizer.load(config.data)
    end_of_text = tokenizer.end_of_text
    model, head_seed = start_model(config, tokenizer, runtime)
    context = model.config.context
    train = batches.load_comparisons(config.data, "train", tokenizer, context)
    valid = batches.load_comparisons(config.data, "valid", tokenizer, context)
    demonstrations_file = f"{config.data}/demonstrations.train.jsonl"
    demonstrations = batches.demonstrations_that_fit(demonstrations_file, tokenizer, context)
    seen = {labeler for _, _, labeler in train}
    steps_per_epoch = batches.steps_per_epoch(train, config)
    learner = Learner(model, config.lr, runtime)
    inputs = [config.init, *(f"{config.data}/{name}.jsonl" for name in batches.REWARD_DATA)]
    run = Run(config, runtime, tokenizer, inputs, {"model": learner})
    run.print(f"{config.epochs} epochs x {steps_per_epoch} steps x {config.batch_size} prompts; "
              f"{len(train):,} prompts, {len(seen)} labelers")
    steps = config.epochs * steps_per_epoch
    progress = run.progress_bar(run.resume(), steps)
    for step in progress:
        epoch, i = divmod(step, steps_per_epoch)
        chosen = batches.shuffled(train, config.batch_size, i, config.seed, "reward epoch", epoch)
        numbers = train_step(learner, chosen, config.lr * cosine(step, steps), end_of_text)
        progress.set_postfix(refresh=False, loss=f"{numbers['loss']:.3f}",
                             accuracy=f"{numbers['accuracy']:.2f}")
        if i + 1 == steps_per_epoch:
            loss, accuracy, held_out = validate(model, valid, seen, end_of_text, runtime)
            numbers |= dict(epoch=epoch + 1, valid_loss=loss, valid_accuracy=accuracy,
                            held_out_accuracy=held_out)
            run.print(f"epoch {epoch + 1}: validation loss {loss:.4f}")
        run.log(step, **numbers)
        run.checkpoint(step + 1)
    bias = demonstration_score(model, demonstrations, end_of_text, runtime)
    with torch.no_grad():
        model.head.bias.sub_(bias)  # demonstrations score 0 on average
    run.print(f"{config.out}/model.pt: {bias:+.3f} subtracted, so that demonstrations score 0")
    run.save_model(model, head_seed=head_seed)
    run.finish()


if __name__ == "__main__":
    launch(main, Config)
