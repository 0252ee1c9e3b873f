"""The same ingest in one process and in several, and in several of which one is killed.

The command is the one that users run; processes are numbered as a launcher would, each with as many
threads as the single one has.

Invariants:
- Every run begins with a copy of one store, made once.
- What a run came to is read from its store by one process, which replays the journal and asks for
  every fact again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvedit.bench.tables import Table
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import KveditError
from kvedit.events import Score, Status
from kvedit.facts.fact import Fact
from kvedit.model import loading
from tests.bench import questions
from tests.bench.kills import DONE, KILLED, RUN, closed_store, line
from tests.bench.retain import BenchOptions, Emit

ENDED = 1
"""The exit code of a process whose group has broken."""
PATIENCE = 120.0
"""Seconds in which those that are left must have noticed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralOptions(BenchOptions):
    """``processes`` are compared with one, each with its number of ``threads``."""

    facts: int = 16
    processes: int = 2
    threads: int = 1
    group: str = "8"


@dataclass(frozen=True, slots=True)
class StoreState:
    """A store as one process finds it: the committed keys, those recalled (teacher-forced under all
    training prompts, and freely generated under one), and what ``doctor`` has to say beyond "ok".
    """

    committed: tuple[str, ...]
    recalled: tuple[str, ...]
    generated: Score
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """An ingest that was let finish."""

    processes: int
    seconds: float
    exit_codes: tuple[int, ...]
    state: StoreState


@dataclass(frozen=True, slots=True)
class Death:
    """An ingest of which process ``victim`` was killed in the middle of a task; ``noticed`` is
    how long the others took to end, in seconds; then the same command ran again, in one process.
    """

    victim: int
    noticed: float
    exit_codes: tuple[int, ...]
    left: StoreState
    after: Run


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralResult:
    """The run in one process, the one in several, and what became of killed ones."""

    facts: int
    alone: Run
    together: Run
    deaths: tuple[Death, ...]

    @property
    def equal(self) -> bool:
        """Whether several processes committed and recalled what one did."""
        one, many = self.alone.state, self.together.state
        same = one.committed == many.committed and one.recalled == many.recalled
        return same and one.generated == many.generated and not many.findings

    @property
    def clean(self) -> bool:
        """Whether every death left a sound store, in which the same command went on."""
        return all(_clean(death, self.alone) for death in self.deaths)


def _clean(death: Death, alone: Run) -> bool:
    others = [code for rank, code in enumerate(death.exit_codes) if rank != death.victim]
    ended = death.exit_codes[death.victim] == KILLED and set(others) == {ENDED}
    after = death.after.state
    went_on = set(death.left.committed) <= set(after.committed) == set(alone.state.committed)
    return ended and went_on and not death.left.findings and not after.findings


def several(options: SeveralOptions, emit: Emit) -> SeveralResult:
    """Ingest facts in one process, in several, and in several of which one is killed."""
    source = loading.locate(options.model)
    data = questions.load(options.data, source)
    facts = questions.new_facts(data, options.facts, options.facts_file, options.kind)
    with (
        closed_store(options, emit) as store,
        TemporaryDirectory(prefix="kvedit-several-") as folder,
    ):
        bench = _Bench(store, Path(folder), options, emit)
        bench.write(facts)
        alone, together = bench.whole(1), bench.whole(options.processes)
        deaths = tuple(bench.death(victim) for victim in (0, options.processes - 1))
    return SeveralResult(facts=len(facts), alone=alone, together=together, deaths=deaths)


class _Bench:
    """Runs of one command on copies of one store."""

    def __init__(self, store: Path, folder: Path, options: SeveralOptions, emit: Emit) -> None:
        self._store, self._folder = store, folder
        self._options, self._emit = options, emit

    def write(self, facts: Sequence[Fact]) -> None:
        """The facts, as a file to be ingested."""
        text = "".join(map(line, facts))
        (self._folder / "facts.jsonl").write_text(text, encoding="utf-8")

    def whole(self, processes: int) -> Run:
        """An ingest that nothing happens to."""
        self._emit(Status(phase=f"ingest in {processes}"))
        return self._finish(self._copy(), processes)

    def death(self, victim: int) -> Death:
        """An ingest of which one process is killed, and what it left."""
        self._emit(Status(phase=f"ingest in {self._options.processes}, number {victim} is killed"))
        store = self._copy()
        with self._started(store, self._options.processes) as made:
            _second_task(made[0])
            made[victim].send_signal(signal.SIGKILL)
            began = time.monotonic()
            codes = tuple(one.wait(PATIENCE) for one in made)
            noticed = time.monotonic() - began
        return Death(victim, noticed, codes, _look(store), self._finish(store, 1))

    def _finish(self, store: Path, processes: int) -> Run:
        began = time.monotonic()
        with self._started(store, processes) as made:
            for _ in made[0].stdout or ():  # what is not read would fill the pipe
                pass
            codes = tuple(one.wait() for one in made)
        spent = time.monotonic() - began
        if not set(codes) <= set(DONE):
            raise KveditError(
                f"kvedit ingest in {processes} ended with exit codes {codes}",
                hint=f"Run it by hand: {' '.join(self._command(store)[3:])}",
            )
        return Run(processes, spent, codes, _look(store))

    def _copy(self) -> Path:
        target = self._folder / "store"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self._store, target))

    def _command(self, store: Path) -> list[str]:
        return [
            sys.executable, "-c", RUN, "--store", str(store),
            "ingest", str(self._folder / "facts.jsonl"), "--group", self._options.group, "--json",
        ]  # fmt: skip

    @contextmanager
    def _started(self, store: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
        """The processes, which do not outlive the block; the first one's answers can be read."""
        shared = {**os.environ, "OMP_NUM_THREADS": str(self._options.threads)}
        if count > 1:
            port = str(_free_port())
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        made: list[subprocess.Popen[str]] = []
        try:
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
                out = subprocess.DEVNULL if rank else subprocess.PIPE
                made.append(self._process(store, {**shared, **own}, out))
            yield made
        finally:
            for one in made:
                one.kill()
                one.wait()

    def _process(self, store: Path, environment: dict[str, str], out: int) -> Any:
        """One process of the command; it says nothing but what ``out`` takes."""
        return subprocess.Popen(
            self._command(store),
            env=environment,
            text=True,
            stdout=out,
            stderr=subprocess.DEVNULL,
        )


def _second_task(leader: subprocess.Popen[str]) -> None:
    """Wait until something was committed and the next task has begun."""
    committed = False
    for row in leader.stdout or ():
        message: dict[str, Any] = json.loads(row)
        committed |= message.get("outcome") == "committed"
        if committed and message.get("loss") is not None:
            return
    raise KveditError(
        "the ingest ended before one of its processes could be killed",
        hint="Give more --facts, or a smaller --group.",
    )


def _look(store: Path) -> StoreState:
    with KnowledgeBase.open(store) as knowledge:
        findings = tuple(f.what for f in knowledge.doctor(deep=True) if f.level != "ok")
        report = knowledge.verify()
        return StoreState(
            committed=tuple(sorted(knowledge.store.keys("committed"))),
            recalled=tuple(sorted(check.key for check in report.checks if check.passed)),
            generated=report.generated,
            findings=findings,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tables(result: SeveralResult) -> list[Table]:
    """The runs, and what became of those that lost a process."""
    columns = ("processes", "exit codes", "committed", "recalled", "generated", "doctor", "seconds")
    runs = (result.alone, result.together)
    deaths = ("killed", "exit codes", "the others ended after, s", "committed then", "doctor then")
    return [
        Table(
            f"Ingest of {result.facts}: the same facts committed and recalled:"
            f" {'yes' if result.equal else 'NO'}",
            columns,
            tuple(_run_row(run) for run in runs),
        ),
        Table(
            f"One of {result.together.processes} killed: clean: {'yes' if result.clean else 'NO'}",
            (*deaths, *(f"run again: {name}" for name in columns[2:])),
            tuple(_death_row(death) for death in result.deaths),
        ),
    ]


def _run_row(run: Run) -> tuple[str, ...]:
    state, codes = run.state, ", ".join(map(str, run.exit_codes))
    return (
        str(run.processes), codes, str(len(state.committed)), str(len(state.recalled)),
        f"{state.generated.passed} of {state.generated.n}", "; ".join(state.findings) or "nothing",
        f"{run.seconds:.1f}",
    )  # fmt: skip


def _death_row(death: Death) -> tuple[str, ...]:
    return (
        f"process {death.victim}", ", ".join(map(str, death.exit_codes)), f"{death.noticed:.1f}",
        str(len(death.left.committed)), "; ".join(death.left.findings) or "nothing",
        *_run_row(death.after)[2:],
    )  # fmt: skip
