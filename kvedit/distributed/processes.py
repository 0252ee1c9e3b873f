"""An engine in several processes: one that leads, with the store, and replicas that follow.

Each process holds the whole model, or of the blocks below the edited ones a piece (``shards``).
What changes an engine's state (weights, protected text) is done in all of them; what takes long
(training, recall, generating) is dealt out (see ``share``).

Invariants:
- Process 0 alone knows of a store.  The others hold nothing that would be missed: when the group
  breaks, the journal says what was committed, as ever.
- Replicas have the leader's weights to the bit: they get its deltas, and a digest that is written
  to the journal was computed, and found equal, in every process.
- When others are gone, the leader can still put its own weights back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvedit.adapter import deltas
from kvedit.adapter.deltas import Delta, Master
from kvedit.adapter.fisher import FisherMoments
from kvedit.config import GroupConfig, PromptsConfig, TrainingConfig
from kvedit.distributed.crew import Call, Crew
from kvedit.distributed.shards import Shards
from kvedit.distributed.share import Together
from kvedit.errors import ModelMismatchError
from kvedit.model import generation, loading, scoring
from kvedit.model.loading import BaseModel, LoadOptions, load
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.training.engine import Engine, TrainingResult
from kvedit.training.loop import OnStep, Task
from kvedit.training.resume import Keep, State

log = logging.getLogger(__name__)

TEXTS_A_CALL = 256
"""So many texts for each process at a time: Ctrl-C waits for the end of a call's work."""
_KEPT, _BASE = "kept", "base"
_T = TypeVar("_T")


class LedEngine(Engine):
    """The engine of process 0: what it is asked to do, the replicas do too."""

    def __init__(
        self,
        crew: Crew,
        base: BaseModel,
        config: TrainingConfig,
        *,
        targets: Sequence[str] = (),
        shard: bool = False,
        **more: Any,
    ) -> None:
        """As for ``Engine``; the replicas load the same model now.  With ``shard`` none of them
        keeps the lower blocks whole.  Raises ModelMismatchError if what they find under the model's
        name is another one.
        """
        self._crew = crew
        source = (base.path, base.fingerprint, base.loading)
        crew.lead(Call("load", (source, config, tuple(targets), shard), patient=True), lambda: None)
        self.shards = _shards(crew, base, targets) if shard else None
        super().__init__(base, config, targets=targets, **more)
        self.share = Together(crew)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The others only wait: their threads on this machine are to spare."""
        threads = torch.get_num_threads()
        torch.set_num_threads(threads * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _make_master(self) -> Master:
        return LedMaster(self._crew, self.base.model, self.names)

    def run_task(
        self,
        task: Task,
        config: TrainingConfig,
        on_step: OnStep = lambda step: None,
        group: GroupConfig | None = None,
        *,
        begun: State | None = None,
        keep: Keep = lambda state: None,
    ) -> TrainingResult:
        """Each step's texts are dealt out, its gradients summed; bookmarks are kept here."""
        own = partial(super().run_task, task, config, on_step, group, begun=begun, keep=keep)
        # Each process has measured the anchors itself: they are large, and stay where they are.
        # Which of them a lesson has must be the same everywhere, for what is drawn to be the same.
        places = None if task.reference_texts is None else task.reference_texts.places
        sent = (replace(task, reference_texts=None), places, config, group, begun)
        return self._crew.lead(Call("run_task", sent), own)

    def recall(self, examples: Sequence[Example]) -> list[Outcome]:
        """Dealt out, unless there are too few to be worth a message."""
        own = super().recall
        found: list[Outcome] = []
        for some in self._slices(examples):
            if len(some) < 2 * self._crew.count:
                found += scoring.recall(self.base.model, some, self.prefix_cache)
            else:
                found += self._lead("recall", own, some)
        return found

    def proceed(
        self, prefixes: Sequence[Sequence[int]], *, end: int | frozenset[int], limit: int
    ) -> list[list[int]]:
        """Dealt out, as ``recall``."""
        own = super().proceed
        found: list[list[int]] = []
        for some in self._slices(prefixes):
            if len(some) < self._crew.count:
                found += generation.generate(self.base.model, some, end=end, limit=limit)
                continue
            call = Call("proceed", ([tuple(prefix) for prefix in some], end, limit))
            found += self._crew.lead(call, partial(own, some, end=end, limit=limit))
        return found

    def _slices(self, items: Sequence[_T]) -> Iterator[Sequence[_T]]:
        step = TEXTS_A_CALL * self._crew.count
        return (items[at : at + step] for at in range(0, len(items), step))

    def measure_reference(self, examples: Sequence[Example]) -> None:
        """Each replica asks its own model."""
        self._lead("anchor", super().measure_reference, examples)

    def protect(self, examples: Sequence[Example]) -> None:
        """Measured in each process, which takes no longer than in one."""
        self._lead("protect", super().protect, examples)

    def remember(self, examples: Sequence[Example], weight: float | None = None) -> None:
        """As ``protect``."""
        self._lead("remember", super().remember, examples, weight)

    def measure_at_head(
        self, protected: Sequence[Example], facts: Sequence[Example], weight: float
    ) -> None:
        """As ``protect``."""
        self._lead("measure_at_head", super().measure_at_head, protected, facts, weight)

    def measure_margins(self, known: Sequence[Example]) -> None:
        """As ``protect``."""
        self._lead("measure_margins", super().measure_margins, known)

    def _lead(self, name: str, own: Callable[..., _T], *args: Any) -> _T:
        return self._crew.lead(Call(name, args), lambda: own(*args))

    @property
    def fisher(self) -> tuple[FisherMoments, FisherMoments] | None:
        """As for ``Engine``."""
        return super().fisher

    @fisher.setter
    def fisher(self, value: tuple[FisherMoments, FisherMoments]) -> None:
        self._crew.lead(Call("hold", value), lambda: self._hold(*value))


class LedMaster(Master):
    """Process 0's weights: what becomes of them becomes of the replicas' too."""

    def __init__(self, crew: Crew, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__(model, names)
        self._crew = crew
        self._kept: Mapping[str, Tensor] | None = None

    def snapshot(self) -> dict[str, Tensor]:
        """The replicas keep one too, the latest."""
        self._crew.mirror(Call("snapshot"), lambda: None)
        self._kept = super().snapshot()
        return dict(self._kept)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Sent whole only if the replicas do not have it."""
        own, sent = super().restore, dict(state)
        which: Any = sent
        if _same(sent, self._base):
            which = _BASE
        elif self._kept is not None and _same(sent, self._kept):
            which = _KEPT
        self._crew.mirror(Call("restore", (which,)), lambda: own(sent))

    def add(self, delta: Delta) -> None:
        """The replicas add the same."""
        own = super().add
        self._crew.mirror(Call("add", (deltas.to_bytes(delta),)), lambda: own(delta))

    def read_checkpoint(self, folder: Any, digest: str) -> None:
        """Read here, where the store is, and sent."""
        super().read_checkpoint(folder, digest)
        self._crew.mirror(Call("restore", (dict(self._master),)), lambda: None)

    def digest(self) -> str:
        """Raises ProcessesDifferError when the processes do not have the same weights."""
        own = super().digest
        if self._crew.lost:
            return own()
        return self._crew.lead(Call("digest"), lambda: _agreed(self._crew, own()))


def _shards(crew: Crew, base: BaseModel, targets: Sequence[str]) -> Shards:
    """Let this process keep but a piece of the lower blocks.

    What was loaded into memory (the device map ``cpu``) then goes to this process's device: a model
    that no card holds whole is never on one.
    """
    blocks = PrefixCache(base.model, targets.target_names(base.model, targets)).below
    made = Shards(crew, base.model, blocks)
    if base.loading.device_map == "cpu":
        made.to(loading.device())
        base.model.to(loading.device())
    log.info(
        "process %d of %d keeps its piece of the %d lower blocks, %.1f MiB",
        crew.rank, crew.count, len(blocks), made.bytes / 2**20,
    )  # fmt: skip
    return made


def _same(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states are the very same tensors, which are never changed in place."""
    return state.keys() == other.keys() and all(state[n] is other[n] for n in state)


def _agreed(crew: Crew, digest: str) -> str:
    """The digest of the weights, which is that of all processes."""
    crew.require_alike(
        digest,
        "the processes do not have the same weights",
        hint="Run them on devices of one kind with the same library versions, or in one process.",
    )
    return digest


class Replica:
    """The engine of another process; its methods are the calls of ``LedEngine``."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._made: Engine | None = None
        self._kept: Mapping[str, Tensor] = {}

    def carry_out(self, call: Call) -> None:
        """One call of process 0."""
        getattr(self, call.name)(*call.args)

    @property
    def _engine(self) -> Engine:
        if self._made is None:
            raise RuntimeError("load comes first")
        return self._made

    def load(
        self,
        source: tuple[str, str, LoadOptions],
        config: TrainingConfig,
        targets: Sequence[str],
        shard: bool,
    ) -> None:
        """The leader's model.  Texts come as tokens, so its prompts need not be known."""
        path, fingerprint, loading = source
        base = load(path, **asdict(loading))
        if base.fingerprint != fingerprint:
            raise ModelMismatchError(
                f"process {self._crew.rank} finds another model at {path} than process 0",
                hint="Every machine needs the same files under that name.",
            )
        if shard:
            _shards(self._crew, base, targets)
        self._made = Engine(base, config, targets=targets, prompts=PromptsConfig())
        self._made.share = Together(self._crew)

    def lend(self) -> None:
        """Nothing but to wait for the end of the call: whoever waits lends its pieces."""

    def run_task(
        self,
        task: Task,
        places: Sequence[int] | None,
        config: TrainingConfig,
        group: GroupConfig | None,
        begun: State | None,
    ) -> None:
        """The delta comes with ``add``, if it is used; ``places`` are the leader's anchors."""
        if self._engine.reference_texts is not None and places is not None:
            task = replace(task, reference_texts=self._engine.reference_texts.at(places))
        self._engine.run_task(task, config, group=group, begun=begun)

    def recall(self, examples: Sequence[Example]) -> None:
        """What was found is exchanged within."""
        self._engine.recall(examples)

    def proceed(
        self, prefixes: Sequence[Sequence[int]], end: int | frozenset[int], limit: int
    ) -> None:
        """What was found is exchanged within."""
        self._engine.proceed(prefixes, end=end, limit=limit)

    def measure_reference(self, examples: Sequence[Example]) -> None:
        """On the weights as they are."""
        self._engine.measure_reference(examples)

    def protect(self, examples: Sequence[Example]) -> None:
        """On the weights as they are."""
        self._engine.protect(examples)

    def remember(self, examples: Sequence[Example], weight: float | None) -> None:
        """On the weights as they are."""
        self._engine.remember(examples, weight)

    def measure_at_head(
        self, protected: Sequence[Example], facts: Sequence[Example], weight: float
    ) -> None:
        """On the weights as they are."""
        self._engine.measure_at_head(protected, facts, weight)

    def measure_margins(self, known: Sequence[Example]) -> None:
        """On the weights as they are."""
        self._engine.measure_margins(known)

    def hold(self, base: FisherMoments, total: FisherMoments) -> None:
        """What the leader has read from its store."""
        self._engine.fisher = base, total

    def snapshot(self) -> None:
        """Keep the weights as they are, for ``restore``."""
        self._kept = self._engine.master.snapshot()

    def restore(self, which: str | Mapping[str, Tensor]) -> None:
        """The kept state, the base's, or one that is sent."""
        if which == _BASE:
            self._engine.master.reset()
        else:
            self._engine.master.restore(self._kept if isinstance(which, str) else which)

    def add(self, delta: bytes) -> None:
        """A delta as the leader would write it to its store."""
        self._engine.master.add(deltas.from_bytes(delta))

    def digest(self) -> None:
        """Compared with the leader's."""
        _agreed(self._crew, self._engine.master.digest())


def follow(crew: Crew) -> None:
    """In a process other than 0: do what it says until it ends.  Raises ProcessLostError."""
    crew.follow(Replica(crew).carry_out)
