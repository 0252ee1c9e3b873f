"""Facts are checked and cleaned on the way in, and come back from JSON as they went."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.errors import InvalidFactError
from kvedit.facts.fact import MAX_KEY, Fact, LocalityProbe, Question, Written
from kvedit.facts.keys import is_blank

LINE = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=40
).filter(lambda text: not is_blank(text))
CHARACTERS = st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t")
TEXT = st.text(CHARACTERS, min_size=1, max_size=60).filter(lambda text: not is_blank(text))
PROBES = st.lists(st.builds(LocalityProbe, prompt=TEXT, answer=st.none() | TEXT), max_size=2)

QUESTIONS = st.lists(
    st.builds(Question, prompt=TEXT, answer=TEXT, probe=st.booleans()),
    max_size=3,
    unique_by=lambda one: one.prompt.replace("\r\n", "\n").strip(),
)


@settings(max_examples=50, deadline=None)
@given(
    key=LINE,
    text=TEXT,
    aliases=st.lists(LINE, max_size=3),
    prompts=st.lists(TEXT, max_size=3),
    locality=PROBES,
    questions=QUESTIONS,
    written=st.lists(st.builds(Written, prompt=TEXT | st.just(""), answer=TEXT, writer=LINE)),
    relation_of=st.none() | LINE,
    source=st.none() | TEXT,
)
def test_a_fact_survives_json(
    key: str,
    text: str,
    aliases: list[str],
    prompts: list[str],
    locality: list[LocalityProbe],
    questions: list[Question],
    written: list[Written],
    relation_of: str | None,
    source: str | None,
) -> None:
    fact = Fact.create(
        key,
        text,
        aliases=aliases,
        prompts=prompts,
        paraphrases=prompts,
        locality=locality,
        questions=questions,
        statements=prompts,
        written=written,
        relation_of=relation_of if prompts else None,
        source=source,
    )
    assert Fact.from_json(json.loads(json.dumps(fact.to_json()))) == fact


def test_parts_are_stripped_and_repetitions_dropped() -> None:
    fact = Fact.create(" key ", "\r\n a\r\nb \n", aliases=["x", " x "], prompts=["p?", "p?"])
    assert (fact.key, fact.description) == ("key", "a\nb")
    assert (fact.aliases, fact.prompts) == (("x",), ("p?",))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("", "text", "the key is empty"),
        (" \n", "text", "the key is empty"),
        ("key", " \t", "the description is empty"),
        ("a\nb", "text", "line break"),
        ("a\0b", "text", r"control character \(U\+0000\) at position 1"),
        ("key", "bad \x1b[31m", r"U\+001B"),
        ("key", "half \ud800", r"U\+D800"),
        ("k" * (MAX_KEY + 1), "text", f"{MAX_KEY + 1} characters, {MAX_KEY} are allowed"),
    ],
)
def test_a_bad_key_or_text_is_refused(key: str, text: str, message: str) -> None:
    with pytest.raises(InvalidFactError, match=message):
        Fact.create(key, text)


def test_the_longest_key_is_accepted() -> None:
    assert len(Fact.create("k" * MAX_KEY, "text").key) == MAX_KEY


@pytest.mark.parametrize("part", ["aliases", "prompts", "paraphrases"])
def test_an_empty_part_of_a_list_is_refused(part: str) -> None:
    with pytest.raises(InvalidFactError, match="is empty"):
        Fact.from_json({"key": "k", "description": "d", part: [""]})


def test_an_unknown_language_is_refused_with_those_known() -> None:
    with pytest.raises(InvalidFactError) as caught:
        Fact.create("k", "d", lang="fr")
    assert "zh-Hant" in caught.value.hint


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must be a JSON object, not a list"),
        ({"description": "d"}, '"key" is missing'),
        ({"key": 7, "description": "d"}, '"key" must be a string, not a number'),
        ({"key": "k", "description": None}, '"description" is missing'),
        ({"key": "k", "description": "d", "aliases": "x"}, '"aliases" must be a list'),
        ({"key": "k", "description": "d", "prompts": [1]}, '"prompts" must hold strings'),
        ({"key": "k", "description": "d", "locality": [True]}, "not true or false"),
        ({"key": "k", "description": "d", "locality": [{}]}, '"prompt" is missing'),
        ({"key": "k", "description": "d", "questions": ["q?"]}, '"questions" must hold objects'),
        ({"key": "k", "description": "d", "questions": [{}]}, '"prompt" is missing'),
        ({"key": "k", "description": "d", "questions": [{"prompt": "q?"}]}, '"answer" is missing'),
        (
            {"key": "k", "description": "d", "questions": [{"prompt": "q?", "answer": 4}]},
            '"answer" must be a string, not a number',
        ),
        (
            {"key": "k", "description": "d", "questions": [{"question": "q", "probe": 1}]},
            '"probe" must be true or false, not a number',
        ),
        ({"key": "k", "description": "d", "statements": "s"}, '"statements" must be a list'),
        ({"key": "k", "description": "d", "relation_of": "x"}, "relation k has no prompt"),
    ],
)
def test_json_that_is_no_fact_is_refused(document: object, message: str) -> None:
    with pytest.raises(InvalidFactError, match=message):
        Fact.from_json(document)


def test_unknown_names_are_ignored_and_a_plain_question_is_a_locality_probe() -> None:
    fact = Fact.from_json({"key": "k", "description": "d", "era": "tang", "locality": ["q?"]})
    assert fact.locality == (LocalityProbe(prompt="q?"),)


def test_another_description_keeps_the_rest_and_is_checked() -> None:
    fact = Fact.create("k", "d", aliases=["a"], source="s")
    changed = fact.with_description(" new ")
    assert changed.to_json() == {**fact.to_json(), "description": "new"}
    with pytest.raises(InvalidFactError):
        fact.with_description("")


def test_questions_are_cleaned_and_given_once() -> None:
    given = {"question": " Where? ", "answer": " Marrow\n"}
    again = {"prompt": "Where?", "answer": "Marrow"}
    hidden = {"prompt": "Of what?", "answer": "glass", "probe": True}
    fact = Fact.from_json({"key": "k", "description": "d", "questions": [given, again, hidden]})
    assert fact.questions == (
        Question(prompt="Where?", answer="Marrow"),
        Question(prompt="Of what?", answer="glass", probe=True),
    )
    assert fact.to_json()["questions"] == [again, hidden]


def test_a_question_with_two_answers_is_refused() -> None:
    pair = [Question(prompt="Where?", answer=answer) for answer in ("Marrow", "Tarn")]
    with pytest.raises(InvalidFactError, match=r"'Where\?' has two answers: 'Marrow' and 'Tarn'"):
        Fact.create("k", "d", questions=pair)


def test_another_description_drops_what_it_does_not_say() -> None:
    questions = [Question(prompt=f"{word}?", answer=word) for word in ("Marrow", "glass")]
    written = [Written(prompt="From where?", answer="Marrow", writer="model")]
    fact = Fact.create(
        "k", "Glass from Marrow.", questions=questions, statements=["It is glass."], written=written
    )
    changed = fact.with_description("Silk from Marrow.")
    assert (changed.questions, changed.statements) == (fact.questions[:1], ())
    assert fact.written == tuple(written) and changed.written == ()
    assert fact.with_description("Glass from Marrow.") == fact


def test_what_was_written_stands_beside_what_was_given() -> None:
    given = Question(prompt="Where?", answer="Marrow")
    texts = [
        Written(prompt="Where?", answer="Tarn", writer="model"),
        Written(prompt="Of what?", answer="glass", writer="model"),
        Written(prompt="Of what?", answer="silk", writer="Ann"),
        Written(prompt="", answer="It is glass.", writer="Ann"),
    ]
    fact = Fact.create("k", "d", questions=[given], statements=["S."], written=texts)
    assert fact.written == (texts[1], texts[3])
    assert fact.all_questions == (given, Question(prompt="Of what?", answer="glass"))
    assert fact.all_statements == ("S.", "It is glass.")
    assert fact.to_json()["written"] == [
        {"prompt": "Of what?", "answer": "glass", "writer": "model"},
        {"prompt": "", "answer": "It is glass.", "writer": "Ann"},
    ]
    with pytest.raises(InvalidFactError, match='"written" must hold objects'):
        Fact.from_json({"key": "k", "description": "d", "written": ["w"]})


def test_a_relation_is_called_by_its_subject() -> None:
    relation = Fact.create("Ada: … was born in", "London", prompts=["Ada"], relation_of=" Ada ")
    assert (relation.name, Fact.create("Ada", "A pioneer.").name) == ("Ada", "Ada")
    assert Fact.create("k", "d").name == "k"


def test_the_language_given_wins() -> None:
    assert Fact.create("k", "夢中情爐", lang="en").lang == "en"


@pytest.mark.parametrize(
    "blank",
    ["\u200b", "\u200d\ufe0f", "\u202e\u2066", "\u3164", "\u2800 \u2800", "\u00ad", "\ufeff"],
)
def test_what_shows_nothing_is_empty(blank: str) -> None:
    with pytest.raises(InvalidFactError, match="the key is empty of visible characters"):
        Fact.create(blank, "A text.")
    with pytest.raises(InvalidFactError, match="the description is empty"):
        Fact.create("lamp", blank)
    with pytest.raises(InvalidFactError, match="the alias is empty"):
        Fact.create("lamp", "A text.", aliases=[blank])
