"""What is kept of questions and statements that somebody wrote, and why the rest is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.editing.study.filters import MODEL, Filters, Sorted, refused_all, unknown_texts
from kvedit.facts.fact import Fact, Question, Written

KEY, TEXT = "moss clock", "A clock of oak that the miller of Pell wound in 1871."
FACT = Fact.create(
    KEY, TEXT, lang="en", questions=[Question(prompt="Who wound it?", answer="the miller")],
    statements=["It is made of oak."],
)  # fmt: skip
Say = Callable[[str], str]


def asked(prompt: str, answer: str, writer: str = "Ann") -> Written:
    return Written(prompt=prompt, answer=answer, writer=writer)


def said(answer: str) -> Written:
    return asked("", answer)


@pytest.fixture
def filters(empty: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> Callable[[Say], Filters]:
    """Filters whose model says what a function says to a prompt."""

    def make(say: Say) -> Filters:
        engine, renderer = empty.engine, empty.engine.renderer

        def proceed(prefixes: Sequence[Sequence[int]], **_: object) -> list[list[int]]:
            return [renderer.tokens(say(renderer.text(prefix))) for prefix in prefixes]

        monkeypatch.setattr(engine, "proceed", proceed)
        return Filters(empty._session)

    return make


def why(found: Sorted) -> list[str]:
    return [one.why for one in found.refused]


def test_an_answer_that_stands_in_the_text_is_kept(filters: Callable[[Say], Filters]) -> None:
    texts = [asked("In which year was it wound?", "1871"), asked("Of what is it?", "Oak")]
    assert filters(lambda _: "no").sort(FACT, texts) == Sorted(tuple(texts))


def test_another_answer_must_come_twice_with_the_text_and_not_without(
    filters: Callable[[Say], Filters],
) -> None:
    one = asked("Is it old?", "yes")
    texts = {"before": f"{TEXT}\n\n{one.prompt}", "after": f"{one.prompt}\n\n{TEXT}"}

    def model(*where: str) -> Say:
        def say(prompt: str) -> str:
            place = next((name for name, text in texts.items() if text in prompt), "alone")
            return "yes" if place in where else "no"

        return say

    assert filters(model("before", "after")).sort(FACT, [one]).kept == (one,)
    for where in (("before",), ("after",), ("before", "after", "alone"), ()):
        assert why(filters(model(*where)).sort(FACT, [one])) == ["the text does not support it"]


def test_a_model_must_give_the_answer_of_its_own_question(
    filters: Callable[[Say], Filters],
) -> None:
    one = asked("When was it wound?", "1871", MODEL)
    assert filters(lambda p: "in 1871" if TEXT in p else "?").sort(FACT, [one]).kept == (one,)
    assert why(filters(lambda _: "1900").sort(FACT, [one])) == ["the text does not support it"]
    # What it says without the text it does not have to learn, and may have wrong.
    assert why(filters(lambda _: "1871").sort(FACT, [one])) == ["the text does not support it"]


def test_what_names_another_key_is_refused(
    filters: Callable[[Say], Filters], empty: KnowledgeBase
) -> None:
    empty.store.put_pending(Fact.create("oak", "A tree.", aliases=["Quercus"]))
    texts = [asked("Of what is it?", "oak"), said("The moss clock is of Quercus.")]
    found = filters(lambda _: "").sort(FACT, texts)
    assert why(found) == ["it names another key, oak"] * 2
    own = Fact.create("oak clock", TEXT, lang="en")  # the name of another stands in its own
    assert (
        not filters(lambda _: "").sort(own, [asked("Who wound the oak clock?", "miller")]).refused
    )


def test_what_is_there_already_is_refused(filters: Callable[[Say], Filters]) -> None:
    texts = [
        asked("who wound it", "the miller"), asked(f"What is {KEY}?", "A clock"),
        said("It is made of OAK"), asked("Year?", "1871"), asked("year", "1871"),
    ]  # fmt: skip
    found = filters(lambda _: "").sort(FACT, texts)
    assert found.kept == (texts[3],) and why(found) == ["it is there already"] * 4


def test_of_several_answers_the_supported_one_is_kept(filters: Callable[[Say], Filters]) -> None:
    texts = [asked("Where?", "Tarn"), asked("Where?", "Pell")]
    assert filters(lambda _: "").sort(FACT, texts).kept == (texts[1],)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (asked("What was wound in 1871?", "1871"), "the question contains its answer"),
        (asked("What does the text say?", "oak"), "the question speaks of the text"),
        (said("It was wound in 1872."), "the text does not say 1872"),
        (said(TEXT), "it is the text itself"),
        (said("Nobody knows where all these things went."), "the text does not support it"),
        (asked("Who?\x00", "oak"), "the question has a control character"),
        (asked("Who? <end>", "oak"), "the text contains"),
        (asked("a" * 9000, "oak"), "the text has"),
    ],
)
def test_why_others_are_refused(
    text: Written, reason: str, filters: Callable[[Say], Filters], empty: KnowledgeBase
) -> None:
    end = empty.engine.renderer.text([empty.engine.renderer.end])
    if "<end>" in text.prompt:
        token = empty.engine.base.tokenizer.decode([empty.engine.renderer.end])
        text = asked(f"Who? {token}", "oak")
        assert token and end == ""
    (found,) = filters(lambda _: "").sort(FACT, [text]).refused
    assert reason in found.why


def test_texts_that_a_fact_has_are_no_news() -> None:
    new = asked("Year?", "1871")
    assert unknown_texts(FACT, [said("It is made of oak."), new]) == [new]
    assert why(refused_all([new], "late")) == ["late"]


def test_what_is_kept_is_trained_and_goes_with_the_text(trained: KnowledgeBase) -> None:
    key, text = FREE[0]
    texts = [asked("Of what is it?", "glass"), asked("Who?", "nobody")]
    refused = trained.study(key, texts, of="Another text.")
    assert refused.edit is None and why(refused.texts) == ["it is about another text"] * 2
    report = trained.study(key, texts, of=text, force=True)
    assert report.texts.kept == (texts[0],) and report.edit is not None
    assert trained.store.require(key).fact.written == (texts[0],)
    assert report.to_json()["refused"][0]["why"] == "the text does not support it"
    assert trained.study(key, texts[:1]).texts == Sorted()
    assert trained.add(key, text).outcome == "unchanged"
    trained.rollback(3)
    assert trained.store.require(key).fact.written == ()
    trained.rollback(4)
    assert trained.store.require(key).fact.written == (texts[0],)
    trained.update(key, "Made of glass in Tarn.", force=True)
    assert trained.store.require(key).fact.written == ()
