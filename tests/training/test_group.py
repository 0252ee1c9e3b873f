"""Groups: all facts a little, again and again."""

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
from kvedit.training.group import AGAIN_RATE, LAST_RATE, BreadthFirst
from kvedit.training.loop import Lesson, Step

GROUP = GroupConfig(batch=2, passes=40, again=10, rounds=2, shift_weight=60.0, lead=2.0)


def examples(engine: Engine, number: int) -> list[Example]:
    key, answer = FREE[number]
    return engine.examples(Fact.create(key, answer, lang="en"))


def test_a_group_learns_its_facts(engine: Engine) -> None:
    new = [examples(engine, number) for number in range(3)]
    engine.anchor([e for own in (examples(engine, 4), examples(engine, 5)) for e in own])
    steps: list[Step] = []
    taught = engine.teach(Lesson(new, (), engine.anchors), None, steps.append, GROUP)
    engine.master.add(taught.delta)
    passed = [o.passed for own in new for o in engine.recall(own)]
    assert sum(passed) >= len(passed) - 3
    assert taught.trained.learned == all(passed) or sum(passed) >= len(passed) - 3
    assert taught.trained.steps == steps[-1].step >= 60
    phases = list(dict.fromkeys(step.phase for step in steps))
    assert phases[:3] == ["learn", "prune", "hold"]


def test_the_ranks_come_down_to_their_budget(engine: Engine) -> None:
    new = [examples(engine, number) for number in range(3)]
    short = replace(GROUP, passes=8, rounds=0)
    taught = engine.teach(Lesson(new), None, lambda step: None, short)
    init, target = engine._adapter_for(3, short).ranks
    assert init > target
    assert sum(taught.ranks.values()) <= target * len(engine.names)
    assert engine.teach(Lesson(new[:1])).trained.steps  # a single fact's adapter has its own ranks
    assert engine.adapter.ranks == (engine.config.init_rank, engine.config.target_rank)


def test_every_pass_goes_over_all_facts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[int] = Counter()
    teach = BreadthFirst._teach

    def counted(self: BreadthFirst, taught: list[Example], share: float) -> None:
        seen.update(fact for fact, own in enumerate(new) for example in taught if example in own)
        teach(self, taught, share)

    monkeypatch.setattr(BreadthFirst, "_teach", counted)
    new = [examples(engine, number) for number in range(4)]
    engine.teach(Lesson(new), None, lambda step: None, replace(GROUP, passes=6, rounds=0))
    assert set(seen.values()) == {6}


@pytest.mark.parametrize("crowd", [1, 4])
def test_steps_grow_shorter_in_the_passes_and_in_each_round(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, crowd: int
) -> None:
    """In the rounds of a crowd they are shorter from the start, and its answers are led further."""
    monkeypatch.setattr(group, "CROWD", 2 / crowd)
    told: dict[str, list[float]] = {}
    teach = BreadthFirst._teach

    def kept(self: BreadthFirst, taught: list[Example], share: float) -> None:
        told.setdefault(self._phase, []).append(share)
        assert self._ease() == (pytest.approx(GROUP.lead * crowd**0.25), GROUP.settled)
        teach(self, taught, share)

    monkeypatch.setattr(BreadthFirst, "_teach", kept)
    monkeypatch.setattr(BreadthFirst, "_missing", lambda self: {0: [0], 1: [0]})
    one_round = replace(GROUP, passes=8, again=10, rounds=1)
    engine.teach(
        Lesson([examples(engine, n) for n in range(2)]), None, lambda step: None, one_round
    )
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
    put = BreadthFirst._set_rate

    def kept(self: BreadthFirst, rate: float) -> None:
        rates.append(rate / self._to_gain if self._to_gain else 0.0)
        assert self._ease()[0] == pytest.approx(GROUP.lead * crowd**0.25)
        put(self, rate)

    monkeypatch.setattr(BreadthFirst, "_set_rate", kept)
    lesson = Lesson([examples(engine, n) for n in range(2)], earlier=earlier)
    engine.teach(lesson, None, lambda step: None, replace(GROUP, passes=12, rounds=0))
    longest = GROUP.learning_rate / crowd**0.5
    assert 0.4 * longest < max(rates) < longest


def test_what_hangs_on_a_near_tie_is_taught_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = [examples(engine, number) for number in range(2)]
    seen: list[Example] = []
    teach = BreadthFirst._teach

    def counted(self: BreadthFirst, taught: list[Example], share: float) -> None:
        if self._phase == "again":
            seen.extend(taught)  # a batch of one: what is missing
        teach(self, taught, share)

    def recall(model: object, asked: list[Example], lower: object) -> list[Outcome]:
        return [Outcome(True, 0.01, doubtful=example == new[1][-1]) for example in asked]

    monkeypatch.setattr(BreadthFirst, "_teach", counted)
    monkeypatch.setattr(engine.share, "recall", recall)
    engine.teach(Lesson(new), None, lambda step: None, replace(GROUP, passes=4, again=3, rounds=1))
    assert seen == [new[1][-1]] * len(seen) and seen  # and under the prompt that misses it


def test_near_ties_wait_until_few_facts_fail(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three facts one fails at first, later none; one hangs on a near-tie all the time."""
    new = [examples(engine, number) for number in range(3)]
    looks: list[int] = []
    rounds: list[dict[int, list[int]]] = []
    begin = BreadthFirst._begin_round

    def recall(model: object, asked: list[Example], lower: object) -> list[Outcome]:
        looks.append(len(asked))
        fails, tied = new[0][0], new[1][-1]
        return [
            Outcome(not (example == fails and len(looks) < 3), 0.01, doubtful=example == tied)
            for example in asked
        ]

    def begun(self: BreadthFirst) -> None:
        begin(self)
        rounds.append(self._part.missing)

    monkeypatch.setattr(engine.share, "recall", recall)
    monkeypatch.setattr(BreadthFirst, "_begin_round", begun)
    engine.teach(Lesson(new), None, lambda step: None, replace(GROUP, passes=4, again=3, rounds=3))
    last = len(new[1]) - 1
    assert rounds == [{0: [0]}, {0: [0]}, {1: [last]}, {1: [last]}]


@pytest.mark.parametrize(("many", "looks"), [(1000, 3), (3, 3), (2, 4)])
def test_of_more_than_a_thousand_facts_there_are_more_rounds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, many: int, looks: int
) -> None:
    """In proportion: three facts where two are many have three rounds for two."""
    asked: list[int] = []

    def recall(model: object, examples: list[Example], lower: object) -> list[Outcome]:
        asked.append(len(examples))
        return [Outcome(False, -1.0) for _ in examples]

    new = [examples(engine, number) for number in range(3)]
    monkeypatch.setattr(engine.share, "recall", recall)
    monkeypatch.setattr(group, "MANY", many)
    two = replace(GROUP, passes=4, again=3, rounds=2)
    assert not engine.teach(Lesson(new), None, lambda step: None, two).trained.learned
    assert len(asked) == looks  # one after the passes, one after each round


def test_nothing_changes_outside_the_lesson(engine: Engine) -> None:
    before = engine.master.digest()
    margins = [o.margin for o in engine.recall(examples(engine, 5))]
    new = [examples(engine, number) for number in range(2)]
    engine.teach(Lesson(new), None, lambda step: None, replace(GROUP, passes=4, rounds=1))
    assert engine.master.digest() == before
    assert [o.margin for o in engine.recall(examples(engine, 5))] == margins


def test_the_same_lesson_gives_the_same_delta(engine: Engine) -> None:
    from kvedit.adapter.deltas import to_bytes

    new = [examples(engine, number) for number in range(2)]
    short = replace(GROUP, passes=4, rounds=0)
    first = engine.teach(Lesson(new), None, lambda step: None, short)
    again = engine.teach(Lesson(new), None, lambda step: None, short)
    assert to_bytes(first.delta) == to_bytes(again.delta)
