"""Protected texts: from the model itself, reproducible, control texts and probes disjoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import KNOWN

from kvedit.config import ProtectConfig
from kvedit.errors import InvalidFactError
from kvedit.model import scoring
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.replay import protected_texts
from kvedit.replay.protected_texts import Protected, ProtectedSet

CONFIG = ProtectConfig(
    samples=64, long_answers=8, short_answers=16, free_texts=6, locality_probes=8
)


def sample(base: BaseModel, *extra: Protected, number: int = 0) -> ProtectedSet:
    renderer = Renderer(base.tokenizer, context=base.context)
    sampler = Sampler(base, renderer, CONFIG)
    present = ProtectedSet(extra, ())
    limits = sampler.limits(1e6, 0)
    return sampler.sample(present, number, limits)


def test_controls_and_probes_are_disjoint_and_asked_once(base: BaseModel) -> None:
    texts = sample(base)
    assert len(texts.locality) == 8
    prompts = [text.prompt for text in (*texts.control, *texts.locality) if text.prompt]
    assert len(set(prompts)) == len(prompts) > 16
    assert {text.source for text in texts.locality} == {"drawn"}
    assert {"drawn", "free"} <= {text.source for text in texts.control}


def test_every_answer_is_generated_by_the_model(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=base.context)
    texts = sample(base)
    asked = [text for text in (*texts.control, *texts.locality) if text.prompt]
    outcomes = scoring.recall(
        base.model, [protected_texts.example(renderer, text) for text in asked]
    )
    assert all(outcome.passed for outcome in outcomes)


def test_control_texts_include_what_the_model_knows(base: BaseModel) -> None:
    answers = {text.answer for text in sample(base).control}
    assert len(answers & set(KNOWN.values())) >= 4


def test_the_same_seed_gives_the_same_texts(base: BaseModel) -> None:
    state = torch.random.get_rng_state()
    first = sample(base)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert sample(base) == first != sample(base, seed=1)


def test_the_users_texts_are_all_included_and_not_asked_again(base: BaseModel) -> None:
    shipped = protected_texts.SHIPPED_PROMPTS.read_text(encoding="utf-8").splitlines()[0]
    drawn = sample(base).locality[0].prompt
    given = [Protected(shipped, "Mine.", "user"), Protected(drawn, "Mine too.", "user")]
    texts = sample(base, *given)
    assert list(texts.control[:2]) == given
    prompts = [text.prompt for text in (*texts.control, *texts.locality)]
    assert prompts.count(shipped) == prompts.count(drawn) == 1


def test_guesses_are_not_known_and_a_users_texts_always_are(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=base.context)
    given = [Protected("What is bread?", "Something that nobody says.", "texts.txt")]
    key, answer = next(iter(KNOWN.items()))
    correct = [Protected(f"What is {name}?", text, "drawn") for name, text in KNOWN.items()]
    again = Protected(f"Tell me about {key}.", answer, "drawn")
    guess = Protected("What is a moth?", "Made of oak. Or of glass, or paper.", "drawn")
    texts = protected_texts.known(base, renderer, [guess, *correct, again, *given])
    assert texts[0] == given[0] and guess not in texts
    answers = [text.answer for text in texts[1:]]
    assert len(answers) == len(set(answers)) > len(set(KNOWN.values())) / 2
    assert protected_texts.known(base, renderer, []) == ()


def test_a_model_confident_of_little_keeps_its_more_confident_half(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protected_texts, "KNOWN_LOSS", 0.0)
    renderer = Renderer(base.tokenizer, context=base.context)
    sampled = [Protected(f"What is {key}?", answer, "drawn") for key, answer in KNOWN.items()]
    answers = {text.answer for text in sampled}
    texts = protected_texts.known(base, renderer, sampled)
    assert 0 < len(texts) <= len(sampled) // 2 and {text.answer for text in texts} < answers
    extracted = [Protected(text.prompt, text.answer, protected_texts.EXTRACTED) for text in sampled]
    again = protected_texts.known(base, renderer, extracted)  # not halved once more
    assert {text.answer for text in again} == answers


def test_without_a_chat_template_no_questions_are_sampled(base: BaseModel) -> None:
    base.tokenizer.chat_template = None
    texts = sample(base)
    assert texts.locality == ()
    assert not [text for text in texts.control if text.source == "drawn"]


def test_free_text_fits_the_context(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=32)
    example = protected_texts.example(renderer, Protected("", "Made of oak. " * 40, "free"))
    assert len(example.ids) == 32 and example.start == 1
    assert example.ids[0] == renderer.begin


def test_reading_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text(
        '\ufeff{"prompt": "What is bread?", "answer": "Food."}\n\n  a line of text \n',
        encoding="utf-8",
    )
    assert protected_texts.read_file(file) == [
        Protected("What is bread?", "Food.", "texts.txt"),
        Protected("", "a line of text", "texts.txt"),
    ]


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "x"}', '{"prompt": "x", "answer": ""}', '{"prompt": 1, "answer": "y"}', "{"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(f"fine\n{line}\n", encoding="utf-8")
    with pytest.raises(InvalidFactError, match="line 2"):
        protected_texts.read_file(file)
