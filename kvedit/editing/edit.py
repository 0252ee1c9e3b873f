"""One edit is one journalled transaction: plan, train, merge, probe, gate, commit or put back.

Invariants:
- The journal's commit is the only commit point.  Before it the weights can be put back to the bit;
  an edit that does not reach it leaves the model as it was and says why.
- What the gate judges is the merged model in the dtype that is served, never the adapter.
- A delta is durable before the commit that names it; an attempt that the gate refuses never
  reaches the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvedit.adapter import deltas
from kvedit.adapter.deltas import Factors
from kvedit.config import Config, GroupConfig, TrainingConfig
from kvedit.editing.evaluation import Evaluator, Found, RetentionCandidate
from kvedit.editing.gate import Checks, misses, refusals
from kvedit.editing.plan import Plan
from kvedit.errors import Interrupted, OutOfTimeError, TrainingError
from kvedit.events import EditReport, Event, RetentionCheck, Status, Warning_
from kvedit.files import put
from kvedit.model.prompts import Example
from kvedit.store.store import FactChange, ProbeRow, Store
from kvedit.training import memory
from kvedit.training.engine import Engine, TrainingResult
from kvedit.training.loop import Step, Task
from kvedit.training.resume import TrainingCheckpoints

Emit = Callable[[Event], None]
Snapshot = Mapping[str, Any]
NAMED = 8  # questions, in a warning
LARGE = 256
"""Facts: a lesson of so many takes too long to be begun anew for two of 32 locality probes, which
one that keeps 97 in 100 of what the model knows loses in every fourth case."""


class Edit:
    """Carries out one plan; make a new one for each edit."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        config: Config,
        plan: Plan,
        emit: Emit,
        deadline: float | None = None,
    ) -> None:
        self._store, self._engine, self._config = store, engine, config
        self._plan, self._emit = plan, emit
        self._evaluator = Evaluator(store, engine, config, plan)
        self._began = time.monotonic()
        self._resumed_seconds = (
            0.0  # seconds that processes spent which ended in a lesson of this edit
        )
        self._timings: dict[str, float] = {}
        self._steps = 0
        self._not_learned: tuple[str, ...] = ()
        self._refusal_texts: tuple[str, ...] = ()
        self._retrained: tuple[FactChange, ...] = ()  # held facts that are taught once more
        self._training_checkpoints = TrainingCheckpoints(
            store.cache,
            say=lambda text: emit(Status(phase=text, key=plan.key)),
            warn=lambda text: emit(Warning_(text=text, code="not-kept")),
            deadline=deadline,
        )

    def run(self, *, force: bool = False) -> EditReport:
        """Commit, or reject with reasons; anything raised leaves the model as it was."""
        head = self._store.head()
        snapshot = self._engine.master.snapshot()
        edit_id = self._store.plan_edit(self._plan.kind, self._plan.changes, self._config.to_json())
        try:
            with memory.watched():
                report = self._carry_out(edit_id, head, snapshot, force)
            self._training_checkpoints.clear()
            return report
        except KeyboardInterrupt as error:
            committed = self._abandon(edit_id, "canceled", "interrupted by the user", snapshot)
            state = "was committed before" if committed else "did not happen"
            raise Interrupted(f"interrupted: the edit of {self._plan.key} {state}") from error
        except OutOfTimeError as error:
            self._abandon(edit_id, "canceled", error.message, snapshot)
            raise
        except Exception as error:  # the border of one edit: put the model back, then pass it on
            self._abandon(edit_id, "failed", f"{type(error).__name__}: {error}", snapshot)
            if isinstance(error, TrainingError):  # it would end there again
                self._training_checkpoints.clear()
            raise

    def _carry_out(self, edit_id: int, head: int, snapshot: Snapshot, force: bool) -> EditReport:
        candidates = self._evaluator.candidates()
        if self._plan.compaction:
            self._retrained = tuple(
                FactChange(r.row.id, r.row.fact, r.row.fact) for r in candidates
            )
        with self._timed("probe"):
            held = self._evaluator.answered_locality()
        delta, found, reasons = self._attempts(candidates, held, snapshot)
        if reasons and not force:
            self._engine.master.restore(snapshot)
            report = self._report("rejected", head, delta, found, reasons)
            self._store.finish_edit(edit_id, "rejected", reasons, report.to_json(), found.rows)
            return report
        if self._plan.group and not force:
            found = self._narrow(found)
        with self._timed("journal"):
            name = put(self._store.deltas, deltas.to_bytes(delta), ".safetensors")
            self._store.mark_trained(edit_id, name)
            digest = self._engine.master.digest()
            report = self._report("committed", head, delta, found, reasons, name)
            revision = self._store.commit_edit(
                edit_id,
                expected_head=head,
                delta=name,
                weights_digest=digest,
                changes=[*self._plan.changes, *self._retrained],
                results=found.rows,
                prior_answers=self._plan.prior,
                report=report.to_json(),
                restores=0 if self._plan.compaction else None,
            )
        self._tell_retention(found, revision)
        timings = dict(self._timings)
        return replace(report, revision=revision, seconds=self._seconds, timings=timings)

    def _narrow(self, found: Found) -> Found:
        """Go on with the facts of the group that were learned; the others stay as they were."""
        before = self._plan
        self._plan = before.only(found.learned)
        self._not_learned = tuple(key for key in before.keys if key not in self._plan.keys)
        every = frozenset(target.fact_id for target in before.targets)
        return found.without(every - found.learned)

    def _attempts(
        self, candidates: Sequence[RetentionCandidate], held: Sequence[Example], snapshot: Snapshot
    ) -> tuple[dict[str, Factors], Found, tuple[str, ...]]:
        """Teach and look; when refused, go on from there with what was lost beside it (budgeted).

        What several rounds of teaching add is one delta, merged as one.  A round that harmed the
        locality probes is thrown away.
        """
        lost = (
            {candidate.row.id: candidate for candidate in candidates}
            if self._plan.compaction
            else {}
        )
        delta: dict[str, Factors] = {}
        config = self._config.training
        group = self._config.group if self._plan.group else None
        if self._plan.kind == "remove":  # each prompt has its own answer: all are in every step
            config = replace(
                config, phrasings_per_step=max(len(t.recall) for t in self._plan.targets)
            )
        harmed = False
        for left in reversed(range(self._config.retention.max_repairs + 1)):
            if harmed:  # that is not trained away: begin anew
                delta = {}
                self._engine.master.restore(snapshot)
            taught = self._teach(candidates, list(lost.values()), config, group)
            delta = deltas.joined(delta, taught.delta)
            with self._timed("merge"):
                self._engine.master.restore(snapshot)
                self._engine.master.add(delta)
            with self._timed("probe"):
                found = self._evaluator.look(candidates, held)
            reasons = self._refusals(found)
            if not reasons:
                break
            self._tell_refusal("; ".join(reasons), found.rows, left)
            lost.update({candidate.row.id: candidate for candidate in found.lost})
            harmed = self._harmed(found.checks)
            if group is None:
                config = _harder(config, found.checks)
            else:
                config = replace(config, seed=config.seed + 1)
                group = _milder(group) if harmed else replace(group, epochs=group.refine_epochs)
        return delta, found, reasons

    def _refusals(self, found: Found) -> tuple[str, ...]:
        """Why the edit must not be committed; a group that learned some of its facts may."""
        gate = self._config.gate
        if self._plan.group:
            some = len(found.learned) > 0
            gate = replace(
                gate,
                min_recall=0.0 if some else gate.min_recall,
                min_paraphrase=0.0 if some else gate.min_paraphrase,
                min_retention=min(gate.min_retention, self._config.group.min_retention),
            )
        return refusals(found.checks, gate, surely=self._large)

    @property
    def _large(self) -> bool:
        return len(self._plan.targets) >= LARGE

    def _harmed(self, checks: Checks) -> bool:
        """Whether locality probes were lost; a group, which always costs a little, may lose some
        within the gate.
        """
        if self._plan.group:
            return misses(checks.locality, self._config.gate.min_locality, surely=self._large)
        return checks.locality.passed < checks.locality.n

    def _teach(
        self,
        candidates: Sequence[RetentionCandidate],
        repairing: Sequence[RetentionCandidate],
        config: TrainingConfig,
        group: GroupConfig | None,
    ) -> TrainingResult:
        new = [target.recall for target in self._plan.targets]
        again = {candidate.row.id for candidate in repairing}
        rehearsal = [candidate.all for candidate in candidates if candidate.row.id not in again]
        committed = self._store.keys("committed")
        reference_texts = self._engine.reference_texts
        if reference_texts is not None and group is not None:
            reference_texts = reference_texts.without([*committed, *self._plan.keys])
        taught = [*new, *(r.all for r in repairing)]
        task = Task(
            taught, rehearsal, reference_texts, 0 if self._plan.compaction else len(committed)
        )
        with self._timed("train"):
            found = self._engine.train(
                task, config, self._tell_step, group, self._training_checkpoints
            )
        self._steps += found.trained.steps
        self._resumed_seconds += found.resumed_seconds
        self._timings["train"] += found.resumed_seconds
        return found

    def _report(
        self,
        outcome: str,
        parent: int,
        delta: Mapping[str, Factors],
        found: Found,
        reasons: Sequence[str],
        name: str | None = None,
    ) -> EditReport:
        forced = outcome == "committed" and bool(reasons)
        return EditReport(
            kind=self._plan.kind,
            outcome=outcome,
            key=self._plan.key,
            keys=self._plan.keys,
            not_learned=self._not_learned,
            refusals=self._refusal_texts,
            retrained=len(self._retrained),
            parent=parent,
            reasons=tuple(reasons),
            reliability=found.checks.recall,
            generalization=found.checks.paraphrase,
            locality=found.checks.locality,
            retention=found.checks.retention,
            steps=self._steps,
            seconds=self._seconds,
            resumed_seconds=self._resumed_seconds,
            timings=dict(self._timings),
            ranks={matrix: factors.rank for matrix, factors in delta.items()},
            relative_norms=self._engine.master.norms() if outcome == "committed" else {},
            similar=self._plan.similar,
            broke=found.checks.lost if forced else (),
            delta=name,
            text_before=self._plan.text_before,
            text_after=self._plan.text_after,
        )

    def _abandon(self, edit_id: int, outcome: str, reason: str, snapshot: Snapshot) -> bool:
        """Put the model back and end the edit, unless it was committed already; tells which."""
        if self._store.edit(edit_id).state == "committed":
            return True
        self._engine.master.restore(snapshot)
        self._store.finish_edit(edit_id, outcome, [reason], {})
        return False

    def _tell_step(self, step: Step) -> None:
        self._emit(
            Status(
                phase=step.phase,
                key=self._plan.key,
                step=step.step,
                total=step.total,
                loss=step.loss,
                recall=(step.recalled, step.n),
            )
        )

    def _tell_refusal(self, why: str, rows: Sequence[ProbeRow], left: int) -> None:
        """For the report; and at once, where a group's long work begins again."""
        self._refusal_texts = (*self._refusal_texts, why)
        count = len(self._plan.targets)
        if self._plan.group and count > 1 and left:
            moved = [row.prompt for row in rows if row.kind == "locality" and not row.passed]
            named = f"; answers that changed: {' / '.join(moved[:NAMED])}" if moved else ""
            text = f"{count} facts taught together were refused ({why}{named}); teaching them again"
            self._emit(Warning_(text=text, code="refused"))

    def _tell_retention(self, found: Found, revision: int) -> None:
        for row in found.rows:
            if row.kind == "retention" and row.fact_id is not None:
                key = self._store.get(row.fact_id).fact.key
                check = RetentionCheck(
                    key=key, revision=revision, passed=row.passed, margin=row.margin
                )
                self._emit(check)

    @property
    def _seconds(self) -> float:
        return self._resumed_seconds + time.monotonic() - self._began

    def _timed(self, name: str) -> _Timer:
        return _Timer(self._timings, name)


class _Timer:
    """Adds the seconds spent inside to a named total."""

    def __init__(self, totals: dict[str, float], name: str) -> None:
        self._totals, self._name = totals, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = time.monotonic() - self._began
        self._totals[self._name] = self._totals.get(self._name, 0.0) + spent


def _milder(group: GroupConfig) -> GroupConfig:
    """How to teach a group that harmed the locality probes: at twice the price."""
    return replace(group, penalty_scale=group.penalty_scale * 2)


def _harder(config: TrainingConfig, checks: Checks) -> TrainingConfig:
    """How to try again: longer, and stricter or looser with the price, after what went wrong."""
    longer = min(400, config.max_steps * 2)
    missed = checks.recall.passed < checks.recall.n
    harmed = checks.locality.passed < checks.locality.n
    weight = config.penalty_weight / 3 if missed else config.penalty_weight * (1 + harmed)
    penalty = config.max_penalty * 2 if missed else config.max_penalty / (1 + harmed)
    return replace(
        config,
        max_steps=longer,
        penalty_weight=weight,
        max_penalty=penalty,
        phrasings_per_step=config.phrasings_per_step + 2,
        seed=config.seed + 1,
    )
