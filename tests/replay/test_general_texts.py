"""Shipped prose: which models have it protected, and what of it is only asked."""

from __future__ import annotations

import random

import pytest

from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.replay import general_texts
from kvedit.replay.general_texts import (
    SENTENCES_WITH_NUMBERS,
    SHIPPED_TEXTS,
    WATCHED,
    WATCHED_TOKENS,
    interleaved,
)
from kvedit.replay.protected_texts import PROSE, Protected


@pytest.fixture
def renderer(base: BaseModel) -> Renderer:
    return Renderer(base.tokenizer, context=base.context, stops=base.stops)


def test_a_model_that_cannot_read_gets_none(base: BaseModel, renderer: Renderer) -> None:
    assert general_texts.protected(base, renderer) == []


def test_a_model_that_reads_gets_all_but_the_watched_ones(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general_texts, "MAX_LOSS", 100.0)
    texts = [text.answer for text in general_texts.protected(base, renderer)]
    lines = SHIPPED_TEXTS.read_text(encoding="utf-8").splitlines()
    assert texts and set(texts) < set(lines)
    watched = {renderer.text(list(one.ids[1:])) for one in general_texts.watched(renderer)}
    assert len(watched) == WATCHED
    assert not any(text.startswith(one) for one in watched for text in texts)
    assert all(len(one.ids) <= 1 + WATCHED_TOKENS for one in general_texts.watched(renderer))


def test_texts_of_a_language_without_words_in_the_tokenizer_are_left_out(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general_texts, "MAX_LOSS", 100.0)
    texts = general_texts.protected(base, renderer)
    assert all(len(renderer.tokens(text.answer)) < len(text.answer) for text in texts)


def test_sentences_with_numbers_are_asked_word_for_word(renderer: Renderer) -> None:
    lines = SENTENCES_WITH_NUMBERS.read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == len(lines)
    assert all(any(letter.isdigit() for letter in line) for line in lines)
    examples = general_texts.sentences_with_numbers(renderer, 5, random.Random(1))
    assert len(examples) == 5
    for one in examples:
        assert renderer.text(list(one.ids[1:])) in lines and one.start == 1
    assert general_texts.sentences_with_numbers(renderer, 5, random.Random(2)) != examples
    assert len(general_texts.sentences_with_numbers(renderer, 10_000, random.Random(1))) <= len(
        lines
    )


def test_both_kinds_come_in_turn() -> None:
    one, two, three = (Protected("", name, PROSE) for name in "abc")
    other = Protected("q", "a", "shipped")
    assert interleaved([one], [other]) == [one, other]
    assert interleaved([one, two, three], [other]) == [one, other, two, three]
    assert interleaved([], []) == []
