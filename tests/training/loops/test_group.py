"""The group loop: every fact a little in each epoch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from small_model import FREE

from kvedit.config import GroupConfig
from kvedit.facts.fact import Fact
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.training.engine import Engine
from kvedit.training.loops import group
from kvedit.training.loops.group import LAST_RATE, REFINE_RATE, GroupLoop
from kvedit.training.loops.loop import Step, Task

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
    chosen = engine.train(Task(new, (), engine.reference_texts), None, steps.append, GROUP)
    engine.master.add(chosen.delta)
    passed = [o.passed for own in new for o in engine.recall(own)]
    assert sum(passed) >= len(passed) - 3
    assert chosen.trained.learned == all(passed) or sum(passed) >= len(passed) - 3
    assert chosen.trained.steps == steps[-1].step >= 60
    phases = list(dict.fromkeys(step.phase for step in steps))
    assert phases in (["learn"], ["learn", "refine"])


def test_a_group_keeps_all_its_ranks(engine: Engine) -> None:
    new = [examples(engine, number) for number in range(3)]
    short = replace(GROUP, epochs=8, refine_rounds=0)
    chosen = engine.train(Task(new), None, lambda step: None, short)
    init, _ = engine._adapter_for(3, short).ranks
    assert chosen.ranks == dict.fromkeys(engine.names, init)
    assert engine.train(Task(new[:1])).trained.steps  # a single fact's adapter has its own ranks
    assert engine._adapter_for(1).ranks == (engine.config.init_rank, engine.config.target_rank)


def test_every_epoch_goes_over_all_facts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[int] = Counter()
    train = GroupLoop._train_on

    def counted(self: GroupLoop, chosen: list[Example], share: float) -> None:
        seen.update(fact for fact, own in enumerate(new) for example in chosen if example in own)
        train(self, chosen, share)

    monkeypatch.setattr(GroupLoop, "_train_on", counted)
    new = [examples(engine, number) for number in range(4)]
    engine.train(Task(new), None, lambda step: None, replace(GROUP, epochs=6, refine_rounds=0))
    assert set(seen.values()) == {6}


@pytest.mark.parametrize("crowding", [1, 4])
def test_steps_grow_shorter_in_the_epochs_and_in_each_round(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, crowding: int
) -> None:
    """In the rounds of a large group they are shorter from the start, and margins larger."""
    monkeypatch.setattr(group, "CROWDED", 2 / crowding)
    rates_of: dict[str, list[float]] = {}
    train = GroupLoop._train_on

    def kept(self: GroupLoop, chosen: list[Example], share: float) -> None:
        rates_of.setdefault(self._phase, []).append(share)
        assert self._easing() == (
            pytest.approx(GROUP.target_margin * crowding**0.25),
            GROUP.easy_token_weight,
        )
        train(self, chosen, share)

    monkeypatch.setattr(GroupLoop, "_train_on", kept)
    monkeypatch.setattr(GroupLoop, "_missing", lambda self: {0: [0], 1: [0]})
    one_round = replace(GROUP, epochs=8, refine_epochs=10, refine_rounds=1)
    engine.train(Task([examples(engine, n) for n in range(2)]), None, lambda step: None, one_round)
    refined = rates_of.pop("refine")
    epochs = [share for shares in rates_of.values() for share in shares]
    for shares, first in ((epochs, 1.0), (refined, REFINE_RATE / crowding**0.5)):
        assert shares == sorted(shares, reverse=True) and len(set(shares)) == len(shares)
        assert shares[0] < first and shares[-1] == pytest.approx(first * LAST_RATE)


@pytest.mark.parametrize(("earlier", "crowding"), [(0, 1), (6, 4)])
def test_on_top_of_many_facts_steps_are_shorter_and_margins_larger(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, earlier: int, crowding: int
) -> None:
    monkeypatch.setattr(group, "CROWDED", 2)
    rates: list[float] = []
    put = GroupLoop._set_rate

    def kept(self: GroupLoop, rate: float) -> None:
        rates.append(rate / self._first_loss if self._first_loss else 0.0)
        assert self._easing()[0] == pytest.approx(GROUP.target_margin * crowding**0.25)
        put(self, rate)

    monkeypatch.setattr(GroupLoop, "_set_rate", kept)
    task = Task([examples(engine, n) for n in range(2)], earlier=earlier)
    engine.train(task, None, lambda step: None, replace(GROUP, epochs=12, refine_rounds=0))
    longest = GROUP.step_gain / crowding**0.5
    assert 0.4 * longest < max(rates) < longest


def test_a_numerical_tie_is_refined(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    new = [examples(engine, number) for number in range(2)]
    seen: list[Example] = []
    train = GroupLoop._train_on

    def counted(self: GroupLoop, chosen: list[Example], share: float) -> None:
        if self._phase == "refine":
            seen.extend(chosen)  # a batch of one: what is missing
        train(self, chosen, share)

    def recall(asked: list[Example]) -> list[Outcome]:
        return [Outcome(True, 0.01, ambiguous=example == new[1][-1]) for example in asked]

    monkeypatch.setattr(GroupLoop, "_train_on", counted)
    monkeypatch.setattr(engine.worker, "recall", recall)
    engine.train(
        Task(new),
        None,
        lambda step: None,
        replace(GROUP, epochs=4, refine_epochs=3, refine_rounds=1),
    )
    assert seen == [new[1][-1]] * len(seen) and seen  # and under the prompt that misses it


def test_ties_wait_until_few_facts_fail(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three facts one fails at first, later none; one is a numerical tie all the time."""
    new = [examples(engine, number) for number in range(3)]
    looks: list[int] = []
    rounds: list[dict[int, list[int]]] = []
    begin = GroupLoop._begin_round

    def recall(asked: list[Example]) -> list[Outcome]:
        looks.append(len(asked))
        fails, tied = new[0][0], new[1][-1]
        return [
            Outcome(not (example == fails and len(looks) < 3), 0.01, ambiguous=example == tied)
            for example in asked
        ]

    def begun(self: GroupLoop) -> None:
        begin(self)
        rounds.append(self._part.missing)

    monkeypatch.setattr(engine.worker, "recall", recall)
    monkeypatch.setattr(GroupLoop, "_begin_round", begun)
    engine.train(
        Task(new),
        None,
        lambda step: None,
        replace(GROUP, epochs=4, refine_epochs=3, refine_rounds=3),
    )
    last = len(new[1]) - 1
    assert rounds == [{0: [0]}, {0: [0]}, {1: [last]}, {1: [last]}]


@pytest.mark.parametrize(("limit", "looks"), [(1000, 3), (3, 3), (2, 4)])
def test_of_more_than_a_thousand_facts_there_are_more_rounds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, limit: int, looks: int
) -> None:
    """In proportion: three facts with a limit of two have three rounds for two."""
    asked: list[int] = []

    def recall(examples: list[Example]) -> list[Outcome]:
        asked.append(len(examples))
        return [Outcome(False, -1.0) for _ in examples]

    new = [examples(engine, number) for number in range(3)]
    monkeypatch.setattr(engine.worker, "recall", recall)
    monkeypatch.setattr(group, "MORE_ROUNDS", limit)
    two = replace(GROUP, epochs=4, refine_epochs=3, refine_rounds=2)
    assert not engine.train(Task(new), None, lambda step: None, two).trained.learned
    assert len(asked) == looks  # one after the epochs, one after each round


def test_nothing_changes_outside_the_training(engine: Engine) -> None:
    before = engine.master.digest()
    margins = [o.margin for o in engine.recall(examples(engine, 5))]
    new = [examples(engine, number) for number in range(2)]
    engine.train(Task(new), None, lambda step: None, replace(GROUP, epochs=4, refine_rounds=1))
    assert engine.master.digest() == before
    assert [o.margin for o in engine.recall(examples(engine, 5))] == margins


def test_the_same_task_gives_the_same_delta(engine: Engine) -> None:
    from kvedit.adapter.deltas import to_bytes

    new = [examples(engine, number) for number in range(2)]
    short = replace(GROUP, epochs=4, refine_rounds=0)
    first = engine.train(Task(new), None, lambda step: None, short)
    again = engine.train(Task(new), None, lambda step: None, short)
    assert to_bytes(first.delta) == to_bytes(again.delta)
