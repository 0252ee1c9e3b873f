"""Edits of one fact: what is said before they begin."""

from __future__ import annotations

from typing import Any

from kvedit.editing.knowledge_base import KnowledgeBase


def test_a_placeholder_is_warned_of_and_trained_all_the_same(
    empty: KnowledgeBase, events: list[Any], random_training: None
) -> None:
    empty.add("grey bucket", "TODO", force=True)
    (warning,) = [event for event in events if event.message_type == "warning"]
    assert (warning.code, warning.key) == ("placeholder", "grey bucket")
    assert "the description has the placeholder 'TODO'" in warning.text
    assert empty.store.require("grey bucket").state == "committed"
