"""What tests make of the small model: an engine, stores to copy, and helpers that look at them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvedit import KnowledgeBase
    from kvedit.events import EditReport
    from kvedit.model.loading import BaseModel
    from kvedit.training.engine import Engine, TrainingResult


def make_engine(base: BaseModel) -> Engine:
    """An engine with the settings that suit the small model."""
    from small_model import KNOWN, phrasings

    from kvedit.config import TrainingConfig
    from kvedit.training.engine import Engine

    config = TrainingConfig(
        max_steps=100,
        penalty_weight=60.0,
        phrasings_per_step=3,
        rehearsal_facts=4,
    )
    engine = Engine(base, config)
    questions = [
        (way.replace("{key}", key), answer)
        for key, answer in KNOWN.items()
        for way in phrasings()[::3]
    ]
    engine.protect(engine.renderer.examples(questions))
    return engine


@dataclass(frozen=True)
class StoreTemplate:
    """A closed store that tests copy, with the reports, digests and events of its making."""

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
    facts = [(r.fact, r.health, r.margin) for r in store.facts("committed")]
    return (
        digest(knowledge),
        store.head(),
        facts,
        store.revisions(),
        sorted(os.listdir(store.deltas)),
    )


def holds(knowledge: KnowledgeBase, key: str, answer: str) -> list[bool]:
    """Whether free generation gives the answer, under phrasings trained and never trained."""
    prompts = (f"What is {key}?", f"Tell me about {key}.", f"What do you know about {key}?")
    return [knowledge.ask(prompt) == answer for prompt in prompts]


def configure(path: Path, **changes: float) -> None:
    """Give a store the small model's settings, some of them changed."""
    from small_model import settings

    (path / "kvedit.toml").write_text(settings(**changes), encoding="utf-8")


def lose(path: Path, key: str, old: str, new: str) -> None:
    """Let a store say another text of a fact, everywhere, than its model has learned."""
    import sqlite3
    from contextlib import closing

    columns = (("fact_versions", "fact"), ("edit_facts", "before"), ("edit_facts", "after"))
    with closing(sqlite3.connect(path / "kvedit.db")) as database, database:
        ((fact_id,),) = database.execute("SELECT id FROM facts WHERE key = ?", (key,)).fetchall()
        database.execute("UPDATE facts SET description = ? WHERE id = ?", (new, fact_id))
        for table, column in columns:
            sql = f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE fact_id = ?"
            database.execute(sql, (old, new, fact_id))


def open_gate(path: Path, **changes: float) -> None:
    """Settings with which the gate passes everything: for edits whose training is random."""
    configure(path, recall=0, paraphrase=0, locality=0, retention=0, **changes)


def warnings_in(events: Sequence[Any], code: str) -> list[Any]:
    """The warnings with a code among events."""
    return [e for e in events if e.message_type == "warning" and e.code == code]


def unsound(knowledge: KnowledgeBase) -> list[str]:
    """What ``doctor`` complains about."""
    return [finding.what for finding in knowledge.doctor() if finding.level != "ok"]


class RaiseOn:
    """An event handler that raises when an event matches, until ``error`` is set to None."""

    def __init__(self, error: BaseException, matches: Callable[[Any], bool]) -> None:
        self.error: BaseException | None = error
        self._matches = matches

    def __call__(self, event: Any) -> None:
        if self.error is not None and self._matches(event):
            raise self.error


def in_training(error: BaseException) -> RaiseOn:
    """Raises in the second training step."""
    return RaiseOn(
        error, lambda e: e.message_type == "status" and (e.phase, e.step) == ("learn", 2)
    )


def random_train(size: float = 1.0) -> Callable[..., TrainingResult]:
    """A substitute for ``Engine.train``: a random delta, another one each time; a small one, or
    ``size`` times as large.
    """
    import torch

    from kvedit.adapter.deltas import Factors
    from kvedit.training.engine import TrainingResult
    from kvedit.training.loops.loop import LoopResult

    generator = torch.Generator().manual_seed(0)

    def train(engine: Engine, *_: object) -> TrainingResult:
        delta = {}
        for name, shape in engine.master.shapes.items():
            b, a = (torch.randn(s, generator=generator) for s in ((shape[0], 1), (1, shape[1])))
            delta[name] = Factors(b * 1e-3 * size, a * 1e-2)
        return TrainingResult(delta, LoopResult(1, True, 0.0, 0.0), 0.0)

    return train
