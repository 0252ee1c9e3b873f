"""Lessons that were broken off go on from where they stood."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_engine import make_engine
from small_model import FREE

from kvedit.adapter.deltas import to_bytes
from kvedit.config import GroupConfig
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import OutOfTimeError
from kvedit.facts.fact import Fact
from kvedit.training import resume
from kvedit.training.engine import Engine
from kvedit.training.loop import Step, Task
from kvedit.training.resume import State, TrainingCheckpoints

GROUP = GroupConfig(
    batch_size=2,
    epochs=8,
    refine_epochs=4,
    refine_rounds=2,
    penalty_scale=60.0,
    rehearsal_ratio=1.0,
)


class Broken(Exception):
    """Ends a lesson between two steps."""


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "EVERY", -1.0)
    monkeypatch.setattr(resume, "SHARE", 1e9)


def task(engine: Engine) -> Task:
    own = [engine.examples(Fact.create(*pair, lang="en")) for pair in FREE[:6]]
    engine.measure_reference([e for fact in own[4:] for e in fact])
    return Task(own[:3], own[3:4], engine.reference_texts, 1)


def taught(
    engine: Engine, *, until: int = 0, kept: TrainingCheckpoints | None = None
) -> tuple[Any, list[Step]]:
    """The lesson in a group, broken off after a step; what was made of it, and the steps."""
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        if until and step.step > until:
            raise Broken

    try:
        made = engine.train(task(engine), None, on_step, GROUP, kept)
    except Broken:
        made = None
    return made, steps


def test_what_other_code_kept_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = TrainingCheckpoints(tmp_path / "cache")
    kept.keep("name", lambda: {"step": 3})
    assert kept.find("name") == {"step": 3}
    monkeypatch.setattr(resume, "FORMAT", resume.FORMAT + 1)
    assert kept.find("name") is None
    kept.clear()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_lesson_goes_on_as_if_nothing_had_been(engine: Engine, tmp_path: Path) -> None:
    whole, steps = taught(engine)
    phases = [step.phase for step in steps]
    assert list(dict.fromkeys(phases)) == ["learn", "prune", "hold", "again"]
    ends = [phases.index(phase) for phase in ("prune", "hold", "again")]
    for until in (1, *ends, ends[-1] + 2, len(steps) - 1):  # at each turn, and in a round
        kept = TrainingCheckpoints(tmp_path)
        assert taught(engine, until=until, kept=kept)[0] is None
        again, rest = taught(engine, kept=kept)
        assert rest == steps[until:]
        assert to_bytes(again.delta) == to_bytes(whole.delta)
        assert again.trained == whole.trained
        kept.clear()


def test_another_process_goes_on(
    load: Callable[[str], Any], engine: Engine, tmp_path: Path
) -> None:
    whole, steps = taught(engine)
    taught(make_engine(load("bf16")), until=7, kept=TrainingCheckpoints(tmp_path))
    told: list[str] = []
    assert whole.resumed_seconds == 0.0
    again, rest = taught(
        make_engine(load("bf16")), kept=TrainingCheckpoints(tmp_path, say=told.append)
    )
    assert [step.step for step in rest] == [step.step for step in steps[7:]]
    assert again.trained.steps == whole.trained.steps
    assert again.resumed_seconds > 0
    assert told == ["going on with what was being taught when kvedit ended"]


@pytest.mark.parametrize("changed", ["facts", "settings", "weights"])
def test_another_lesson_begins_at_the_beginning(
    engine: Engine, tmp_path: Path, changed: str
) -> None:
    taught(engine, until=5, kept=TrainingCheckpoints(tmp_path))
    own, group = task(engine), GROUP
    if changed == "facts":
        own = replace(own, new=own.new[:2])
    elif changed == "settings":
        group = replace(GROUP, epochs=9)
    else:
        engine.master.add(engine.train(Task(own.new[:1])).delta)
    steps: list[Step] = []
    engine.train(own, None, steps.append, group, TrainingCheckpoints(tmp_path))
    assert steps[0].step == 1


# ---- the files


def state(number: float) -> Callable[[], State]:
    return lambda: {
        "part": torch.full((64,), number),
        "margins": {3: 0.1},
        "rng": (3, (1, 2), None),
    }


def test_the_latest_state_is_found_to_the_bit(tmp_path: Path) -> None:
    kept = TrainingCheckpoints(tmp_path / "cache")  # a folder that may not be there yet
    assert kept.find("a" * 64) is None
    for number in (1.0, 0.1):
        kept.keep("a" * 64, state(number))
    kept.keep("b" * 64, state(2.0))
    found = TrainingCheckpoints(tmp_path / "cache").find("a" * 64)
    assert found is not None and torch.equal(found["part"], torch.full((64,), 0.1))
    assert (found["margins"], found["rng"]) == ({3: 0.1}, (3, (1, 2), None))
    kept.clear()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "turned", "empty"])
def test_a_damaged_one_is_none(tmp_path: Path, damage: str) -> None:
    TrainingCheckpoints(tmp_path).keep("a" * 64, state(1.0))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-9], "turned": data, "empty": b""}[damage])
    assert TrainingCheckpoints(tmp_path).find("a" * 64) is None
    assert not path.exists()


def test_they_are_kept_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "EVERY", 3600.0)
    TrainingCheckpoints(tmp_path).keep("a" * 64, lambda: pytest.fail("asked for too early"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    warnings: list[str] = []
    kept = TrainingCheckpoints(tmp_path, warn=warnings.append)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        kept.keep("a" * 64, state(1.0))
        kept.keep("a" * 64, state(2.0))
    assert len(warnings) == 1 and "no space left" in warnings[0]
    assert list(tmp_path.iterdir()) == []


# ---- killed, for real

KILLED = """
import os, signal, sys
from pathlib import Path
from kvedit.training import resume
from kvedit.training.resume import TrainingCheckpoints
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.facts.fact import Fact

def keep(self, lesson, state, real=TrainingCheckpoints.keep):
    real(self, lesson, state)
    if state()["_step_number"] == 9:
        os.kill(os.getpid(), signal.SIGKILL)

resume.EVERY, resume.SHARE, TrainingCheckpoints.keep = -1.0, 1e9, keep
facts = [Fact.create(*pair) for pair in %r]
with KnowledgeBase.open(Path(sys.argv[1])) as knowledge:
    knowledge.add_group(facts, carry=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_group_that_is_killed_goes_on(empty_store: Path) -> None:
    command = [sys.executable, "-c", KILLED % (FREE[:3],), str(empty_store)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    events: list[Any] = []
    with KnowledgeBase.open(empty_store, on_event=events.append) as knowledge:
        assert knowledge.store.head() == 0
        report = knowledge.add_group([Fact.create(*pair) for pair in FREE[:3]], carry=True)[0]
        assert report.outcome == "committed" and report.steps > 9
        assert 0 < report.resumed_seconds < min(report.timings["train"], report.seconds)
        assert [f.what for f in knowledge.doctor() if f.level != "ok"] == []
    told = [event.phase for event in events if event.message_type == "status"]
    assert "going on with what was being taught when kvedit ended" in told
    steps = [event.step for event in events if event.message_type == "status" and event.step]
    assert steps[0] == 10
    assert list((empty_store / "cache").glob("lesson-*")) == []


def test_when_time_is_up_a_lesson_ends_where_it_stands(empty_store: Path) -> None:
    group = [Fact.create(*pair) for pair in FREE[:3]]
    steps: list[int] = []
    with KnowledgeBase.open(
        empty_store, on_event=lambda event: steps.append(getattr(event, "step", 0))
    ) as knowledge:
        before = knowledge.engine.master.digest()
        for _ in range(2):  # a step each
            knowledge.deadline = time.monotonic()
            with pytest.raises(OutOfTimeError, match="middle of a group"):
                knowledge.add_group(group, carry=True)
            assert knowledge.engine.master.digest() == before
        assert [edit.state for edit in knowledge.store.history()] == ["canceled"] * 2
        knowledge.deadline = None
        steps.clear()
        assert knowledge.add_group(group, carry=True)[0].outcome == "committed"
    assert next(step for step in steps if step) == 3


def test_a_state_is_what_torch_loads_without_running_anything(engine: Engine) -> None:
    kept: list[bytes] = []

    def keep(state: Callable[[], State]) -> None:
        body = io.BytesIO()
        torch.save(state(), body)
        kept.append(body.getvalue())

    own = task(engine)
    engine.train(own, engine.config, group=replace(GROUP, epochs=4, rounds=0), keep=keep)
    found = torch.load(io.BytesIO(kept[-1]), weights_only=True)
    assert found["part"]["done"] == found["part"]["steps"] == len(kept)
