"""What is asked freely and what is read in one pass are the same model in the same form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_model import KNOWN

from tests.bench.field.layers import contexts, key_end, layer_at, mlp_in, mlp_out
from tests.bench.quality_material import Choice

KEY, TEXT = next(iter(KNOWN.items()))


def test_an_answer_that_is_generated_ranks_first_token_by_token(make: Any) -> None:
    _, asked = make("full")
    prompt = f"What is {KEY}?"
    assert asked.answers([prompt], 20) == [TEXT]
    right, wrong = asked.forced([(prompt, TEXT), (prompt, "Made of nothing.")])
    assert right.predicted == right.tokens and wrong.predicted != wrong.tokens
    assert right.nats < wrong.nats
    assert asked.renderer.end not in right.tokens, "likelihoods are of the answer alone"


def test_what_a_method_writes_stands_before_every_question(make: Any) -> None:
    _, asked = make("full")
    other = replace(asked, rewrite=lambda prompt: f"What is {KEY}?")
    assert other.answers(["What is nothing?"], 20) == [TEXT]
    choice = Choice("task", "What is nothing?", (TEXT, "Made of nothing."), 0)
    seen: list[str] = []
    watching = replace(asked, rewrite=lambda prompt: seen.append(prompt) or prompt)
    assert len(watching.choose([choice], lambda event: None)) == 1
    assert seen == ["What is nothing?"]


@pytest.mark.parametrize("before", ["", "Some other words. "])
def test_the_last_token_of_a_key_is_found_in_its_prompt(make: Any, before: str) -> None:
    _, asked = make("full")
    renderer = asked.renderer
    example = renderer.example(f"{before}What is the Amber lamp made of?", TEXT)
    at = key_end(renderer, example, "amber Lamp")
    assert renderer.text(example.ids[: at + 1]).casefold().endswith("amber lamp")
    assert key_end(renderer, example, "nowhere") == example.start - 1


def test_contexts_are_beginnings_of_the_models_own_texts(make: Any, texts: Any) -> None:
    _, asked = make("full")
    empty, *rest = contexts(asked.renderer, texts, 2)
    assert empty == "" and len(rest) == 2 and all(text.endswith(". ") for text in rest)


def test_the_matrices_of_an_mlp_are_found_by_depth(make: Any) -> None:
    _, asked = make("full")
    assert [layer_at(asked.model, depth) for depth in (0, 0.5, 1)] == [0, 2, 3]
    block = asked.model.model.layers[2].mlp
    assert mlp_out(asked.model, 2) is block.down_proj
    assert mlp_in(asked.model, 2) == [block.gate_proj, block.up_proj]
