"""All faults in one table: each part for a budget, in slices that add up.

Invariants:
- A part goes on at the first case that the slice before it did not reach; counts are added up.
- Each failure stands with a command line that repeats it.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvedit.bench.tables import Table
from kvedit.events import Event, Status
from tests.bench.faults import fuzz, processes, steps

TESTS = Path(__file__).parents[2]
if str(TESTS) not in sys.path:  # where the tests' own helpers are
    sys.path.insert(0, str(TESTS))
MEMORY = Path("/dev/shm")  # thousands of fsyncs take minutes on a disk
FAILURES = 20  # that are kept of a part
Emit = Callable[[Event], None]
Cases = Iterator[str | None]
"""What went wrong in each case, None where nothing did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOptions:
    """``seconds`` and ``limit`` (cases) bound each part; a limit of 0 is none."""

    parts: tuple[str, ...] = ()
    seconds: float = 5.0
    limit: int = 0
    first: int | None = None
    seed: int = 0
    kept: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """``tried`` cases up to ``next``, of which ``failed`` were not survived or clean."""

    name: str
    tried: int = 0
    failed: int = 0
    next: int = 0
    seconds: float = 0.0
    complete: bool = False
    failures: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class FaultResult:
    """All parts, those of earlier slices with them."""

    parts: tuple[Part, ...]
    sound: bool


@contextmanager
def _fuzz_cases(name: str, first: int, seed: int) -> Iterator[Cases]:
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        target = fuzz.TARGETS[name](Path(folder))
        try:
            yield (
                fuzz.fault_of(target, target.make(fuzz.generator(seed, name, number)))
                for number in itertools.count(first)
            )
        finally:
            target.close()


@contextmanager
def _step_cases(name: str, first: int, seed: int) -> Iterator[Cases]:
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield steps.CASES[name](Path(folder), first)


@contextmanager
def _process_cases(name: str, first: int, seed: int) -> Iterator[Cases]:
    with processes.CASES[name](first, seed) as cases:
        yield cases


KINDS: dict[str, Callable[[str, int, int], Any]] = {
    **dict.fromkeys(processes.CASES, _process_cases),
    **dict.fromkeys(steps.CASES, _step_cases),
    **dict.fromkeys(fuzz.TARGETS, _fuzz_cases),
}
NAMES = tuple(KINDS)


def faults(options: FaultOptions, emit: Emit) -> FaultResult:
    """Run a slice of each part, and add it to what was kept."""
    before = _kept(options.kept)
    for name in options.parts or NAMES:
        emit(Status(phase="faults", text=f"{name}: {options.seconds:g} s at most"))
        before[name] = _slice(before.get(name, Part(name=name)), options)
    parts = tuple(before[name] for name in NAMES if name in before)
    return FaultResult(parts, not any(part.failed for part in parts))


def _kept(file: Path | None) -> dict[str, Part]:
    if file is None or not file.is_file():
        return {}
    rows = json.loads(file.read_text(encoding="utf-8"))["parts"]
    return {row["name"]: Part(**{**row, "failures": tuple(row["failures"])}) for row in rows}


def _slice(part: Part, options: FaultOptions) -> Part:
    """One part for its budget; one that has come to its end is not begun again."""
    if part.complete and options.first is None:
        return part
    tried, failed = 0, 0
    failures = list(part.failures)
    first = part.next if options.first is None else options.first
    complete = False
    with KINDS[part.name](part.name, first, options.seed) as cases:
        began = time.monotonic()  # setting up is not counted
        while time.monotonic() - began < options.seconds and tried != (options.limit or -1):
            try:
                what = next(cases)
            except StopIteration:
                complete = True
                break
            if what is not None:
                failed += 1
                line = repeat(part.name, options.seed, first + tried)
                failures.append({"what": what, "repeat": line})
            tried += 1
    return replace(
        part, tried=part.tried + tried, failed=part.failed + failed, next=first + tried,
        seconds=round(part.seconds + time.monotonic() - began, 1), complete=complete,
        failures=tuple(failures[:FAILURES]),
    )  # fmt: skip


def repeat(name: str, seed: int, number: int) -> str:
    """The command line of one case."""
    return (
        f"python -m tests.bench faults --part '{name}' --seed {seed} --first {number} --limit 1"
        " --seconds 600"
    )


def tables(result: FaultResult) -> list[Table]:
    """One table of parts, one of failures where there are some."""
    rows = tuple(
        (part.name, f"{part.tried:,}" + (" (all there are)" if part.complete else ""),
         f"{part.tried - part.failed:,}", f"{part.failed:,}", f"{part.seconds:,.0f}")
        for part in result.parts
    )  # fmt: skip
    columns = ("part", "tried", "survived or clean", "failed", "seconds")
    shown = [Table("Faults and inputs", columns, rows)]
    failures = tuple((part.name, one["what"], one["repeat"]) for part in result.parts
                     for one in part.failures)  # fmt: skip
    if failures:
        shown.append(Table("What failed", ("part", "what", "repeat"), failures))
    return shown
