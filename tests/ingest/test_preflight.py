"""What an input would do to a store: every row accounted for, contradictions found up front."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_knowledge import FakeKnowledge, make_store
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.facts.fact import Fact
from kvedit.facts.formats import Located
from kvedit.facts.keys import exact_form
from kvedit.ingest.preflight import Near, Preflight, inspect_facts, near_keys
from kvedit.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with make_store(tmp_path / "store") as made:
        yield made


def rows(*facts: Fact | None) -> list[Located]:
    return [
        Located(f"f, line {number}", fact, None if fact else "broken")
        for number, fact in enumerate(facts, 1)
    ]


def fact(key: str, text: str = "some text", *aliases: str) -> Fact:
    return Fact.create(key, text, lang="en", aliases=aliases)


def keys(entries: object) -> list[str]:
    return [entry.fact.key for entry in entries]  # type: ignore[attr-defined]


def reasons(preflight: Preflight) -> list[str]:
    return [f"{problem.where}: {problem.reason}" for problem in preflight.problems]


def test_without_a_store_all_is_new() -> None:
    preflight = inspect_facts(rows(fact("a"), fact("b")), None)
    assert keys(preflight.new) == ["a", "b"]
    assert (preflight.read, preflight.problems) == (2, ())


def test_the_same_twice_goes_in_once() -> None:
    preflight = inspect_facts(rows(fact("Porto"), fact(" PORTO "), fact("b"), fact("Porto")), None)
    assert keys(preflight.new) == ["Porto", "b"]
    assert [entry.where for entry in preflight.repeated] == ["f, line 2", "f, line 4"]


def test_keys_that_differ_in_a_sign_are_one_or_two() -> None:
    given_rows = rows(fact("A-1"), fact("A1", "other"))
    preflight = inspect_facts(given_rows, None)
    assert (keys(preflight.new), preflight.same_count) == ([], 1)
    preflight = inspect_facts(given_rows, None, form=exact_form)
    assert (keys(preflight.new), preflight.same_count) == (["A-1", "A1"], 0)


def test_what_is_held_back_is_not_shown_as_taught() -> None:
    given_rows = rows(fact("a", "Hello {{name}}"), fact("b"))
    preflight = inspect_facts(given_rows, None, hold_placeholders=True)
    assert (keys(preflight.new), keys(preflight.first_rows)) == (["b"], ["b"])
    assert keys(inspect_facts(given_rows, None).first_rows) == ["a", "b"]


def test_what_is_refused_is_not_shown_as_taught() -> None:
    given_rows = rows(fact("a"), fact("A", "other"), None, fact("b"), fact("c"), fact("d"))
    assert keys(inspect_facts(given_rows, None).first_rows) == ["b", "c"]


def test_of_contradicting_rows_none_goes_in_and_each_names_the_other() -> None:
    preflight = inspect_facts(rows(fact("Porto"), fact("b"), fact("porto", "other"), None), None)
    assert keys(preflight.new) == ["b"]
    assert reasons(preflight) == [
        "f, line 1: Porto has another text at line 3, where the key is written porto",
        "f, line 3: porto has another text at line 1, where the key is written Porto",
        "f, line 4: broken",
    ]
    assert [problem.kind for problem in preflight.problems] == ["conflict", "conflict", "invalid"]


def test_what_the_store_holds(store: Store) -> None:
    knowledge = FakeKnowledge(store, refuses={"rejected", "mended"})
    for one in (fact("held", "t", "alias"), fact("rejected"), fact("mended")):
        knowledge.add_group([one])
    store.put_pending(fact("waiting"))
    preflight = inspect_facts(
        rows(
            fact("HELD", "t"),
            fact("rejected"),
            fact("mended", "another text"),
            fact("waiting", "changed"),
            fact("alias"),
            fact("x", "t", "held"),
        ),
        store,
    )
    assert keys(preflight.unchanged) == ["HELD"]
    assert [one.entry.fact.key for one in preflight.rejected_before] == ["rejected"]
    assert "recall probes" in preflight.rejected_before[0].reasons[0]
    assert keys(preflight.new) == ["mended", "waiting"]
    assert reasons(preflight) == [
        "f, line 5: alias leads to the fact held in the store",
        "f, line 6: the alias held of x leads to the fact held in the store",
    ]


def test_another_text_asks_for_update(store: Store) -> None:
    FakeKnowledge(store).add_group([fact("held")])
    preflight = inspect_facts(rows(fact("held", "new text")), store)
    assert [problem.kind for problem in preflight.problems] == ["committed"]
    assert "kvedit update held" in preflight.problems[0].reason


def test_an_alias_must_not_lead_elsewhere() -> None:
    preflight = inspect_facts(
        rows(fact("a", "t", "shared"), fact("b", "t", "A"), fact("c", "t", "shared")), None
    )
    assert keys(preflight.new) == ["a"]
    assert reasons(preflight) == [
        "f, line 2: the alias A of b also leads to the fact a at line 1",
        "f, line 3: the alias shared of c also leads to the fact a at line 1",
    ]


def test_a_waiting_fact_gives_its_old_aliases_back(store: Store) -> None:
    store.put_pending(fact("waiting", "t", "free"))
    preflight = inspect_facts(rows(fact("waiting"), fact("free")), store)
    assert keys(preflight.new) == ["waiting", "free"]


def test_nothing_is_written(store: Store) -> None:
    before = store.facts()
    inspect_facts(rows(fact("a"), fact("a", "other"), None), store)
    assert store.facts() == before


NAMES = st.sampled_from(["a", "A", "b", "c", "d"])
ROWS = st.lists(
    st.none() | st.builds(fact, NAMES, st.sampled_from(["t", "u"]), NAMES) | st.builds(fact, NAMES)
)


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_every_row_is_accounted_for_and_what_goes_in_can_be_stored(
    tmp_path_factory: pytest.TempPathFactory, given_rows: list[Fact | None]
) -> None:
    preflight = inspect_facts(rows(*given_rows), None)
    assert preflight.read == len(given_rows)
    with make_store(tmp_path_factory.mktemp("s") / "store") as store:
        store.put_pending_many([entry.fact for entry in preflight.new])  # raises if names clash
        assert len(store.facts("pending")) == len(preflight.new)


def test_close_keys_are_found_in_the_input_and_in_the_store() -> None:
    new = [fact("tide lantern"), fact("tide lanterns"), fact("moss clock")]
    near = near_keys(new, ["tide lantern", "a moss clock"])
    assert (near.count, near.complete) == (3, True)
    assert Near("tide lantern", "tide lanterns", 96.0, False) in near.closest
    assert {(one.key, one.other) for one in near.closest if one.in_store} == {
        ("tide lanterns", "tide lantern"),
        ("moss clock", "a moss clock"),
    }
    assert [n.score for n in near.closest] == sorted((n.score for n in near.closest), reverse=True)


def test_thousands_of_keys_take_seconds() -> None:
    facts = [
        fact(f"{word} {number * 7919 % 10007}")
        for number in range(1000)
        for word in ("lamp", "harbour", "poet")
    ]
    began = time.monotonic()
    inspect_facts(rows(*facts), None)
    near_keys(facts, [one.key for one in facts])
    assert time.monotonic() - began < 20
