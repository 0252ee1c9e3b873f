"""A model that can be trained: the fp32 master, the adapter, the Fisher moments, and probes of it.

The store is not known here: an engine turns tasks into deltas and answers questions; what is
committed, and when, is decided in ``kvedit.editing``.

Invariants:
- Outside ``train`` the adapter is off: what is probed is what is served, merged and cast.
- ``train`` changes no weights; ``master.add`` does, and ``master.restore`` undoes it to the bit.
"""

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from accelerate.utils.memory import release_memory

from kvedit import __version__
from kvedit.adapter.adalora import Adapter, group_rank
from kvedit.adapter.deltas import Factors, Master
from kvedit.adapter.start import steepest
from kvedit.config import GroupConfig, PromptsConfig, TrainingConfig
from kvedit.facts.fact import Fact
from kvedit.model import devices, generation, quantization
from kvedit.model.forward import checkpointed, quick_attention
from kvedit.model.loading import BaseModel
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import Outcome
from kvedit.model.targets import target_names
from kvedit.replay import general_texts
from kvedit.replay.kl import ReferenceTexts, Teacher
from kvedit.training import memory
from kvedit.training.examples.of_facts import PRIOR_TOKENS, FactExamples
from kvedit.training.examples.start import accumulated_share, start_examples
from kvedit.training.loops.group import GroupLoop, group_load
from kvedit.training.loops.loop import LoopResult, OnStep, Setup, Task
from kvedit.training.loops.single import SingleLoop
from kvedit.training.loops.turns import TurnsLoop, for_facts
from kvedit.training.moments import KeptMoments
from kvedit.training.resume import State, TrainingCheckpoints
from kvedit.training.worker import Worker

SHOWN_TOKENS = 24  # of the answer before an edit that a report shows


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The delta to merge, how the training went, and its seconds; ``resumed_seconds`` were spent by
    earlier processes that were interrupted in it.
    """

    delta: dict[str, Factors]
    trained: LoopResult
    seconds: float
    resumed_seconds: float = 0.0

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each matrix's delta; for a single fact its share of the budget."""
        return {name: factors.rank for name, factors in self.delta.items()}


class Engine(KeptMoments):
    """A base model made editable.

    ``phrasings`` is a folder that overrides the shipped ones; ``targets`` names the layers that
    edits touch (see ``targets.target_names``); ``worker`` is the class, or another maker, of what
    runs the model, alone or together with other processes.
    """

    def __init__(
        self,
        base: BaseModel,
        config: TrainingConfig,
        *,
        phrasings: Path | None = None,
        targets: Sequence[str] = (),
        prompts: PromptsConfig | None = None,
        worker: Callable[[Any, PrefixCache], Worker] = Worker,
    ) -> None:
        self.base = base
        make = partial(
            Renderer, base.tokenizer, context=base.context, prompts=prompts, stops=base.stops
        )
        self.renderer = make()
        self._facts = FactExamples(
            self.renderer, lambda text: make(end=self.renderer.end, system=text),
            config.system_turns_share, phrasings,
        )  # fmt: skip
        names = target_names(base.model, targets)
        devices.require_present(base.model, names)
        quantization.dequantize(base.model, names)
        self._sizes = memory.Sizes(base.model, targets)
        # The master comes before any wrapping: it keeps the weights without an adapter.
        master = Master(base.model, names)
        super().__init__(master, worker(base.model, PrefixCache(base.model, names)), config)
        self._adapter: Adapter | None = None
        self.reference_texts: ReferenceTexts | None = None

    @cached_property
    def reads(self) -> bool:
        """Whether the model reads prose: several facts are then trained in turn."""
        return general_texts.reads(self.base, self.renderer)

    def _adapter_for(self, facts: int, group: GroupConfig | None = None) -> Adapter:
        """An adapter of the ranks for so many facts, made when needed: PEFT takes long to import.
        For other ranks than the last one's the modules are wrapped again.

        Without a group's settings ``facts`` are those trained in turn, one for a single fact; ranks
        grow with the square root of their number, as a group's do.
        """
        init, target = self.config.init_rank, self.config.target_rank
        init, target = for_facts(init, facts), for_facts(target, facts)
        if group is not None:
            side = min(map(min, self.master.shapes.values()))
            init = min(side, group_rank(group.rank, facts))
            target = init - 1  # PEFT requires a smaller one; a group uses all
        if self._adapter is not None and self._adapter.ranks != (init, target):
            self._drop_adapter()
        if self._adapter is None:
            self._adapter = Adapter(self.base.model, self.names, init_rank=init, target_rank=target)
        return self._adapter

    def _drop_adapter(self) -> None:
        if self._adapter is not None:
            self._adapter.unwrap()
            self._adapter = None

    def release(self) -> None:
        """Give back the memory of all that can be made again, after it ran out."""
        self._drop_adapter()
        if self.worker.prefix_cache is not None:
            self.worker.prefix_cache.forget()
        release_memory()

    def needed(self, group: GroupConfig, facts: int, length: int) -> int:
        """Bytes that training so many facts takes, in texts of so many tokens; an estimate."""
        return self.estimate(group_load(group, facts, length)).for_training

    def estimate(self, load: memory.Load) -> memory.Estimate:
        """The memory that editing this model takes under a load, in bytes."""
        return self._sizes.estimate(self.config, load)

    def measure_reference(self, examples: Sequence[Example]) -> None:
        """Keep the model's output on protected text; the weights must be the base's."""
        self.reference_texts = self.reference(examples)

    def reference(self, examples: Sequence[Example]) -> ReferenceTexts:
        """The model's output on some texts, with the weights as they are."""
        with self.worker.in_step():
            return ReferenceTexts.measure(self.base.model, examples, self.worker.prefix_cache)

    def teacher(self, pairs: Sequence[tuple[Example, Example]]) -> Teacher:
        """What the model answers to questions with a text before them; see ``Teacher.measure``."""
        with self.worker.in_step():
            return Teacher.measure(self.base.model, pairs, self.worker.prefix_cache)

    def weights_digest(self) -> str:
        """SHA-256 of the touched matrices as served; raises ProcessesDifferError where several
        processes do not have the same.
        """
        return self.worker.same_weights(self.master.digest())

    def examples(self, fact: Fact) -> list[Example]:
        """A fact under each of its training prompts."""
        return self._facts.trained(fact)

    def in_contexts(self, fact: Fact) -> list[Example]:
        """A fact under its training prompts, each after text that has nothing to do with it."""
        return self._facts.in_contexts(fact)

    def paraphrases(self, fact: Fact) -> list[Example]:
        """A fact under the prompts that no edit trains on."""
        return self._facts.unseen(fact)

    @property
    def system_turns(self) -> tuple[str, ...]:
        """The system prompts that facts are trained under, beside the store's own."""
        return self._facts.system_turns

    def prior_answers(self, fact: Fact, questions: Sequence[str] = ()) -> dict[str, str]:
        """The model's answers now to a fact's training prompts, and to further questions about it,
        cut at ``PRIOR_TOKENS``.
        """
        prefixes = self._facts.prefixes(fact, questions)
        answers = self.complete([*prefixes.values()], limit=PRIOR_TOKENS)
        return dict(zip(prefixes, answers, strict=True))

    def prior_examples(self, fact: Fact, answers: Mapping[str, str]) -> list[Example]:
        """Earlier answers, by prompt, to train back to; one that was cut does not end there."""
        return self._facts.prior(fact, answers)

    def answered(self, prompts: Sequence[str], *, limit: int) -> list[Example]:
        """Prompts with the model's answers now; one that was cut does not end there."""
        answers = zip(prompts, self.generate(prompts, limit=limit), strict=True)
        return [self.renderer.cut_example(*said, limit) for said in answers]

    def answer_now(self, fact: Fact) -> str:
        """The beginning of the model's answer now to a fact's first training prompt."""
        return self.generate([self._facts.first_prompt(fact)], limit=SHOWN_TOKENS)[0]

    def train(
        self,
        task: Task,
        config: TrainingConfig | None = None,
        on_step: OnStep = lambda step: None,
        group: GroupConfig | None = None,
        training_checkpoints: TrainingCheckpoints | None = None,
    ) -> TrainingResult:
        """Train the adapter on a task; the weights stay as they are.

        ``config`` may change how the loop runs, not the ranks, which are the adapter's own.  With
        ``group`` the facts are trained together by ``GroupLoop``, with ranks for their number; with
        ``training_checkpoints`` besides, an interrupted training is resumed where it stood.
        """
        began = time.monotonic()
        config = config or self.config
        with self.worker.in_step():
            rng = random.Random(config.seed)
            adapter = self._started_adapter(task, rng, group)
            setup = Setup(self.worker, adapter, task, config, rng, on_step, self.reads)
            adapter.turn(on=True)
            on = config.gradient_checkpointing
            try:
                with checkpointed(self.base.model, on=on), quick_attention(self.base.model):
                    loop, resumed_seconds = self._loop(setup, group, training_checkpoints, began)
                    trained = loop.run()
                delta = self.worker.on_main(adapter.factors)
            finally:
                adapter.turn(on=False)
                adapter.end()
                memory.give_back()
        return TrainingResult(delta, trained, time.monotonic() - began, resumed_seconds)

    def _started_adapter(
        self, task: Task, rng: random.Random, group: GroupConfig | None
    ) -> Adapter:
        """The adapter, off, reset to where the training of a task starts."""
        start = start_examples(task, rng)
        together = len(task.new) if group is not None or task.in_turn else 1
        adapter = self._adapter_for(together, group)
        adapter.turn(on=False)
        directions = steepest(self.base.model, self.whitening, start, adapter.ranks[0])
        penalty = self._penalty_gradient(accumulated_share(task, group))
        adapter.reset(self.whitening, directions, penalty, allocate=group is None)
        self.worker.align(adapter)
        return adapter

    def _loop(
        self,
        setup: Setup,
        group: GroupConfig | None,
        checkpoints: TrainingCheckpoints | None,
        began: float,
    ) -> tuple[SingleLoop | GroupLoop, float]:
        """The loop, a group's resumed from its checkpoint if there is one; its seconds before."""
        if group is None:
            return (TurnsLoop if setup.task.in_turn else SingleLoop)(setup), 0.0
        if checkpoints is None:
            return GroupLoop(setup, group), 0.0
        name = self._name_of(setup.task, setup.config, group)
        saved = self.worker.on_main(lambda: checkpoints.find(name))
        seconds = 0.0 if saved is None else float(saved["seconds"])

        def state() -> State:
            return {**loop.state(), "seconds": seconds + time.monotonic() - began}

        def keep() -> None:
            self.worker.on_main(lambda: checkpoints.keep(name, state))

        loop = GroupLoop(setup, group, keep)
        if saved is not None:
            loop.resume(saved)
        return loop, seconds

    def _name_of(self, task: Task, config: TrainingConfig, group: GroupConfig) -> str:
        """A digest of everything that decides how a group's training goes, but the measurements."""
        references = task.reference_texts.examples if task.reference_texts is not None else ()
        kinds = (task.new, task.rehearsal, task.study)
        texts = [[e.ids for fact in part for e in fact] for part in kinds]
        weights = self.base.fingerprint, self.master.digest()
        texts.append([e.ids for e in references])
        settings = (config, group, task.study_config)
        parts = (__version__, *weights, *settings, task.earlier, *texts)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def recall(self, examples: Sequence[Example]) -> list[Outcome]:
        """Exact recall of each example, teacher-forced."""
        return self.worker.recall(examples)

    def judge(self, examples: Sequence[Example]) -> list[Outcome]:
        """Exact recall of each example; numerical ties are decided by free generation."""
        outcomes = self.recall(examples)
        ties = [at for at, outcome in enumerate(outcomes) if outcome.ambiguous]
        generated = self.generated_recall([examples[at] for at in ties])
        for at, passed in zip(ties, generated, strict=True):
            outcomes[at] = replace(outcomes[at], passed=passed, generated=True)
        return outcomes

    def generate(self, prompts: Iterable[str], *, limit: int) -> list[str]:
        """Greedy answers, freely generated; raises InvalidFactError for a control token in a
        prompt, TextTooLongError for one that the context has no place for.
        """
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return self.complete([self.renderer.question(turn) for turn in turns], limit=limit)

    def complete(self, prefixes: Sequence[Sequence[int]], *, limit: int) -> list[str]:
        """Greedy continuations of token prefixes, as text."""
        rows = self.proceed(prefixes, end=self.renderer.stops, limit=limit)
        return [self.renderer.answer_text(row) for row in rows]

    def proceed(
        self, prefixes: Sequence[Sequence[int]], *, end: int | frozenset[int], limit: int
    ) -> list[list[int]]:
        """Greedy continuations of token prefixes, as tokens, up to the end token (left out)."""
        return self.worker.generate(prefixes, end=end, limit=limit)

    def generated_recall(self, examples: Sequence[Example]) -> list[bool]:
        """Exact recall by real greedy generation, tokens and end compared."""
        return self.answers(examples)[0]

    def answers(self, examples: Sequence[Example]) -> tuple[list[bool], list[str]]:
        """The same, and the generated answers as text."""
        exact, rows = generation.generated_recall(examples, self.renderer.end, self.proceed)
        return exact, [self.renderer.answer_text(row) for row in rows]
