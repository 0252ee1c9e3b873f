"""Knowledge extraction: nearly complete, one text per answer, no question twice."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import pytest
import torch
from small_model import KNOWN

from kvedit.model import scoring
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.replay import extraction, protected_texts, questions
from kvedit.replay.protected_texts import EXTRACTED, Protected


def extract_knowledge(*args: Any, **options: Any) -> tuple[Protected, ...]:
    """The texts alone."""
    return extraction.extract_knowledge(*args, **options)[0]


@pytest.fixture
def renderer(base: BaseModel) -> Renderer:
    return Renderer(base.tokenizer, context=base.context)


def test_extracted_texts_are_known_and_each_answer_occurs_once(
    base: BaseModel, renderer: Renderer
) -> None:
    texts = extract_knowledge(base, renderer, 256, known=(), seed=1)
    assert texts and texts == extract_knowledge(base, renderer, 256, known=(), seed=1)
    answers = [text.answer for text in texts]
    assert len(set(answers)) == len(answers)
    assert {text.source for text in texts} == {EXTRACTED}
    # Guesses have answers of the same form; confident answers are mostly what the model knows.
    assert len(set(answers) & set(KNOWN.values())) >= len(answers) / 2
    outcomes = scoring.recall(
        base.model, [protected_texts.example(renderer, text) for text in texts]
    )
    assert all(outcome.passed for outcome in outcomes)


def test_nearly_all_that_the_model_knows_is_extracted(base: BaseModel, renderer: Renderer) -> None:
    answers = {text.answer for text in extract_knowledge(base, renderer, 2000, known=(), seed=1)}
    asked = [renderer.example(f"What is {key}?", answer) for key, answer in KNOWN.items()]
    outcomes = scoring.recall(base.model, asked)
    known = {one.answer for one, outcome in zip(asked, outcomes, strict=True) if outcome.passed}
    assert len(answers & known) >= 0.9 * len(known)


def test_known_texts_are_not_extracted_again(base: BaseModel, renderer: Renderer) -> None:
    first = extract_knowledge(base, renderer, 256, known=(), seed=1)
    half = first[::2]
    second = extract_knowledge(base, renderer, 256, known=half, seed=1)
    assert not {text.prompt for text in second} & {text.prompt for text in half}
    assert not {text.answer for text in second} & {text.answer for text in half}


def test_answers_of_unasked_prompts_come_from_other_questions(
    base: BaseModel, renderer: Renderer
) -> None:
    probes = extract_knowledge(base, renderer, 256, known=(), seed=1)[::4]
    unasked = {text.prompt for text in probes}
    texts = extract_knowledge(base, renderer, 2000, known=(), unasked=unasked, seed=1)
    assert not unasked & {text.prompt for text in texts}
    answers = {text.answer for text in probes}
    assert len(answers & {text.answer for text in texts}) > len(answers) / 2


def test_the_beam_search_gives_likely_questions_each_once(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = renderer.tokens("What is")
    found = list(extraction._beam_search(base, renderer, stem))
    assert len(set(found)) == len(found) > len(KNOWN) / 2
    assert {f"What is {key}?" for key in KNOWN} & set(found[: 2 * len(KNOWN)])
    monkeypatch.setattr(extraction, "BEAM_WIDTH", 4)
    assert len(list(extraction._beam_search(base, renderer, stem))) < len(found)
    assert len(list(extraction._beam_search(base, renderer, stem, time.monotonic()))) <= 1


def test_a_paths_score_is_its_log_probability(base: BaseModel, renderer: Renderer) -> None:
    opening = renderer.empty_user_turn()
    assert opening is not None
    before, after = opening
    stem = renderer.tokens("What is")
    (start,) = extraction._starts(base.model, renderer.token_strings, before, stem)
    assert start == [(0.0, tuple(stem))]
    score, path = max(extraction._paths(base.model, before, after, start, -9.0))
    ids = torch.tensor([[*before, *path, after]])
    with torch.no_grad():
        table = base.model(ids).logits[0].float().log_softmax(-1)
    at = range(len(before) + len(stem), ids.shape[1])
    assert sum(float(table[i - 1, ids[0, i]]) for i in at) == pytest.approx(score, abs=0.05)


def test_a_stem_may_end_within_a_token(base: BaseModel, renderer: Renderer) -> None:
    opening = renderer.empty_user_turn()
    assert opening is not None
    before, _ = opening
    words = renderer.tokens("What is")
    cut = [*words[:-1], *renderer.tokens("What i")[len(words) - 1 :]]
    assert cut != words and renderer.text(cut) == "What i"
    groups = extraction._starts(base.model, renderer.token_strings, before, cut)
    starts = [start for group in groups for start in group]
    assert tuple(words) in [tokens for _, tokens in starts]
    assert all(renderer.text(tokens).startswith("What i") for _, tokens in starts)
    assert sum(math.exp(score) for score, _ in starts) == pytest.approx(1.0, abs=1e-3)
    found = set(extraction._beam_search(base, renderer, cut))
    assert {f"What is {key}?" for key in KNOWN} & found


def test_the_source_with_most_gain_is_used_and_one_bad_round_does_not_end_it(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rich = {f"rich {i}" for i in range(2000)}
    asked: list[str] = []

    def check(self: extraction._Search, prompts: list[str]) -> int:
        asked.extend(prompts)
        if len(asked) > 600 and asked[-1] in rich and len([a for a in asked if a in rich]) < 900:
            return 0  # a round without new answers
        return len(rich.intersection(prompts))

    monkeypatch.setattr(extraction._Search, "_check", check)
    search = extraction._Search(base, renderer, (), ())
    poor = extraction._Source(iter([f"poor {i}" for i in range(5000)]))
    search.race([poor, extraction._Source(iter(sorted(rich)))], 2500, math.inf, lambda text: None)
    assert rich <= set(asked)
    assert len(asked) <= 2500 + extraction.ROUND_QUESTIONS


def test_a_search_ends_when_nothing_is_new(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        extraction._Search, "_check", lambda self, prompts: asked.extend(prompts) or 0
    )
    sources = [extraction._Source(iter([f"{n} {i}" for i in range(5000)])) for n in range(3)]
    extraction._Search(base, renderer, (), ()).race(sources, 100_000, math.inf, lambda text: None)
    assert 0 < len(asked) < 3 * 8 * extraction.ROUND_QUESTIONS
    assert {text[0] for text in asked} == {"0", "1", "2"}


def test_questions_of_a_model_that_never_ends_them_are_none(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "QUESTION_TOKENS", 1)
    assert extract_knowledge(base, renderer, 256, known=(), seed=1) == ()


def test_without_a_chat_template_free_text_is_sampled(base: BaseModel) -> None:
    base.tokenizer.chat_template = None
    renderer = Renderer(base.tokenizer, context=base.context)
    texts = extract_knowledge(base, renderer, 40, known=(Protected("", "Bread.", "free"),), seed=1)
    assert 0 < len(texts) <= 10 and {text.source for text in texts} == {"free"}


def test_progress_gives_counts_and_the_time_left(base: BaseModel, renderer: Renderer) -> None:
    lines: list[str] = []
    extract_knowledge(base, renderer, 256, known=(), seed=1, progress=lines.append)
    counts = [line for line in lines if line.startswith("extracting what the model knows: ")]
    assert counts and all(" of 256 questions, " in line for line in counts)
    assert all(re.search(r"about \d+ s left$", line) for line in counts)


def test_a_search_whose_time_is_up_says_how_many_were_asked(
    base: BaseModel, renderer: Renderer
) -> None:
    """What was not asked is left for the next group."""
    texts, asked = extraction.extract_knowledge(base, renderer, 2000, known=(), seed=1)
    assert asked == 2000 and texts
    some, asked = extraction.extract_knowledge(
        base, renderer, 64_000, seconds=0.5, known=(), seed=1
    )
    assert asked < 64_000 and len(some) <= len(texts)
    none = extraction.extract_knowledge(base, renderer, 2000, seconds=0.0, known=(), seed=1)
    assert none == ((), 0)
