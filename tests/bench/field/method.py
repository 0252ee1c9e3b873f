"""What every way of teaching facts is behind: one small interface.

A ``Method`` is made once for a run, ``start`` gives the model and its tokenizer as one thing that
can be asked (``Asked``), and each ``edit(asked, records)`` gives back that thing, edited: in place,
wrapped, or with text put before the question.

Invariants:
- A method reads the records' ``prompts`` and ``target``, their ``key``, and nothing else of them.
- Its settings are its dataclass fields: they are kept with the result.
- The global random state is as before after an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from kvedit.errors import UsageError
from kvedit.model.prompts import Example
from tests.bench.field.asked import Asked
from tests.bench.field.records import Record
from tests.bench.quality_methods import TrainOptions, base_model

SEQUENTIAL, BATCH = "sequential", "batch"
WEIGHTS, BESIDE, PROMPT = "weights", "beside the weights", "the prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a method may use: the base model, a folder of its own, tokens of texts that the base
    model wrote by itself (for statistics), and ``say`` for progress.
    """

    model: str | None
    folder: Path
    texts: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    config: Path | None = None
    time: float | None = None
    say: Callable[[str], None] = lambda text: None

    @property
    def options(self) -> TrainOptions:
        """The same for what ``quality`` shares with this."""
        return TrainOptions(model=self.model, config=self.config, time=self.time, seed=self.seed)


@dataclass(kw_only=True)
class Method:
    """A way of teaching facts; ``changes`` says what an edit changes, ``ways`` how it is run."""

    setup: Setup = field(repr=False)
    changes: ClassVar[str] = WEIGHTS
    ways: ClassVar[tuple[str, ...]] = (SEQUENTIAL, BATCH)
    in_fp32: ClassVar[bool] = True
    resumes: ClassVar[bool] = False  # its folder keeps the edits of a run that was stopped

    def start(self) -> Asked:
        """The base model, not edited yet."""
        _, asked = base_model(self.setup.options, in_fp32=self.in_fp32)
        return Asked(asked.model, asked.renderer)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """Teach records together; gives back what is asked from now on."""
        raise NotImplementedError

    def passes(self, example: Example) -> float | None:
        """Most forward and backward passes over one example that a record takes, for the cost that
        is said beforehand; None where the method does not know.
        """
        return None

    def close(self) -> None:
        """Give back what ``start`` opened."""

    def notes(self) -> dict[str, Any]:
        """What should be known of the run besides the settings, as plain values."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The settings by name, as plain values."""
        own = (item.name for item in fields(self) if item.name != "setup" and item.init)
        return {name: getattr(self, name) for name in own}


def examples(asked: Asked, records: Sequence[Record]) -> list[Example]:
    """What is trained of records, in the form in which the model is asked."""
    return asked.renderer.examples(pair for record in records for pair in record.pairs)


@contextmanager
def trainable(model: Any, parameters: Sequence[nn.Parameter], seed: int) -> Iterator[None]:
    """Inside, these parameters are trained and no others; random draws depend on the seed alone."""
    devices = [model.device] if model.device.type == "cuda" else []
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            model.eval().requires_grad_(False)
            for parameter in parameters:
                parameter.grad = None


def make(name: str, setup: Setup, changes: Mapping[str, Any] | None = None) -> Method:
    """A method with some of its settings changed; raises UsageError for one that it has not."""
    kind = method(name)
    known = [item.name for item in fields(kind) if item.name != "setup" and item.init]
    for wrong in set(changes or ()) - set(known):
        raise UsageError(
            f"{name} has no setting {wrong!r}", hint=f"It has: {', '.join(known) or 'none'}."
        )
    return kind(setup=setup, **(changes or {}))


METHODS = {
    "notebook": "notebook:Notebook",
    "lora": "lora:Lora",
    "full": "full:FullTuning",
    "last-blocks": "full:LastBlocks",
    "adapter": "adapter:BottleneckAdapter",
    "prompt-tuning": "soft_prompts:PromptTuning",
    "prefix-tuning": "soft_prompts:PrefixTuning",
    "p-tuning": "soft_prompts:PTuning",
    "p-tuning-v2": "soft_prompts:PTuningV2",
    "lora-fixed": "lora_fixed:LoraFixed",
    "ft-l": "one_matrix:FineTuningL",
    "ft-m": "one_matrix:FineTuningM",
    "locft-bf": "one_matrix:BreadthFirst",
    "rome": "rome:Rome",
    "memit": "memit:Memit",
    "alphaedit": "alphaedit:AlphaEdit",
    "ultraedit": "ultraedit:UltraEdit",
    "in-context": "in_prompt:InContext",
    "retrieval": "in_prompt:Retrieval",
    "kvedit": "kvedit_store:Kvedit",
}
"""Names of the methods, and where each is: module and class in ``methods/``."""


def method(name: str) -> type[Method]:
    """The class of a method; raises UsageError, with the names that there are."""
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}", hint=f"Methods: {', '.join(METHODS)}.")
    module, _, kind = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(f"tests.bench.field.methods.{module}"), kind)
    return found
