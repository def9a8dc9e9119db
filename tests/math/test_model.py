"""The network against a loop-written one, and sampling against a loop without a cache."""

import copy
import math
import random

import numpy as np
import pytest
import torch

import model as model_module
from conftest import cpu, random_gpt
from common import layers, onednn
from data import readers
from model import GPT, PRESETS, GPTConfig, ScalarModel, generate, sample_tokens

END = 8


def slow_hidden(model, tokens):
    """The final hidden states of one row from the papers' formulas, in loops over tokens and heads."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    heads = model.config.heads
    D = model.config.width // heads

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    xs = [w["tokens.weight"][token] + w["positions.weight"][i] for i, token in enumerate(tokens)]
    for layer in range(model.config.layers):
        name = f"blocks.{layer}"
        qkv = [np.split(linear(norm(x, f"{name}.norm1"), f"{name}.attention.qkv"), 3) for x in xs]
        after = []
        for t, x in enumerate(xs):
            heads_out = []
            for h in range(heads):
                part = slice(h * D, (h + 1) * D)
                weights = np.exp([qkv[t][0][part] @ qkv[s][1][part] / math.sqrt(D) for s in range(t + 1)])
                heads_out.append(sum(a * qkv[s][2][part] for s, a in enumerate(weights / weights.sum())))
            x = x + linear(np.concatenate(heads_out), f"{name}.attention.out")
            after.append(x + linear(gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.0")), f"{name}.mlp.2"))
        xs = after
    return np.array([norm(x, "norm") for x in xs])


def slow_generate(model, prompts, count, uniforms, temperature):
    """A whole forward pass for every token; the first token whose cumulative probability exceeds the uniform number."""
    result = []
    for prompt, numbers in zip(prompts, uniforms.tolist()):
        tokens = list(prompt)
        for u in numbers[:count]:
            logits = model(torch.tensor([tokens]))[0, -1]
            if temperature == 0:
                token = int(logits.argmax())
            else:
                cumulative, token = 0.0, 0
                for i, p in enumerate((logits / temperature).softmax(-1).tolist()):
                    token, cumulative = i, cumulative + p
                    if cumulative > u:
                        break
            tokens.append(token)
            if token == END:
                break
        result.append(tokens[len(prompt):])
    return result


# ---------------------------------------------------------------- forward

def test_logits_equal_a_loop_written_gpt():
    model = random_gpt(dtype=torch.float64)
    tokens = [3, 1, 4, 1, 5, END, 2]
    expected = slow_hidden(model, tokens) @ model.tokens.weight.detach().numpy().T
    np.testing.assert_allclose(model(torch.tensor([tokens])).detach().numpy()[0], expected, atol=1e-12)


def test_scalar_model_gives_one_number_a_position_and_equals_the_loop():  # pitfall 31
    model = random_gpt(dtype=torch.float64, kind=ScalarModel)
    tokens = [3, 1, 4, 1, 5]
    scores = model(torch.tensor([tokens, tokens]))
    assert scores.shape == (2, 5) and model.head.out_features == 1
    expected = slow_hidden(model, tokens) @ model.head.weight.detach().numpy()[0] + model.head.bias.item()
    np.testing.assert_allclose(scores[1].detach().numpy(), expected, atol=1e-12)


def test_padding_behind_a_row_changes_nothing_in_it():  # pitfall 4
    for kind in (GPT, ScalarModel):
        model = random_gpt(dtype=torch.float64, kind=kind)
        alone = model(torch.tensor([[1, 2, 3]]))
        padded = model(torch.tensor([[1, 2, 3, END, END], [4, 5, 6, 7, 0]]))[:1, :3]
        torch.testing.assert_close(padded, alone, rtol=0, atol=1e-12)


def test_the_future_has_no_influence_on_the_past():
    model = random_gpt(dtype=torch.float64)
    a, b = model(torch.tensor([[1, 2, 3, 4], [1, 2, 7, 0]]))
    assert torch.equal(a[:2], b[:2]) and not torch.allclose(a[2], b[2])


@pytest.mark.parametrize("at_once", [2**25, 18])  # all logits, and those of two positions
@pytest.mark.parametrize("placed", [False, True])
def test_logprobs_at_positions_are_those_of_the_tokens_that_follow(at_once, placed):  # pitfall 3
    model = random_gpt(dtype=torch.float64)
    if placed:
        model = cpu(logits_memory=at_once / 2**28).place(model)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    positions = torch.tensor([[0, 1], [0, 0]])
    logits = model(tokens) / 0.7
    expected = torch.stack([logits[0, 0].log_softmax(-1)[2], logits[0, 1].log_softmax(-1)[3], logits[1, 0].log_softmax(-1)[5]])
    expected.dot(torch.tensor([1.0, 2.0, 3.0]).double()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logprobs = model(tokens, positions, 0.7).flatten()[:3]  # the last is one of the second row once more
    torch.testing.assert_close(logprobs, expected)
    logprobs.dot(torch.tensor([1.0, 2.0, 3.0]).double()).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_with_a_large_vocabulary_padding_has_no_logits_and_a_logprob_of_0(monkeypatch):
    """Prompts of one and of three tokens, responses of four and two: the first row begins at position 0, the second is padded."""
    batch = readers.make_batch([([1], [2, 3, 4, END]), ([5, 6, 7], [0, END])], END)
    results, rows = [], []
    for many in (layers.MANY_LOGITS, 1):
        monkeypatch.setattr(layers, "MANY_LOGITS", many)
        model = cpu().place(random_gpt(dtype=torch.float64))
        unembed = model.unembed
        monkeypatch.setattr(model, "unembed", lambda hidden: rows.append(len(hidden)) or unembed(hidden))
        logprobs = model(batch.tokens, batch.positions, 0.7)
        torch.where(batch.mask, logprobs, 0.0).mul(torch.arange(8).view(2, 4)).sum().backward()
        results.append((logprobs[batch.mask].detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0])
    assert rows == [8, 6] and logprobs[1, 2:].tolist() == [0, 0]


def test_there_are_never_more_logits_than_allowed(monkeypatch):
    model, sizes = cpu(logits_memory=18 / 2**28).place(random_gpt()), []
    unembed = model.unembed
    monkeypatch.setattr(model, "unembed", lambda hidden: sizes.append(hidden.shape[0] * 9) or unembed(hidden))
    model(torch.randint(9, (3, 8)), torch.arange(7).repeat(3, 1)).sum().backward()
    assert max(sizes) == 18 and sum(sizes) == 2 * 21 * 9  # once forward, once more backward


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")


@pytest.fixture
def every_weight_is_large(monkeypatch):
    monkeypatch.setattr(onednn, "LARGE", 1)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_have_the_precision_of_autocast_but_the_unembedding_float32(dtype, every_weight_is_large):
    model = random_gpt()
    packed_layer = model.blocks[0].attention.qkv
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16), onednn.packed(model):
        assert model.last_layer.packed.dtype == torch.float32
        if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert packed_layer.packed.dtype == dtype and type(packed_layer) is onednn.PackedLinear


@needs_onednn
def test_only_large_weights_on_a_cpu_are_packed():
    model = GPT(GPTConfig(vocab_size=600, context=8, layers=1, heads=1, width=1024))  # the MLP has 4 Mi numbers
    assert not onednn.can_be_packed(model.blocks[0].mlp[0].weight.to("meta"), torch.float32)  # as on an Apple GPU
    with onednn.packed(model):
        assert [type(m) for m in model.blocks[0].mlp if isinstance(m, torch.nn.Linear)] == [onednn.PackedLinear] * 2
    small = random_gpt()
    with onednn.packed(small):
        assert not any(isinstance(m, onednn.PackedLinear) for m in small.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_and_scores_are_computed_in_float32_under_autocast(dtype):  # pitfall 42
    for kind in (GPT, ScalarModel):
        model = random_gpt(kind=kind)
        weight, bias = (model.tokens.weight, 0) if kind is GPT else (model.head.weight, model.head.bias)
        with torch.no_grad():
            model.norm.bias.add_(100 * weight[0])  # numbers far from 0, as GPT-2's logits are
            tokens = torch.tensor([[1, 2, 3, 4]])
            seen = []
            model.norm.register_forward_hook(lambda module, x, y: seen.append(y))
            with torch.autocast("cpu", dtype):
                result = model(tokens)  # (1, 4, V) or (1, 4)
            expected = seen[0].double() @ weight.double().T + bias  # (1, 4, V or 1)
        assert result.dtype == torch.float32 and expected.abs().max() > 30
        torch.testing.assert_close(result, expected.view(result.shape).float(), rtol=1e-5, atol=1e-5)


def test_logprobs_under_autocast_do_not_depend_on_how_far_from_zero_the_logits_lie():  # pitfall 42
    near = random_gpt()
    far = copy.deepcopy(near)
    with torch.no_grad():  # the last position of every vector: the same for all tokens, so it shifts logits and no more
        for model, shift in ((near, 0.0), (far, -100.0)):
            model.norm.weight[-1], model.norm.bias[-1], model.tokens.weight[:, -1] = 0.0, shift, 1.0
        tokens = torch.randint(9, (4, 20), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            positions = torch.arange(19).repeat(4, 1)
            assert far(tokens).max() < -80
            torch.testing.assert_close(far(tokens, positions), near(tokens, positions), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_chooses_by_float32_logits(dtype, monkeypatch):  # pitfall 42
    seen = set()
    monkeypatch.setattr(model_module, "sample_tokens", lambda logits, *rest: seen.add(logits.dtype) or sample_tokens(logits, *rest))
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        generate(random_gpt(), PROMPTS, 4, torch.rand(len(PROMPTS), 4))
    assert seen == {torch.float32}


@needs_onednn
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_packed_weights_give_the_logits_of_plain_ones_and_are_gone_afterwards(dtype, bound, every_weight_is_large):
    model, tokens = random_gpt(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        plain = model(tokens).float()
        with onednn.packed(model):
            assert type(model.last_layer) is onednn.PackedLastLayer
            torch.testing.assert_close(model(tokens).float(), plain, rtol=0, atol=bound)
    assert not any(hasattr(m, "packed") for m in model.modules())
    assert {type(m) for m in model.modules()} == {type(m) for m in random_gpt().modules()}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_update_is_seen_by_the_next_sampling():
    model, uniforms = random_gpt(), torch.rand(len(PROMPTS), 8, generator=torch.Generator().manual_seed(0))
    before = generate(model, PROMPTS, 8, uniforms)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.flip(0))
    after = generate(model, PROMPTS, 8, uniforms)
    assert after == slow_generate(model, PROMPTS, 8, uniforms, 1.0) != before


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="5 tokens do not fit the context of 4"):
        random_gpt(context=4)(torch.zeros(1, 5, dtype=torch.long))


def test_dropout_works_in_training_and_not_in_evaluation():
    model, tokens = random_gpt(dropout=0.5), torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("silent", ["mlp.2", "attention.out"])
def test_dropout_acts_on_what_attention_adds_and_on_what_the_mlp_adds(silent):
    """One half of a block is silent: all that is added comes from the other. Of its numbers, dropout of 0.5 makes half 0 and
    doubles the rest. What comes in passes whole."""
    block = random_gpt(dropout=0.5, dtype=torch.float64).blocks[0]
    with torch.no_grad():
        for p in block.get_submodule(silent).parameters():
            p.zero_()
    x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = block.eval()(x) - x
    assert torch.equal(block(x) - x, plain) and (plain != 0).all()
    torch.manual_seed(0)
    added = block.train()(x) - x
    left_out = added == 0
    assert 0.4 < left_out.double().mean() < 0.6
    torch.testing.assert_close(added, 2 * plain * ~left_out)


@pytest.mark.parametrize("name, millions", [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0),
                                            ("gpt2-xl", 1557.6), ("gpt3-1.3b", 1315.7), ("gpt3-175b", 174_597)])
def test_presets_have_the_papers_numbers_of_parameters(name, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS[name]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_width_must_be_a_multiple_of_heads():
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 3"):
        GPTConfig(width=10, heads=3)


def test_a_new_scalar_head_scores_with_variance_about_one():
    torch.manual_seed(0)
    model = ScalarModel(GPTConfig(vocab_size=50, context=64, layers=2, heads=2, width=64))
    assert 0.3 < model(torch.randint(50, (64, 16))).var().item() < 3


# ---------------------------------------------------------------- one token

def test_sampling_takes_the_first_token_whose_cumulative_probability_exceeds_the_number():
    logits = torch.tensor([0.2, 0.3, 0.5]).log().repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 0.999])
    assert sample_tokens(logits, uniforms, 1.0).tolist() == [0, 0, 1, 1, 2, 2]


def test_sampling_never_takes_what_has_no_probability():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).repeat(3, 1)
    just_below_one = np.nextafter(np.float32(1), np.float32(0)).item()
    assert sample_tokens(logits, torch.tensor([0.0, 0.4, just_below_one]), 1.0).tolist() == [1, 1, 2]


def test_sampling_divides_logits_by_the_temperature():
    # Odds of 4 : 1 become 16 : 1 at temperature 1/2, so 0.9 < 16/17 still takes the first.
    logits = torch.tensor([[4.0, 1.0]]).log().repeat(2, 1)
    assert sample_tokens(logits, torch.tensor([0.9, 0.95]), 0.5).tolist() == [0, 1]
    assert sample_tokens(logits, torch.tensor([0.75, 0.85]), 1.0).tolist() == [0, 1]


# ---------------------------------------------------------------- generation

PROMPTS = [[1], [2, 3, 4, 5, 6, 7], [3, 3], [1], [7, 1, 2], [5, 5, 5, 5, 5], [1], [0, 2]]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.4])
def test_generation_with_a_cache_says_what_a_loop_without_one_says(temperature):  # pitfall 23
    for seed in (4, 9, 10, 11):
        model = random_gpt(dtype=torch.float64, seed=seed)
        uniforms = torch.rand(len(PROMPTS), 12, generator=torch.Generator().manual_seed(seed))
        said = generate(model, PROMPTS, 12, uniforms, temperature)
        assert said == slow_generate(model, PROMPTS, 12, uniforms, temperature)
        assert temperature == 0 or len(set(map(len, said))) > 2  # rows ended at different times


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_logits_that_tokens_are_sampled_from_are_those_that_scoring_sees(dtype, bound, monkeypatch):  # pitfalls 22, 23
    model, seen = random_gpt(dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=3), []
    monkeypatch.setattr(model_module, "sample_tokens", lambda logits, *rest: seen.append(logits) or sample_tokens(logits, *rest))
    prompt = [1, 2, 3]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        (said,) = generate(model, [prompt], 40, torch.rand(1, 40, generator=torch.Generator().manual_seed(5)))
        full = model(torch.tensor([prompt + said]))[0, 2:-1]
    assert len(said) > 3
    torch.testing.assert_close(torch.cat(seen), full, rtol=0, atol=bound)


def test_samples_follow_the_whole_distribution_rare_tokens_included():  # pitfall 21
    model, n = random_gpt(dtype=torch.float64), 2000
    uniforms = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    counts = np.bincount([r[0] for r in generate(model, [[1, 2]] * n, 1, uniforms)], minlength=9)
    expected = model(torch.tensor([[1, 2]]))[0, -1].softmax(-1) * n
    assert np.abs(counts - expected.detach().numpy()).max() <= 1.01


def test_generation_may_fill_the_context_to_its_last_position():
    model = random_gpt(context=8, dtype=torch.float64)
    uniforms = torch.rand(20, 5, generator=torch.Generator().manual_seed(0))
    prompts = [[1, 2, 3]] * 10 + [[4]] * 10
    said = generate(model, prompts, 5, uniforms)
    assert said == slow_generate(model, prompts, 5, uniforms, 1.0) and max(map(len, said)) == 5


def test_generation_without_room_or_without_a_prompt_is_refused():
    model, uniforms = random_gpt(context=8), torch.zeros(2, 6)
    with pytest.raises(ValueError, match="3 tokens of prompt and 6 of response do not fit the context of 8"):
        generate(model, [[1], [1, 2, 3]], 6, uniforms)
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, [[1], []], 6, uniforms)


def test_a_response_ends_with_the_end_of_text_or_at_the_limit():
    said = generate(random_gpt(), [[1]] * 50, 6, torch.rand(50, 6, generator=torch.Generator().manual_seed(0)))
    for response in said:
        assert END not in response[:-1] and (response[-1] == END or len(response) == 6)
    assert {r[-1] == END for r in said} == {True, False}


def test_generation_leaves_dropout_out_and_the_model_in_the_mode_it_was_in():  # pitfall 1
    model, uniforms = random_gpt(dropout=0.5), torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    model.train()
    first = generate(model, PROMPTS, 12, uniforms)
    assert model.training and first == generate(model, PROMPTS, 12, uniforms)
    model.eval()
    assert first == generate(model, PROMPTS, 12, uniforms) and not model.training


def test_a_response_does_not_depend_on_the_company_it_is_sampled_in():
    model = random_gpt(dtype=torch.float64)
    uniforms = torch.rand(len(PROMPTS), 12, generator=torch.Generator().manual_seed(1))
    together = generate(model, PROMPTS, 12, uniforms)
    assert together == [generate(model, [p], 12, uniforms[i : i + 1])[0] for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("every", [1, 3, 8])
def test_a_large_batch_of_mixed_prompts_says_what_each_says_alone(every, monkeypatch):
    """Prompts of many lengths, equal ones among them; finished rows are dropped."""
    monkeypatch.setitem(model_module.CHECK_EVERY, "cpu", every)
    model, rows = random_gpt(dtype=torch.float64, seed=4), []
    draw = random.Random(5)
    prompts = [[draw.randrange(8) for _ in range(draw.choice([1, 2, 7, 8, 9, 15, 16, 17, 20]))] for _ in range(60)]
    prompts += draw.sample(prompts, 12) + [prompts[0]] * 3
    uniforms = torch.rand(len(prompts), 14, generator=torch.Generator().manual_seed(6))
    hidden = model.hidden
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", lambda tokens, *rest: rows.append(len(tokens)) or hidden(tokens, *rest))
        said = generate(model, prompts, 14, uniforms)
    assert said == slow_generate(model, prompts, 14, uniforms, 1.0)
    assert rows[0] == len(set(map(tuple, prompts)))  # each is read once
    assert rows[1] == 75 and rows[-1] < 38 and len(set(map(len, said))) > 8


def test_a_prompt_is_read_once_and_finished_rows_leave_the_batch(monkeypatch):
    model, rows = random_gpt(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: rows.append(len(tokens)) or hidden(tokens, *rest))
    generate(model, [[1, 2]] * 30 + [[3]] * 34, 20, torch.rand(64, 20, generator=torch.Generator().manual_seed(0)))
    assert rows[0] == 2 and rows[1] <= 64 and rows[-1] < 20
    assert all(later <= earlier // 2 or later == earlier for earlier, later in zip(rows[1:], rows[2:]))


def test_ranks_that_share_weights_go_on_until_all_have_finished(monkeypatch):
    model, counts, calls = random_gpt(dtype=torch.float64), [], []
    uniforms = torch.rand(len(PROMPTS), 50, generator=torch.Generator().manual_seed(1))
    alone = generate(model, PROMPTS, 50, uniforms)
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: calls.append(len(tokens)) or hidden(tokens, *rest))
    monkeypatch.setattr(model, "unfinished", lambda rows: counts.append(rows) or rows + 1)  # another rank has one
    together = generate(model, PROMPTS, 50, uniforms)
    assert together == alone and len(calls) == 50 and 0 in counts


def test_initial_weights_are_gpt2s_but_for_narrow_networks():
    torch.manual_seed(0)
    for width, std in ((64, 0.02 * math.sqrt(12)), (768, 0.02)):
        layers = 8 if width == 64 else 2
        model = GPT(GPTConfig(vocab_size=500, context=64, layers=layers, heads=4, width=width))
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                assert (p == 0).all(), name
            elif "norm" in name:
                assert (p == 1).all(), name
            else:  # what is added to the stream, 2 times a block, is smaller
                added = name.endswith(("attention.out.weight", "mlp.2.weight"))
                assert p.std().item() == pytest.approx(std / (math.sqrt(2 * layers) if added else 1), rel=0.05), name
                assert abs(p.mean().item()) < 0.05 * std
