"""What tests make of the small model: an engine, a store that is kept for copies, and its state."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvedit import KnowledgeBase
    from kvedit.events import EditReport
    from kvedit.model.loading import BaseModel
    from kvedit.training.engine import Engine


def make_engine(base: BaseModel) -> Engine:
    """An engine with the settings that suit the small model."""
    from small_model import KNOWN, phrasings

    from kvedit.config import TrainingConfig
    from kvedit.training.engine import Engine

    config = TrainingConfig(
        max_steps=100,
        learning_rate=0.0015,
        max_penalty=0.0006,
        penalty_weight=60.0,
        phrasings_per_step=3,
        rehearsal_facts=4,
        max_hold_steps=60,
    )
    made = Engine(base, config)
    asked = [
        (way.replace("{key}", key), answer)
        for key, answer in KNOWN.items()
        for way in phrasings()[::3]
    ]
    made.protect(made.renderer.examples(asked))
    return made


@dataclass(frozen=True)
class StoreTemplate:
    """A closed store that tests take copies of, and how it came to be."""

    path: Path
    reports: tuple[EditReport, ...]
    digests: tuple[str, ...]
    events: tuple[Any, ...]


def digest(knowledge: KnowledgeBase) -> str:
    """What the model really serves."""
    return knowledge.engine.master.digest()


def state(knowledge: KnowledgeBase) -> tuple[Any, ...]:
    """All that a refused edit must leave as it was."""
    store = knowledge.store
    held = [(r.fact, r.health, r.margin) for r in store.facts("committed")]
    return (
        digest(knowledge),
        store.head(),
        held,
        store.revisions(),
        sorted(os.listdir(store.deltas)),
    )


def holds(knowledge: KnowledgeBase, key: str, answer: str) -> list[bool]:
    """Whether free generation gives the answer, under phrasings trained and never trained."""
    asked = (f"What is {key}?", f"Tell me about {key}.", f"What do you know about {key}?")
    return [knowledge.ask(prompt) == answer for prompt in asked]


def configure(path: Path, **changes: float) -> None:
    """Give a store the small model's settings, some of them changed."""
    from small_model import settings

    (path / "kvedit.toml").write_text(settings(**changes), encoding="utf-8")
