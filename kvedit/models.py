"""Loading a base model, and naming the matrices that edits may touch.

Invariants:
- A store's model is known by its fingerprint; a folder that answers to the same name but holds
  other weights is refused.
- Which matrices are touched follows from the architecture alone, in a fixed order.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kvedit.errors import ModelError

log = logging.getLogger(__name__)

EMBEDDED = "kvedit-tiny"
EMBEDDED_PATH = Path(__file__).parent / "data" / EMBEDDED
_EDGE = 16 * 1024 * 1024  # bytes of each end of a file that its fingerprint covers


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded model: in evaluation mode, all parameters frozen."""

    model: Any
    tokenizer: Any
    name: str
    path: str
    fingerprint: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is served in."""
        found: torch.dtype = self.model.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where its first parameter lies."""
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def context(self) -> int:
        """The longest text it takes, in tokens."""
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
            if isinstance(found := getattr(config, name, None), int):
                return found
        return 2048


def locate(model: str | Path | None) -> str:
    """The folder or hub name to load: the embedded model when none is given."""
    if model is None or str(model) == EMBEDDED:
        return str(EMBEDDED_PATH)
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else str(model)


def load(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> BaseModel:
    """Load a model and its tokenizer from a folder or a hub, in the dtype it is stored in.

    Raises ModelError, with what to do, when there is none, no tokenizer, or custom code that was
    not allowed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # kvedit shows its own progress
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{source} holds no model: config.json is missing", hint=_WHAT_A_MODEL_IS)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot("tokenizer", source, error) from error
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _cannot("model", source, error) from error
    model: Any = loaded
    model.eval().requires_grad_(False)
    model.to(_device())
    return BaseModel(model, tokenizer, _name(source), source, fingerprint(source, model))


_WHAT_A_MODEL_IS = (
    "Give the name of a causal language model on a hub, or a folder with config.json, the weights"
    " and the tokenizer's files."
)


def _cannot(what: str, source: str, error: Exception) -> ModelError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = _WHAT_A_MODEL_IS
    if "trust_remote_code" in str(error):
        hint = "It brings its own code. If you trust it: --trust-remote-code."
    return ModelError(f"no {what} can be loaded from {source}: {first}", hint=hint)


def _device() -> torch.device:
    from accelerate import Accelerator

    found: torch.device = Accelerator().device
    return found


def _name(source: str) -> str:
    return EMBEDDED if source == str(EMBEDDED_PATH) else source


def fingerprint(source: str, model: Any) -> str:
    """SHA-256 that tells one set of weights from another.

    For a folder: each weight file's name, size, and first and last 16 MiB, so that it takes
    moments for a large model too.  For a hub model: the commit it was loaded at.
    """
    digest = hashlib.sha256()
    folder = Path(source)
    if not folder.is_dir():
        digest.update(f"{source}@{getattr(model.config, '_commit_hash', None)}".encode())
        return digest.hexdigest()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(_EDGE, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder blocks and its dotted name: the longest list of modules of one kind."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no stack of decoder blocks that kvedit can find",
            hint="Only causal language models made of blocks can be edited.",
        )
    return max(found, key=lambda pair: len(pair[1]))


def target_names(model: nn.Module) -> list[str]:
    """Dotted names of the linear layers that edits touch: those of the upper half of the blocks.

    The upper half does as well as all of them (docs/experiments.md) at half of the cost.
    """
    stack, layers = blocks(model)
    upper = range(len(layers) // 2, len(layers))
    names = [
        f"{stack}.{index}.{name}"
        for index in upper
        for name, module in layers[index].named_modules()
        if is_matrix(module)
    ]
    if not names:
        raise ModelError(
            f"no linear layers were found in the blocks of {type(model).__name__}",
            hint="Report the model's name: its projections are of a kind kvedit does not know.",
        )
    return names


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a plain linear projection (``nn.Linear``, or GPT-2's ``Conv1D``)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def weights_digest(weights: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of matrices, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        raw = tensor.detach().to("cpu").contiguous().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()
