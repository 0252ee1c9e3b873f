"""Questions and answers decoded together are those of the model, whole or cut; probes are sure."""

from __future__ import annotations

import pytest
import torch
from plain_decoding import greedy
from small_model import KNOWN

from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.model.scoring import recall
from kvedit.replay import questions
from kvedit.replay.protected_texts import example
from kvedit.replay.questions import Answered, Limits


@pytest.fixture
def renderer(base: BaseModel) -> Renderer:
    return Renderer(base.tokenizer, context=base.context)


def talk(
    base: BaseModel, renderer: Renderer, prompts: list[str], *, rows: int = 24, answer: int = 24
) -> list[Answered]:
    rng = torch.Generator().manual_seed(0)
    return questions.converse(base, renderer, prompts, Limits(rows, 24, answer), rng)[0]


def test_answers_are_those_of_plain_greedy_decoding(base: BaseModel, renderer: Renderer) -> None:
    prompts = [f"What is {key}?" for key in KNOWN]
    answered = talk(base, renderer, prompts)
    assert {one.prompt for one in answered if one.source == "shipped"} == set(prompts)
    assert len([one for one in answered if one.source == "drawn"]) > 8
    for one in answered[::3]:
        ids = greedy(base, renderer.prefix(one.prompt), 24, renderer.end)
        assert list(one.ids) == ids and one.ended == (len(ids) < 24)
        assert len(one.margins) == len(ids) + one.ended and min(one.margins) >= 0


def test_an_answer_that_does_not_end_is_cut_and_kept(base: BaseModel, renderer: Renderer) -> None:
    answered = talk(base, renderer, ["What is amber lamp?"], answer=5)
    assert answered and not any(one.ended for one in answered)
    texts = [text for one in answered if (text := one.text(renderer))]
    assert len(texts) > len(answered) / 2 and all(text.is_cut for text in texts)
    examples = [example(renderer, text) for text in texts]
    assert all(outcome.passed for outcome in recall(base.model, examples))
    assert all(2 <= len(one.ids) - one.start <= 5 for one in examples)


def test_once_it_is_over_what_was_answered_is_kept(base: BaseModel, renderer: Renderer) -> None:
    rng = torch.Generator().manual_seed(0)
    prompts = [f"What is {key}?" for key in KNOWN]
    limits = Limits(4, 24, 24)
    answered, _ = questions.converse(base, renderer, prompts, limits, rng, lambda: True)
    assert len(answered) >= questions.MIN_ANSWERED
    assert all(questions.MIN_CUT_TOKENS <= len(one.ids) < 24 for one in answered)


def test_questions_with_other_tokens_are_given_back(base: BaseModel) -> None:
    """A system prompt stands before a question, but not before an empty turn."""
    renderer = Renderer(base.tokenizer, context=base.context)
    renderer.prefix = lambda prompt: [7, *Renderer.prefix(renderer, prompt)]  # type: ignore[method-assign]
    rng = torch.Generator().manual_seed(0)
    answered, others = questions.converse(base, renderer, ["What is bread?"], Limits(8, 24, 8), rng)
    assert not answered and others[0] == "What is bread?" and len(others) > 1


def test_a_probe_is_what_the_model_is_sure_of(renderer: Renderer) -> None:
    ids = tuple(renderer.tokens("Made of glass in Marrow."))
    assert len(ids) >= 6

    def probe(margins: list[float], *, ended: bool = True) -> tuple[str, int] | None:
        one = Answered("What is bread?", ids, tuple(margins), ended, "drawn")
        text = one.probe(renderer)
        return None if text is None else (text.source, len(renderer.tokens(text.answer)))

    sure = [2.0] * (len(ids) + 1)
    assert probe(sure) == ("drawn", len(ids))
    assert probe(sure[:-1], ended=False) == ("drawn, cut", len(ids))
    assert probe([*sure[:-1], 0.5]) == ("drawn, cut", len(ids))  # it may go on
    assert probe([0.5, *sure[1:]]) == ("drawn, cut, after 1", len(ids))
    assert probe([*sure[:4], *[0.5] * (len(ids) - 3)]) == ("drawn, cut", 4)
    assert probe([*sure[:3], *[0.5] * (len(ids) - 2)]) is None


def test_margins_of_one_pass_are_those_of_decoding(base: BaseModel, renderer: Renderer) -> None:
    prompts = [f"What is {key}?" for key in KNOWN]
    decoded = {one.prompt: one for one in talk(base, renderer, prompts, rows=0)}
    answered = questions.answer_all(base, renderer, prompts, "shipped", 24)
    for one in questions.with_margins(base, renderer, answered):
        assert one.margins == pytest.approx(decoded[one.prompt].margins, abs=1e-3)
