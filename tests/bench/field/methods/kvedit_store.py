"""kvedit itself, through ``KnowledgeBase``: one by one with ``add_fact``, together with ``ingest``.

The store's folder is kept: a run that was stopped goes on with what it had committed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from kvedit.bench.speed import add_timed
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.facts.fact import Fact
from kvedit.ingest.report import IngestOptions
from kvedit.ingest.run import ingest
from kvedit.model.prompts import Example
from kvedit.store.database import DB_NAME
from tests.bench.field.asked import Asked
from tests.bench.field.method import Method
from tests.bench.field.records import Record
from tests.bench.quality_methods import make_store


def trained_fact(record: Record) -> Fact:
    """What other methods get too: the gate does not see the questions that will be asked."""
    return replace(record.fact, paraphrases=(), locality=(), questions=())


@dataclass(kw_only=True)
class Kvedit(Method):
    """The store's own settings; ``init`` takes as long as the setup says."""

    in_fp32: ClassVar[bool] = False
    resumes: ClassVar[bool] = True
    _knowledge: KnowledgeBase | None = field(default=None, init=False)
    _outcomes: Counter[str] = field(default_factory=Counter, init=False)
    _init_seconds: float = field(default=0.0, init=False)

    def start(self) -> Asked:
        """Make the store, or open the one that an earlier run left."""
        folder = self.setup.folder / "store"
        began = time.monotonic()
        if not (folder / DB_NAME).is_file():
            make_store(self.setup.options, folder, lambda event: None)
        self._init_seconds = time.monotonic() - began
        self._knowledge = KnowledgeBase.open(folder)
        engine = self._knowledge.engine
        return Asked(engine.base.model, engine.renderer)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """One edit of a record, or one run of ingest."""
        knowledge = self._open()
        facts = [trained_fact(record) for record in records]
        if len(facts) == 1:
            self._outcomes[add_timed(knowledge, facts[0]).outcome] += 1
        else:
            ingest(
                knowledge, facts, IngestOptions(skip_invalid=True), lambda event: None
            ).require_end()
            rows = [knowledge.store.find(fact.key) for fact in facts]
            self._outcomes.update("failed" if row is None else row.state for row in rows)
        return Asked(knowledge.engine.base.model, knowledge.engine.renderer)

    def passes(self, example: Example) -> None:
        """Said after the first edit instead: an edit ends when the gate passes."""
        return None

    def notes(self) -> dict[str, Any]:
        """How the edits ended, and what making the store took."""
        return {"outcomes": dict(self._outcomes), "seconds of init": round(self._init_seconds, 1)}

    def close(self) -> None:
        """Close the store."""
        if self._knowledge is not None:
            self._knowledge.close()

    def _open(self) -> KnowledgeBase:
        if self._knowledge is None:
            raise RuntimeError("the method was not started")
        return self._knowledge
