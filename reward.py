"""Stage 2, the reward model: the K-choose-2 ranking loss, equation 1 (section 3.4, C.2).

    python reward.py                                # sft + comparisons -> reward on the laptop
    torchrun --nproc_per_node=8 reward.py

The score of a response is the scalar head's output at its last token, the end of text. All responses of a prompt stand
in one batch element: each is read once, and every pair of them is a comparison. (Pairs shuffled apart would show each
response K - 1 times an epoch, and the model would overfit: section 3.4.)

Departures from the paper: initialised from the SFT model's trunk (the paper: a GPT-3 fine-tuned on public NLP data;
Stiennon et al. 2020 start from SFT).

Shapes: P prompts of the batch with K responses each (K varies), B responses in all, T tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
from common import Machine, Ranks, Run, UserError
from data import readers
from data.readers import last_scores
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel


@dataclass(frozen=True)
class Config(Machine):
    data: str = "data/tinyworld"  # the dataset's folder
    out: str = "out/reward"  # the run's folder
    init: str = "out/sft/model.pt"  # the checkpoint whose trunk to start from
    epochs: int = 1  # more overfit fast (C.2: 1)
    batch_size: int = 8  # prompts a step (C.2: 64)
    lr: float = 1e-3  # peak learning rate, falling to a tenth by a cosine (C.2: 9e-6)
    seed: int = 0  # of the head's initialisation and the order of the data

    def __post_init__(self):
        super().__post_init__()
        if min(self.epochs, self.batch_size) < 1 or self.lr < 0:
            raise ValueError("--epochs and --batch_size are at least 1, --lr at least 0")


def ranking_loss(rewards, ranks):
    """Equation 1 for one prompt: the mean of -log sigmoid(r_w - r_l) over the pairs in which w is ranked above l.

    rewards (K,) floats, ranks (K,) integers, 1 the best. Tied pairs are dropped, also from the number to divide by:
    equation 1's C(K, 2) less the ties. Returns (loss, pairs, right): a scalar
    to differentiate, the number of pairs that count, and in how many of them r_w > r_l. Without a pair the loss is 0.
    Ranks [1, 2, 2] have two pairs, (0, 1) and (0, 2)."""
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    above = ranks[:, None] < ranks[None, :]  # (K, K): row w is preferred to column l
    margins = (rewards[:, None] - rewards[None, :])[above]  # (pairs,)
    pairs = margins.numel()
    loss = -F.logsigmoid(margins).sum() / max(1, pairs)
    return loss, pairs, int((margins > 0).sum())


def load_comparisons(config, split, tokenizer, context):
    """-> a list of (K episodes, ranks (K,), labeler), in the file's order."""
    path, result = f"{config.data}/comparisons.{split}.jsonl", []
    for number, r in enumerate(readers.read_jsonl(path, "comparisons", "make comparisons"), 1):
        episodes = [readers.episode(r["prompt"], response, tokenizer) for response in r["responses"]]
        longest = max(map(readers.length, episodes))
        if longest > context:
            raise UserError(f"{path}:{number}: {longest} tokens do not fit the context of {context}")
        result.append((episodes, torch.tensor(r["ranks"]), r["labeler"]))
    return result


@torch.no_grad()
def validate(model, comparisons, config, end, ranks):
    """-> {labeler: (pairs, right)} and the mean loss a prompt, over all ranks."""
    counts, total, prompts = {}, 0.0, 0
    for [(episodes, order, labeler)], counted in ranks.shares(comparisons, 1):
        with ranks.autocast():
            scores = last_scores(model, episodes, end, ranks.device)
        if not counted:
            continue
        loss, pairs, right = ranking_loss(scores, order.to(ranks.device))
        before = counts.get(labeler, (0, 0))
        counts[labeler] = before[0] + pairs, before[1] + right
        total, prompts = total + loss.item(), prompts + (pairs > 0)
    everyone = {}
    for labeler, (pairs, right) in ranks.gather(list(counts.items())):
        before = everyone.get(labeler, (0, 0))
        everyone[labeler] = before[0] + pairs, before[1] + right
    total, prompts = ranks.sum(total, prompts)
    return everyone, total / max(1, prompts)


def accuracy(counts, labelers):
    """Right pairs over all pairs of these labelers, None where they have none."""
    pairs = sum(counts[name][0] for name in labelers if name in counts)
    return sum(counts[name][1] for name in labelers if name in counts) / pairs if pairs else None


def load_demonstrations(path, tokenizer, context):
    """-> the episodes of the demonstrations that fit the context, at most 1,000."""
    episodes = [readers.episode(r["prompt"], r["response"], tokenizer) for r in readers.read_jsonl(path, "demonstrations")]
    episodes = [pair for pair in episodes if readers.length(pair) <= context][:1000]
    if not episodes:
        raise UserError(f"{path}: no demonstration fits the context of {context}")
    return episodes


@torch.no_grad()
def demonstration_score(model, episodes, end, ranks):
    """Mean score of demonstrations: the bias to take off before RL (C.2)."""
    total = 0.0
    for share, counted in ranks.shares(episodes, 32):
        with ranks.autocast():
            total += last_scores(model, share, end, ranks.device).sum().item() * counted
    return ranks.sum(total)[0] / len(episodes)


def start_model(sft, config):
    """The SFT model's trunk with a new random head, and the seed of that head.

    The seed depends on the comparisons: a reward model and the judge that evaluate.py asks about its policy are trained on
    different ones. If both started from one random head, the judge would reward whatever of it the policy had learned."""
    comparisons = common.digest(f"{config.data}/comparisons.train.jsonl")
    head_seed = common.seed_of(config.seed, f"reward head for {comparisons}")
    torch.manual_seed(head_seed)
    model = ScalarModel(sft.config)
    model.load_trunk(sft.state_dict())
    return model, head_seed


def main(config):
    ranks = Ranks(config)
    ranks.check_share(config.batch_size, "batch_size")
    tokenizer = Tokenizer.load(config.data)
    end = tokenizer.end_of_text
    sft = common.load_model(GPT, config.init, "make sft", tokenizer, dropout=0.0)
    train = load_comparisons(config, "train", tokenizer, sft.config.context)
    valid = load_comparisons(config, "valid", tokenizer, sft.config.context)
    model, head_seed = start_model(sft, config)
    ranks.place(model)
    shown = f"{config.data}/demonstrations.train.jsonl"
    demonstrations = load_demonstrations(shown, tokenizer, model.config.context)
    seen = {labeler for _, _, labeler in train}
    held_out = {labeler for _, _, labeler in valid} - seen
    per_epoch = len(train) // config.batch_size
    if per_epoch == 0:
        raise UserError(f"{len(train)} comparisons are less than one batch of {config.batch_size} prompts")
    steps = config.epochs * per_epoch
    pairs = sum(ranking_loss(torch.zeros(len(order)), order)[1] for _, order, _ in train)
    if pairs == 0:
        raise UserError(f"{config.data}/comparisons.train.jsonl: every pair of responses is tied")
    if ranks.main:
        print(f"{config.epochs} epochs x {per_epoch} steps x {config.batch_size} prompts; {len(train):,} prompts, "
              f"{sum(len(e) for e, _, _ in train):,} responses, {pairs:,} pairs that are not tied, {len(seen)} labelers")

    run = Run(config.out, config, ranks, [config.init, shown, f"{config.data}/comparisons.train.jsonl"])
    optimizer = common.adam(model, config.lr)
    start = run.resume(config.resume, model=(model, optimizer))
    wrapped = ranks.wrap(model)

    progress = common.bar(ranks, steps, start, config.out)
    for step in progress:
        epoch, i = divmod(step, per_epoch)
        order = torch.randperm(len(train), generator=common.generator(config.seed, "reward epoch", epoch))
        chosen = [train[j] for j in order[i * config.batch_size : (i + 1) * config.batch_size].tolist()]
        mine = chosen[ranks.rows(len(chosen))]
        parts = ranks.micro_batches(mine, len(chosen), lambda comparison: max(map(readers.length, comparison[0])))
        (prompts,) = ranks.sum(sum((order[:, None] < order).any() for _, order, _ in mine))  # those not all tied
        loss_sum, pairs, right = 0.0, 0, 0
        for i, part in enumerate(parts):
            with ranks.adding(wrapped, i + 1 < len(parts)):
                with ranks.autocast():
                    episodes = [e for episodes, _, _ in part for e in episodes]
                    scores = last_scores(wrapped, episodes, end, ranks.device)  # (B,)
                by_prompt = scores.split([len(episodes) for episodes, _, _ in part])  # P tensors (K,)
                results = [ranking_loss(rewards, order.to(ranks.device)) for rewards, (_, order, _) in zip(by_prompt, part)]
                loss = torch.stack([loss for loss, _, _ in results]).sum()
                ranks.backward(loss / max(1, prompts))  # a prompt counts once, however many pairs it has (equation 1)
            loss_sum += loss.item()
            pairs += sum(n for _, n, _ in results)
            right += sum(n for _, _, n in results)
        loss_sum, pairs, right = ranks.sum(loss_sum, pairs, right)
        lr = config.lr * common.cosine(step, steps)
        norm = common.update(optimizer, model, lr, ranks)
        numbers = dict(loss=loss_sum / max(1, prompts), accuracy=right / max(1, pairs), pairs=pairs, lr=lr,
                       grad_norm=norm)
        progress.set_postfix(refresh=False, loss=f"{numbers['loss']:.3f}", accuracy=f"{numbers['accuracy']:.2f}")
        if (step + 1) % per_epoch == 0:
            counts, valid_loss = validate(model, valid, config, end, ranks)
            numbers |= dict(epoch=epoch + 1, valid_loss=valid_loss, valid_accuracy=accuracy(counts, seen),
                            held_out_accuracy=accuracy(counts, held_out))
            shown = {"training": numbers["valid_accuracy"], "held-out": numbers["held_out_accuracy"]}
            if ranks.main:
                progress.write(f"epoch {epoch + 1}: right on unseen prompts " + ", ".join(
                    f"{share:.1%} ({who} labelers)" for who, share in shown.items() if share is not None))
        run.log(step, **numbers)
        run.checkpoint(step + 1, model=(model, optimizer))

    bias = demonstration_score(model, demonstrations, end, ranks)
    with torch.no_grad():
        model.head.bias.sub_(bias)  # so that demonstrations score 0 on average
    run.save_model(model, config.data, tokenizer=tokenizer.fingerprint, head_seed=head_seed)
    run.finish()
    if ranks.main:
        print(f"{config.out}/model.pt: {bias:+.3f} taken off, so that demonstrations score 0")


if __name__ == "__main__":
    common.launch(main, Config)
