"""One edit is one journalled transaction: plan, train, merge, evaluate, gate, commit, remember.

Invariants:
- The journal's commit is the only commit point.  Before it the weights can be put back to the bit;
  an edit that does not reach it leaves the model as it was and says why.
- What the gate judges is the merged model in the dtype that is served, never the adapter.
- A delta is durable before the commit that names it; an attempt that the gate refuses never
  reaches the disk.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from kvedit.adapter import deltas
from kvedit.editing.attempts import Attempts, Delta, Snapshot, Timings
from kvedit.editing.evaluation import Evaluation, Evaluator
from kvedit.editing.plan import Plan
from kvedit.editing.study.answers import mean_gap
from kvedit.errors import Interrupted, OutOfTimeError, TrainingError
from kvedit.events import EditReport, RetentionCheck, Warning_
from kvedit.files import put
from kvedit.revisions import rebuild
from kvedit.revisions.session import Session
from kvedit.store.rows import FactChange, ProbeRow
from kvedit.training import memory
from kvedit.training.resume import TrainingCheckpoints


class Edit:
    """Carries out one plan; make a new one for each edit."""

    def __init__(
        self, session: Session, plan: Plan, *, force: bool = False, deadline: float | None = None
    ) -> None:
        """``force`` commits what the gate refuses.  From ``deadline`` (``time.monotonic``) on a
        group's training ends where it stands, with OutOfTimeError, and can be resumed.
        """
        self._session, self._plan, self._force = session, plan, force
        self._store, self._engine, self._config = session.store, session.engine, session.config
        self._began = time.monotonic()
        self._timings = Timings()
        self._attempts: Attempts | None = None
        self._put_back = False  # the weights are those from before the edit
        self._not_learned: tuple[str, ...] = ()
        self._retrained: tuple[FactChange, ...] = ()  # committed facts, trained again (compaction)
        self._training_checkpoints = TrainingCheckpoints(
            session.store.cache,
            say=lambda text: session.say(text, plan.key),
            warn=lambda text: session.emit(Warning_(text=text, code="not-kept")),
            deadline=deadline,
        )

    def run(self) -> EditReport:
        """Commit, or reject with reasons; anything raised leaves the model as it was."""
        head, start = self._store.head(), self._session.revision
        snapshot = self._engine.master.snapshot()
        edit_id = self._store.plan_edit(self._plan.kind, self._plan.changes, self._config.to_json())
        try:
            report = self._carry_out(edit_id, head, snapshot)
        finally:
            self._session.revision = start
            if not self._put_back and self._store.head() != head:  # also interrupted after it
                self._session.revision = self._store.head()
        if report.revision is not None and self._plan.erases:
            self._session.scrub()  # before anything that takes long
        if report.revision is not None and self._plan.restores is None:
            self._remember(report)
        self._session.emit(report)
        if report.revision is not None:
            with self._session.best_effort(), memory.watched():
                self._session.protection.extend(report.seconds)
        return report

    def _carry_out(self, edit_id: int, head: int, snapshot: Snapshot) -> EditReport:
        """Carry the plan out; when that is broken off, put the model back and end the edit."""
        carry_out = self._train if self._plan.restores is None else self._restore
        try:
            with memory.watched():
                report = carry_out(edit_id, head, snapshot)
            self._training_checkpoints.clear()
            return report
        except KeyboardInterrupt as error:
            committed = self._abandon(edit_id, "canceled", "interrupted by the user", snapshot)
            state = "was committed before" if committed else "did not happen"
            what = f"the {self._plan.kind} of {self._plan.key}"
            hint = "" if committed else "The same command again starts it anew."
            raise Interrupted(f"interrupted: {what} {state}", hint=hint) from error
        except OutOfTimeError as error:
            self._abandon(edit_id, "canceled", error.message, snapshot)
            raise
        except Exception as error:  # the border of one edit: put the model back, then pass it on
            self._abandon(edit_id, "failed", f"{type(error).__name__}: {error}", snapshot)
            if isinstance(error, TrainingError):  # it would end there again
                self._training_checkpoints.clear()
            raise

    def _abandon(self, edit_id: int, outcome: str, reason: str, snapshot: Snapshot) -> bool:
        """Put the model back and end the edit, unless it was committed; returns whether it was.

        A journal that cannot be read must not leave weights in memory that no gate has passed.
        """
        committed = False
        try:
            committed = self._store.edit(edit_id).state == "committed"
        finally:
            if not committed:
                self._engine.master.restore(snapshot)
                self._put_back = True
        if not committed:
            self._store.finish_edit(edit_id, outcome, [reason], {})
        return committed

    def _restore(self, edit_id: int, head: int, _: Snapshot) -> EditReport:
        """Give the model the weights of an earlier revision and commit them as a new one."""
        restores = self._plan.restores or 0
        with self._timings.measure("rebuild"):
            self._session.go_to(restores)
        digest = self._store.revision(restores).weights_digest
        report = EditReport(
            kind=self._plan.kind, outcome="committed", key=self._plan.key, parent=head,
            relative_norms=self._engine.master.norms(), seconds=self._seconds,
        )  # fmt: skip
        with self._timings.measure("journal"):
            revision = self._store.commit_edit(
                edit_id, expected_head=head, delta=None, weights_digest=digest,
                changes=self._plan.changes, results=(),
                report=report.to_json(), restores=restores, erases=self._plan.erases,
            )  # fmt: skip
        return self._finished(report, revision)

    def _train(self, edit_id: int, head: int, snapshot: Snapshot) -> EditReport:
        """Train until the gate accepts, then commit; or put the model back and reject."""
        with self._timings.measure("probe"):
            evaluator = Evaluator(self._session, self._plan)
        if self._plan.compaction:
            rows = [candidate.row for candidate in evaluator.candidates]
            self._retrained = tuple(FactChange(row.id, row.fact, row.fact) for row in rows)
        self._attempts = Attempts(
            self._session, self._plan, evaluator, self._training_checkpoints, self._timings
        )
        delta, evaluation, reasons = self._attempts.run(snapshot)
        with self._timings.measure("probe"):
            evaluation = evaluator.ask_answers(evaluation)
        if reasons and not self._force:
            self._engine.master.restore(snapshot)
            report = self._report("rejected", head, delta, evaluation, reasons)
            results = evaluation.rows
            self._store.finish_edit(edit_id, "rejected", reasons, report.to_json(), results)
            return report
        if self._plan.group and not self._force:
            evaluation = self._leave_out_not_learned(evaluation)
        return self._commit(edit_id, head, delta, evaluation, reasons)

    def _commit(
        self, edit_id: int, head: int, delta: Delta, evaluation: Evaluation, reasons: Sequence[str]
    ) -> EditReport:
        """Write the delta, then the one transaction that makes the merged weights the head."""
        with self._timings.measure("journal"):
            name = put(self._store.deltas, deltas.to_bytes(delta), ".safetensors")
            self._store.mark_trained(edit_id, name)
            digest = self._engine.weights_digest()
            report = self._report("committed", head, delta, evaluation, reasons, name)
            revision = self._store.commit_edit(
                edit_id, expected_head=head, delta=name, weights_digest=digest,
                changes=[*self._plan.changes, *self._retrained], results=evaluation.rows,
                report=report.to_json(),
                restores=0 if self._plan.compaction else None, erases=self._plan.erases,
            )  # fmt: skip
        self._emit_retention(evaluation.rows, revision)
        self._session.reading.keep(revision, evaluation.loss)
        return self._finished(report, revision)

    def _finished(self, report: EditReport, revision: int) -> EditReport:
        """The report, with what is known only after the commit."""
        timings = dict(self._timings)
        return replace(report, revision=revision, seconds=self._seconds, timings=timings)

    def _leave_out_not_learned(self, evaluation: Evaluation) -> Evaluation:
        """Go on with the facts of the group that were learned; the others stay pending."""
        group = self._plan
        self._plan = group.only(evaluation.learned)
        self._not_learned = tuple(key for key in group.keys if key not in self._plan.keys)
        fact_ids = frozenset(target.fact_id for target in group.targets)
        return evaluation.without(fact_ids - evaluation.learned)

    def _remember(self, report: EditReport) -> None:
        """Protect what was learned, and write a checkpoint when one is due."""
        session, every = self._session, self._config.retention.checkpoint_every
        with session.best_effort(), memory.watched():  # else measured before the next edit
            learns = self._plan.kind in ("add", "update")
            pairs = zip(self._plan.targets, self._plan.keys, strict=True)
            learned = [target for target, key in pairs if learns and key in report.keys]
            if self._plan.group and not self._engine.reads:
                weight = self._config.group.fact_weight
                session.protection.remember([t.recall[0] for t in learned], weight)
            else:
                session.protection.remember([e for t in learned for e in t.recall[:2]])
        with session.best_effort():
            rebuild.checkpoint_if_due(self._store, self._engine.master, every)

    def _report(
        self,
        outcome: str,
        parent: int,
        delta: Delta,
        evaluation: Evaluation,
        reasons: Sequence[str],
        name: str | None = None,
    ) -> EditReport:
        plan, checks, committed = self._plan, evaluation.checks, outcome == "committed"
        return EditReport(
            kind=plan.kind, outcome=outcome, key=plan.key, keys=plan.keys, similar=plan.similar,
            text_before=plan.text_before, text_after=plan.text_after,
            not_learned=self._not_learned, retrained=len(self._retrained), parent=parent,
            reasons=tuple(reasons), refusals=self._attempts.refusals if self._attempts else (),
            reliability=checks.recall, generalization=evaluation.generalization,
            locality=checks.locality,
            retention=checks.retention, answers=evaluation.answers,
            perturbation_gap=mean_gap(list(evaluation.gaps.values())),
            broke=checks.lost if committed and reasons else (),
            steps=self._attempts.steps if self._attempts else 0, seconds=self._seconds,
            resumed_seconds=self._resumed_seconds, timings=dict(self._timings), delta=name,
            ranks={matrix: factors.rank for matrix, factors in delta.items()},
            relative_norms=self._engine.master.norms() if committed else {},
            perplexity=checks.perplexity,
        )  # fmt: skip

    def _emit_retention(self, rows: Sequence[ProbeRow], revision: int) -> None:
        for row in rows:
            if row.kind == "retention" and row.fact_id is not None:
                key, passed = self._store.get(row.fact_id).fact.key, row.passed
                check = RetentionCheck(key=key, revision=revision, passed=passed, margin=row.margin)
                self._session.emit(check)

    @property
    def _resumed_seconds(self) -> float:
        """Spent by processes that ended in the training of this edit."""
        return self._attempts.resumed_seconds if self._attempts else 0.0

    @property
    def _seconds(self) -> float:
        return self._resumed_seconds + time.monotonic() - self._began
