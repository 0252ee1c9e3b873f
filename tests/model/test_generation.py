"""Decoding many texts at once gives what decoding each alone does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_decoding import greedy, renderer, slow_setup, texts
from small_model import KNOWN

from kvedit.model import generation
from kvedit.model.generation import Decoding
from kvedit.model.loading import BaseModel


@slow_setup
@given(prompts=st.lists(texts, min_size=2, max_size=7), limit=st.integers(1, 20))
def test_batched_generation_is_one_by_one(base: BaseModel, prompts: list[str], limit: int) -> None:
    """Prefixes of different lengths are padded on the left; in fp32 that changes no token."""
    make = renderer(base)
    prefixes = [make.prefix(prompt) for prompt in prompts]
    together = generation.generate(base.model, prefixes, end=make.end, limit=limit)
    alone = [greedy(base, prefix, limit, make.end) for prefix in prefixes]
    assert together == alone


def test_rows_that_end_early_leave_the_batch(base: BaseModel) -> None:
    """Of many rows all but one end at once: the rest is decoded in a smaller batch."""
    make = renderer(base)
    known = [make.prefix(f"What is {key}?") for key in KNOWN]
    half = make.example("What is amber lamp?", KNOWN["amber lamp"])
    nearly = [list(half.ids[:-1])] * 6
    prefixes = [*nearly, known[3], *nearly]
    rows = generation.generate(base.model, prefixes, end=make.end, limit=20)
    assert [len(row) for row in rows] == [0] * 6 + [len(rows[6])] + [0] * 6
    assert make.text(rows[6]) == list(KNOWN.values())[3]


def test_order_is_kept_beyond_one_batch(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_BATCH_ROWS", 3)
    make = renderer(base)
    rows = generation.generate(
        base.model, [make.prefix(f"What is {k}?") for k in KNOWN], end=make.end, limit=20
    )
    assert [make.text(row) for row in rows] == list(KNOWN.values())


@slow_setup
@given(prompt=texts, limit=st.integers(1, 12))
def test_a_stream_is_the_answer(base: BaseModel, prompt: str, limit: int) -> None:
    make = renderer(base)
    prefix, end = make.prefix(prompt), frozenset({make.end})
    tokens = list(generation.stream(base.model, prefix, end=end, limit=limit))
    assert [tokens] == generation.generate(base.model, [prefix], end=end, limit=limit)
    assert "".join(generation.pieces(tokens, make.answer_text)) == make.answer_text(tokens)


@given(st.text(max_size=12))
def test_pieces_are_whole_characters(text: str) -> None:
    """Of tokens that are single bytes."""
    parts = list(generation.pieces(text.encode(), lambda ids: bytes(ids).decode(errors="replace")))
    assert "".join(parts) == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_a_character_that_never_ends_is_shown_at_the_end() -> None:
    cut = "爐".encode()[:2]
    parts = generation.pieces(b"a" + cut, lambda ids: bytes(ids).decode(errors="replace"))
    assert list(parts) == ["a", "\ufffd"]


def test_sampling_follows_its_generator_and_nothing_else(base: BaseModel) -> None:
    make = renderer(base)
    prefixes = [[make.begin]] * 8

    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return generation.generate(
            base.model, prefixes, end=make.end, limit=12, temperature=1.0, generator=generator
        )

    before = torch.random.get_rng_state()
    first = draw(1)
    torch.manual_seed(99)
    assert draw(1) == first != draw(2)
    torch.random.set_rng_state(before)
    draw(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_prefix_no_limit(base: BaseModel) -> None:
    make = renderer(base)
    assert generation.generate(base.model, [], end=make.end, limit=5) == []
    assert generation.generate(base.model, [make.prefix("x")], end=make.end, limit=0) == [[]]


def test_padding_on_the_left_moves_no_absolute_position() -> None:
    """GPT-2 adds a vector for each position, so a shifted prompt would be another prompt."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        model = GPT2LMHeadModel(config).eval()
        torch.nn.init.normal_(model.transformer.wpe.weight, std=1.0)
    prefixes = [[5], [7, 3, 9, 11, 2], [1, 2, 3], list(range(12))]
    together = generation.generate(model, prefixes, end=39, limit=10)
    alone = [generation.generate(model, [prefix], end=39, limit=10)[0] for prefix in prefixes]
    assert together == alone


@pytest.mark.parametrize("max_bytes", [generation.MAX_KV_CACHE_BYTES, 0])
def test_rows_branch(base: BaseModel, monkeypatch: pytest.MonkeyPatch, max_bytes: int) -> None:
    """Some rows leave, others go on in several ways: the logits are those of a full forward pass,
    whether the memory budget allows a cache or not.
    """
    monkeypatch.setattr(generation, "MAX_KV_CACHE_BYTES", max_bytes)
    monkeypatch.setattr(generation, "MAX_BATCH_ROWS", 4)
    make = renderer(base)
    texts = [make.prefix(f"What is {key}?") for key in ("amber lamp", "amber bell", "tide lamp")]
    texts = [text[: min(map(len, texts))] for text in texts]
    run = Decoding(base.model, texts)
    generator = torch.Generator().manual_seed(0)
    for count in (2, 9, 9, 5, 12):
        for text, logits in zip(texts, run.next_logits(), strict=True):
            full = base.model(torch.tensor([text]), use_cache=False).logits[0, -1].detach()
            torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)
        rows = torch.randint(run.rows, (count,), generator=generator)
        tokens = torch.randint(5, 60, (count,), generator=generator)
        run.append(tokens, rows)
        both = zip(rows.tolist(), tokens.tolist(), strict=True)
        texts = [[*texts[row], token] for row, token in both]
    assert run.ids.tolist() == texts
