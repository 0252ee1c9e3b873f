"""What the base model writes about a fact, and that it becomes a part of the fact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from small_engine import configure
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.editing.study.examples import StudyExamples
from kvedit.editing.study.writing import StudyWriter, questions_in
from kvedit.facts.fact import Fact, Written

KEY, TEXT = "moss clock", "A clock of oak that the miller of Pell wound in 1871."


def test_questions_are_read_from_a_list() -> None:
    listed = """Here are two questions:

1. Question: When was it wound?
Answer: In 1871.
**Question 2:** Who wound it? The miller.
3. Of what is it?
- "oak"
4. Unanswered?
5. 问题：它由谁上弦？
答案：磨坊主。
"""
    found = [(one.prompt, one.answer) for one in questions_in(listed)]
    assert found == [
        ("When was it wound?", "In 1871"), ("Who wound it?", "The miller"),
        ("Of what is it?", "oak"), ("它由谁上弦？", "磨坊主"),
    ]  # fmt: skip
    assert list(questions_in("")) == []


@pytest.fixture
def scripted(empty: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model that writes one question, and answers it where it reads the text; its prompts."""
    renderer, prompts = empty.engine.renderer, list[str]()

    def say(prompt: str) -> str:
        if prompt.rstrip().endswith("Question:"):
            return " Of what is it?"
        if "short questions" in prompt:
            return "1. Question: When was it wound?\nAnswer: 1871"
        if "in other words" in prompt:
            return "A clock of oak, wound in 1871."
        return "1871, by the miller of Pell" if TEXT in prompt else "?"

    def proceed(prefixes: Sequence[Sequence[int]], **_: object) -> list[list[int]]:
        texts = [renderer.text(prefix) for prefix in prefixes]
        prompts.extend(texts)
        return [renderer.tokens(say(text)) for text in texts]

    monkeypatch.setattr(empty.engine, "proceed", proceed)
    monkeypatch.setattr(renderer, "context", 4096)
    return prompts


def writer(knowledge: KnowledgeBase, questions: int) -> StudyWriter:
    session = knowledge._session
    study = replace(session.config.study, questions=questions, held_out=0.0)
    session.config = replace(session.config, study=study)
    return StudyWriter(session)


def test_the_model_writes_and_what_it_confirms_is_kept(
    empty: KnowledgeBase, scripted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(empty.engine.renderer, "chat", True)
    fact = Fact.create(KEY, TEXT, lang="en")
    (extended,) = writer(empty, 4).extended([fact])
    assert extended.written == (
        Written(prompt="When was it wound?", answer="1871", writer="model"),
        Written(prompt="Of what is it?", answer="Pell", writer="model"),
        Written(prompt="", answer="A clock of oak, wound in 1871.", writer="model"),
        Written(prompt="", answer="1871, by the miller of Pell", writer="model"),
    )
    assert replace(extended, written=()) == fact
    trained = StudyExamples(empty._session).trained(extended)
    assert [one.prompt for one in trained] == ["When was it wound?", "Of what is it?", "", ""]
    assert all(TEXT not in empty.engine.renderer.text(one.ids) for one in trained)


def test_nothing_is_written_where_nothing_is_asked_for(
    empty: KnowledgeBase, scripted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fact = Fact.create(KEY, TEXT, lang="en")
    monkeypatch.setattr(empty.engine.renderer, "chat", True)
    assert writer(empty, 0).extended([fact]) == [fact]
    given = replace(fact, written=(Written(prompt="", answer="It ticks.", writer="Ann"),))
    relation = Fact.create("clock, maker", "Pell", lang="en", relation_of="c", prompts=["Who?"])
    empty.store.put_pending(replace(given, key="seen"))
    seen = replace(fact, key="seen")
    assert writer(empty, 4).extended([given, relation, seen]) == [
        given, relation, replace(seen, written=given.written),
    ]  # fmt: skip
    monkeypatch.setattr(empty.engine.renderer, "chat", False)
    assert writer(empty, 4).extended([fact]) == [fact]
    assert scripted == []


def test_the_base_model_writes_not_the_edited_one(
    trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained.engine.renderer, "chat", True)
    at: list[int] = []
    complete = trained.engine.proceed

    def proceed(prefixes: Sequence[Sequence[int]], **options: int) -> list[list[int]]:
        at.append(trained._session.revision)
        return complete(prefixes, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trained.engine, "proceed", proceed)
    writer(trained, 2).extended([Fact.create(KEY, "Oak.", lang="en")])
    assert at and set(at) == {0}
    assert trained._session.revision == trained.store.head() > 0


def test_a_fact_that_is_added_has_what_was_written(
    empty: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(empty.store.path, recall=0, paraphrase=0, locality=0, retention=0, steps=4)
    one = Written(prompt="Of what is it?", answer="oak", writer="model")
    monkeypatch.setattr(
        StudyWriter, "extended", lambda _, facts: [replace(fact, written=(one,)) for fact in facts]
    )
    key, text = FREE[3]
    empty.add(key, text, force=True)
    assert empty.store.require(key).fact.written == (one,)
    empty.update(key, f"{text} Again.", force=True)
    assert empty.store.require(key).fact.written == (one,)
    empty.add_group([Fact.create(*fact, lang="en") for fact in FREE[4:6]], force=True)
    assert {row.fact.written for row in empty.store.facts("committed")} == {(one,)}
    empty.erase(key, force=True)
    assert empty.store.find(key) is None
