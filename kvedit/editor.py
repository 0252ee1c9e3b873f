"""The knowledge base: a store and a model, kept in step.

Invariants:
- The model in memory is the revision that ``_revision`` names, checked by digest when it is folded.
- Every change of the weights goes through ``transaction``; nothing here touches a matrix itself.
- One process edits at a time (the store's lock, held for the length of an edit); others may ask.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from kvedit import export, fold, models, protect
from kvedit.config import Config
from kvedit.engine import Engine
from kvedit.errors import (
    DuplicateKeyError,
    KveditError,
    LockedError,
    ModelMismatchError,
    UnknownKeyError,
)
from kvedit.events import EditReport, Event, RetentionCheck, Score, Status, Warning_
from kvedit.export import ExportReport
from kvedit.facts import Fact, LocalityProbe
from kvedit.keys import Similar, similar
from kvedit.models import BaseModel
from kvedit.probes import Outcome
from kvedit.prompts import Example
from kvedit.retention import at_risk
from kvedit.store import FactChange, FactRow, Finding, ProbeRow, ProtectedRow, Store
from kvedit.transaction import Plan, Target, Transaction, probe_row

OnEvent = Callable[[Event], None]
REPAIR_GROUP = 8
_Self = TypeVar("_Self", bound="KnowledgeBase")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification found: ``score`` counts facts recalled under all their training prompts
    (teacher-forced), ``generated`` facts whose free answer to one of them is exact.
    """

    revision: int
    checks: tuple[RetentionCheck, ...]
    score: Score
    generated: Score
    repaired: tuple[EditReport, ...] = ()
    seconds: float = 0.0


class KnowledgeBase:
    """What a model knows, as something that can be changed, asked, checked and undone.

    Make one with ``KnowledgeBase.create`` or ``KnowledgeBase.open``; use it as a context manager.
    """

    def __init__(self, store: Store, engine: Engine, on_event: OnEvent | None = None) -> None:
        self.store = store
        self._engine = engine
        self._config: Config = store.config
        self._emit: OnEvent = on_event or (lambda event: None)
        self._revision = 0

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        protect: Path | None = None,
        on_event: OnEvent | None = None,
    ) -> KnowledgeBase:
        """Make a store for a model (the embedded one by default) and open it.

        ``protect`` is a file of the user's own text that must stay.  Raises UsageError if there is
        a store already, ModelError if the model cannot be loaded.
        """
        extra = _protect_file(protect)
        source = models.locate(model)
        base = models.load(source, revision=revision, trust_remote_code=trust_remote_code)
        engine = Engine(base, Config.load(Path(path) / "kvedit.toml").training)
        meta = {
            "model_name": base.name,
            "model_path": source,
            "model_fingerprint": base.fingerprint,
            "model_revision": revision or "",
            "trust_remote_code": str(int(trust_remote_code)),
            "dtype": str(base.dtype).removeprefix("torch."),
            "weights_digest": engine.master.digest(),
        }
        store = Store.create(Path(path), meta)
        knowledge = cls(store, engine, on_event)
        with store.lock():
            knowledge._make_protected(extra)
        return knowledge

    @classmethod
    def open(cls, path: str | Path, *, on_event: OnEvent | None = None) -> KnowledgeBase:
        """Open a store with its model at the head revision; recovers by itself and says so.

        Raises NoStoreError, StoreTooNewError, CorruptStoreError or ModelMismatchError.
        """
        store = Store.open(Path(path))
        try:
            base = _load_pinned(store)
            engine = Engine(base, store.config.training, phrasings=store.path / "phrasings")
            knowledge = cls(store, engine, on_event)
            knowledge._recover()
            knowledge._go_to(store.head())
        except BaseException:
            store.close()
            raise
        return knowledge

    def close(self) -> None:
        """Keep what was measured for the next time, and close the store."""
        try:
            self._save_curvature()
        finally:
            self.store.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- edits

    def add(
        self,
        key: str,
        description: str,
        *,
        aliases: Iterable[str] = (),
        lang: str | None = None,
        prompts: Iterable[str] = (),
        paraphrases: Iterable[str] = (),
        locality: Iterable[LocalityProbe] = (),
        source: str | None = None,
        force: bool = False,
    ) -> EditReport:
        """Teach the model a fact; ``force`` commits even what the gate refuses.

        The outcome is ``committed``, ``rejected`` or, for the same key and text, ``unchanged``.
        Raises InvalidFactError, TextTooLongError, or DuplicateKeyError for a key that has another
        text.
        """
        fact = Fact.create(
            key, description, lang=lang, aliases=aliases, prompts=prompts,
            paraphrases=paraphrases, locality=locality, source=source,
        )  # fmt: skip
        return self.add_fact(fact, force=force)

    def add_fact(self, fact: Fact, *, force: bool = False) -> EditReport:
        """``add`` for a fact that was made before."""
        recall = tuple(self._engine.examples(fact))  # raises before anything is written
        with self._editing():
            known = self.store.find(fact.key)
            if known is not None and known.state == "committed":
                return self._known_already(known, fact)
            near = tuple(similar(fact.key, self.store.keys()))
            self._warn_near(fact.key, near)
            fact_id = self.store.put_pending(fact)
            self._say("asking the model first", fact.key)
            prior = self._engine.prior_answers(fact)
            plan = Plan(
                kind="add",
                keys=(fact.key,),
                changes=(FactChange(fact_id, None, fact),),
                targets=(self._target(fact_id, fact, recall),),
                locality=tuple(self._locality(fact)),
                prior={fact_id: prior},
                similar=near,
                text_before=next(iter(prior.values()), None),
                text_after=fact.description,
            )
            return self._run(plan, force)

    def update(self, key: str, description: str, *, force: bool = False) -> EditReport:
        """Give a fact another text.  Raises UnknownKeyError."""
        with self._editing():
            row = self._committed(key)
            fact = row.fact.with_description(description)
            if fact == row.fact:
                return self._unchanged("update", row)
            plan = Plan(
                kind="update",
                keys=(row.fact.key,),
                changes=(FactChange(row.id, row.fact, fact),),
                targets=(self._target(row.id, fact, tuple(self._engine.examples(fact))),),
                locality=tuple(self._locality(fact)),
                text_before=row.fact.description,
                text_after=fact.description,
            )
            return self._run(plan, force)

    def remove(self, key: str, *, force: bool = False) -> EditReport:
        """Train a fact's prompts back to what the model answered before it came.

        Raises UnknownKeyError.
        """
        with self._editing():
            row = self._committed(key)
            prior = self.store.prior_answers(row.id)
            recall = tuple(self._engine.prior_example(p, answer) for p, answer in prior.items())
            forget = tuple(self._engine.paraphrases(row.fact))
            plan = Plan(
                kind="remove",
                keys=(row.fact.key,),
                changes=(FactChange(row.id, row.fact, None),),
                targets=(Target(fact_id=row.id, recall=recall, forget=forget),),
                locality=tuple(self._locality(row.fact)),
                text_before=row.fact.description,
                text_after=next(iter(prior.values()), None),
            )
            return self._run(plan, force)

    def rollback(self, revision: int) -> EditReport:
        """Go back to an earlier revision, to the bit, by appending one that restores it."""
        began = time.monotonic()
        with self._editing():
            wanted = self.store.revision(revision)
            head = self.store.head()
            changes = self.store.rollback_changes(revision)
            edit_id = self.store.plan_edit("rollback", changes, {"restores": revision})
            report = EditReport(
                kind="rollback", outcome="committed", key=f"to {revision}", parent=head
            )
            try:
                self._go_to(revision)
                new = self.store.commit_edit(
                    edit_id,
                    expected_head=head,
                    delta=None,
                    weights_digest=wanted.weights_digest,
                    changes=changes,
                    results=(),
                    prior_answers={},
                    report=report.to_json(),
                    restores=revision,
                )
            except BaseException:
                if self.store.edit(edit_id).state != "committed":
                    self.store.finish_edit(edit_id, "failed", ["rollback failed"], {})
                    self._go_to(head)
                raise
            self._revision = new
            return replace(report, revision=new, seconds=time.monotonic() - began)

    def _run(self, plan: Plan, force: bool) -> EditReport:
        edit = Transaction(self.store, self._engine, self._config, plan, self._emit)
        try:
            report = edit.run(force=force)
        finally:
            self._revision = self.store.head()  # an interruption may come after the commit
        if report.revision is not None:
            if plan.kind in ("add", "update"):
                self._engine.remember([e for t in plan.targets for e in t.recall[:2]])
            every = self._config.retention.checkpoint_every
            with self._dispensable():
                fold.checkpoint_if_due(self.store, self._engine.master, every)
        self._emit(report)
        return report

    def _target(self, fact_id: int, fact: Fact, recall: tuple[Example, ...]) -> Target:
        return Target(
            fact_id=fact_id, recall=recall, paraphrases=tuple(self._engine.paraphrases(fact))
        )

    def _locality(self, fact: Fact) -> list[Example]:
        """The store's locality probes and the fact's own, which default to today's answer."""
        rows = self.store.protected("locality")
        own = [probe.prompt for probe in fact.locality if probe.answer is None]
        answers = dict(zip(own, self._engine.generate(own, limit=64), strict=True)) if own else {}
        pairs = [(row.prompt, row.answer) for row in rows]
        pairs += [(p.prompt, p.answer or answers.get(p.prompt, "")) for p in fact.locality]
        return self._engine.renderer.examples(pairs)

    def _committed(self, key: str) -> FactRow:
        row = self.store.require(key)
        if row.state != "committed":
            raise UnknownKeyError(
                f"the model does not hold {row.fact.key!r}: it is {row.state}",
                hint=f"Teach it with: kvedit add {row.fact.key} FILE",
            )
        return row

    def _known_already(self, row: FactRow, fact: Fact) -> EditReport:
        if row.fact.description == fact.description:
            return self._unchanged("add", row)
        raise DuplicateKeyError(
            f"{row.fact.key} is in the store with another text",
            hint=f"To change it: kvedit update {row.fact.key} FILE",
        )

    def _unchanged(self, kind: str, row: FactRow) -> EditReport:
        report = EditReport(
            kind=kind, outcome="unchanged", key=row.fact.key, parent=self.store.head()
        )
        self._emit(report)
        return report

    def _warn_near(self, key: str, near: Sequence[Similar]) -> None:
        for hit in near:
            text = f"{key} is much like {hit.key} ({hit.score:.0f}): its retention is checked first"
            self._emit(Warning_(text=text, code="similar-key", key=hit.key))

    # ---- questions

    def ask(self, prompt: str, *, at: int | None = None, max_new_tokens: int = 256) -> str:
        """The model's greedy answer at the head, or at another revision."""
        return self._at(at, lambda: self._engine.generate([prompt], limit=max_new_tokens)[0])

    def ask_before(self, prompt: str, *, max_new_tokens: int = 256) -> str:
        """The base model's greedy answer."""
        return self.ask(prompt, at=0, max_new_tokens=max_new_tokens)

    def chat(self, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int = 256) -> str:
        """The model's next turn in a conversation of ``role`` and ``content``."""
        prefix = self._engine.renderer.dialogue(messages)
        return self._engine.complete([prefix], limit=max_new_tokens)[0]

    _T = TypeVar("_T")

    def _at(self, revision: int | None, action: Callable[[], _T]) -> _T:
        """Do something with another revision's weights, then come back."""
        here = self._revision
        if revision is None or revision == here:
            return action()
        try:
            self._go_to(revision)
            return action()
        finally:
            self._go_to(here)

    # ---- checks

    def verify(
        self,
        keys: Sequence[str] | None = None,
        *,
        sample: int | None = None,
        repair: bool = False,
    ) -> VerifyReport:
        """Ask committed facts again and record the answers; ``repair`` retrains what was lost."""
        began = time.monotonic()
        rows = [self._committed(k) for k in keys] if keys else self.store.facts("committed")
        if sample is not None:
            rows = at_risk(rows, (), sample)
        report = self._check(rows)
        lost = {check.key for check in report.checks if not check.passed}
        if repair and lost:
            again = [row for row in rows if row.fact.key in lost]
            groups = [again[i : i + REPAIR_GROUP] for i in range(0, len(again), REPAIR_GROUP)]
            repaired = tuple(self._repair(group) for group in groups)
            report = replace(self._check(rows), repaired=repaired)
        return replace(report, seconds=time.monotonic() - began)

    def _check(self, rows: Sequence[FactRow]) -> VerifyReport:
        """Probe facts teacher-forced under all training prompts, and generate one answer each."""
        revision = self._revision
        examples = [self._engine.examples(row.fact) for row in rows]
        self._say(f"checking {len(rows)} facts")
        outcomes = iter(self._engine.recall([e for own in examples for e in own]))
        rng = random.Random(revision)
        asked = [rng.choice(own) for own in examples]
        self._say(f"generating {len(rows)} answers")
        spoken = self._engine.generated_recall(asked)
        checks, results = [], []
        for row, own, one, said in zip(rows, examples, asked, spoken, strict=True):
            found = [next(outcomes) for _ in own]
            results += [
                probe_row(row.id, "retention", *pair) for pair in zip(own, found, strict=True)
            ]
            results.append(_generated_row(row.id, one, said))
            checks.append(_check_of(row.fact.key, revision, found, said))
            self._emit(checks[-1])
        self.store.record_results(results, revision)
        held = [bool(c.margin is not None and c.margin > 0) for c in checks]
        return VerifyReport(
            revision=revision,
            checks=tuple(checks),
            score=Score(sum(held), len(held)),
            generated=Score(sum(spoken), len(spoken), "generated"),
        )

    def _repair(self, rows: Sequence[FactRow]) -> EditReport:
        with self._editing():
            facts = [row.fact for row in rows]
            plan = Plan(
                kind="repair",
                keys=tuple(fact.key for fact in facts),
                changes=tuple(FactChange(row.id, row.fact, row.fact) for row in rows),
                targets=tuple(
                    self._target(row.id, row.fact, tuple(self._engine.examples(row.fact)))
                    for row in rows
                ),
                locality=tuple(self._locality(facts[0])),
            )
            return self._run(plan, False)

    def doctor(self, deep: bool = True) -> list[Finding]:
        """Check the store; ``deep`` also replays every revision and compares the digests."""
        findings = self.store.integrity()
        if deep:
            here = self._revision
            findings += fold.replay(self.store, self._engine.master, self._say)
            self._go_to(here)
        return findings

    def export(self, directory: str | Path, *, dtype: str | None = None) -> ExportReport:
        """Write the head as a folder that transformers loads, then reload and re-probe it."""
        facts = [row.fact for row in self.store.facts("committed")]
        examples = [e for fact in facts for e in self._engine.examples(fact)]
        self._say("writing the model")
        return export.write(
            self._engine, examples, Path(directory), dtype=dtype, revision=self._revision,
            progress=self._say,
        )  # fmt: skip

    # ---- the model and the store in step

    def _editing(self) -> _Editing:
        return _Editing(self)

    def _recover(self) -> None:
        """End what a killed process left; skipped while another process is at work."""
        try:
            left = self.store.recover()
        except LockedError:
            return
        for edit in left:
            names = ", ".join(edit.keys)
            text = f"recovered: the {edit.kind} of {names} was interrupted and did not happen"
            self._emit(
                Warning_(text=text, code="recovered", key=edit.keys[0] if edit.keys else None)
            )

    def _go_to(self, revision: int) -> None:
        """Give the model the weights of a revision."""
        for problem in fold.restore(self.store, self._engine.master, revision):
            self._emit(Warning_(text=problem, code="checkpoint"))
        self._revision = revision

    def _prepare(self) -> None:
        """Before an edit: the head's weights, protected text, and the curvature of both."""
        self._recover()
        if self._revision != self.store.head():
            self._go_to(self.store.head())
        if not self.store.protected("control"):
            self._make_protected([])
        if self._engine.curvature is None:
            self._load_curvature()

    def _make_protected(self, extra: Sequence[protect.Protected]) -> None:
        """Let the base model say what it knows, and keep it."""
        here = self._revision
        self._go_to(0)
        made = protect.make(
            self._engine.base, self._engine.renderer, self._config.protect,
            extra=extra, progress=lambda text: self._say(text),
        )  # fmt: skip
        groups = (("control", made.control), ("locality", made.locality))
        self.store.set_protected(
            ProtectedRow(role=role, prompt=t.prompt, answer=t.answer, source=t.source)
            for role, texts in groups
            for t in texts
        )
        self._go_to(here)
        self._measure()

    def _measure(self) -> None:
        """The curvature of the protected text on the base model, and of the facts on the head."""
        self._say("measuring what must stay")
        texts = [
            protect.Protected(row.prompt, row.answer, row.source)
            for row in self.store.protected("control")
        ]
        renderer = self._engine.renderer
        examples = [protect.example(renderer, text) for text in texts]
        self._at(0, lambda: self._engine.protect(examples))
        facts = [row.fact for row in self.store.facts("committed")]
        if facts:
            self._engine.remember([e for f in facts for e in self._engine.examples(f)[:2]])
        self._save_curvature()

    def _load_curvature(self) -> None:
        base = fold.read_curvature(self.store, 0, "base")
        total = fold.read_curvature(self.store, self._revision, "head")
        if base is None or total is None or set(base.moments) != set(self._engine.names):
            self._measure()
        else:
            self._engine.curvature = base, total

    def _save_curvature(self) -> None:
        if self._engine.curvature is not None:
            with self._dispensable():
                base, total = self._engine.curvature
                fold.write_curvature(self.store, 0, "base", base)
                fold.write_curvature(self.store, self._revision, "head", total)

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        """Around what only saves time: the edit stands, that this was not written is a warning."""
        try:
            yield
        except KveditError as error:
            self._emit(Warning_(text=f"not kept: {error.message}", code="not-kept"))

    def _say(self, text: str, key: str | None = None) -> None:
        self._emit(Status(phase=text, key=key))


class _Editing:
    """The store's lock for the length of one edit, the model brought up to the head."""

    def __init__(self, knowledge: KnowledgeBase) -> None:
        self._knowledge = knowledge

    def __enter__(self) -> None:
        self._lock = self._knowledge.store.lock()
        self._lock.__enter__()
        try:
            self._knowledge._prepare()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.__exit__(kind, error, trace)


def _protect_file(path: Path | None) -> list[protect.Protected]:
    return protect.read_file(path) if path is not None else []


def _load_pinned(store: Store) -> BaseModel:
    """The model that the store was made for; raises ModelMismatchError if it is another now."""
    name = store.meta("model_name") or models.EMBEDDED
    source = models.locate(None if name == models.EMBEDDED else store.meta("model_path"))
    base = models.load(
        source,
        revision=store.meta("model_revision") or None,
        trust_remote_code=store.meta("trust_remote_code") == "1",
    )
    if base.fingerprint != store.meta("model_fingerprint"):
        raise ModelMismatchError(
            f"the model at {source} is not the one that {store.path} was made for",
            hint="Put the original weights back, or make a new store with kvedit init.",
        )
    return base


def _generated_row(fact_id: int, example: Example, passed: bool) -> ProbeRow:
    return ProbeRow(
        fact_id=fact_id,
        kind="retention",
        protocol="generated",
        prompt=example.prompt,
        expected=example.answer,
        answer=None,
        passed=passed,
    )


def _check_of(key: str, revision: int, outcomes: Sequence[Outcome], spoken: bool) -> RetentionCheck:
    margin = min(outcome.margin for outcome in outcomes)
    return RetentionCheck(key=key, revision=revision, passed=spoken and margin > 0, margin=margin)
