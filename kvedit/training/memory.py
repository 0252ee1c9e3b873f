"""How much memory editing a model takes, estimated before it is loaded; and running out of it.

The estimate is a sum of seven products, good enough to refuse what cannot fit and to name the
parts; ``kvedit bench memory`` puts the measured peak beside it.  How many facts fit together is
found by running out of memory and halving (see ``editing.group_size``).

Invariants:
- Nothing is loaded for an estimate: shapes come from the configuration, on the meta device.
- Whichever library reports that memory ran out, it leaves ``watched`` as one OutOfMemoryError with
  a hint, and no frame of the attempt keeps its tensors alive.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from kvedit.adapter.fisher import DENSE_LIMIT
from kvedit.config import TrainingConfig
from kvedit.errors import ModelError, OutOfMemoryError
from kvedit.model.forward import vocabulary_size
from kvedit.model.prefix_cache import MAX_PREFIX_CACHE_BYTES
from kvedit.model.scoring import batch_tokens
from kvedit.model.targets import blocks, is_matrix, matrices, target_names

TEXT_TOKENS = 128
"""Length of a text while none is known yet: a question and a short description."""
_TEXTS = 1200  # protected texts of a new store, about
_FP32 = 4
_ADAPTER_COPIES = 9
"""PEFT's A and B, their gradients and three records of the allocator; A' and B', their gradients,
and Adam's two moments.  A group trains one side: two fewer."""
_MOMENT_COPIES = 4  # of the base's texts, with the facts, of the margins; and whitening factors
_GIB = 1024**3
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_MISSED_BY_ACCELERATE = (
    "out of memory", "not enough memory", "cannot allocate memory", "alloc_failed",
)  # fmt: skip
"""In CUDA driver errors, the CPU allocator on Windows, and cuBLAS, cuSOLVER and cuDNN errors."""
LESS = (
    "Set [training] gradient_checkpointing = true in kvedit.toml, name fewer layers with"
    " init --targets, or load the model in a smaller dtype."
)


@dataclass(frozen=True, slots=True)
class Load:
    """What one training step holds until its backward pass: ``texts`` that are trained or
    rehearsed and ``reference_texts``, each of ``length`` tokens, with adapters of ``rank``.
    """

    texts: int
    rank: int
    reference_texts: int = 0
    length: int = TEXT_TOKENS

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return (self.texts + self.reference_texts) * self.length


def single_load(config: TrainingConfig, length: int = TEXT_TOKENS) -> Load:
    """The load of one fact trained by itself."""
    return Load(config.phrasings_per_step + config.rehearsal_facts, config.init_rank, length=length)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes: the model's ``weights``; ``master``, fp32 copies of the touched matrices before and
    after edits; full-size fp32 ``gradients`` of them; ``fisher`` moments and whitening factors;
    ``caches`` of hidden states; the ``adapter`` with its optimizer; a step's ``activations``.
    """

    weights: int
    master: int
    gradients: int
    fisher: int
    caches: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All parts: what is needed where the model is on the CPU."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def on_device(self) -> int:
        """What lies on the model's GPU; the master copies stay on the CPU."""
        return self.total - self.master

    @property
    def for_training(self) -> int:
        """What training allocates, and frees at its end."""
        return self.gradients + self.adapter + self.activations


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an estimate needs to know of a model: its touched matrices (name, out, in), the bytes of
    all weights and of one number, the summed in and out widths of all linear layers in its upper
    half, the number of blocks there, hidden width, vocabulary, and the tokens of a batch.
    """

    shapes: tuple[tuple[str, int, int], ...]
    weights: int
    itemsize: int
    widths: int
    blocks: int
    hidden: int
    vocabulary: int
    batch: int

    def estimate(self, config: TrainingConfig, load: Load | None = None) -> Estimate:
        """What editing takes with this load (one fact, if None)."""
        load = load or single_load(config)
        touched = sum(out * width for _, out, width in self.shapes)
        states = _TEXTS * load.length * self.hidden * self.itemsize
        # One rank for all matrices, at most the smallest side.  A group trains one side.
        rank = min(load.rank, *(min(out, width) for _, out, width in self.shapes))
        copies = _ADAPTER_COPIES - (2 if load.reference_texts else 0)
        # Layers that read the same input share that side's moments.
        sides = [out for _, out, _ in self.shapes]
        sides += [width for _, width in {(n.rpartition(".")[0], w) for n, _, w in self.shapes}]
        moments = sum(side if side > DENSE_LIMIT else side * side for side in sides)
        return Estimate(
            weights=self.weights,
            master=2 * touched * _FP32,
            gradients=3 * touched * _FP32,
            fisher=_MOMENT_COPIES * moments * _FP32,
            caches=min(MAX_PREFIX_CACHE_BYTES, states) + (states if load.reference_texts else 0),
            adapter=copies * rank * sum(out + width for _, out, width in self.shapes) * _FP32,
            activations=self._activations(config, load),
        )

    def _activations(self, config: TrainingConfig, load: Load) -> int:
        """What the upper blocks keep for the backward pass of a step or of a batch (measured: one
        number for each input and output of a linear layer), the logits, and those of a batch with
        its softmax in fp32.
        """
        widths = self.widths
        if config.gradient_checkpointing:
            widths = widths // max(1, self.blocks) + self.blocks * self.hidden
        tokens = max(self.batch, load.tokens)
        # The base model's logits on reference texts stand beside the model's own.
        logits = (tokens + load.reference_texts * load.length) * self.vocabulary
        return (tokens * widths + logits) * self.itemsize + 2 * self.batch * self.vocabulary * _FP32


def sizes(model: nn.Module, targets: Sequence[str] = (), *, bits: float | None = None) -> Sizes:
    """Sizes of a model without adapter, which may be on the meta device; with ``bits`` a weight for
    all matrices that no edit touches, if those are quantized.
    """
    names = target_names(model, targets)
    weights = sum(p.numel() * p.itemsize for p in model.parameters())  # tied ones come once
    if bits is not None:
        for name in set(matrices(model)) - set(names):
            layer: Any = model.get_submodule(name)
            out, width = _shape(layer)
            weights -= int(out * width * (layer.weight.itemsize - bits / 8))
    upper = list(blocks(model)[1])
    upper = upper[len(upper) // 2 :]
    linear = [module for block in upper for module in block.modules() if is_matrix(module)]
    config: Any = model.config
    return Sizes(
        shapes=tuple((name, *_shape(model.get_submodule(name))) for name in names),
        weights=weights,
        itemsize=next(model.parameters()).itemsize,
        widths=sum(sum(_shape(module)) for module in linear),
        blocks=len(upper),
        hidden=int(getattr(config.get_text_config(), "hidden_size", 0)),
        vocabulary=vocabulary_size(model),
        batch=batch_tokens(model),
    )


def _shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer; Conv1D keeps its weight as (in, out)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a quantized weight has another shape
    width, out = module.weight.shape
    return out, width


def outline(source: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The model on the meta device, in the dtype it is stored in; None where its configuration or
    code does not allow that.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, **options)
        with torch.device("meta"):
            return make.from_config(config, dtype=config.dtype or torch.float32, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, NotImplementedError):
        return None  # loading the weights will say what is wrong


def require(
    model: nn.Module,
    config: TrainingConfig,
    targets: Sequence[str],
    *,
    spread: bool = False,
    bits: float | None = None,
) -> None:
    """Raise ModelError, with the parts and a hint, when editing cannot fit into memory.

    With a device map (``spread``) the sum over all GPUs and the system counts: which part goes
    where is not known before it is loaded.
    """
    parts = sizes(model, targets, bits=bits).estimate(config)
    if spread and torch.cuda.is_available():
        cards = (torch.cuda.mem_get_info(card)[0] for card in range(torch.cuda.device_count()))
        _refuse_if(parts.total, sum(cards) + available(), "memory on all devices", parts)
    elif torch.cuda.is_available():
        _refuse_if(parts.on_device, torch.cuda.mem_get_info()[0], "GPU memory", parts)
        _refuse_if(parts.weights + parts.master, available(), "memory", parts)
    else:
        _refuse_if(parts.total, available(), "memory", parts)


def _refuse_if(needed: int, unused: int, what: str, parts: Estimate) -> None:
    if needed <= unused:
        return
    listed = ", ".join(f"{p.name} {getattr(parts, p.name) / _GIB:.1f}" for p in fields(parts))
    raise ModelError(
        f"editing this model takes about {needed / _GIB:.1f} GiB of {what}, and"
        f" {unused / _GIB:.1f} are free ({listed})",
        hint="Name fewer layers with --targets, lower [training] init_rank, set"
        " gradient_checkpointing = true, or take a smaller model. If you know better:"
        " --ignore-memory.",
    )


def available() -> int:
    """Bytes this process may still take of the system's memory, within its control group's limit.

    Files that were read count in a control group's usage but can be dropped.
    """
    unused = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            int((_CONTROL_GROUP / f"memory.{name}").read_text(encoding="ascii"))
            for name in ("max", "current")
        )
        stat = (_CONTROL_GROUP / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):  # no control group, or its limit is "max"
        return unused
    counts = dict(line.split() for line in stat.splitlines())
    files = sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
    return min(unused, max(0, limit - used + files))


def free() -> int:
    """Bytes that training may take where the model is: on the GPU, or in the system."""
    if not torch.cuda.is_available():
        return available()
    unused = torch.cuda.mem_get_info()[0]
    return unused + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that the memory of a GPU or of the system ran out.

    On a CPU torch raises a plain RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    missed = any(words in text for words in _MISSED_BY_ACCELERATE)
    return isinstance(error, RuntimeError) and (missed or should_reduce_batch_size(error))


@contextmanager
def watched() -> Iterator[None]:
    """Turn whatever exception reports that memory ran out into OutOfMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        lines = str(error).strip().splitlines()
        # The frames that the error passed through would keep the tensors of the attempt alive.
        traceback.clear_frames(error.__traceback__)
        first = f": {lines[0]}" if lines else ""
        raise OutOfMemoryError(f"memory ran out{first}", hint=LESS) from None
