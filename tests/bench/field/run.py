"""``field``: every method from the same base model, each in a process of its own.

The base model is measured first, and with it what a pass and a question take on this machine, from
which the cost of all methods is said before the first of them starts.

Invariants:
- A part (the base model, a method in one way) is a JSON file with what was answered; scores are
  computed from these files alone.
- A part that is complete and was made from the same things is not measured again; a method that was
  stopped starts again, kvedit's store goes on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvedit.bench.memory import peak_memory
from kvedit.bench.tables import plain
from kvedit.events import Event, Status
from kvedit.files import write_atomic
from kvedit.metrics import normalised_exact
from kvedit.model import generation, loading
from tests.bench import child, quality_material
from tests.bench.baseline import batch_of
from tests.bench.field import records as records_
from tests.bench.field.asked import Asked
from tests.bench.field.measure import Material, answer_limit, ask
from tests.bench.field.method import BATCH, SEQUENTIAL, Method, Setup, make, method
from tests.bench.field.records import Record, questions
from tests.bench.field.scores import VERSION, Point, State, judge
from tests.bench.quality_methods import base_model
from tests.bench.quality_scores import Change, change

Emit = Callable[[Event], None]
BASE, SERVED = "base", "base-as-served"
MARKS = (1, 10, 30, 100, 300, 1000)
TEXTS, TEXT_TOKENS = 64, 64  # that the base model writes by itself, for statistics
PACKAGES = ("torch", "transformers", "peft", "rapidfuzz")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldOptions:
    """What is edited, by which methods, and what is asked.

    ``known`` are questions about keys that nobody edits, ``ability_questions`` of ``abilities`` are
    asked (None: all).  ``settings`` are changes to those of methods: method, name and value.
    ``minutes`` ends a method after the edit in which they pass; ``time`` is
    that of kvedit's ``init``, in seconds.  ``cost`` stops when the cost was said.
    """

    base: str | None
    data: Path
    n: int = 10
    methods: tuple[str, ...] = ()
    settings: tuple[tuple[str, str, Any], ...] = ()
    ways: tuple[str, ...] = (SEQUENTIAL,)
    known: int = 60
    abilities: Path | None = None
    ability_questions: int | None = 90
    config: Path | None = None
    time: float | None = None
    minutes: float | None = None
    seed: int = 0
    store_dir: Path | None = None
    resume: bool = False
    cost: bool = False

    def changes(self, name: str) -> dict[str, Any]:
        """What was changed of a method's settings."""
        return {setting: value for one, setting, value in self.settings if one == name}

    @property
    def marks(self) -> tuple[int, ...]:
        """After how many edits everything is asked."""
        return tuple(sorted({*(mark for mark in MARKS if mark < self.n), self.n}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One edit, of a record or of all together; ``right``: all trained prompts, directly after.

    ``processor_seconds`` are those of this process, all threads: on a machine that others use too
    they say more than the clock.
    """

    key: str
    seconds: float
    processor_seconds: float
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one process measured; ``states`` by the number of edits, of the base model by 0."""

    name: str
    way: str = ""
    changes: str = ""
    model: str = ""
    dtype: str = ""
    fingerprint: str = ""
    texts: tuple[tuple[int, ...], ...] = ()
    pass_seconds: float = 0.0
    tokens: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    states: Mapping[int, State] = field(default_factory=dict)
    peak: int = 0
    complete: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a method should take at most: seconds of edits (None: unknown) and of asking."""

    method: str
    way: str
    editing: float | None
    asking: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A method in one way: its scores after each mark, and what it cost; ``stopped`` by the limit
    of time.
    """

    method: str
    way: str
    changes: str
    settings: Mapping[str, Any]
    notes: Mapping[str, Any]
    edits: tuple[Edit, ...]
    points: tuple[Point, ...]
    seconds: float
    median_seconds: float | None
    processor_seconds: float
    peak: int
    asking_seconds: float
    stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldResult:
    """All that was measured so far; ``base`` is the base model's own row, in fp32."""

    model: str
    fingerprint: str
    data: str
    data_digest: str
    records: int
    known: int
    abilities: int
    marks: tuple[int, ...]
    definitions: int
    versions: Mapping[str, str]
    pass_seconds: float
    costs: tuple[Cost, ...]
    base: Point
    rows: tuple[Row, ...] = ()


Tell = Callable[[FieldResult, Row | None], None]


def field_(options: FieldOptions, emit: Emit, tell: Tell = lambda result, row: None) -> FieldResult:
    """Measure the base model, say the cost, then measure each method; ``tell`` gets all so far."""
    kinds = {name: method(name) for name in options.methods}  # a wrong name ends it here
    for name in {*kinds, *(one for one, *_ in options.settings)}:
        made(options, name, _empty(options))
    material = load(options)
    given = options.store_dir
    opened = nullcontext(given) if given else TemporaryDirectory(prefix="kvedit-field-")
    with opened as folder:
        parts = _Parts(options, Path(folder), emit)
        base = parts.get(BASE, "")
        costs = tuple(_costs(options, kinds, material, base))
        result = _result(options, material, base, costs)
        for line in cost_lines(costs):
            emit(Status(phase="expected", text=line))
        tell(result, None)
        for one in () if options.cost else costs:
            served = base if kinds[one.method].in_fp32 else parts.served(base)
            row = _row(material, served, parts.get(one.method, one.way))
            result = replace(result, rows=(*result.rows, row))
            tell(result, row)
    return result


def load(options: FieldOptions) -> Material:
    """Records, unedited keys and choices of the options' files."""
    edited, known = records_.choose(options.data, options.n, options.known)
    rows: Sequence[Any] = ()
    if options.abilities is not None:
        every = quality_material.abilities(options.abilities)
        rows = records_.sample(every, options.ability_questions, options.seed)
    return Material(tuple(edited), tuple(known), tuple(rows))


# ---- parts


class _Parts:
    """The parts of a run, each measured in a process of its own or read from its file."""

    def __init__(self, options: FieldOptions, folder: Path, emit: Emit) -> None:
        self._options, self._folder, self._emit = options, folder, emit
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, way: str) -> Part:
        """One part; it is measured unless it is there."""
        path = part_path(self._folder, name, way)
        digest = digest_of(self._options, name, way)
        kept = read_part(path, digest) if self._options.resume else None
        if kept is None or not kept.complete:
            if kept is None:
                path.unlink(missing_ok=True)
            self._emit(Status(phase=f"{name}: starting"))
            in_child(self._options, name, way, self._folder, self._emit)
            kept = read_part(path, digest)
        if kept is None:
            raise RuntimeError(f"{path} was not written")
        return kept

    def served(self, base: Part) -> Part:
        """The base model in the dtype it is served in, where that is not fp32."""
        own = self.get(SERVED, "")
        return base if own.dtype == base.dtype else own


def in_child(options: FieldOptions, name: str, way: str, folder: Path, emit: Emit) -> None:
    """Measure a part in a process of its own; raises KveditError if that fails."""
    child.run(name, measure_part, (options, name, way, folder), emit)


def part_path(folder: Path, name: str, way: str) -> Path:
    """Where a part is kept."""
    return folder / f"{name}{'-' if way else ''}{way}.json"


def digest_of(options: FieldOptions, name: str, way: str) -> str:
    """SHA-256 of what decides a part."""
    files = [
        hashlib.sha256(path.read_bytes()).hexdigest() if path is not None else ""
        for path in (options.data, options.abilities, options.config)
    ]
    shown = replace(
        options, methods=(), ways=(), settings=(), store_dir=None, resume=False, cost=False,
        minutes=None,
        config=None, time=options.time if name == "kvedit" else None,
    )  # fmt: skip
    own = "" if name in (BASE, SERVED) else repr(made(options, name, _empty(options)).settings())
    whole = (name, way, files, shown, loading.locate(options.base), own)
    return hashlib.sha256(repr(whole).encode()).hexdigest()


def made(options: FieldOptions, name: str, setup: Setup) -> Method:
    """A method as the options have it."""
    return make(name, setup, options.changes(name))


def _empty(options: FieldOptions) -> Setup:
    return Setup(model=options.base, folder=Path(), seed=options.seed)


def read_part(path: Path, digest: str) -> Part | None:
    """A part that was written from the same things."""
    if not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.pop("digest") != digest:
        return None
    document["edits"] = tuple(Edit(**edit) for edit in document["edits"])
    document["texts"] = tuple(map(tuple, document["texts"]))
    document["states"] = {
        int(after): State.from_json(state) for after, state in document["states"].items()
    }
    return Part(**{item.name: document[item.name] for item in fields(Part)})


def measure_part(options: FieldOptions, name: str, way: str, folder: Path, emit: Emit) -> None:
    """One part, in this process, into its file."""
    path, digest = part_path(folder, name, way), digest_of(options, name, way)

    def keep(part: Part) -> None:
        text = json.dumps({"digest": digest, **plain(part)}, ensure_ascii=False)
        write_atomic(path, text.encode())

    material = load(options)
    if name in (BASE, SERVED):
        keep(_measure_base(options, name, material, emit))
        return
    base = read_part(part_path(folder, BASE, ""), digest_of(options, BASE, ""))
    if base is None:
        raise RuntimeError("the base model was not measured")
    setup = Setup(
        model=options.base, folder=folder / f"{name}-{way}", texts=base.texts, seed=options.seed,
        config=options.config, time=options.time,
    )  # fmt: skip
    _MethodRun(options, material, made(options, name, setup), name, way, keep, emit).run(
        read_part(path, digest)
    )


def _measure_base(options: FieldOptions, name: str, material: Material, emit: Emit) -> Part:
    """The base model's answers, texts that it writes, and what a pass takes."""
    base, own = base_model(_empty(options).options, in_fp32=name == BASE)
    asked = Asked(own.model, own.renderer)
    state = ask(asked, material, len(material.records), emit, abilities=True)
    more: dict[str, Any] = {}
    if name == BASE:
        texts = _own_texts(asked, options.seed)
        more = {"texts": texts, "pass_seconds": _pass_seconds(asked, material.records)}
    first = material.records[0]
    return Part(
        name=name, model=base.name, dtype=str(base.model.dtype), fingerprint=base.fingerprint,
        tokens=len(asked.renderer.example(first.prompts[0], first.target).ids),
        states={0: state}, peak=peak_memory(), complete=True, **more,
    )  # fmt: skip


def _own_texts(asked: Asked, seed: int) -> tuple[tuple[int, ...], ...]:
    """Texts that the model writes from nothing, sampled, with the token that they begin with."""
    begin = asked.renderer.begin
    generator = torch.Generator(asked.model.device).manual_seed(seed)
    rows = generation.generate(
        asked.model, [[begin]] * TEXTS, end=asked.renderer.stops, limit=TEXT_TOKENS,
        temperature=1.0, generator=generator,
    )  # fmt: skip
    return tuple((begin, *row) for row in rows if row)


def _pass_seconds(asked: Asked, some: Sequence[Record]) -> float:
    """The median time of a forward and backward pass over one example of three records."""
    model, times = asked.model, []
    rows = [asked.renderer.example(r.prompts[0], r.target) for r in some[:3]]
    model.requires_grad_(True)
    for row in [rows[0], *rows]:
        began = time.monotonic()
        torch.autograd.backward(model(**batch_of([row], model.device), use_cache=False).loss)
        times.append(time.monotonic() - began)
        model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return median(times[1:])  # the first one is slower


@dataclass
class _MethodRun:
    """One method in one way: edits, and everything asked at the marks."""

    options: FieldOptions
    material: Material
    one: Method
    name: str
    way: str
    keep: Callable[[Part], None]
    emit: Emit
    edits: list[Edit] = field(default_factory=list)
    states: dict[int, State] = field(default_factory=dict)
    peak: int = 0

    def run(self, kept: Part | None) -> None:
        """From the beginning; ``kept`` is what a run that was stopped left, for a method whose own
        files say where it was.
        """
        if kept is not None and self.one.resumes:
            self.edits, self.states = list(kept.edits), dict(kept.states)
        try:
            asked = self.one.start()
            if self.way == BATCH:
                self._together(asked)
            else:
                self._one_by_one(asked)
        finally:
            self.one.close()

    def _together(self, asked: Asked) -> None:
        self._say(0)
        records = self.material.records
        asked, _ = self._edit(asked, records, "all")
        self._ask(asked, len(records), last=True)
        self._write(complete=True)

    def _one_by_one(self, asked: Asked) -> None:
        records, began = self.material.records, time.monotonic()
        limit = self.options.minutes
        for at, record in enumerate(records[len(self.edits) :], len(self.edits)):
            self._say(at)
            asked, _ = self._edit(asked, [record], record.key)
            over = limit is not None and time.monotonic() - began > 60 * limit
            last = over or at + 1 == len(records)
            if last or (at + 1 in self.options.marks and at + 1 not in self.states):
                self._ask(asked, at + 1, last=last)
            self._write(complete=last)
            if last:
                return
        self._ask(asked, len(records), last=True)
        self._write(complete=True)

    def _edit(self, asked: Asked, records: Sequence[Record], key: str) -> tuple[Asked, bool]:
        began, processor = time.monotonic(), time.process_time()
        asked = self.one.edit(asked, records)
        spent = time.process_time() - processor
        seconds = time.monotonic() - began
        self.peak = peak_memory()
        right = len(records) == 1 and answered(asked, records[0])
        self.edits.append(Edit(key=key, seconds=seconds, processor_seconds=spent, right=right))
        return asked, right

    def _ask(self, asked: Asked, count: int, *, last: bool) -> None:
        self.emit(Status(phase=f"{self.name}: asking after {count} edits"))
        self.states[count] = ask(asked, self.material, count, self.emit, abilities=last)

    def _say(self, at: int) -> None:
        """Which record is next, and about how long it and those after it will take."""
        total = len(self.material.records)
        left = sum(edit.seconds for edit in self.edits) / max(1, at) * (total - at)
        text = f"about {left / 60:.0f} min left" if left >= 60 else ""
        self.emit(Status(phase=f"{self.name}: record {at + 1}", step=at, total=total, text=text))

    def _write(self, *, complete: bool) -> None:
        self.keep(
            Part(name=self.name, way=self.way, changes=self.one.changes,
                 settings=self.one.settings(), notes=self.one.notes(), edits=tuple(self.edits),
                 states=self.states, peak=self.peak, complete=complete)
        )  # fmt: skip


def answered(asked: Asked, record: Record) -> bool:
    """Whether all trained prompts of a record are answered rightly, freely."""
    said = asked.answers(record.prompts, answer_limit(asked, [record]))
    return all(normalised_exact(answer, record.target) for answer in said)


# ---- what it comes to


def _costs(
    options: FieldOptions, kinds: Mapping[str, type[Method]], material: Material, base: Part
) -> Iterator[Cost]:
    """For each method in each way that it has, at most."""
    from kvedit.model.prompts import Example

    example = Example(tuple(range(base.tokens)), base.tokens - 1)
    count, asking = len(material.records), base.states[0].seconds
    for name, kind in kinds.items():
        ways = [way for way in options.ways if way in kind.ways] or list(kind.ways[:1])
        passes = made(options, name, _empty(options)).passes(example)
        prompts = sum(len(record.prompts) for record in material.records)
        editing = None if passes is None else passes * prompts * base.pass_seconds
        for way in ways:
            marks = options.marks if way == SEQUENTIAL else (count,)
            yield Cost(method=name, way=way, editing=editing,
                       asking=sum(asking * mark / count for mark in marks))  # fmt: skip


def cost_lines(costs: Sequence[Cost]) -> list[str]:
    """What the methods are expected to take, a line each, and all together."""
    lines = []
    for one in costs:
        editing = "unknown until the first edit" if one.editing is None else _minutes(one.editing)
        lines.append(f"{one.method} ({one.way}): edits {editing}, asking {_minutes(one.asking)}")
    known = sum((one.editing or 0.0) + one.asking for one in costs)
    unknown = any(one.editing is None for one in costs)
    lines.append(f"all: {_minutes(known)}{' besides what is unknown' if unknown else ''}")
    return lines


def _minutes(seconds: float) -> str:
    return f"at most about {seconds / 60:.1f} min" if seconds else "none"


def _result(
    options: FieldOptions, material: Material, base: Part, costs: tuple[Cost, ...]
) -> FieldResult:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return FieldResult(
        model=base.model, fingerprint=base.fingerprint, data=options.data.name,
        data_digest=hashlib.sha256(options.data.read_bytes()).hexdigest(),
        records=len(material.records), known=len(material.known),
        abilities=len(material.abilities), marks=options.marks, definitions=VERSION,
        versions=versions, pass_seconds=base.pass_seconds, costs=costs,
        base=_point(material, base.states[0], base.states[0], len(material.records), ()),
    )  # fmt: skip


def _row(material: Material, base: Part, part: Part) -> Row:
    """A method's scores; ``base`` is the base model in the dtype that the method is asked in."""
    once = [edit.right for edit in part.edits] if part.way == SEQUENTIAL else []
    before = base.states[0]
    seconds = [edit.seconds for edit in part.edits]
    last = max(part.states)
    return Row(
        method=part.name, way=part.way, changes=part.changes, settings=part.settings,
        notes=part.notes, edits=part.edits, seconds=sum(seconds), peak=part.peak,
        processor_seconds=sum(edit.processor_seconds for edit in part.edits),
        median_seconds=median(seconds) if part.way == SEQUENTIAL else None,
        points=tuple(
            _point(material, state, before, after, once[:after])
            for after, state in sorted(part.states.items())
        ),
        asking_seconds=sum(state.seconds for state in part.states.values()),
        stopped=last < len(material.records),
    )  # fmt: skip


def _point(
    material: Material, state: State, base: State, after: int, once: Sequence[bool]
) -> Point:
    records = material.records[:after]
    return judge(
        records, questions(records), state, base, known=material.known, at_once=once,
        abilities=_changes(material, base, state),
    )  # fmt: skip


def _changes(material: Material, base: State, state: State) -> tuple[Change, ...]:
    """Of every task, and of all; nothing where the choices were not asked."""
    if not state.right:
        return ()
    names = quality_material.tasks_of(material.abilities)
    pairs = list(zip(material.abilities, base.right, state.right, strict=True))
    each = [change(name, [(b, a) for c, b, a in pairs if c.task == name]) for name in names]
    return (*each, change("all", [(b, a) for _, b, a in pairs]))
