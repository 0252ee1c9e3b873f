"""Answers: whether they have ended."""

from __future__ import annotations

from typing import Any

import pytest
from small_model import KNOWN

from kvedit.editing.knowledge_base import KnowledgeBase

QUESTION = f"What is {next(iter(KNOWN))}?"


def warnings(events: list[Any]) -> list[str]:
    """What was warned of."""
    return [event.text for event in events if event.message_type == "warning"]


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_is_cut_is_said_to_be(
    empty: KnowledgeBase, events: list[Any], streamed: bool
) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    whole, events[:] = empty.ask(QUESTION), []
    for limit in (2, 256):
        if streamed:
            text = "".join(empty.stream(messages, limit=limit))
        else:
            answer = empty.answer(messages, max_new_tokens=limit)
            text = answer.text
            assert answer.cut == (limit == 2)
        assert (text == whole) == (limit == 256)
        assert warnings(events) == ["the answer at revision 0 was cut at 2 tokens"]
