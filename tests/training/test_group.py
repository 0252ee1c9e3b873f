"""Scheduler: all facts a little, again and again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from small_model import FREE

from kvedit.config import GroupConfig
from kvedit.facts.fact import Fact
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.training import group
from kvedit.training.engine import Engine
from kvedit.training.group import AGAIN_RATE, LAST_RATE, GroupLoop
from kvedit.training.loop import Step, Task

GROUP = GroupConfig(
    batch_size=2,
    epochs=40,
    refine_epochs=10,
    refine_rounds=2,
    penalty_scale=60.0,
    target_margin=2.0,
)


def examples(engine: Engine, number: int) -> list[Example]:
    key, answer = FREE[number]
    return engine.examples(Fact.create(key, answer, lang="en"))


def test_a_group_learns_its_facts(engine: Engine) -> None:
    new = [examples(engine, number) for number in range(3)]
    engine.measure_reference([e for own in (examples(engine, 4), examples(engine, 5)) for e in own])
    steps: list[Step] = []
    taught = engine.train(Task(new, (), engine.reference_texts), None, steps.append, GROUP)
    engine.master.add(taught.delta)
    passed = [o.passed for own in new for o in engine.recall(own)]
    assert sum(passed) >= len(passed) - 3
    assert taught.trained.learned == all(passed) or sum(passed) >= len(passed) - 3
    assert taught.trained.steps == steps[-1].step >= 60
    phases = list(dict.fromkeys(step.phase for step in steps))
    assert phases[:3] == ["learn", "prune", "hold"]


def test_the_ranks_come_down_to_their_budget(engine: Engine) -> None:
    new = [examples(engine, number) for number in range(3)]
    short = replace(GROUP, epochs=8, refine_rounds=0)
    taught = engine.train(Task(new), None, lambda step: None, short)
    init, target = engine._adapter_for(3, short).ranks
    assert init > target
    assert sum(taught.ranks.values()) <= target * len(engine.names)
    assert engine.train(Task(new[:1])).trained.steps  # a single fact's adapter has its own ranks
    assert engine.adapter.ranks == (engine.config.init_rank, engine.config.target_rank)


def test_every_pass_goes_over_all_facts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[int] = Counter()
    train = GroupLoop._teach

    def counted(self: GroupLoop, taught: list[Example], share: float) -> None:
        seen.update(fact for fact, own in enumerate(new) for example in taught if example in own)
        train(self, taught, share)

    monkeypatch.setattr(GroupLoop, "_teach", counted)
    new = [examples(engine, number) for number in range(4)]
    engine.train(Task(new), None, lambda step: None, replace(GROUP, epochs=6, refine_rounds=0))
    assert set(seen.values()) == {6}


@pytest.mark.parametrize("crowd", [1, 4])
def test_steps_grow_shorter_in_the_passes_and_in_each_round(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, crowd: int
) -> None:
    """In the rounds of a crowd they are shorter from the start, and its answers are led further."""
    monkeypatch.setattr(group, "CROWD", 2 / crowd)
    told: dict[str, list[float]] = {}
    train = GroupLoop._teach

    def kept(self: GroupLoop, taught: list[Example], share: float) -> None:
        told.setdefault(self._phase, []).append(share)
        assert self._ease() == (
            pytest.approx(GROUP.target_margin * crowd**0.25),
            GROUP.easy_token_weight,
        )
        train(self, taught, share)

    monkeypatch.setattr(GroupLoop, "_teach", kept)
    monkeypatch.setattr(GroupLoop, "_missing", lambda self: {0: [0], 1: [0]})
    one_round = replace(GROUP, epochs=8, refine_epochs=10, refine_rounds=1)
    engine.train(Task([examples(engine, n) for n in range(2)]), None, lambda step: None, one_round)
    again = told.pop("again")
    passes = [share for shares in told.values() for share in shares]
    for shares, first in ((passes, 1.0), (again, AGAIN_RATE / crowd**0.5)):
        assert shares == sorted(shares, reverse=True) and len(set(shares)) == len(shares)
        assert shares[0] < first and shares[-1] == pytest.approx(first * LAST_RATE)


@pytest.mark.parametrize(("earlier", "crowd"), [(0, 1), (6, 4)])
def test_on_top_of_a_crowd_steps_are_shorter_and_leads_larger(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, earlier: int, crowd: int
) -> None:
    monkeypatch.setattr(group, "CROWD", 2)
    rates: list[float] = []
    put = GroupLoop._set_rate

    def kept(self: GroupLoop, rate: float) -> None:
        rates.append(rate / self._to_gain if self._to_gain else 0.0)
        assert self._ease()[0] == pytest.approx(GROUP.target_margin * crowd**0.25)
        put(self, rate)

    monkeypatch.setattr(GroupLoop, "_set_rate", kept)
    task = Task([examples(engine, n) for n in range(2)], earlier=earlier)
    engine.train(task, None, lambda step: None, replace(GROUP, epochs=12, refine_rounds=0))
    longest = GROUP.step_gain / crowd**0.5
    assert 0.4 * longest < max(rates) < longest


def test_what_hangs_on_a_near_tie_is_taught_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = [examples(engine, number) for number in range(2)]
    seen: list[Example] = []
    train = GroupLoop._teach

    def counted(self: GroupLoop, taught: list[Example], share: float) -> None:
        if self._phase == "again":
            seen.extend(taught)  # a batch of one: what is missing
        train(self, taught, share)

    def recall(model: object, asked: list[Example], prefix_cache: object) -> list[Outcome]:
        return [Outcome(True, 0.01, ambiguous=example == new[1][-1]) for example in asked]

    monkeypatch.setattr(GroupLoop, "_teach", counted)
    monkeypatch.setattr(engine.share, "recall", recall)
    engine.train(
        Task(new),
        None,
        lambda step: None,
        replace(GROUP, epochs=4, refine_epochs=3, refine_rounds=1),
    )
    assert seen == [new[1][-1]] * len(seen) and seen  # and under the prompt that misses it


def test_near_ties_wait_until_few_facts_fail(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three facts one fails at first, later none; one hangs on a near-tie all the time."""
    new = [examples(engine, number) for number in range(3)]
    looks: list[int] = []
    rounds: list[dict[int, list[int]]] = []
    begin = GroupLoop._begin_round

    def recall(model: object, asked: list[Example], prefix_cache: object) -> list[Outcome]:
        looks.append(len(asked))
        fails, tied = new[0][0], new[1][-1]
        return [
            Outcome(not (example == fails and len(looks) < 3), 0.01, ambiguous=example == tied)
            for example in asked
        ]

    def begun(self: GroupLoop) -> None:
        begin(self)
        rounds.append(self._part.missing)

    monkeypatch.setattr(engine.share, "recall", recall)
    monkeypatch.setattr(GroupLoop, "_begin_round", begun)
    engine.train(
        Task(new),
        None,
        lambda step: None,
        replace(GROUP, epochs=4, refine_epochs=3, refine_rounds=3),
    )
    last = len(new[1]) - 1
    assert rounds == [{0: [0]}, {0: [0]}, {1: [last]}, {1: [last]}]


@pytest.mark.parametrize(("many", "looks"), [(1000, 3), (3, 3), (2, 4)])
def test_of_more_than_a_thousand_facts_there_are_more_rounds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, many: int, looks: int
) -> None:
    """In proportion: three facts where two are many have three rounds for two."""
    asked: list[int] = []

    def recall(model: object, examples: list[Example], prefix_cache: object) -> list[Outcome]:
        asked.append(len(examples))
        return [Outcome(False, -1.0) for _ in examples]

    new = [examples(engine, number) for number in range(3)]
    monkeypatch.setattr(engine.share, "recall", recall)
    monkeypatch.setattr(group, "MANY", many)
    two = replace(GROUP, epochs=4, refine_epochs=3, refine_rounds=2)
    assert not engine.train(Task(new), None, lambda step: None, two).trained.learned
    assert len(asked) == looks  # one after the passes, one after each round


def test_nothing_changes_outside_the_lesson(engine: Engine) -> None:
    before = engine.master.digest()
    margins = [o.margin for o in engine.recall(examples(engine, 5))]
    new = [examples(engine, number) for number in range(2)]
    engine.train(Task(new), None, lambda step: None, replace(GROUP, epochs=4, refine_rounds=1))
    assert engine.master.digest() == before
    assert [o.margin for o in engine.recall(examples(engine, 5))] == margins


def test_the_same_lesson_gives_the_same_delta(engine: Engine) -> None:
    from kvedit.adapter.deltas import to_bytes

    new = [examples(engine, number) for number in range(2)]
    short = replace(GROUP, epochs=4, refine_rounds=0)
    first = engine.train(Task(new), None, lambda step: None, short)
    again = engine.train(Task(new), None, lambda step: None, short)
    assert to_bytes(first.delta) == to_bytes(again.delta)
