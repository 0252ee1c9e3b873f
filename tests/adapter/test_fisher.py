"""MatrixMoments of protected text: sums that add up, measured without changing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_model import KNOWN
from torch.nn import functional

from kvedit.adapter import fisher
from kvedit.adapter.fisher import FisherMoments
from kvedit.errors import ModelError
from kvedit.model import scoring
from kvedit.model.forward import vocabulary_size
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
    same(both, replace(sum_, tokens=one.tokens + two.tokens))


def test_measuring_onto_moments_adds_to_them_and_leaves_them(
    base: BaseModel, examples: list[Example], certain: None
) -> None:
    names = target_names(base.model)
    both = fisher.measure(base.model, names, examples[:12])
    first = fisher.measure(base.model, names, examples[:5])
    before = {name: side.clone() for name, side in first.sides.items()}
    same(both, fisher.measure(base.model, names, examples[5:12], onto=first))
    assert all(first.sides[name].equal(side) for name, side in before.items())


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
    (inputs,) = found.moments[name].inputs  # one block
    assert torch.allclose(inputs, rows.T @ rows, rtol=1e-3, atol=1e-2)


def test_what_several_matrices_read_is_measured_once(
    base: BaseModel, examples: list[Example]
) -> None:
    found = fisher.measure(base.model, target_names(base.model), examples[:3])
    firsts = {name.rpartition(".")[2]: first for name, first in found.inputs_of.items()}
    assert {part: first.rpartition(".")[2] for part, first in firsts.items()} == {
        "q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj",
        "gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj",
    }  # fmt: skip
    assert len([side for side in found.sides if side.endswith(".inputs")]) == 4 * (
        len(found.inputs_of) // 7
    )


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
    c, g = (m[0].double() / found.tokens for m in (own.inputs, own.gradients))
    moved = torch.randn(len(g), len(c), generator=torch.Generator().manual_seed(0)).double()
    moved.requires_grad_()
    torch.trace(g @ moved @ c @ moved.T).backward()
    assert moved.grad is not None
    for of_outputs, gradient in ((True, moved.grad), (False, moved.grad.T)):
        rows, delta = torch.eye(len(gradient)), moved.detach().float()
        half = fisher.penalty_gradient(found, name, delta, rows, of_outputs=of_outputs)
        assert torch.allclose(2 * half.double(), gradient, rtol=1e-3, atol=1e-6)


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
        return float(found.moments[name].gradients[0].trace())

    unsure = size(fisher.margins)
    monkeypatch.setattr(fisher, "projects", lambda model: False)
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
    found = fisher.margins(answers.logits, answers.targets, torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(float(wanted), rel=1e-3)


def test_moments_are_scaled_like_others(base: BaseModel, examples: list[Example]) -> None:
    """A change of each number by itself costs in the mean what it does in the other."""
    names = target_names(base.model)
    here = fisher.measure(base.model, names, examples)
    there = fisher.measure(base.model, names, examples[:5], of=fisher.margins)

    def size(found: FisherMoments) -> float:
        return sum(
            float(own.inputs[0].trace() * own.gradients[0].trace())
            for own in found.moments.values()
        ) / (found.tokens**2)

    scaled = there.scaled_like(here)
    assert size(scaled) == pytest.approx(size(here), rel=1e-4) and scaled.tokens == there.tokens
    for name in names:
        assert scaled.moments[name].inputs is there.moments[name].inputs


def test_added_moments_are_weighted(base: BaseModel, examples: list[Example]) -> None:
    name = target_names(base.model)[0]
    one = fisher.measure(base.model, [name], examples[:4])
    two = fisher.measure(base.model, [name], examples[4:8])
    wanted = one.moments[name].inputs + 20 * two.moments[name].inputs
    sum_ = one.plus(two, 20.0)
    assert torch.allclose(sum_.moments[name].inputs, wanted)
    assert sum_.tokens == one.tokens


def test_wide_sides_keep_the_blocks_on_their_diagonal(
    base: BaseModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch, certain: None
) -> None:
    names = target_names(base.model)
    whole = fisher.measure(base.model, names, examples[:4])
    monkeypatch.setattr(fisher, "UNCUT", 50)
    monkeypatch.setattr(fisher, "BLOCK", 50)
    cut = fisher.measure(base.model, names, examples[:4])
    for name, own in cut.moments.items():
        pairs = (
            (own.inputs, whole.moments[name].inputs),
            (own.gradients, whole.moments[name].gradients),
        )
        for blocks, (dense,) in pairs:
            count, width = fisher.block_count(len(dense)), blocks.shape[1]
            assert blocks.shape == (count, width, width) and count * width == len(dense)
            for at, block in enumerate(blocks):
                part = slice(at * width, (at + 1) * width)
                scale = float(dense.abs().max())
                torch.testing.assert_close(block, dense[part, part], rtol=1e-3, atol=1e-4 * scale)
    assert any(len(own.inputs) > 1 for own in cut.moments.values())


@pytest.mark.parametrize(
    ("side", "count"),
    [(1, 1), (576, 1), (1024, 1), (1031, 1031), (1536, 3), (4864, 16), (18944, 37)],
)
def test_only_a_wide_side_is_cut_into_equal_blocks(side: int, count: int) -> None:
    assert fisher.block_count(side) == count


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(0, 999)
)
def test_blocks_are_the_matrix_with_them_on_its_diagonal(
    outs: int, out: int, intos: int, into: int, seed: int
) -> None:
    """Whitening, its gradient and the penalty's gradient, by the matrices in full."""
    generator = torch.Generator().manual_seed(seed)

    def moment(count: int, width: int) -> torch.Tensor:
        rows = torch.randn(count, 9, width, generator=generator)
        return rows.mT @ rows

    c, g = moment(intos, into), moment(outs, out)
    found = FisherMoments({"m.inputs": c, "m.gradients": g}, {"m": "m"}, 9)
    delta = torch.randn(outs * out, intos * into, generator=generator)
    dense_c, dense_g = (torch.block_diag(*blocks) / 9 for blocks in (c, g))
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    gradient = dense_g @ delta @ dense_c
    for of_outputs, whole in ((True, gradient), (False, gradient.T)):
        rows = torch.randn(3, len(whole), generator=generator)
        product = fisher.penalty_gradient(found, "m", delta, rows, of_outputs=of_outputs)
        close(product, rows @ whole)
    factors = fisher.whitening(found, {"m": torch.device("cpu")}, 0.5, 0.5)["m"]
    left, right = (torch.block_diag(*blocks) for blocks in (factors.left, factors.right))
    close(factors.whiten(delta), left.T @ delta @ right.T)
    for dense, factor in ((dense_c, right), (dense_g, left.T)):
        damped = dense + 0.5 * dense.diagonal().mean() * torch.eye(len(dense))
        close(factor @ damped @ factor.T, torch.eye(len(dense)))


def test_a_matrix_without_inputs_has_a_whitening_factor() -> None:
    moment = torch.zeros(2, 4, 4, dtype=torch.float64)
    assert torch.isfinite(fisher.inverse_factor(moment, 0.1)).all()


def test_no_text_is_an_error(base: BaseModel) -> None:
    with pytest.raises(ModelError, match="no protected text"):
        fisher.measure(base.model, target_names(base.model), [])


def test_logits_are_computed_a_few_at_a_time(
    base: BaseModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch, certain: None
) -> None:
    names = target_names(base.model)
    whole = fisher.measure(base.model, names, examples)
    tables: list[int] = []
    real = fisher.project

    def project(model: Any, states: torch.Tensor) -> torch.Tensor:
        tables.append(len(states))
        return real(model, states)

    monkeypatch.setattr(fisher, "project", project)
    monkeypatch.setattr(fisher, "MAX_LOGITS", 3 * vocabulary_size(base.model))
    same(whole, fisher.measure(base.model, names, examples))
    assert max(tables) == 3 and sum(tables) == sum(len(e.ids) - e.start for e in examples)
    monkeypatch.setattr(fisher, "projects", lambda model: False)
    same(whole, fisher.measure(base.model, names, examples))
