"""What editing a model costs and keeps: any base, facts of one's own, several methods, one run.

Each part (the base model, the common store, each method) runs in a process of its own, so that its
peak memory is its own, and leaves a JSON file; what it means is computed from those.

Invariants:
- The base model is measured before all methods, and every method starts from it; once more in fp32
  where LoRA, which is asked so, would else be compared with another dtype.
- A general question counts only if no store protects it: of all methods the same ones count.
- A part is measured again unless it was kept and everything that decides it is the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvedit.bench.speed import EditTime
from kvedit.bench.tables import plain
from kvedit.errors import UsageError
from kvedit.events import Event, Status
from kvedit.files import write_atomic
from kvedit.model import loading
from kvedit.store.database import DB_NAME
from tests.bench import child, quality_material, quality_methods, quality_probes
from tests.bench.quality_material import Material
from tests.bench.quality_methods import (
    ADD,
    FP32,
    IN_FP32,
    INGEST,
    STORE,
    Start,
    TrainOptions,
)
from tests.bench.quality_probes import State
from tests.bench.quality_scores import MethodScores, scores

Emit = Callable[[Event], None]
BASE, BASE_FP32 = "base", "base-float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityOptions(TrainOptions):
    """What to train and ask, and by which methods; with ``store_dir`` stores and parts are kept
    there, and a store in its folder ``store`` is used; with ``resume`` parts that are there are not
    measured again.
    """

    methods: tuple[str, ...] = (ADD, INGEST, quality_methods.LORA)
    store_dir: Path | None = None
    resume: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one process measured; the base model has a state only, the store no state."""

    name: str
    model: str = ""
    dtype: str = ""
    learned: tuple[bool, ...] = ()
    outcomes: dict[str, int]
    seconds: float = 0.0
    steps: int = 0
    peak: int = 0
    seen: tuple[str, ...] = ()
    edits: tuple[EditTime, ...] = ()
    state: State = field(default_factory=State)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityResult:
    """All that was measured so far; ``store`` is what making it took, None if it was there."""

    model: str
    facts: int
    untaught: int
    questions: int
    base: MethodScores
    base_fp32: MethodScores | None = None
    store: Start | None = None
    methods: tuple[MethodScores, ...] = ()


Tell = Callable[[QualityResult, MethodScores | None], None]


def quality(
    options: QualityOptions, emit: Emit, tell: Tell = lambda result, point: None
) -> QualityResult:
    """Measure the base model, then each method; ``tell`` gets all so far after each of them."""
    material = quality_material.load(options)
    given = options.store_dir
    opened = nullcontext(given) if given else TemporaryDirectory(prefix="kvedit-quality-")
    with opened as folder:
        parts = _Parts(options, Path(folder), emit)
        start, bases = parts.start(), parts.bases()
        measured: list[Part] = []
        result = _result(material, bases, start, measured)
        for method in options.methods:
            measured.append(parts.get(method))
            result = _result(material, bases, start, measured)
            tell(result, result.methods[-1])
    return result


def _result(
    material: Material, bases: Sequence[Part], start: Start | None, measured: Sequence[Part]
) -> QualityResult:
    """All scores, from the parts so far; ``bases`` are the base model's, the last one in fp32."""
    seen = {prompt for part in measured for prompt in part.seen}
    counted = [at for at, prompt in enumerate(material.questions) if prompt not in seen]

    def score(part: Part) -> MethodScores:
        base = bases[-1] if part.name in (*IN_FP32, BASE_FP32) else bases[0]
        return scores(material, base.state, counted, part)

    own, *fp32 = map(score, bases)
    return QualityResult(
        model=bases[0].model, facts=len(material.facts), untaught=len(material.untaught),
        questions=len(counted), base=own, base_fp32=fp32[0] if fp32 else None, store=start,
        methods=tuple(map(score, measured)),
    )  # fmt: skip


class _Parts:
    """The parts of a run, each measured in a process of its own or read from its file."""

    def __init__(self, options: QualityOptions, folder: Path, emit: Emit) -> None:
        self._options, self._folder, self._emit = options, folder, emit
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Part:
        """One part; it is measured unless it is there."""
        path, digest = self._folder / f"{name}.json", digest_of(self._options, name)
        if not (self._options.resume and _digest_in(path) == digest):
            self._make_room(name, digest)
            self._emit(Status(phase=f"{name}: starting"))
            in_child(self._options, name, self._folder, path, digest, self._emit)
        return read_part(path)

    def bases(self) -> list[Part]:
        """The base model in its own dtype, and in fp32 where a method needs that and it differs."""
        own = self.get(BASE)
        both = own.dtype != FP32 and not set(IN_FP32).isdisjoint(self._options.methods)
        return [own, self.get(BASE_FP32)] if both else [own]

    def _make_room(self, name: str, digest: str) -> None:
        """Remove the store that another run left, unless this one goes on with it."""
        begun = self._folder / f"{name}.begun"
        same = begun.is_file() and begun.read_text(encoding="utf-8") == digest
        if not (self._options.resume and same):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        begun.write_text(digest, encoding="utf-8")

    def start(self) -> Start | None:
        """Make the store if a method needs one and it is not there.

        Raises UsageError for one that was made with other settings.
        """
        if not {ADD, INGEST} & set(self._options.methods):
            return None
        path = self._folder / f"{STORE}.json"
        if not (self._folder / STORE / DB_NAME).is_file():
            self.get(STORE)
        elif path.is_file() and _digest_in(path) != digest_of(self._options, STORE):
            raise UsageError(
                f"the store in {self._folder} was made for another model, or in another way",
                hint="Give a new --store-dir.",
            )
        part = read_part(path) if path.is_file() else None
        return None if part is None else Start(seconds=part.seconds, peak=part.peak)


def digest_of(options: QualityOptions, name: str) -> str:
    """SHA-256 of what decides a part: the options, the texts of all files, the model's place."""
    config = options.config.read_text(encoding="utf-8") if options.config else ""
    whole: tuple[Any, ...] = (name, config, loading.locate(options.model))
    shown = replace(options, methods=(), store_dir=None, resume=False)
    if name == STORE:
        whole = (*whole, options.time)
    elif name in (BASE, BASE_FP32):  # whatever the methods are told
        whole = (*whole, replace(shown, time=None, mixed_epochs=0), quality_material.load(options))
    else:
        whole = (*whole, shown, quality_material.load(options))
    return hashlib.sha256(repr(whole).encode()).hexdigest()


def _digest_in(path: Path) -> str | None:
    if not path.is_file():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document.get("digest")


def write_part(path: Path, part: Part, digest: str) -> None:
    """Write a part whole or not at all."""
    document = {"digest": digest, **plain(part)}
    write_atomic(path, json.dumps(document, ensure_ascii=False).encode())


def read_part(path: Path) -> Part:
    """A part that was written."""
    document = json.loads(path.read_text(encoding="utf-8"))
    document["edits"] = tuple(EditTime(**edit) for edit in document["edits"])
    document["state"] = State.from_json(document["state"])
    values = {item.name: document[item.name] for item in fields(Part) if item.name in document}
    return Part(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def measure_part(options: QualityOptions, name: str, folder: Path, emit: Emit) -> Part:
    """One part, in this process."""
    material = quality_material.load(options)
    if name == STORE:
        start = quality_methods.make_store(options, folder / STORE, emit)
        return Part(name=name, outcomes={}, seconds=start.seconds, peak=start.peak)
    measure = partial(
        quality_probes.measure, material=material, emit=_prefixed(name, emit),
        text_tokens=options.text_tokens,
    )  # fmt: skip
    if name in (BASE, BASE_FP32):
        base, asked = quality_methods.base_model(options, in_fp32=name == BASE_FP32)
        state, dtype = measure(asked, facts=False), str(base.dtype)
        return Part(name=name, model=base.name, dtype=dtype, outcomes={}, state=state)
    with quality_methods.train(name, options, material.facts, folder, emit) as trained:
        return Part(
            name=name, learned=trained.learned, outcomes=dict(trained.outcomes),
            seconds=trained.seconds, steps=trained.steps, peak=trained.peak, seen=trained.seen,
            edits=trained.edits, state=measure(trained.asked),
        )  # fmt: skip


def _prefixed(name: str, emit: Emit) -> Emit:
    """Status events say which part is being asked."""

    def tell(event: Event) -> None:
        emit(replace(event, phase=f"{name}: {event.phase}") if isinstance(event, Status) else event)

    return tell


def in_child(
    options: QualityOptions, name: str, folder: Path, path: Path, digest: str, emit: Emit
) -> None:
    """Measure a part in a process of its own, and write it; raises KveditError if that fails."""
    child.run(name, _write_measured, (options, name, folder, path, digest), emit)


def _write_measured(
    options: QualityOptions, name: str, folder: Path, path: Path, digest: str, emit: Emit
) -> None:
    write_part(path, measure_part(options, name, folder, emit), digest)
