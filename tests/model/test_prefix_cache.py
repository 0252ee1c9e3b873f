"""The prefix cache: computed once, equal to the full model, checked before it is used."""

from __future__ import annotations

import pytest
import torch
from small_model import KNOWN
from torch import nn

from kvedit.model.forward import backbone, last_hidden
from kvedit.model.loading import BaseModel
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import padded, recall
from kvedit.model.targets import target_names


def examples(base: BaseModel) -> list[Example]:
    make = Renderer(base.tokenizer, context=base.context)
    return make.examples((f"What is {key}?", answer * 2) for key, answer in KNOWN.items())


def hidden_states(
    base: BaseModel, asked: list[Example], prefix_cache: PrefixCache | None = None
) -> list[torch.Tensor]:
    """The last hidden states of each example, padding left out."""
    ids = padded(asked)
    with torch.no_grad():
        hidden = last_hidden(base.model, ids, asked, prefix_cache)
    return [row[: len(one.ids)] for row, one in zip(hidden, asked, strict=True)]


def test_hidden_states_are_those_of_the_full_model(base: BaseModel) -> None:
    """Three times: computing the cache, from the cache, and from it in another order and batch."""
    prefix_cache = PrefixCache(base.model, target_names(base.model))
    asked = examples(base)
    expected = hidden_states(base, asked)
    for part in (slice(None), slice(None), slice(7, 2, -1)):
        states = hidden_states(base, asked[part], prefix_cache)
        for ours, full in zip(states, expected[part], strict=True):
            torch.testing.assert_close(ours, full, atol=1e-4, rtol=1e-4)
    assert prefix_cache.usable


def test_cached_states_are_the_input_of_the_first_edited_block(base: BaseModel) -> None:
    prefix_cache = PrefixCache(base.model, target_names(base.model))
    asked = examples(base)
    first = len(prefix_cache.below)
    for _ in range(2):
        states = prefix_cache.states(backbone(base.model), [one.ids for one in asked])
        for one, state in zip(asked, states, strict=True):
            with torch.no_grad():
                out = base.model(torch.tensor([one.ids]), output_hidden_states=True)
            torch.testing.assert_close(state, out.hidden_states[first][0], atol=1e-4, rtol=1e-4)


def test_a_text_is_computed_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix_cache = PrefixCache(base.model, target_names(base.model))
    asked = examples(base)
    recall(base.model, asked, prefix_cache)
    batches: list[int] = []
    run_below = PrefixCache._run_below

    def counted(self: PrefixCache, run: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        batches.append(len(ids))
        return run_below(self, run, ids)

    monkeypatch.setattr(PrefixCache, "_run_below", counted)
    recall(base.model, asked, prefix_cache)
    assert batches == []


def test_memory_is_bounded(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvedit.model.prefix_cache.MAX_PREFIX_CACHE_BYTES", 4096)
    prefix_cache = PrefixCache(base.model, target_names(base.model))
    asked = examples(base)
    assert recall(base.model, asked, prefix_cache) == recall(base.model, asked, prefix_cache)
    assert prefix_cache._bytes <= 4096
    assert prefix_cache._bytes == sum(state.nbytes for state in prefix_cache._states.values())


def test_a_model_that_does_not_allow_it_is_run_in_full(base: BaseModel) -> None:
    """Here the first edited block depends on more than the output of the blocks below it."""
    prefix_cache = PrefixCache(base.model, target_names(base.model))
    asked = examples(base)
    ran: list[bool] = []

    def note(module: nn.Module, args: object) -> None:
        ran.append(True)

    def depend(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        below_ran = bool(ran)
        ran.clear()
        return output if below_ran else output + 10.0

    handles = [
        prefix_cache.below[0].mlp.register_forward_pre_hook(note),
        prefix_cache._first.register_forward_hook(depend),
    ]
    try:
        full = recall(base.model, asked)
        assert recall(base.model, asked, prefix_cache) == full
    finally:
        for handle in handles:
            handle.remove()
    assert not prefix_cache.usable


def test_without_blocks_below_the_edited_ones_there_is_no_cache(base: BaseModel) -> None:
    names = ["model.layers.0.mlp.up_proj", *target_names(base.model)]
    assert not PrefixCache(base.model, names).usable
