"""MatrixMoments of protected text: sums that add up, measured without changing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_model import KNOWN
from torch.nn import functional

from kvedit.adapter import fisher
from kvedit.adapter.fisher import FisherMoments
from kvedit.errors import ModelError
from kvedit.model import scoring
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.model.targets import target_names


@pytest.fixture
def examples(base: BaseModel) -> list[Example]:
    make = Renderer(base.tokenizer, context=base.context)
    return make.examples([(f"What is {key}?", answer) for key, answer in KNOWN.items()])


@pytest.fixture
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is sure of what it says, so the drawn answers do not depend on the draw."""

    def first(weights: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return weights.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", first)


def same(one: FisherMoments, other: FisherMoments, tolerance: float = 1e-3) -> None:
    assert one.tokens == other.tokens
    assert one.moments.keys() == other.moments.keys()
    for name, own in one.moments.items():
        for mine, theirs in (
            (own.inputs, other.moments[name].inputs),
            (own.gradients, other.moments[name].gradients),
        ):
            assert torch.allclose(
                mine, theirs, rtol=tolerance, atol=tolerance * float(mine.abs().max())
            )


def test_measuring_two_texts_is_adding_their_moments(
    base: BaseModel, examples: list[Example], certain: None
) -> None:
    names = target_names(base.model)
    first, second = examples[:5], examples[5:12]
    both = fisher.measure(base.model, names, [*first, *second])
    one = fisher.measure(base.model, names, first)
    two = fisher.measure(base.model, names, second)
    sum_ = one.plus(two, 1.0)
    same(both, FisherMoments(sum_.moments, one.tokens + two.tokens))


def test_batches_do_not_matter(
    base: BaseModel, examples: list[Example], certain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding counts for nothing: one batch of unlike lengths is as many batches of one."""
    names = target_names(base.model)
    whole = fisher.measure(base.model, names, examples)
    monkeypatch.setattr(scoring, "MAX_BATCH_ROWS", 1)
    same(whole, fisher.measure(base.model, names, examples))


def test_moments_are_those_of_the_inputs(base: BaseModel, examples: list[Example]) -> None:
    name = target_names(base.model)[0]
    found = fisher.measure(base.model, [name], examples[:3])
    seen: list[torch.Tensor] = []
    handle = base.model.get_submodule(name).register_forward_hook(
        lambda module, args, out: seen.append(args[0].detach()[0])
    )
    with torch.no_grad():
        for example in examples[:3]:
            base.model(input_ids=torch.tensor([example.ids]))
    handle.remove()
    rows = torch.cat(seen)
    assert found.tokens == len(rows)
    assert torch.allclose(found.moments[name].inputs, rows.T @ rows, rtol=1e-3, atol=1e-2)


def test_gradients_are_those_of_the_mean_loss(base: BaseModel, examples: list[Example]) -> None:
    names = target_names(base.model)
    found = fisher.gradients(base.model, names, examples[:4])
    weight = base.model.get_submodule(names[0]).weight
    weight.requires_grad_(True)
    answers = scoring.answer_logits(base.model, examples[:4])
    torch.nn.functional.cross_entropy(answers.logits, answers.targets).backward()
    assert torch.allclose(found[names[0]], weight.grad, rtol=1e-3, atol=1e-6)


def test_measuring_changes_nothing(base: BaseModel, examples: list[Example]) -> None:
    names = target_names(base.model)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    state = torch.random.get_rng_state()
    first = fisher.measure(base.model, names, examples, seed=3)
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None and not parameter.requires_grad
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks for m in base.model.modules())
    again = fisher.measure(base.model, names, examples, seed=3)
    for name, own in first.moments.items():
        assert torch.equal(own.gradients, again.moments[name].gradients)


def test_penalty_gradients_are_half_the_gradient_of_the_penalty(
    base: BaseModel, examples: list[Example]
) -> None:
    name = target_names(base.model)[0]
    found = fisher.measure(base.model, [name], examples)
    own = found.moments[name]
    c, g = (m.double() / found.tokens for m in (own.inputs, own.gradients))
    moved = torch.randn(len(g), len(c), generator=torch.Generator().manual_seed(0)).double()
    moved.requires_grad_()
    torch.trace(g @ moved @ c @ moved.T).backward()
    slope = fisher.penalty_gradients(found, {name: moved.detach().float()})[name]
    assert moved.grad is not None
    assert torch.allclose(2 * slope.double(), moved.grad, rtol=1e-3, atol=1e-6)


def test_margins_see_what_a_certain_model_would_lose(
    base: BaseModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fisher information vanishes as answers become certain, though they may turn all the same."""
    name = target_names(base.model)[-1]
    own = fisher.answer_logits

    def surer(model: Any, part: Sequence[Example]) -> scoring.Answers:
        found = own(model, part)
        best = functional.one_hot(found.targets, found.logits.shape[1])
        return replace(found, logits=found.logits + 40 * best)

    def size(of: Any) -> float:
        found = fisher.measure(base.model, [name], examples, of=of)
        return float(found.moments[name].gradients.trace())

    unsure = size(fisher.margins)
    monkeypatch.setattr(fisher, "answer_logits", surer)
    assert size(fisher.information) < 1e-6 * unsure
    assert size(fisher.margins) > 0.1 * unsure


def test_margins_are_those_of_recall(base: BaseModel, examples: list[Example]) -> None:
    """By less than nothing is no recall: the others together may outweigh a token that leads."""
    answers = scoring.answer_logits(base.model, examples)
    ones = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(answers.targets),), generator=ones) * 2 - 1
    chances = answers.logits.softmax(1).gather(1, answers.targets[:, None])[:, 0]
    wanted = (torch.logit(chances.double()) * signs).sum()
    found = fisher.margins(answers, torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(float(wanted), rel=1e-3)


def test_moments_are_scaled_like_others(base: BaseModel, examples: list[Example]) -> None:
    """A change of each number by itself costs in the mean what it does in the other."""
    names = target_names(base.model)
    here = fisher.measure(base.model, names, examples)
    there = fisher.measure(base.model, names, examples[:5], of=fisher.margins)

    def size(found: FisherMoments) -> float:
        return sum(
            float(own.inputs.trace() * own.gradients.trace()) for own in found.moments.values()
        ) / (found.tokens**2)

    scaled = there.scaled_like(here)
    assert size(scaled) == pytest.approx(size(here), rel=1e-4) and scaled.tokens == there.tokens
    for name in names:
        assert scaled.moments[name].inputs is there.moments[name].inputs


def test_added_moments_are_weighted(base: BaseModel, examples: list[Example]) -> None:
    name = target_names(base.model)[0]
    one = fisher.measure(base.model, [name], examples[:4])
    two = fisher.measure(base.model, [name], examples[4:8])
    sum_ = one.plus(two, 20.0)
    wanted = one.moments[name].inputs + 20 * two.moments[name].inputs
    assert torch.allclose(sum_.moments[name].inputs, wanted)
    assert sum_.tokens == one.tokens


def test_moments_are_read_back_from_tensors(base: BaseModel, examples: list[Example]) -> None:
    found = fisher.measure(base.model, target_names(base.model), examples[:4])
    same(FisherMoments.from_tensors(found.to_tensors()), found, tolerance=0)


def test_wide_sides_keep_their_diagonal(
    base: BaseModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch, certain: None
) -> None:
    names = target_names(base.model)
    dense = fisher.measure(base.model, names, examples[:4])
    monkeypatch.setattr(fisher, "DENSE_LIMIT", 100)
    thin = fisher.measure(base.model, names, examples[:4])
    wide = [n for n, own in thin.moments.items() if own.inputs.ndim == 1]
    assert wide and all(n.endswith("down_proj") for n in wide)
    for name in wide:
        diagonal = dense.moments[name].inputs.diagonal()
        assert torch.allclose(thin.moments[name].inputs, diagonal, rtol=1e-3, atol=1e-5)
    whitening = fisher.whitening(thin, input_damping=0.03, gradient_damping=0.1)
    assert whitening[wide[0]].right.ndim == 1


def test_a_whitening_factor_is_the_inverse_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 12, generator=generator)
    moment = rows.T @ rows / 40
    inverse = fisher.inverse_factor(moment, 0.1).double()
    damped = moment.double()
    damped.diagonal().add_(0.1 * moment.double().diagonal().mean())
    identity = inverse @ damped @ inverse.T
    assert torch.allclose(identity, torch.eye(12).double(), atol=1e-4)
    vector = fisher.inverse_factor(torch.tensor([4.0, 0.0]), 0.5)
    assert vector.tolist() == pytest.approx([5**-0.5, 1.0])


def test_a_matrix_without_inputs_has_a_whitening_factor() -> None:
    assert torch.isfinite(fisher.inverse_factor(torch.zeros(4, 4), 0.1)).all()


def test_no_text_is_an_error(base: BaseModel) -> None:
    with pytest.raises(ModelError, match="no protected text"):
        fisher.measure(base.model, target_names(base.model), [])


def test_gradients_do_not_depend_on_the_batches(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = target_names(base.model)
    texts = [scoring.Example(tuple(range(9, 20 + n)), 4 + n % 3) for n in range(9)]
    whole = fisher.gradients(base.model, names, texts)
    asked: list[int] = []
    real = fisher.answer_logits

    def counted(model: Any, part: Any) -> Any:
        asked.append(len(part))
        return real(model, part)

    monkeypatch.setattr(fisher, "answer_logits", counted)
    monkeypatch.setattr(fisher, "batch_tokens", lambda model: 64)
    parts = fisher.gradients(base.model, names, texts)
    assert len(asked) > 2 and sum(asked) == len(texts)
    for name in names:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)
