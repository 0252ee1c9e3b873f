"""The knowledge base: what users call.

Invariants:
- Every change of the weights is an ``Edit``; nothing here touches a matrix itself.
- One process edits at a time (the store's lock, held for the length of an edit); others may ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from kvedit.asking.questions import Questions
from kvedit.editing.evaluation import at_risk
from kvedit.editing.group_edit import GroupEditor, GroupOptions
from kvedit.editing.single_edit import SingleEditor
from kvedit.editing.study.filters import StudyReport
from kvedit.editing.verify import VerifyReport, verify
from kvedit.events import EditReport, Event, Warning_
from kvedit.facts.fact import Fact, LocalityProbe, Question, Written
from kvedit.model import loading
from kvedit.model.prompts import Example
from kvedit.replay import protected_texts
from kvedit.revisions import base_model, prune, rebuild
from kvedit.revisions.base_model import ModelSpec
from kvedit.revisions.export import conditions, hf, peft
from kvedit.revisions.export.hf import ExportReport
from kvedit.revisions.session import Session
from kvedit.store import integrity
from kvedit.store.forget.plans import PrunePlan
from kvedit.store.rows import Finding
from kvedit.store.store import Store
from kvedit.training.engine import Engine

OnEvent = Callable[[Event], None]


class KnowledgeBase(Questions):
    """What a model knows, as something that can be changed, asked, checked and undone.

    Make one with ``KnowledgeBase.create`` or ``KnowledgeBase.open``; use it as a context manager.
    """

    def __init__(self, store: Store, engine: Engine, on_event: OnEvent | None = None) -> None:
        super().__init__(Session(store, engine, on_event or (lambda event: None)))
        self._single = SingleEditor(self._session)
        self._groups = GroupEditor(self._session, self._single)

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        protect_file: Path | None = None,
        targets: Sequence[str] = (),
        device_map: str = "",
        load_in: str = "",
        check_memory: bool = True,
        time: float | None = None,
        on_event: OnEvent | None = None,
    ) -> KnowledgeBase:
        """Make a store for a model (the embedded one by default) and open it.

        ``protect_file`` holds texts of the user's own that must stay; ``targets`` are names of the
        linear layers that edits may touch (see ``model.targets``); ``device_map`` spreads the
        model over devices (see ``model.devices``), ``load_in`` packs it in ``4bit`` or ``8bit``
        (see ``model.quantization``).  The model is asked what it knows for ``time`` seconds
        ([protect] init_minutes by default); where that was broken off, the same call goes on.
        Raises UsageError if there is a store already, ModelError if the model cannot be loaded or,
        with ``check_memory``, would not fit into memory.
        """
        texts = protected_texts.read_file(protect_file) if protect_file is not None else []
        spec = ModelSpec(
            source=loading.locate(model), revision=revision, trust_remote_code=trust_remote_code,
            targets=targets, device_map=device_map, load_in=load_in,
        )  # fmt: skip
        store, engine = base_model.create(Path(path), spec, check_memory=check_memory)
        try:
            knowledge = cls(store, engine, on_event)
            with store.lock():
                knowledge._session.protection.create(texts, time)
        except BaseException:
            store.close()
            raise
        return knowledge

    @classmethod
    def open(cls, path: str | Path, *, on_event: OnEvent | None = None) -> KnowledgeBase:
        """Open a store with its model at the head revision; recovers by itself and says so.

        One that cannot be written can be asked and checked; an edit raises NotWritableError or
        DiskFullError.  Raises NoStoreError, StoreTooNewError, CorruptStoreError or
        ModelMismatchError.
        """
        store = Store.open_to_ask(Path(path))
        try:
            knowledge = cls(store, base_model.load(store), on_event)
            knowledge._warn_of_changed_prompts()
            knowledge._session.recover()
            knowledge._session.go_to(store.head())
        except BaseException:
            store.close()
            raise
        return knowledge

    def close(self) -> None:
        """Keep what was measured for the next time, and close the store."""
        try:
            self._session.protection.save()
        finally:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        questions: Iterable[Question] = (),
        statements: Iterable[str] = (),
        source: str | None = None,
        force: bool = False,
    ) -> EditReport:
        """Train the model on a fact; ``force`` commits even what the gate refuses.

        The outcome is ``committed``, ``rejected`` or, for the same key and text, ``unchanged``.
        Raises InvalidFactError, TextTooLongError, or DuplicateKeyError for a key that has another
        text.
        """
        fact = Fact.create(
            key, description, lang=lang, aliases=aliases, prompts=prompts,
            paraphrases=paraphrases, locality=locality, questions=questions,
            statements=statements, source=source,
        )  # fmt: skip
        return self.add_fact(fact, force=force)

    def add_fact(self, fact: Fact, *, force: bool = False) -> EditReport:
        """``add`` for a ``Fact``."""
        return self._single.add(fact, force=force)

    def add_group(
        self,
        facts: Sequence[Fact],
        *,
        force: bool = False,
        carry: bool = False,
        deadline: float | None = None,
    ) -> tuple[EditReport, ...]:
        """Train several facts together; the reports name, in ``keys``, each fact at least once.

        What the group does not learn is tried again by itself, so that no fact costs its
        neighbours; with ``carry`` it stays pending, for the caller to put into a later group.  A
        group that the gate refuses is split, and so is one that does not fit into memory: a fact
        that does not fit even alone is reported as ``failed``.  From ``deadline``
        (``time.monotonic``) on training ends where it stands, with OutOfTimeError; the same group
        goes on from there.  Raises what ``add_fact`` raises; what was committed before stands.
        """
        return self._groups.add(facts, GroupOptions(force, carry, deadline))

    @property
    def largest_group(self) -> int | None:
        """The most facts that are trained together since memory ran out; None if it never did."""
        return self._groups.largest

    def protect_for(self, facts: int, *, leave_out: Iterable[str] = ()) -> None:
        """Extract enough protected texts for so many more facts, before they are added in groups;
        otherwise that is done as groups are added.

        A text that contains one of the names in ``leave_out`` is not protected: what a benchmark
        asks must not be what was trained on.
        """
        with self._session.editing():
            self._session.protection.prepare()
            self._session.protection.extend_for(facts, leave_out)

    def update(self, key: str, description: str, *, force: bool = False) -> EditReport:
        """Give a fact another text.  Raises UnknownKeyError."""
        return self._single.update(key, description, force=force)

    def study(
        self, key: str, texts: Sequence[Written], *, of: str | None = None, force: bool = False
    ) -> StudyReport:
        """Train a fact with questions and statements that somebody wrote from its description: with
        those that it supports and that name no other key; the report says why others are refused.

        ``of`` is the description that they were written from: if the fact has another one, all are
        refused.  What the fact has already is passed over.  Raises UnknownKeyError.
        """
        return self._single.study(key, texts, of=of, force=force)

    def remove(self, key: str, *, force: bool = False) -> EditReport:
        """Train a fact's prompts back to what the model answered before it was added.

        Raises UnknownKeyError.
        """
        return self._single.remove(key, force=force)

    def rollback(self, revision: int) -> EditReport:
        """Go back to an earlier revision, to the bit, by appending one that restores it."""
        return self._single.rollback(revision)

    def erase(self, *keys: str, force: bool = False) -> EditReport:
        """Take facts out for good: from the database, from every file, and from the weights, which
        are trained from the base model without them.

        Revisions that knew them can no longer be restored; ``store.erase_plan`` says which.  Raises
        UnknownKeyError.
        """
        return self._single.erase(keys, force=force)

    def prune(self, before: int) -> PrunePlan:
        """Drop the deltas that no revision from ``before`` on needs; see ``revisions.prune``."""
        with self._session.editing():
            return prune.prune(self._session, before)

    def example_lines(self) -> list[str]:
        """The exact text and tokens of a fact as it would be trained, the answer marked."""
        fact = Fact.create("tide lantern", "Made of glass in Marrow.")
        return self.engine.renderer.describe(self.engine.examples(fact)[0])

    def verify(
        self,
        keys: Sequence[str] | None = None,
        *,
        sample: int | None = None,
        repair: bool = False,
        base_knowledge: int = 0,
    ) -> VerifyReport:
        """Ask committed facts again and record the answers; ``repair`` trains again what was lost.

        ``sample`` asks so many of them, those most likely to be lost.  ``base_knowledge`` questions
        are asked besides of what the model knew before the first edit.
        """
        rows = self.store.facts("committed")
        if keys:
            rows = [self._single.committed(key) for key in keys]
        if sample is not None:
            rows = at_risk(rows, (), sample)
        return verify(
            self._session, self._groups, rows, repair=repair, base_knowledge=base_knowledge
        )

    def doctor(self, deep: bool = True) -> list[Finding]:
        """Check the store; ``deep`` also rebuilds every revision and compares the digests."""
        findings = integrity.check(self.store)
        if deep:
            start, say = self._session.revision, self._session.say
            findings.append(base_model.check(self.store))
            findings += rebuild.check_revisions(self.store, self.engine.master, say)
            self._session.go_to(start)
        return findings

    def export(
        self, directory: str | Path, *, dtype: str | None = None, max_shard_size: str | None = None
    ) -> ExportReport:
        """Write the head as a folder that transformers loads, then reload and re-probe it.

        The report says too how many facts are recalled where the model is asked otherwise than it
        was trained, or its weights are rounded.
        """
        examples = self._all_examples()
        self._session.say("writing the model")
        report = hf.write(
            self.engine, examples, Path(directory), dtype=dtype, revision=self._session.revision,
            max_shard_size=max_shard_size, progress=self._session.say,
        )  # fmt: skip
        return self._with_conditions(report, lambda: hf.loaded(self.engine, Path(directory)))

    def export_adapter(self, directory: str | Path) -> ExportReport:
        """Write all edits as one LoRA adapter over the untouched base model, and re-probe it.

        Raises UsageError when the weights are those of the base model.
        """
        facts = [row.fact for row in self.store.facts("committed")]
        unseen = [e for fact in facts for e in self.engine.paraphrases(fact)]
        locality = self.locality_examples()
        report = peft.write(
            self.engine, self._all_examples(), [*unseen, *locality], Path(directory),
            revision=self._session.revision, progress=self._session.say,
        )  # fmt: skip
        return self._with_conditions(report, lambda: peft.loaded(self.engine, Path(directory)))

    def _with_conditions(self, report: ExportReport, load: Callable[[], object]) -> ExportReport:
        facts = [row.fact for row in self.store.facts("committed")]
        rows = conditions.measure(self.engine, facts, load, self._session.say)
        return replace(report, conditions=rows)

    def locality_examples(self) -> list[Example]:
        """The store's locality probes, tokens that must stay."""
        return self._session.protection.locality_examples()

    def _all_examples(self) -> list[Example]:
        facts = [row.fact for row in self.store.facts("committed")]
        return [e for fact in facts for e in self.engine.examples(fact)]

    def _warn_of_changed_prompts(self) -> None:
        """Facts were trained in another form: they may not be recalled in this one."""
        current = base_model.prompts_of(self.store.config)
        if self.store.meta("prompts") in (None, current) or not self.store.facts("committed"):
            return
        text = "[prompts] in kvedit.toml has changed since the facts were added: asked in"
        text += " another way, they may not be recalled"
        self._session.emit(Warning_(text=text, code="prompts-changed"))
