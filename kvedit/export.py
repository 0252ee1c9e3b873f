"""A revision as a folder that plain transformers loads.

Invariants:
- The folder appears under its name only when it is complete: it is built beside it and renamed.
- It is loaded again by transformers alone and asked every training prompt before it is reported.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvedit import models, probes
from kvedit.engine import Engine
from kvedit.errors import UsageError
from kvedit.events import Score
from kvedit.files import disk_errors, sync_directory, temporary_path
from kvedit.prompts import Example

DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16,
          "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """Where the export is, and the probes that it answered as the store's model does."""

    path: str
    revision: int
    probes: Score
    mismatches: tuple[str, ...]


def write(
    engine: Engine,
    examples: Sequence[Example],
    directory: Path,
    *,
    dtype: str | None,
    revision: int,
    progress: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write the engine's weights as they are served, reload them, and compare greedy answers.

    Raises UsageError for an unknown dtype or a folder that is not empty.
    """
    wanted = _dtype(dtype) if dtype else engine.base.dtype
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UsageError(
            f"{directory} is not an empty folder", hint="Name a folder that is not there yet."
        )
    building = temporary_path(directory.absolute())
    with disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            _save(engine, building, wanted)
            if directory.exists():
                directory.rmdir()
            os.replace(building, directory)
            sync_directory(directory.absolute().parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    progress("reloading the export and asking it again")
    return _compare(engine, examples, directory, revision)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", hint="Known: fp32, bf16, fp16.")
    return DTYPES[name]


def _save(engine: Engine, folder: Path, dtype: torch.dtype) -> None:
    """A fresh copy of the base model with the edited matrices put in, saved by transformers."""
    base = engine.base
    fresh = models.load(base.path, trust_remote_code=_custom_code(engine))
    engine.master.write_into(fresh.model)
    fresh.model.to(dtype)
    fresh.model.save_pretrained(folder)
    fresh.tokenizer.save_pretrained(folder)


def _custom_code(engine: Engine) -> bool:
    return bool(getattr(engine.base.model.config, "auto_map", None))


def _compare(
    engine: Engine, examples: Sequence[Example], directory: Path, revision: int
) -> ExportReport:
    """Generate from the reloaded folder and from the store's model: both must say the same."""
    again = models.load(str(directory), trust_remote_code=_custom_code(engine))
    longest = max((len(e.ids) - e.start for e in examples), default=0) + 1
    prefixes = [e.ids[: e.start] for e in examples]
    end = engine.renderer.end
    theirs = probes.generate(again.model, prefixes, end=end, limit=longest)
    ours = probes.generate(engine.base.model, prefixes, end=end, limit=longest)
    wrong = [e.prompt for e, a, b in zip(examples, ours, theirs, strict=True) if a != b]
    return ExportReport(
        path=str(directory),
        revision=revision,
        probes=Score(len(examples) - len(wrong), len(examples), "generated"),
        mismatches=tuple(wrong),
    )
