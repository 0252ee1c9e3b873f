"""A model's devices: one, several, or in part offloaded to memory or the disk.

transformers spreads a model by a device map, and accelerate's hooks carry activations from device
to device.  Those hooks replace a module's ``forward``; an offloaded weight is on the meta device.

All threads of a product wait for the slowest: where cores are shared with others, one that has to
wait for its core stops the others, and two threads were five to ten times slower than one.

Invariants:
- A temporary replacement of a module's ``forward`` restores the earlier one, hooks included.
- A matrix that edits touch is not offloaded: it could not be changed in place.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.errors import ModelError
from kvedit.paths import home_path

log = logging.getLogger(__name__)

TIMED_ROWS, TIMED_SIZE = 64, 1024  # of a product that takes some milliseconds
TIMED_PRODUCTS = 9
CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MAX_NAME = 4000  # characters of a file's name
MODES = ("auto", "balanced", "balanced_low_0", "sequential")
_MAP_HINT = (
    f"Give one of {', '.join(MODES)}, a device such as cuda:1, or a JSON file of devices by module"
    ' name, such as {"model.embed_tokens": 0, "model.layers.0": "disk", ...}.'
)


def absolute(text: str, folder: Path) -> str:
    """A device map as it was given; a file name relative to ``folder`` as an absolute path."""
    if "\0" in text or len(text) > MAX_NAME:
        return text
    path = folder / home_path(text)
    return str(path.resolve()) if text and text not in MODES and path.is_file() else text


def read(text: str) -> str | dict[str, int | str]:
    """A device map as transformers takes it.  Raises ModelError."""
    if text in MODES:
        return text
    if "\0" in text or len(text) > MAX_NAME:
        raise ModelError(f"{text!r:.80} is no device map", hint=_MAP_HINT)
    path = Path(text)
    if path.is_file() or (path.suffix == ".json" and not path.exists()):  # no pipe, no device
        return _read_file(path)
    try:
        return {"": str(torch.device(text))}
    except RuntimeError as error:
        raise ModelError(f"{text!r} is no device map", hint=_MAP_HINT) from error


def _read_file(path: Path) -> dict[str, int | str]:
    where = f"the device map {path}"
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{where} cannot be read: {error}", hint=_MAP_HINT) from error
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{where} is no table of devices", hint=_MAP_HINT)
    if not all(type(device) in (int, str) for device in table.values()):
        raise ModelError(f"{where} names an unknown device", hint=_MAP_HINT)
    return table


def first_device(model: nn.Module) -> torch.device:
    """The device that takes input tokens: that of the first parameter that is not offloaded."""
    placed = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(placed, torch.device("cpu"))


def is_accelerated(model: nn.Module) -> bool:
    """Whether any of a model is on an accelerator; for one without weights, whether it would be."""
    kinds = (p.device.type for p in model.parameters() if p.device.type != "meta")
    first = next(kinds, None)
    if first is None:
        return torch.cuda.is_available()
    # Called in every step: all parameters are checked only if the model is spread.
    return first != "cpu" or (is_spread(model) and any(kind != "cpu" for kind in kinds))


def generator(model: nn.Module, seed: int) -> torch.Generator:
    """A random generator on the model's device, so that random numbers need not be copied there."""
    return torch.Generator(first_device(model)).manual_seed(seed)


def is_spread(model: Any) -> bool:
    """Whether a model is on more than one device."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def require_present(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ModelError if a matrix that edits touch is offloaded."""
    offloaded = [n for n in names if model.get_submodule(n).weight.device.type == "meta"]
    if offloaded:
        raise ModelError(
            f"{len(offloaded)} of {len(names)} matrices that edits touch are offloaded to memory or"
            f" the disk by the device map, {offloaded[0]} among them: they cannot be edited there",
            hint="Put the layers that edits touch on a device in the device map (the blocks below"
            " them, the embeddings and the vocabulary projection may be offloaded), or choose"
            " others with --targets.",
        )


def padded_width(tokens: int) -> int:
    """The width of a row of tokens once it is padded: a multiple of 32.

    On a CPU every new shape of a product costs the time of a hundred products, in which oneDNN
    compiles a kernel for it.
    """
    return -(-tokens // 32) * 32


def padded_rows(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """(rows, width), int64: rows padded on the right."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


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


def choose_threads() -> None:
    """Let this process compute with all threads or with one, whichever is quicker now; not where
    the environment says how many.
    """
    count = torch.get_num_threads()
    if count == 1 or any(name in os.environ for name in CHOSEN_BY_USER):
        return
    seconds = {threads: _product_seconds(threads) for threads in (count, 1)}
    best = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(best)
    times = ", ".join(f"{1e3 * spent:.1f} ms with {n}" for n, spent in seconds.items())
    log.info("threads: %d (a product takes %s)", best, times)


def _product_seconds(threads: int) -> float:
    """The median time of a product: the shortest would not show that others use the cores too."""
    torch.set_num_threads(threads)
    rows, matrix = torch.ones(TIMED_ROWS, TIMED_SIZE), torch.ones(TIMED_SIZE, TIMED_SIZE)
    times = []
    for _ in range(TIMED_PRODUCTS):
        start = time.perf_counter()
        rows @ matrix
        times.append(time.perf_counter() - start)
    return median(times)
