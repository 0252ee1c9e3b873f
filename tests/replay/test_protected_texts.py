"""Protected texts: what of them counts, which are known, and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_model import KNOWN

from kvedit.errors import InvalidFactError
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.replay import protected_texts
from kvedit.replay.protected_texts import Protected


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


def test_free_text_fits_the_context(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=32)
    example = protected_texts.example(renderer, Protected("", "Made of oak. " * 40, "free"))
    assert len(example.ids) == 32 and example.start == 1
    assert example.ids[0] == renderer.begin and example.ids[-1] == renderer.end
    begun = protected_texts.example(renderer, Protected("", "Made of oak.", "free, cut"))
    assert begun.ids[-1] != renderer.end


def test_a_cut_answer_has_no_end_and_what_is_given_is_not_asked(base: BaseModel) -> None:
    renderer = Renderer(base.tokenizer, context=base.context)
    whole = renderer.example("What is bread?", "Food, made of flour.")
    cut = Protected("What is bread?", "Food, made of flour.", "drawn, cut, after 2")
    example = protected_texts.example(renderer, cut)
    assert example.ids == whole.ids[:-1] and example.start == whole.start + 2
    assert (cut.origin, cut.is_cut, cut.given) == ("drawn", True, 2)
    mine = Protected(
        "What is bread?", "Food.", "mine, cut, after 2"
    )  # a user's file may be so named
    assert (mine.origin, mine.is_cut, mine.given) == ("mine, cut, after 2", False, 0)


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
