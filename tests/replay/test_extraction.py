"""What a model knows is looked for by following how it asks: found, said once, not asked twice."""

from __future__ import annotations

import math

import pytest
import torch
from small_model import KNOWN

from kvedit.model import scoring
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.replay import extraction, protected_texts
from kvedit.replay.extraction import extract_knowledge
from kvedit.replay.protected_texts import EXTRACTED, Protected


@pytest.fixture
def renderer(base: BaseModel) -> Renderer:
    return Renderer(base.tokenizer, context=base.context)


def test_what_is_recited_is_known_and_said_once(base: BaseModel, renderer: Renderer) -> None:
    found = extract_knowledge(base, renderer, 256, known=(), seed=1)
    assert found and found == extract_knowledge(base, renderer, 256, known=(), seed=1)
    answers = [text.answer for text in found]
    assert len(set(answers)) == len(answers)
    assert {text.source for text in found} == {EXTRACTED}
    # Hearsay has an answer of the same form; what the model is sure of is mostly what it knows.
    assert len(set(answers) & set(KNOWN.values())) >= len(answers) / 2
    outcomes = scoring.recall(
        base.model, [protected_texts.example(renderer, text) for text in found]
    )
    assert all(outcome.passed for outcome in outcomes)


def test_it_finds_nearly_all_that_the_model_knows(base: BaseModel, renderer: Renderer) -> None:
    found = {text.answer for text in extract_knowledge(base, renderer, 2000, known=(), seed=1)}
    asked = [renderer.example(f"What is {key}?", said) for key, said in KNOWN.items()]
    outcomes = scoring.recall(base.model, asked)
    known = {one.answer for one, outcome in zip(asked, outcomes, strict=True) if outcome.passed}
    assert len(found & known) >= 0.9 * len(known)


def test_what_is_known_already_is_not_said_again(base: BaseModel, renderer: Renderer) -> None:
    first = extract_knowledge(base, renderer, 256, known=(), seed=1)
    half = first[::2]
    second = extract_knowledge(base, renderer, 256, known=half, seed=1)
    assert not {text.prompt for text in second} & {text.prompt for text in half}
    assert not {text.answer for text in second} & {text.answer for text in half}


def test_what_is_not_to_be_asked_is_answered_under_other_questions(
    base: BaseModel, renderer: Renderer
) -> None:
    probes_of = extract_knowledge(base, renderer, 256, known=(), seed=1)[::4]
    unasked = {text.prompt for text in probes_of}
    found = extract_knowledge(base, renderer, 2000, known=(), unasked=unasked, seed=1)
    assert not unasked & {text.prompt for text in found}
    answers = {text.answer for text in probes_of}
    assert len(answers & {text.answer for text in found}) > len(answers) / 2


def test_likely_questions_are_followed_and_none_is_told_twice(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = renderer.tokens("What is")
    told = list(extraction._followed(base, renderer, stem))
    assert len(set(told)) == len(told) > len(KNOWN) / 2
    assert {f"What is {key}?" for key in KNOWN} & set(told[: 2 * len(KNOWN)])
    monkeypatch.setattr(extraction, "WIDTH", 4)
    assert len(list(extraction._followed(base, renderer, stem))) < len(told)


def test_what_a_path_costs_is_what_the_model_says(base: BaseModel, renderer: Renderer) -> None:
    opening = renderer.empty_user_turn()
    assert opening is not None
    before, after = opening
    stem = renderer.tokens("What is")
    (start,) = extraction._starts(base.model, renderer.token_strings, before, stem)
    assert start == [(0.0, tuple(stem))]
    chance, path = max(extraction._paths(base.model, before, after, start, -9.0))
    ids = torch.tensor([[*before, *path, after]])
    with torch.no_grad():
        table = base.model(ids).logits[0].float().log_softmax(-1)
    at = range(len(before) + len(stem), ids.shape[1])
    assert sum(float(table[i - 1, ids[0, i]]) for i in at) == pytest.approx(chance, abs=0.05)


def test_a_stem_may_end_within_a_token(base: BaseModel, renderer: Renderer) -> None:
    opening = renderer.empty_user_turn()
    assert opening is not None
    before, _ = opening
    whole = renderer.tokens("What is")
    cut = [*whole[:-1], *renderer.tokens("What i")[len(whole) - 1 :]]
    assert cut != whole and renderer.text(cut) == "What i"
    found = extraction._starts(base.model, renderer.token_strings, before, cut)
    starts = [way for same in found for way in same]
    assert tuple(whole) in [way for _, way in starts]
    assert all(renderer.text(way).startswith("What i") for _, way in starts)
    assert sum(math.exp(chance) for chance, _ in starts) == pytest.approx(1.0, abs=1e-3)
    told = set(extraction._followed(base, renderer, cut))
    assert {f"What is {key}?" for key in KNOWN} & told


def test_the_richest_source_is_asked_and_one_bad_round_does_not_end_it(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rich = {f"rich {i}" for i in range(2000)}
    asked: list[str] = []

    def look(self: extraction._Search, prompts: list[str]) -> int:
        asked.extend(prompts)
        if len(asked) > 600 and asked[-1] in rich and len([a for a in asked if a in rich]) < 900:
            return 0  # a round without luck
        return len(rich.intersection(prompts))

    monkeypatch.setattr(extraction._Search, "_look", look)
    search = extraction._Search(base, renderer, (), ())
    poor = extraction._Source(iter([f"poor {i}" for i in range(5000)]))
    search.race([poor, extraction._Source(iter(sorted(rich)))], 2500, lambda text: None)
    assert rich <= set(asked)
    assert len(asked) <= 2500 + extraction.ROUND


def test_a_search_ends_when_nothing_is_new(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        extraction._Search, "_look", lambda self, prompts: asked.extend(prompts) or 0
    )
    sources = [extraction._Source(iter([f"{n} {i}" for i in range(5000)])) for n in range(3)]
    extraction._Search(base, renderer, (), ()).race(sources, 100_000, lambda text: None)
    assert 0 < len(asked) < 3 * 8 * extraction.ROUND
    assert {text[0] for text in asked} == {"0", "1", "2"}


def test_questions_of_a_model_that_never_ends_them_are_none(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protected_texts, "QUESTION_TOKENS", 1)
    assert extract_knowledge(base, renderer, 256, known=(), seed=1) == ()


def test_without_a_chat_template_more_is_written_freely(base: BaseModel) -> None:
    base.tokenizer.chat_template = None
    renderer = Renderer(base.tokenizer, context=base.context)
    found = extract_knowledge(base, renderer, 40, known=(Protected("", "Bread.", "free"),), seed=1)
    assert 0 < len(found) <= 10 and {text.source for text in found} == {"free"}
