"""A knowledge base that learns at once: the store is real, the model is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from kvedit.errors import TextTooLongError
from kvedit.events import EditReport, RetentionCheck, Score
from kvedit.facts.fact import Fact
from kvedit.store.rows import FactChange
from kvedit.store.store import Store

META = {"model_name": "kvedit-tiny", "model_fingerprint": "f" * 64}
LONGEST = 100


class Verified(NamedTuple):
    """The report of a verification."""

    checks: tuple[RetentionCheck, ...]
    score: Score
    generated: Score
    repaired: tuple[EditReport, ...] = ()


class FakeRenderer:
    """Renders nothing."""

    def examples(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """Nothing to train."""
        return []


class FakeWorker:
    """The worker of a single process."""

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do it."""
        return work()


class FakeEngine:
    """An engine that can take texts of up to ``LONGEST`` characters."""

    renderer = FakeRenderer()
    worker = FakeWorker()

    def examples(self, fact: Fact) -> list[Any]:
        """Nothing, or the error for a long text."""
        if len(fact.description) > LONGEST:
            raise TextTooLongError("the text has too many tokens", hint="Shorten it.")
        return []

    def paraphrases(self, fact: Fact) -> list[Any]:
        """Nothing to ask."""
        return []


@dataclass
class FakeKnowledge:
    """Commits each fact as a revision.  ``before`` may raise; keys in ``refuses`` are rejected."""

    store: Store
    emit: Callable[[Any], None] = lambda event: None
    before: Callable[[Fact], None] = lambda fact: None
    refuses: set[str] = field(default_factory=set)
    together: bool = False
    largest_group: int | None = None
    deadlines: list[float | None] = field(default_factory=list)
    loses: set[str] = field(default_factory=set)
    retention: Score = field(default_factory=Score)
    engine: FakeEngine = field(default_factory=FakeEngine)
    groups: list[tuple[str, ...]] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    verified: list[int | None] = field(default_factory=list)
    protected_for: list[int] = field(default_factory=list)

    def protect_for(self, facts: int) -> None:
        """Note the call."""
        self.protected_for.append(facts)

    def add_group(
        self,
        facts: Sequence[Fact],
        *,
        force: bool = False,
        carry: bool = False,
        deadline: float | None = None,
    ) -> tuple[EditReport, ...]:
        """Commit one by one, or all as one revision if ``together``."""
        self.deadlines.append(deadline)
        self.groups.append(tuple(fact.key for fact in facts))
        for fact in facts:
            self.before(fact)
        if self.together:
            return (self._edit(facts),)
        return tuple(self._edit([fact]) for fact in facts)

    def _edit(self, facts: Sequence[Fact]) -> EditReport:
        keys = tuple(fact.key for fact in facts)
        self.trained += keys
        changes = [FactChange(self.store.put_pending(fact), None, fact) for fact in facts]
        edit = self.store.plan_edit("add", changes, {})
        report = EditReport(
            kind="add", outcome="rejected", key=keys[0], keys=keys, seconds=2.0,
            retention=self.retention,
        )  # fmt: skip
        if self.refuses & set(keys):
            reasons = ("recall probes: 1 of 10 passed, 100% needed",)
            self.store.finish_edit(edit, "rejected", reasons, report.to_json())
            return self._emit(report, reasons=reasons)
        revision = self.store.commit_edit(
            edit,
            expected_head=self.store.head(),
            delta=None,
            weights_digest="d" * 64,
            changes=changes,
            results=[],
            report=report.to_json(),
        )
        return self._emit(report, outcome="committed", revision=revision)

    def _emit(self, report: EditReport, **changes: Any) -> EditReport:
        changed = replace(report, **changes)
        self.emit(changed)
        return changed

    def verify(self, *, sample: int | None = None, repair: bool = False) -> Verified:
        """All facts are recalled but those in ``loses``."""
        self.verified.append(sample)
        keys = self.store.keys()[:sample]
        checks = tuple(
            RetentionCheck(key=k, revision=self.store.head(), passed=k not in self.loses)
            for k in keys
        )
        score = Score(sum(check.passed for check in checks), len(checks), "generated")
        return Verified(checks, score, score)


def make_store(path: Path) -> Store:
    """An empty store."""
    return Store.create(path, META)


def facts(count: int) -> list[Fact]:
    """Facts whose keys have nothing in common."""
    words = ["amber", "kettle", "clover", "ladder", "mirror", "anchor", "saddle", "spoon", "drum"]
    names = [f"{one} {two[::-1]}" for one in words for two in words]
    return [Fact.create(name, f"It is the thing number {i}.") for i, name in enumerate(names)][
        :count
    ]
