"""Several facts in turn: a few in each step, resting when they are recalled."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from small_model import FREE

from kvedit.facts.fact import Fact
from kvedit.model.prompts import Example
from kvedit.training.engine import Engine
from kvedit.training.loops.loop import Step, Task
from kvedit.training.loops.single import PATIENCE
from kvedit.training.loops.turns import FACTS_PER_STEP, TurnsLoop

FACTS = 4


def task(engine: Engine) -> Task:
    facts = [Fact.create(*FREE[number], lang="en") for number in range(FACTS)]
    return Task([engine.examples(fact) for fact in facts], in_turn=True)


def test_all_are_recalled_after_the_merge(engine: Engine) -> None:
    one, steps = task(engine), list[Step]()
    result = engine.train(one, on_step=steps.append)
    assert result.trained.learned and result.trained.steps == len(steps)
    engine.master.add(result.delta)
    assert all(all(engine.generated_recall(examples)) for examples in one.new)


def test_a_step_has_a_few_of_those_that_do_not_rest(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[list[int]] = []
    resting: list[set[int]] = []
    next_facts = TurnsLoop._next_facts

    def noted(loop: TurnsLoop) -> list[int]:
        resting.append(set(loop._resting))
        turns.append(next_facts(loop))
        return turns[-1]

    monkeypatch.setattr(TurnsLoop, "_next_facts", noted)
    engine.train(task(engine))
    first = [fact for turn in turns[: FACTS // FACTS_PER_STEP] for fact in turn]
    assert sorted(first) == list(range(FACTS))  # each once before any has its next turn
    for turn, asleep in zip(turns, resting, strict=True):
        assert len(turn) == min(FACTS_PER_STEP, FACTS - len(asleep)) == len(set(turn))
        assert asleep.isdisjoint(turn)
    assert any(resting)


def test_it_gives_up_when_nothing_moves(engine: Engine) -> None:
    config = replace(engine.config, step_gain=1e-9)
    result = engine.train(task(engine), config)
    assert result.trained.stalled and not result.trained.learned
    assert result.trained.steps < config.max_steps * FACTS


def test_a_few_facts_have_the_steps_and_the_patience_of_a_single_one(engine: Engine) -> None:
    loop = TurnsLoop.__new__(TurnsLoop)
    loop._count, loop._round, loop._pace = FACTS_PER_STEP, 1, 1
    loop._resting, loop._losses = set(), deque([1.0])
    loop._lowest, loop._lowest_at = float("inf"), 0
    stalled = [loop._has_stalled(step) for step in range(1, PATIENCE + 2)]
    assert stalled == [False] * PATIENCE + [True]
    config, steps = replace(engine.config, max_steps=40, step_gain=1e-9), list[Step]()
    two = Task(task(engine).new[:FACTS_PER_STEP], in_turn=True)
    engine.train(two, config, on_step=steps.append)
    assert steps[0].total == config.max_steps


def test_the_same_training_gives_the_same_delta(engine: Engine) -> None:
    config = replace(engine.config, max_steps=4)
    first, second = (engine.train(task(engine), config) for _ in range(2))
    assert first.trained == second.trained
    for name, factors in first.delta.items():
        assert factors.b.equal(second.delta[name].b) and factors.a.equal(second.delta[name].a)


def test_prompts_that_failed_come_first(engine: Engine) -> None:
    loop = TurnsLoop.__new__(TurnsLoop)
    examples = task(engine).new[0]
    failing: set[Example] = {examples[-1]}
    loop._failing = failing
    loop._task = task(engine)
    loop._config = replace(engine.config, phrasings_per_step=1)
    loop._sample = lambda items, count: list(items)  # type: ignore[method-assign]
    assert loop._prompts(0) == [examples[-1]]


def test_ranks_grow_with_the_number_of_facts(engine: Engine) -> None:
    engine.train(task(engine), replace(engine.config, max_steps=4))
    ranks = (engine.config.init_rank, engine.config.target_rank)
    assert engine._adapter_for(FACTS).ranks == tuple(2 * rank for rank in ranks)


def test_a_fact_rests_after_it_was_recalled_in_turns_one_after_the_other(engine: Engine) -> None:
    loop = TurnsLoop.__new__(TurnsLoop)
    loop._config, loop._losses, loop._fact_loss = engine.config, deque(), 1.0
    loop._resting, loop._looks = set(), [0] * FACTS
    good, bad = engine.config.min_margin + 1, engine.config.min_margin - 1
    for margins, resting in [([good, good], set()), ([good, bad], {0}), ([bad, good], {0})]:
        loop._note([0, 1], margins)
        assert loop._resting == resting
    loop._note([0, 1], [bad, good])
    assert loop._resting == {0, 1}


def test_only_facts_that_had_a_turn_are_looked_at_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[set[Example]] = []
    look = TurnsLoop._not_recalled

    def noted(loop: TurnsLoop, examples: list[Example]) -> set[Example]:
        looks.append(set(examples))
        failing = look(loop, examples)
        first = set(loop._task.new[0])
        return failing | first if len(looks) == 1 else failing

    monkeypatch.setattr(TurnsLoop, "_not_recalled", noted)
    one = task(engine)
    assert engine.train(one).trained.learned
    everything = {example for fact in one.new for example in fact}
    assert looks[0] == everything
    assert set(one.new[0]) <= looks[1] < everything
