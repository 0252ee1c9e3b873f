"""Training checkpoints: the state of a long training run, kept so that another process can resume.

A group is one edit, and its training may take an hour.  A checkpoint is one safetensors file: the
tensors are its tensors; numbers, texts, the random state and the nesting are JSON in its metadata,
beside a SHA-256 of both.  Nothing is pickled.

Invariants:
- A checkpoint belongs to one task, named by everything that decides the run: no other task resumes
  from it, nor does a version that keeps another state.
- It only saves time.  If it is missing or damaged, training starts at the first step; if it cannot
  be written, training goes on without it.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from kvedit import files
from kvedit.errors import KveditError, OutOfTimeError
from kvedit.mapped import mapping

FORMAT = 7  # of the states that loops keep; part of the file's name
EVERY = 120.0  # seconds between two checkpoints, at least
SHARE = 0.02  # of the training time may be spent on writing them
State = dict[str, Any]
"""Tensors, numbers, texts and None, nested in dicts, lists and tuples; read back on the CPU."""
Keep = Callable[[Callable[[], State]], None]
Report = Callable[[str], None]


class TrainingCheckpoints:
    """The checkpoints in one folder; ``say`` reports that training resumes, ``warn`` that a
    checkpoint could not be written.  From ``deadline`` (``time.monotonic``) on, training stops at
    the next step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        say: Report = lambda text: None,
        warn: Report = lambda text: None,
        deadline: float | None = None,
    ) -> None:
        self._folder, self._say, self._warn = folder, say, warn
        self._deadline = math.inf if deadline is None else deadline
        self._due = time.monotonic() + EVERY

    def find(self, task: str) -> State | None:
        """The state in which the last process left this task, if there is an intact checkpoint."""
        path = self._path(task)
        try:
            with mapping(path):
                state = _read(path)
        except KveditError as error:  # its bytes may be sound: the file stays
            self._warn(f"the training starts anew: {error.message}")
            return None
        except (SafetensorError, OSError, ValueError, KeyError):
            files.remove(path)
            return None
        self._say("resuming the training that was interrupted")
        return state

    def keep(self, task: str, state: Callable[[], State]) -> None:
        """Write a checkpoint if one is due.  Raises OutOfTimeError from the deadline on."""
        began = time.monotonic()
        if began >= min(self._due, self._deadline):
            self._write(task, state, began)
        if began >= self._deadline:
            raise OutOfTimeError(
                "time is up in the middle of a group",
                hint="Run the same command again: it resumes where the training stopped.",
            )

    def _write(self, task: str, state: Callable[[], State], began: float) -> None:
        path = self._path(task)
        try:
            with files.disk_errors(path):
                self._folder.mkdir(exist_ok=True)
                files.clean_temporary(self._folder)
            files.write_atomic(path, _to_bytes(state()))
        except KveditError as error:
            self._due = math.inf
            self._warn(f"no training checkpoint can be written: {error.message}")
        else:
            now = time.monotonic()
            self._due = now + max(EVERY, (now - began) / SHARE)

    def clear(self) -> None:
        """Remove all checkpoints, those of older versions too: their edit has ended."""
        for pattern in (files.TRAINING_CHECKPOINTS, files.OLD_TRAINING_CHECKPOINTS):
            for path in self._folder.glob(pattern):
                files.remove(path)

    def _path(self, task: str) -> Path:
        return self._folder / files.TRAINING_CHECKPOINTS.replace("*", f"{FORMAT}-{task[:16]}")


def _to_bytes(state: State) -> bytes:
    """A state as a safetensors file."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_tagged(state, tensors))
    return save_tensors(tensors, {"state": text, "sha256": _digest(text, tensors)})


def _read(path: Path) -> State:
    """The inverse of ``_to_bytes``; raises ValueError if the digest is another one."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        # Copies: what ``get_tensor`` returns is the mapped file.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    text = metadata["state"]
    if _digest(text, tensors) != metadata["sha256"]:
        raise ValueError("the checkpoint was altered")
    tags = {"tensor": tensors.__getitem__, "tuple": tuple, "dict": dict}

    def untag(tagged: dict[str, Any]) -> Any:
        ((tag, content),) = tagged.items()
        return tags[tag](content)

    state: State = json.loads(text, object_hook=untag)  # from the inside outwards
    return state


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the JSON and of each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tagged(value: Any, tensors: dict[str, Tensor]) -> Any:
    """As JSON; tensors are added to ``tensors`` as contiguous copies on the CPU.

    JSON has only lists, and dicts with text keys: tuples and dicts are tagged.  Floats are read
    back to the bit (``repr`` is exact).
    """
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": _tagged([list(item) for item in value.items()], tensors)}
    if isinstance(value, tuple):
        return {"tuple": _tagged(list(value), tensors)}
    if isinstance(value, list):
        return [_tagged(part, tensors) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a training checkpoint cannot hold a {type(value).__name__}")
