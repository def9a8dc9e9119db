"""The whole pipeline on people's data, and the evaluation without simulated labelers."""

import csv
import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import common.files
import evaluate
import ppo
import reward
import sft
from common.config import UserError
from common.checkpoints import load_checkpoint, load_model
from conftest import ROOT, cpu, read_log
from data import export, judges, pairs
from data.judges import People, RewardModelJudge
from data.oasst import prepare
from data.tokenizer import Tokenizer
from model import GPT
from paper import tables
from paper.models import BASELINE
from paper.stats import mean_and_error, ratio

REAL = ROOT.parent / "shared/real"


def small_trees():
    """Forty trees about fruit, of one or two questions, with three ranked replies each."""
    rng, trees = random.Random(0), []

    def message(text, role, replies=(), **more):
        return {"text": text, "role": role, "lang": "en", "replies": list(replies), **more}

    def question(depth):
        fruit = [rng.choice(["apples", "pears", "plums", "figs"]) for _ in range(3)]
        texts = [f"Eat {fruit[0]} and {fruit[1]}.", f"I like {fruit[2]}.", "No."]
        order = rng.sample(range(3), 3)
        follow = [question(depth - 1)] if depth else []
        replies = [message(texts[rank], "assistant", follow if i == 0 else (), rank=rank)
                   for i, rank in enumerate(order)]
        return message(f"What {fruit[0]} or {fruit[1]} go with {fruit[2]} on day {rng.randrange(10**6)}?",
                       "prompter", replies)

    for i in range(40):
        trees.append({"message_tree_id": f"tree-{i}", "prompt": question(i % 2)})
    return trees


def run_everything(folder, **preparing):
    """prepare, base, sft, reward, judge, PPO-ptx through their real main(config)."""
    data, out = str(folder / "data"), str(folder / "out")
    cpu = dict(data=data, device="cpu")
    prepare.main(prepare.Config(out=data, own_text=True, valid=0.1, test=0.1, **preparing))
    sft.main(sft.Config(**cpu, out=f"{out}/base", init="scratch", size="nano", context=preparing["context"],
                        pretrain_mix=1.0,
                        epochs=1, batch_size=8, lr=3e-3))
    sft.main(sft.Config(**cpu, out=f"{out}/sft", init=f"{out}/base/model.pt", epochs=1, batch_size=8,
                        pretrain_mix=0.125))
    reward.main(reward.Config(**cpu, out=f"{out}/reward", init=f"{out}/sft/model.pt"))
    reward.main(reward.Config(data=f"{data}/judge", device="cpu", out=f"{out}/judge", init=f"{out}/sft/model.pt",
                              batch_size=4))
    ppo.main(ppo.Config(**cpu, out=f"{out}/ppo", policy=f"{out}/sft/model.pt",
                        reward=f"{out}/reward/model.pt", iterations=2,
                        batch_size=8, minibatch_size=4, max_new_tokens=16))
    config = evaluate.Config(**cpu, out=out, judge=f"{out}/judge/model.pt", max_new_tokens=16, pairs=4)
    evaluate.main(config)
    export.export(f"{out}/ppo", folder / "exported")
    return SimpleNamespace(data=folder / "data", out=folder / "out", config=config, exported=folder / "exported")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    (folder / "trees.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in small_trees()))
    return run_everything(folder, source=str(folder / "trees.jsonl"), vocab_size=300, context=256)


@pytest.fixture
def again(small, tmp_path):
    """A copy of the finished run, to evaluate once more."""
    shutil.copytree(small.out, tmp_path / "out")
    return dataclasses.replace(small.config, out=str(tmp_path / "out"))


def results_of(config):
    return json.loads((Path(config.out) / "report.json").read_text())


def fill_in(path, choose):
    """Write into the last column what choose(row) says."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    with open(path, "w", encoding="utf-8-sig", newline="") as file:  # with the mark that spreadsheets put first
        csv.writer(file).writerows([header, *([*row[:4], choose(row)] for row in rows)])
    return rows


# ---------------------------------------------------------------- all stages

def check_pipeline(run):
    for name in ("base", "sft", "reward", "judge", "ppo"):
        assert (run.out / name / "model.pt").is_file() and not list((run.out / name).glob("*.tmp"))
        for line in read_log(run.out / name):
            assert all(number is None or abs(number) < float("inf") for number in line.values())
    text = (run.out / "report.md").read_text()
    assert "| PPO-ptx |" in text and "## Reward model" in text and "next word" in text
    assert "nan" not in text.lower().split()
    assert {p.name for p in (run.out / "figures").iterdir()} == {"preference.png", "tax.png", "training.png"}
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(run.exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.exported)
    assert model.config.vocab_size == len(tokenizer) == results_vocabulary(run)
    assert tokenizer.decode(tokenizer.encode("Human: Hi\n\nAssistant:")) == "Human: Hi\n\nAssistant:"


def results_vocabulary(run):
    return load_checkpoint(run.out / "sft/model.pt", "", cpu())["model_config"]["vocab_size"]


def test_every_stage_runs_on_message_trees_from_prepare_to_export(small):
    check_pipeline(small)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
def test_every_stage_runs_on_a_hundred_real_trees_with_gpt2s_vocabulary(tmp_path):
    (tmp_path / "bpe").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(REAL / f"gpt2.{name}", tmp_path / "bpe" / name)
    check_pipeline(run_everything(tmp_path, source=str(REAL / "oasst.en_100_trees.jsonl"),
                                  bpe=str(tmp_path / "bpe"), context=256))


# ---------------------------------------------------------------- a reward model as judge

def judged_by_scores(scores, users):
    """{model: win rate} by a reward model with these scores; each response is another text."""
    records = [{"prompt": f"prompt {i}", "user": user} for i, user in enumerate(users)]
    responses = {name: [f"{name} {i}" for i in range(len(users))] for name in scores}
    judge = RewardModelJudge(records, responses, scores)
    rates = evaluate.preferences([judge], [name for name in scores if name != BASELINE], records, responses)
    return {name: by_judge["judge"] for name, by_judge in rates.items()}


def test_a_judge_that_gives_all_the_same_score_sees_a_tie_everywhere():
    preference = judged_by_scores({"GPT": [1.0, 1.0], "SFT": [1.0, 1.0], BASELINE: [1.0, 1.0]}, ["u", "v"])
    assert preference == {"GPT": (0.5, 0.0, 2), "SFT": (0.5, 0.0, 2)}


def test_the_higher_score_wins_prompt_by_prompt():
    scores = {"PPO": [2.0, 0.0, 5.0, 1.0], BASELINE: [1.0, 3.0, 5.0, 0.0]}
    apart, together = (judged_by_scores(scores, users)["PPO"] for users in ("abcd", "aabb"))
    assert apart[0] == together[0] == (1 + 0 + 0.5 + 1) / 4 and apart[2] == 4
    assert apart[1] == pytest.approx(mean_and_error([1, 0, 0.5, 1])[1])
    assert together == ratio([(2, 1.0), (2, 1.5)])  # two conversations, not four


def test_equal_responses_are_a_tie_for_a_reward_model():
    records, responses = [{"prompt": "p", "user": "u"}], {"PPO": ["same"], BASELINE: ["same"]}
    # rounding of different batches
    judge = RewardModelJudge(records, responses, {"PPO": [1.0], BASELINE: [1.0 + 1e-7]})
    assert judge.compare("p", "same", "same") == 0.5


def test_it_is_the_judge_that_is_asked(again, monkeypatch):
    asked = []

    class Recorded(RewardModelJudge):
        def __init__(self, records, responses, scores):
            asked.append(scores)
            super().__init__(records, responses, scores)

    monkeypatch.setattr(evaluate, "RewardModelJudge", Recorded)
    evaluate.main(again)
    means = {name: sum(numbers) / len(numbers) for name, numbers in asked[0].items() if name != BASELINE}
    reported = results_of(again)["scores"]["judge's score"]
    assert means == {name: numbers[0] for name, numbers in reported.items()}


def test_an_evaluation_on_real_data_imports_nothing_of_the_built_in_world(again):
    """In a new process, in which no test has imported it."""
    code = ("import sys, evaluate; evaluate.main(evaluate.Config(*map(eval, sys.argv[1:]))); "
            "sys.exit(any(name.startswith('data.tinyworld') for name in sys.modules))")
    values = [repr(getattr(again, field.name)) for field in dataclasses.fields(again)]
    done = subprocess.run([sys.executable, "-c", code, *values], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_judge_is_another_model_than_the_one_that_trained_the_policy(small):
    results = results_of(small.config)
    assert set(results["scores"]) == {"reward model's score", "judge's score"}
    assert results["scores"]["judge's score"] != results["scores"]["reward model's score"]
    assert set(results["preference"]["PPO-ptx"]) == {"judge"} and not results["world"]
    judged, trained = ([json.loads(line)["prompt"] for line in (path / "comparisons.train.jsonl").open()]
                       for path in (small.data / "judge", small.data))
    assert judged and trained and not set(judged) & set(trained)


def test_reward_models_are_measured_against_people_on_unseen_prompts(small):
    shares = results_of(small.config)["reward model"]["training labelers"]
    assert set(shares) == {"reward model", "judge"}
    pairs = sum(len({*r["ranks"]}) * (len({*r["ranks"]}) - 1) // 2
                for r in map(json.loads, (small.data / "comparisons.valid.jsonl").open()))
    assert shares["reward model"][2] == shares["judge"][2] == pairs > 0


def test_a_model_that_was_not_trained_is_left_out_but_not_the_sft_model(again, capsys):
    out = Path(again.out)
    assert "PPO" not in results_of(again)["preference"]  # ppo_noptx was never trained
    shutil.rmtree(out / "base")
    evaluate.main(again)
    assert "base/model.pt is not there: GPT is left out" in capsys.readouterr().out
    assert set(results_of(again)["preference"]) == {"SFT", "PPO-ptx"}
    shutil.rmtree(out / "sft")
    with pytest.raises(UserError, match="sft/model.pt is missing"):
        evaluate.main(again)


def test_gpt2s_weights_can_stand_for_the_model_gpt(again, small, tmp_path):
    GPT.save_gpt2(load_model(GPT, small.out / "base/model.pt", "", Tokenizer.load(small.data), cpu()), tmp_path / "gpt2")
    before = results_of(again)
    shutil.rmtree(Path(again.out) / "base")
    evaluate.main(dataclasses.replace(again, base=str(tmp_path / "gpt2")))
    assert results_of(again)["preference"] == before["preference"]


# ---------------------------------------------------------------- people

def test_pairs_for_people_do_not_tell_which_model_wrote_what(small):
    with open(small.out / "pairs.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == list(pairs.COLUMNS) and len(rows) == 8 and all(row[4] == "" for row in rows)  # GPT and PPO-ptx
    assert not any(name in cell for row in rows for cell in row for name in ("PPO", "SFT", "GPT"))
    assert [row[0] for row in rows] == [str(i) for i in range(1, 9)]


def test_either_model_comes_first_about_as_often():
    records = [{"prompt": f"prompt {i}", "user": "u"} for i in range(400)]
    responses = {name: [f"{name} {i}" for i in range(400)] for name in ("SFT", "PPO", BASELINE)}
    rows, key = pairs.draw(records, responses, "SFT", BASELINE, 400, 0)
    assert len(rows) == 400 and 160 < sum(key[row[0]][0] == "PPO" for row in rows) < 240
    for number, prompt, first, second, _ in rows:
        assert first.startswith(key[number][0]) and second.startswith(key[number][1])
        assert first.split()[-1] == second.split()[-1] == prompt.split()[-1]


def test_what_people_wrote_is_counted_and_never_overwritten(again):
    path = Path(again.out) / "pairs.csv"
    fill_in(path, lambda row: {"1": "first", "2": " Second ", "3": "tie"}.get(row[0], ""))
    filled = path.read_bytes()
    evaluate.main(again)
    assert path.read_bytes() == filled
    preference = results_of(again)["preference"]
    assert sum(by["people"][2] for by in preference.values() if "people" in by) == 3
    evaluate.main(again)
    assert results_of(again)["preference"] == preference


def test_the_model_that_people_always_prefer_wins_every_time(tmp_path):
    records = [{"prompt": f"prompt {i}", "user": f"user {i // 2}"} for i in range(40)]
    responses = {name: [f"{name} {i}" for i in range(40)] for name in ("SFT", "PPO", "PPO-ptx", BASELINE)}
    rows, key = pairs.draw(records, responses, "SFT", BASELINE, 40, 0)
    pairs.write(tmp_path / "pairs.csv", rows, key, {})
    for liked, expected in (("PPO", 1), (BASELINE, 0)):
        fill_in(tmp_path / "pairs.csv", lambda row: "" if "PPO-ptx" in key[row[0]] else (
            "first" if key[row[0]][0] == liked else "second"))
        assert pairs.read(tmp_path / "pairs.csv", BASELINE, {}).keys() == {"PPO"}
        answers = pairs.read(tmp_path / "pairs.csv", BASELINE, {})["PPO"]
        assert sorted(answers, key=lambda answer: int(answer.prompt.split()[1])) == [
            pairs.Answer(f"prompt {i}", f"user {i // 2}", f"PPO {i}", f"{BASELINE} {i}", expected) for i in range(40)]


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\rx", "\nx", " =1+1", " - a list\n - of two",
            "\u00a0\t@x", "\uff1d1"]
TEXTS = ["", "1 = 1", " a list - of one", "a\t=1", "'=1", '"=1"', "a,=1", "(=1)", "a\n=1", "\u2013 1"]


def test_no_text_is_a_formula_to_a_spreadsheet_and_answers_are_read_all_the_same(tmp_path):
    path, texts = tmp_path / "pairs.csv", FORMULAS + TEXTS
    records = [{"prompt": text, "user": "u"} for text in texts]
    responses = {"PPO": texts, "SFT": [], BASELINE: texts[::-1]}
    rows, sides = pairs.draw(records, responses, "SFT", BASELINE, len(texts), 0)
    pairs.write(path, rows, sides, {})
    wrote = fill_in(path, lambda row: "first")
    assert len(wrote) == len(rows)
    for row, before in zip(wrote, rows):
        assert row == [("'" if text in FORMULAS else "") + text for text in before]
    answers = pairs.read(path, BASELINE, {})["PPO"]
    assert sum(answer.win for answer in answers) == sum(side[0] == "PPO" for side in sides.values())
    # The key has the texts as they were: nothing of what a spreadsheet may change.
    assert sorted((a.prompt, a.response, a.baseline) for a in answers) == sorted(zip(texts, texts, texts[::-1]))


@pytest.fixture
def one_pair(tmp_path):
    records = [{"prompt": "prompt", "user": "u"}]
    responses = {"PPO": ["ours"], "SFT": ["theirs"], BASELINE: ["theirs"]}
    path = tmp_path / "pairs.csv"
    rows, sides = pairs.draw(records, responses, "SFT", BASELINE, 1, 0)
    pairs.write(path, rows, sides, {"PPO": "1"})
    return SimpleNamespace(path=path, won=1.0 if sides["1"][0] == "PPO" else 0.0,
                           read=lambda models={"PPO": "1"}: pairs.read(path, BASELINE, models),
                           answer=lambda win, user="u": pairs.Answer("prompt", user, "ours", "theirs", win))


def test_an_unknown_word_or_pair_is_refused_by_its_name(one_pair):
    fill_in(one_pair.path, lambda row: "the first one")
    with pytest.raises(UserError, match="pairs.csv: pair 1: 'the first one' is none of first, second, tie"):
        one_pair.read()
    one_pair.path.write_text("pair,preferred\n2,first\n")
    with pytest.raises(UserError, match="'2' is no pair of this table"):
        one_pair.read()


def test_judgements_of_other_models_are_refused_and_kept(one_pair):
    fill_in(one_pair.path, lambda row: "first")
    before = one_pair.path.read_bytes()
    with pytest.raises(UserError, match="pairs.csv: people have judged other models than these"):
        one_pair.read({"PPO": "2"})
    assert one_pair.path.read_bytes() == before


def test_what_a_spreadsheet_does_to_texts_and_columns_does_not_matter(one_pair):
    one_pair.path.write_text("\ufeffPreferred,note,Pair\r\nFirst , \u2019changed\u2019,1\r\n,,\r\n", encoding="utf-8")
    assert one_pair.read() == {"PPO": [one_pair.answer(one_pair.won)]}


def test_several_people_on_one_pair_count_as_one_with_their_mean(one_pair):
    one_pair.path.write_text("pair,preferred\n1,first\n1,second\npair,Preferred\n1,first\n1,first\n")
    assert one_pair.read() == {"PPO": [one_pair.answer(0.75 if one_pair.won else 0.25)]}


@pytest.mark.parametrize("kept, user", [(2, "1"), (3, "u")])
def test_a_key_of_an_earlier_version_has_no_texts_and_perhaps_no_users(one_pair, kept, user):
    """Without users each pair is a group of its own."""
    one_pair.path.write_text("pair,preferred\n1,first\n")
    key = json.loads(pairs.key_of(one_pair.path).read_text())
    key["sides"] = {pair: side[:kept] for pair, side in key["sides"].items()}
    pairs.key_of(one_pair.path).write_text(json.dumps(key))
    answers = one_pair.read()
    assert [(answer.win, answer.user) for answer in answers["PPO"]] == [(one_pair.won, user)]
    rates = evaluate.preferences([People(answers)], ["PPO"], [], {})
    assert rates == {"PPO": {"people": (one_pair.won, 0.0, 1)}}


def test_people_are_asked_about_the_pairs_that_were_written_for_them_and_no_others():
    first, second = (pairs.Answer(f"prompt {i}", f"user {i}", "ours", "theirs", win)
                     for i, win in enumerate((1.0, 0.5)))
    people = People({"PPO": [first, second]})
    assert people.compare("prompt 0", "ours", "theirs") == 1 and people.compare("prompt 1", "ours", "theirs") == 0.5
    records = [{"prompt": f"prompt {i}", "user": f"user {i}"} for i in range(9)]
    # sampled anew, by the same models
    responses = {name: ["something else"] * 9 for name in ("PPO", "PPO-ptx", BASELINE)}
    rates = evaluate.preferences([people], ["PPO", "PPO-ptx"], records, responses)
    assert rates == {"PPO": {"people": mean_and_error([1, 0.5])}, "PPO-ptx": {}}


@pytest.mark.parametrize("text", ["", "pair;preferred\n1;first\n", "1,first\n"])
def test_a_table_without_its_columns_is_refused(one_pair, text):
    one_pair.path.write_text(text)
    with pytest.raises(UserError, match="its first line has no columns `pair` and `preferred`"):
        one_pair.read()


def test_judged_pairs_without_a_key_are_refused_and_kept(one_pair):
    fill_in(one_pair.path, lambda row: "first")
    before = one_pair.path.read_bytes()
    pairs.key_of(one_pair.path).unlink()
    with pytest.raises(UserError, match="pairs.key.json is missing"):
        one_pair.read()
    assert one_pair.path.read_bytes() == before


def test_a_table_is_not_read_with_the_key_of_another(one_pair):
    fill_in(one_pair.path, lambda row: "first")
    key = json.loads(pairs.key_of(one_pair.path).read_text())
    key["sides"]["1"][3:] = ["another prompt", "another response", key["sides"]["1"][5]]
    pairs.key_of(one_pair.path).write_text(json.dumps(key))
    with pytest.raises(UserError, match="pair 1 has other texts than in pairs.key.json"):
        one_pair.read()


@pytest.mark.parametrize("sides", [5, [1], {"1": 5}, {"1": ["PPO"]}, {"1": ["PPO", 3]}], ids=str)
def test_a_damaged_key_is_refused_in_one_line(one_pair, sides):
    fill_in(one_pair.path, lambda row: "first")
    pairs.key_of(one_pair.path).write_text(json.dumps({"models": {}, "sides": sides}))
    with pytest.raises(UserError, match="pairs.key.json is missing or damaged"):
        one_pair.read()


def test_a_table_in_another_encoding_or_without_its_key_is_refused(one_pair):
    one_pair.path.write_bytes("pair,preferred\n1,pr\u00e9f\u00e9r\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="not a table in UTF-8"):
        one_pair.read()
    one_pair.path.write_text("pair,preferred\n1,first\n")
    pairs.key_of(one_pair.path).write_text("{}")
    with pytest.raises(UserError, match="pairs.key.json is missing or damaged"):
        one_pair.read()


def test_the_reward_model_that_trained_the_policy_can_not_judge_it(again, small):
    with pytest.raises(UserError, match="is the reward model that trained the policies"):
        evaluate.main(dataclasses.replace(again, judge=str(small.out / "reward/model.pt")))


def test_a_reward_model_that_started_from_the_same_random_head_can_not_judge(again, small, tmp_path):  # pitfall 41
    same = reward.Config(data=str(small.data), device="cpu", init=f"{small.out}/sft/model.pt",
                         out=str(tmp_path / "same"), lr=3e-4)
    reward.main(same)  # another learning rate, the same comparisons and seed
    with pytest.raises(UserError, match="started from the same random head"):
        evaluate.main(dataclasses.replace(again, judge=str(tmp_path / "same/model.pt")))
    checkpoint = common.files.load(tmp_path / "same/model.pt")
    del checkpoint["head_seed"]
    common.files.save(tmp_path / "same/model.pt", checkpoint)
    with pytest.raises(UserError, match="does not say which random head it started from"):
        evaluate.main(dataclasses.replace(again, judge=str(tmp_path / "same/model.pt")))
    reward.main(dataclasses.replace(same, seed=1))  # another head
    evaluate.main(dataclasses.replace(again, judge=str(tmp_path / "same/model.pt")))


def test_a_judge_needs_the_reward_model_that_trained_the_policies(tmp_path):  # pitfall 41
    checkpoint = {"model": {}, "model_config": {}}
    for number, name in enumerate(("judge", "reward", "other")):
        common.files.save(tmp_path / f"{name}.pt", checkpoint | {"head_seed": number})
    for name, trained_by in (("policy", "reward"), ("stray", "other")):
        inputs = {"out/reward/model.pt": common.files.digest(tmp_path / f"{trained_by}.pt")}
        common.files.save(tmp_path / f"{name}.pt", checkpoint | {"inputs": inputs})
    check = [tmp_path / "judge.pt", tmp_path / "reward.pt"]
    judges.check_heads(*check, [tmp_path / "policy.pt"], cpu())
    with pytest.raises(UserError, match="stray.pt was not trained with .*reward.pt"):
        judges.check_heads(*check, [tmp_path / "policy.pt", tmp_path / "stray.pt"], cpu())


def test_the_interval_of_peoples_pairs_is_over_the_users_of_their_prompts(again, small):  # pitfall 45
    path = Path(again.out) / "pairs.csv"
    rows = fill_in(path, lambda row: "first" if int(row[0]) % 3 else "second")
    user_of = {r["prompt"]: r["user"] for r in map(json.loads, (small.data / "prompts.test.jsonl").open())}
    sides = json.loads(pairs.key_of(path).read_text())["sides"]
    evaluate.main(again)
    for name in ("GPT", "PPO-ptx"):
        mine = [row for row in rows if name in sides[row[0]]]
        wins = [float((sides[row[0]][0] == name) == (int(row[0]) % 3 > 0)) for row in mine]
        expected = mean_and_error(wins, [user_of[row[1]] for row in mine])
        assert results_of(again)["preference"][name]["people"] == pytest.approx(expected)


def test_the_report_is_made_anew_from_its_json_alone(again):
    out = Path(again.out)
    text = (out / "report.md").read_text()
    (out / "report.md").unlink()
    shutil.rmtree(out / "figures")
    shutil.rmtree(out / "sft")
    tables.main(tables.Config(out=again.out))
    assert (out / "report.md").read_text() == text and len(list((out / "figures").iterdir())) == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", "not JSON"])
def test_a_report_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match="report.json is no report"):
        tables.main(tables.Config(out=str(tmp_path)))
