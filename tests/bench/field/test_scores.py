"""The scores against cases worked out by hand, and against libraries that have the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvedit.events import Score
from kvedit.facts.fact import Fact
from tests.bench.field.asked import Forced
from tests.bench.field.records import Record, questions
from tests.bench.field.scores import (
    CONTAINED,
    DEFINITIONS,
    GENERATED,
    UNCHANGED,
    Mean,
    Point,
    State,
    contains,
    failure_kind,
    judge,
    repeats_itself,
)


def record(key: str, target: str, truth: str) -> Record:
    return Record(
        fact=Fact.create(key, target), prompts=(f"{key} is in",), truth=truth,
        paraphrases=(f"{key} lies in",), locality=((f"Not {key} is in", truth),),
        portability=((f"Which sea is near {key}?", "the North Sea"),),
    )  # fmt: skip


RECORDS = (record("Aa", "Rome", "Oslo"), record("Bb", "Paris", "Bern"))
LIKELY, UNLIKELY = 0.5, 2.0


def forced(tokens: tuple[int, ...], predicted: tuple[int, ...], nats: float) -> Forced:
    return Forced(tokens, predicted, nats)


def state(answers: tuple[str, ...], nats: tuple[float, ...], known: tuple[str, ...]) -> State:
    """``nats`` are those of the target by question; those of the truth are 1; the first of three
    tokens is predicted wrongly unless the target is likely.
    """
    new = tuple(None if n == 0 else forced((7, 8, 9), (7 if n < 1 else 0, 8, 9), n) for n in nats)
    old = tuple(None if n == 0 else forced((4, 5), (4 if n > 1 else 6, 5), 1.0) for n in nats)
    return State(answers=answers, new=new, old=old, known=known)


KNOWN = (record("Cc", "Rome", "Lima"), record("Dd", "Rome", "Kiel"), record("Ee", "Rome", "Bonn"))
BASE = state(
    ("Oslo.", "Oslo", "in Oslo", "?", "Bern", "Bern", "in Bern", "?"),
    (UNLIKELY, UNLIKELY, UNLIKELY, 0, UNLIKELY, UNLIKELY, UNLIKELY, 0),
    ("It is Lima.", "In Kiel.", "Hamburg"),
)
EDITED = state(
    ("The Rome!", "Rome, Rome, Rome", "In Oslo.", "It is the North Sea",
     "Paris", "Rome", "in Paris", "the Baltic"),
    (LIKELY, UNLIKELY, UNLIKELY, 0, LIKELY, LIKELY, LIKELY, 0),
    ("Lima", "Berlin", "Bonn"),
)  # fmt: skip


@pytest.fixture
def point() -> Point:
    return judge(RECORDS, questions(RECORDS), EDITED, BASE, known=KNOWN, at_once=[True, False])


def test_every_score_of_a_case_worked_out_by_hand(point: Point) -> None:
    assert point.after == 2
    assert point.reliability == Score(2, 2, GENERATED), "articles and punctuation do not count"
    assert point.generalization == Score(0, 2, GENERATED)
    assert point.locality == Score(1, 2, UNCHANGED), "compared with the base model's answer"
    assert point.portability == Score(1, 2, CONTAINED)
    assert point.harmonic.value == 0.0 and point.harmonic.n == 2
    assert (point.es.passed, point.ps.passed, point.ns.passed) == (2, 1, 1)
    assert point.s.value == pytest.approx(3 / (1 + 2 + 2))
    assert point.token_reliability.value == pytest.approx(1.0)
    assert point.token_generalization.value == pytest.approx((2 / 3 + 1) / 2)
    assert point.token_locality.value == pytest.approx((1 + 1 / 2) / 2)
    assert point.at_once.passed == 1 and point.err == Score(1, 1, GENERATED)
    assert point.trr == Score(1, 2, CONTAINED), "of what the base model knew"
    assert point.failures == {"repeats itself": 1, "another fact's text": 1}
    assert [miss.prompt for miss in point.misses] == ["Aa lies in", "Bb lies in"]


def test_the_base_model_keeps_all_and_knows_nothing_new() -> None:
    own = judge(RECORDS, questions(RECORDS), BASE, BASE, known=KNOWN)
    assert own.reliability.passed == own.generalization.passed == 0
    assert own.locality.rate == own.trr.rate == own.token_locality.value == 1.0
    assert own.err.rate is None and own.failures == {"the old answer": 4}


def test_of_fewer_edits_the_base_models_later_answers_do_not_count() -> None:
    first = State(answers=EDITED.answers[:4], new=EDITED.new[:4], old=EDITED.old[:4],
                  known=EDITED.known)  # fmt: skip
    point = judge(RECORDS[:1], questions(RECORDS[:1]), first, BASE, known=KNOWN)
    assert point.reliability == Score(1, 1, GENERATED)
    assert point.locality == Score(1, 1, UNCHANGED)


def test_a_state_survives_json() -> None:
    from kvedit.bench.tables import plain

    assert State.from_json(plain(EDITED)) == EDITED


def test_each_column_has_one_protocol(point: Point) -> None:
    for name, definition in DEFINITIONS.items():
        value = getattr(point, name)
        assert isinstance(value, Score | Mean)
        if name != "harmonic":
            assert value.protocol == definition.protocol, name
        assert definition.formula and definition.source


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("", "empty"), ("the", "empty"), ("Rome and Rome and Rome and", "repeats itself"),
        ("Rome, which lies in Italy", "too long"), ("in Oslo", "the old answer"),
        ("maybe Paris", "another fact's text"), ("Roma", "other"), ("Romee", "misspelt"),
        ("Rom e", "misspelt"),
    ],
)  # fmt: skip
def test_wrong_answers_are_sorted_by_kind(answer: str, kind: str) -> None:
    assert failure_kind(answer, "Rome", ["Oslo."], ["rome", "paris"]) == kind


@given(st.text(), st.text(min_size=1), st.lists(st.text()), st.lists(st.text()))
def test_every_answer_has_a_kind(
    answer: str, expected: str, before: list[str], targets: list[str]
) -> None:
    assert failure_kind(answer, expected, before, targets)


def test_repetition_in_both_kinds_of_script() -> None:
    assert repeats_itself("so it is so it is so it is") and repeats_itself("在海上在海上在海上")
    assert not repeats_itself("so it is and so it is") and not repeats_itself("aaa")


def test_a_text_is_contained_as_whole_words() -> None:
    assert contains("It is Rome.", "rome") and not contains("Romeo", "Rome")
    assert not contains("anything", "")
    assert contains("他住在北京。", "北京") and not contains("他住在北海", "北京")


def test_the_likelihood_score_is_transformers_own_loss() -> None:
    """ES by the loss that transformers computes for the same text: the mean over its tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from kvedit.model.prompts import Example
    from tests.bench.field.asked import Asked, _forced

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)).eval()
    example = Example((3, 4, 5, 6), 2)
    ids = torch.tensor([example.ids])
    labels = torch.tensor([[-100, -100, 5, 6]])
    logits = Asked(model, None)._logits([example])[0]  # type: ignore[arg-type]
    assert _forced(example, logits.detach()).nats == pytest.approx(
        float(model(ids, labels=labels).loss.detach()), abs=1e-5
    )
