"""Training attempts of one edit: train, merge, evaluate, ask the gate, and try again if it refuses.

Invariants:
- What the gate judges is the merged model in the dtype that is served, never the adapter.
- What several attempts add is one delta, merged as one.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from kvedit.adapter import deltas
from kvedit.adapter.deltas import Factors
from kvedit.config import GroupConfig, TrainingConfig
from kvedit.editing.evaluation import Evaluation, Evaluator, RetentionCandidate
from kvedit.editing.gate import (
    Checks,
    is_harmed,
    misses,
    only_unseen_missed,
    refusals,
    to_train_again,
)
from kvedit.editing.plan import Plan, Target
from kvedit.editing.study.examples import StudyExamples
from kvedit.events import Status, Warning_
from kvedit.model.prompts import Example
from kvedit.replay.general_texts import sentences_with_numbers
from kvedit.replay.kl import ReferenceTexts, Teacher
from kvedit.replay.neighbours import ANSWER_TOKENS, neighbour_prompts
from kvedit.revisions.session import Session
from kvedit.store.rows import ProbeRow
from kvedit.training.engine import TrainingResult
from kvedit.training.loops.loop import LoopResult, Step, Task
from kvedit.training.loops.turns import FACTS_TOGETHER, for_facts
from kvedit.training.resume import TrainingCheckpoints

Delta = dict[str, Factors]
Snapshot = Mapping[str, Any]
MAX_NAMED = 8  # questions, in a warning
LARGE_GROUP = 256
"""Facts: a group of so many takes too long to be trained again for two of 32 locality probes, which
a model that keeps 97% of what it knows loses by chance in every fourth group."""
REFERENCES_DRAWN = 6
"""For an edit of a single fact, times those of a step; with the square root of the number of facts
in turn."""
REFINED_TOGETHER, REFINE_PROMPTS = 5, (2, None)
"""Facts of a group in turn that are trained together, of those that its first training left; and by
how many of its prompts a fact is judged in each round, by all in the last."""
MAX_STALLS = 2  # attempts in which the loss stopped falling: a third would do so too


@dataclass(frozen=True, slots=True)
class _Trained:
    """A fact as it is trained: its prompts, and what is studied of it."""

    examples: Sequence[Example]
    study: Sequence[Example]


class Timings(dict[str, float]):
    """Seconds by the name of what they were spent on."""

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to a name."""
        began = time.monotonic()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.monotonic() - began


@dataclass(slots=True)
class Attempts:
    """The attempts of one edit: ``refusals`` are the gate's reasons for each refused one, ``steps``
    all training steps, ``stalls`` the attempts in which the loss stopped falling before all was
    recalled, ``missed_unseen`` whether one recalled a single fact under its training prompts alone,
    ``resumed_seconds`` the seconds spent by processes that ended in the training; the ``teacher``
    is the model before all of them.
    """

    session: Session
    plan: Plan
    evaluator: Evaluator
    checkpoints: TrainingCheckpoints
    timings: Timings
    refusals: tuple[str, ...] = ()
    steps: int = 0
    stalls: int = 0
    missed_unseen: bool = False
    resumed_seconds: float = 0.0
    teacher: Teacher | None = None

    def run(self, snapshot: Snapshot) -> tuple[Delta, Evaluation, tuple[str, ...]]:
        """Train, merge, evaluate; when refused, go on from there with the earlier facts that were
        lost in the training data too, up to ``max_repairs`` times.

        Returns the delta that is merged when it ends, its evaluation, and why the gate refuses it
        (nothing if it does not).  An attempt that lost locality probes is thrown away: training on
        does not bring them back.
        """
        master, settings = self.session.engine.master, self.session.config
        earlier = {c.row.id: c for c in self.evaluator.candidates if self._is_trained_too(c)}
        delta: Delta = {}
        config, references = self._first_config(), self._references()
        self.teacher = self._teacher()
        group = settings.group if self.plan.group and not self._in_turn else None
        harmed, began = False, time.monotonic()
        for attempts_left in reversed(range(settings.retention.max_repairs + 1)):
            if harmed:
                delta = {}
                master.restore(snapshot)
                self._protect_more(time.monotonic() - began)
            stalled, began = False, time.monotonic()
            for task in self._tasks(list(earlier.values()), references):
                result = self._train(task, config, group)
                stalled |= result.trained.stalled
                delta = deltas.joined(delta, result.delta)
                with self.timings.measure("merge"):
                    master.restore(snapshot)
                    master.add(delta)
            self.stalls += stalled
            with self.timings.measure("probe"):
                evaluation = self.evaluator.evaluate()
            reasons = self._refusals(evaluation)
            if not reasons or self.stalls >= MAX_STALLS:
                break
            self._note_refusal("; ".join(reasons), evaluation.rows, attempts_left)
            earlier.update({candidate.row.id: candidate for candidate in evaluation.lost})
            harmed = self._harmed(evaluation.checks)
            self.missed_unseen |= not self.plan.group and only_unseen_missed(
                evaluation.checks, settings.gate
            )
            if group is None:
                config = to_train_again(config, evaluation.checks, settings.gate)
            else:
                config = replace(config, seed=config.seed + 1)
                stricter = replace(group, penalty_scale=group.penalty_scale * 2)
                group = stricter if harmed else replace(group, epochs=group.refine_epochs)
        return delta, evaluation, reasons

    def _is_trained_too(self, candidate: RetentionCandidate) -> bool:
        """Whether an earlier fact is trained from the start: all in a compaction, else those whose
        keys are most like the new one, which would be lost first.
        """
        return self.plan.compaction or candidate.row.fact.key in self.plan.trained_beside

    def _protect_more(self, seconds: float) -> None:
        """Measure more of what must stay, if there is more, for as long as an attempt took."""
        with self.timings.measure("protect"):
            if self.session.protection.extend_at_once(seconds):
                self.session.say("more of what must stay was measured", self.plan.key)

    @property
    def _in_turn(self) -> bool:
        """Whether a group's facts are trained in turn, in steps as for a single fact."""
        return self.plan.group and self.session.engine.reads

    def _first_config(self) -> TrainingConfig:
        config = self.session.config.training
        if self.plan.kind == "remove":  # each prompt has its own answer: all are in every step
            most = max(len(target.recall) for target in self.plan.targets)
            config = replace(config, phrasings_per_step=most)
        return config

    def _references(self) -> ReferenceTexts | None:
        """What the training is held to besides: for a group what the base model says, for a single
        fact or several in turn what the model says now to the prompts that are trained when they
        are about other names, and half as many sentences with numbers.
        """
        engine, config = self.session.engine, self.session.config.training
        if self.plan.group and not self._in_turn:
            texts = engine.reference_texts
        elif engine.reads:
            facts = max(1, min(self._facts, FACTS_TOGETHER))
            most = for_facts(config.reference_texts * REFERENCES_DRAWN, facts)
            sentences = sentences_with_numbers(engine.renderer, most // 2, self._rng())
            texts = engine.reference([*self._neighbours(most), *sentences])
        else:
            texts = None
        names = [*(row.fact.name for row in self.evaluator.committed), *self.plan.names]
        return None if texts is None else texts.without(names)

    def _neighbours(self, most: int) -> list[Example]:
        """What the model says now when it is asked about other names what the edit trains."""
        engine = self.session.engine
        edited = [one.after or one.before for one in self.plan.changes]
        facts = [fact for fact in edited if fact] or [
            candidate.row.fact for candidate in self.evaluator.candidates
        ]
        asked = [(fact, [example.prompt for example in engine.examples(fact)]) for fact in facts]
        return engine.answered(neighbour_prompts(asked, most, self._rng()), limit=ANSWER_TOKENS)

    def _rng(self) -> random.Random:
        """What is drawn for the references of an edit is the same again, and other for the next."""
        return random.Random(self.session.revision)

    def _teacher(self) -> Teacher | None:
        """What the model says now to the questions about all facts, with their texts before it."""
        if not self.session.config.study.distill:
            return None
        edited = [one.after for one in self.plan.changes if one.after is not None]
        facts = [*edited, *(candidate.row.fact for candidate in self.evaluator.candidates)]
        study = StudyExamples(self.session)
        with self.timings.measure("teacher"):
            return self.session.engine.teacher([p for fact in facts for p in study.told(fact)])

    def _tasks(
        self, earlier: Sequence[RetentionCandidate], references: ReferenceTexts | None
    ) -> Iterator[Task]:
        """The plan's facts and some ``earlier`` ones, beside the other candidates.  Facts that are
        trained in turn are a few at a time, each time beside those before them.  What a task leaves
        is merged before the next one is made.
        """
        chosen = {candidate.row.id for candidate in earlier}
        others = [_Trained(c.all, c.study) for c in self.evaluator.candidates
                  if c.row.id not in chosen]  # fmt: skip
        targets = [
            _Trained((*target.recall, *self._in_contexts(target)), target.study)
            for target in self.plan.targets
        ]
        again = [_Trained(candidate.all, candidate.study) for candidate in earlier]
        if not self._in_turn:
            yield self._task([*targets, *again], others, references)
            return
        for start in range(0, max(1, len(again)), FACTS_TOGETHER):
            part = [*([] if start else targets), *again[start : start + FACTS_TOGETHER]]
            beside = [*others, *again[:start]]
            yield self._task(part, beside, references)
            yield from self._refining(part, beside, references)

    def _in_contexts(self, target: Target) -> list[Example]:
        """More prompts of a fact whose unseen phrasings an attempt missed."""
        if not self.missed_unseen:
            return []
        facts = [one.after for one in self.plan.changes if one.fact_id == target.fact_id]
        return [e for fact in facts if fact for e in self.session.engine.in_contexts(fact)]

    def _refining(
        self, facts: Sequence[_Trained], others: Sequence[_Trained],
        references: ReferenceTexts | None,
    ) -> Iterator[Task]:  # fmt: skip
        """Those of some facts that are not recalled yet, fewer at a time, beside all the others:
        an adapter that starts at their own gradient takes them the rest of the way in a few steps.
        """
        for asked in REFINE_PROMPTS:
            missing = self._not_recalled([fact.examples[:asked] for fact in facts])
            for start in range(0, len(missing), REFINED_TOGETHER):
                part = missing[start : start + REFINED_TOGETHER]
                beside = [fact for number, fact in enumerate(facts) if number not in part]
                yield self._task([facts[number] for number in part], [*beside, *others], references)

    def _not_recalled(self, facts: Sequence[Sequence[Example]]) -> list[int]:
        """Which facts the weights as they are do not recall under all of their prompts."""
        outcomes = iter(self.session.engine.recall([e for fact in facts for e in fact]))
        passed = [[next(outcomes).passed for _ in fact] for fact in facts]
        return [number for number, each in enumerate(passed) if not all(each)]

    def _task(
        self, new: Sequence[_Trained], rehearsed: Sequence[_Trained],
        references: ReferenceTexts | None,
    ) -> Task:  # fmt: skip
        return Task(
            [fact.examples for fact in new],
            [fact.examples for fact in rehearsed],
            references,
            0 if self.plan.compaction else len(self.evaluator.committed),
            [fact.study for fact in (*new, *rehearsed)],
            self.session.config.study,
            self._in_turn,
            self.teacher,
        )

    def _train(
        self, task: Task, config: TrainingConfig, group: GroupConfig | None
    ) -> TrainingResult:
        """Train a task on the weights as they are."""
        train = self.session.engine.train
        with self.timings.measure("train"):
            result = train(task, config, self._emit_step, group, self.checkpoints)
        self.steps += result.trained.steps
        if result.trained.stalled:
            self._warn_of_stall(result.trained)
        self.resumed_seconds += result.resumed_seconds
        self.timings["train"] += result.resumed_seconds
        return result

    def _refusals(self, evaluation: Evaluation) -> tuple[str, ...]:
        """Why the edit must not be committed; a group that learned some of its facts may."""
        gate = self.session.config.gate
        if self.plan.group:
            minimum = min(gate.min_retention, self.session.config.group.min_retention)
            gate = replace(gate, min_retention=minimum)
            if evaluation.learned:
                gate = replace(gate, min_recall=0.0, min_paraphrase=0.0)
        return refusals(evaluation.checks, gate, significant=self._is_large)

    @property
    def _is_large(self) -> bool:
        """Whether chance alone costs a group more of the few locality probes than one edit may."""
        return self._facts >= LARGE_GROUP or (self._in_turn and self._facts > 1)

    @property
    def _facts(self) -> int:
        """How many the first attempt trains."""
        again = len(self.evaluator.candidates) if self.plan.compaction else 0
        return len(self.plan.targets) + again

    def _harmed(self, checks: Checks) -> bool:
        """Whether locality probes were lost; a group, which always costs a little, may lose some
        within the gate.
        """
        if self.plan.group:
            minimum = self.session.config.gate.min_locality
            return misses(checks.locality, minimum, significant=self._is_large)
        return is_harmed(checks, self.session.config.gate)

    def _emit_step(self, step: Step) -> None:
        key = None if self.plan.erases else self.plan.key  # it is others that are trained then
        self.session.emit(Status(
            phase=step.phase, key=key, step=step.step, total=step.total, loss=step.loss,
            recall=(step.recalled, step.n),
        ))  # fmt: skip

    def _warn_of_stall(self, trained: LoopResult) -> None:
        text = (
            f"{self.plan.key}: the loss has stopped falling, at {trained.loss:.2f} after"
            f" {trained.steps} steps"
        )
        self.session.emit(Warning_(text=text, code="stalled", key=self.plan.key))

    def _note_refusal(self, why: str, rows: Sequence[ProbeRow], attempts_left: int) -> None:
        """For the report; where a group is trained again, which takes long, a warning at once."""
        self.refusals = (*self.refusals, why)
        count = len(self.plan.targets)
        if count == 1 and attempts_left:
            self.session.say(f"refused ({why}); training it again", self.plan.key)
        if self.plan.group and count > 1 and attempts_left:
            changed = [row.prompt for row in rows if row.kind == "locality" and not row.passed]
            named = f"; answers that changed: {' / '.join(changed[:MAX_NAMED])}" if changed else ""
            text = f"a group of {count} facts was refused ({why}{named}); training it again"
            self.session.emit(Warning_(text=text, code="refused"))
