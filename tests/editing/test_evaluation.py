"""What an edit is judged by: which earlier facts are asked, who is blamed for what is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.config import Config
from kvedit.editing.evaluation import Evaluator, at_risk, probe_row
from kvedit.editing.plan import Plan, Planner
from kvedit.events import Score
from kvedit.facts.fact import Fact
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.store.rows import FactRow

KEYS = [key for key, _ in FREE[:3]]


@pytest.fixture
def plan(trained: KnowledgeBase) -> Plan:
    """To teach two more facts together."""
    return Planner(trained._session).add_group([Fact.create(*pair) for pair in FREE[3:5]])


def evaluator(knowledge: KnowledgeBase, plan: Plan, **retention: Any) -> Evaluator:
    session = knowledge._session
    config: Config = knowledge.store.config
    session.config = replace(config, retention=replace(config.retention, **retention))
    return Evaluator(session, plan)


def as_if(knowledge: KnowledgeBase, outcomes: dict[str, bool], patch: pytest.MonkeyPatch) -> None:
    """Let the engine find that what has an answer passes, or does not."""

    def judge(examples: list[Example]) -> list[Outcome]:
        return [Outcome(outcomes.get(e.answer, True), 1.0, generated=False) for e in examples]

    patch.setattr(knowledge.engine, "judge", judge)


def test_a_group_rehearses_all_earlier_facts_and_asks_some(
    trained: KnowledgeBase, plan: Plan
) -> None:
    candidates = evaluator(trained, plan, checked_facts=1, prompts_per_fact=4).candidates
    assert sorted(candidate.row.fact.key for candidate in candidates) == sorted(KEYS)
    assert [len(candidate.probes) for candidate in candidates] == [
        4,
        4,
        0,
    ]  # as many as it has facts
    assert {len(candidate.all) for candidate in candidates} == {10}
    compaction = evaluator(
        trained, replace(plan, compaction=True), checked_facts=1, prompts_per_fact=4
    ).candidates
    assert [len(candidate.probes) for candidate in compaction] == [
        4,
        4,
        4,
    ]  # all are taught once more


def test_one_fact_asks_and_rehearses_the_same_few(trained: KnowledgeBase, plan: Plan) -> None:
    alone = replace(plan.only({plan.targets[0].fact_id}), group=False)
    candidates = evaluator(trained, alone, checked_facts=2, prompts_per_fact=99).candidates
    assert [len(candidate.probes) for candidate in candidates] == [10, 10]


def test_only_locality_probes_that_hold_before_are_asked_after(
    trained: KnowledgeBase, plan: Plan
) -> None:
    question = f"What is {KEYS[0]}?"
    pairs = [(question, FREE[0][1]), (question, "Nothing of the kind.")]
    known, unknown = trained.engine.renderer.examples(pairs)
    evaluation = evaluator(trained, replace(plan, locality=(known, unknown))).evaluate()
    asked = [row.expected for row in evaluation.rows if row.kind == "locality"]
    assert asked == [known.answer]


def test_what_was_lost_before_blames_nobody(
    trained: KnowledgeBase, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = evaluator(trained, plan, checked_facts=16)
    candidates = [
        replace(candidate, row=replace(candidate.row, health="regressed"))
        if candidate.row.fact.key == KEYS[0]
        else candidate
        for candidate in asks.candidates
    ]
    as_if(trained, {FREE[0][1]: False, FREE[1][1]: False}, monkeypatch)
    asks.candidates = candidates
    evaluation = asks.evaluate()
    assert {candidate.row.fact.key for candidate in evaluation.lost} == {
        KEYS[0],
        KEYS[1],
    }  # both are rehearsed
    assert evaluation.checks.lost == (KEYS[1],)
    assert (evaluation.checks.retention.passed, evaluation.checks.retention.n) == (1, 2)


def test_a_fact_that_fails_is_left_out_of_what_is_said(
    trained: KnowledgeBase, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if(trained, {FREE[4][1]: False}, monkeypatch)
    evaluation = evaluator(trained, plan).evaluate()
    good, bad = (target.fact_id for target in plan.targets)
    assert evaluation.learned == {good}
    assert (evaluation.checks.recall.passed, evaluation.checks.recall.n) == (10, 20)
    rest = evaluation.without(frozenset({bad}))
    assert (rest.checks.recall.passed, rest.checks.recall.n) == (10, 10)
    assert rest.checks.paraphrase.n == evaluation.checks.paraphrase.n // 2
    asked = [row for row in rest.rows if row.kind in ("recall", "paraphrase")]
    assert {row.fact_id for row in asked} == {good}


def test_a_relations_other_wordings_are_reported_and_not_judged(
    trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, text = FREE[3]
    relation = Fact.create(
        f"{key}: made where", text, relation_of=key, prompts=[f"Where was {key} made?"],
        paraphrases=[f"Where did they make {key}?"], lang="en",
    )  # fmt: skip
    facts = [relation, Fact.create(*FREE[4])]
    plan = Planner(trained._session).add_group(facts)
    assert [len(target.recall) for target in plan.targets] == [4, 10]
    asks = evaluator(trained, plan)
    judge = trained.engine.judge

    def none_of_the_paraphrases(examples: list[Example]) -> list[Outcome]:
        unseen = {e for target in plan.targets for e in target.paraphrases}
        outcomes = zip(examples, judge(examples), strict=True)
        return [replace(o, passed=e not in unseen) for e, o in outcomes]

    monkeypatch.setattr(trained.engine, "judge", none_of_the_paraphrases)
    evaluation = asks.evaluate()
    assert evaluation.generalization == Score(0, 9)
    assert evaluation.checks.paraphrase == Score(0, 8)
    assert evaluation.learned == {plan.targets[0].fact_id}
    alone = evaluation.without(frozenset({plan.targets[1].fact_id}))
    assert (alone.generalization, alone.checks.paraphrase) == (Score(0, 1), Score())


def test_what_was_to_be_forgotten_passes_when_it_is_gone(
    trained: KnowledgeBase, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = trained.store.require(KEYS[0])
    as_if(trained, {FREE[0][1]: False}, monkeypatch)
    removal = Planner(trained._session).remove(row, {f"What is {KEYS[0]}?": "I do not know."})
    evaluation = evaluator(trained, removal).evaluate()
    assert (evaluation.checks.paraphrase.passed, evaluation.checks.paraphrase.n) == (8, 8)
    assert evaluation.learned == {row.id}


def test_an_infinite_margin_is_none_in_the_journal(trained: KnowledgeBase) -> None:
    example = trained.engine.renderer.examples([FREE[0]])[0]
    row = probe_row(None, "locality", example, Outcome(True, float("inf"), generated=True))
    assert row.margin is None and row.protocol == "generated"
    assert probe_row(3, "recall", example, Outcome(False, -0.5, generated=False)).margin == -0.5


def fact_row(
    number: int,
    key: str,
    *,
    margin: float | None = 5.0,
    checked: int | None = 9,
    health: str = "recalled",
) -> FactRow:
    return FactRow(
        id=number,
        fact=Fact.create(key, "text", lang="en"),
        state="committed",
        created_at="",
        updated_at="",
        health=health,
        margin=margin,
        last_checked_revision=checked,
    )


ROWS = [
    fact_row(1, "harbour bell", checked=1),
    fact_row(2, "tide lanterns"),
    fact_row(3, "salt harp", margin=0.2),
    fact_row(4, "moss clock", margin=None, checked=None, health="unchecked"),
    fact_row(5, "night ferry", health="regressed"),
    fact_row(6, "amber kettle"),
    fact_row(7, "wind ledger"),
]


def keys(rows: list[FactRow]) -> list[str]:
    return [r.fact.key for r in rows]


def test_regressed_facts_first_then_near_weak_and_old_ones_in_turn() -> None:
    chosen = keys(at_risk(ROWS, ["tide lantern"], 5))
    assert chosen[0] == "night ferry"
    assert chosen[1] == "tide lanterns"
    assert set(chosen[2:]) == {"moss clock", "harbour bell", "salt harp"}


def test_no_order_crowds_out_another() -> None:
    near = [fact_row(i, f"tide lantern {'abcdefgh'[i - 10]}") for i in range(10, 18)]
    chosen = keys(at_risk([*ROWS, *near], ["tide lantern"], 6))
    assert any(key.startswith("tide lantern") for key in chosen)
    assert {"night ferry", "moss clock"} <= set(chosen)
    assert sum(key.startswith("tide lantern ") for key in chosen) < 5


@pytest.mark.parametrize("count", [0, 1, 3, 7, 50])
def test_as_many_as_asked_and_none_twice(count: int) -> None:
    chosen = at_risk(ROWS, ["nobody"], count)
    assert len(chosen) == min(count, len(ROWS)) == len({r.id for r in chosen})


def test_what_is_being_edited_is_not_among_them() -> None:
    assert "night ferry" not in keys(at_risk(ROWS, ["night ferry", "x"], 50))
    assert at_risk([], ["x"], 5) == []
