"""Protected text: made by the model itself, the same each time, never its own probes."""

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


def made(base: BaseModel, *extra: Protected, seed: int = 0) -> ProtectedSet:
    renderer = Renderer(base.tokenizer, context=base.context)
    return protected_texts.make(base, renderer, CONFIG, extra=extra, seed=seed)


def test_controls_and_probes_are_disjoint_and_asked_once(base: BaseModel) -> None:
    found = made(base)
    assert len(found.locality) == 8
    prompts = [text.prompt for text in (*found.control, *found.locality) if text.prompt]
    assert len(set(prompts)) == len(prompts) > 16
    assert {text.source for text in found.locality} == {"drawn"}
    assert {"drawn", "free"} <= {text.source for text in found.control}


def test_every_answer_is_the_models_own(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=base.context)
    found = made(base)
    asked = [text for text in (*found.control, *found.locality) if text.prompt]
    outcomes = scoring.recall(
        base.model, [protected_texts.example(renderer, text) for text in asked]
    )
    assert all(outcome.passed for outcome in outcomes)


def test_it_finds_what_the_model_knows(base: BaseModel) -> None:
    answers = {text.answer for text in made(base).control}
    assert len(answers & set(KNOWN.values())) >= 4


def test_the_same_seed_gives_the_same_texts(base: BaseModel) -> None:
    state = torch.random.get_rng_state()
    first = made(base)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert made(base) == first != made(base, seed=1)


def test_the_users_texts_are_all_kept_and_not_asked_again(base: BaseModel) -> None:
    shipped = protected_texts.SHIPPED.read_text(encoding="utf-8").splitlines()[0]
    drawn = made(base).locality[0].prompt
    own = [Protected(shipped, "Mine.", "own"), Protected(drawn, "Mine too.", "own")]
    found = made(base, *own)
    assert list(found.control[:2]) == own
    prompts = [text.prompt for text in (*found.control, *found.locality)]
    assert prompts.count(shipped) == prompts.count(drawn) == 1


def test_guesses_are_not_known_and_a_users_texts_always_are(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=base.context)
    own = [Protected("What is bread?", "Something that nobody says.", "own.txt")]
    key, answer = next(iter(KNOWN.items()))
    heart = [Protected(f"What is {name}?", text, "drawn") for name, text in KNOWN.items()]
    again = Protected(f"Tell me about {key}.", answer, "drawn")
    guess = Protected("What is a moth?", "Made of oak. Or of glass, or paper.", "drawn")
    found = protected_texts.known(base, renderer, [guess, *heart, again, *own])
    assert found[0] == own[0] and guess not in found
    said = [text.answer for text in found[1:]]
    assert len(said) == len(set(said)) > len(set(KNOWN.values())) / 2
    assert protected_texts.known(base, renderer, []) == ()


def test_a_model_that_is_sure_of_little_keeps_its_surer_half(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protected_texts, "SURE", 0.0)
    renderer = Renderer(base.tokenizer, context=base.context)
    texts = [Protected(f"What is {key}?", said, "drawn") for key, said in KNOWN.items()]
    told = {text.answer for text in texts}
    found = protected_texts.known(base, renderer, texts)
    assert 0 < len(found) <= len(texts) // 2 and {text.answer for text in found} < told
    recited = [Protected(text.prompt, text.answer, protected_texts.EXTRACTED) for text in texts]
    again = protected_texts.known(base, renderer, recited)  # not halved once more
    assert {text.answer for text in again} == told


def test_without_a_chat_template_nothing_is_drawn(base: BaseModel) -> None:
    base.tokenizer.chat_template = None
    found = made(base)
    assert found.locality == ()
    assert not [text for text in found.control if text.source == "drawn"]


def test_free_text_fits_the_context(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=32)
    example = protected_texts.example(renderer, Protected("", "Made of oak. " * 40, "free"))
    assert len(example.ids) == 32 and example.start == 1
    assert example.ids[0] == renderer.begin


def test_reading_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text(
        '\ufeff{"prompt": "What is bread?", "answer": "Food."}\n\n  a line of text \n',
        encoding="utf-8",
    )
    assert protected_texts.read_file(file) == [
        Protected("What is bread?", "Food.", "own.txt"),
        Protected("", "a line of text", "own.txt"),
    ]


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "x"}', '{"prompt": "x", "answer": ""}', '{"prompt": 1, "answer": "y"}', "{"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(f"fine\n{line}\n", encoding="utf-8")
    with pytest.raises(InvalidFactError, match="line 2"):
        protected_texts.read_file(file)
