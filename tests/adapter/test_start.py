"""The start of an adapter: the leading directions of a gradient that is never kept in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvedit.adapter import fisher, start
from kvedit.adapter.deltas import leading
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example
from kvedit.model.scoring import answer_logits
from kvedit.model.targets import target_names

TEXTS = [Example(tuple(range(9, 20 + n)), 4 + n % 3) for n in range(9)]


@pytest.fixture
def names(base: BaseModel) -> list[str]:
    return target_names(base.model)


def found(base: BaseModel, names: list[str]) -> dict[str, torch.Tensor]:
    """The gradients as they are handed over, each once."""
    gradients: dict[str, torch.Tensor] = {}

    def take(name: str, gradient: torch.Tensor) -> None:
        assert name not in gradients
        gradients[name] = gradient

    start.gradients(base.model, names, TEXTS, take)
    return gradients


def test_gradients_are_those_of_the_mean_loss(base: BaseModel, names: list[str]) -> None:
    gradients = found(base, names)
    weights = {name: base.model.get_submodule(name).weight.requires_grad_(True) for name in names}
    answers = answer_logits(base.model, TEXTS)
    torch.nn.functional.cross_entropy(answers.logits, answers.targets).backward()
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        weight.requires_grad_(False)
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-6)
        weight.grad = None


@pytest.mark.parametrize("limit", [1, 30_000, 2**30])
def test_gradients_do_not_depend_on_batches_or_passes(
    base: BaseModel, names: list[str], monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    whole = found(base, names)
    batches: list[int] = []
    real = start.backward

    def counted(model: Any, part: Any, loss: Any) -> None:
        batches.append(len(part))
        real(model, part, loss)

    monkeypatch.setattr(start, "backward", counted)
    monkeypatch.setattr(fisher, "step_tokens", lambda model: 64)
    monkeypatch.setattr(start, "MAX_GRADIENTS", limit)
    monkeypatch.setattr(start, "MAX_PASSES", len(names))
    parts = found(base, names)
    passes = sum(batches) // len(TEXTS)
    assert len(batches) >= 3 * passes and sum(batches) == passes * len(TEXTS)
    assert (passes == 1) == (limit == 2**30) and passes <= len(names)
    for name in names:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_the_start_spans_the_steepest_directions(base: BaseModel, names: list[str]) -> None:
    moments = fisher.measure(base.model, names, TEXTS)
    devices = dict.fromkeys(names, torch.device("cpu"))
    whitening = fisher.whitening(moments, devices, 0.03, 0.5)
    directions = start.steepest(base.model, whitening, TEXTS, 4)
    for name, gradient in found(base, names).items():
        left, right, values = leading(whitening[name].whiten(gradient), 4)
        torch.testing.assert_close(directions[name].values, values)
        torch.testing.assert_close(directions[name].left @ directions[name].left.T, left @ left.T)
        torch.testing.assert_close(
            directions[name].right @ directions[name].right.T, right @ right.T
        )
