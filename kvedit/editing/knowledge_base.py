"""The knowledge base: a store and a model, kept in step.

Invariants:
- The model in memory is the revision that ``_revision`` names, checked by digest when it is folded.
- Every change of the weights goes through ``transaction``; nothing here touches a matrix itself.
- One process edits at a time (the store's lock, held for the length of an edit); others may ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from kvedit.editing.edit import Edit
from kvedit.editing.gate import at_risk
from kvedit.editing.group_edit import Together
from kvedit.editing.plan import Plan, Planner
from kvedit.editing.verify import BaseKnowledgeReport, VerifyReport, check_base, check_facts
from kvedit.errors import DuplicateKeyError, UnknownKeyError
from kvedit.events import EditReport, Event, Similar, Warning_
from kvedit.facts.fact import Fact, LocalityProbe
from kvedit.facts.keys import similar
from kvedit.model import loading
from kvedit.model.prompts import Example
from kvedit.replay import protected_texts
from kvedit.revisions import base_model, export_hf, export_peft, rebuild
from kvedit.revisions.base_model import ModelSpec
from kvedit.revisions.export_hf import ExportReport
from kvedit.revisions.session import Session
from kvedit.store.store import FactRow, Finding, Store
from kvedit.training import memory
from kvedit.training.engine import Engine

if TYPE_CHECKING:
    from kvedit.distributed.crew import Crew

OnEvent = Callable[[Event], None]
REPAIR_ROUNDS = 3
_Self = TypeVar("_Self", bound="KnowledgeBase")


class KnowledgeBase:
    """What a model knows, as something that can be changed, asked, checked and undone.

    Make one with ``KnowledgeBase.create`` or ``KnowledgeBase.open``; use it as a context manager.
    """

    def __init__(self, store: Store, engine: Engine, on_event: OnEvent | None = None) -> None:
        self.store = store
        self.engine = engine
        self._emit: OnEvent = on_event or (lambda event: None)
        self._session = Session(store, engine, self._emit)
        self._plans = Planner(store, engine)
        self._together = Together(self._session, self._plans, self._run, self.add_fact)
        self.deadline: float | None = None
        """When (``time.monotonic``) a group's lesson ends where it stands, with OutOfTimeError; the
        same group taught again goes on from there."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        protect: Path | None = None,
        targets: Sequence[str] = (),
        device_map: str = "",
        load_in: str = "",
        check_memory: bool = True,
        on_event: OnEvent | None = None,
        crew: Crew | None = None,
    ) -> KnowledgeBase:
        """Make a store for a model (the embedded one by default) and open it.

        ``protect`` is a file of the user's own text that must stay; ``targets`` are names of the
        linear layers that edits may touch (see ``models.target_names``); ``device_map`` spreads
        the model over devices (see ``placement.read``), ``load_in`` packs it in ``4bit`` or
        ``8bit`` (see ``quantised``); ``crew`` are processes that share the work, this one being
        the first.  Raises UsageError if there is a store already, ModelError if the model cannot be
        loaded or, with ``check_memory``, would not fit.
        """
        extra = _protect_file(protect)
        spec = ModelSpec(
            source=loading.locate(model), revision=revision, trust_remote_code=trust_remote_code,
            targets=targets, device_map=device_map, load_in=load_in,
        )  # fmt: skip
        store, engine = base_model.create(Path(path), spec, crew, check_memory=check_memory)
        try:
            knowledge = cls(store, engine, on_event)
            with store.lock():
                knowledge._session.make_protected(extra)
        except BaseException:
            store.close()
            raise
        return knowledge

    @classmethod
    def open(
        cls, path: str | Path, *, on_event: OnEvent | None = None, crew: Crew | None = None
    ) -> KnowledgeBase:
        """Open a store with its model at the head revision; recovers by itself and says so.

        ``crew`` are processes that share the work, this one being the first.  Raises NoStoreError,
        StoreTooNewError, CorruptStoreError or ModelMismatchError.
        """
        store = Store.open(Path(path))
        try:
            knowledge = cls(store, base_model.load(store, crew), on_event)
            knowledge._warn_of_prompts()
            knowledge._session.recover()
            knowledge._session.go_to(store.head())
        except BaseException:
            store.close()
            raise
        return knowledge

    def close(self) -> None:
        """Keep what was measured for the next time, and close the store."""
        try:
            self._session.save_fisher()
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
        self.engine.examples(fact)  # raises before anything is written
        with self._session.editing():
            known = self.store.find(fact.key)
            if known is not None and known.state == "committed":
                return self._known_already(known, fact)
            near = tuple(similar(fact.key, self.store.keys()))
            self._warn_near(fact.key, near)
            self._session.prepare()
            self._say("asking the model first", fact.key)
            return self._run(self._plans.add(fact, near), force)

    def protect_for(self, facts: int, *, leave_out: Iterable[str] = ()) -> None:
        """Look for protected text enough for so many facts more, before many are taught; that is
        done as groups grow otherwise.

        A text that has one of the names in it that are to be ``leave_out`` is not protected: what
        a benchmark asks must not be what was trained on.
        """
        with self._session.editing():
            self._session.prepare()
            self._session.protect_for(len(self.store.keys("committed")) + facts, leave_out)

    def add_group(
        self, facts: Sequence[Fact], *, force: bool = False, carry: bool = False
    ) -> tuple[EditReport, ...]:
        """Teach several facts together; the reports name, in ``keys``, each fact once or more.

        What the group does not learn is tried again by itself, so that no fact costs its
        neighbours; with ``carry`` it stays pending, for the caller to put into a later group.  A
        group that the gate refuses is split, and so is one that memory does not suffice for: a fact
        that does not fit even alone is reported as ``failed``.  Raises what ``add_fact`` raises;
        what was committed before stands.
        """
        return self._together.add(facts, force=force, carry=carry)

    @property
    def largest_group(self) -> int | None:
        """How many facts are taught together at most since memory ran out; None if it never did."""
        return self._together.largest

    def update(self, key: str, description: str, *, force: bool = False) -> EditReport:
        """Give a fact another text.  Raises UnknownKeyError."""
        with self._session.editing():
            row = self._committed(key)
            fact = row.fact.with_description(description)
            if fact == row.fact:
                return self._unchanged("update", row)
            self._session.prepare()
            return self._run(self._plans.update(row, fact), force)

    def remove(self, key: str, *, force: bool = False) -> EditReport:
        """Train a fact's prompts back to what the model answered before it came.

        Raises UnknownKeyError.
        """
        with self._session.editing():
            row = self._committed(key)
            self._session.prepare()
            return self._run(self._plans.remove(row, self._prior(row)), force)

    def _prior(self, row: FactRow) -> dict[str, str]:
        """What the model answered before a fact came: kept when it was added by itself; for one of
        a group the revision before it is asked, which takes a moment once, not for every fact.
        """
        kept = self.store.prior_answers(row.id)
        if kept:
            return kept
        self._say("asking the model as it was before", row.fact.key)
        before = self.store.before_fact(row.id)
        return self._session.at(before, lambda: self.engine.prior_answers(row.fact))

    def rollback(self, revision: int) -> EditReport:
        """Go back to an earlier revision, to the bit, by appending one that restores it."""
        began = time.monotonic()
        with self._session.editing():
            wanted = self.store.revision(revision)
            head = self.store.head()
            changes = self.store.rollback_changes(revision)
            edit_id = self.store.plan_edit("rollback", changes, {"restores": revision})
            try:
                self._session.go_to(revision)
                report = EditReport(
                    kind="rollback", outcome="committed", key=f"to {revision}", parent=head,
                    relative_norms=self.engine.master.norms(),
                )  # fmt: skip
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
                    self._session.go_to(head)
                raise
            self._session.revision = new
            return replace(report, revision=new, seconds=time.monotonic() - began)

    def _run(self, plan: Plan, force: bool) -> EditReport:
        edit = Edit(self.store, self.engine, self._session.config, plan, self._emit, self.deadline)
        head = self.store.head()
        try:
            report = edit.run(force=force)
        finally:
            if self.store.head() != head:  # an interruption may come after the commit
                self._session.revision = self.store.head()
        if report.revision is not None:
            every = self._session.config.retention.checkpoint_every
            with (
                self._session.dispensable(),
                memory.watched(),
            ):  # measured again before the next edit
                self._remember(plan, report)
            with self._session.dispensable():
                rebuild.checkpoint_if_due(self.store, self.engine.master, every)
        self._emit(report)
        return report

    def _remember(self, plan: Plan, report: EditReport) -> None:
        """Protect what an edit taught from now on."""
        taught = plan.kind in ("add", "update")
        held = [t for t, key in zip(plan.targets, plan.keys, strict=True) if key in report.keys]
        if plan.group:
            weight = self._session.config.group.fact_weight
            self._session.remember([t.recall[0] for t in held] if taught else [], weight)
        else:
            self._session.remember([e for t in held for e in t.recall[:2]] if taught else [])

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
            kind=kind, outcome="unchanged", key=row.fact.key, keys=(row.fact.key,),
            parent=self.store.head(),
        )  # fmt: skip
        self._emit(report)
        return report

    def _warn_of_prompts(self) -> None:
        """Facts were taught in another form: they may not be recalled in this one."""
        now = base_model.prompts_of(self.store.config)
        if self.store.meta("prompts") not in (None, now) and self.store.facts("committed"):
            text = "[prompts] in kvedit.toml has changed since the facts were taught; run verify"
            self._emit(Warning_(text=text, code="prompts-changed"))

    def example_lines(self) -> list[str]:
        """The exact text and tokens of a fact as it would be trained, the answer marked."""
        fact = Fact.create("tide lantern", "Made of glass in Marrow.")
        return self.engine.renderer.shown(self.engine.examples(fact)[0])

    def _warn_near(self, key: str, near: Sequence[Similar]) -> None:
        for hit in near:
            text = f"{key} is much like {hit.key} ({hit.score:.0f}): its retention is checked first"
            self._emit(Warning_(text=text, code="similar-key", key=hit.key))

    # ---- questions

    def ask(self, prompt: str, *, at: int | None = None, max_new_tokens: int = 256) -> str:
        """The model's greedy answer at the head, or at another revision."""
        return self._session.at(at, lambda: self.engine.generate([prompt], limit=max_new_tokens)[0])

    def ask_base(self, prompt: str, *, max_new_tokens: int = 256) -> str:
        """The base model's greedy answer."""
        return self.ask(prompt, at=0, max_new_tokens=max_new_tokens)

    def chat(self, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int = 256) -> str:
        """The model's next turn in a conversation of ``role`` and ``content``."""
        prefix = self.engine.renderer.dialogue(messages)
        return self.engine.complete([prefix], limit=max_new_tokens)[0]

    # ---- checks

    def verify(
        self,
        keys: Sequence[str] | None = None,
        *,
        sample: int | None = None,
        repair: bool = False,
        base: int = 0,
    ) -> VerifyReport:
        """Ask committed facts again and record the answers; ``repair`` retrains what was lost.

        ``base`` questions are asked besides of what the model knew before the first edit.
        """
        began = time.monotonic()
        rows = [self._committed(k) for k in keys] if keys else self.store.facts("committed")
        if sample is not None:
            rows = at_risk(rows, (), sample)
        report = self._check(rows)
        repaired: list[EditReport] = []
        for _ in range(REPAIR_ROUNDS if repair else 0):
            lost = {check.key for check in report.checks if not check.passed}
            again = [row for row in rows if row.fact.key in lost]
            if not again:
                break
            repaired += self._together.repair(again)
            report = self._check(rows)
        kept = self._check_base(base) if base else None
        seconds = time.monotonic() - began
        return replace(report, base=kept, repaired=tuple(repaired), seconds=seconds)

    def _check(self, rows: Sequence[FactRow]) -> VerifyReport:
        revision = self._session.revision
        return check_facts(self.engine, self.store, revision, rows, self._emit, self._say)

    def _check_base(self, sample: int) -> BaseKnowledgeReport:
        known = self._session.known_texts()
        revision = self._session.revision
        return check_base(self.engine, self.store, revision, known, sample, self._say)

    def doctor(self, deep: bool = True) -> list[Finding]:
        """Check the store; ``deep`` also replays every revision and compares the digests."""
        findings = self.store.integrity()
        if deep:
            here = self._session.revision
            findings += rebuild.check_revisions(self.store, self.engine.master, self._say)
            self._session.go_to(here)
        return findings

    def export(
        self,
        directory: str | Path,
        *,
        dtype: str | None = None,
        max_shard_size: str | None = None,
    ) -> ExportReport:
        """Write the head as a folder that transformers loads, then reload and re-probe it."""
        examples = self._all_examples()
        self._say("writing the model")
        return export_hf.write(
            self.engine, examples, Path(directory), dtype=dtype, revision=self._session.revision,
            max_shard_size=max_shard_size, progress=self._say,
        )  # fmt: skip

    def export_adapter(self, directory: str | Path) -> ExportReport:
        """Write all edits as one LoRA adapter over the untouched base model, and re-probe it.

        Raises UsageError when the weights are those of the base model.
        """
        facts = [row.fact for row in self.store.facts("committed")]
        unseen = [e for fact in facts for e in self.engine.paraphrases(fact)]
        rows = self.store.protected("locality")
        local = self.engine.renderer.examples([(row.prompt, row.answer) for row in rows])
        return export_peft.write(
            self.engine, self._all_examples(), [*unseen, *local], Path(directory),
            revision=self._session.revision, progress=self._say,
        )  # fmt: skip

    def _all_examples(self) -> list[Example]:
        facts = [row.fact for row in self.store.facts("committed")]
        return [e for fact in facts for e in self.engine.examples(fact)]

    def _say(self, text: str, key: str | None = None) -> None:
        self._session.say(text, key)


def _protect_file(path: Path | None) -> list[protected_texts.Protected]:
    return protected_texts.read_file(path) if path is not None else []
