"""Stage 1, supervised fine-tuning (SFT): next-token loss on labelers' demonstrations (section 3.4,
C.1). Also stage 0: with --pretrain_mix 1 and --init scratch the same loop pretrains the base model.

    python sft.py                                   # base -> sft on the laptop
    python sft.py @data/tinyworld/base.args         # stage 0: pretraining
    python sft.py --init gpt2 --data data/oasst @data/oasst/sft.args    # GPT-2 on real data
    torchrun --nproc_per_node=8 sft.py

Departures from the paper: one model is both the SFT baseline, trained for several epochs with
dropout (C.1), and the start of PPO, with 10% of pretraining data (C.3). Gradients are clipped.

Shapes: B rows, T tokens, R target tokens (of a demonstration: its response; of a row of pretraining
text: all tokens but the first).
"""

from dataclasses import dataclass

import torch

from common import download
from common.checkpoints import load_model
from common.config import check, check_range, launch
from common.learner import Learner, cosine
from common.run import Run
from common.runtime import Runtime, RuntimeConfig
from common.seeds import generator, seed_torch
from data import readers
from data.batches import SFTData
from data.tokenizer import Tokenizer
from model import GPT, PRESETS, GPTConfig, generate


@dataclass(frozen=True)
class Config(RuntimeConfig):
    data: str = "data/tinyworld"  # the dataset's folder
    out: str = "out/sft"  # the run's folder
    init: str = "out/base/model.pt"  # a checkpoint, scratch, gpt2[-medium|-large|-xl], or files
    size: str = "laptop"  # from scratch: one of model.PRESETS
    context: int = 0  # cut or extend the context to this number of tokens; 0 keeps it
    pretrain_mix: float = 0.1  # fraction of each batch that is pretraining text (C.3: 0.1)
    epochs: int = 4  # over the demonstrations; with --pretrain_mix 1, over the text (C.1: 16)
    batch_size: int = 32  # rows per step (C.1: 32)
    lr: float = 1e-3  # peak, falling to a tenth by a cosine (C.1: 9.65e-6 at 1.3B and 6B)
    dropout: float = 0.1  # on the residual branches (C.1: 0.2)
    seed: int = 0  # of the initialization, the order of the data, dropout

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.pretrain_mix <= 1, "--pretrain_mix is a fraction from 0 to 1")
        check(self.size in PRESETS, f"--size is one of {', '.join(PRESETS)}")
        check(self.init != "scratch" or self.pretrain_mix == 1,
              "--init scratch has nothing to fine-tune; it goes with --pretrain_mix 1")
        check(self.context == 0 or self.context > 1, "--context is at least 2, or 0")
        check_range(self, "epochs", "batch_size", low=1)
        check_range(self, "lr", low=0)
        check(0 <= self.dropout < 1, "--dropout is from 0 to under 1")
        check(self.pretrain_mix in (0, 1) or 0 < self.pretrain_rows < self.batch_size,
              f"--pretrain_mix {self.pretrain_mix} of --batch_size {self.batch_size} rows is all "
              "or nothing; raise the batch size")

    @property
    def pretrain_rows(self):
        return round(self.pretrain_mix * self.batch_size)

    @property
    def stage(self):
        """Part of the purpose of every random number, so that no two stages share one."""
        return "pretraining" if self.pretrain_mix == 1 else "sft"


def masked_loss(logprobs, mask):
    """Sum over the targets of -log p(token | the tokens before it): logprobs, mask (B, R) -> ().

    The targets are the response's tokens, its end of text included, never the prompt's (3.4)."""
    return -torch.where(mask, logprobs, 0.0).sum()


def start_model(config, init, tokenizer, runtime):
    seed_torch(config.seed, f"{config.stage}: initialisation")
    if config.init != "scratch":
        return load_model(GPT, init, "make base", tokenizer, runtime, context=config.context,
                          dropout=config.dropout)
    shape = dict(PRESETS[config.size])
    if config.context:
        shape["context"] = config.context
    return runtime.new_model(GPT, GPTConfig(tokenizer.vocab_size, dropout=config.dropout, **shape))


def train_step(learner, pairs, step, lr, config, end_of_text):
    """One update on the global batch `pairs`. Returns the numbers to log."""
    runtime = learner.runtime
    mine = runtime.micro_batches(pairs[runtime.local_rows(len(pairs))], len(pairs), readers.length)
    mine = [readers.make_batch(part, end_of_text, runtime.device) for part in mine]
    (targets,) = runtime.all_reduce(sum(batch.count for batch in mine))
    seed_torch(config.seed, f"{config.stage}: dropout", step * runtime.world_size + runtime.rank)
    total = 0.0
    for batch in learner.accumulate(mine):
        logprobs = learner(batch.tokens, batch.positions)  # (B, R)
        loss = masked_loss(logprobs, batch.mask)
        learner.backward(loss / targets)  # the mean over the global batch
        total += loss.detach()
    grad_norm = learner.step(lr)
    (total,) = runtime.all_reduce(total)
    return dict(loss=total / targets, targets=targets, lr=lr, grad_norm=grad_norm)


@torch.no_grad()
def validation_loss(model, pairs, config, end_of_text, runtime):
    """Mean loss per target over all (context, target) pairs, without dropout."""
    model.eval()
    total = count = 0
    pairs = sorted(pairs, key=readers.length)
    for part, counts in runtime.local_batches(pairs, config.micro_batch or config.batch_size):
        batch = readers.make_batch(part, end_of_text, runtime.device)
        with runtime.autocast():
            loss = masked_loss(model(batch.tokens, batch.positions), batch.mask)
        total += loss.item() * counts
        count += batch.count * counts
    model.train()
    total, count = runtime.all_reduce(total, count)
    return total / max(1, count)


def sample_text(model, pairs, epoch, config, tokenizer, runtime):
    """What the model answers to the first prompts."""
    length = min(48, model.config.context // 2)
    prompts = [prompt[: model.config.context - length] for prompt, _ in pairs[:4]]
    numbers = generator(config.seed, f"{config.stage}: samples", epoch)
    uniforms = torch.rand(4, length, generator=numbers)[: len(prompts)]
    with runtime.sampling(model) as sampler:
        responses = generate(sampler, prompts, length, uniforms)
    return [f"{tokenizer.decode(prompt)}|{tokenizer.decode(response)}"
            for prompt, response in zip(prompts, responses)]


def main(config):
    runtime = Runtime(config)
    runtime.check_batch_size(config.batch_size, "batch_size")
    tokenizer = Tokenizer.load(config.data)
    init = runtime.once_per_machine(lambda: download.weights(config.init, tokenizer))
    model = start_model(config, init, tokenizer, runtime)
    data = SFTData(config, tokenizer, model.config.context)
    steps = config.epochs * data.steps_per_epoch
    learner = Learner(model, config.lr, runtime)
    inputs = data.files + ([] if config.init == "scratch" else [init])
    run = Run(config, runtime, tokenizer, inputs, {"model": learner})
    run.print(f"{config.epochs} epochs x {data.steps_per_epoch} steps x ({data.demonstration_rows} "
              f"demonstrations + {config.pretrain_rows} rows of pretraining text); "
              f"{sum(p.numel() for p in model.parameters()):,} parameters")
    model.train()
    progress = run.progress_bar(run.resume(), steps)
    for step in progress:
        lr = config.lr * cosine(step, steps)
        numbers = train_step(learner, data.batch(step), step, lr, config, tokenizer.end_of_text)
        progress.set_postfix(refresh=False, loss=f"{numbers['loss']:.3f}", lr=f"{lr:.1e}")
        epoch, rest = divmod(step + 1, data.steps_per_epoch)
        if rest == 0:  # a checkpoint per epoch, to choose from by reward-model score (3.4)
            loss = validation_loss(model, data.valid, config, tokenizer.end_of_text, runtime)
            numbers |= dict(epoch=epoch, valid_loss=loss)
            if config.stage == "sft":
                run.save_model(model, f"epoch{epoch}.pt")
            samples = sample_text(model, data.valid, epoch, config, tokenizer, runtime)
            run.samples("\n".join([f"epoch {epoch}, validation loss {loss:.4f}", *samples]))
            run.print(f"epoch {epoch}: validation loss {loss:.4f} per token")
        run.log(step, **numbers)
        run.checkpoint(step + 1)
    run.save_model(model)
    run.finish()


if __name__ == "__main__":
    launch(main, Config)
