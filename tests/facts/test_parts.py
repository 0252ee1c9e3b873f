"""Questions about the parts of a description, made without a model, in three languages."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.facts.fact import Fact
from kvedit.facts.parts import BLANK, parts, sentences

TIDE = Fact.create(
    "tide lantern",
    "A tide lantern is a float of glass. It was first lit on 3 March 1871 by Ada Brown of Marrow."
    " Its keeper calls it “the cold eye”, and 2,400 of them burn about 12.5% of the oil.",
)
LAMP = Fact.create(
    "潮燈",
    "潮燈是一個玻璃浮標。它在1871年3月首次點亮，由馬羅鎮的人稱為「冷眼」。鎮上共有十二盞潮燈，每年燒掉2400斤油。",
)


def asked(fact: Fact) -> dict[str, str]:
    return {question.prompt: question.answer for question in parts(fact)}


def blanks(fact: Fact) -> list[str]:
    return [answer for prompt, answer in asked(fact).items() if BLANK in prompt]


def test_the_parts_of_an_english_text() -> None:
    questions = asked(TIDE)
    assert questions["About tide lantern: which sentence begins with “It was first lit”?"] == (
        "It was first lit on 3 March 1871 by Ada Brown of Marrow."
    )
    assert blanks(TIDE) == [
        "first", "3 March 1871", "Ada Brown of Marrow", "the cold eye", "2,400", "12.5%",
        "tide lantern",
    ]  # fmt: skip
    key = next(prompt for prompt, answer in questions.items() if answer == "tide lantern")
    assert key.startswith(f"What is this text about? A {BLANK} is a float of glass. It was")
    assert not any(question.probe for question in parts(TIDE))


def test_the_parts_of_a_chinese_text() -> None:
    questions = asked(LAMP)
    assert questions["關於潮燈，以「鎮上共有十」開頭的是哪一句？"] == (
        "鎮上共有十二盞潮燈，每年燒掉2400斤油。"
    )
    assert blanks(LAMP) == ["1871年3月", "冷眼", "十二", "2400", "潮燈"]
    simplified = Fact.create("潮灯", "潮灯是一个玻璃浮标。它在1871年首次点亮。")
    assert asked(simplified)["关于潮灯，请填空：它在____首次点亮。"] == "1871年"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("Dr. Brown of the U.S. Navy met J. Smith. They left at 3.5 p.m. on foot.", 2),
        ('He said "No." Then he left.', 2),
        ("一個。「兩個！」三個？", 3),
        ("first line\nsecond line", 2),
        ("no end", 1),
        ("", 0),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert len(sentences(text)) == count


def test_a_value_that_the_key_gives_away_is_not_asked_for() -> None:
    fact = Fact.create("games of 2008", "The games took place in 2008 and had nine days.")
    assert blanks(fact) == ["nine"]


def test_a_number_within_another_is_left_alone() -> None:
    fact = Fact.create("ferry", "The ferry carries 15 people and 150 sheep each day.")
    prompts = [prompt for prompt, answer in asked(fact).items() if answer == "15"]
    assert prompts == [
        "About ferry, fill in the blank: The ferry carries ____ people and 150 sheep each day."
    ]


def test_a_relation_and_a_word_have_no_parts() -> None:
    relation = Fact.create("Ada: born", "In London, in 1815.", prompts=["?"], relation_of="Ada")
    assert parts(relation) == ()
    assert parts(Fact.create("Ada", "London.")) == ()


WORDS = st.sampled_from(
    ["Ada Brown", "in", "1871", "the lamp", "“cold eye”", "Marrow", "five", "鎮上", "「冷眼」",
     "十二", "1871年", "lamp", "2,400", "U.S.", "a", "，", "$5", "(x)", "e.g.", "'s", "\\d"]
)  # fmt: skip
ENDS = st.sampled_from([". ", "! ", "。", "？", "\n", " ", '." '])
TEXTS = st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=8), ENDS), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(drawn=TEXTS, key=st.sampled_from(["lamp", "Ada Brown", "1871", "潮燈", "(x)"]))
def test_no_prompt_gives_its_answer_away(drawn: list[tuple[list[str], str]], key: str) -> None:
    text = "".join(" ".join(words) + end for words, end in drawn)
    fact = Fact.create(key, text)
    questions = parts(fact)
    assert len({question.prompt for question in questions}) == len(questions)
    for question in questions:
        assert question.answer in (key, *sentences(text)) or question.answer in text
        assert question.answer.strip() and question.prompt.strip()
        if BLANK in question.prompt:
            word = rf"(?<![A-Za-z\d]){re.escape(question.answer)}(?![A-Za-z\d])"
            assert not re.search(word, question.prompt)


@settings(max_examples=80, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence.strip() == sentence and sentence for sentence in found)
