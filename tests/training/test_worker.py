"""A step's gradients, a batch at a time, and what is held meanwhile."""

from __future__ import annotations

import pytest
import torch
from small_model import FREE, KNOWN

from kvedit.model import scoring
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.replay.kl import ReferenceTexts, robust_mean
from kvedit.training.loops.loop import EASY_TOKEN_WEIGHT, MAX_TOKEN_SHARE, StepLoss
from kvedit.training.worker import Worker

EASING = (2.0, EASY_TOKEN_WEIGHT)
NAME = "model.layers.2.mlp.down_proj"


@pytest.fixture
def examples(base: BaseModel) -> list[Example]:
    make = Renderer(base.tokenizer, context=base.context)
    pairs = [*KNOWN.items(), *FREE]
    return make.examples((f"What is {key}?", answer) for key, answer in pairs)


def gradient(base: BaseModel) -> torch.Tensor:
    """What the backward passes since the last call have left."""
    weight = base.model.get_submodule(NAME).weight
    found, weight.grad = weight.grad, None
    return torch.zeros(0) if found is None else found


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "step_tokens", lambda model: 1)


def test_a_step_in_one_batch_is_the_weighted_mean(base: BaseModel, examples: list[Example]) -> None:
    """Each side by the sum of its weights, whatever the step before had."""
    new, earlier = examples[:5], examples[5:9]
    base.model.get_submodule(NAME).weight.requires_grad_(True)
    scores = scoring.token_scores(base.model, [*new, *earlier])
    weight = (EASING[0] - scores.token_margins).clamp(EASING[1], 1.0)
    wanted = torch.zeros(())
    for side, share in ((scores.rows < 5, 1.0), (scores.rows >= 5, 1.5)):
        total = torch.maximum(weight[side].sum(), side.sum() / MAX_TOKEN_SHARE)
        wanted = wanted + share * (weight * scores.losses)[side].sum() / total
    wanted.backward()
    expected = gradient(base)
    loss = StepLoss(new, earlier, EASING, 1.5, torch.tensor([0.3, 1.0]))
    found = Worker(base.model).backward([*new, *earlier], loss)
    assert not found.losses.requires_grad
    assert float(loss.of(found)) == pytest.approx(float(wanted.detach()), rel=1e-4)
    torch.testing.assert_close(gradient(base), expected, rtol=1e-3, atol=1e-6)


def test_batches_add_up_to_the_step(
    base: BaseModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mean weights that the step has; those of the step before are nearly these."""
    base.model.get_submodule(NAME).weight.requires_grad_(True)
    worker, new, earlier = Worker(base.model), examples[:7], examples[7:12]
    texts = [*new, *earlier]
    whole = StepLoss(new, earlier, EASING, 1.5, torch.ones(2))
    scores = worker.backward(texts, whole)
    expected = gradient(base)
    one_by_one(monkeypatch)
    loss = StepLoss(new, earlier, EASING, 1.5, whole.weights_of(scores))
    parts = worker.backward(texts, loss)
    torch.testing.assert_close(gradient(base), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(parts.margins(12), scores.margins(12), rtol=1e-3, atol=1e-3)
    assert float(loss.of(parts)) == pytest.approx(float(whole.of(scores)), rel=1e-4)


def test_the_divergence_is_a_mean_over_all_batches(
    base: BaseModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ReferenceTexts.measure(base.model, examples)
    weight = base.model.get_submodule(NAME).weight
    with torch.no_grad():
        weight.mul_(1.1)
    weight.requires_grad_(True)
    chosen = [4, 0, 7, 11]
    (3.0 * robust_mean(texts.divergences(base.model, chosen))).backward()
    expected = gradient(base)
    one_by_one(monkeypatch)
    Worker(base.model).backward_divergence(texts, chosen, 3.0)
    torch.testing.assert_close(gradient(base), expected, rtol=1e-3, atol=1e-6)


def test_only_one_batch_is_in_memory(
    base: BaseModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autograd holds for a step of many texts is what it holds for one."""
    base.model.get_submodule(NAME).weight.requires_grad_(True)
    texts = [e for e in examples if len(e.ids) == len(examples[0].ids)] or examples[:1]
    held: list[int] = []
    peaks: list[int] = []

    def keep(tensor: torch.Tensor) -> _Held:
        return _Held(tensor, held)

    one_by_one(monkeypatch)
    for count in (1, 6):
        many = (texts * 6)[:count]
        held[:] = [0, 0]
        loss = StepLoss(many, [], EASING, 1.0, torch.ones(2))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
            Worker(base.model).backward(many, loss)
        peaks.append(held[1])
    assert peaks[1] < 1.5 * peaks[0]


class _Held:
    """A saved tensor, counted as long as it is held: ``counts`` are bytes now and at most."""

    def __init__(self, tensor: torch.Tensor, counts: list[int]) -> None:
        self.tensor, self._counts = tensor, counts
        counts[0] += tensor.nbytes
        counts[1] = max(counts)

    def __del__(self) -> None:
        self._counts[0] -= self.tensor.nbytes
