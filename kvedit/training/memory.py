"""How much memory a model needs to be edited, computed before it is loaded; and what to do when it
ran out all the same.

Invariants:
- Nothing is loaded for an estimate: shapes come from the configuration, on the meta device.
- An estimate counts what the engine holds at once while it teaches, part by part, so that a
  refusal can say what is too large.
- However a library says that memory ran out, it leaves ``watched`` as one error with what helps,
  and no frame of the attempt holds on to its tensors.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvedit.adapter.fisher import DENSE_LIMIT
from kvedit.config import TrainingConfig
from kvedit.errors import ModelError, OutOfMemoryError
from kvedit.model import loading
from kvedit.model.prefix_cache import KEPT_BYTES
from kvedit.model.scoring import batch_tokens

TEXT_TOKENS = 128
"""A text where none is known yet: a question and a short description."""
_TEXTS = 1200  # as many are protected in a new store
_FP32 = 4
_ADAPTER_COPIES = 9
"""PEFT's A and B, their gradients and three of the allocator's records; ours, their gradients, and
Adam's two moments; for a group, which trains one side, it is two less."""
_GIB = 1024**3
_GROUP = Path("/sys/fs/cgroup")
_RAN_OUT = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory",
    "alloc_failed",
)  # fmt: skip
"""In what torch's allocators and NVIDIA's libraries say; on a CPU it is a plain RuntimeError."""
LESS = (
    "Set [training] gradient_checkpointing = true in kvedit.toml, name fewer layers with"
    " init --targets, or load the model in a smaller dtype."
)


@dataclass(frozen=True, slots=True)
class Load:
    """What one step of a lesson has in hand, whose activations are held until its end: so many
    ``texts`` that are taught or rehearsed, so many ``reference_texts`` beside them, each of ``length``
    tokens, with adapters of ``rank`` where the matrices have so many directions.
    """

    texts: int
    rank: int
    reference_texts: int = 0
    length: int = TEXT_TOKENS

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return (self.texts + self.reference_texts) * self.length


def alone(config: TrainingConfig, length: int = TEXT_TOKENS) -> Load:
    """One fact by itself."""
    return Load(config.phrasings_per_step + config.rehearsal_facts, config.init_rank, length=length)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by what they are for.

    ``weights`` are the model's own; ``master`` the fp32 copies of the touched matrices, before and
    after edits; ``gradients`` what a lesson begins with, full-size for each touched matrix;
    ``fisher`` the moments of protected text and their roots; ``kept`` what lower blocks make of
    texts, and for groups what the base says to protected ones; ``adapter`` with its optimiser;
    ``activations`` those of a step, the logits among them.
    """

    weights: int
    master: int
    gradients: int
    fisher: int
    kept: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, as on a machine where the model is on the CPU."""
        return sum(getattr(self, item.name) for item in fields(self))

    @property
    def on_device(self) -> int:
        """What lies beside the model; the master copies stay on the CPU."""
        return self.total - self.master

    @property
    def for_training(self) -> int:
        """What is taken for a lesson and given back after it."""
        return self.gradients + self.adapter + self.activations


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an estimate needs to know of a model: its touched matrices (name, out, in), the bytes of
    its weights and of one number, what its upper blocks' linear layers take in and give out for a
    token, how many blocks those are, the hidden width, the vocabulary, and the tokens of a batch.
    """

    shapes: tuple[tuple[str, int, int], ...]
    weights: int
    size: int
    sides: int
    upper: int
    hidden: int
    vocabulary: int
    batch: int

    def estimate(self, config: TrainingConfig, load: Load | None = None) -> Estimate:
        """What editing takes with so much taught at once; one fact by itself if it is not given."""
        load = load or alone(config)
        touched = sum(out * into for _, out, into in self.shapes)
        return Estimate(
            weights=self.weights,
            master=2 * touched * _FP32,
            gradients=3 * touched * _FP32,
            fisher=_fisher(self.shapes),
            kept=self._kept(load),
            adapter=self._adapter(load),
            activations=self._activations(config, load),
        )

    def _adapter(self, load: Load) -> int:
        """All matrices have one rank, which the smallest side bounds."""
        rank = min(load.rank, *(min(out, into) for _, out, into in self.shapes))
        copies = _ADAPTER_COPIES - (2 if load.reference_texts else 0)
        return copies * _FP32 * rank * sum(out + into for _, out, into in self.shapes)

    def _kept(self, load: Load) -> int:
        """Protected texts' states: what reaches the edited blocks, and what leaves the last one."""
        states = _TEXTS * load.length * self.hidden * self.size
        return min(KEPT_BYTES, states) + (states if load.reference_texts else 0)

    def _activations(self, config: TrainingConfig, load: Load) -> int:
        """Of a step, or of a batch where that is more: what the upper blocks keep for backward, and
        the logits; those of a batch in fp32 besides, while its losses are computed.

        A block keeps about the inputs and outputs of each of its linear layers.
        """
        sides, head = self.sides, self.vocabulary
        if config.gradient_checkpointing:
            sides = sides // max(1, self.upper) + self.upper * self.hidden
        held = max(self.batch, load.tokens)
        answers = (
            held + load.reference_texts * load.length
        )  # the base's logits stand beside an anchor's
        states = (held * 2 * sides + answers * head) * self.size
        return states + 2 * self.batch * head * _FP32


def sizes(
    model: nn.Module,
    targets: Sequence[str] = (),
    *,
    dtype: torch.dtype | None = None,
    bits: float | None = None,
) -> Sizes:
    """Those of a model that no adapter is in; it may be on the meta device.

    ``dtype``: as if loaded so; ``bits``: as if all matrices that no edit touches were packed.
    """
    names = loading.target_names(model, targets)
    itemsize = {p: (dtype or p.dtype).itemsize for p in model.parameters()}
    weights = sum(p.numel() * itemsize[p] for p in model.parameters())  # tied ones come once
    if bits is not None:
        weights -= _packed(model, set(names), itemsize, bits)
    _, layers = loading.blocks(model)
    upper = list(layers)[len(layers) // 2 :]
    inside = (module for block in upper for module in block.modules())
    return Sizes(
        shapes=tuple((name, *_shape(model.get_submodule(name))) for name in names),
        weights=weights,
        size=(dtype or next(model.parameters()).dtype).itemsize,
        sides=sum(sum(_shape(module)) for module in inside if loading.is_matrix(module)),
        upper=len(upper),
        hidden=_shape_of_hidden(model),
        vocabulary=loading.vocabulary(model),
        batch=batch_tokens(model),
    )


def estimate(
    model: nn.Module,
    config: TrainingConfig,
    *,
    targets: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    bits: float | None = None,
    load: Load | None = None,
) -> Estimate:
    """What editing this model takes: see ``sizes`` and ``Sizes.estimate``."""
    return sizes(model, targets, dtype=dtype, bits=bits).estimate(config, load)


def _packed(model: nn.Module, touched: set[str], itemsize: Mapping[Any, int], bits: float) -> int:
    """How much less the matrices that no edit touches take in so many bits a weight."""
    layers: list[Any] = [
        model.get_submodule(n) for n in loading.matrices(model) if n not in touched
    ]
    return int(sum(prod(_shape(one)) * (itemsize[one.weight] - bits / 8) for one in layers))


def _shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, whichever way round it keeps them."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a packed weight has another shape
    into, out = module.weight.shape
    return out, into


def _fisher(shapes: Sequence[tuple[str, int, int]]) -> int:
    """Base moments, those of what is known, those with the facts, and roots; layers that read one
    input share its side.
    """
    outputs = sum(_side(out) for _, out, _ in shapes)
    shared = {(name.rpartition(".")[0], into) for name, _, into in shapes}
    return 4 * _FP32 * (outputs + sum(_side(into) for _, into in shared))


def _side(width: int) -> int:
    return width if width > DENSE_LIMIT else width * width


def _shape_of_hidden(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "hidden_size", 0))


def outline(source: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The model without its weights, on the meta device, in the dtype it is stored in; None where
    its configuration or code does not allow that.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, **options)
        with torch.device("meta"):
            return make.from_config(config, dtype=config.dtype or torch.float32, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, NotImplementedError):
        return None  # loading it in earnest will say what is wrong


def require(
    model: nn.Module,
    config: TrainingConfig,
    targets: Sequence[str],
    *,
    spread: bool = False,
    bits: float | None = None,
) -> None:
    """Raise ModelError, with the parts and what helps, when editing cannot fit into memory.

    With a device map (``spread``) what counts is the sum over all cards and the system: which part
    goes where is not known before it is loaded.
    """
    needed = estimate(model, config, targets=targets, bits=bits)
    if spread and torch.cuda.is_available():
        cards = (torch.cuda.mem_get_info(card)[0] for card in range(torch.cuda.device_count()))
        _refuse_if(needed.total, sum(cards) + available(), "memory on all devices", needed)
    elif torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        _refuse_if(needed.on_device, free, "GPU memory", needed)
        _refuse_if(needed.weights + needed.master, available(), "memory", needed)
    else:
        _refuse_if(needed.total, available(), "memory", needed)


def _refuse_if(needed: int, free: int, what: str, parts: Estimate) -> None:
    if needed <= free:
        return
    named = ", ".join(
        f"{item.name} {getattr(parts, item.name) / _GIB:.1f}" for item in fields(parts)
    )
    raise ModelError(
        f"editing this model takes about {needed / _GIB:.1f} GiB of {what}, and"
        f" {free / _GIB:.1f} are free ({named})",
        hint="Name fewer layers with --targets, lower [training] init_rank, set"
        " gradient_checkpointing = true, or take a smaller model. If you know better:"
        " --ignore-memory.",
    )


def available() -> int:
    """Bytes that this process may still take: the system's, or its control group's limit, of which
    files that were read and can be dropped again are no part.
    """
    found = _system()
    limit, used = (_number(_GROUP / f"memory.{name}") for name in ("max", "current"))
    if limit is None or used is None:
        return found
    return min(found, max(0, limit - used + _droppable()))


def _droppable() -> int:
    """What of a control group's memory is the contents of files."""
    try:
        lines = (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines)
    return sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))


def free() -> int:
    """Bytes that a lesson may take where the model is: on the GPU, or in the system."""
    if not torch.cuda.is_available():
        return available()
    found, _ = torch.cuda.mem_get_info()
    return found + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _system() -> int:
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    return prod(os.sysconf(name) for name in names) if hasattr(os, "sysconf") else 2**62


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says 'max'."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that there was no memory left, of a GPU's or the system's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in _RAN_OUT
    )


@contextmanager
def watched() -> Iterator[None]:
    """Inside, running out of memory raises OutOfMemoryError, whoever noticed it first."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        said = str(error).strip().splitlines()
        # The frames that the error passed through would keep the tensors of the attempt alive.
        traceback.clear_frames(error.__traceback__)
        first = f": {said[0]}" if said else ""
        raise OutOfMemoryError(f"memory ran out{first}", hint=LESS) from None


def give_back() -> None:
    """Let go of what no one refers to any more, on a GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
