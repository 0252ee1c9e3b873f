"""An ingest that is killed again and again, and what is left of it.

The command is the one that users run, in a process of its own, ended by SIGKILL at random moments,
spread over the whole run; after each kill the store is read as it lies, at the end the command runs
until it has finished.

Invariants:
- Nothing is repaired, retried or asked of the killed process: the next run of the command is the
  only recovery there is.
- What counts is read from the store and replayed by ``doctor``, not taken from the command's words.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import KveditError
from kvedit.events import Status
from kvedit.facts.fact import Fact
from kvedit.model import loading
from kvedit.store.store import Store
from tests.bench import questions
from tests.bench.retain import BenchOptions, Emit, engine_of, new_store

KILLED = -signal.SIGKILL
DONE = (0, 3)  # 3: some facts were rejected
LOOK = 1.0  # seconds from one look at the store to the next
RUN = "from kvedit.cli import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class KillOptions(BenchOptions):
    """``kills`` processes are killed, each when its share of the facts is decided, at a random
    moment of the next ``within`` seconds.
    """

    facts: int = 300
    kills: int = 20
    within: float = 30.0
    group: str = "16"


@dataclass(frozen=True, slots=True)
class Round:
    """One process: how long it ran, how it ended, and the facts that were committed after it."""

    seconds: float
    exit_code: int
    committed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KillsResult:
    """What the store says at the end.

    ``lost`` are keys that were committed after some round and not at the end, ``twice`` those with
    more than one committed addition; ``findings`` are what ``doctor`` has to say beyond "ok", with
    every revision replayed; ``same_digest`` whether the served weights are the recorded ones.
    """

    model: str
    facts: int
    rounds: tuple[Round, ...]
    outcomes: dict[str, int]
    interrupted: int
    lost: tuple[str, ...]
    twice: tuple[str, ...]
    findings: tuple[str, ...]
    same_digest: bool

    @property
    def killed(self) -> int:
        """How many processes were killed while they ran."""
        return sum(one.exit_code == KILLED for one in self.rounds)

    @property
    def sound(self) -> bool:
        """Whether the run finished and nothing was lost, done twice or damaged."""
        finished = self.rounds[-1].exit_code in DONE and not self.outcomes.get("pending")
        return finished and self.same_digest and not (self.lost or self.twice or self.findings)


def kills(options: KillOptions, emit: Emit) -> KillsResult:
    """Ingest facts into a new store, killed ``options.kills`` times, then left to finish."""
    source = loading.locate(options.model)
    facts = questions.new_facts(
        questions.load(options.data, source), options.facts, options.facts_file, options.kind
    )
    with (
        closed_store(options, emit) as folder,
        TemporaryDirectory(prefix="kvedit-kills-") as scratch,
    ):
        file = Path(scratch) / "facts.jsonl"
        file.write_text("".join(line(fact) for fact in facts), encoding="utf-8")
        own = replace(options, facts=len(facts))  # there may be fewer than were asked for
        rounds, lost = _run(folder, file, own, emit)
        return _judge(folder, facts, rounds, lost, emit)


@contextmanager
def closed_store(options: BenchOptions, emit: Emit) -> Iterator[Path]:
    """A new store that nobody has open: what follows is for other processes."""
    with TemporaryDirectory(prefix="kvedit-kills-") as scratch:
        folder = options.store_dir or Path(scratch) / "store"
        with new_store(replace(options, store_dir=folder), emit):
            pass
        yield folder


def line(fact: Fact) -> str:
    """A fact as a line of JSON, with all that it is trained on and asked."""
    return json.dumps(fact.to_json(), ensure_ascii=False) + "\n"


def _run(
    folder: Path, file: Path, options: KillOptions, emit: Emit
) -> tuple[tuple[Round, ...], tuple[str, ...]]:
    """All rounds, and the keys that were committed once and are no more."""
    rng = random.Random(options.seed)
    command = [
        sys.executable, "-c", RUN, "--store", str(folder), "--quiet",
        "ingest", str(file), "--group", options.group,
    ]  # fmt: skip
    rounds: list[Round] = []
    seen: set[str] = set()
    while True:
        killed = sum(one.exit_code == KILLED for one in rounds)
        left = options.kills - killed
        after = options.facts * killed // options.kills if left else None
        began = time.monotonic()
        code = _process(command, folder, after, rng.uniform(0.0, options.within))
        keys = _keys(folder, "committed")
        seen |= keys
        rounds.append(Round(time.monotonic() - began, code, len(keys)))
        left -= code == KILLED
        emit(Status(phase=f"{left} kills to go", step=len(keys), total=options.facts))
        if code not in (KILLED, *DONE):
            raise KveditError(
                f"kvedit ingest ended with exit code {code} after {len(rounds)} rounds",
                hint=f"Run it by hand: {' '.join(command[3:])}",
            )
        if code in DONE:
            return tuple(rounds), tuple(sorted(seen - keys))


def _process(command: Sequence[str], folder: Path, after: int | None, seconds: float) -> int:
    """Run a command, and kill it ``seconds`` after ``after`` facts were decided; its exit code."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while after is None or len(_keys(folder, "committed", "rejected")) < after:
            if (code := _ended(process, LOOK)) is not None:
                return code
        if (code := _ended(process, seconds)) is not None:
            return code
        process.send_signal(signal.SIGKILL)
        return process.wait()
    except BaseException:
        process.kill()
        raise


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """A process's exit code, if it ends within these seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _keys(folder: Path, *states: str) -> set[str]:
    store = Store.open(folder, readonly=True)
    try:
        return {key for state in states for key in store.keys(state)}
    finally:
        store.close()


def _judge(
    folder: Path,
    facts: Sequence[Fact],
    rounds: tuple[Round, ...],
    lost: tuple[str, ...],
    emit: Emit,
) -> KillsResult:
    emit(Status(phase="replaying every revision"))
    with KnowledgeBase.open(folder, on_event=emit) as knowledge:
        store = knowledge.store
        recorded = store.revision(store.head()).weights_digest
        engine = engine_of(knowledge)
        same = recorded == engine.master.digest()
        findings = [one.what for one in knowledge.doctor(deep=True) if one.level != "ok"]
        states = Counter(row.state for row in store.facts())
        edits = store.history()
        # By the reports: an edit that is a compaction is also about what was added before.
        added = Counter(
            key
            for edit in edits
            if edit.kind == "add" and edit.state == "committed"
            for key in cast("list[str]", edit.report["keys"])
        )
        return KillsResult(
            model=engine.base.name,
            facts=len(facts),
            rounds=rounds,
            outcomes=dict(states),
            interrupted=sum(edit.state == "failed" for edit in edits),
            lost=lost,
            twice=tuple(sorted(key for key, count in added.items() if count > 1)),
            findings=tuple(findings),
            same_digest=same,
        )
