"""Where the parts of a model lie: on one device, over several, or in part in memory or on the disk.

transformers spreads a model by a device map, and accelerate's hooks carry what goes through it from
device to device.  Those hooks stand in a module's own ``forward``, and a weight that is kept
elsewhere until it is needed is on the meta device.

Invariants:
- What replaces a module's ``forward`` for a while puts back what stood there, hooks included.
- A matrix that edits touch is real: one that is fetched at need cannot be changed in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvedit.errors import ModelError

MODES = ("auto", "balanced", "balanced_low_0", "sequential")
_HOW = (
    f"Give one of {', '.join(MODES)}, a device such as cuda:1, or a JSON file of devices by module"
    ' name, such as {"model.embed_tokens": 0, "model.layers.0": "disk", ...}.'
)


def absolute(text: str, folder: Path) -> str:
    """A device map as it was given; a file's name, found from ``folder``, in full."""
    path = folder / Path(text).expanduser()
    return str(path.resolve()) if text and text not in MODES and path.is_file() else text


def read(text: str) -> str | dict[str, int | str]:
    """A device map as transformers takes it.  Raises ModelError."""
    if text in MODES:
        return text
    path = Path(text)
    if path.is_file() or path.suffix == ".json":
        return _read_file(path)
    try:
        return {"": str(torch.device(text))}
    except RuntimeError as error:
        raise ModelError(f"{text!r} is no device map", hint=_HOW) from error


def _read_file(path: Path) -> dict[str, int | str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the device map {path} cannot be read: {error}", hint=_HOW) from error
    if not isinstance(found, dict) or not found:
        raise ModelError(f"the device map {path} is no table of devices", hint=_HOW)
    if not all(type(device) in (int, str) for device in found.values()):
        raise ModelError(f"the device map {path} names devices that are none", hint=_HOW)
    return found


def first_device(model: nn.Module) -> torch.device:
    """Where tokens are handed in: that of the first parameter that is not kept elsewhere."""
    found = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(found, torch.device("cpu"))


def is_accelerated(model: nn.Module) -> bool:
    """Whether a model lies on more than a CPU; one without weights, whether it would.

    Asked in every step: only a model that is spread is looked at as a whole.
    """
    kinds = (p.device.type for p in model.parameters() if p.device.type != "meta")
    first = next(kinds, None)
    if first is None:
        return torch.cuda.is_available()
    return first != "cpu" or (is_spread(model) and any(kind != "cpu" for kind in kinds))


def generator(model: nn.Module, seed: int) -> torch.Generator:
    """A source of random numbers where the model is: what is drawn from it need not travel."""
    return torch.Generator(first_device(model)).manual_seed(seed)


def is_spread(model: Any) -> bool:
    """Whether a model lies on more than one device."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def require_present(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ModelError if a matrix that edits touch is kept elsewhere until it is needed."""
    away = [n for n in names if model.get_submodule(n).weight.device.type == "meta"]
    if away:
        raise ModelError(
            f"{len(away)} of {len(names)} matrices that edits touch are offloaded to memory or the"
            f" disk by the device map, {away[0]} among them: they cannot be edited there",
            hint="Put the layers that edits touch on a device in the device map (the blocks below"
            " them, the embeddings and the vocabulary projection may be offloaded), or name others"
            " with --targets.",
        )


WIDTH_MULTIPLE = 32
"""Of padded sizes: on a CPU every new shape of a product costs the time of a hundred products, in
which oneDNN compiles a kernel for it."""


def padded_width(tokens: int) -> int:
    """How wide a row of so many tokens is once it is padded."""
    return -(-tokens // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


@contextmanager
def replaced_forward(
    modules: Sequence[nn.Module], make: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, each module runs ``make(index, forward)`` in place of its ``forward``."""
    hooked = [module.__dict__.get("forward") for module in modules]
    for index, module in enumerate(modules):
        module.forward = make(index, module.forward)  # hides the method of the class
    try:
        yield
    finally:
        for module, forward in zip(modules, hooked, strict=True):
            del module.forward
            if forward is not None:  # accelerate's hook, which moves or fetches the weights
                module.forward = forward
