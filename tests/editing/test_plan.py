"""What an edit is to do, on the small model: what it asks; making a plan changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.editing.plan import Planner
from kvedit.facts.fact import Fact, LocalityProbe
from kvedit.store.rows import FactRow


@pytest.fixture
def planner(trained: KnowledgeBase) -> Iterator[Planner]:
    """The plans of that store; making them leaves it as it is."""
    before = trained.engine.master.digest(), trained.store.head(), len(trained.store.history())
    yield Planner(trained._session)
    assert (trained.engine.master.digest(), trained.store.head(), len(trained.store.history())) == (
        before
    )


def rows(knowledge: KnowledgeBase) -> list[FactRow]:
    return knowledge.store.facts("committed")


def test_a_new_fact_is_pending_and_the_models_answer_is_shown(
    trained: KnowledgeBase, planner: Planner
) -> None:
    fact = Fact.create(*FREE[3])
    plan = planner.add(fact, ())
    row = trained.store.require(fact.key)
    assert row.state == "pending" and plan.changes[0].fact_id == row.id
    assert plan.text_before and trained.ask(f"What is {fact.key}?").startswith(plan.text_before)
    assert {example.answer for example in plan.targets[0].recall} == {fact.description}
    assert not set(plan.targets[0].recall) & set(plan.targets[0].paraphrases)


def test_several_facts_are_a_group_of_which_a_part_can_be_taken(planner: Planner) -> None:
    facts = [Fact.create(*pair) for pair in FREE[3:6]]
    plan = planner.add_group(facts)
    assert plan.group and plan.keys == tuple(fact.key for fact in facts)
    part = plan.only({plan.targets[1].fact_id})
    assert part.keys == plan.keys[1:2] and part.targets == plan.targets[1:2]
    assert part.locality == plan.locality


def test_a_facts_own_locality_probe_defaults_to_todays_answer(
    trained: KnowledgeBase, planner: Planner
) -> None:
    question = f"What is {FREE[0][0]}?"
    probes = (
        LocalityProbe(prompt=question),
        LocalityProbe(prompt="Who are you?", answer="A model."),
    )
    plan = planner.add(Fact.create(*FREE[3], locality=probes), ())
    shared = len(trained.store.protected("locality"))
    asked, given = plan.locality[shared:]
    assert asked.prompt == question and trained.ask(question).startswith(asked.answer)
    assert trained.engine.recall([asked])[0].passed
    assert (given.prompt, given.answer) == ("Who are you?", "A model.")


def test_an_update_says_both_texts(trained: KnowledgeBase, planner: Planner) -> None:
    row = rows(trained)[0]
    plan = planner.update(row, row.fact.with_description("Made of glass in Marrow."))
    assert (plan.text_before, plan.text_after) == (row.fact.description, "Made of glass in Marrow.")
    assert plan.changes[0].before == row.fact and plan.targets[0].fact_id == row.id


def test_a_removal_teaches_the_old_answers_and_forgets_under_other_prompts(
    trained: KnowledgeBase, planner: Planner
) -> None:
    row = rows(trained)[0]
    prior = trained.engine.prior_answers(row.fact)
    plan = planner.remove(row, prior)
    assert [example.prompt for example in plan.targets[0].recall] == list(prior)
    assert plan.targets[0].forget == tuple(trained.engine.paraphrases(row.fact))
    assert plan.changes[0].after is None


def test_a_repair_teaches_what_is_there(trained: KnowledgeBase, planner: Planner) -> None:
    both = rows(trained)[:2]
    plan = planner.repair(both)
    assert plan.group and not planner.repair(both[:1]).group
    assert all(change.before == change.after for change in plan.changes)
