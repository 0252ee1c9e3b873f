"""Slices of protected text: from the model itself, reproducible, as large as the time allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_model import KNOWN

from kvedit.config import ProtectConfig
from kvedit.model import scoring
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.replay import general_texts
from kvedit.replay.protected_texts import INVENTED, Protected, ProtectedSet, example
from kvedit.replay.questions import QUESTION_TOKENS, Limits
from kvedit.replay.sampling import (
    GENERAL_QUESTIONS,
    INVENTED_NAMES,
    SHIPPED_PROMPTS,
    SHORT,
    Pace,
    Sampler,
)

CONFIG = ProtectConfig(
    samples=64, long_answers=8, short_answers=16, free_texts=6, locality_probes=8
)
AMPLE = 1e6  # seconds


def sampler(base: BaseModel, config: ProtectConfig = CONFIG) -> Sampler:
    return Sampler(base, Renderer(base.tokenizer, context=base.context), config)


def sample(base: BaseModel, *extra: Protected, number: int = 0) -> ProtectedSet:
    one = sampler(base)
    return one.sample(ProtectedSet(extra, ()), number, one.limits(AMPLE, 0, number))


def prompts(texts: ProtectedSet) -> list[str]:
    return [text.prompt for text in (*texts.control, *texts.locality)]


def test_controls_and_probes_are_disjoint_and_asked_once(base: BaseModel) -> None:
    texts = sample(base)
    assert len(texts.locality) == 8
    assert len(set(prompts(texts))) == len(prompts(texts)) > 16
    assert {text.origin for text in texts.control} == {"drawn", "shipped"}
    drawn = [text for text in texts.control if text.origin == "drawn"]
    assert len(drawn) <= 8 + 16


def test_a_further_slice_is_about_other_questions(base: BaseModel) -> None:
    one = sampler(base)
    first = one.sample(ProtectedSet((), ()), 0, one.limits(AMPLE, 0, 0))
    second = one.sample(first, 1, one.limits(AMPLE, 32, 1))
    assert not set(prompts(first)) & set(prompts(second))
    assert not second.locality  # there are enough


def test_every_answer_is_generated_by_the_model(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=base.context)
    texts = sample(base)
    asked = [example(renderer, text) for text in (*texts.control, *texts.locality)]
    assert all(outcome.passed for outcome in scoring.recall(base.model, asked))
    probes = scoring.recall(base.model, [example(renderer, text) for text in texts.locality])
    assert min(outcome.margin for outcome in probes) >= 0.99


def test_control_texts_include_what_the_model_knows(base: BaseModel) -> None:
    answers = {text.answer for text in sample(base).control}
    assert len(answers & set(KNOWN.values())) >= 4


def test_the_same_number_gives_the_same_texts(base: BaseModel) -> None:
    state = torch.random.get_rng_state()
    first = sample(base)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert sample(base) == first != sample(base, number=1)


def test_the_users_texts_are_not_asked_again(base: BaseModel) -> None:
    shipped = SHIPPED_PROMPTS.read_text(encoding="utf-8").splitlines()[0]
    drawn = sample(base).locality[0].prompt
    given = [Protected(shipped, "Mine.", "user"), Protected(drawn, "Mine too.", "user")]
    assert not {shipped, drawn} & set(prompts(sample(base, *given)))


def test_without_a_chat_template_only_shipped_questions_are_asked(base: BaseModel) -> None:
    base.tokenizer.chat_template = None
    texts = sample(base)
    assert {text.origin for text in (*texts.control, *texts.locality)} <= {"shipped"}


def test_what_fits_follows_from_the_pace(base: BaseModel) -> None:
    config = replace(CONFIG, samples=2400)

    def limits(pace: Pace, number: int = 1) -> Limits:
        one = sampler(base, config)
        one._pace = pace
        return one.limits(60.0, 0, number)

    full = limits(Pace(0.001, 0.0001))
    assert (full.question, full.answer) == (QUESTION_TOKENS, base.context // 2)
    between = limits(Pace(0.01, 0.0005))
    assert between.rows == full.rows and SHORT.answer < between.answer < full.answer
    slow = limits(Pace(0.4, 0.006))
    assert slow.answer == SHORT.answer and SHORT.rows < slow.rows < full.rows
    steps = slow.question + slow.answer
    assert steps * Pace(0.4, 0.006).step(slow.rows) < 60
    assert limits(Pace(10.0, 1.0)).rows == SHORT.rows  # something there must be
    first = limits(Pace(0.4, 0.006), number=0)  # general questions are not sampled
    assert first.rows == 0 and first.given > slow.rows


def test_a_slow_model_is_asked_general_questions_first(base: BaseModel) -> None:
    one = sampler(base)
    one._pace = Pace(0.4, 0.006)
    limits = replace(one.limits(60.0, 0, 0), given=24)
    texts = one.sample(ProtectedSet((), ()), 0, limits)
    general = GENERAL_QUESTIONS.read_text(encoding="utf-8").splitlines()
    assert set(prompts(texts)) <= set(general)
    assert {text.origin for text in texts.control} == {"shipped"}


def test_a_model_that_reads_is_asked_about_invented_names(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general_texts, "reads", lambda *_: True)
    invented = INVENTED_NAMES.read_text(encoding="utf-8").splitlines()
    for pace in (Pace(0.4, 0.006), Pace(1e-4, 1e-6)):  # a slow model and a fast one
        one = sampler(base)
        one._pace = pace
        texts = one.sample(ProtectedSet((), ()), 0, replace(one.limits(60.0, 0, 0), given=24))
        named = [t for t in (*texts.control, *texts.locality) if t.prompt in invented]
        assert 4 <= len(named) <= 6 and {text.origin for text in named} == {INVENTED}


def test_a_pace_is_measured(base: BaseModel) -> None:
    one = sampler(base)
    assert one.pace.one > 0 and one.pace.more >= 0
    assert one.pace.step(1) == one.pace.one and one.least_seconds > 0


def test_free_texts_are_cut_where_time_runs_short(base: BaseModel) -> None:
    one = sampler(base)
    whole = one.write_freely(AMPLE)
    assert 0 < len(whole) <= 6 and {text.origin for text in whole} == {"free"}
    one._pace = Pace(1.0, 0.1)
    short = one.write_freely(20.0)
    renderer = Renderer(base.tokenizer, context=base.context)
    assert all(len(renderer.tokens(text.answer)) <= SHORT.answer + 1 for text in short)
