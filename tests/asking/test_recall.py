"""Texts of facts that a question names, before the question."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_engine import open_gate
from small_model import FREE, OTHER

from kvedit import KnowledgeBase
from kvedit.errors import TextTooLongError, UsageError
from kvedit.facts.fact import Fact
from tests.bench.verification import commit

NAMED = "Where was the tide lantern made, and the wind-ledger?"
UNNAMED = "Where was the amber lamp made?"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_nothing_changes_to_the_bit_without_a_name(trained: KnowledgeBase) -> None:
    messages = [user(UNNAMED)]
    for source in ("model", "store"):
        assert trained.recall(messages, source=source).messages == tuple(messages)
        assert trained.ask(UNNAMED, recall=source) == trained.ask(UNNAMED)
        streamed = "".join(trained.stream(messages, recall=source))
        assert streamed == trained.chat(messages)
    assert trained.answer(messages, recall=True).sources == ()


def test_a_phrasing_of_its_own_is_answered_by_the_weights_alone(trained: KnowledgeBase) -> None:
    key, text = FREE[0]
    for question in (f"What is {key}?", f"tell me about {key}", f"What do you know about {key}?"):
        answer = trained.answer([user(question)], recall=True)
        assert (answer.sources, answer.recited) == ((), (key,))
        assert answer.text == trained.ask(question)
    assert trained.ask(f"What is {key}?", recall=True) == text


@pytest.mark.parametrize("source", ["model", "store"])
def test_the_texts_go_before_the_question(trained: KnowledgeBase, source: str) -> None:
    found = trained.recall([user(NAMED)], source=source)
    texts = [FREE[0][1], FREE[1][1]]
    assert [one.text for one in found.sources] == texts
    assert [one.key for one in found.sources] == ["tide lantern", "wind ledger"]
    assert all(one.exact and one.origin == source for one in found.sources)
    assert found.messages == (user("\n\n".join([*texts, NAMED])),)
    answer = trained.answer([user(NAMED)], recall=source)
    assert answer.text == trained.chat(found.messages) == trained.ask(NAMED, recall=source)
    assert answer.sources == found.sources
    assert "".join(trained.stream([user(NAMED)], recall=source)) == answer.text


def test_the_model_recites_what_its_weights_hold(empty: KnowledgeBase) -> None:
    commit(empty, [Fact.create("tide lantern", FREE[0][1])])  # no weight has moved
    question = user("Who lit the tide lantern?")
    empty._session.go_to(1)
    (recited,) = empty.recall([question], source="model").sources
    assert recited.text == empty.ask("What is tide lantern?") != FREE[0][1]
    assert not recited.exact
    assert empty.recall([question], source="store").sources[0].exact


def test_facts_are_those_of_the_revision_asked(trained_store: Path, random_training: None) -> None:
    open_gate(trained_store)
    with KnowledgeBase.open(trained_store) as knowledge:
        knowledge.update("tide lantern", OTHER)
        knowledge.remove("wind ledger")
        texts = {
            at: [s.text for s in knowledge.answer([user(NAMED)], at=at, recall="store").sources]
            for at in (0, 1, 3, 4, 5)
        }
    first, second = FREE[0][1], FREE[1][1]
    assert texts == {0: [], 1: [first], 3: [first, second], 4: [OTHER, second], 5: [OTHER]}


def test_in_a_conversation_a_text_comes_once_where_it_is_named_first(
    trained: KnowledgeBase,
) -> None:
    messages = [
        user("Hello"), {"role": "assistant", "content": "I know the grey bucket."},
        user("What of the tide lantern?"), {"role": "assistant", "content": "Glass."},
        user("Is the tide lantern older than the wind ledger?"),
    ]  # fmt: skip
    found = trained.recall(messages, source="store")
    assert found.messages[:2] == tuple(messages[:2])
    assert found.messages[2]["content"] == f"{FREE[0][1]}\n\nWhat of the tide lantern?"
    assert found.messages[4]["content"].startswith(f"{FREE[1][1]}\n\nIs the")
    assert [one.key for one in found.sources] == ["tide lantern", "wind ledger"]


def test_what_does_not_fit_is_left_out_and_named(trained: KnowledgeBase) -> None:
    renderer = trained.engine.renderer
    long = NAMED
    while renderer.context - len(renderer.prefix(f"{FREE[0][1]}\n\n{long}")) > 64 + 4:
        long += "?"  # until one text fits with the answer, and two do not
    found = trained.recall([user(long)], source="store")
    assert [one.key for one in found.sources] == ["tide lantern"]
    assert found.left_out == ("wind ledger",)
    assert found.messages == (user(f"{FREE[0][1]}\n\n{long}"),)
    none = trained.recall([user(long + "?" * 30)], source="store")
    assert (none.sources, none.messages) == ((), (user(long + "?" * 30),))
    assert none.left_out == ("wind ledger", "tide lantern")


def test_settings_decide_by_default(trained_store: Path) -> None:
    with (trained_store / "kvedit.toml").open("a", encoding="utf-8") as file:
        file.write('[recall]\nsource = "model"\nmax_facts = 1\n')
    with KnowledgeBase.open(trained_store) as knowledge:
        (only,) = knowledge.recall([user(NAMED)]).sources
        assert (only.key, only.origin) == ("tide lantern", "model")
        with pytest.raises(UsageError, match="no source of recalled texts called 'web'"):
            knowledge.ask(NAMED, recall="web")


def test_a_question_longer_than_the_context_is_refused(trained: KnowledgeBase) -> None:
    long = "Where was it made? " * 2000
    asks = (
        lambda: trained.ask(long),
        lambda: trained.ask(long, recall=True),
        lambda: trained.stream([user(long)]),
        lambda: trained.explain(long),
    )
    for ask in asks:
        with pytest.raises(TextTooLongError, match="the question is too long"):
            ask()
