"""People's data in its published formats, through each prepare.py's real main(config): small files written here, and the
real ones where they are at hand."""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common.config
import reward
from common.config import UserError
from conftest import ROOT, random_gpt, read_log, save
from common import download
from data import batches, dataset, readers
from data.hh import prepare as hh
from data.jsonl import prepare as own
from data.oasst import prepare as oasst
from data.tldr import prepare as tldr
from data.tokenizer import END, Tokenizer, train_bpe
from data.webtext import prepare as webtext

READERS = {"oasst": oasst, "hh": hh, "tldr": tldr, "jsonl": own}
ALL_TRAIN = dict(valid=0.0, test=0.0, judge=0.0, ppo=0.0, held_out=0.0)  # every record stands where it is easily found


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    def fetch(url, *_):
        raise AssertionError(f"{url} was asked for")
    monkeypatch.setattr(download, "fetch", fetch)


def write(path, rows):
    """Rows, or lines as they are, as JSON Lines; gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def prepare(module, source, out, **config):
    """-> what was printed"""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main(module.Config(source=str(source), out=str(out), **dict(vocab_size=300, prefix=64) | config))
    return printed.getvalue()


def records(out):
    """{"demonstrations.train": records, "judge/comparisons.train": records, ...}, read as every stage reads them."""
    found = defaultdict(list)
    for path in Path(out).rglob("*.jsonl"):
        name = str(path.relative_to(out)).removesuffix(".jsonl")
        found[name] = readers.read_jsonl(path, path.name.split(".")[0])
    return found


@pytest.fixture
def read(tmp_path):
    """read(module, rows, **config) -> records(out) of a dataset whose every conversation is for training."""
    def read(module, rows, **config):
        prepare(module, write(tmp_path / "source.jsonl", rows), tmp_path / "out", **ALL_TRAIN | config)
        return records(tmp_path / "out")
    return read


def pick(rows, *keys):
    return [tuple(r[key] for key in keys) for r in rows]


def demonstrations(found):
    return pick(found["demonstrations.train"], "prompt", "response")


def comparisons(found):
    return pick(found["comparisons.train"], "prompt", "responses", "ranks")


def prompts(found):
    return [r["prompt"] for r in found["prompts.train"]]


def dropped(printed):
    """{why: how many} of the printed table."""
    lines = re.findall(r"^ +([\d,]+)  (\S.*)$", printed.split("left out:")[1], re.M)
    return {why: int(n.replace(",", "")) for n, why in lines}


# ---------------------------------------------------------------- OpenAssistant

def message(role, text, *replies, **more):
    given = dict(text=text, role=role, lang="en", review_result=True, deleted=False, synthetic=False, replies=list(replies))
    return given | more


ask, say = partial(message, "prompter"), partial(message, "assistant")


def tree(root, name="tree-1"):
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root}


SECOND = tree(ask("Name a tree.", say("An alder.")), "tree-2")  # so that a dataset is not empty
ALDER = ("Human: Name a tree.\n\nAssistant:", " An alder.")


def test_oasst_the_history_stands_in_the_prompt(read):
    follow_up = ask("Does it swim?\n", say("\n It wades. ", ask("Where?", say("In reeds."))))
    found = read(oasst, [tree(ask(" Name a bird.", say("A heron.\n", follow_up)))])
    first = "Human: Name a bird.\n\nAssistant:"
    second = first + " A heron.\n\nHuman: Does it swim?\n\nAssistant:"
    assert demonstrations(found) == [(first, " A heron."), (second, " It wades."),
                                     (second + " It wades.\n\nHuman: Where?\n\nAssistant:", " In reeds.")]
    assert set(pick(found["demonstrations.train"], "user", "labeler", "use_case")) == {("tree-1", "crowd", "chat")}
    assert not comparisons(found) and not prompts(found)


def test_oasst_each_branch_has_its_own_history(read):
    found = read(oasst, [tree(ask("Name a bird.", say("A heron.", ask("Big?", say("Yes.")), rank=1),
                                  say("A wren.", ask("Small?", say("Very.")), rank=0)))])
    first = "Human: Name a bird.\n\nAssistant:"
    assert set(demonstrations(found)) == {
        (first, " A wren."), (first + " A heron.\n\nHuman: Big?\n\nAssistant:", " Yes."),
        (first + " A wren.\n\nHuman: Small?\n\nAssistant:", " Very.")}


@pytest.mark.parametrize("given_ranks, ranks, best", [
    ([2, 0, 1], [3, 1, 2], 1), ([0, 1, 2], [1, 2, 3], 0), ([1, 2, 3], [1, 2, 3], 0), ([5, 3, 3], [2, 1, 1], 1),
    ([7, 0], [2, 1], 1), ([0, 4, 2, 2], [1, 3, 2, 2], 0), ([-1, -2], [2, 1], 1)])
def test_oasst_the_ranked_replies_are_a_comparison_and_the_best_a_demonstration(read, given_ranks, ranks, best):
    texts = ["Ash.", "Beech.", "Cedar.", "Date."][: len(ranks)]
    found = read(oasst, [tree(ask("A tree?", *[say(text, rank=rank) for text, rank in zip(texts, given_ranks)]))])
    prompt = "Human: A tree?\n\nAssistant:"
    assert comparisons(found) == [(prompt, [f" {text}" for text in texts], ranks)]
    assert demonstrations(found) == [(prompt, f" {texts[best]}")]
    assert pick(found["comparisons.train"], "user", "labeler") == [("tree-1", "crowd")]


def test_oasst_siblings_without_a_rank_are_not_compared(read):
    found = read(oasst, [tree(ask("A tree?", say("Ash."), say("Beech.", rank=1), say("Cedar.", rank=None),
                                  say("Date.", rank=0), say("Elm.", rank="0")))])
    prompt = "Human: A tree?\n\nAssistant:"
    assert comparisons(found) == [(prompt, [" Beech.", " Date."], [2, 1])] and demonstrations(found) == [(prompt, " Date.")]


@pytest.mark.parametrize("rank", [{}, {"rank": None}, {"rank": 0}])
def test_oasst_a_lone_reply_is_a_demonstration(read, rank):
    found = read(oasst, [tree(ask("A tree?", say("Ash.", **rank)))])
    assert demonstrations(found) == [("Human: A tree?\n\nAssistant:", " Ash.")] and not comparisons(found)


def test_oasst_what_follows_in_two_conversations_in_the_same_words_is_no_duplicate(read):
    more = "Could you tell me a little more about this, please?"
    found = read(oasst, [tree(ask(first, say("Yes.", ask(more, say("No.")))), first) for first in ("A tree?", "A bird?")])
    assert sum(more in prompt for prompt, _ in demonstrations(found)) == 2 and len(demonstrations(found)) == 4


@pytest.mark.parametrize("source", [["a.jsonl", "b/c.jsonl.gz"], ["trees.jsonl.gz"]])
def test_oasst_a_source_is_a_file_or_a_folder(tmp_path, source):
    for i, name in enumerate(source):
        write(tmp_path / "source" / name, [tree(ask(f"{mark(i)}?", say("Yes.")), f"tree-{i}")])
    prepare(oasst, tmp_path / "source", tmp_path / "out", **ALL_TRAIN)
    users = [r["user"] for r in records(tmp_path / "out")["demonstrations.train"]]
    assert users == [f"tree-{i}" for i in range(len(source))]


@pytest.mark.parametrize("replies", [[], [say("Ash."), say("Beech.")], [say("Ash.", rank=0), say("Beech.")]])
def test_oasst_where_nothing_says_which_reply_is_best_there_is_only_a_prompt(read, replies):
    found = read(oasst, [tree(ask("A tree?", *replies))])
    assert prompts(found) == ["Human: A tree?\n\nAssistant:"] and found.keys() == {"prompts.train"}


def test_oasst_replies_that_are_all_tied_are_neither_compared_nor_shown(read):
    found = read(oasst, [tree(ask("A tree?", say("Ash.", rank=1), say("Beech.", rank=1))), SECOND])
    assert demonstrations(found) == [ALDER] and not comparisons(found)


@pytest.mark.parametrize("change, why", [(dict(deleted=True), "message deleted or rejected in review"),
                                         (dict(review_result=False), "message deleted or rejected in review"),
                                         (dict(lang="de"), "message not in en")])
def test_oasst_what_is_not_wanted_goes_with_all_that_follows_it(tmp_path, change, why):
    rest = ask("Why?", say("It is old.", ask("How old?", say("Very."))))
    rows = [tree(ask("A tree?", say("Ash.", rest, rank=0, **change), say("Beech.", rank=1))),
            tree(ask("A bird?", say("A wren.", ask("Small?", say("Tiny.")))) | change, "tree-3"),
            tree(ask("A fish?", say("A carp.", ask("Big?", say("Huge."), **change))), "tree-4"), SECOND]
    printed = prepare(oasst, write(tmp_path / "s.jsonl", rows), tmp_path / "out", **ALL_TRAIN)
    found = records(tmp_path / "out")
    assert demonstrations(found) == [("Human: A tree?\n\nAssistant:", " Beech."),
                                     ("Human: A fish?\n\nAssistant:", " A carp."), ALDER]
    assert found.keys() == {"demonstrations.train"} and dropped(printed) == {why: 3}


def test_oasst_a_review_that_has_not_ended_is_no_rejection(read):
    found = read(oasst, [tree(ask("A tree?", say("Ash.", review_result=None), review_result=None, deleted=None))])
    assert len(demonstrations(found)) == 1


def test_oasst_one_language_or_all(read):
    rows = [tree(ask("Ein Baum?", say("Eine Esche.", lang="de"), lang="de")), tree(ask("A fish?", say("A carp.")), "tree-3")]
    german, english = ("Human: Ein Baum?\n\nAssistant:", " Eine Esche."), ("Human: A fish?\n\nAssistant:", " A carp.")
    assert demonstrations(read(oasst, rows)) == [english]
    assert demonstrations(read(oasst, rows, lang="de")) == [german]
    assert demonstrations(read(oasst, rows, lang="all")) == [german, english]


def test_oasst_what_a_model_wrote_is_no_demonstration_but_may_be_compared(tmp_path):
    made = dict(synthetic=True, model_name="m")
    rows = [tree(ask("A tree?", say("Ash.", rank=0, **made), say("Beech.", rank=1)), "a"),
            tree(ask("A bird?", say("A wren.", **made)), "b"),
            tree(ask("A fish?", say("A carp.", rank=0), say("A pike.", rank=1, **made)), "c"),
            tree(ask("A song?", say("La.", rank=0), **made), "d")]
    printed = prepare(oasst, write(tmp_path / "s.jsonl", rows), tmp_path / "out", **ALL_TRAIN)
    found = records(tmp_path / "out")
    assert demonstrations(found) == [("Human: A fish?\n\nAssistant:", " A carp."), ("Human: A song?\n\nAssistant:", " La.")]
    assert comparisons(found) == [("Human: A tree?\n\nAssistant:", [" Ash.", " Beech."], [1, 2]),
                                  ("Human: A fish?\n\nAssistant:", [" A carp.", " A pike."], [1, 2])]
    assert prompts(found) == ["Human: A bird?\n\nAssistant:"] and dropped(printed) == {"demonstration written by a model": 2}


# ---------------------------------------------------------------- HH-RLHF

def turns(*texts):
    """The format of the published data, from texts by turns of the human and the assistant."""
    return "".join(f"\n\n{who}: {text}" for who, text in zip(itertools.cycle(["Human", "Assistant"]), texts))


def test_hh_prompt_and_replies_part_at_the_assistants_last_turn(read):
    found = read(hh, [{"chosen": turns("Hi", "Hello", "A tree?", "Ash. \n\nOr elm: both."),
                       "rejected": turns("Hi", "Hello", "A tree?", "Which Assistant: me?")}])
    prompt = "Human: Hi\n\nAssistant: Hello\n\nHuman: A tree?\n\nAssistant:"
    assert comparisons(found) == [(prompt, [" Ash. \n\nOr elm: both.", " Which Assistant: me?"], [1, 2])]
    assert demonstrations(found) == [(prompt, " Ash. \n\nOr elm: both.")]
    assert pick(found["comparisons.train"], "labeler", "use_case") == [("anthropic", "chat")]


def test_hh_replies_to_different_prompts_are_left_out(tmp_path):
    rows = [{"chosen": turns("A tree?", "Ash."), "rejected": turns("A bird?", "Ash.")},
            {"chosen": turns("A tree?", "Ash.", "Why?", "So."), "rejected": turns("A tree?", "Elm.")},
            {"chosen": turns("A fish?", "Carp."), "rejected": turns("A fish?", "Pike.")}]
    printed = prepare(hh, write(tmp_path / "s.jsonl", rows), tmp_path / "out", **ALL_TRAIN)
    assert comparisons(records(tmp_path / "out")) == [("Human: A fish?\n\nAssistant:", [" Carp.", " Pike."], [1, 2])]
    assert dropped(printed) == {"replies to two different prompts": 2}


def test_hh_an_empty_reply_is_neither_compared_nor_shown(read):
    found = read(hh, [{"chosen": turns("A tree?", ""), "rejected": turns("A tree?", "Ash.")},
                      {"chosen": turns("A bird?", "Wren."), "rejected": turns("A bird?", " \n")}])
    assert not comparisons(found) and demonstrations(found) == [("Human: A bird?\n\nAssistant:", " Wren.")]


def test_hh_conversations_that_begin_alike_are_one_conversation(read):
    pair = lambda *before: {"chosen": turns(*before, "Yes."), "rejected": turns(*before, "No.")}
    found = read(hh, [pair("A tree?"), pair("A tree?", "Ash.", "More."), pair("A bird?")])
    users = [r["user"] for r in found["comparisons.train"]]
    assert len(users) == 3 and users[0] == users[1] != users[2]


def test_hh_a_conversation_that_ends_with_the_human_teaches_no_reply_for_two(tmp_path):
    rows = [{"chosen": turns("A tree?", "Ash.", "Thanks."), "rejected": turns("A tree?", "Elm.")},
            {"chosen": turns("A bird?", "Wren."), "rejected": turns("A bird?", "No.")}]
    with contextlib.suppress(UserError):
        prepare(hh, write(tmp_path / "s.jsonl", rows), tmp_path / "out", **ALL_TRAIN)
    assert not [r for rows in records(tmp_path / "out").values() for r in rows if "Thanks" in str(r)]


def test_hh_beginnings_are_compared_without_the_name_of_the_human(read):
    long = ["x" * 60 + word for word in ("first one", "other one")]
    found = read(hh, [{"chosen": turns(text, "Yes."), "rejected": turns(text, "No.")} for text in long])
    assert [prompt for prompt, *_ in comparisons(found)] == [f"Human: {text}\n\nAssistant:" for text in long]


def test_hh_a_folder_is_read_file_by_file_zipped_or_not(tmp_path):
    rows = [{"chosen": turns(text, "Ash."), "rejected": turns(text, "Elm.")} for text in ("A tree?", "A bird?", "A fish?")]
    for path, row in zip(("x/test.jsonl.gz", "x/train.jsonl", "y.jsonl"), rows):
        write(tmp_path / "source" / path, [row])
    write(tmp_path / "source/notes.txt", ["no JSON"])
    prepare(hh, tmp_path / "source", tmp_path / "out", **ALL_TRAIN)
    assert [prompt for prompt, *_ in comparisons(records(tmp_path / "out"))] == [
        f"Human: {text}\n\nAssistant:" for text in ("A tree?", "A bird?", "A fish?")]


# ---------------------------------------------------------------- summarize-from-feedback

def post(name, text, **more):
    return dict(id=name, subreddit="gardens", title=f"On {name}", post=text) | more


def compared(info, choice, *texts, worker="w1", **more):
    return dict(info=info, summaries=[dict(text=text, policy="p") for text in texts], choice=choice, worker=worker,
                batch="batch7", split="train", extra={}) | more


OAK = post("oak", "I planted an oak.\n\nIt grows. ")
OAK_PROMPT = "SUBREDDIT: r/gardens\n\nTITLE: On oak\n\nPOST: I planted an oak.\n\nIt grows.\n\nTL;DR:"


def test_tldr_a_posts_own_summary_is_a_demonstration(read):
    found = read(tldr, [OAK | dict(summary="An oak grows. ")])
    assert demonstrations(found) == [(OAK_PROMPT, " An oak grows.")] and not comparisons(found)
    assert pick(found["demonstrations.train"], "user", "labeler", "use_case") == [("oak", "author", "summarization")]


@pytest.mark.parametrize("choice, ranks", [(0, [1, 2]), (1, [2, 1])])
def test_tldr_the_summary_that_was_chosen_is_ranked_first(read, choice, ranks):
    found = read(tldr, [compared(OAK, choice, " Oak.", "It grows.")])
    assert comparisons(found) == [(OAK_PROMPT, [" Oak.", " It grows."], ranks)]
    assert pick(found["comparisons.train"], "labeler", "batch", "user") == [("w1", "batch7", "oak")]
    assert not demonstrations(found)  # models wrote them


def test_tldr_of_three_summaries_the_others_tie(read):
    assert comparisons(read(tldr, [compared(OAK, 2, "A.", "B.", "C.")])) == [(OAK_PROMPT, [" A.", " B.", " C."], [2, 2, 1])]


def test_tldr_comparisons_of_news_are_left_out(tmp_path):
    rows = [compared(dict(id="x", article="News.", title="N", site="cnndm"), 0, "A.", "B."), compared(OAK, 0, "A.", "B.")]
    printed = prepare(tldr, write(tmp_path / "s.json", rows), tmp_path / "out", **ALL_TRAIN)
    assert [prompt for prompt, *_ in comparisons(records(tmp_path / "out"))] == [OAK_PROMPT]
    assert dropped(printed) == {"comparison of a news article's summaries": 1}


def test_tldr_a_folder_holds_posts_and_batches(tmp_path):
    write(tmp_path / "source/train.jsonl", [OAK | dict(summary="An oak.")])
    write(tmp_path / "source/comparisons/batch3.json", [compared(OAK, 0, "A.", "B.")])
    write(tmp_path / "source/comparisons/batch22.json.gz", [compared(OAK, 1, "C.", "D.", worker="w2", batch="batch22")])
    prepare(tldr, tmp_path / "source", tmp_path / "out", **ALL_TRAIN)
    found = records(tmp_path / "out")
    assert demonstrations(found) == [(OAK_PROMPT, " An oak.")]
    assert set(pick(found["comparisons.train"], "labeler", "batch")) == {("w1", "batch7"), ("w2", "batch22")}


@pytest.mark.parametrize("most, left", [(0, 4), (3, 3), (9, 4)])
def test_tldr_so_many_posts_are_read_and_all_comparisons(read, most, left):
    rows = [compared(OAK, 0, "A.", "B."), *(post(f"p{i}", f"Text {i}.", summary="S.") for i in range(4))]
    found = read(tldr, rows, posts=most)
    assert [r["user"] for r in found["demonstrations.train"]] == [f"p{i}" for i in range(left)]
    assert len(comparisons(found)) == 1


# ---------------------------------------------------------------- anyone's JSON Lines

def chat(*texts, first="user"):
    roles = itertools.cycle(["user", "assistant"] if first == "user" else ["assistant", "user"])
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


TREE = "Human: A tree?\n\nAssistant:"


@pytest.mark.parametrize("row, shown, ranked, asked", [
    ({"prompt": "A tree? ", "completion": "ash"}, [("A tree? ", "ash")], [], []),
    ({"prompt": "A tree?", "response": " ash\n"}, [("A tree?", " ash\n")], [], []),
    ({"prompt": chat("A tree? "), "completion": chat(" Ash.", first="assistant")}, [(TREE, " Ash.")], [], []),
    ({"prompt": chat("A tree?"), "completion": "Ash."}, [(TREE, " Ash.")], [], []),
    ({"prompt": [{"role": "system", "content": " Be brief. "}, *chat("A tree?", "Ash.", "Why?")], "response": " So."},
     [("Be brief.\n\nHuman: A tree?\n\nAssistant: Ash.\n\nHuman: Why?\n\nAssistant:", " So.")], [], []),
    ({"messages": chat("A tree?", "Ash.")}, [(TREE, " Ash.")], [], []),
    ({"messages": chat("A tree?", "Ash.", "Why?", "So.", "Oh.")},
     [(TREE, " Ash."), (f"{TREE} Ash.\n\nHuman: Why?\n\nAssistant:", " So.")], [], []),
    ({"messages": [{"role": "system", "content": "Be brief."}, *chat("A tree?", "Ash.")]},
     [(f"Be brief.\n\n{TREE}", " Ash.")], [], []),
    ({"messages": chat("Hello!", "A tree?", "Ash.", first="assistant")},
     [(f"Assistant: Hello!\n\n{TREE}", " Ash.")], [], []),
    ({"messages": chat("A tree?")}, [], [], [TREE]),
    ({"prompt": "A tree?", "chosen": "Ash.", "rejected": "No."},
     [("A tree?", "Ash.")], [("A tree?", ["Ash.", "No."], [1, 2])], []),
    ({"prompt": chat("A tree?"), "chosen": chat("Ash.", first="assistant"), "rejected": chat("No.", first="assistant")},
     [(TREE, " Ash.")], [(TREE, [" Ash.", " No."], [1, 2])], []),
    ({"chosen": chat("A tree?", "Ash."), "rejected": chat("A tree?", "No.")},
     [(TREE, " Ash.")], [(TREE, [" Ash.", " No."], [1, 2])], []),
    ({"prompt": chat("A tree?"), "chosen": chat("A tree?", "Ash."), "rejected": chat("A tree?", "No.")},
     [(TREE, " Ash.")], [(TREE, [" Ash.", " No."], [1, 2])], []),
    ({"prompt": "A tree?", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
     [("A tree?", "b")], [("A tree?", ["a", "b", "c"], [2, 1, 2])], []),
    ({"prompt": "A tree?", "responses": ["a", "b", "c"], "ranks": [2, 0, 1]},
     [("A tree?", "b")], [("A tree?", ["a", "b", "c"], [3, 1, 2])], []),
    ({"prompt": "A tree?", "responses": ["a", "b", "c"], "ranks": [10, 30, 10]},
     [("A tree?", "a")], [("A tree?", ["a", "b", "c"], [1, 2, 1])], []),
    ({"prompt": chat("A tree?"), "responses": [chat("a", first="assistant"), "b"], "ranks": [1, 2]},
     [(TREE, " a")], [(TREE, [" a", " b"], [1, 2])], []),
    ({"prompt": "A tree?"}, [], [], ["A tree?"]),
    ({"prompt": chat("A tree?")}, [], [], [TREE]),
])
def test_jsonl_each_format_by_hand(read, row, shown, ranked, asked):
    found = read(own, [row])
    assert (demonstrations(found), comparisons(found), prompts(found)) == (shown, ranked, asked)
    user = {r["user"] for rows in found.values() for r in rows}
    assert user == {dataset.nobody("A tree? " if "A tree? " in str(row) else "A tree?")}  # how the conversation began
    assert {r["labeler"] for r in found["demonstrations.train"] + found["comparisons.train"]} <= {"people"}


def test_jsonl_what_nobody_has_answered_yet_is_asked_too(read):
    found = read(own, [{"messages": chat(f"{mark(i)}?", "Ash.", "Why?")} for i in range(2)], test=0.5)
    first, second = (r["prompt"] for r in found["prompts.test"])
    assert second == f"{first} Ash.\n\nHuman: Why?\n\nAssistant:" and len(demonstrations(found)) == 1


def test_jsonl_all_formats_may_stand_in_one_file_and_files_in_one_folder(tmp_path):
    write(tmp_path / "s/a.jsonl", [{"prompt": "A tree?"}, {"prompt": "A bird?", "completion": "Wren."}])
    write(tmp_path / "s/deep/b.jsonl.gz", [{"messages": chat("A fish?", "Carp.")},
                                           {"prompt": "A song?", "chosen": "La", "rejected": "-"}])
    write(tmp_path / "s/c.txt", ["not read"])
    prepare(own, tmp_path / "s", tmp_path / "out", **ALL_TRAIN)
    found = records(tmp_path / "out")
    assert prompts(found) == ["A tree?"] and [prompt for prompt, *_ in comparisons(found)] == ["A song?"]
    assert [prompt for prompt, _ in demonstrations(found)] == ["A bird?", "Human: A fish?\n\nAssistant:", "A song?"]


def test_jsonl_what_else_stands_there_is_kept(read):
    given_keys = dict(user="ann", labeler="ben", use_case="rewrite", id=7, tags=["x", None, {"y": 1.5}])
    found = read(own, [{"prompt": "A tree?", "responses": ["a", "b"], "ranks": [2, 1]} | given_keys,
                       {"messages": chat("A bird?", "Wren.")} | given_keys,
                       {"prompt": "A fish?"} | given_keys | dict(user="eve")])
    assert found["comparisons.train"] == [{"prompt": "A tree?", "responses": ["a", "b"], "ranks": [2, 1]} | given_keys]
    assert found["demonstrations.train"] == [{"prompt": "A tree?", "response": "b"} | given_keys,
                                             {"prompt": "Human: A bird?\n\nAssistant:", "response": " Wren."} | given_keys]
    without = {key: value for key, value in given_keys.items() if key != "labeler"}
    assert found["prompts.train"] == [{"prompt": "A fish?"} | without | dict(user="eve")]


def test_jsonl_any_text_survives(read):
    for text in ("naïve 🙂 你好", "tab\tand \u2028 and \x00", "half \ud800", f"{END} ends nothing", "<b>&amp;</b> \\n"):
        assert demonstrations(read(own, [{"prompt": text, "completion": text}])) == [(text, text)]


# ---------------------------------------------------------------- what all four promise

def mark(i):
    """A word that stands for conversation i."""
    return "zq" + "".join(chr(97 + i // 26**k % 26) for k in range(3))


def marks(rows):
    return {word for r in rows for word in re.findall("zq[a-z]{3}", r["prompt"])}


COUNT = 120
LIKE = "A very long beginning that several of the conversations have word for word: "  # over 64 characters
PERSONAL = " Write to ann@example.com!"
WORKERS = [f"worker-{i}" for i in range(10)]


def kind(i):
    return {6: "asked", 7: "shown", 8: "personal", 9: "alike"}.get(i % 10, "ranked")


def opening(i):
    return (LIKE if kind(i) == "alike" else "") + f"{mark(i)}, what is it?" + PERSONAL * (kind(i) == "personal")


def oasst_tree(i):
    long = ask("And why? " + "because " * 200, say("No idea."))
    replies = {"asked": [], "shown": [say(f"It is {i}.")]}.get(kind(i), [
        say(f"It is {i}.", ask("Sure?", say("Yes, quite.")), rank=1), say(f"It was {i}.", long, rank=0),
        say("very " * 300, rank=2)])
    return [tree(ask(opening(i), *replies), f"tree-{i}")]


def hh_lines(i):
    pair = lambda *before: {"chosen": turns(*before, f"It is {i}."), "rejected": turns(*before, f"It was {i}.")}
    return [pair(opening(i)), pair(opening(i)), pair(opening(i), "Who asks?", "I do."),
            pair(opening(i), "Who asks?", "because " * 200),
            {"chosen": turns(opening(i), "One."), "rejected": turns(opening(i), "very " * 300)}]


def tldr_lines(i):
    info = post(f"t3_{i}", f"{i} days have gone by.", title=opening(i))
    pairs = [compared(info, (i + n) % 2, f"Days, {n}.", f"It is {i}.", worker=WORKERS[(i // 10 + n) % 10]) for n in range(3)]
    return [info | dict(summary=f"After {i} days."), *(pairs if kind(i) != "shown" else [])]


def jsonl_lines(i):
    ranked = {"prompt": chat(opening(i), "Who?", "I."), "responses": [f"{i}.", f"No, {i}.", "Hm.", "very " * 300],
              "ranks": [2, 0, 2, 1], "labeler": WORKERS[i // 10 % 10]}
    rows = {"asked": [{"prompt": opening(i)}], "shown": [{"messages": chat(opening(i), "Who?", "I.", "Fine.")}]}.get(
        kind(i), [{"messages": chat(opening(i), "Who?")}, ranked, ranked,
                  {"prompt": chat(opening(i), "x", "because " * 200)}, ranked | {"labeler": WORKERS[(i // 10 + 1) % 10]}])
    return [{"source": "test"} | row | ({"user": f"user-{i}"} if i % 2 else {}) for row in rows]


LINES = {"oasst": oasst_tree, "hh": hh_lines, "tldr": tldr_lines, "jsonl": jsonl_lines}
FRACTIONS = dict(valid=0.1, test=0.15, judge=0.2, ppo=0.3, held_out=0.2, context=300)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(name): a dataset of COUNT conversations through that reader."""
    @cache
    def make(name):
        folder, lines = tmp_path_factory.mktemp(name), [row for i in range(COUNT) for row in LINES[name](i)]
        source = write(folder / "source.jsonl", lines)
        printed = prepare(READERS[name], source, folder / "out", **FRACTIONS)
        return SimpleNamespace(name=name, module=READERS[name], source=source, out=folder / "out", printed=printed,
                               found=records(folder / "out"), tokenizer=Tokenizer.load(folder / "out"), lines=lines)
    return make


@pytest.fixture(scope="module", params=READERS)
def made(request, make):
    return make(request.param)


def sides(found):
    """{side: all its records}"""
    result = {side: [r for name, rows in found.items() if name.endswith(side) and "/" not in name for r in rows]
              for side in ("train", "valid", "test")}
    return result | {"judge": found["judge/demonstrations.train"] + found["judge/comparisons.train"]}


def test_nobody_stands_on_two_sides(made):
    for a, b in itertools.combinations(sides(made.found).values(), 2):
        assert a and b and not marks(a) & marks(b) and not {r["user"] for r in a} & {r["user"] for r in b}


def test_every_side_gets_its_share_of_the_conversations(made):
    bare = {mark(i) for i in range(COUNT) if kind(i) == "asked" and made.name in ("oasst", "jsonl")}  # prompts alone
    alike = {mark(i) for i in range(COUNT) if kind(i) == "alike"}
    everyone = {mark(i) for i in range(COUNT) if kind(i) not in ("personal", "alike")}
    side = {name: marks(rows) for name, rows in sides(made.found).items()}
    share = {name: round((len(everyone) + 1) * FRACTIONS[name]) for name in ("valid", "test", "judge")}
    assert len(side["valid"]) == share["valid"] and len(side["test"]) == share["test"]
    lost = everyone - set().union(*side.values())  # the judge has no use for prompts alone
    assert lost <= bare and len(lost) + len(side["judge"]) == share["judge"]
    assert len(side["train"] - alike) >= len(everyone) - sum(share.values())
    asked = marks(made.found["prompts.train"])
    assert asked >= side["train"] & bare and len(asked - bare) == round(len(side["train"] - bare) * FRACTIONS["ppo"])


def test_prompts_for_ppo_come_from_conversations_that_nobody_labeled(made):
    labeled = made.found["demonstrations.train"] + made.found["comparisons.train"]
    asked = made.found["prompts.train"]
    assert asked and labeled and not marks(asked) & marks(labeled)
    assert all(not r.keys() & {"response", "responses", "ranks", "labeler"} for name, rows in made.found.items()
               for r in rows if name.startswith("prompts"))


def test_no_prompt_is_asked_twice(made):
    for name, rows in made.found.items():
        said = pick(rows, "prompt") if name.startswith("prompts") else [json.dumps(r) for r in rows]
        assert len(set(said)) == len(said)


def test_prompt_and_response_take_at_most_half_of_the_context_each(made):
    lengths = {"prompt": [], "response": []}
    for rows in made.found.values():
        for r in rows:
            lengths["prompt"].append(len(made.tokenizer.encode(r["prompt"])))
            for text in (*r.get("responses", []), *([r["response"]] if "response" in r else [])):
                assert text.strip()
                lengths["response"].append(len(readers.example("x", text, made.tokenizer)[1]))
    assert all(1 <= n <= FRACTIONS["context"] // 2 for some in lengths.values() for n in some)
    assert ("because because" in str(made.lines)) <= (f"prompt over {FRACTIONS['context'] // 2} tokens" in made.printed)


def test_personal_data_is_out_and_those_that_begin_alike_are_there_once(made):
    everyone = marks([r for rows in made.found.values() for r in rows])
    assert not {mark(i) for i in range(COUNT) if kind(i) == "personal"} & everyone
    assert len({mark(i) for i in range(COUNT) if kind(i) == "alike"} & everyone) == 1


def test_held_out_labelers_rank_nothing_that_trains(made):
    training = {r["labeler"] for r in made.found["comparisons.train"]}
    everyone = {r["labeler"] for name, rows in made.found.items() for r in rows if "comparisons" in name}
    if made.name in ("tldr", "jsonl"):
        assert everyone == set(WORKERS) and len(training) == 8
        for side in ("comparisons.valid", "judge/comparisons.train"):
            assert {r["labeler"] for r in made.found[side]} - training
        assert "10 labelers, 2 of them held out" in made.printed
    else:
        assert training == everyone and "1 labelers, 0 of them held out" in made.printed


def test_held_out_labelers_demonstrate_nothing_that_trains(made):
    training = {r["labeler"] for r in made.found["comparisons.train"]}
    assert {r["labeler"] for r in made.found["demonstrations.train"]} <= training | {"people", "author"}


def test_the_best_of_what_is_compared_is_what_is_demonstrated(made):
    for side in ("train", "valid", "judge/comparisons.train"):
        ranked = made.found[f"comparisons.{side}" if "/" not in side else side]
        shown = set(pick(made.found[f"demonstrations.{side}" if "/" not in side else "judge/demonstrations.train"],
                         "prompt", "response"))
        if made.name != "tldr":
            assert all((r["prompt"], r["responses"][r["ranks"].index(1)]) in shown for r in ranked if 1 in r["ranks"])


def test_the_stages_read_it(made, tmp_path):
    context, tokenizer = FRACTIONS["context"], made.tokenizer
    for split in ("train", "valid"):
        pairs = batches.load_demonstrations(str(made.out), split, tokenizer, context)
        assert [(tokenizer.decode(p), tokenizer.decode(r)) for p, r in pairs] == pick(
            made.found[f"demonstrations.{split}"], "prompt", "response")
        ranked = batches.load_comparisons(str(made.out), split, tokenizer, context)
        assert [(len(episodes), order.tolist(), who) for episodes, order, who in ranked] == [
            (len(r["responses"]), r["ranks"], r["labeler"]) for r in made.found[f"comparisons.{split}"]]
    assert batches.demonstrations_that_fit(f"{made.out}/demonstrations.train.jsonl", tokenizer, context)


def test_the_judge_has_a_dataset_of_its_own(made):
    judge = made.out / "judge"
    assert Tokenizer.load(judge).fingerprint == made.tokenizer.fingerprint
    assert (judge / "comparisons.valid.jsonl").read_bytes() == (made.out / "comparisons.valid.jsonl").read_bytes()
    assert sorted(p.name for p in judge.iterdir()) == ["comparisons.train.jsonl", "comparisons.valid.jsonl",
                                                       "demonstrations.train.jsonl", "tokenizer.json"]
    everything = [r for side in ("train", "valid", "test") for r in sides(made.found)[side]]
    assert not marks(sides(made.found)["judge"]) & marks(everything)


def test_a_reward_model_trains_on_the_judges_dataset(make, tmp_path):
    made = make("jsonl")
    save(random_gpt(vocab_size=300, context=300), tmp_path / "sft.pt", made.tokenizer)
    reward.main(reward.Config(data=str(made.out / "judge"), init=str(tmp_path / "sft.pt"), out=str(tmp_path / "judge"),
                              batch_size=4, device="cpu"))
    assert read_log(tmp_path / "judge") and (tmp_path / "judge/model.pt").is_file()


def test_the_table_counts_the_lines_of_the_files(made):
    table = {line.split()[0]: line.split()[1:] for line in made.printed.splitlines() if line.strip() and line[0].isalpha()}
    assert re.search(r"^ +train +valid +test +judge$", made.printed, re.M)
    count = lambda name: str(len(made.found[name])) if made.found[name] else "0"
    for kind_ in ("demonstrations", "comparisons"):
        assert table[kind_] == [count(f"{kind_}.train"), count(f"{kind_}.valid"), "-", count(f"judge/{kind_}.train")]
    assert table["prompts"] == [count(f"prompts.{side}") for side in ("train", "valid", "test")] + ["-"]
    lines = [r for name in ("comparisons.train", "comparisons.valid", "judge/comparisons.train") for r in made.found[name]]
    assert f"K = {sum(len(r['responses']) for r in lines) / len(lines):.1f} on average" in made.printed
    assert [int(n) for n in table["customers"]][1:3] == [len({r["user"] for r in sides(made.found)[side]})
                                                        for side in ("valid", "test")]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_split(made, tmp_path):
    printed = prepare(made.module, made.source, tmp_path / "x/out", **FRACTIONS)
    assert contents(tmp_path / "x/out") == contents(made.out) and printed.splitlines()[1:] == made.printed.splitlines()[1:]
    prepare(made.module, made.source, tmp_path / "y/out", **FRACTIONS, seed=1)
    other = sides(records(tmp_path / "y/out"))
    assert all(marks(rows) != marks(other[side]) for side, rows in sides(made.found).items())


def test_another_process_gives_the_same_bytes(make, tmp_path):
    made = make("jsonl")
    config = FRACTIONS | dict(source=made.source, out=tmp_path / "out", vocab_size=300, prefix=64)
    command = [sys.executable, "data/jsonl/prepare.py", *(f"--{name}={value}" for name, value in config.items())]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and contents(tmp_path / "out") == contents(made.out)


def test_zipped_it_is_the_same(made, tmp_path):
    prepare(made.module, write(tmp_path / "source.jsonl.gz", made.lines), tmp_path / "out", **FRACTIONS)
    assert contents(tmp_path / "out") == contents(made.out)


def test_a_second_run_leaves_nothing_of_the_first(made, tmp_path):
    prepare(made.module, made.source, tmp_path / "a/out", **FRACTIONS)
    few = write(tmp_path / "few.jsonl", [{"prompt": f"{mark(i)}?"} for i in range(8)])
    for folder in ("a", "b"):
        prepare(own, few, tmp_path / folder / "out", valid=0.0, test=0.25)
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")
    assert sorted(contents(tmp_path / "a/out")) == ["judge/tokenizer.json", "prompts.test.jsonl", "prompts.train.jsonl",
                                                    "tokenizer.json"]


def test_a_second_run_leaves_no_text_of_the_first_in_another_vocabulary(tmp_path):
    source = write(tmp_path / "s.jsonl", [{"prompt": f"{mark(i)}?"} for i in range(8)])
    prepare(own, source, tmp_path / "out", own_text=True, valid=0.25)
    prepare(own, source, tmp_path / "out", vocab_size=280)
    assert not list((tmp_path / "out").glob("pretrain.*"))


def test_a_damaged_vocabulary_of_an_earlier_run_is_replaced(tmp_path):
    source = write(tmp_path / "s.jsonl", [{"prompt": f"{mark(i)}?"} for i in range(8)])
    prepare(own, source, tmp_path / "out")
    (tmp_path / "out/tokenizer.json").write_text("{")
    prepare(own, source, tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").vocab_size <= 300


# ---------------------------------------------------------------- the dataset, by hand

def test_a_prompt_and_a_response_with_its_end_may_fill_half_of_the_context_each(tmp_path):
    rows = [{"prompt": name * a, "completion": "r" * b} for name, a, b in (
        ("p", 20, 1), ("q", 21, 1), ("p", 1, 19), ("p", 2, 20), ("u", 19, 18))]
    rows += [{"prompt": "abcd", "responses": ["r" * 20, "s" * 19, "t" * 19, "  "], "ranks": [1, 2, 3, 4]},
             {"prompt": "abc", "responses": ["r" * 20, "s" * 19, ""], "ranks": [1, 2, 3]},
             {"prompt": "ab", "responses": ["r" * 20, "s", "t"], "ranks": [1, 2, 2]}, {"prompt": "", "completion": "x"}]
    # with 257 tokens, every byte is one
    printed = prepare(own, write(tmp_path / "s.jsonl", rows), tmp_path / "out", **ALL_TRAIN, vocab_size=257, context=40)
    found = records(tmp_path / "out")
    assert [(len(p), len(r)) for p, r in demonstrations(found)] == [(20, 1), (1, 19), (19, 18)]
    (prompt, responses, ranks), = comparisons(found)
    assert (prompt, responses) == ("abcd", ["s" * 19, "t" * 19]) and ranks[0] < ranks[1]
    # responses: one by itself; of the comparisons 2, 2 and 1; and their three best as demonstrations
    assert dropped(printed) == {"empty prompt": 1, "prompt over 20 tokens": 1, "response empty or over 19 tokens": 9,
                                "comparison without two ranks, or of equal responses": 2}


def test_what_is_left_out_adds_up(tmp_path):
    good = [{"prompt": f"{mark(i)}?", "completion": "Yes."} for i in range(10)]
    bad = [good[0], good[1]] + [{"prompt": prompt, "completion": response} for prompt, response in (
        ("call +44 20 7946 0958", "Yes."), (LIKE + "a", "b"), (LIKE + "b", "b"), (" ", "b"), ("x " * 60, "b"),
        ("Say nothing.", " "), ("Say much.", "x " * 60))]
    printed = prepare(own, write(tmp_path / "s.jsonl", good + bad), tmp_path / "out", valid=0.2, test=0.2, context=100,
                      vocab_size=257)
    found = records(tmp_path / "out")
    out = {"said twice": 2, "personal data in the prompt": 1, "conversation begins like another": 1,
           "empty prompt": 1, "prompt over 50 tokens": 2, "response empty or over 49 tokens": 2}  # LIKE is over 50, too
    why = dropped(printed)
    assert why.pop("label in a conversation that only gives prompts") == len(found["prompts.train"] + found["prompts.test"])
    assert why == out and "19 demonstrations, comparisons and bare prompts read" in printed
    kept = [found[name] for name in ("demonstrations.train", "prompts.train", "demonstrations.valid", "prompts.test")]
    assert sum(map(len, kept)) + sum(out.values()) == 19
    assert [r["prompt"] for r in found["prompts.valid"]] == [r["prompt"] for r in found["demonstrations.valid"]]


def test_only_who_says_the_same_twice_is_heard_once(tmp_path):
    same = {"prompt": "A tree?", "responses": ["Ash.", "Elm.", "No."], "ranks": [1, 2, 3], "labeler": "ann"}
    rows = [same, same, same | {"labeler": "ben"}, same | {"ranks": [2, 1, 3]},
            same | {"responses": ["Ash.", "Oak.", "No."]}]
    printed = prepare(own, write(tmp_path / "s.jsonl", rows), tmp_path / "out", **ALL_TRAIN)
    assert pick(records(tmp_path / "out")["comparisons.train"], "responses", "ranks", "labeler") == [
        (["Ash.", "Elm.", "No."], [1, 2, 3], "ann"), (["Ash.", "Elm.", "No."], [1, 2, 3], "ben"),
        (["Ash.", "Elm.", "No."], [2, 1, 3], "ann"), (["Ash.", "Oak.", "No."], [1, 2, 3], "ann")]
    assert dropped(printed) == {"said twice": 3}  # a comparison, its best as a demonstration, and that once more


def test_a_comparison_of_equal_responses_says_nothing(read):
    found = read(own, [{"prompt": "A tree?", "chosen": "Ash.", "rejected": "Ash."},
                       {"prompt": "A bird?", "responses": ["Wren.", "Wren.", "No."], "ranks": [1, 2, 3]}])
    assert [prompt for prompt, *_ in comparisons(found)] == ["A bird?"]


def test_beginnings_of_any_length_can_be_taken_for_the_same(read):
    rows = [{"prompt": LIKE + word} for word in ("one", "two")] + [{"prompt": "A rather short question?"},
                                                                   {"prompt": "A rather short question? Yes."}]
    assert prompts(read(own, rows, prefix=0)) == [r["prompt"] for r in rows]
    assert prompts(read(own, rows, prefix=64)) == [rows[0]["prompt"], rows[2]["prompt"]]
    assert prompts(read(own, rows + rows[:1] + [{"prompt": f"{LIKE}one "}], prefix=0)) == [r["prompt"] for r in rows]
    assert {module.Config(source="s").prefix for module in (oasst, hh, tldr)} == {64} and own.Config(source="s").prefix == 0


def test_a_users_conversation_without_labels_is_for_ppo_beside_another_with_some(read):
    found = read(own, [{"prompt": "A tree?", "completion": "Ash.", "user": "ann"}, {"prompt": "A bird?", "user": "ann"},
                       {"messages": chat("A fish?", "Carp.", "Why?")}, {"prompt": "A tree?", "user": "ann"}])
    assert [prompt for prompt, _ in demonstrations(found)] == ["A tree?", "Human: A fish?\n\nAssistant:"]
    assert prompts(found) == ["A bird?"]


def test_every_record_is_written_or_said_to_be_left_out(tmp_path):
    rows = [{"prompt": f"{mark(i)}?"} if i % 3 else {"prompt": f"{mark(i)}?", "chosen": "Yes.", "rejected": "No."}
            for i in range(60)]
    printed = prepare(own, write(tmp_path / "s.jsonl", rows), tmp_path / "out", valid=0.2, test=0.2, judge=0.3)
    found = records(tmp_path / "out")
    labeled = [name for name in found if "prompts" not in name and name != "judge/comparisons.valid"]
    asked = {r["prompt"] for name in found if "prompts" in name for r in found[name]}
    bare = [r for r in rows if r["prompt"] in asked and "chosen" not in r]
    assert sum(len(found[name]) for name in labeled) + len(bare) + sum(dropped(printed).values()) == 60 + 20


def test_a_customer_has_at_most_200_conversations(read):
    found = read(own, [{"prompt": f"{mark(i)}?", "user": "ann"} for i in range(205)] + [{"prompt": "Hi?", "user": "ben"}])
    assert Counter(r["user"] for r in found["prompts.train"]) == {"ann": 200, "ben": 1}
    assert prompts(found)[:200] == [f"{mark(i)}?" for i in range(200)]


def test_what_two_users_asked_in_the_same_words_stands_on_one_side(read):
    rows = [{"prompt": f"{mark(i % 20)}?", "completion": f"{i}", "user": f"user-{i}"} for i in range(40)]
    found = read(own, rows, test=0.5)
    assert not {r["prompt"] for r in found["prompts.test"]} & {r["prompt"] for r in found["demonstrations.train"]}


def test_the_vocabulary_is_learned_from_the_training_side_alone(read, tmp_path):
    rows = [{"prompt": f"{mark(i)} " * 30, "completion": f" {mark(i + 500)}" * 30} for i in range(40)]
    rows += [{"prompt": f"{mark(i)} " * 30, "chosen": f" {mark(i + 500)}" * 30, "rejected": " no"} for i in range(40, 80)]
    found = read(own, rows, valid=0.2, test=0.2, judge=0.2, ppo=0.3, vocab_size=2000)
    tokens = {token.decode("utf-8", "replace").strip() for token in Tokenizer.load(tmp_path / "out").tokens}
    side = sides(found)
    assert marks(side["train"]) <= tokens and not tokens & marks(side["valid"] + side["test"] + side["judge"])


def test_the_conversations_own_text_is_written_by_sides(tmp_path):
    rows = [{"prompt": f"{mark(i)} ", "responses": [f"{END}{i}", "no"], "ranks": [1, 2]} for i in range(40)]
    prepare(own, write(tmp_path / "s.jsonl", rows), tmp_path / "out", own_text=True, **FRACTIONS)
    tokenizer, side = Tokenizer.load(tmp_path / "out"), sides(records(tmp_path / "out"))
    for name in ("train", "valid"):
        texts = documents(tmp_path / f"out/pretrain.{name}.bin", tokenizer)
        here = [i for i in range(40) if mark(i) in marks(side[name])]
        assert sorted(texts) == sorted(f"{mark(i)} {text}" for i in here for text in (f"{END}{i}", "no"))
        assert readers.PretrainingText(tmp_path / f"out/pretrain.{name}.bin", tokenizer, 64)


def test_own_text_without_validation_leaves_nothing_half_done(tmp_path):
    source = write(tmp_path / "s.jsonl", [{"prompt": f"{mark(i)}?"} for i in range(8)])
    with pytest.raises(UserError, match="--own_text: no conversation is left for validation"):
        prepare(own, source, tmp_path / "out", own_text=True, valid=0.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module, changes", [
    (own, dict(source="")), (own, dict(valid=-0.1)), (own, dict(valid=0.5, test=0.3, judge=0.2)), (own, dict(ppo=1.0)),
    (own, dict(held_out=1.0)), (own, dict(held_out=-0.1)), (own, dict(vocab_size=256)), (own, dict(vocab_size=65_537)),
    (own, dict(context=3)), (own, dict(prefix=-1)), (own, dict(out="")), (own, dict(bpe="folder")),
    (hh, dict(subsets="harmless")), (hh, dict(subsets="")),
    (webtext, dict(valid_every=1)), (webtext, dict(documents=-1))])
def test_impossible_settings_are_refused(module, changes):
    base = dict(source="s") | ({} if module is webtext else dict(vocab_size=300))
    with pytest.raises(ValueError, match="--"):
        module.Config(**base | changes)


# ---------------------------------------------------------------- text to pretrain on

@pytest.fixture
def text_folder(tmp_path):
    tokenizer = Tokenizer("small", train_bpe([f"Document {mark(i)} of some" for i in range(20)], 290))
    tokenizer.save(tmp_path / "out")
    return SimpleNamespace(out=tmp_path / "out", tokenizer=tokenizer, source=tmp_path / "source", path=tmp_path)


def read_text(folder, source=None, **config):
    """-> what was printed, {"train": documents, "valid": documents}"""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        webtext.main(webtext.Config(source=str(source or folder.source), out=str(folder.out), **config))
    assert Tokenizer.load(folder.out).fingerprint == folder.tokenizer.fingerprint
    return printed.getvalue(), {split: documents(folder.out / f"pretrain.{split}.bin", folder.tokenizer)
                                for split in ("train", "valid")}


def documents(path, tokenizer):
    """The texts of a pretrain.*.bin: what stands between the end-of-text tokens, of which the last ends the file."""
    ids, texts = np.fromfile(path, dtype=np.uint16).tolist(), [[]]
    for i in ids:
        texts.append([]) if i == tokenizer.end_of_text else texts[-1].append(i)
    assert texts.pop() == []
    return [tokenizer.decode(ids) for ids in texts]


def test_webtext_keeps_every_document_once_and_every_nth_one_for_validation(text_folder):
    texts = [f"Document {mark(i)}\nof some length, é 🙂. " for i in range(20)]
    write(text_folder.source / "b.jsonl", [{"text": text, "id": 1} for text in texts[2:8]])
    write(text_folder.source / "c.jsonl.gz", [{"text": text} for text in texts[8:]])
    for name, text in (("a.txt", texts[0]), ("deep/d.txt", texts[1])):
        (text_folder.source / name).parent.mkdir(exist_ok=True)
        (text_folder.source / name).write_text(text)
    (text_folder.source / "notes.md").write_text("not read")
    printed, parts = read_text(text_folder, valid_every=5)
    assert Counter(parts["train"] + parts["valid"]) == Counter(texts)
    order = [texts[0], *texts[2:], texts[1]]  # by file name
    assert parts == {"valid": order[::5], "train": [text for i, text in enumerate(order) if i % 5]}
    for split in parts:
        size = (text_folder.out / f"pretrain.{split}.bin").stat().st_size // 2
        assert f"pretrain.{split}.bin: {size:,} tokens" in printed
        readers.PretrainingText(text_folder.out / f"pretrain.{split}.bin", text_folder.tokenizer, 64)
    assert printed.endswith("left out: nothing\n")


def test_webtext_the_end_of_one_long_text_is_for_validation(text_folder):
    text = "".join(f"{i} is {mark(i)}. " for i in range(100))[:1000]
    text_folder.source.write_text(text)
    assert read_text(text_folder, valid_every=20)[1] == {"train": [text[:950]], "valid": [text[950:]]}


def test_webtext_documents_that_begin_alike_are_there_once_and_empty_ones_not_at_all(text_folder):
    texts = ["", "one", LIKE + "a", " one\n", LIKE + "b", "one and a half", " \n", LIKE[:64], LIKE[:63], "two"]
    source = write(text_folder.path / "s.jsonl", [{"text": text} for text in texts])
    printed, parts = read_text(text_folder, source, valid_every=2)
    assert parts["valid"] + parts["train"] == ["one", "one and a half", "two", LIKE + "a", LIKE[:63]]
    assert printed.endswith("left out: 2 empty, 3 begins like an earlier one\n")


def test_webtext_no_text_ends_a_document(text_folder):
    texts = [f"{END}{i}{END} a {END}" for i in range(6)] + [END]
    parts = read_text(text_folder, write(text_folder.path / "s.jsonl", [{"text": text} for text in texts]), valid_every=3)[1]
    assert parts == {"valid": [texts[0], texts[3], texts[6]], "train": [texts[1], texts[2], texts[4], texts[5]]}
    text_folder.source.write_text(f"one {END} two {END}" * 50)
    assert [len(part) for part in read_text(text_folder)[1].values()] == [1, 1]


@pytest.mark.parametrize("most, left", [(0, 9), (4, 4), (20, 9)])
def test_webtext_so_many_documents_are_read_and_no_more(text_folder, most, left):
    rows = [{"text": text} for i in range(9) for text in (f"text {i}", f"text {i}", "")]
    parts = read_text(text_folder, write(text_folder.path / "s.jsonl", rows), documents=most, valid_every=3)[1]
    assert sorted(parts["train"] + parts["valid"]) == [f"text {i}" for i in range(left)]


def test_webtext_joins_a_dataset_that_is_there_and_changes_nothing_of_it(tmp_path):
    prepare(own, write(tmp_path / "s.jsonl", [{"prompt": f"{mark(i)}?"} for i in range(9)]), tmp_path / "out")
    before = contents(tmp_path / "out")
    folder = SimpleNamespace(out=tmp_path / "out", tokenizer=Tokenizer.load(tmp_path / "out"))
    source = write(tmp_path / "texts.jsonl", [{"text": f"{i} times"} for i in range(9)])
    first = read_text(folder, source, valid_every=3)[1]
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"pretrain.train.bin", "pretrain.valid.bin"}
    assert read_text(folder, source, valid_every=3)[1] == first and contents(tmp_path / "out") == after
    prepare(own, tmp_path / "s.jsonl", tmp_path / "out")  # the same vocabulary again: the text still fits
    assert contents(tmp_path / "out") == after


@pytest.mark.parametrize("name, content, message", [
    ("s.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": 3}\n', "s.jsonl:3: no 'text', or it is no string"),
    ("s.jsonl", '{"text": "a"}\n{"text": "b"}\n{"title": "c"}\n', "s.jsonl:3: no 'text'"),
    ("s.jsonl", '{"text": "a"}\n{"text": "b"}\nc\n', "s.jsonl:3: not JSON"),
    ("s.jsonl", '{"text": "a"}\n["b"]\n', "s.jsonl:2: not a JSON object"),
    ("s.txt", b"caf\xe9", "s.txt: not UTF-8"),
    ("s.jsonl", b"\x00\xff\xfe\n", "s.jsonl:1: not JSON"),
    ("s.jsonl.gz", b"\x00\xff\xfe\n", "s.jsonl.gz:1: damaged gzip"),
    ("s.jsonl", "", "no document"),
    ("s.jsonl", '{"text": " "}\n', "no document"),
])
def test_webtext_bad_input_is_named_and_nothing_is_written(text_folder, name, content, message):
    path = text_folder.path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = contents(text_folder.out)
    with pytest.raises(UserError, match=message) as error:
        read_text(text_folder, path)
    assert "\n" not in str(error.value) and contents(text_folder.out) == before


def test_webtext_a_source_that_is_not_there_or_holds_no_text_is_named(text_folder):
    (text_folder.path / "empty").mkdir()
    for source in ("nowhere.txt", "empty"):
        with pytest.raises(UserError, match=f"{source} (is missing|holds no file)"):
            read_text(text_folder, text_folder.path / source)


def test_webtext_one_document_is_too_few_and_nothing_is_written(text_folder):
    before = contents(text_folder.out)
    with pytest.raises(UserError):
        read_text(text_folder, write(text_folder.path / "s.jsonl", [{"text": "a"}]))
    assert contents(text_folder.out) == before


@pytest.mark.parametrize("text", ["", "short"])
def test_webtext_one_text_without_enough_in_it_is_refused(text_folder, text):
    text_folder.source.write_text(text)
    with pytest.raises(UserError):
        read_text(text_folder)


# ---------------------------------------------------------------- what is published

HUB = "https://huggingface.co/datasets"
AZURE = "https://openaipublic.blob.core.windows.net"


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """publish(files): download.fetch finds {the end of an address: rows}. Returns what will have been asked for, in order:
    (address, whether its checksum is known)."""
    def publish(files):
        fetched = []

        def fetch(url, path, sha256=None):
            (rows,) = [rows for end, rows in files.items() if url.endswith(end)]
            fetched.append((url, sha256))
            assert Path(path).is_relative_to(tmp_path / "cache/instructgpt") and not Path(path).exists()
            return write(Path(path), rows)
        monkeypatch.setattr(download, "fetch", fetch)
        return fetched
    monkeypatch.setattr(download, "HUB", "https://huggingface.co")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return publish


def is_sha256(text):
    return re.fullmatch("[0-9a-f]{64}", text or "") is not None


def test_oasst_without_a_source_the_published_trees_are_fetched(publish, tmp_path):
    asked_for = publish({"oasst_ready.trees.jsonl.gz": [SECOND]})
    prepare(oasst, "", tmp_path / "out", **ALL_TRAIN)
    ((url, sha256),) = asked_for
    assert url.startswith(f"{HUB}/OpenAssistant/oasst1/resolve/{oasst.REVISION}/") and is_sha256(sha256)
    assert demonstrations(records(tmp_path / "out")) == [ALDER]


@pytest.mark.parametrize("subsets", ["helpful-base", "harmless-base", "harmless-base,helpful-base"])
def test_hh_without_a_source_the_subsets_asked_for_are_fetched(publish, tmp_path, subsets):
    pair_ = lambda text: [{"chosen": turns(text, "Yes."), "rejected": turns(text, "No.")}]
    asked_for = publish({f"{name}-base/{split}.jsonl.gz": pair_(f"{name} {split}?") for name in ("helpful", "harmless")
                         for split in ("train", "test")})
    prepare(hh, "", tmp_path / "out", **ALL_TRAIN, subsets=subsets)
    wanted = {f"{name}/{split}" for name in subsets.split(",") for split in ("train", "test")}
    root = f"{HUB}/Anthropic/hh-rlhf/resolve/{hh.REVISION}"
    assert {url for url, _ in asked_for} == {f"{root}/{name}.jsonl.gz" for name in wanted}
    assert all(is_sha256(sha256) for _, sha256 in asked_for) and len({sha256 for _, sha256 in asked_for}) == len(wanted)
    assert len(comparisons(records(tmp_path / "out"))) == len(wanted)


def test_tldr_without_a_source_posts_and_all_batches_are_fetched(publish, tmp_path):
    batches = [*range(3, 21), 22]
    asked_for = publish({"/tldr_3_filtered/train.jsonl": [OAK | dict(summary="An oak.")]} | {
        f"/comparisons/batch{i}.json": [compared(OAK, 0, "A.", f"{i}.", batch=f"b{i}")] for i in batches})
    prepare(tldr, "", tmp_path / "out", **ALL_TRAIN)
    assert all(url.startswith(f"{AZURE}/summarize-from-feedback/dataset") for url, _ in asked_for)
    found = records(tmp_path / "out")
    assert [r["batch"] for r in found["comparisons.train"]] == [f"b{i}" for i in batches] and len(demonstrations(found)) == 1


def test_webtext_without_a_source_the_published_sample_is_fetched(publish, text_folder):
    asked_for = publish({f"/webtext.{split}.jsonl": [{"text": f"{split} {i}"} for i in range(5)]
                         for split in ("train", "valid")})
    with contextlib.redirect_stdout(io.StringIO()):
        webtext.main(webtext.Config(out=str(text_folder.out), documents=3))
    assert {url: is_sha256(sha256) for url, sha256 in asked_for} == {
        f"{AZURE}/gpt-2/output-dataset/v1/webtext.{split}.jsonl": True for split in ("train", "valid")}
    for split in ("train", "valid"):
        texts = documents(text_folder.out / f"pretrain.{split}.bin", text_folder.tokenizer)
        assert texts == [f"{split} {i}" for i in range(3)]


def test_webtext_no_document_for_training_begins_like_one_for_validation(publish, text_folder):  # pitfall 44
    publish({"/webtext.train.jsonl": [{"text": text} for text in ("one", "shared", "two", "shared")],
             "/webtext.valid.jsonl": [{"text": text} for text in ("shared", "other", "other")]})
    with contextlib.redirect_stdout(io.StringIO()):
        webtext.main(webtext.Config(out=str(text_folder.out)))
    found = {split: documents(text_folder.out / f"pretrain.{split}.bin", text_folder.tokenizer) for split in ("train", "valid")}
    assert found == {"train": ["one", "two"], "valid": ["shared", "other"]}


# ---------------------------------------------------------------- input that is none

GOOD = {"oasst": SECOND, "hh": {"chosen": turns("A tree?", "Ash."), "rejected": turns("A tree?", "Elm.")},
        "tldr": OAK | {"summary": "An oak."}, "jsonl": {"prompt": "A tree?", "completion": "Ash."}}


def but(row, **changes):
    return {key: value for key, value in {**row, **changes}.items() if value is not None}


BAD = [
    ("oasst", {"message_tree_id": "x"}, "a message is no JSON object"),
    ("oasst", {"prompt": "A tree?"}, "a message is no JSON object"),
    *[("oasst", tree(but(ask("A tree?"), **{key: None})), f"a message has no '{key}'")
      for key in ("text", "role", "lang", "replies")],
    ("oasst", tree(ask(3)), "a message has no 'text', or it is no str"),
    ("oasst", tree(ask("A tree?") | {"replies": {}}), "a message has no 'replies', or it is no list"),
    ("oasst", tree(ask("A tree?", "Ash.")), "a message is no JSON object"),
    ("oasst", tree(ask("A tree?", say("Ash.", ask("Why?", say(None))))), "a message has no 'text'"),
    ("oasst", tree(message("system", "Hm")), "role 'system' is neither prompter nor assistant"),
    ("oasst", tree(ask("A tree?", message("user", "Hm"))), "role 'user' is neither"),
    ("hh", {"chosen": turns("A tree?", "Ash.")}, "'rejected' is no conversation of Human and Assistant"),
    ("hh", {"rejected": turns("A tree?", "Ash.")}, "'chosen' is no conversation"),
    ("hh", {"chosen": turns("A tree?", "Ash."), "rejected": ["x"]}, "'rejected' is no conversation"),
    ("hh", {"chosen": "Ash", "rejected": "Elm"}, "'chosen' is no conversation"),
    ("hh", {"chosen": turns("A tree?"), "rejected": turns("A tree?", "Elm.")}, "'chosen' is no conversation"),
    *[("tldr", but(GOOD["tldr"], **{key: None}), f"'{key}'") for key in ("id", "subreddit", "title", "post", "summary")],
    ("tldr", but(GOOD["tldr"], post=["x"]), "the post has no 'post', or it is no string"),
    ("tldr", but(GOOD["tldr"], summary=1), "no 'summary', or it is no string"),
    ("tldr", but(compared(OAK, 0, "A", "B"), info=None), "a comparison has an 'info' and a 'worker'"),
    ("tldr", but(compared(OAK, 0, "A", "B"), worker=None), "a comparison has an 'info' and a 'worker'"),
    ("tldr", compared(OAK, 0, "A", "B", worker=7), "a comparison has an 'info' and a 'worker'"),
    ("tldr", compared({"id": "x"}, 0, "A", "B"), "the post has no 'subreddit'"),
    *[("tldr", compared(OAK, choice, "A", "B"), "'choice' the index of the better one")
      for choice in (2, -1, "0", 0.0, True, None)],
    ("tldr", compared(OAK, 0, "A"), "a list of two texts or more"),
    ("tldr", compared(OAK, 0, "A", 5), "a list of two texts or more"),
    ("tldr", compared(OAK, 0, "A", "B") | {"summaries": "AB"}, "a list of two texts or more"),
    ("tldr", compared(OAK, 0, "A", "B") | {"summaries": ["A", "B"]}, "a list of two texts or more"),
    ("jsonl", {"text": "x"}, "neither 'prompt' nor 'messages'"),
    ("jsonl", {"prompt": 3}, "'prompt' is neither a string nor a list of messages"),
    ("jsonl", {"prompt": []}, "'prompt' is neither a string nor a list of messages"),
    ("jsonl", {"prompt": ["x"]}, "a message is an object with a 'content', a string"),
    ("jsonl", {"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "an object with a 'content', a string"),
    ("jsonl", {"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool' is none of system, user, assistant"),
    ("jsonl", {"messages": [{"content": "x"}]}, "the role None is none of"),
    ("jsonl", {"messages": []}, "no message of the user"),
    ("jsonl", {"messages": chat("Ash.", first="assistant")}, "no message of the user"),
    ("jsonl", {"prompt": "x", "completion": None}, "a reply is neither a string nor messages"),
    ("jsonl", {"prompt": chat("x", "y"), "completion": "z"}, "'prompt' ends with the assistant's turn, not the user's"),
    ("jsonl", {"messages": "x"}, "'messages' is no list"),
    ("jsonl", {"prompt": "x", "messages": chat("x", "y")}, "'prompt' and 'messages' are of two formats"),
    ("jsonl", {"prompt": "x", "completion": "y", "chosen": "y", "rejected": "z"}, "are of two formats"),
    ("jsonl", {"prompt": "x", "response": "y", "responses": ["y", "z"], "ranks": [1, 2]}, "are of two formats"),
    ("jsonl", {"prompt": "x", "rejected": "y"}, "a reply is neither"),
    ("jsonl", {"prompt": "x", "ranks": [1, 2]}, "'responses' is a list of two or more"),
    ("jsonl", {"prompt": "x", "completion": chat("y")}, "messages that end with the assistant's"),
    ("jsonl", {"prompt": "x", "chosen": "y"}, "a reply is neither"),
    ("jsonl", {"chosen": chat("a", "b"), "rejected": chat("c", "d")}, "do not begin with the same messages"),
    ("jsonl", {"chosen": chat("a", "b"), "rejected": "d"}, "do not begin with the same messages"),
    ("jsonl", {"prompt": "x", "responses": ["a"], "ranks": [1]}, "'responses' is a list of two or more"),
    ("jsonl", {"prompt": "x", "responses": "ab", "ranks": [1, 2]}, "'responses' is a list of two or more"),
    ("jsonl", {"prompt": "x", "responses": ["a", 2], "ranks": [1, 2]}, "a reply is neither"),
    *[("jsonl", {"prompt": "x", "responses": ["a", "b"], "ranks": ranks}, "'ranks' is a list of whole numbers, one a resp")
      for ranks in ([1], [1, 2, 3], [1, 2.0], [1, "2"], [True, False], None, {}, 12)],
    *[("jsonl", {"prompt": "x", key: 3}, f"'{key}' is no string") for key in ("user", "labeler", "use_case")],
    *[(name, line, message) for name in READERS for line, message in (
        ("{", "not JSON"), ('"text"', "not a JSON object"), ("[1]", "not a JSON object"), ("null", "not a JSON object"),
        ("[" * 100_000, "not JSON"), ("9" * 5000, "not JSON"))],
]


@pytest.mark.parametrize("name, row, message", BAD)
def test_a_line_that_is_none_is_named_and_nothing_is_written(tmp_path, name, row, message):
    source = write(tmp_path / "source.jsonl", [GOOD[name], GOOD[name], row, GOOD[name]])
    with pytest.raises(UserError, match=f"source.jsonl:3: .*{message}") as error:
        prepare(READERS[name], source, tmp_path / "out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("file, content, message", [
    ("s.jsonl.gz", lambda good: gzip.compress(good * 50)[:-9], r"s.jsonl.gz:\d+: damaged gzip"),
    ("s.jsonl.gz", lambda good: good, "s.jsonl.gz:1: damaged gzip"),
    ("s.jsonl.gz", lambda good: gzip.compress(good)[:14] + b"\x00\xff" * 20, r"s.jsonl.gz:\d+: damaged gzip"),
    ("s.jsonl", lambda good: gzip.compress(good), "s.jsonl:1: not JSON"),
    ("s.jsonl", lambda good: good + b"\x00\xff\xfe\x80" * 9, "s.jsonl:2: not JSON"),
    ("s.jsonl", lambda good: good + good.replace(b"A", b"\xff"), "s.jsonl:2: not JSON"),
    ("s.jsonl", lambda good: b"", "s.jsonl: no records"),
    ("s.jsonl", lambda good: b"\n \n", "s.jsonl: no records"),
])
def test_a_file_that_is_none_is_named_and_nothing_is_written(tmp_path, name, file, content, message):
    (tmp_path / file).write_bytes(content(json.dumps(GOOD[name]).encode() + b"\n"))
    with pytest.raises(UserError, match=message) as error:
        prepare(READERS[name], tmp_path / file, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(UserError, match="nowhere.jsonl is missing"):
        prepare(READERS[name], tmp_path / "nowhere.jsonl", tmp_path / "out")


@pytest.mark.parametrize("name", READERS)
def test_a_dataset_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path, name):
    text = "x ann@example.com"
    row = {"oasst": tree(ask(text, say("y"))), "hh": {"chosen": turns(text, "y"), "rejected": turns(text, "z")},
           "tldr": post("x", text, summary="y"), "jsonl": {"prompt": text}}[name]
    with pytest.raises(UserError, match="s.jsonl: nothing is left to train on; .*personal data in the prompt"):
        prepare(READERS[name], write(tmp_path / "s.jsonl", [row]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [oasst, hh, tldr, own, webtext])
@pytest.mark.parametrize("arguments, message", [
    (["--source", "s.jsonl"], "s.jsonl:2: not JSON"), (["--sauce", "s"], "--sauce"), (["--valid", "x"], "--valid")])
def test_the_command_line_says_what_is_wrong_in_its_last_line(module, arguments, message, tmp_path, monkeypatch, capsys):
    name = module.__name__.split(".")[1]
    (tmp_path / "s.jsonl").write_text(json.dumps(GOOD.get(name, {"text": "a"})) + "\nnothing\n")
    Tokenizer("bytes", train_bpe([], 257)).save(tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments, "--out", "out"])
    with pytest.raises(SystemExit) as stop:
        common.config.launch(module.main, module.Config)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("prepare.py: ") and message in last
    assert contents(tmp_path / "out") == before


# ---------------------------------------------------------------- lines of any shape

WORDS = ["user", "assistant", "system", "prompter", "en", "A tree?", "Ash.", "", " ", "mail a@b.cd", turns("A?", "B."), LIKE]
text = st.sampled_from(WORDS) | st.text(st.characters(), max_size=12)
scalar = st.none() | st.booleans() | st.integers(-3, 5) | st.integers() | st.floats() | text
nested = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)
junk = st.recursive(scalar, nested, max_leaves=5)


def shape(required, **optional):
    """Objects with these keys; one in five has another key or something else under one of its own."""
    right = st.fixed_dictionaries(required, optional=optional)
    keys = st.sampled_from([*required, *optional]) | text
    spoiled = st.builds(lambda row, key, value: row | {key: value}, right, keys, junk)
    return st.one_of(right, right, right, right, spoiled)


def tree_message(replies):
    return shape(dict(text=text, role=st.sampled_from(["prompter", "assistant"]), lang=st.just("en"), replies=replies),
                 rank=st.integers(-1, 3), deleted=st.booleans(), review_result=st.booleans(), synthetic=st.booleans())


def said_by(*roles):
    return shape(dict(role=st.sampled_from(roles), content=text))


some = st.lists(said_by("system", "user", "assistant"), max_size=3)
asked = text | st.builds(lambda before, last: [*before, last], some, said_by("user"))
answered = text | st.builds(lambda before, last: [*before, last], some, said_by("assistant"))
ends = st.sampled_from(["B.", "C.", " ", ""]) | text
beginnings = st.sampled_from([("A?",), ("A?", "B.", "C?"), ("mail a@b.cd",)])
pair = st.builds(lambda before, a, b: {"chosen": turns(*before, a), "rejected": turns(*before, b)}, beginnings, ends, ends)
of_messages = st.recursive(tree_message(st.just([])), lambda inner: tree_message(st.lists(inner, max_size=3)), max_leaves=8)
of_post = dict(id=text, subreddit=text, title=text, post=text)
three = partial(st.lists, min_size=3, max_size=3)
about = dict(user=text, labeler=text, use_case=text, opening=junk, asks=junk)
ANY = {
    "oasst": shape(dict(prompt=of_messages), message_tree_id=text),
    "hh": st.one_of(*[pair] * 20, shape(dict(chosen=text, rejected=text))),
    "tldr": shape(of_post | dict(summary=text)) | shape(
        dict(info=shape(of_post), summaries=three(shape(dict(text=text))), choice=st.integers(0, 2), worker=text),
        batch=text),
    "jsonl": st.one_of([shape(keys, **about) for keys in (
        dict(prompt=asked), dict(prompt=asked, completion=answered), dict(prompt=asked, chosen=answered, rejected=answered),
        dict(prompt=asked, responses=three(answered), ranks=three(st.integers(-1, 3))),
        dict(messages=st.builds(lambda first, rest: [first, *rest], said_by("user"), some)))]),
}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_line_is_read_or_refused_in_words(name, data):
    rows = data.draw(st.lists(ANY[name], min_size=1, max_size=3)) + data.draw(st.sampled_from([[]] * 4 + [[None]]))
    rows = [data.draw(junk) if row is None else row for row in rows]
    config = data.draw(st.sampled_from([ALL_TRAIN, dict(valid=0.3, test=0.2, judge=0.3), dict(ALL_TRAIN, own_text=True)]))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            prepare(READERS[name], write(Path(folder) / "s.jsonl", rows), out, **config, context=64)
        except UserError as error:
            assert "\n" not in str(error) and not out.exists()
        else:
            assert records(out)


# ---------------------------------------------------------------- the real files

REAL = ROOT.parent / "shared/real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    for name in ("vocab.bpe", "encoder.json"):
        (folder / name).write_bytes((REAL / f"gpt2.{name}").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "cache"))
        yield str(folder)


def conversations(node, before=""):
    """{prompt: [(text, rank) of each wanted reply]} of a tree, and of all that follows its root."""
    wanted = lambda m: not m["deleted"] and m["review_result"] is not False and m["lang"] == "en"
    if not wanted(node):
        return {}
    who = "Human" if node["role"] == "prompter" else "Assistant"
    here = f"{before}{who}: {node['text'].strip()}\n\n"
    children = [child for child in node["replies"] if wanted(child)]
    found = {f"{here}Assistant:": [(" " + c["text"].strip(), c.get("rank")) for c in children if c["role"] == "assistant"]
             } if who == "Human" else {}
    for child in children:
        found |= conversations(child, here)
    return found


@needs_real
def test_real_oasst_ranks_are_those_of_its_trees(tmp_path, bpe):
    source = REAL / "oasst.en_100_trees.jsonl"
    printed = prepare(oasst, source, tmp_path / "out", bpe=bpe, vocab_size=0, ppo=0.0)
    found = records(tmp_path / "out")
    trees = [json.loads(line) for line in source.read_text().splitlines()]
    truth = {prompt: replies for tree_ in trees for prompt, replies in conversations(tree_["prompt"]).items()}
    assert "vocabulary gpt2 of 50,257" in printed and Tokenizer.load(tmp_path / "out").name == "gpt2"
    ranked = found["comparisons.train"] + found["comparisons.valid"] + found["judge/comparisons.train"]
    possible = {prompt for prompt, replies in truth.items() if len({rank for _, rank in replies if rank is not None}) > 1}
    tested = {r["prompt"] for r in found["prompts.test"]}
    assert 0.8 * len(possible) < len(ranked) + len(tested & possible) <= len(possible) and len(ranked) > 100
    for r in ranked:
        original = dict(truth[r["prompt"]])
        assert len(r["responses"]) > 1
        for (a, i), (b, j) in itertools.permutations(zip(r["responses"], r["ranks"]), 2):
            assert (original[a] < original[b]) == (i < j)
    shown = found["demonstrations.train"] + found["demonstrations.valid"] + found["judge/demonstrations.train"]
    assert len(shown) > 100
    for r in shown:
        ranks = [rank for _, rank in truth[r["prompt"]] if rank is not None]
        assert dict(truth[r["prompt"]])[r["response"]] == (min(ranks) if ranks else None)
    assert {r["prompt"] for rows in found.values() for r in rows} <= truth.keys()


@needs_real
def test_real_hh_keeps_nearly_all_and_ranks_the_chosen_first(tmp_path, bpe):
    source = REAL / "hh-rlhf.harmless-base.test.jsonl.gz"
    printed = prepare(hh, source, tmp_path / "out", bpe=bpe, vocab_size=0, test=0.0, ppo=0.0)
    found = records(tmp_path / "out")
    with gzip.open(source, "rt") as file:
        rows = [json.loads(line) for line in file]
    pairs = Counter((row["chosen"].strip(), row["rejected"].strip()) for row in rows)
    names = ["comparisons.train", "comparisons.valid", "judge/comparisons.train"]
    counts = [len(found[name]) for name in names]
    assert len(rows) == 2312 and sum(counts) >= 2100
    for r in (r for name in names for r in found[name]):
        assert r["ranks"] == [1, 2]
        assert (r["prompt"] + r["responses"][0], r["prompt"] + r["responses"][1]) in pairs
    chosen = {row["chosen"].strip() for row in rows}
    shown = [r for name in names for r in found[name.replace("comparisons", "demonstrations")]]
    assert len(shown) >= 2100 and all(r["prompt"] + r["response"] in chosen for r in shown)
    users = [{r["user"] for r in found[name]} for name in names]
    assert not users[0] & users[1] and not users[0] & users[2] and not users[1] & users[2]
    assert counts[1] < counts[2] < counts[0] and not found["prompts.train"]
    assert ": 4,614 demonstrations, comparisons and bare prompts read" in printed
