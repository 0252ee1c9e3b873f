"""The ways of training that ``quality`` compares, each from the same base model.

Invariants:
- Every method trains at least the phrasings in ``Material.trained`` of every fact.
- What comes out is asked in the dtype that the base model is stored in; after LoRA, which stops at
  the first recall, in fp32: rounding alone would undo that recall.
- Peak memory is read when training has ended, before anything is asked.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kvedit.bench.memory import peak_memory
from kvedit.bench.speed import EditTime, add_timed
from kvedit.config import FILE_NAME, Config
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.events import EditReport, Event, Status
from kvedit.facts.fact import Fact
from kvedit.ingest.report import IngestOptions
from kvedit.ingest.run import ingest as run_ingest
from kvedit.model import loading, scoring
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.store.database import DB_NAME
from tests.bench.asking import AskedModel
from tests.bench.baseline import train_baseline
from tests.bench.lora import LoraEpoch, LoraSettings, train_lora
from tests.bench.quality_material import MaterialOptions, trained_prompts

Emit = Callable[[Event], None]
ADD, INGEST, LORA, LORA_MIXED, PLAIN = "add", "ingest", "lora", "lora-mixed", "plain"
IN_FP32 = (LORA, LORA_MIXED)
FP32 = "torch.float32"
METHODS = (ADD, INGEST, LORA, LORA_MIXED, PLAIN)
STORE = "store"
EDITS = "edits.jsonl"
LEARNED = ("committed", "learned", "unchanged")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(MaterialOptions):
    """The material, and how it is trained: ``time`` is the budget of ``init`` in seconds (None: its
    default), ``mixed_epochs`` are the most passes of LoRA over all facts.
    """

    model: str | None = None
    config: Path | None = None
    time: float | None = None
    mixed_epochs: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A model that was trained, and what that took: ``seconds`` of all facts, ``peak`` in bytes.

    ``learned`` says of each fact whether it counted as learned when it was trained; ``seen`` are
    prompts other than the facts' that training saw.
    """

    asked: AskedModel
    learned: tuple[bool, ...]
    outcomes: Mapping[str, int]
    seconds: float
    steps: int
    peak: int
    seen: tuple[str, ...] = ()
    edits: tuple[EditTime, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What making the store took."""

    seconds: float
    peak: int


def base_model(options: TrainOptions, *, in_fp32: bool = False) -> tuple[BaseModel, AskedModel]:
    """The base model, to be asked as the others are; ``in_fp32`` as it is for LoRA."""
    base = loading.load(loading.locate(options.model))
    prompts = Config.load(options.config).prompts if options.config else None
    renderer = Renderer(base.tokenizer, context=base.context, prompts=prompts, stops=base.stops)
    if not in_fp32:
        return base, AskedModel(base.model, renderer)
    base = replace(base, model=None)  # its memory is given back before the other is loaded
    gc.collect()
    base = replace(base, model=_in_fp32(options))
    return base, AskedModel(base.model, renderer)


def make_store(options: TrainOptions, folder: Path, emit: Emit) -> Start:
    """Make the store that ``add`` and ``ingest`` begin with, each with a copy of it."""
    folder.mkdir(parents=True, exist_ok=True)
    if options.config is not None:
        shutil.copy(options.config, folder / FILE_NAME)
    began = time.monotonic()
    more = {} if options.time is None else {"time": options.time}
    with KnowledgeBase.create(folder, options.model, on_event=emit, **more):
        return Start(seconds=time.monotonic() - began, peak=peak_memory())


@contextmanager
def train(
    method: str, options: TrainOptions, facts: Sequence[Fact], folder: Path, emit: Emit
) -> Iterator[Trained]:
    """Train the facts by one method; ``folder`` is that of all methods' stores."""
    if method in (ADD, INGEST):
        with opened(_copied_store(folder, method), emit) as store:
            way = _add if method == ADD else _ingest
            yield way(store, facts)
    elif method == PLAIN:
        yield _plain(options, facts, emit)
    else:
        yield _lora(options, facts, emit, mixed=method == LORA_MIXED)


@dataclass(slots=True)
class OpenStore:
    """A store with what its edits report."""

    knowledge: KnowledgeBase
    emit: Emit
    reports: list[EditReport] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Training steps of all edits so far, repairs included."""
        return sum(one.steps for one in self.reports)

    def ingest(self, facts: Sequence[Fact]) -> None:
        """All of them by the command's own run, the extraction of what must stay included."""
        options = IngestOptions(skip_invalid=True)
        run_ingest(self.knowledge, facts, options, self.emit).require_end()

    def outcome(self, facts: Sequence[Fact], **more: Any) -> Trained:
        """What the store says of the facts, once they are trained."""
        peak, engine = peak_memory(), self.knowledge.engine
        states = [_state(self.knowledge, fact) for fact in facts]
        rows = [
            row for role in ("control", "locality") for row in self.knowledge.store.protected(role)
        ]
        return Trained(
            asked=AskedModel(engine.base.model, engine.renderer),
            learned=tuple(state == "committed" for state in states), outcomes=Counter(states),
            peak=peak, seen=tuple(dict.fromkeys(row.prompt for row in rows)), **more,
        )  # fmt: skip


def _state(knowledge: KnowledgeBase, fact: Fact) -> str:
    row = knowledge.store.find(fact.key)
    return "failed" if row is None else row.state


def _copied_store(folder: Path, method: str) -> Path:
    """The store of a method: a copy of the common one, or what an earlier run left of it."""
    path = folder / method
    if not (path / DB_NAME).is_file():
        shutil.copytree(folder / STORE, path, dirs_exist_ok=True)
    return path


@contextmanager
def opened(path: Path, emit: Emit) -> Iterator[OpenStore]:
    """A store whose edits' reports are kept beside it."""
    reports: list[EditReport] = []

    def tell(event: Event) -> None:
        if isinstance(event, EditReport):
            reports.append(event)
        emit(event)

    with KnowledgeBase.open(path, on_event=tell) as knowledge:
        yield OpenStore(knowledge, emit, reports)


def _add(store: OpenStore, facts: Sequence[Fact]) -> Trained:
    """One by one; facts that an earlier run committed keep the seconds that it noted."""
    log = store.knowledge.store.path / EDITS
    noted = _noted(log)
    edits: list[EditTime] = []
    with log.open("a", encoding="utf-8") as stream:
        for at, fact in enumerate(facts):
            _say(store.emit, ADD, edits, at, facts)
            if fact.key in noted and _state(store.knowledge, fact) == "committed":
                edits.append(noted[fact.key])
                continue
            edits.append(add_timed(store.knowledge, fact))
            stream.write(json.dumps(asdict(edits[-1]), ensure_ascii=False) + "\n")
            stream.flush()
    return store.outcome(facts, **_sums(edits))


def _noted(log: Path) -> dict[str, EditTime]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else ()
    edits = (EditTime(**json.loads(line)) for line in lines)
    return {edit.key: edit for edit in edits}


def _say(
    emit: Emit, method: str, edits: Sequence[EditTime], at: int, facts: Sequence[Fact]
) -> None:
    """Which fact is next, and about how long it and those after it will take."""
    left = sum(one.seconds for one in edits) / max(1, at) * (len(facts) - at)
    text = f"about {left / 60:.0f} min left" if left >= 60 else ""
    phase = f"{method}: fact {at + 1} of {len(facts)}"
    emit(Status(phase=phase, step=at, total=len(facts), text=text))


def _sums(edits: Sequence[EditTime]) -> dict[str, Any]:
    return {
        "seconds": sum(edit.seconds for edit in edits), "steps": sum(edit.steps for edit in edits),
        "edits": tuple(edits),
    }  # fmt: skip


def _ingest(store: OpenStore, facts: Sequence[Fact]) -> Trained:
    began = time.monotonic()
    store.ingest(facts)
    return store.outcome(facts, seconds=time.monotonic() - began, steps=store.steps)


def examples_of(renderer: Renderer, fact: Fact) -> list[Example]:
    """A fact under the phrasings that every method trains on."""
    return renderer.examples((prompt, fact.description) for prompt in trained_prompts(fact))


def _plain(options: TrainOptions, facts: Sequence[Fact], emit: Emit) -> Trained:
    """Sequential AdaLoRA (``tests.bench.baseline``), in the dtype of the base model."""
    _, asked = base_model(options)
    edits: list[EditTime] = []
    for at, fact in enumerate(facts):
        _say(emit, PLAIN, edits, at, facts)
        examples = examples_of(asked.renderer, fact)
        done = train_baseline(asked.model, examples)
        outcome = _learned(asked.model, examples)
        edits.append(_edit(fact, outcome=outcome, seconds=done.seconds, steps=done.steps))
    return _of_edits(asked, edits, peak_memory())


def _lora(options: TrainOptions, facts: Sequence[Fact], emit: Emit, *, mixed: bool) -> Trained:
    """LoRA, in fp32 from the first step to the last answer."""
    _, asked = base_model(options, in_fp32=True)
    train_all = _mixed if mixed else _one_by_one
    edits, seconds, steps = train_all(asked.model, asked.renderer, facts, options, emit)
    done = _of_edits(asked, edits, peak_memory())
    return replace(done, seconds=seconds, steps=steps, edits=() if mixed else done.edits)


def _in_fp32(options: TrainOptions) -> Any:
    """The model as anybody would load it for training."""
    import torch
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    model = make.from_pretrained(loading.locate(options.model), dtype=torch.float32)
    return model.to(loading.device()).eval().requires_grad_(False)


_Run = tuple[list[EditTime], float, int]


def _one_by_one(
    model: Any, renderer: Renderer, facts: Sequence[Fact], options: TrainOptions, emit: Emit
) -> _Run:
    """One fact after the other, an adapter for each."""
    edits: list[EditTime] = []
    for at, fact in enumerate(facts):
        _say(emit, LORA, edits, at, facts)
        examples = examples_of(renderer, fact)
        done = train_lora(model, examples, LoraSettings(seed=options.seed))
        outcome = _learned(model, examples)
        edits.append(_edit(fact, outcome=outcome, seconds=done.seconds, steps=done.steps))
    return edits, sum(edit.seconds for edit in edits), sum(edit.steps for edit in edits)


def _mixed(
    model: Any, renderer: Renderer, facts: Sequence[Fact], options: TrainOptions, emit: Emit
) -> _Run:
    """All facts in one adapter, their phrasings mixed."""
    sets = [examples_of(renderer, fact) for fact in facts]
    began = time.monotonic()

    def tell(at: LoraEpoch) -> None:
        done = (at.epoch - 1) * at.batches + at.batch
        left = (time.monotonic() - began) / done * (options.mixed_epochs * at.batches - done)
        phase = f"{LORA_MIXED}: epoch {at.epoch} of at most {options.mixed_epochs}"
        text = f"at most {left / 60:.0f} min left"
        emit(Status(phase=phase, step=at.batch, total=at.batches, loss=at.loss,
                    recall=(at.recalled, at.n), text=text))  # fmt: skip

    settings = LoraSettings(max_epochs=options.mixed_epochs, seed=options.seed)
    done = train_lora(model, [e for own in sets for e in own], settings, tell)
    edits = [
        _edit(fact, outcome=_learned(model, own), seconds=done.seconds / len(facts), steps=0)
        for fact, own in zip(facts, sets, strict=True)
    ]
    return edits, done.seconds, done.steps


def _edit(fact: Fact, *, outcome: str, seconds: float, steps: int) -> EditTime:
    return EditTime(key=fact.key, outcome=outcome, seconds=seconds, steps=steps)


def _learned(model: Any, examples: Sequence[Example]) -> str:
    """Whether the merged model recalls all that it was trained on."""
    learned = all(outcome.passed for outcome in scoring.recall(model, examples))
    return "learned" if learned else "not learned"


def _of_edits(asked: AskedModel, edits: Sequence[EditTime], peak: int) -> Trained:
    return Trained(
        asked=asked, learned=tuple(edit.outcome in LEARNED for edit in edits),
        outcomes=Counter(edit.outcome for edit in edits), peak=peak, **_sums(edits),
    )  # fmt: skip
