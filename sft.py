"""Stage 1, supervised fine-tuning: next-token loss on labelers' demonstrations (section 3.4, C.1). And stage 0: with
--pretrain_mix 1 and --init scratch the same loop pretrains the base model.

    python sft.py                                   # base -> sft on the laptop
    python sft.py --pretrain_mix 1 --init scratch --out out/base ...    # see the Makefile
    python sft.py --init gpt2 --data data/oasst @data/oasst/sft.args    # GPT-2 on real data
    torchrun --nproc_per_node=8 sft.py

Departures from the paper: one model is both the SFT baseline, trained for many epochs with dropout (C.1), and the start
of PPO, with 10% of pretraining data (C.3). Gradients are clipped, as GPT-3's were in pretraining.

Shapes: B rows of the batch, T tokens, N positions whose next token is a target, V vocabulary.
"""

from dataclasses import dataclass

import torch

import common
from common import Machine, Ranks, Run, UserError
from data import download, readers
from data.tokenizer import Tokenizer
from model import GPT, PRESETS, GPTConfig, generate


@dataclass(frozen=True)
class Config(Machine):
    data: str = "data/tinyworld"  # the dataset's folder
    out: str = "out/sft"  # the run's folder
    init: str = "out/base/model.pt"  # a checkpoint, `scratch`, gpt2[-medium|-large|-xl], or a path in transformers' layout
    size: str = "laptop"  # from scratch: one of model.PRESETS
    context: int = 0  # grow or cut the context to so many tokens; 0 leaves it
    pretrain_mix: float = 0.1  # fraction of each batch that is pretraining text (C.3: 0.1)
    epochs: int = 4  # over the demonstrations or, with pretrain_mix 1, the pretraining text (C.1: 16)
    batch_size: int = 32  # rows a step (C.1: 32)
    lr: float = 1e-3  # peak learning rate, falling to a tenth by a cosine (C.1: 9.65e-6 at 1.3B and 6B)
    dropout: float = 0.1  # on the residual branches (C.1: 0.2)
    seed: int = 0  # of the initialisation, the order of the data, dropout

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.pretrain_mix <= 1:
            raise ValueError("--pretrain_mix is a fraction from 0 to 1")
        if self.size not in PRESETS:
            raise ValueError(f"--size is one of {', '.join(PRESETS)}")
        if self.init == "scratch" and self.pretrain_mix < 1:
            raise ValueError("--init scratch has nothing to fine-tune; it goes with --pretrain_mix 1")
        if self.context < 0 or self.context == 1:
            raise ValueError("--context is at least 2, or 0")
        if min(self.epochs, self.batch_size) < 1 or self.lr < 0 or not 0 <= self.dropout < 1:
            raise ValueError("--epochs and --batch_size are at least 1, --lr at least 0, --dropout from 0 to under 1")
        if 0 < self.pretrain_mix < 1 and not 0 < self.pretrain_rows < self.batch_size:
            raise ValueError(f"--pretrain_mix {self.pretrain_mix} of --batch_size {self.batch_size} rows is all or "
                             "nothing; raise the batch size")

    @property
    def pretrain_rows(self):
        return round(self.pretrain_mix * self.batch_size)

    @property
    def stage(self):
        """The name of the stage: part of the purpose of all its random numbers, which no two stages share."""
        return "pretraining" if self.pretrain_mix == 1 else "sft"


def masked_loss(model, tokens, mask):
    """Sum over the targets of -log p(token | those before it), and how many there are.

    tokens (B, T); mask (B, T) marks the N positions whose next token is a target: those of the response, the end of
    text included, never the prompt's (section 3.4). Only they get logits, so no (B, T, V) tensor exists."""
    logprobs = model(tokens, mask)  # (N,)
    return -logprobs.sum(), logprobs.numel()


@torch.no_grad()
def validation_loss(model, pairs, config, end, ranks):
    """Mean loss a target over all (context, target) pairs, dropout off."""
    model.eval()
    total = count = 0
    ordered = sorted(pairs, key=readers.length)
    for share, counts in ranks.shares(ordered, config.micro_batch or config.batch_size):
        tokens, mask = readers.batch_of(share, end, ranks.device)
        with ranks.autocast():
            loss, n = masked_loss(model, tokens, mask)
        total, count = total + loss.item() * counts, count + n * counts
    model.train()
    total, count = ranks.sum(total, count)
    return total / max(1, count)


def load_demonstrations(config, split, tokenizer, context):
    path = f"{config.data}/demonstrations.{split}.jsonl"
    pairs = [readers.episode(r["prompt"], r["response"], tokenizer) for r in readers.read_jsonl(path, "demonstrations")]
    for number, (prompt, response) in enumerate(pairs, 1):
        if len(prompt) + len(response) > context:
            raise UserError(f"{path}:{number}: {len(prompt)} tokens of prompt and {len(response)} of response do not fit "
                            f"the context of {context}")
    return pairs


def start_model(config, init, tokenizer):
    torch.manual_seed(common.seed_of(config.seed, f"{config.stage}: initialisation"))
    if config.init == "scratch":
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, dropout=config.dropout, **PRESETS[config.size]))
    else:
        model = common.load_model(GPT, init, "make base", tokenizer, dropout=config.dropout)
    if config.context:
        model.set_context(config.context)
    return model


def main(config):
    ranks = Ranks(config)
    ranks.check_share(config.batch_size, "batch_size")
    tokenizer = Tokenizer.load(config.data)
    end = tokenizer.end_of_text
    init = ranks.first(lambda: download.weights(config.init, tokenizer))
    model = ranks.place(start_model(config, init, tokenizer))
    context = model.config.context
    text = readers.PretrainingText(f"{config.data}/pretrain.train.bin", tokenizer, context) if config.pretrain_mix else []
    if config.pretrain_mix < 1:
        demonstrations = load_demonstrations(config, "train", tokenizer, context)
        valid = load_demonstrations(config, "valid", tokenizer, context)
    else:
        demonstrations = []
        valid_text = readers.PretrainingText(f"{config.data}/pretrain.valid.bin", tokenizer, context)
        valid = valid_text.pairs(range(min(len(valid_text), 500)))

    pretrain_rows, demonstration_rows = config.pretrain_rows, config.batch_size - config.pretrain_rows
    per_epoch = len(demonstrations) // demonstration_rows if demonstration_rows else len(text) // config.batch_size
    if per_epoch == 0:
        raise UserError(f"{len(demonstrations) or len(text)} rows are less than one batch of {config.batch_size}")
    steps = config.epochs * per_epoch
    if ranks.main:
        print(f"{config.epochs} epochs x {per_epoch} steps x ({demonstration_rows} demonstrations + {pretrain_rows} rows "
              f"of pretraining text); {sum(p.numel() for p in model.parameters()):,} parameters")

    inputs = [f"{config.data}/tokenizer.json"] + [init] * (init != "scratch")
    inputs += [f"{config.data}/demonstrations.train.jsonl"] * bool(demonstration_rows)
    inputs += [f"{config.data}/pretrain.train.bin"] * bool(pretrain_rows)
    run = Run(config.out, config, ranks, inputs)
    optimizer = common.adam(model, config.lr)
    start = run.resume(config.resume, model=(model, optimizer))
    wrapped = ranks.wrap(model)

    def batch(step):
        """The global batch of a step: the epoch's demonstrations in shuffled order, and rows of pretraining text."""
        epoch, i = divmod(step, per_epoch)
        pairs = []
        if demonstration_rows:
            order = torch.randperm(len(demonstrations), generator=common.generator(config.seed, "sft epoch", epoch))
            chosen = order[i * demonstration_rows : (i + 1) * demonstration_rows]
            pairs = [demonstrations[j] for j in chosen.tolist()]
        return pairs + (text.pairs(text.draw(pretrain_rows, config.seed, config.stage, step)) if pretrain_rows else [])

    model.train()
    progress = common.bar(ranks, steps, start, config.out)
    for step in progress:
        pairs = batch(step)
        mine = ranks.micro_batches(pairs[ranks.rows(len(pairs))], len(pairs), readers.length)
        mine = [readers.batch_of(part, end, ranks.device) for part in mine]
        (targets,) = ranks.sum(sum(mask.sum() for _, mask in mine))
        torch.manual_seed(common.seed_of(config.seed, f"{config.stage}: dropout", step * ranks.size + ranks.rank))
        loss_sum = 0.0
        for i, (tokens, mask) in enumerate(mine):
            with ranks.adding(wrapped, i + 1 < len(mine)):
                with ranks.autocast():
                    loss, _ = masked_loss(wrapped, tokens, mask)
                ranks.backward(loss / targets)  # the mean over the global batch, whoever holds how many targets
            loss_sum += loss.detach()
        (loss_sum,) = ranks.sum(loss_sum)
        lr = config.lr * common.cosine(step, steps)
        norm = common.update(optimizer, model, lr, ranks)
        progress.set_postfix(refresh=False, loss=f"{loss_sum / targets:.3f}", lr=f"{lr:.1e}")
        numbers = dict(loss=loss_sum / targets, targets=targets, lr=lr, grad_norm=norm)

        if (step + 1) % per_epoch == 0:  # one checkpoint an epoch, to choose from by reward-model score (3.4)
            epoch = (step + 1) // per_epoch
            numbers |= dict(epoch=epoch, valid_loss=validation_loss(model, valid, config, end, ranks))
            if demonstration_rows:
                run.save_model(model, config.data, f"epoch{epoch}.pt", tokenizer=tokenizer.fingerprint)
            most = min(48, context // 2)  # tokens of a sample
            uniforms = torch.rand(4, most, generator=common.generator(config.seed, f"{config.stage}: samples", epoch))
            prompts = [prompt[: context - most] for prompt, _ in valid[:4]]
            with ranks.autocast(), ranks.sampling(model) as anyone:
                said = generate(model, prompts, most, uniforms[: len(prompts)], anyone=anyone)
            run.samples("\n".join([f"epoch {epoch}, validation loss {numbers['valid_loss']:.4f}"] + [
                f"{tokenizer.decode(prompt)}|{tokenizer.decode(response)}" for prompt, response in zip(prompts, said)]))
        run.log(step, **numbers)
        run.checkpoint(step + 1, model=(model, optimizer))
    run.save_model(model, config.data, tokenizer=tokenizer.fingerprint)
    run.finish()
    if ranks.main:
        print(f"{config.out}/model.pt: validation loss {numbers['valid_loss']:.4f} a token" if start < steps else "done")


if __name__ == "__main__":
    common.launch(main, Config)
