"""A revision as a folder that plain transformers loads.

Invariants:
- The folder appears under its name only when it is complete: it is built beside it and renamed.
- It is loaded again by transformers alone and asked every training prompt before it is reported.
"""

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import UsageError
from kvedit.events import Score
from kvedit.files import disk_errors, sync_directory, temporary_path
from kvedit.model import devices, generation, loading, quantization
from kvedit.model.prompts import Example
from kvedit.revisions.export.conditions import Condition
from kvedit.training.engine import Engine

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """Where the export is, and how many probes it answers as the store's model does.

    ``rank`` and ``error`` are those of an adapter: ``error`` is the share of the change that the
    rank leaves out, in the Frobenius norm over all matrices.  ``conditions`` are the facts recalled
    where the model is asked or held otherwise, ``serve`` a command that serves the export.
    """

    path: str
    revision: int
    probes: Score
    mismatches: tuple[str, ...]
    rank: int | None = None
    error: float | None = None
    conditions: tuple[Condition, ...] = ()
    serve: str = ""


def write(
    engine: Engine,
    examples: Sequence[Example],
    directory: Path,
    *,
    dtype: str | None,
    revision: int,
    max_shard_size: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write the engine's weights as they are served, reload them, and compare greedy answers.

    ``max_shard_size`` is the size of one weight file, such as ``2GB``.  Raises UsageError for a
    quantized base, an unknown dtype, a malformed size, or a folder that is not empty.
    """
    quantization.refuse_whole_export(engine.base.model)
    if dtype and dtype not in _DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint="Known: fp32, bf16, fp16.")
    if max_shard_size and not re.fullmatch(r"[1-9][0-9]*(KB|MB|GB)", max_shard_size):
        raise UsageError(f"{max_shard_size!r} is not a file size", hint="Write it as 500MB or 2GB.")
    target_dtype = _DTYPES[dtype] if dtype else engine.base.dtype
    shards = {"max_shard_size": max_shard_size} if max_shard_size else {}
    with building(directory) as folder:
        _save(engine, folder, target_dtype, shards)
    progress("reloading the export and asking it again")
    report = compare(engine, loaded(engine, directory), examples, directory, revision)
    return replace(report, serve=shlex.join(["transformers", "serve", str(directory)]))


def loaded(engine: Engine, directory: Path) -> Any:
    """A new copy of an exported model, on the devices of the base model."""
    return loading.load(
        str(directory),
        known="",
        trust_remote_code=loading.has_own_code(engine.base.model),
        device_map=engine.base.loading.device_map,
    ).model


@contextmanager
def building(directory: Path) -> Iterator[Path]:
    """A folder to write into that is renamed to ``directory`` when the block succeeds.

    Raises UsageError if there is something there already.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UsageError(
            f"{directory} is not an empty folder", hint="Name a folder that is not there yet."
        )
    folder = temporary_path(directory.absolute())
    with disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            yield folder
            _let_others_read(folder)
            if directory.exists():
                directory.rmdir()
            os.replace(folder, directory)
            sync_directory(directory.absolute().parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _let_others_read(folder: Path) -> None:
    """Give every file the permissions of a new one: safetensors writes for its owner alone, and a
    server may run as another user.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _save(engine: Engine, folder: Path, dtype: torch.dtype, shards: Mapping[str, str]) -> None:
    """A fresh copy of the base model with the edited matrices put in, saved by transformers."""
    base = engine.base
    # Offloaded weights cannot be changed, so a model spread over devices is written from memory.
    fresh = loading.reload(base, device_map="cpu" if devices.is_spread(base.model) else None)
    engine.master.write_into(fresh.model)
    fresh.model.to(dtype)
    settings = getattr(fresh.model, "generation_config", None)
    if settings is not None and engine.renderer.end not in base.stops:
        # The model's turns end with this token; a server must stop there too.
        settings.eos_token_id = [*base.stops, engine.renderer.end]
    fresh.model.save_pretrained(folder, **shards)
    save_tokenizer(engine, folder)


def save_tokenizer(engine: Engine, folder: Path) -> None:
    """The tokenizer with its chat template, and the model's own code where it has some."""
    engine.base.tokenizer.save_pretrained(folder)
    source = Path(engine.base.path)
    if loading.has_own_code(engine.base.model) and source.is_dir():
        for path in sorted(source.glob("*.py")):  # transformers copies only what it sees imported
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def compare(
    engine: Engine, model: Any, examples: Sequence[Example], directory: Path, revision: int
) -> ExportReport:
    """Generate from the reloaded model and the store's: both must give the same answers."""
    longest = max((len(e.ids) - e.start for e in examples), default=0) + 1
    theirs, ours = (
        generation.generate(
            one, [e.ids[: e.start] for e in examples], end=engine.renderer.end, limit=longest
        )
        for one in (model, engine.base.model)
    )
    wrong = tuple(e.prompt for e, a, b in zip(examples, ours, theirs, strict=True) if a != b)
    probes = Score(len(examples) - len(wrong), len(examples), "generated")
    return ExportReport(path=str(directory), revision=revision, probes=probes, mismatches=wrong)
