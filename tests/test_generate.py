"""Generating: choice of tokens, ends, repeatability, and text that comes in pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ktcore
from ktcore.models import generate, load_model
from ktcore.models.generation import Sampler

PROMPT = "And God said,"


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def prompt(model) -> list[int]:
    return model.tokenizer.encode(PROMPT)


def test_greedy_takes_the_likeliest_token_each_time(variant, prompt):
    model = load_model()
    ids = list(prompt)
    for token in generate(model, prompt, 12):
        logits = model(torch.tensor(ids))[-1]
        assert logits[token] >= logits.max() - 1e-3 * logits.abs().max()
        ids.append(token)
    assert len(ids) == len(prompt) + 12


def test_greedy_continuation_is_that_of_transformers(model, prompt):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    reference = transformers.Qwen3MoeForCausalLM.from_pretrained(
        model.path, dtype=torch.float32, attn_implementation="eager"
    )
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=0
    )[0, len(prompt) :]
    with ktcore.use("reference"):
        assert list(generate(model, prompt, 32)) == expected.tolist()


def test_seed_repeats_the_choice(model, prompt):
    def tokens(seed):
        return list(generate(model, prompt, 24, temperature=1.0, top_k=50, top_p=0.9, seed=seed))

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


def test_narrow_choices_are_greedy(model, prompt):
    greedy = list(generate(model, prompt, 16))
    assert list(generate(model, prompt, 16, temperature=1.0, top_k=1)) == greedy
    assert list(generate(model, prompt, 16, temperature=1.0, top_p=1e-6)) == greedy
    assert list(generate(model, prompt, 16, temperature=1e-6)) == greedy


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    temperature=st.floats(0.05, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_sampled_tokens_are_allowed_ones(logits, top_k, top_p, temperature, seed):
    token = Sampler(temperature, top_k, top_p, seed)(torch.tensor(logits))
    likelier = [x for x in logits if x > logits[token]]
    if top_k:
        assert len(likelier) < top_k
    kept = sorted(logits, reverse=True)[: top_k or None]
    weights = (torch.tensor(kept, dtype=torch.float64) / temperature).softmax(-1)
    assert weights[: len(likelier)].sum() < top_p + 1e-4


def test_sampling_follows_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log()

    def counts(**settings):
        sampler = Sampler(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, **settings})
        tokens = torch.tensor([sampler(logits.clone()) for _ in range(4000)])
        return torch.bincount(tokens, minlength=4) / 4000

    assert torch.allclose(counts(), probabilities, atol=0.03)
    assert torch.allclose(counts(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert torch.allclose(counts(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    sharper = probabilities.square() / probabilities.square().sum()
    assert torch.allclose(counts(temperature=0.5), sharper, atol=0.03)


# --------------------------------------------------------------------------------------- ends


def test_generation_stops_after_max_new_tokens(model, prompt):
    generation = generate(model, prompt, 5)
    assert generation.finish_reason is None
    tokens = list(generation)
    assert tokens == generation.tokens and len(tokens) == 5
    assert generation.finish_reason == "length"
    assert generation.decode_steps == 4
    assert next(generation, None) is None
    assert list(generate(model, prompt, 0)) == []


def test_generation_stops_before_the_token_that_ends_a_text(prompt):
    model = load_model()
    greedy = list(generate(model, prompt, 10))
    end = greedy[6]
    model.eos_token_ids = frozenset({end, 999_999})
    generation = generate(model, prompt, 10)
    assert list(generation) == greedy[: greedy.index(end)]
    assert generation.finish_reason == "eos"


def test_generation_stops_where_the_context_is_full(model):
    limit = model.config.context_length
    ids = [5 + i % 100 for i in range(limit - 2)]
    generation = generate(model, ids, 10)
    # The token after the last position can still be predicted.
    assert len(list(generation)) == 3
    assert generation.finish_reason == "context"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "prompt_ids: expected at least 1 token"),
        ({"prompt_ids": [1] * 2049}, "prompt_ids: 2049 tokens do not fit .* context of 2048"),
        ({"prompt_ids": [1, 2048]}, r"prompt_ids\[1\]: expected 0 to 2047"),
        ({"prompt_ids": [-1]}, r"prompt_ids\[0\]"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt_ids": [1], **arguments})


# --------------------------------------------------------------------------- text in pieces


TEXTS = [
    "In the beginning",
    "naïve café",
    "日本語のテキスト",
    "a😀b👩‍👩‍👧c",
    "\ufffd x \ufffd",
    "tab\t\nline",
]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters(model, text):
    ids = model.tokenizer.encode(text * 5)
    stream = model.tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == text * 5
    assert sum(map(bool, pieces)) > 1  # it does stream


def test_incomplete_character_is_held_back_until_the_end(model):
    ids = model.tokenizer.encode("x😀")
    stream = model.tokenizer.stream()
    assert "".join(stream.push(token) for token in ids[:-1]) == "x"
    assert set(stream.finish()) == {"\ufffd"}


@given(ids=st.lists(st.integers(0, 2047), max_size=60), split=st.integers(0, 60))
def test_any_tokens_stream_to_what_they_decode_to(model, ids, split):
    tokenizer = model.tokenizer
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
    # After a prompt of whole characters, the same goes for the rest.
    before = tokenizer.encode("word ")
    stream = tokenizer.stream(before)
    whole = "".join(map(stream.push, ids)) + stream.finish()
    assert "word " + whole == tokenizer.decode(before + ids)
