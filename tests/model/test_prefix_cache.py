"""The blocks below the edited ones: kept once, handed on exactly, never trusted blindly."""

from __future__ import annotations

import pytest
import torch
from small_model import KNOWN
from torch import nn

from kvedit.model.loading import BaseModel
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import recall, token_scores
from kvedit.model.targets import target_names


def examples(base: BaseModel) -> list[Example]:
    make = Renderer(base.tokenizer, context=base.context)
    return make.examples((f"What is {key}?", answer * 2) for key, answer in KNOWN.items())


def test_the_shortcut_says_what_the_whole_model_says(base: BaseModel) -> None:
    prefix_cache = PrefixCache(base.model, target_names(base.model))
    asked = examples(base)
    short = token_scores(base.model, asked, prefix_cache)
    whole = token_scores(base.model, asked)
    assert prefix_cache.usable
    torch.testing.assert_close(short.losses, whole.losses, atol=0.05, rtol=0.05)
    again = token_scores(base.model, asked, prefix_cache)  # from what is kept
    assert torch.equal(again.losses, short.losses)


def test_a_text_is_computed_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix_cache = PrefixCache(base.model, target_names(base.model))
    asked = examples(base)
    recall(base.model, asked, prefix_cache)
    reached: list[int] = []
    whole = PrefixCache._reach

    def counted(self: PrefixCache, run: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        reached.append(len(ids))
        return whole(self, run, ids)

    monkeypatch.setattr(PrefixCache, "_reach", counted)
    recall(base.model, asked, prefix_cache)
    assert reached == []


def test_memory_is_bounded(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvedit.model.prefix_cache.MAX_PREFIX_CACHE_BYTES", 4096)
    prefix_cache = PrefixCache(base.model, target_names(base.model))
    asked = examples(base)
    assert recall(base.model, asked, prefix_cache) == recall(base.model, asked, prefix_cache)
    assert prefix_cache._bytes <= 4096
    assert prefix_cache._bytes == sum(state.nbytes for state in prefix_cache._kept.values())


def test_a_model_it_does_not_fit_is_run_whole(base: BaseModel) -> None:
    """Here an edited block wants more of the ones below it than what they hand on."""
    prefix_cache = PrefixCache(base.model, target_names(base.model))
    asked = examples(base)
    ran: list[bool] = []

    def note(module: nn.Module, args: object) -> None:
        ran.append(True)

    def want(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        found = bool(ran)
        ran.clear()
        return output if found else output + 10.0

    handles = [
        prefix_cache._below[0].mlp.register_forward_pre_hook(note),
        prefix_cache._first.register_forward_hook(want),
    ]
    try:
        whole = recall(base.model, asked)
        assert recall(base.model, asked, prefix_cache) == whole
    finally:
        for handle in handles:
            handle.remove()
    assert not prefix_cache.usable


def test_nothing_below_the_first_edited_block_means_no_shortcut(base: BaseModel) -> None:
    names = ["model.layers.0.mlp.up_proj", *target_names(base.model)]
    assert not PrefixCache(base.model, names).usable
