"""The blocks below the edited ones: kept once, handed on exactly, never trusted blindly."""

from __future__ import annotations

import pytest
import torch
from small_model import KNOWN
from torch import nn

from kvedit.model.loading import BaseModel, target_names
from kvedit.model.prefix_cache import LowerHalf
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import recall, token_scores


def examples(base: BaseModel) -> list[Example]:
    make = Renderer(base.tokenizer, context=base.context)
    return make.examples((f"What is {key}?", answer * 2) for key, answer in KNOWN.items())


def test_the_shortcut_says_what_the_whole_model_says(base: BaseModel) -> None:
    lower = LowerHalf(base.model, target_names(base.model))
    asked = examples(base)
    short = token_scores(base.model, asked, lower)
    whole = token_scores(base.model, asked)
    assert lower.usable
    torch.testing.assert_close(short.losses, whole.losses, atol=0.05, rtol=0.05)
    again = token_scores(base.model, asked, lower)  # from what is kept
    assert torch.equal(again.losses, short.losses)


def test_a_text_is_computed_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = LowerHalf(base.model, target_names(base.model))
    asked = examples(base)
    recall(base.model, asked, lower)
    reached: list[int] = []
    whole = LowerHalf._reach

    def counted(self: LowerHalf, run: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        reached.append(len(ids))
        return whole(self, run, ids)

    monkeypatch.setattr(LowerHalf, "_reach", counted)
    recall(base.model, asked, lower)
    assert reached == []


def test_memory_is_bounded(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvedit.model.prefix_cache.KEPT_BYTES", 4096)
    lower = LowerHalf(base.model, target_names(base.model))
    asked = examples(base)
    assert recall(base.model, asked, lower) == recall(base.model, asked, lower)
    assert lower._bytes <= 4096
    assert lower._bytes == sum(state.nbytes for state in lower._kept.values())


def test_a_model_it_does_not_fit_is_run_whole(base: BaseModel) -> None:
    """Here an edited block wants more of the ones below it than what they hand on."""
    lower = LowerHalf(base.model, target_names(base.model))
    asked = examples(base)
    ran: list[bool] = []

    def note(module: nn.Module, args: object) -> None:
        ran.append(True)

    def want(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        found = bool(ran)
        ran.clear()
        return output if found else output + 10.0

    handles = [
        lower._below[0].mlp.register_forward_pre_hook(note),
        lower._first.register_forward_hook(want),
    ]
    try:
        whole = recall(base.model, asked)
        assert recall(base.model, asked, lower) == whole
    finally:
        for handle in handles:
            handle.remove()
    assert not lower.usable


def test_nothing_below_the_first_edited_block_means_no_shortcut(base: BaseModel) -> None:
    names = ["model.layers.0.mlp.up_proj", *target_names(base.model)]
    assert not LowerHalf(base.model, names).usable
