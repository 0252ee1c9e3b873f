"""How much a model holds: the number of facts at which it begins to lose them, and in bits.

The bits of a fact are what its answer costs the base model before any edit: the negative log2
likelihood of the answer's tokens, its end included, the mean over the training phrasings.  Stored
are the bits of the facts that are recalled when all is done.

Invariants:
- The facts are trained as by ``bench strategies``, in one way; what is said of single facts comes
  from the same measurements.
- Nothing is claimed beyond what was measured: no N that was not a mark, no interval that was not
  drawn from these facts.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch

from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import TextTooLongError
from kvedit.facts.fact import Fact
from kvedit.facts.keys import normalise
from kvedit.metrics import bootstrap
from kvedit.model import loading, scoring
from kvedit.model.prompts import Example
from kvedit.training.engine import Engine
from tests.bench import questions
from tests.bench.asking import Point, Recalled, Task
from tests.bench.course import StrategyRun
from tests.bench.retain import BaseScore, Emit, engine_of
from tests.bench.strategies import StrategyOptions, Tell, Ways, own_store
from tests.bench.undo import own_parameters

HOLDS = 0.95
ROUNDS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class FactRecord:
    """One fact: ``bits`` and ``tokens`` of its answer, ``nearest`` the similarity (0 to 100) of its
    key to the closest other, ``margin`` the smallest of its training phrasings when committed (None
    if it never was), ``lost_after`` the mark from which on it was not recalled, to the end.
    """

    key: str
    bits: float
    tokens: int
    nearest: float
    outcome: str
    margin: float | None
    held: bool
    lost_after: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """One model: ``largest`` is the last mark before the first one where the share of facts given
    that is recalled, under either protocol, is below 95%; ``fell`` whether there was one.  Of facts
    given, not of facts committed: a model that is full shows it in what the gate refuses.
    """

    model: str
    parameters: int
    touched: int
    largest: int
    fell: bool
    stored_bits: float
    base: tuple[BaseScore, ...]
    points: tuple[Point, ...]
    run: StrategyRun
    facts: tuple[FactRecord, ...]

    @property
    def bits_per_touched(self) -> float:
        """Bits stored for each parameter that edits may change."""
        return self.stored_bits / self.touched

    @property
    def bits_per_parameter(self) -> float:
        """Bits stored for each parameter of the model."""
        return self.stored_bits / self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityResult:
    """All models, in the order given."""

    models: tuple[Capacity, ...]

    @property
    def model(self) -> str:
        """Their names."""
        return ", ".join(one.model for one in self.models)


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of one group less that of another, with its bootstrap 95% interval."""

    value: float
    low: float
    high: float


def capacity(
    options: StrategyOptions,
    sources: Sequence[str | None],
    emit: Emit,
    tell: Tell = lambda result, point: None,
) -> CapacityResult:
    """Train the same facts to each model in the way that ``options.groups`` names first.

    With ``options.resume`` a run that was stopped goes on; when its facts were lost before that is
    not known any more.
    """
    folders = [questions.load(options.data, loading.locate(source)) for source in sources]
    capacities = []
    for number, (source, data) in enumerate(
        zip(sources, questions.in_common(folders), strict=True), 1
    ):
        own = replace(options, model=source)
        own = own_store(own, f"model-{number}") if len(sources) > 1 else own
        capacities.append(_capacity(own, data, emit, tell))
    return CapacityResult(models=tuple(capacities))


def _capacity(
    options: StrategyOptions, data: questions.BenchData, emit: Emit, tell: Tell
) -> Capacity:
    facts = questions.new_facts(data, options.facts, options.facts_file, options.kind)
    ledger = _Ledger(facts)
    ways = Ways(options, data, facts, emit, tell, ledger)
    ways.train(options.groups[0])
    records = ledger.records()
    points = ways.result.points
    until, fell = largest(points)
    return Capacity(
        model=ways.result.model,
        parameters=ledger.parameters,
        touched=ledger.touched,
        largest=until,
        fell=fell,
        stored_bits=sum(record.bits for record in records if record.held),
        base=ways.result.base,
        points=points,
        run=ways.result.runs[0],
        facts=records,
    )


def largest(points: Sequence[Point], share: float = HOLDS) -> tuple[int, bool]:
    """The last mark before the facts held fall below a share of all given, 0 if the first; if they
    fell.
    """
    until = 0
    for point in points:
        rates = (point.tried.generated.rate, point.tried.forced.rate)
        if any(rate is not None and rate < share for rate in rates):
            return until, True
        until = point.after
    return until, False


class _Ledger:
    """Keeps an account of every fact; an observer of the way that is trained."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self._facts = facts
        self._bits: dict[str, tuple[float, int]] = {}
        self._lost: dict[str, int] = {}
        self._outcomes: dict[str, str] = {}
        self._held: set[str] = set()
        self._margins: dict[str, float] = {}
        self.parameters = self.touched = 0

    def begin(self, knowledge: KnowledgeBase) -> None:
        """Count the model's parameters and the bits of each answer."""
        engine = engine_of(knowledge)
        self.parameters = sum(p.numel() for _, p in own_parameters(engine.base.model))
        self.touched = sum(matrix.numel() for matrix in engine.master.matrices.values())
        known = {
            fact.key: examples for fact in self._facts if (examples := _rendered(engine, fact))
        }
        costs = iter(_base_bits(engine, [e for own in known.values() for e in own]))
        for key, own in known.items():
            tokens = len(own[0].ids) - own[0].start
            self._bits[key] = mean([next(costs) for _ in own]), tokens

    def look(
        self, knowledge: KnowledgeBase, done: int, tasks: Sequence[Task], answers: Recalled
    ) -> None:
        """Note which facts are recalled under both protocols, and since when others are not."""
        self._held = set()
        for task, generated, forced in zip(tasks, answers.generated, answers.forced, strict=True):
            self._outcomes[task.key] = "committed" if task.kept else "rejected"
            if generated and forced:
                self._held.add(task.key)
                self._lost.pop(task.key, None)
            elif task.kept:
                self._lost.setdefault(task.key, done)
        self._margins = margins(knowledge)

    def records(self) -> tuple[FactRecord, ...]:
        """The account as it stands."""
        keys = list(self._bits)
        near = nearest(keys)
        return tuple(
            FactRecord(
                key=key,
                bits=self._bits[key][0],
                tokens=self._bits[key][1],
                nearest=near[key],
                outcome=self._outcomes.get(key, "failed"),
                margin=self._margins.get(key),
                held=key in self._held,
                lost_after=self._lost.get(key),
            )
            for key in keys
        )


def _rendered(engine: Engine, fact: Fact) -> list[Example]:
    """A fact's training examples; none if it does not fit the model."""
    try:
        return engine.examples(fact)
    except TextTooLongError:
        return []


def _base_bits(engine: Engine, examples: Sequence[Example]) -> list[float]:
    """What each answer costs the base model; the engine's may know facts by now."""
    here = engine.master.snapshot()
    engine.master.reset()
    try:
        return bits(engine.base.model, examples)
    finally:
        engine.master.restore(here)


@torch.no_grad()
def bits(model: torch.nn.Module, examples: Sequence[Example]) -> list[float]:
    """What each answer costs a model, its end token included, in bits."""
    if not examples:
        return []
    scores = scoring.token_scores(model, examples)
    total = torch.zeros(len(examples), device=scores.losses.device)
    nats = total.index_add(0, scores.rows, scores.losses)
    return [value / math.log(2) for value in nats.tolist()]


def margins(knowledge: KnowledgeBase) -> dict[str, float]:
    """For each fact its smallest margin over the training phrasings when it was committed."""
    store = knowledge.store
    smallest: dict[int, float] = {}
    for edit in store.history():
        if edit.kind != "add" or edit.state != "committed":
            continue
        for row in store.edit_results(edit.id):
            if row.kind == "recall" and row.fact_id is not None and row.margin is not None:
                smallest[row.fact_id] = min(row.margin, smallest.get(row.fact_id, math.inf))
    return {row.fact.key: smallest[row.id] for row in store.facts() if row.id in smallest}


def nearest(keys: Sequence[str]) -> dict[str, float]:
    """The highest similarity of each key to another (rapidfuzz's ratio of the normalised keys)."""
    from rapidfuzz import fuzz, process

    forms = [normalise(key) for key in keys]
    similarities = {}
    for at, key in enumerate(keys):
        others = [*forms[:at], *forms[at + 1 :]]
        hit = process.extractOne(forms[at], others, scorer=fuzz.ratio)
        similarities[key] = float(hit[1]) if hit is not None else 0.0
    return similarities


def difference(
    one: Sequence[float], other: Sequence[float], seed: int = 0, rounds: int = ROUNDS
) -> Difference | None:
    """The mean of ``one`` less that of ``other``, percentile bootstrap; None below two values."""
    if min(len(one), len(other)) < 2:
        return None

    def draw(rng: random.Random) -> float:
        return mean(rng.choices(one, k=len(one))) - mean(rng.choices(other, k=len(other)))

    low, high = bootstrap(draw, seed, rounds)
    return Difference(mean(one) - mean(other), low, high)


def first_lost(records: Sequence[FactRecord]) -> dict[int, list[str]]:
    """The keys that were lost, by the mark at which they were first missing."""
    lost: dict[int, list[str]] = defaultdict(list)
    for record in records:
        if record.lost_after is not None:
            lost[record.lost_after].append(record.key)
    return dict(sorted(lost.items()))
