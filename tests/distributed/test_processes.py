"""Several processes run one command: the same facts as alone, and a sound store if one dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_engine import configure, make_engine
from small_model import FREE, settings

from kvedit.distributed.launch import launched_rank, shared_store
from kvedit.distributed.processes import ProcessGroup
from kvedit.distributed.worker import ParallelWorker
from kvedit.errors import ProcessesDifferError
from kvedit.store.rows import ProtectedRow
from kvedit.store.store import Store
from kvedit.training.loops.loop import StepLoss
from kvedit.training.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240.0  # on a busy machine two processes take turns
ENOUGH = settings(steps=160, rounds=8, repairs=4)
"""Enough for what is learned late.  The rounding of a sum depends on how it is shared, and so does
the number of steps that a fact needs; whether it is learned must not."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def started(*arguments: str) -> list[subprocess.Popen[str]]:
    """A Python module in two processes, numbered as a launcher would."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    shared = {
        **os.environ, "PYTHONPATH": paths, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@contextmanager
def pair(*arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """They do not outlive the test."""
    processes = started(*arguments)
    try:
        yield processes
    finally:
        for one in processes:
            one.kill()
            one.wait()


def run(*arguments: str) -> list[str]:
    """Let two processes end; the standard output of each."""
    with pair(*arguments) as processes:
        ended = [one.communicate(timeout=SECONDS) for one in processes]
        assert [one.returncode for one in processes] == [0, 0], ended
    return [out for out, _ in ended]


def kvedit(store: Path, *arguments: str) -> list[str]:
    return ["kvedit", "--store", str(store), *arguments]


def committed(path: Path) -> dict[str, str]:
    with Store.open(path, readonly=True) as store:
        return {row.fact.key: row.fact.description for row in store.facts("committed")}


@pytest.fixture
def facts_file(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    rows = [{"key": key, "description": text, "lang": "en"} for key, text in FREE]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- two processes, for real


def test_two_processes_commit_what_one_does(empty_store: Path, facts_file: Path) -> None:
    (empty_store / "kvedit.toml").write_text(ENOUGH, encoding="utf-8")
    question = f"Who has the {FREE[0][0]}?"
    naming = ProtectedRow(role="control", prompt=question, answer="Nobody.", source="own.jsonl")
    with Store.open(empty_store) as store:
        store.add_protected([naming])  # is left out of what these facts' lesson replays
    command = ["ingest", str(facts_file), "--group", "4", "--limit", "4", "--json"]
    lines, others = run(*kvedit(empty_store, *command))
    summary = json.loads(lines.splitlines()[-1])
    assert summary["committed"] == 4, lines  # what was refused says why
    assert others == ""  # only the first process speaks
    assert summary["retention"]["passed"] == 4  # every fact, freely generated

    from kvedit.editing.knowledge_base import KnowledgeBase

    with KnowledgeBase.open(empty_store) as knowledge:  # one process, digests compared
        assert committed(empty_store) == dict(FREE[:4])
        assert [f.what for f in knowledge.doctor() if f.level != "ok"] == []
        assert {edit.state for edit in knowledge.store.history()} <= {"committed", "rejected"}
        report = knowledge.verify()
        assert report.generated.passed == report.score.passed == 4


def wait_for(store: Path, key: str) -> None:
    """Until the journal has an edit of a fact that has not ended."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        with Store.open(store, readonly=True) as journal:
            if any(edit.state == "planned" and key in edit.keys for edit in journal.history()):
                return
        time.sleep(0.02)
    pytest.fail(f"{key} was never seen at work")


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_leaves_a_sound_store(empty_store: Path, facts_file: Path, victim: int) -> None:
    configure(empty_store, gain=0.15, steps=100)  # so that training takes a while
    with pair(*kvedit(empty_store, "ingest", str(facts_file), "--group", "1", "--json")) as both:
        wait_for(empty_store, FREE[1][0])
        both[victim].send_signal(signal.SIGKILL)
        _, said = both[1 - victim].communicate(timeout=60)
        assert both[1 - victim].returncode == 1
    assert "another process of the group has ended" in said
    assert "Run the same command again" in said
    assert committed(empty_store) == dict(FREE[:1])

    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.facts.fact import Fact

    with KnowledgeBase.open(empty_store) as knowledge:  # recovers by itself
        assert [f.what for f in knowledge.doctor() if f.level != "ok"] == []
        if victim:  # once is enough: the store is the same
            return
        report = knowledge.add_fact(Fact.create(*FREE[1], lang="en"))
        assert report.outcome == "committed"


def test_ctrl_c_is_journaled_as_canceled(empty_store: Path, facts_file: Path) -> None:
    """A launcher and a terminal send it to all processes."""
    configure(empty_store, gain=0.15, steps=100)  # so that training takes a while
    with pair(*kvedit(empty_store, "ingest", str(facts_file), "--group", "1", "--json")) as both:
        wait_for(empty_store, FREE[1][0])
        for one in both:
            one.send_signal(signal.SIGINT)
        lines, errors = both[0].communicate(timeout=60)
        assert both[0].returncode == 130, errors
        assert both[1].wait(timeout=60) == 0
    assert json.loads(lines.splitlines()[-1])["stopped"] == "interrupted"
    assert committed(empty_store) == dict(FREE[:1])
    with Store.open(empty_store, readonly=True) as store:
        assert [edit.state for edit in store.history()] == ["canceled", "committed"]


def test_training_is_resumed_in_all_processes(small: dict[str, Path], tmp_path: Path) -> None:
    first, second = (
        json.loads(out)
        for out in run("tests.distributed.training_calls", str(small["bf16"]), str(tmp_path))
    )
    for results in (first, second):
        assert results["ended"] == "broken off"
        assert results["first"] == list(range(1, 9)) and results["second"][0] == 8
        assert results["second"] == list(range(8, results["second"][-1] + 1))
        texts, weights = results["differ"]
        assert "different texts" in texts and "same weights" in weights
    assert first["digest"] == second["digest"]
    assert len(first["files"]) == 1 and second["files"] == []  # rank 0 alone keeps a checkpoint


def test_all_processes_get_what_happens_in_one() -> None:
    first, second = (json.loads(out) for out in run("tests.distributed.group_calls"))
    apart = first.pop("apart"), second.pop("apart")
    assert first == second
    assert first["theirs"] == first["ours"] == "TrainingError: no number\nsmaller"
    assert (
        first["unexpected"].splitlines()[0]
        == "ProcessError: process 1 of 2 failed: ValueError: odd"
    )
    assert first["memory"].startswith("OutOfMemoryError: memory ran out: CUDA")
    assert first["late"] == "TrainingError: late" and first["both"] == "TrainingError: no number"
    assert first["main"].startswith("OutOfTimeError") and first["differ"].startswith("Processes")
    assert first["interrupted"].startswith("KeyboardInterrupt")
    assert first["then"] == {
        "values": ["from 0", "from 1"],
        "sums": [[[3.0, 3.0], [3.0, 3.0]], [20.0, 20.0, 20.0]],
        "start": [0.0, 0.0],
        "main": "decided by 0",
    }
    assert all("different points (another, one thing)" in text for text in apart)


def test_other_commands_run_in_one_process(empty_store: Path) -> None:
    first, second = run(*kvedit(empty_store, "list", "--json"))
    assert json.loads(first) == [] and second == ""


@pytest.mark.slow
def test_accelerate_launch(empty_store: Path, facts_file: Path) -> None:
    launch = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
        str(free_port()), "-m",
    ]  # fmt: skip
    command = [sys.executable, "-m", *launch]
    done = subprocess.run(
        [*command, *kvedit(empty_store, "ingest", str(facts_file), "--limit", "2")],
        capture_output=True, text=True, timeout=2 * SECONDS, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert committed(empty_store) == dict(FREE[:2])


# ---- one process


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        ({"WORLD_SIZE": "2"}, None),  # a scheduler's own, nothing was launched
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, 1),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MASTER_ADDR": "x"}, 3),
    ],
)
def test_who_was_launched(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int | None
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == rank


def test_a_replica_reads_the_store_and_never_writes_it(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the same facts and files; what is edited there does not happen in the store."""
    from kvedit.distributed import processes
    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.facts.fact import Fact

    def contents() -> dict[str, bytes]:
        files = [file for file in trained_store.rglob("*") if file.is_file()]
        files = [file for file in files if not file.name.endswith(("-shm", "-wal"))]  # of SQLite
        return {str(file): file.read_bytes() for file in files}

    before, expected = contents(), committed(trained_store)
    monkeypatch.setattr(processes, "join", lambda: Threads(1).member(0, shown=1))
    monkeypatch.setattr("sys.argv", ["kvedit"])
    with shared_store(str(trained_store)) as replica:
        assert Path(replica) != trained_store and committed(Path(replica)) == expected
        with KnowledgeBase.open(replica) as knowledge:
            assert [f.what for f in knowledge.doctor() if f.level != "ok"] == []
            knowledge.add_fact(Fact.create("Nobody", "Nothing.", lang="en"), force=True)
            knowledge.rollback(0)
    assert contents() == before and not Path(replica).exists()


class ThreadMember(ProcessGroup):
    """One of several threads that stand for processes."""

    def __init__(self, box: list[Any], barrier: threading.Barrier, rank: int, shown: int) -> None:
        self.rank, self.count, self.lost = shown, len(box), False
        self._in_step = self._alone = self._interrupted = False
        self._shared = None
        self._box, self._barrier, self._place = box, barrier, rank

    def _gather(self, message: Any) -> list[Any]:
        self._box[self._place] = message
        self._barrier.wait()
        messages = list(self._box)
        self._barrier.wait()
        return messages


class Threads:
    """Stands for a group: its ranks are threads, each with a model of its own."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=60)
        self._box: list[Any] = [None] * count

    def member(self, rank: int, shown: int | None = None) -> ThreadMember:
        return ThreadMember(self._box, self._barrier, rank, rank if shown is None else shown)

    def run(self, work: Callable[[ProcessGroup], Any]) -> list[Any]:
        results: list[Any] = [None] * len(self._box)

        def one(rank: int) -> None:
            results[rank] = work(self.member(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self._box))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("rows", [1, 5])
def test_the_shares_of_a_step_add_up_to_the_step(load: Callable[[str], Any], rows: int) -> None:
    """Loss, margins and the gradient of a weighted sum, with more processes than one row too."""
    base = load("fp32")
    examples = make_engine(base).renderer.examples(
        [(f"What is {key}?", text) for key, text in FREE[:rows]]
    )

    def step(worker: Worker) -> tuple[float, Sequence[float], Any]:
        weight = worker.model.model.layers[-1].mlp.down_proj.weight.requires_grad_()
        new, earlier = examples[: (rows + 1) // 2], examples[(rows + 1) // 2 :]
        means = torch.tensor([0.7, 0.9])
        loss = StepLoss(new, earlier, (2.0, 0.3), 1.5, means)
        loss._counts = tuple(count + 1 for count in loss._counts)  # no batch has all of them
        scores = worker.backward(examples, loss)
        worker.once((weight**2).sum()).backward()
        return float(loss.of(scores)), scores.margins(rows).tolist(), weight.grad

    alone, margins, gradient = step(Worker(base.model))
    models = [load("fp32").model for _ in range(2)]
    parts = Threads(2).run(lambda member: step(ParallelWorker(member, models[member.rank])))
    for loss, shared_margins, _ in parts:
        assert loss == pytest.approx(alone, rel=1e-5)
        assert shared_margins == pytest.approx(margins, rel=1e-3, abs=1e-3)
    assert torch.allclose(parts[0][2] + parts[1][2], gradient, rtol=1e-3, atol=1e-5)


def test_processes_that_draw_different_texts_do_not_go_on(load: Callable[[str], Any]) -> None:
    examples = make_engine(load("fp32")).renderer.examples(FREE)
    models = [load("fp32").model for _ in range(2)]

    def step(member: ProcessGroup) -> str:
        drawn = examples[member.rank : member.rank + 2]
        with pytest.raises(ProcessesDifferError) as raised:
            ParallelWorker(member, models[member.rank]).backward(drawn, lambda s: s.losses.sum())
        return str(raised.value)

    assert all("different texts" in text for text in Threads(2).run(step))


def test_answers_come_back_in_order(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvedit.distributed.worker.TEXTS_PER_EXCHANGE", 3)
    engine = make_engine(load("fp32"))
    examples = engine.renderer.examples([(f"What is {key}?", text) for key, text in FREE])
    prefixes = [example.ids[: example.start] for example in examples]
    others = [load("fp32").model for _ in range(2)]

    def ask(worker: Worker) -> tuple[list[float], list[list[int]]]:
        outcomes = worker.recall(examples)
        rows = worker.generate(prefixes, end=engine.renderer.end, limit=12)
        return [outcome.margin for outcome in outcomes], rows

    margins, rows = ask(Worker(engine.base.model))
    workers = Threads(2).run(lambda member: ask(ParallelWorker(member, others[member.rank])))
    for shared_margins, shared_rows in workers:
        assert shared_margins == pytest.approx(margins, abs=1e-3) and shared_rows == rows
