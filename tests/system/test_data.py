"""Text to tensors: the tokenizer, files, padding, pretraining rows, cleaning, collecting comparisons."""

import ast
import dataclasses
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.config import UserError
from conftest import ROOT, cpu, random_gpt, write_lines
from data import cleaning, collect, readers
from data.tinyworld import labelers
from data.tokenizer import END, Tokenizer, merge, train_bpe
from model import generate

TEXTS = ["low lower lowest, low low", "new newer newest: new 123 times", "the lowest of the newest\n\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("small", train_bpe(TEXTS, 280))


# ---------------------------------------------------------------- tokenizer

def test_byte_pair_encoding_merges_the_most_frequent_pair_first():
    tokens = train_bpe(["aab aab aab ab"], 259)  # aab 1, " aab" 2, " ab" 1: "ab" stands 4 times, "aa" 3 times
    assert tokens[:256] == [bytes([i]) for i in range(256)] and tokens[256:] == [b"ab", b"aab"]


def test_merging_goes_from_left_to_right():
    assert merge((b"a", b"a", b"a", b"b"), (b"a", b"a")) == (b"aa", b"a", b"b")
    assert merge((b"b", b"c"), (b"a", b"a")) == (b"b", b"c")


def test_encoding_equals_applying_the_merges_in_their_order(tokenizer):
    for word in ("lowest", " newest", " lowwwer", "x"):
        parts = tuple(bytes([b]) for b in word.encode())
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda p: tokenizer.tokens.index(p[0] + p[1])
                       if p[0] + p[1] in tokenizer.tokens else 10**9)
            if best[0] + best[1] not in tokenizer.tokens:
                break
            parts = merge(parts, best)
        assert tokenizer.encode(word) == [tokenizer.tokens.index(part) for part in parts]


ODD = ["", " ", "\n\n\t ", "naïve – 你好 🙂", "\x00\x01\x1b[31m\x7f", "a\r\nb", "1234567", "don't we'll", "_" * 50, " x" * 500,
       END, f"{END}{END} a {END}b", "<|endoftext|", "\u202e\ufeff\u200b"]


@pytest.mark.parametrize("text", ODD)
def test_any_text_comes_back_as_it_was_and_none_of_it_is_special(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids and all(0 <= i < tokenizer.vocab_size - 1 for i in ids)


def test_lone_surrogates_and_half_characters_are_no_reason_to_crash(tokenizer):
    ids = tokenizer.encode("a\ud800b\udfff")
    assert tokenizer.decode(ids).startswith("a") and tokenizer.end_of_text not in ids
    assert "\ufffd" in tokenizer.decode([0xF0, 0x9F])
    assert Tokenizer("t", train_bpe(["a\ud800b"], 257)).vocab_size == 257


def test_the_end_of_text_is_the_last_id_and_is_not_shown(tokenizer):
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.decode([*tokenizer.encode("low"), tokenizer.end_of_text]) == "low"


def test_a_tokenizer_is_the_same_after_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert Tokenizer("small", train_bpe(TEXTS[:1], 280)).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tokens": ["YQ=="]}', '{"name": "x", "tokens": ["not base64!"]}'])
def test_a_damaged_tokenizer_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json: no tokenizer"):
        Tokenizer.load(tmp_path)


# ---------------------------------------------------------------- JSON Lines

GOOD = '{"prompt": "b", "response": "c"}'


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "b", "response": ', "not JSON"),
    ("", "not JSON"),
    ('["b", "c"]', "not a JSON object"),
    ('{"prompt": "b"}', "no 'response', or it is no str"),
    ('{"prompt": 3, "response": "c"}', "no 'prompt', or it is no str"),
    ('{"prompt": "", "response": "c"}', "empty prompt"),
    ('{"prompt": "b", "response": ""}', "empty response"),
    ("[" * 100_000, "not JSON"),
])
def test_a_line_that_is_no_record_is_named_by_file_and_number(tmp_path, line, message):
    (tmp_path / "d.jsonl").write_text("\n".join([GOOD, GOOD, line, GOOD]))
    with pytest.raises(UserError, match=f"d.jsonl:3: {message}"):
        readers.read_jsonl(tmp_path / "d.jsonl", "demonstrations")


def test_bytes_that_are_no_utf8_are_named_too(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "\xff\xfe", "response": "c"}\n')
    with pytest.raises(UserError, match="d.jsonl:2: not JSON"):
        readers.read_jsonl(tmp_path / "d.jsonl", "demonstrations")


def test_an_empty_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(UserError, match="d.jsonl: no records"):
        readers.read_jsonl(tmp_path / "d.jsonl", "demonstrations")
    with pytest.raises(UserError, match="e.jsonl is missing; in the default run `make data` makes it"):
        readers.read_jsonl(tmp_path / "e.jsonl", "demonstrations")


def test_unknown_keys_are_kept_and_any_string_survives_writing_and_reading(tmp_path):
    records = [{"prompt": text, "user": "u", "extra": [1]} for text in [*ODD[1:], "a\ud800b", "line\u2028separator"]]
    readers.write_jsonl(tmp_path / "p.jsonl", records)
    assert readers.read_jsonl(tmp_path / "p.jsonl", "prompts") == records


@pytest.mark.parametrize("change, good", [
    (dict(choices=["a", "b"], answer=1), True), (dict(target="x"), True),
    (dict(choices=["a", "b"], answer=2), False), (dict(choices=["a"], answer=0), False), (dict(choices=["a", "b"]), False),
    (dict(choices=["a", ""], answer=0), False), (dict(target=""), False), (dict(), False),
    (dict(choices=["a", "b"], answer=0, context=""), False),
])
def test_a_task_has_choices_with_an_answer_or_a_target(tmp_path, change, good):
    write_lines(tmp_path / "t.jsonl", [{"task": "t", "context": "c"} | change])
    if good:
        assert readers.read_jsonl(tmp_path / "t.jsonl", "tasks")
    else:
        with pytest.raises(UserError, match="t.jsonl:1"):
            readers.read_jsonl(tmp_path / "t.jsonl", "tasks")


# ---------------------------------------------------------------- episodes and padding

def test_prompt_and_response_are_tokenized_apart_and_ended(tokenizer):
    prompt, response = readers.example("the lo", f"west{END}", tokenizer)
    assert prompt == tokenizer.encode("the lo") and response == tokenizer.encode(f"west{END}") + [tokenizer.end_of_text]
    assert response.count(tokenizer.end_of_text) == 1


def test_a_batch_by_hand():  # pitfall 6: the end of text is a target, the padding of the same value is not
    batch = readers.make_batch([([7, 8], [9, 0]), ([5], [0]), ([4], [1, 2, 3, 0])], end_of_text=0)
    assert batch.tokens.tolist() == [[7, 8, 9, 0, 0], [5, 0, 0, 0, 0], [4, 1, 2, 3, 0]]
    assert batch.mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert (batch.positions * batch.mask).tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert batch.positions.min() >= 0 and batch.positions.max() + 1 < 5  # the next token exists everywhere
    assert readers.pad([[5, 6], [7]], 0).tolist() == [[5, 6], [7, 0]]


# ---------------------------------------------------------------- pretraining text

def text_of(tmp_path, ids, context, vocab_size=280):
    np.array(ids, dtype=np.uint16).tofile(tmp_path / "p.bin")
    stub = type("Stub", (), dict(vocab_size=vocab_size, end_of_text=9))
    return readers.PretrainingText(tmp_path / "p.bin", stub, context)


def test_a_row_is_a_document_with_its_end_and_long_ones_come_in_pieces(tmp_path):
    text = text_of(tmp_path, [1, 2, 9, 3, 9, 1, 2, 3, 4, 5, 6, 7, 9, 9, 4, 5], context=4)
    rows = [a + b for a, b in text.pairs(range(len(text)))]
    assert rows == [[1, 2, 9], [3, 9], [1, 2, 3, 4], [5, 6, 7, 9], [4, 5]]  # the empty document has nothing to predict
    assert text.pairs([0]) == [([1], [2, 9])]


def test_documents_are_written_with_their_ends(tmp_path, tokenizer):
    count = readers.write_tokens(tmp_path / "p.bin", ["low", f"new{END}"], tokenizer)
    ids = np.fromfile(tmp_path / "p.bin", dtype=np.uint16).tolist()
    end = tokenizer.end_of_text
    assert ids == tokenizer.encode("low") + [end] + tokenizer.encode(f"new{END}") + [end] and count == len(ids)


def test_no_row_repeats_within_a_pass_and_rows_of_a_step_have_similar_lengths(tmp_path):
    rng = random.Random(0)
    lengths = [rng.randint(2, 30) for _ in range(32 * 4 * 2)]  # two pools of 32 steps of 4 rows
    text = text_of(tmp_path, [i for n in lengths for i in [1] * (n - 1) + [9]], context=64)
    steps = [text.draw(4, 0, "sft", step) for step in range(128)]
    for a in (steps[:64], steps[64:]):
        assert sorted(i for rows in a for i in rows) == list(range(256))
    assert steps[:64] != steps[64:] and steps[:64] != [text.draw(4, 1, "sft", step) for step in range(64)]
    spread = [max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in steps]
    assert sum(spread) / len(spread) < 3
    means = [sum(lengths[i] for i in rows) for rows in steps[:32]]
    assert means != sorted(means) and [text.draw(4, 0, "sft", step) for step in range(128)] == steps


def test_two_stages_share_no_more_rows_than_chance_gives(tmp_path):  # pitfall 43
    text = text_of(tmp_path, [1, 2, 9] * 2048, context=8)
    first, second = ({i for step in range(64) for i in text.draw(8, 0, stage, step)} for stage in ("sft", "ppo"))
    assert len(first) == len(second) == 512  # a quarter of the rows each, of which a quarter is both: 128 +- 8.5
    assert 128 - 34 < len(first & second) < 128 + 34


def test_each_row_knows_its_document(tmp_path):
    text = text_of(tmp_path, [1, 2, 9, 9, 1, 2, 3, 4, 5, 9, 4, 9], context=4)
    assert text.documents == [0, 2, 2, 3]  # the second, empty, has no row; the third has two


def test_few_rows_are_drawn_again_and_again_rather_than_not_at_all(tmp_path):
    text = text_of(tmp_path, [1, 9, 2, 9, 3, 9], context=8)
    drawn = Counter(i for step in range(32) for i in text.draw(3, 0, "sft", step))
    assert drawn == {0: 32, 1: 32, 2: 32}


@pytest.mark.parametrize("content, message", [
    (b"", "cut short"), (b"\1\0\2", "cut short"), (b"\1\0\2\0\3", "cut short"),
    (b"\x09\0\x09\0", "no document of two tokens"), (b"\1\0\xff\xff\x09\0", "holds token 65535, but the vocabulary has 280"),
])
def test_pretraining_text_that_is_damaged_is_refused(tmp_path, content, message):
    (tmp_path / "p.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"p.bin.*{message}"):
        readers.PretrainingText(tmp_path / "p.bin", type("Stub", (), dict(vocab_size=280, end_of_text=9)), 8)


# ---------------------------------------------------------------- cleaning

def prompts(*texts, user="u"):
    return [{"prompt": text, "user": user} for text in texts]


def test_duplicates_by_a_long_common_prefix_go_and_the_order_stays():
    kept = lambda *texts: [r["prompt"] for r in cleaning.deduplicate(prompts(*texts), prefix=4, least=2)]
    assert kept("abc", "ab") == ["ab"]
    assert kept("ab", "a", "b", "a ") == ["ab", "a", "b"]  # what is too short to be the beginning of much
    assert kept("abcd2", "xyz", "abcd1") == ["xyz", "abcd1"]
    assert kept("abd", "abc") == ["abd", "abc"]
    assert kept(" ab ", "ab") == [" ab "] and kept() == []


def test_a_blank_prompt_does_not_make_all_others_its_duplicates():
    kept = cleaning.deduplicate(prompts("  ", "Write a story.", "What does the fox eat?"))
    assert {"Write a story.", "What does the fox eat?"} <= {r["prompt"] for r in kept}


@pytest.mark.parametrize("text, personal", [
    ("Write to ada.abel+x@post.example.org please", True), ("call +44 20 7946 0958 now", True), ("555 0123 22", True),
    ("card 4111-1111-1111-1111", True), ("a@b", False), ("in 1999 and 2001", False), ("List 3 foods", False),
    ("the code is x1234567890y", False), ("call 555 0123", True), ("from 1914-1918", False), ("on 2023-04-12", False),
    ("pi is 3.1415926", False), ("at 192.168.10.25", False), ("count 1 2 3 4 5 6 7 8", False), ("it costs 123456", False),
])
def test_personal_data_is_found(text, personal):
    assert cleaning.without_personal_data(prompts(text)) == ([] if personal else prompts(text))


def test_no_customer_has_more_than_the_limit_and_the_first_ones_stay():
    records = prompts("a", "b", "c", user="u") + prompts("d", user="v") + prompts("e", user="u")
    assert [r["prompt"] for r in cleaning.limit_per_customer(records, most=2)] == ["a", "b", "d"]


def test_a_customer_is_on_one_side_of_the_split_only_and_nobody_is_lost():
    records = [r for i in range(30) for r in prompts(*[f"{i}-{j}" for j in range(i % 5 + 1)], user=f"u{i}")]
    splits = cleaning.split_by_customer(records, {"test": 10, "valid": 5}, seed=0)
    users = {name: {r["user"] for r in part} for name, part in splits.items()}
    assert list(splits) == ["test", "valid", "train"] and len(splits["test"]) >= 10 and len(splits["valid"]) >= 5
    assert sum(map(len, users.values())) == 30 and sum(map(len, splits.values())) == len(records)
    assert splits != cleaning.split_by_customer(records, {"test": 10, "valid": 5}, seed=1)


def test_cleaning_reports_what_each_step_left():
    records = prompts("mail me: a@b.cd") + prompts("x" * 70, "x" * 71) + prompts(*[f"{i:03}" for i in range(201)])
    cleaned, steps = cleaning.clean(records)
    assert [left for _, left in steps] == [204, 203, 202, 200] and len(cleaned) == 200


# ---------------------------------------------------------------- collecting comparisons

@pytest.fixture
def collecting(chain, tmp_path):
    """The chain's dataset without comparisons, to collect on."""
    shutil.copytree(chain.data, tmp_path / "data")
    for split in ("train", "valid"):
        (tmp_path / f"data/comparisons.{split}.jsonl").unlink()
    return lambda **changes: dataclasses.replace(chain.collecting, data=str(tmp_path / "data"), **changes)


def read(config, split):
    return readers.read_jsonl(f"{config.data}/comparisons.{split}.jsonl", "comparisons")


def test_comparisons_have_distinct_responses_ranked_by_a_labeler_of_the_right_team(collecting):
    config = collecting()
    collect.main(config)
    training, held_out = ({labeler.name: labeler for labeler in team} for team in labelers.team())
    for split, teams in (("train", [training]), ("valid", [training, held_out])):
        prompts = readers.read_jsonl(f"{config.data}/prompts.{split}.jsonl", "prompts")
        where = {r["prompt"]: i for i, r in enumerate(prompts)}
        records, seen = read(config, split), set()
        for r in records:
            team = teams[where[r["prompt"]] % len(teams)]
            assert r["labeler"] in team and 2 <= len(r["responses"]) <= config.most
            assert len(set(r["responses"])) == len(r["responses"]) and all(text.strip() for text in r["responses"])
            assert r["ranks"] == team[r["labeler"]].rank(r["prompt"], r["asks"], r["responses"], config.seed)
            seen.add(r["labeler"] in held_out)
        assert seen == ({False} if split == "train" else {False, True})
    assert len({len(r["responses"]) for r in read(config, "train")}) > 1
    assert not [p.name for p in Path(config.data).iterdir() if p.suffix in (".part", ".tmp")]


def test_samples_come_from_each_source_at_its_temperature(letters, monkeypatch):
    first, second = random_gpt(seed=1), random_gpt(seed=2)
    calls = []
    monkeypatch.setattr(collect, "generate", lambda model, prompts, *rest: calls.append((model, prompts, rest)) or generate(
        model, prompts, *rest))
    config = collect.Config(max_new_tokens=5)
    texts = collect.sample([(first, 0.5), (second, 1.4)], [[1], [2, 3]], [20, 30], letters.tokenizer, config, "train", 0, cpu())
    assert [len(t) for t in texts] == [20, 30]
    assert [(model, rest[2]) for model, _, rest in calls] == [(first, 0.5), (second, 1.4)]
    assert Counter(tuple(p) for _, prompts, _ in calls for p in prompts) == {(1,): 20, (2, 3): 30}
    assert all(10 < len(prompts) < 40 for _, prompts, _ in calls)
    uniforms = [{tuple(row) for row in rest[1].tolist()} for _, _, rest in calls]
    assert len(uniforms[0] | uniforms[1]) == 50  # no two samples draw the same numbers


def test_samples_depend_on_seed_split_and_batch_and_on_nothing_else(letters):  # pitfall 38
    sources, config = [(random_gpt(), 1.0)], collect.Config(max_new_tokens=5)
    draw = lambda *which: collect.sample(sources, [[1], [2, 3]], [5, 5], letters.tokenizer, config, *which, cpu())
    first = draw("train", 0)
    assert draw("train", 0) == first and draw("train", 1) != first != draw("valid", 0)
    config = dataclasses.replace(config, seed=1)
    assert draw("train", 0) != first


def test_k_is_drawn_from_the_fewest_to_the_most(collecting, monkeypatch):
    seen, sample = [], collect.sample
    monkeypatch.setattr(collect, "sample", lambda sources, prompts, counts, *rest: seen.extend(counts) or sample(
        sources, prompts, counts, *rest))
    collect.main(collecting(fewest=3, most=6))
    assert set(seen) == {3, 4, 5, 6}


def test_equal_responses_are_shown_to_the_labeler_once(collecting, chain):
    greedy = f"{chain.out}/sft/model.pt@0"
    config = collecting(sources=f"{greedy},{greedy},{chain.out}/base/model.pt@1", fewest=4, most=4)
    collect.main(config)
    records = read(config, "train")
    assert all(len(set(r["responses"])) == len(r["responses"]) == len(r["ranks"]) for r in records)
    assert {len(r["responses"]) for r in records} >= {2, 3} and len(records) < config.prompts  # 4 equal ones: no comparison


@pytest.mark.parametrize("append", [False, True])
def test_a_collection_that_was_stopped_goes_on_to_the_same_comparisons(collecting, monkeypatch, append):
    config = collecting(append=append)
    collect.main(config)
    files = [Path(f"{config.data}/comparisons.{split}.jsonl") for split in ("train", "valid")]
    whole = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    sample, calls = collect.sample, []

    def stop(*arguments):
        calls.append(arguments[-3:-1])
        if calls == [("valid", 0), ("train", 0), ("train", 1), ("train", 2)]:
            raise KeyboardInterrupt
        return sample(*arguments)
    monkeypatch.setattr(collect, "sample", stop)
    with pytest.raises(KeyboardInterrupt):
        collect.main(config)
    with open(f"{files[0]}.part", "a") as file:
        file.write('[{"prompt": "half a li')
    assert not files[0].exists()
    collect.main(config)
    assert [path.read_bytes() for path in files] == whole
    assert calls.count(("train", 1)) == 1 and calls.count(("train", 2)) == 2


def test_a_later_round_is_added_to_the_first_unless_told_otherwise(collecting):
    config = collecting(prompts=6, valid_prompts=4, fewest=2, most=2)
    collect.main(config)
    first, valid = read(config, "train"), read(config, "valid")
    collect.main(dataclasses.replace(config, skip=6))
    assert read(config, "valid") == valid  # the same once more, of the same prompts, is nothing new
    assert read(config, "train")[: len(first)] == first and len(read(config, "train")) > len(first)
    skipped = {r["prompt"] for r in read(config, "train")[len(first):]}
    assert not skipped & {r["prompt"] for r in first}
    collect.main(dataclasses.replace(config, append=False))
    assert read(config, "train") == first


def test_sources_that_are_none_are_refused(collecting, chain):
    for sources, message in [(f"{chain.out}/sft/model.pt@hot", "is not CHECKPOINT@TEMPERATURE"),
                             ("nowhere.pt@1", "nowhere.pt is missing")]:
        config = collecting(sources=sources)
        with pytest.raises(UserError, match=message):
            collect.main(config)
        assert not list(Path(config.data).glob("comparisons*"))


def test_a_prompt_too_long_is_named_by_its_line_in_the_file_whatever_is_skipped(collecting):
    config = collecting(skip=2)
    lines = Path(f"{config.data}/prompts.train.jsonl").read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), "prompt": "very long " * 300})
    Path(f"{config.data}/prompts.train.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="prompts.train.jsonl:5: a prompt of"):
        collect.main(config)


def test_a_collection_of_nothing_leaves_nothing_behind(collecting):
    config = collecting(skip=10**6)
    with pytest.raises(UserError):
        collect.main(config)
    assert not list(Path(config.data).glob("*.part"))


@pytest.mark.parametrize("changes, message", [
    (dict(fewest=1), "2 responses or more"), (dict(fewest=5, most=4), "2 responses or more"),
    (dict(prompts=0), "at least 1"), (dict(skip=-1), "--skip at least 0")])
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        collect.Config(**changes)


# ---------------------------------------------------------------- who knows what

def imports(path, at_import_time=False):
    """Full names of the modules that a file imports, and of what it imports from them; with `at_import_time`, without the
    imports inside functions."""
    names, tree = set(), ast.parse(path.read_text())
    for node in tree.body if at_import_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


STAGES = ("sft", "reward", "ppo", "evaluate")
COMMON = [f"common/{path.stem}" for path in (ROOT / "common").glob("*.py")]
TRAINING_DATA = ["data/readers", "data/batches", "data/rollout_log", "data/tokenizer", "data/cleaning"]


def test_no_knowledge_of_the_made_up_world_reaches_a_stage_that_trains():
    for name in ("model", "sft", "reward", "ppo", *COMMON, *TRAINING_DATA):
        assert not any("tinyworld" in module for module in imports(ROOT / f"{name}.py")), name


def test_stages_do_not_import_each_other_and_model_imports_nothing_of_the_project():
    for name in (*STAGES, "model", *COMMON, *TRAINING_DATA, "data/collect"):
        assert not imports(ROOT / f"{name}.py") & set(STAGES), name
    own = {"common", "data", "paper"}
    assert not {name.split(".")[0] for name in imports(ROOT / "model.py", at_import_time=True)} & own
    assert {name for name in imports(ROOT / "model.py") if name.split(".")[0] in own} == {"common", "common.gpt2"}


def test_four_packages_suffice_without_gpt2s_weights_and_figures():
    own = {"model", "ppo", "common", "data", "paper"}
    needs_more = {"common/gpt2.py": "safetensors", "paper/tables.py": "matplotlib", "paper/report.py": "matplotlib"}
    folders = [ROOT / name for name in ("common", "data", "paper")]
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - own
        assert outside <= {"torch", "tiktoken", "numpy", "tqdm", needs_more.get(str(path.relative_to(ROOT)))}, path
