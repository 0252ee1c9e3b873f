"""Parts that need a process of their own: kills, and the hostile store."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[3]
KILLS = [sys.executable, "-m", "tests.crash_rounds"]


@contextmanager
def _lines(words: list[str]) -> Iterator[IO[str]]:
    """What a process prints; it ends with the block."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        process.terminate()
        process.communicate()


def _begun(cases: Iterator[str | None]) -> Iterator[str | None]:
    """The same cases, when the first is there: loading and training a model is not counted."""
    return itertools.chain([one for _, one in zip(range(1), cases, strict=False)], cases)


def _rounds(lines: Iterator[str]) -> Iterator[str | None]:
    for line in lines:
        row = json.loads(line)
        if "wrong" in row:
            wrong = row["wrong"]
            yield f"{row['command']}, {row['point']}: {wrong}"[:300] if wrong else None


@contextmanager
def _at_steps(first: int, seed: int) -> Iterator[Iterator[str | None]]:
    with _lines([*KILLS, "--quick"]) as lines:
        rounds = _rounds(iter(lines))
        for _ in range(first):
            next(rounds, None)
        yield _begun(rounds)


@contextmanager
def _at_random(first: int, seed: int) -> Iterator[Iterator[str | None]]:
    with _lines([*KILLS, "--rounds", "100000", "--seed", str(seed + first)]) as lines:
        yield _begun(_rounds(iter(lines)))


@contextmanager
def _hostile(first: int, seed: int) -> Iterator[Iterator[str | None]]:
    words = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "tests/trust"]
    with _lines([*words, "-o", "console_output_style=classic"]) as lines:
        tests = (line.strip() for line in lines if line.startswith("tests/") and "::" in line)
        outcomes = (None if one.endswith("PASSED") else one[:300] for one in tests)
        for _ in range(first):
            next(outcomes, None)
        if not first:
            outcomes = itertools.chain([next(outcomes, "pytest ran no test")], outcomes)
        yield _begun(outcomes)


CASES: dict[str, Callable[[int, int], AbstractContextManager[Iterator[str | None]]]] = {
    "kills at each step of the journal": _at_steps,
    "kills at random moments of real edits": _at_random,
    "hostile stores": _hostile,
}
