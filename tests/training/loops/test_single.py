"""The loop: it learns, stops when it holds, is the same each time, and refuses NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from small_engine import make_engine
from small_model import FREE

from kvedit.adapter.deltas import to_bytes
from kvedit.errors import TrainingError
from kvedit.facts.fact import Fact
from kvedit.model import scoring
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.training.engine import Engine
from kvedit.training.loops import single
from kvedit.training.loops.loop import Step, Task
from kvedit.training.loops.single import SingleLoop
from kvedit.training.optimizer import PolyakGradient
from kvedit.training.worker import Worker


def fact(number: int = 0) -> Fact:
    return Fact.create(*FREE[number], lang="en")


def task(engine: Engine, *numbers: int) -> Task:
    return Task([engine.examples(fact(number)) for number in numbers])


def test_it_learns_and_stops(engine: Engine) -> None:
    steps: list[Step] = []
    result = engine.train(task(engine, 0), on_step=steps.append)
    assert result.trained.learned and not result.trained.stalled
    assert result.trained.steps == len(steps) <= 30
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    # The loss falls from the first step on.
    losses = [step.loss for step in steps[:4]]
    assert losses == sorted(losses, reverse=True)
    assert sum(result.ranks.values()) <= engine.config.target_rank * len(engine.names)
    assert len(set(result.ranks.values())) > 1  # dealt out by need, not all alike
    assert result.seconds > 0


def test_the_delta_has_the_fact_recalled(engine: Engine) -> None:
    examples = engine.examples(fact())
    assert not any(o.passed for o in engine.recall(examples))
    result = engine.train(task(engine, 0))
    assert not any(o.passed for o in engine.recall(examples))  # nothing is merged yet
    engine.master.add(result.delta)
    assert all(o.passed for o in engine.recall(examples))
    assert all(engine.generated_recall(examples))


class Unsure(Worker):
    """Says of all recalls that they are numerical ties, the first few times."""

    def __init__(self, worker: Worker, ties: int) -> None:
        super().__init__(worker.model, worker.prefix_cache)
        self.ties = ties

    def recall(self, examples: Sequence[Example]) -> list[Outcome]:
        outcomes = super().recall(examples)
        self.ties -= 1
        return [replace(o, ambiguous=True) for o in outcomes] if self.ties >= 0 else outcomes


def test_a_numerical_tie_is_trained_further(engine: Engine) -> None:
    sure = engine.train(task(engine, 0)).trained
    engine.worker = Unsure(engine.worker, 3)
    unsure = engine.train(task(engine, 0)).trained
    assert unsure.learned and unsure.steps >= sure.steps + 3
    # It does not stop as learned for lack of time either.
    engine.worker = Unsure(engine.worker, 1000)
    assert not engine.train(task(engine, 0)).trained.learned


def test_the_same_seed_gives_the_same_delta(load: Callable[[str], BaseModel]) -> None:
    engine, other = make_engine(load("bf16")), make_engine(load("bf16"))
    config = replace(engine.config, max_steps=20)
    first = engine.train(task(engine, 0), config)
    torch.manual_seed(123)
    second = other.train(task(other, 0), config)
    again = engine.train(task(engine, 0), config)
    seeded = engine.train(task(engine, 0), replace(config, seed=1))
    bits = to_bytes(first.delta)
    assert bits == to_bytes(second.delta) == to_bytes(again.delta)
    assert bits != to_bytes(seeded.delta)


def test_nan_is_an_error_and_changes_nothing(engine: Engine) -> None:
    before = engine.master.digest()
    known = engine.examples(fact(1))
    margins = [o.margin for o in engine.recall(known)]
    with pytest.raises(TrainingError, match="NaN at step") as raised:
        engine.train(task(engine, 0), replace(engine.config, step_gain=1e30))
    assert raised.value.hint
    assert engine.master.digest() == before
    assert [o.margin for o in engine.recall(known)] == margins
    # The adapter forgets it: the next edit starts clean.
    assert engine.train(task(engine, 0)).trained.learned


def test_the_budget_ends_it(engine: Engine) -> None:
    result = engine.train(task(engine, 0), replace(engine.config, max_steps=5, step_gain=1e-5))
    assert result.trained.steps == 5
    assert not result.trained.learned and not result.trained.stalled


def test_a_fact_that_does_not_move_ends_early(engine: Engine) -> None:
    result = engine.train(task(engine, 0), replace(engine.config, step_gain=1e-5))
    assert result.trained.stalled and not result.trained.learned
    assert result.trained.steps < engine.config.max_steps / 2


def test_the_first_loss_is_the_same_in_one_batch_and_in_several(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the loss of a step of several batches seems to rise after the first one."""
    engine.master.add(engine.train(task(engine, 0)).delta)
    config = replace(engine.config, phrasings_per_step=4, min_margin=50.0, max_steps=2)
    losses = []
    for batch in (scoring.MIN_BATCH_TOKENS * 100, 1):
        steps: list[Step] = []
        monkeypatch.setattr(scoring, "step_tokens", lambda model, most=batch: most)
        engine.train(task(engine, 0), config, steps.append)
        losses.append([step.loss for step in steps])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.01)


def test_a_step_that_was_far_too_long_is_mostly_taken_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = iter([1.0, 1.0, 60.0, 1 / 60])  # the third step goes far

    class Jumping(PolyakGradient):
        def step(self, closure: Callable[[], float]) -> None:  # type: ignore[override]
            self.param_groups[0]["lr"] *= next(lengths, 1.0)
            super().step(closure)

    monkeypatch.setattr(single, "PolyakGradient", Jumping)
    steps: list[Step] = []
    config = replace(engine.config, step_gain=0.2)
    result = engine.train(task(engine, 0), config, steps.append)
    losses = [step.loss for step in steps]
    assert losses[3] > 3 * losses[2] and losses[4] < losses[3] / 2
    assert result.trained.learned


def test_facts_that_are_alike_are_told_apart(engine: Engine) -> None:
    """Keys that differ in a digit, with other texts: what they have in common hides the rest."""
    texts = {"amber rule 15": FREE[0][1], "amber rule 17": FREE[1][1]}
    facts = [engine.examples(Fact.create(key, text, lang="en")) for key, text in texts.items()]
    engine.master.add(engine.train(Task(facts[:1])).delta)
    engine.master.add(engine.train(Task(facts[1:])).delta)
    assert not all(o.passed for o in engine.recall(facts[0]))
    engine.master.add(engine.train(Task(facts)).delta)
    passed = [o.passed for fact in facts for o in engine.recall(fact)]
    assert sum(passed) > 10  # plain steps: none; one of the two alone: ten


def test_an_error_of_the_listener_turns_the_adapter_off(engine: Engine) -> None:
    examples = engine.examples(fact(1))
    margins = [o.margin for o in engine.recall(examples)]

    def stop(step: Step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.train(task(engine, 0), on_step=stop)
    assert [o.margin for o in engine.recall(examples)] == margins


def test_rehearsal_holds_an_earlier_fact(engine: Engine) -> None:
    """The same task with and without the earlier fact beside it."""
    earlier = engine.examples(fact(0))
    engine.master.add(engine.train(task(engine, 0)).delta)
    start = engine.master.snapshot()
    new = [engine.examples(fact(1))]
    margins = []
    for rehearsed in ([earlier], []):
        engine.master.restore(start)
        config = replace(engine.config, penalty_weight=0.0)
        engine.master.add(engine.train(Task(new, rehearsed), config).delta)
        margins.append(sum(o.margin for o in engine.recall(earlier)))
    assert margins[0] > margins[1]


@pytest.mark.slow
def test_a_group_of_facts(engine: Engine) -> None:
    group = task(engine, 0, 1, 2)
    engine.master.add(engine.train(group, replace(engine.config, max_steps=200)).delta)
    passed = [o.passed for own in group.new for o in engine.recall(own)]
    assert sum(passed) >= len(passed) - 2


def test_reference_texts_are_held_to_what_the_model_said(engine: Engine) -> None:
    """Answers about other names, that nothing protects, move less when they are compared."""
    names = ("amber ladder", "copper spindle", "paper harbour", "quiet anchor")
    prefixes = [engine.renderer.prefix(f"What is {name}?") for name in names]
    said = engine.proceed(prefixes, end=engine.renderer.stops, limit=12)
    texts = [
        Example((*before, *ids), len(before)) for before, ids in zip(prefixes, said, strict=True)
    ]
    references = engine.reference(texts)
    moved = []
    for weight in (0.0, 60.0):
        config = replace(engine.config, kl_weight=weight)
        one = Task([engine.examples(fact(0))], reference_texts=references)
        result = engine.train(one, config)
        assert result.trained.learned
        engine.master.add(result.delta)
        everything = range(len(references))
        moved.append(float(references.divergences(engine.base.model, everything).mean()))
        engine.master.reset()
    free, held = moved
    assert 0 < held < 0.8 * free


@pytest.mark.parametrize("reads", [False, True])
def test_only_a_model_that_cannot_read_takes_adaptive_steps_for_questions(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    made: list[bool] = []
    own = SingleLoop._make_optimizer

    def noted(loop: SingleLoop) -> torch.optim.Optimizer:
        optimizer = own(loop)
        made.append(optimizer._adaptive)  # type: ignore[attr-defined]
        return optimizer

    monkeypatch.setattr(SingleLoop, "_make_optimizer", noted)
    monkeypatch.setitem(engine.__dict__, "reads", reads)
    text, asked = engine.examples(fact(0)), engine.renderer.examples([("Of what?", "Of glass.")])
    config = replace(engine.config, max_steps=4)
    engine.train(Task([text], study=[asked]), config)
    engine.train(Task([text]), config)
    told_apart = engine.renderer.examples([("Of what?", "Glass."), ("Of what else?", "Tin.")])
    engine.train(Task([told_apart]), config)
    assert made == [not reads, False, True]
