"""Section 4 of the paper: which models are preferred, the metadata, the reward model, the alignment tax.

    python evaluate.py                              # writes out/report.md, out/report.json, out/figures/
    torchrun --nproc_per_node=8 evaluate.py
    python evaluate.py --data data/oasst --out out/oasst --judge out/oasst/judge/model.pt --base gpt2

All models (paper/models.py) respond to the same test prompts, of customers whose prompts were in no training data.
Judges (data/judges.py) compare each response with the baseline's: another sample of the SFT model. In the built-in
world the judges are simulated labelers: those who wrote training data, and held-out ones. On real data a reward model
that trained no policy judges (--judge), and pairs.csv is written for people.

Every interval is a 95% interval, mean +- 1.96 standard errors. Responses to one customer, and tasks on one context,
are not independent: standard errors are over customers, contexts and documents. paper/tables.py makes tables and
figures of the results.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common import download
from common.checkpoints import is_checkpoint, load_model
from common.config import check, launch
from common.files import write_atomically
from common.runtime import Runtime, RuntimeConfig
from common.seeds import generator
from data import pairs, readers
from data.judges import TEAMS, People, RewardModelJudge, check_heads, score_responses
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel, generate
from paper import tables, tasks
from paper.models import BASELINE, MODELS
from paper.stats import mean_and_error, pair_accuracy, ratio


@dataclass(frozen=True)
class Config:
    data: str = "data/tinyworld"  # the dataset's folder
    out: str = "out"  # the folder of the stages' runs; the report is written there
    prompts: int = 2000  # test prompts
    judges: int = 3  # labelers of each team who compare two responses to a prompt (built-in world)
    judge: str = ""  # a reward model that trained no policy, as judge instead of labelers
    base: str = ""  # GPT-2's weights for the model GPT, by name or path, instead of out/base/model.pt
    pairs: int = 100  # pairs per model that are written out for people to judge (real data)
    max_new_tokens: int = 48  # the longest response
    batch_size: int = 128  # responses sampled at a time
    seed: int = 0  # of the samples, the choice of labelers, the order of presentation
    shard: bool = False  # shard each model over the processes (torchrun); for sampling every process has a whole copy
    device: str = "auto"  # cpu, cuda, mps (Apple's GPU), or auto: cuda or mps if available

    def __post_init__(self):
        check(min(self.prompts, self.judges, self.max_new_tokens, self.batch_size) >= 1 and self.pairs >= 0,
              "every size is at least 1, --pairs at least 0")


def main(config):
    runtime = Runtime(RuntimeConfig(device=config.device, shard=config.shard), config)
    tokenizer = Tokenizer.load(config.data)
    world = built_in_world(config)
    records, validation_records = load_prompts(config, world)
    models = load_models(config, tokenizer, runtime, world)
    reward_models = load_reward_models(config, tokenizer, runtime)
    check_inputs(config, models, runtime, world)
    fingerprints = {} if world else {name: pairs.fingerprint(models[name]) for name in models}
    answers = {} if world else pairs.read(f"{config.out}/pairs.csv", BASELINE, fingerprints)

    responses = sample_responses(models | {BASELINE: models["SFT"]}, records, "test", config, tokenizer, runtime, world)
    scores = score_all(reward_models, records, responses, tokenizer, runtime)
    judges = make_judges(config, world, records, responses, scores, answers)
    results = {
        "prompts": len(records),
        "customers": len({record["user"] for record in records}),
        "world": world is not None,
        "preference": preferences(judges, models, records, responses),
        "reward model": reward_model_accuracy(reward_models, config, tokenizer, runtime, world),
        "scores": mean_scores(scores, world, models, records, responses),
        "zero-shot": tasks.alignment_tax(models, config, tokenizer, runtime),
        "sft epochs": sft_epochs(reward_models["reward model"], validation_records, config, tokenizer, runtime),
        "safety": tasks.SAFETY,
        "runs": {entry.name: entry.run for entry in MODELS if entry.ppo_log and entry.name in models},
        "samples": samples(records, responses, models, config),
        "config": asdict(config),
    }
    if world:
        results["metadata"] = world.metadata_rates(models, records, responses)
    if runtime.is_main:
        if not world and not answers:
            pairs.write_new(f"{config.out}/pairs.csv", config.pairs, records, responses, "SFT", BASELINE, config.seed,
                            fingerprints)
        text = json.dumps(results, indent=1)
        write_atomically(Path(config.out) / "report.json", lambda path: path.write_text(text))
        tables.main(tables.Config(out=config.out))


# ---------------------------------------------------------------- prompts and models

def built_in_world(config):
    """What only the built-in world can measure, as a module; None for real data, or if a reward model is the judge."""
    if config.judge or "asks" not in readers.read_jsonl(f"{config.data}/prompts.test.jsonl", "prompts")[0]:
        return None
    from data.tinyworld import evaluation
    return evaluation


def load_prompts(config, world):
    """Records of test prompts and of validation prompts."""
    kind = "requests" if world else "prompts"
    test, validation = (readers.read_jsonl(f"{config.data}/prompts.{split}.jsonl", kind) for split in ("test", "valid"))
    return test[: config.prompts], validation[:300]


def load_models(config, tokenizer, runtime, world):
    """{name: model} of MODELS. In the built-in world all must exist; on real data those not trained are left out."""
    models, loaded = {}, {}
    for entry in MODELS:
        if entry.few_shot and not world:  # the examples are the built-in world's
            continue
        if entry.run not in loaded:
            loaded[entry.run] = load_policy(entry, config, tokenizer, runtime, world)
        if loaded[entry.run] is not None:
            models[entry.name] = loaded[entry.run]
    return models


def load_policy(entry, config, tokenizer, runtime, world):
    path = f"{config.out}/{entry.run}/model.pt"
    if entry.name == "GPT" and config.base:
        path = runtime.once_per_machine(lambda: download.weights(config.base, tokenizer))
    if not world and entry.name != "SFT" and not Path(path).exists():
        if runtime.is_main:
            print(f"{path} is not there: {entry.name} is left out")
        return None
    return load_model(GPT, path, tables.made_by(entry.run), tokenizer, runtime).eval()


def load_reward_models(config, tokenizer, runtime):
    """{"reward model": the one that trained the policies}, and "judge", if any: another one."""
    def load(path, made_by):
        return load_model(ScalarModel, path, made_by, tokenizer, runtime).eval()

    path = f"{config.out}/reward/model.pt"
    reward_models = {"reward model": load(path, "make reward")}
    if config.judge:
        reward_models["judge"] = load(config.judge, "reward.py")
        policies = [f"{config.out}/{entry.run}/model.pt" for entry in MODELS if entry.ppo_log]
        check_heads(config.judge, path, [policy for policy in policies if is_checkpoint(policy)], runtime)
    return reward_models


def check_inputs(config, models, runtime, world):
    """UserError if something is missing that is read only after minutes of sampling, or differs between the machines."""
    if runtime.world_size > 1:
        runs = [f"{config.out}/{entry.run}/{name}" for entry in MODELS for name in ("model.pt", "log.jsonl")]
        runtime.check_same_files([*Path(config.data).glob("*.jsonl"), f"{config.data}/pretrain.valid.bin", config.judge,
                                  *Path(config.out).glob("sft/epoch*.pt"), f"{config.out}/reward/model.pt", *runs])
    if world:
        world.check_judges(config.judges)
        readers.read_jsonl(f"{config.data}/comparisons.valid.jsonl", "judged")
        readers.read_jsonl(f"{config.data}/tasks.test.jsonl", "tasks")
    for entry in MODELS:
        if entry.run != "base" and entry.name in models:
            tables.read_log(config.out, entry.run)


# ---------------------------------------------------------------- responses, scores and judges

def sample_responses(models, records, split, config, tokenizer, runtime, world=None):
    """{name: one response at temperature 1 to each record's prompt} for {name: model}; ranks share the batches."""
    few_shot = {entry.name for entry in MODELS if entry.few_shot}
    prompts = {}
    for name, model in models.items():
        texts = [world.with_prefix(r["prompt"]) if name in few_shot else r["prompt"] for r in records]
        prompts[name] = readers.encode_prompts(
            [{"prompt": text} for text in texts], tokenizer, model.config.context - config.max_new_tokens - 1,
            f"{config.data}/prompts.{split}.jsonl")
    batches = -(-len(records) // config.batch_size)
    rounds = -(-batches // runtime.world_size)  # each rank samples one batch per round
    bar = tqdm(total=len(models) * rounds, desc="sampling", disable=not runtime.is_main)

    def sample(name, model, i):
        batch = prompts[name][i * config.batch_size : (i + 1) * config.batch_size]
        uniforms = torch.rand(len(batch), config.max_new_tokens,
                              generator=generator(config.seed, f"respond {name}", i))
        texts = [tokenizer.decode(ids) for ids in generate(model, batch, config.max_new_tokens, uniforms)]
        bar.update()
        return [world.reply_in(text) for text in texts] if name in few_shot else texts

    responses = {}
    for name in models:
        with runtime.sampling(models[name]) as model:
            responses[name] = sum(runtime.distribute(batches, lambda i: sample(name, model, i)), [])
    bar.close()
    return responses


def score_all(reward_models, records, responses, tokenizer, runtime):
    """{reward model: {model: the score of each of its responses}}; ranks share the models."""
    names, scores = list(responses), {}
    for judge, reward_model in reward_models.items():
        def score(i):
            with runtime.autocast():
                return score_responses(reward_model, records, responses[names[i]], tokenizer, runtime.device)

        scores[judge] = dict(zip(names, runtime.distribute(len(names), score)))
    return scores


def make_judges(config, world, records, responses, scores, answers):
    """Those who compare responses: each has a name and compare(prompt, a, b), see data/judges.py."""
    judges = world.judges(records, config.judges, config.seed) if world else []
    if config.judge:
        judges.append(RewardModelJudge(records, responses, scores["judge"]))
    judges.append(People(answers))
    return judges


# ---------------------------------------------------------------- the report's numbers: (mean, error, n)

def preferences(judges, names, records, responses):
    """{model: {judge: win rate over the baseline}}, without the judges who compared nothing."""
    table = {name: {} for name in names}
    for name in names:
        for judge in judges:
            comparisons = judge.comparisons(name, records, responses, BASELINE)
            wins = [judge.compare(prompt, a, b) for prompt, _, a, b in comparisons]
            if wins:
                table[name][judge.name] = mean_and_error(wins, [user for _, user, _, _ in comparisons])
    return table


def mean_scores(scores, world, names, records, responses):
    """{whose scores: {model: their mean}}; in the built-in world also what the average labeler would say."""
    users = [record["user"] for record in records]
    table = {f"{judge}'s score": {name: mean_and_error(by_model[name], users) for name in names}
             for judge, by_model in scores.items()}
    if world:
        table["true average preference"] = {
            name: mean_and_error(list(map(world.true_preference, records, responses[name])), users) for name in names}
    return table


def reward_model_accuracy(reward_models, config, tokenizer, runtime, world):
    """{team: {judge: share of response pairs ordered as the labeler did}} on prompts of unseen customers (3.3), for
    labelers whose rankings were trained on and for others; in the built-in world also of another labeler."""
    path = f"{config.data}/comparisons.valid.jsonl"
    if not world and not Path(path).is_file():
        return {}
    records = readers.read_jsonl(path, "judged" if world else "comparisons", "make comparisons")
    opinions = {}  # {judge: one number per response of each comparison}
    flat = [(record, text) for record in records for text in record["responses"]]
    for judge, model in reward_models.items():
        with runtime.autocast():
            scores = iter(score_responses(model, *zip(*flat), tokenizer, runtime.device))
        opinions[judge] = [[next(scores) for _ in record["responses"]] for record in records]
    if world:
        opinions |= world.labeler_opinions(records, path, config.seed)
        trained_on = world.training_labelers()
    else:
        training = readers.read_jsonl(f"{config.data}/comparisons.train.jsonl", "comparisons")
        trained_on = {record["labeler"] for record in training}
    table = {}
    for team, is_trained_on in zip(TEAMS, (True, False)):
        chosen = [i for i, record in enumerate(records) if (record["labeler"] in trained_on) == is_trained_on]
        users = [records[i].get("user", records[i]["prompt"]) for i in chosen]  # without a user: each prompt is a group
        if world or chosen:
            table[team] = {judge: ratio([pair_accuracy(numbers[i], records[i]["ranks"]) for i in chosen], users)
                           for judge, numbers in opinions.items()}
    return table


def sft_epochs(reward_model, records, config, tokenizer, runtime):
    """For each epoch: validation loss, and the reward model's score, by which the paper chooses one (section 3.4)."""
    rows, users = [], [record["user"] for record in records]
    for line in tables.read_log(config.out, "sft"):
        if "epoch" in line:
            path, name = f"{config.out}/sft/epoch{line['epoch']}.pt", f"SFT epoch {line['epoch']}"
            model = load_model(GPT, path, "make sft", tokenizer, runtime).eval()
            texts = sample_responses({name: model}, records, "valid", config, tokenizer, runtime)[name]
            with runtime.autocast():
                scores = score_responses(reward_model, records, texts, tokenizer, runtime.device)
            rows.append((line["epoch"], line["valid_loss"], *mean_and_error(scores, users)[:2]))
    return rows


def samples(records, responses, names, config):
    """For one prompt of each use case: (use case, prompt, {model: response})."""
    result, rng = [], random.Random(config.seed)
    for use_case in dict.fromkeys(record.get("use_case", "") for record in records):
        i = rng.choice([i for i, record in enumerate(records) if record.get("use_case", "") == use_case])
        result.append((use_case, records[i]["prompt"], {name: responses[name][i] for name in names}))
    return result


if __name__ == "__main__":
    launch(main, Config)
