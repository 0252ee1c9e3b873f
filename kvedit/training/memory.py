"""How much memory editing a model takes, estimated before it is loaded; and running out of it.

The estimate is a sum of eight products, good enough to refuse what cannot fit and to name the
parts; ``kvedit bench memory`` puts the measured peak beside it.  How many facts fit together is
learned by running out of memory and halving (see ``editing.group_size``).

Invariants:
- Nothing is loaded for an estimate: a model on the meta device (``loading.outline``) has shapes.
- Whichever library reports that memory ran out, it leaves ``watched`` as one OutOfMemoryError with
  a hint, and no frame of the attempt keeps its tensors alive.
"""

import ctypes
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from kvedit.adapter.fisher import block_count
from kvedit.adapter.start import MAX_GRADIENTS, MAX_PASSES
from kvedit.config import TrainingConfig
from kvedit.errors import ModelError, OutOfMemoryError
from kvedit.model.forward import vocabulary_size
from kvedit.model.prefix_cache import MAX_PREFIX_CACHE_BYTES
from kvedit.model.scoring import activation_bytes, batch_tokens, step_tokens
from kvedit.model.targets import blocks, matrices, matrix_shape, target_names

TEXT_TOKENS = 128
"""Length of a text while none is known yet: a question and a short description."""
_TEXTS, _PROBED_TEXTS = 1200, 200  # protected texts of a new store, and what an edit probes, about
_FP32 = 4
_FACTOR_COPIES, _TRAINED_COPIES = 2, 4
"""PEFT's A and B, and A' and B'; of the longer side, which is trained, also the gradients of both
kinds, the penalty's squares and, in groups, the momentum."""
_START_COPIES = 3  # of the largest matrix in fp32: its gradient, that whitened, and half of it
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


def single_load(config: TrainingConfig, length: int = TEXT_TOKENS) -> Load:
    """The load of one fact trained by itself."""
    return Load(config.phrasings_per_step + config.rehearsal_facts, config.init_rank, length=length)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes: the model's ``weights``; ``master``, the touched matrices before all edits and what
    the served ones leave out; full-size fp32 ``gradients`` of a few of them, while an adapter is
    started; the ``fisher`` moments' whitening factors; the ``moments`` themselves; ``caches`` of
    hidden states; the ``adapter`` with its optimizer; a step's ``activations``.
    """

    weights: int
    master: int
    gradients: int
    fisher: int
    moments: int
    caches: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """What is needed where the model is on the CPU."""
        kept = (self.weights, self.master, self.fisher, self.moments, self.caches)
        return sum(kept) + self.for_training

    @property
    def on_device(self) -> int:
        """What lies on the model's GPU; the master copies and the moments stay on the CPU."""
        return self.total - self.in_system

    @property
    def in_system(self) -> int:
        """What lies in the system's memory where the model is on a GPU."""
        return self.master + self.moments

    @property
    def for_training(self) -> int:
        """What training allocates, and frees at its end: the gradients are gone when the adapter
        is there.
        """
        return max(self.gradients, self.adapter) + self.activations


class Sizes:
    """What an estimate needs to know of a model without adapter, which may be on the meta device.

    ``bits`` a weight for all matrices that no edit touches, if those are quantized.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[str] = (), *, bits: float | None = None
    ) -> None:
        shapes = {name: matrix_shape(model.get_submodule(name)) for name in matrices(model)}
        self._touched = {name: shapes[name] for name in target_names(model, targets)}
        self._itemsize = next(model.parameters()).itemsize
        self._weights = sum(p.numel() * p.itemsize for p in model.parameters())  # tied ones once
        if bits is not None:
            for name in shapes.keys() - self._touched.keys():
                layer: Any = model.get_submodule(name)
                self._weights -= int(math.prod(shapes[name]) * (layer.weight.itemsize - bits / 8))
        layers = len(blocks(model)[1])
        self._blocks = layers - layers // 2  # the upper half
        self._token_bytes = activation_bytes(model)
        config: Any = model.config
        self._hidden = int(getattr(config.get_text_config(), "hidden_size", 0))
        self._vocabulary = vocabulary_size(model)
        self._batch, self._step = batch_tokens(model), step_tokens(model)

    def estimate(self, config: TrainingConfig, load: Load | None = None) -> Estimate:
        """What editing takes with this load (one fact, if None)."""
        load = load or single_load(config)
        outs, inputs = zip(*self._touched.values(), strict=True)
        touched = _FP32 * sum(map(math.prod, self._touched.values()))
        group = load.reference_texts > 0
        states = load.length * self._hidden * self._itemsize
        cached = min(MAX_PREFIX_CACHE_BYTES, states * (_TEXTS if group else _PROBED_TEXTS))
        rank = min(load.rank, *outs, *inputs)  # the same for all matrices
        both, longer = sum(outs + inputs), sum(map(max, self._touched.values()))
        numbers = rank * (_FACTOR_COPIES * both + _TRAINED_COPIES * longer)
        # Layers that read the same input share that side's moments.
        shared = {(name.rpartition(".")[0], width) for name, (_, width) in self._touched.items()}
        sides = [*outs, *(width for _, width in shared)]
        moments = _FP32 * sum(side * side // block_count(side) for side in sides)
        start = _START_COPIES * _FP32 * max(map(math.prod, self._touched.values()))
        if group:
            start += min(touched, max(MAX_GRADIENTS, touched // MAX_PASSES))
        return Estimate(
            weights=self._weights,
            master=touched,
            gradients=start,
            fisher=moments,
            moments=moments,
            caches=cached + (_TEXTS * states if group else 0),
            adapter=numbers * _FP32,
            activations=self._activations(config, load),
        )

    def _activations(self, config: TrainingConfig, load: Load) -> int:
        """What the upper blocks keep for the backward pass of a batch, its logits (on reference
        texts, those of the base model too) with their gradient, and the logits of a batch that is
        only scored.
        """
        of_token = self._token_bytes
        if config.gradient_checkpointing:
            of_token = of_token // self._blocks + self._blocks * self._hidden * self._itemsize
        tokens = min(self._step, (load.texts + load.reference_texts) * load.length)
        logits = self._vocabulary * self._itemsize * tokens * (3 if load.reference_texts else 2)
        return max(tokens * of_token + logits, self._batch * self._vocabulary * self._itemsize)


def require(parts: Estimate, *, spread: bool = False) -> None:
    """Raise ModelError, with the parts and a hint, when editing cannot fit into memory.

    With a device map (``spread``) the sum over all GPUs and the system counts: which part goes
    where is not known before it is loaded.
    """
    limits = [(parts.total, available(), "memory")]
    if torch.cuda.is_available() and spread:
        cards = (torch.cuda.mem_get_info(card)[0] for card in range(torch.cuda.device_count()))
        limits = [(parts.total, sum(cards) + available(), "memory on all devices")]
    elif torch.cuda.is_available():
        limits = [
            (parts.on_device, torch.cuda.mem_get_info()[0], "GPU memory"),
            (parts.weights + parts.in_system, available(), "memory"),
        ]
    for needed, unused, what in limits:
        if needed > unused:
            listed = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in asdict(parts).items())
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
        limit, used, stat = (
            (_CONTROL_GROUP / f"memory.{name}").read_text(encoding="ascii")
            for name in ("max", "current", "stat")
        )
        counts = dict(line.split() for line in stat.splitlines())
        files = sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
        return min(unused, max(0, int(limit) - int(used) + files))
    except (OSError, ValueError):  # no control group, or its limit is "max"
        return unused


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
    text = str(error).lower()
    says_so = should_reduce_batch_size(error) or any(w in text for w in _MISSED_BY_ACCELERATE)
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out_of_memory or (isinstance(error, RuntimeError) and says_so)


def give_back() -> None:
    """Give freed memory back to the system: after measuring a model of 0.27 GiB, glibc kept 0.24 in
    small pieces.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def watched() -> Iterator[None]:
    """Turn whatever exception reports that memory ran out into OutOfMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        # The frames that the error passed through would keep the tensors of the attempt alive.
        traceback.clear_frames(error.__traceback__)
        text = str(error).strip()
        first = f": {text.splitlines()[0]}" if text else ""
        raise OutOfMemoryError(f"memory ran out{first}", hint=LESS) from None
