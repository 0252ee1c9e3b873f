"""A model that can be taught: the fp32 master, the adapter, the curvature, and probes of it.

The store is not known here: an engine turns lessons into deltas and answers questions; what is
committed, and when, is for the editor to say.

Invariants:
- Outside ``train`` the adapter is off: what is probed is what is served, merged and cast.
- ``train`` changes no weights; ``master.add`` does, and ``master.restore`` undoes it to the bit.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from kvedit import __version__
from kvedit.adapter import fisher as fisher
from kvedit.adapter.adalora import Adapter, group_rank
from kvedit.adapter.deltas import Factors, Master
from kvedit.adapter.fisher import FisherMoments, WhiteningFactors
from kvedit.config import GroupConfig, PromptsConfig, TrainingConfig
from kvedit.facts.fact import Fact
from kvedit.model import devices, generation, quantization
from kvedit.model.loading import BaseModel, checkpointed, quick_attention, target_names
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example, Renderer, paraphrase_prompts, training_prompts
from kvedit.model.scoring import Outcome
from kvedit.replay.kl import ReferenceTexts
from kvedit.training import memory
from kvedit.training.group import (
    LEAST_REHEARSED,
    MOST_WEIGHT,
    GroupLoop,
    group_batch,
    reference_batch,
)
from kvedit.training.loop import LoopResult, OnStep, Task, train
from kvedit.training.resume import Keep, State, TrainingCheckpoints
from kvedit.training.share import Share

PRIOR_TOKENS = 96
"""How much is kept of what the model answered before a fact came."""
SPOKEN_FOR = 20
"""So many earlier facts one fact's lesson can speak for, though it rehearses a few of them."""
START_FACTS = 64
"""From the gradient of at most so many facts an adapter starts."""
RENDERED = 8192


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A lesson's result: the delta that would be merged, how the training went, and its seconds;
    ``resumed_seconds`` were spent by processes that ended in it.
    """

    delta: dict[str, Factors]
    trained: LoopResult
    seconds: float
    resumed_seconds: float = 0.0

    @property
    def ranks(self) -> dict[str, int]:
        """The rank that AdaLoRA's allocator left each matrix."""
        return {name: factors.rank for name, factors in self.delta.items()}


class Engine:
    """A base model made editable.

    ``phrasings`` is a folder that overrides the shipped ones; ``targets`` names the layers that
    edits touch (see ``models.target_names``).
    """

    def __init__(
        self,
        base: BaseModel,
        config: TrainingConfig,
        *,
        phrasings: Path | None = None,
        targets: Sequence[str] = (),
        prompts: PromptsConfig | None = None,
    ) -> None:
        self.base = base
        self.config = config
        self._phrasings = phrasings
        self.renderer = Renderer(
            base.tokenizer, context=base.context, prompts=prompts, stops=base.stops
        )
        self.names = target_names(base.model, targets)
        devices.require_present(base.model, self.names)
        quantization.unpack(base.model, self.names)
        self._sizes = memory.sizes(base.model, targets)
        self.master = self._make_master()  # before wrapping: it holds the plain weights
        self.share = Share()
        self.prefix_cache = PrefixCache(base.model, self.names)
        self._adapter: Adapter | None = None
        self._rendered: dict[tuple[Fact, bool], list[Example]] = {}
        self.reference_texts: ReferenceTexts | None = None
        self._fisher: FisherMoments | None = None
        self._base_fisher: FisherMoments | None = None
        self._whitening: dict[str, WhiteningFactors] | None = None

    def _make_master(self) -> Master:
        return Master(self.base.model, self.names)

    @property
    def adapter(self) -> Adapter:
        """The adapter for a single fact."""
        return self._adapter_for(1)

    def _adapter_for(self, facts: int, group: GroupConfig | None = None) -> Adapter:
        """An adapter with room for so many facts, made at first need: PEFT takes long to import.

        A group's ranks grow with the root of its size; modules are wrapped anew for other ranks.
        """
        init, target = self.config.init_rank, self.config.target_rank
        if group is not None:
            side = min(min(matrix.shape) for matrix in self.master.matrices.values())
            init = min(side, group_rank(group.rank, facts))
            target = max(1, init * 3 // 4)
        if self._adapter is not None and self._adapter.ranks != (init, target):
            self._adapter.unwrap()
            self._adapter = None
        if self._adapter is None:
            self._adapter = Adapter(self.base.model, self.names, init_rank=init, target_rank=target)
        return self._adapter

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around long work with the base model that no other process shares."""
        yield

    def release(self) -> None:
        """Give back the memory of all that is made again at need, after it ran out."""
        if self._adapter is not None:
            self._adapter.unwrap()
            self._adapter = None
        self.prefix_cache.forget()
        memory.give_back()

    def needed(self, group: GroupConfig, facts: int, length: int) -> int:
        """Bytes that a lesson of so many facts takes, in texts of so many tokens; an estimate."""
        return self.estimate(group_load(group, facts, length)).for_training

    def estimate(self, load: memory.Load) -> memory.Estimate:
        """What editing this model takes with so much taught at once."""
        return self._sizes.estimate(self.config, load)

    def measure_reference(self, examples: Sequence[Example]) -> None:
        """Keep what the model says to protected text; the weights must be the base's."""
        self.reference_texts = ReferenceTexts.measure(self.base.model, examples, self.prefix_cache)

    @property
    def fisher(self) -> tuple[FisherMoments, FisherMoments] | None:
        """What is protected: of the base model's text, and of the committed facts besides."""
        if self._base_fisher is None or self._fisher is None:
            return None
        return self._base_fisher, self._fisher

    @fisher.setter
    def fisher(self, value: tuple[FisherMoments, FisherMoments]) -> None:
        self._hold(*value)

    def _hold(self, base: FisherMoments, total: FisherMoments) -> None:
        devices = {name: weight.device for name, weight in self.master.served().items()}
        self._base_fisher = base.placed(devices)  # what was kept on the disk is on the CPU
        self._fisher = self._base_fisher if total is base else total.placed(devices)
        self._whitening = None

    def protect(self, examples: Sequence[Example]) -> None:
        """Measure text that must stay, on the weights as they are."""
        measured = fisher.measure(self.base.model, self.names, examples)
        self._hold(measured, measured)

    def remember(self, examples: Sequence[Example], weight: float | None = None) -> None:
        """Protect committed facts as well; ``weight`` says how often a token counts."""
        if self.fisher is None:
            raise RuntimeError("protect comes before remember")
        base, total = self.fisher
        more = fisher.measure(self.base.model, self.names, examples)
        weight = self.config.fact_weight if weight is None else weight
        self._hold(base, total.plus(more, weight))

    def measure_at_head(
        self, protected: Sequence[Example], facts: Sequence[Example], weight: float
    ) -> None:
        """Measure all that must stay anew on the weights as they are; how far earlier edits moved
        the base's text is still counted as it was measured there.
        """
        if self._base_fisher is None:
            raise RuntimeError("protect comes before measure_at_head")
        here = fisher.measure(self.base.model, self.names, protected)
        taught = fisher.measure(self.base.model, self.names, facts)
        self._hold(self._base_fisher, here.plus(taught, weight))

    def measure_margins(self, known: Sequence[Example]) -> None:
        """Until the curvature is set again: what must stay is how far these texts' answers lead, on
        the weights as they are.
        """
        if self._base_fisher is None:
            raise RuntimeError("protect comes before measure_margins")
        found = fisher.measure(self.base.model, self.names, known, of=fisher.margins)
        self._hold(self._base_fisher, found.scaled_like(self._base_fisher))

    @property
    def whitening(self) -> dict[str, WhiteningFactors]:
        """The coordinates that the curvature gives; kept until it changes."""
        if self._fisher is None:
            raise RuntimeError("protect comes before teach")
        if self._whitening is None:
            self._whitening = fisher.whitening(
                self._fisher,
                input_damping=self.config.input_damping,
                gradient_damping=self.config.gradient_damping,
            )
        return self._whitening

    def examples(self, fact: Fact) -> list[Example]:
        """A fact under each of its training prompts."""
        return self._render(fact, trained=True)

    def paraphrases(self, fact: Fact) -> list[Example]:
        """A fact under the prompts that no edit trains on."""
        return self._render(fact, trained=False)

    def _render(self, fact: Fact, *, trained: bool) -> list[Example]:
        """Kept: earlier facts are asked after every edit, and rendering takes as long as asking."""
        found = self._rendered.get((fact, trained))
        if found is None:
            prompts = (training_prompts if trained else paraphrase_prompts)(fact, self._phrasings)
            found = self.renderer.examples((prompt, fact.description) for prompt in prompts)
            if len(self._rendered) >= RENDERED:
                self._rendered.clear()
            self._rendered[fact, trained] = found
        return list(found)

    def prior_answers(self, fact: Fact) -> dict[str, str]:
        """What the model answers now to a fact's training prompts, cut at ``PRIOR_TOKENS``."""
        prompts = training_prompts(fact, self._phrasings)
        return dict(zip(prompts, self.generate(prompts, limit=PRIOR_TOKENS), strict=True))

    def prior_example(self, prompt: str, answer: str) -> Example:
        """An earlier answer to train back to; one that was cut does not end there."""
        whole = len(self.renderer.tokens(answer)) < PRIOR_TOKENS
        return self.renderer.example(prompt, answer, ended=whole)

    def train(
        self,
        task: Task,
        config: TrainingConfig | None = None,
        on_step: OnStep = lambda step: None,
        group: GroupConfig | None = None,
        training_checkpoints: TrainingCheckpoints | None = None,
    ) -> TrainingResult:
        """Train the adapter on a lesson; the weights stay as they are.

        ``config`` may change how the loop runs, not the ranks, which are the adapter's own.  With
        ``group`` the facts are taught breadth first, and the adapter has room for all of them; with
        ``training_checkpoints`` besides, a lesson that a process ended in goes on from where it stood.
        """
        config = config or self.config
        if group is None or training_checkpoints is None:
            return self.run_task(task, config, on_step, group)
        name = self._name_of(task, config, group)
        keep = partial(training_checkpoints.keep, name)
        return self.run_task(
            task, config, on_step, group, begun=training_checkpoints.find(name), keep=keep
        )

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
        """``train``, from where a group's lesson stood before if it was ``begun``."""
        began = time.monotonic()
        before = float(begun["seconds"]) if begun is not None else 0.0

        def timed(state: Callable[[], State]) -> Callable[[], State]:
            return lambda: {**state(), "seconds": before + time.monotonic() - began}

        rng = random.Random(config.seed)
        start = self._steepest(task, rng)
        adapter = self._adapter_for(len(task.new), group)
        adapter.turn(on=False)
        steep = fisher.gradients(self.base.model, self.names, start)
        penalty_gradient = self._penalty_gradient(_moved_back(task, group))
        adapter.reset(
            self.whitening,
            steep,
            penalty_gradient,
            self._weights(),
            frozen_factor=group is not None,
        )
        del steep, penalty_gradient  # as large as what is edited
        self.share.align(adapter)
        adapter.turn(on=True)
        given = (
            self.base.model,
            adapter,
            task,
            config,
            rng,
            on_step,
            self.prefix_cache,
            self.share,
        )
        try:
            on = config.gradient_checkpointing
            with checkpointed(self.base.model, on=on), quick_attention(self.base.model):
                if group is None:
                    trained = train(*given)
                else:
                    loop = GroupLoop(group, *given, keep=lambda state: keep(timed(state)))
                    if begun is not None:
                        loop.resume(begun)
                    trained = loop.run()
            delta = adapter.factors()
        finally:
            adapter.turn(on=False)
        return TrainingResult(delta, trained, time.monotonic() - began, before)

    def _name_of(self, task: Task, config: TrainingConfig, group: GroupConfig) -> str:
        """A digest of all that decides how a group's lesson goes, but what was measured."""
        reference_texts = task.reference_texts.examples if task.reference_texts is not None else ()
        texts = ([e.ids for own in part for e in own] for part in (task.new, task.rehearsal))
        given = (
            __version__, self.base.fingerprint, self.master.digest(), config, group, task.earlier,
            *texts, [e.ids for e in reference_texts],
        )  # fmt: skip
        return hashlib.sha256(repr(given).encode()).hexdigest()

    def _steepest(self, task: Task, rng: random.Random) -> list[Example]:
        """The examples whose gradient the adapter starts from: a prompt or two of each fact."""
        facts = rng.sample(list(task.new), min(START_FACTS, len(task.new)))
        each = 2 if len(facts) <= START_FACTS // 4 else 1
        return [e for fact in facts for e in rng.sample(list(fact), min(each, len(fact)))]

    def _weights(self) -> dict[str, Tensor]:
        """The touched matrices where the model is; on a GPU as served, to save its memory."""
        return {
            name: self.master.matrices[name] if weight.device.type == "cpu" else weight
            for name, weight in self.master.served().items()
        }

    def _penalty_gradient(self, share: float) -> dict[str, Tensor]:
        """A share of the slope of protected text's price, after all that earlier edits moved."""
        moved = self.master.accumulated_delta()
        if self._base_fisher is None:
            raise RuntimeError("protect comes before teach")
        penalty_gradients = fisher.penalty_gradients(self._base_fisher, moved)
        return {name: share * slope for name, slope in penalty_gradients.items()}

    def recall(self, examples: Sequence[Example]) -> list[Outcome]:
        """Exact recall of each example, teacher-forced."""
        return self.share.recall(self.base.model, examples, self.prefix_cache)

    def judge(self, examples: Sequence[Example]) -> list[Outcome]:
        """Exact recall of each example; what hangs on a near-tie is judge by free generation."""
        outcomes = self.recall(examples)
        near = [at for at, outcome in enumerate(outcomes) if outcome.ambiguous]
        said = self.generated_recall([examples[at] for at in near])
        for at, passed in zip(near, said, strict=True):
            outcomes[at] = replace(outcomes[at], passed=passed, generated=True)
        return outcomes

    def generate(self, prompts: Iterable[str], *, limit: int) -> list[str]:
        """Greedy answers, freely generated."""
        prefixes = [self.renderer.prefix(prompt) for prompt in prompts]
        return self.complete(prefixes, limit=limit)

    def complete(self, prefixes: Sequence[Sequence[int]], *, limit: int) -> list[str]:
        """Greedy continuations of token prefixes, as text."""
        rows = self.proceed(prefixes, end=self.renderer.stops, limit=limit)
        return [self.renderer.answer_text(row) for row in rows]

    def proceed(
        self, prefixes: Sequence[Sequence[int]], *, end: int | frozenset[int], limit: int
    ) -> list[list[int]]:
        """Greedy continuations of token prefixes, as tokens, up to the end token (left out)."""
        return self.share.generate(self.base.model, prefixes, end=end, limit=limit)

    def generated_recall(self, examples: Sequence[Example]) -> list[bool]:
        """Exact recall by real greedy generation, tokens and end compared."""
        return generation.generated_recall_of(examples, self.renderer.end, self.proceed)

    def answers(self, examples: Sequence[Example]) -> tuple[list[bool], list[str]]:
        """The same, and what was said to each, as text."""
        rows = generation.generated(examples, self.renderer.end, self.proceed)
        exact = generation.recalled(examples, rows, self.renderer.end)
        return exact, [self.renderer.answer_text(row) for row in rows]


def group_load(
    group: GroupConfig,
    facts: int,
    length: int = memory.TEXT_TOKENS,
    earlier: int | None = None,
) -> memory.Load:
    """What a step holds that teaches so many facts together, beside so many ``earlier`` ones; where
    that is not said, beside enough of them.
    """
    batch = group_batch(group, facts)
    rehearsed = max(LEAST_REHEARSED, math.ceil(batch * group.rehearsal_ratio))
    return memory.Load(
        texts=batch + (rehearsed if earlier is None else min(rehearsed, earlier)),
        rank=group_rank(group.rank, facts),
        reference_texts=reference_batch(group, facts),
        length=length,
    )


def _moved_back(task: Task, group: GroupConfig | None) -> float:
    """How much of what earlier edits moved a lesson may be asked to move back: 0 to 1.

    The price would have all of it back, and only the rehearsal speaks for the facts it was moved
    for.  Where that counts them for fewer than they are, so must the price: a repair of six facts
    otherwise takes apart what hundreds need.
    """
    earlier = max(task.earlier, len(task.rehearsal))
    spoken_for = MOST_WEIGHT * len(task.new) if group is not None else SPOKEN_FOR
    return min(1.0, spoken_for / earlier) if earlier else 1.0
