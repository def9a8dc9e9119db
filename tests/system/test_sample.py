"""Talking to trained models, and one response token by token."""

import dataclasses
import html.parser
import io
import re

import pytest
import torch

import common.seeds
import sample
from common.config import UserError
from conftest import load_model, slow_logprobs
from data import dataset
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel
from paper import token_page

QUESTION = "What does the fox eat?"


@pytest.fixture
def config(chain):
    return sample.Config(models=str(chain.out / "ppo"), reward=str(chain.out / "reward"),
                         reference=str(chain.out / "sft"),
                         prompt=QUESTION, max_new_tokens=12, device="cpu")


def printed(config, capsys):
    sample.main(config)
    return capsys.readouterr().out


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(config, capsys):
    config = dataclasses.replace(config, n=3)
    first, again = printed(config, capsys), printed(config, capsys)
    assert first == again and first.count("[score ") == 3
    assert printed(dataclasses.replace(config, seed=1), capsys) != first


def test_models_answer_next_to_each_other_under_their_names(config, chain, capsys):
    paths = [str(chain.out / name) for name in ("base", "sft", "ppo")]
    text = printed(dataclasses.replace(config, models=",".join(paths), n=2), capsys)
    assert [text.count(f"{path}: ") for path in paths] == [2, 2, 2]


def test_questions_come_from_the_terminal_until_its_end(config, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\nList two foods.\n"))
    assert printed(dataclasses.replace(config, prompt=""), capsys).count("[score ") == 2


def test_without_a_reward_model_nothing_is_scored(config, capsys):
    assert "[score" not in printed(dataclasses.replace(config, reward="nowhere"), capsys)


@pytest.mark.parametrize("example, expected", [
    ("Human: Hi\n\nAssistant:", "Human: Why?\n\nAssistant:"), ("List two foods.\n", "Why?\n"), ("TL;DR:", "Why?"),
    (None, "Why?")])
def test_a_question_takes_the_form_of_the_datasets_prompts(tmp_path, example, expected):
    if example:
        (tmp_path / "prompts.test.jsonl").write_text(f'{{"prompt": {example!r}, "user": "u"}}\n'.replace("'", '"'))
    assert dataset.as_prompt("Why?", tmp_path) == expected


def test_the_token_table_holds_what_ppo_computes(config, chain, capsys, tmp_path):
    page = tmp_path / "page.html"
    lines = printed(dataclasses.replace(config, tokens=True, html=str(page)), capsys).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("token "))
    assert re.split(r"  +", lines[header]) == ["token", "log p", "log p SFT", "KL", "reward", "value",
                                               "advantage", "return"]
    rows = [[float(x) for x in line.split()[-7:]] for line in lines[header + 1 : -1]]
    tokenizer = Tokenizer.load(chain.data)
    prompt = tokenizer.encode(QUESTION + "\n")
    uniforms = torch.rand(1, 12, generator=common.seeds.generator(0, "sample", 0))
    policy = load_model(GPT, chain.out / "ppo/model.pt")
    (response,) = sample.generate(policy, [prompt], 12, uniforms)
    assert len(rows) == len(response)
    logprobs, ref = (slow_logprobs(m, prompt, response) for m in (policy, load_model(GPT, chain.out / "sft/model.pt")))
    value_model = load_model(ScalarModel, chain.out / "ppo/value.pt")
    values = value_model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].tolist()
    ended = response if response[-1] == tokenizer.end_of_text else response + [tokenizer.end_of_text]
    score = load_model(ScalarModel, chain.out / "reward/model.pt")(torch.tensor([prompt + ended]))[0, -1].item()
    beta, lam = 0.1, 0.95  # ppo.py's defaults; no discount
    rewards = [-beta * (a - b) for a, b in zip(logprobs, ref)]
    rewards[-1] += score - (response[-1] != tokenizer.end_of_text)  # ppo.py's default penalty for a truncated response is 1
    advantage, expected = 0.0, []
    for t in reversed(range(len(response))):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        advantage = rewards[t] + following - values[t] + lam * advantage
        expected.insert(0, [logprobs[t], ref[t], logprobs[t] - ref[t], rewards[t], values[t], advantage,
                            advantage + values[t]])
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected), rtol=0, atol=2e-3)
    text = page.read_text()
    assert "<script" not in text and text.count("<tr>") == len(response) + 1
    html.parser.HTMLParser().feed(text)


def test_what_a_response_says_is_text_on_the_page(tmp_path):
    table = {"advantage": [0.0, -1.0], "value": [1.0, 2.0]}
    token_page.write_token_page(tmp_path / "page.html", "<b>prompt", ["<script>", "&"], table)
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "&lt;b&gt;prompt" in text
    assert re.search(r">&amp;<", text)


@pytest.mark.parametrize("changes, message", [
    (dict(models="nowhere"), "nowhere is missing"), (dict(prompt="word " * 500), "does not fit the context"),
    (dict(max_new_tokens=10**6), "does not fit the context")])
def test_what_can_not_be_answered_is_refused_in_one_line(config, changes, message):
    with pytest.raises(UserError, match=message):
        sample.main(dataclasses.replace(config, **changes))


def test_tokens_need_the_value_function_of_a_ppo_run(config, chain):
    with pytest.raises(UserError, match="value.pt is missing"):
        sample.main(dataclasses.replace(config, models=str(chain.out / "sft"), tokens=True))
