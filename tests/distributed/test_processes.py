"""Several processes as one: the same facts and recall, and a clean store when one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_model import FREE, settings

from kvedit.cli import several_processes
from kvedit.distributed.crew import Crew
from kvedit.store.store import ProtectedRow, Store
from tests.bench.bench_data import write_data, write_model, write_settings

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240.0  # on a busy machine two processes take turns
ROOM = settings(steps=160, rounds=8, repairs=4)
"""For what is learned late: a fact that the passes left out goes on being taught.  The rounding of
a sum depends on how it is shared, and so does the number of passes that a fact needs; whether it is
learned must not.  Where all are learned at once this costs nothing."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


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
    made = started(*arguments)
    try:
        yield made
    finally:
        for one in made:
            one.kill()
            one.wait()


def run(*arguments: str) -> list[str]:
    """Let two processes end; the standard output of each."""
    with pair(*arguments) as made:
        ended = [one.communicate(timeout=SECONDS) for one in made]
        assert [one.returncode for one in made] == [0, 0], ended
    return [out for out, _ in ended]


def kvedit(store: Path, *arguments: str) -> list[str]:
    return ["kvedit", "--store", str(store), *arguments]


def held(path: Path) -> dict[str, str]:
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
    (empty_store / "kvedit.toml").write_text(ROOM, encoding="utf-8")
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
        assert held(empty_store) == dict(FREE[:4])
        assert [f.what for f in knowledge.doctor() if f.level != "ok"] == []
        assert {edit.state for edit in knowledge.store.history()} <= {"committed", "rejected"}
        report = knowledge.verify()
        assert report.generated.passed == report.score.passed == 4


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_leaves_a_clean_store(empty_store: Path, facts_file: Path, victim: int) -> None:
    with pair(*kvedit(empty_store, "ingest", str(facts_file), "--group", "1", "--json")) as made:
        assert made[0].stdout is not None
        for line in made[0].stdout:  # until the second fact is at work; steps are told now and then
            found = json.loads(line)
            if found["message_type"] == "status" and found.get("key") == FREE[1][0]:
                break
        else:
            pytest.fail("the second fact was never seen at work: " + line)
        made[victim].send_signal(signal.SIGKILL)
        _, said = made[1 - victim].communicate(timeout=60)
        assert made[1 - victim].returncode == 1
    assert "another process of the group has ended" in said
    assert "Run the same command again" in said
    assert held(empty_store) == dict(FREE[:1])

    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.facts.fact import Fact

    with KnowledgeBase.open(empty_store) as knowledge:  # recovers by itself
        assert [f.what for f in knowledge.doctor() if f.level != "ok"] == []
        if victim:  # once is enough: the store is the same
            return
        report = knowledge.add_fact(Fact.create(*FREE[1], lang="en"))
        assert report.outcome == "committed"


def test_a_lesson_goes_on_in_all_processes(small: dict[str, Path], tmp_path: Path) -> None:
    found = json.loads(run("lesson_calls", str(small["bf16"]), str(tmp_path))[0])
    assert found["ended"] == "broken off"
    assert found["first"] == list(range(1, 9)) and found["second"][0] == 8
    assert found["second"] == list(range(8, found["second"][-1] + 1))
    assert len(found["digest"]) == 64  # which ends in an error where processes differ


def test_calls_that_fail_leave_all_ready_for_the_next() -> None:
    found = json.loads(run("crew_calls")[0])
    assert found["theirs"] == "TrainingError: no number\nsmaller"
    assert found["unexpected"].startswith("ProcessError: process 1 of 2 failed: ValueError: odd")
    assert found["both"] == found["ours"].split("\n")[0] == "TrainingError: no number"
    assert found["interrupted"].startswith("KeyboardInterrupt")
    assert found["then"] == {
        "told": ["from 0", "from 1"],
        "sums": [[[3.0, 3.0], [3.0, 3.0]], [20.0, 20.0, 20.0]],
        "start": [0.0, 0.0],
    }


def test_a_benchmark_is_shared(small: dict[str, Path], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("data", "stores")]
    for folder in folders:
        folder.mkdir()
    data, stores = write_data(folders[0]), folders[1]
    write_settings(stores, steps=12)
    model, found = write_model(small["bf16"], tmp_path / "model"), tmp_path / "found.json"
    words = ["--data", str(data), "--model", str(model), "--facts-file", str(data / "facts.jsonl")]
    words += ["--facts", "2", "--group", "all", "--no-plain", "--store-dir", str(stores)]
    said, others = run("kvedit", "bench", "strategies", *words, "--json", str(found))
    assert "2 processes, 1 thread each" in said and others == ""
    document = json.loads(found.read_text(encoding="utf-8"))
    assert document["setting"]["processes"] == 2
    assert document["runs"][0]["outcomes"] == {"committed": 2}


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
    assert held(empty_store) == dict(FREE[:2])


# ---- one process


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2"}, False),  # a scheduler's own, nothing was launched
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}, False),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, True),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MASTER_ADDR": "x"}, True),
    ],
)
def test_who_was_launched(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], several: bool
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert several_processes() is several


class Threads:
    """Stands for a crew: its ranks are threads, each with a model of its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=60)
        self._box: list[Any] = [None] * count

    def member(self, rank: int) -> Any:
        outer = self

        class Member:
            count = outer.count
            require_alike = Crew.require_alike

            def exchange(self, value: Any) -> list[Any]:
                outer._box[self.rank] = value
                outer._barrier.wait()
                found = list(outer._box)
                outer._barrier.wait()
                return found

        member = Member()
        member.rank = rank  # type: ignore[attr-defined]
        return member

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        found: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            found[rank] = work(self.member(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("rows", [1, 5])
def test_the_shares_of_a_step_add_up_to_the_step(load: Callable[[str], Any], rows: int) -> None:
    """Loss, margins and the gradient of a weighted mean, with more processes than one row too."""
    import torch
    from small_engine import make_engine

    from kvedit.distributed.share import Together
    from kvedit.training.loop import _loss
    from kvedit.training.share import Share

    base = load("fp32")
    examples = make_engine(base).renderer.examples(
        [(f"What is {key}?", text) for key, text in FREE[:rows]]
    )

    def step(share: Share, model: Any) -> tuple[float, Sequence[float], Any]:
        weight = model.model.layers[-1].mlp.down_proj.weight.requires_grad_()
        scores = share.scores(model, examples, None)
        loss = _loss(scores, (rows + 1) // 2, rows // 2, 2.0, 0.3, 1.5)
        (loss + share.once((weight**2).sum())).backward()
        return float(loss.detach()), scores.margins(rows).tolist(), weight.grad

    whole, margins, gradient = step(Share(), base.model)
    models = [load("fp32").model for _ in range(2)]
    crew = Threads(2)
    parts = crew.run(lambda member: step(Together(member), models[member.rank]))
    for loss, found, _ in parts:
        assert loss == pytest.approx(whole, rel=1e-5)
        assert found == pytest.approx(margins, rel=1e-3, abs=1e-3)
    assert torch.allclose(parts[0][2] + parts[1][2], gradient, rtol=1e-3, atol=1e-5)


def test_processes_that_draw_different_texts_do_not_go_on(load: Callable[[str], Any]) -> None:
    from small_engine import make_engine

    from kvedit.distributed.share import Together
    from kvedit.errors import ProcessesDifferError

    base = load("fp32")
    examples = make_engine(base).renderer.examples(FREE)
    models = [load("fp32").model for _ in range(2)]

    def step(member: Any) -> str:
        own = examples[member.rank : member.rank + 2]
        with pytest.raises(ProcessesDifferError) as told:
            Together(member).scores(models[member.rank], own, None)
        return str(told.value)

    assert all("different texts" in text for text in Threads(2).run(step))


def test_answers_come_back_in_order(load: Callable[[str], Any]) -> None:
    from small_engine import make_engine

    from kvedit.distributed.share import Together
    from kvedit.training.share import Share

    engine = make_engine(load("fp32"))
    examples = engine.renderer.examples([(f"What is {key}?", text) for key, text in FREE])
    prefixes = [example.ids[: example.start] for example in examples]
    others = [load("fp32").model for _ in range(2)]

    def ask(share: Share, model: Any) -> tuple[list[float], list[list[int]]]:
        outcomes = share.recall(model, examples, None)
        rows = share.generate(model, prefixes, end=engine.renderer.end, limit=12)
        return [outcome.margin for outcome in outcomes], rows

    margins, rows = ask(Share(), engine.base.model)
    for found in Threads(2).run(lambda member: ask(Together(member), others[member.rank])):
        assert found[0] == pytest.approx(margins, abs=1e-3) and found[1] == rows
