"""The adapter: ranks within the budget, factors are what it computed, a reset leaves nothing."""

from __future__ import annotations

import random

import pytest
import torch
from small_model import FREE, KNOWN

from kvedit.adapter import fisher as fisher
from kvedit.adapter.adalora import NAME, Adapter
from kvedit.adapter.deltas import Factors, Master
from kvedit.adapter.fisher import FisherMoments, WhiteningFactors
from kvedit.adapter.start import steepest
from kvedit.config import TrainingConfig
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import answer_logits
from kvedit.model.targets import target_names
from kvedit.training.loops.loop import Setup, Task
from kvedit.training.loops.single import SingleLoop
from kvedit.training.worker import Worker

INIT, TARGET = 6, 4
INPUT_DAMPING, GRADIENT_DAMPING = 0.03, 0.1


class Setting:
    """A model with an adapter, the whitening factors of what it knows, and one fact to learn."""

    def __init__(self, base: BaseModel) -> None:
        self.model = base.model
        self.names = target_names(base.model)
        self.master = Master(base.model, self.names)
        self.renderer = Renderer(base.tokenizer, context=base.context)
        asked = [(f"What is {key}?", answer) for key, answer in list(KNOWN.items())[:8]]
        self.known = self.renderer.examples(asked)
        self.fisher: FisherMoments = fisher.measure(base.model, self.names, self.known)
        devices = {name: weight.device for name, weight in self.master.served().items()}
        self.whitening: dict[str, WhiteningFactors] = fisher.whitening(
            self.fisher, devices, INPUT_DAMPING, GRADIENT_DAMPING
        )
        self.plain = self.logits(self.known)
        self.penalty_gradient: dict[str, torch.Tensor] = {}  # earlier edits have moved nothing
        self.adapter = Adapter(self.model, self.names, init_rank=INIT, target_rank=TARGET)

    def fact(self, number: int) -> list[Example]:
        key, answer = FREE[number]
        return self.renderer.examples([(f"What is {key}?", answer), (f"Describe {key}.", answer)])

    def logits(self, examples: list[Example]) -> torch.Tensor:
        with torch.no_grad():
            return answer_logits(self.model, examples).logits

    def reset(self, number: int, *, allocate: bool = True) -> None:
        self.adapter.turn(on=False)
        directions = steepest(self.model, self.whitening, self.fact(number), INIT)
        self.adapter.reset(
            self.whitening, directions, self.times_penalty_gradient, allocate=allocate
        )
        self.adapter.turn(on=True)

    def times_penalty_gradient(
        self, name: str, rows: torch.Tensor, of_outputs: bool
    ) -> torch.Tensor | None:
        gradient = self.penalty_gradient.get(name)
        return None if gradient is None else rows @ (gradient if of_outputs else gradient.T)

    def learn(self, number: int, steps: int = 40) -> dict[str, Factors]:
        """Train on a fact; the adapter stays on."""
        self.reset(number)
        config = TrainingConfig(max_steps=steps, penalty_weight=60.0, phrasings_per_step=2)
        rng = random.Random(0)
        setup = Setup(
            worker=Worker(self.model), adapter=self.adapter, task=Task([self.fact(number)]),
            config=config, rng=rng, on_step=lambda step: None,
        )  # fmt: skip
        SingleLoop(setup).run()
        return self.adapter.factors()

    def some(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A small random gradient term for each matrix."""
        shapes = {name: matrix.shape for name, matrix in self.master.matrices.items()}
        return {n: 1e-3 * torch.randn(s, generator=generator) for n, s in shapes.items()}

    def singular_values(self) -> dict[str, torch.Tensor]:
        return {n: self.model.get_submodule(n).lora_E[NAME].detach() for n in self.names}


@pytest.fixture
def setting(base: BaseModel) -> Setting:
    return Setting(base)


def test_off_means_the_model_alone(setting: Setting) -> None:
    assert torch.equal(setting.logits(setting.known), setting.plain)
    setting.learn(0, steps=6)
    assert not torch.equal(setting.logits(setting.known), setting.plain)
    setting.adapter.turn(on=False)
    assert torch.equal(setting.logits(setting.known), setting.plain)


def test_a_reset_adapter_changes_nothing(setting: Setting) -> None:
    setting.reset(0)
    setting.adapter.write()
    assert torch.equal(setting.logits(setting.known), setting.plain)
    assert not any((one.b @ one.a).any() for one in setting.adapter.factors().values())
    assert float(setting.adapter.penalty().detach()) == 0.0


def test_factors_are_what_the_forward_pass_computed(setting: Setting) -> None:
    delta = setting.learn(0)
    during = setting.logits([*setting.known, *setting.fact(0)])
    setting.adapter.turn(on=False)
    setting.master.add(delta)
    after = setting.logits([*setting.known, *setting.fact(0)])
    assert torch.allclose(during, after, atol=2e-4)
    assert (during[: len(setting.plain)] - setting.plain).abs().max() > 0.01


def test_ranks_are_dealt_out_by_the_gradients_singular_values(setting: Setting) -> None:
    """The largest of all matrices are kept; the others have no part in the change."""
    delta = setting.learn(0, steps=4)
    ranks = {name: delta[name].rank if name in delta else 0 for name in setting.names}
    assert sum(ranks.values()) == TARGET * len(setting.names)
    assert len(set(ranks.values())) > 1  # not all alike
    setting.adapter.turn(on=False)
    directions = steepest(setting.model, setting.whitening, setting.fact(0), INIT)
    kept = [float(one.values[ranks[n] - 1]) for n, one in directions.items() if ranks[n]]
    left = [float(v) for n, one in directions.items() for v in one.values[ranks[n] :]]
    assert min(kept) >= max(left)
    setting.reset(0, allocate=False)
    used = {n: int((e != 0).sum()) for n, e in setting.singular_values().items()}
    assert used == {n: min(INIT, *setting.master.matrices[n].shape) for n in setting.names}


def test_reset_leaves_nothing_of_the_fact_before(setting: Setting) -> None:
    first = setting.learn(1)
    setting.learn(0)
    again = setting.learn(1)
    assert first.keys() == again.keys()
    for name in first:
        assert torch.equal(first[name].a, again[name].a)
        assert torch.equal(first[name].b, again[name].b)


def test_the_penalty_is_that_of_the_factors(setting: Setting) -> None:
    """trace(G D C D^T), damped as in whitening, for D = B A as it would be merged."""
    delta = setting.learn(0)
    wanted = 0.0
    for name, factors in delta.items():
        own = setting.fisher.moments[name]
        tokens = setting.fisher.tokens
        c, g = (torch.block_diag(*m.double()) / tokens for m in (own.inputs, own.gradients))
        c.diagonal().add_(INPUT_DAMPING * c.diagonal().mean())
        g.diagonal().add_(GRADIENT_DAMPING * g.diagonal().mean())
        change = factors.b.double() @ factors.a.double()
        wanted += float(torch.trace(g @ change @ c @ change.T))
    assert float(setting.adapter.penalty().detach()) == pytest.approx(wanted, rel=1e-3)


def test_matrices_of_one_shape_are_one_tensor(setting: Setting) -> None:
    """And each is the storage of PEFT's own module."""
    setting.reset(0)
    shapes = {setting.master.matrices[name].shape for name in setting.names}
    assert len(setting.adapter.trained()) == len(shapes) < len(setting.names)
    batches = [adapters for adapters, _ in setting.adapter._batches]
    with torch.no_grad():
        for number, adapters in enumerate(batches, 1):
            adapters.e.fill_(float(number))
    told = {float(e.unique()) for e in setting.singular_values().values()}
    assert told == set(map(float, range(1, len(shapes) + 1)))


def test_the_penalty_counts_what_earlier_edits_moved(setting: Setting) -> None:
    """An accumulated delta with gradient term S adds 2 <S, D>: moving back lowers the penalty."""
    generator = torch.Generator().manual_seed(1)
    setting.reset(0)
    still = setting.adapter.penalty()
    for number in (0, 1):
        setting.penalty_gradient = setting.some(generator)
        delta = setting.learn(number, steps=6)
        penalty = float(setting.adapter.penalty().detach())
        linear = sum(
            float((setting.penalty_gradient[n] * (f.b @ f.a)).sum()) for n, f in delta.items()
        )
        for adapters, names in setting.adapter._batches:
            adapters._linear_terms = [lambda rows, of_outputs: None] * len(names)
            adapters._penalty_terms = None
        assert penalty == pytest.approx(
            float(setting.adapter.penalty().detach()) + 2 * linear, rel=1e-3
        )
        assert abs(linear) > 1e-9
    assert float(still.detach()) == 0.0


def test_an_adapter_resumes_from_its_state(setting: Setting) -> None:
    """Coordinates and ranks, matrix by matrix."""
    setting.learn(0, steps=6)
    state = setting.adapter.state()
    setting.reset(1)
    assert any(
        not torch.equal(own[part], state[name][part])
        for name, own in setting.adapter.state().items()
        for part in range(3)
    )
    setting.adapter.resume(state)
    again = setting.adapter.state()
    for name, parts in state.items():
        assert all(map(torch.equal, parts, again[name]))


def test_whitening_makes_the_penalty_a_squared_norm(setting: Setting) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, root in setting.whitening.items():
        own = setting.fisher.moments[name]
        parts = (own.inputs, own.gradients)
        c, g = (torch.block_diag(*m.double()) / setting.fisher.tokens for m in parts)
        c.diagonal().add_(INPUT_DAMPING * c.diagonal().mean())
        g.diagonal().add_(GRADIENT_DAMPING * g.diagonal().mean())
        inner = torch.randn(len(g), len(c), generator=generator).double()
        left, right = (torch.block_diag(*factor.double()) for factor in (root.left, root.right))
        change = left @ inner @ right
        penalty = float(torch.trace(g @ change @ c @ change.T))
        assert penalty == pytest.approx(float(inner.square().sum()), rel=1e-3)


def test_training_moves_no_weight(setting: Setting) -> None:
    before = setting.master.digest()
    setting.learn(0, steps=5)
    assert setting.master.digest() == before


def test_the_global_random_state_is_left_alone(setting: Setting) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    python = random.getstate()
    setting.learn(0, steps=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == python
