"""What tests make of the small model: an engine, and a store that is kept for copies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvedit.engine import Engine
    from kvedit.events import EditReport
    from kvedit.models import BaseModel


def make_engine(base: BaseModel) -> Engine:
    """An engine with the settings that suit the small model."""
    from small_model import KNOWN, phrasings

    from kvedit.config import TrainingConfig
    from kvedit.engine import Engine

    config = TrainingConfig(
        max_steps=100,
        learning_rate=0.0015,
        max_price=0.0006,
        shift_weight=60.0,
        phrasings=3,
        rehearsal=4,
        hold_limit=60,
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
class Kept:
    """A closed store that tests take copies of, and how it came to be."""

    path: Path
    reports: tuple[EditReport, ...]
    digests: tuple[str, ...]
    events: tuple[Any, ...]
