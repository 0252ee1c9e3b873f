"""Training that was interrupted resumes from its last checkpoint."""

from __future__ import annotations

import os
import random
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
from safetensors.torch import save
from small_engine import make_engine
from small_model import FREE

from kvedit.adapter.deltas import to_bytes
from kvedit.config import GroupConfig
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import OutOfTimeError
from kvedit.facts.fact import Fact
from kvedit.training import resume
from kvedit.training.engine import Engine
from kvedit.training.loops.loop import Step, Task
from kvedit.training.resume import State, TrainingCheckpoints

GROUP = GroupConfig(
    batch_size=2,
    epochs=8,
    refine_epochs=4,
    refine_rounds=2,
    penalty_scale=60.0,
    rehearsal_ratio=1.0,
)


class Interruption(Exception):
    """Interrupts training between two steps."""


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "EVERY", -1.0)
    monkeypatch.setattr(resume, "SHARE", 1e9)


def task(engine: Engine) -> Task:
    own = [engine.examples(Fact.create(*pair, lang="en")) for pair in FREE[:6]]
    engine.measure_reference([e for fact in own[4:] for e in fact])
    return Task(own[:3], own[3:4], engine.reference_texts, 1)


def run(
    engine: Engine, *, until: int = 0, checkpoints: TrainingCheckpoints | None = None
) -> tuple[Any, list[Step]]:
    """Train a group, interrupted after step ``until``; its result and its steps."""
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        if until and step.step > until:
            raise Interruption

    try:
        result = engine.train(task(engine), None, on_step, GROUP, checkpoints)
    except Interruption:
        result = None
    return result, steps


def test_a_checkpoint_of_another_format_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = TrainingCheckpoints(tmp_path / "cache")
    checkpoints.keep("name", lambda: {"step": 3})
    assert checkpoints.find("name") == {"step": 3}
    monkeypatch.setattr(resume, "FORMAT", resume.FORMAT + 1)
    assert checkpoints.find("name") is None
    checkpoints.clear()
    assert list((tmp_path / "cache").iterdir()) == []


def test_resumed_training_takes_the_steps_it_would_have_taken(
    engine: Engine, tmp_path: Path
) -> None:
    expected, steps = run(engine)
    phases = [step.phase for step in steps]
    assert list(dict.fromkeys(phases)) == ["learn", "refine"]
    refine = phases.index("refine")
    for until in (1, refine // 2, refine, refine + 2, len(steps) - 1):  # at each turn, in a round
        checkpoints = TrainingCheckpoints(tmp_path)
        assert run(engine, until=until, checkpoints=checkpoints)[0] is None
        resumed, rest = run(engine, checkpoints=checkpoints)
        assert rest == steps[until:]
        assert to_bytes(resumed.delta) == to_bytes(expected.delta)
        assert resumed.trained == expected.trained
        checkpoints.clear()


def test_another_process_resumes(
    load: Callable[[str], Any], engine: Engine, tmp_path: Path
) -> None:
    expected, steps = run(engine)
    run(make_engine(load("bf16")), until=7, checkpoints=TrainingCheckpoints(tmp_path))
    messages: list[str] = []
    assert expected.resumed_seconds == 0.0
    resumed, rest = run(
        make_engine(load("bf16")), checkpoints=TrainingCheckpoints(tmp_path, say=messages.append)
    )
    assert [step.step for step in rest] == [step.step for step in steps[7:]]
    assert resumed.trained.steps == expected.trained.steps
    assert resumed.resumed_seconds > 0
    assert messages == ["resuming the training that was interrupted"]


@pytest.mark.parametrize("changed", ["facts", "settings", "weights"])
def test_another_task_starts_at_the_first_step(
    engine: Engine, tmp_path: Path, changed: str
) -> None:
    run(engine, until=5, checkpoints=TrainingCheckpoints(tmp_path))
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


# ---- files


def state(number: float) -> Callable[[], State]:
    return lambda: {
        "part": torch.full((64,), number),
        "margins": {3: 0.1},
        "rng": (3, (1, 2), None),
    }


def test_the_latest_state_is_read_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints = TrainingCheckpoints(tmp_path / "cache")  # a folder that may not be there yet
    assert checkpoints.find("a" * 64) is None
    for number in (1.0, 0.1):
        checkpoints.keep("a" * 64, state(number))
    checkpoints.keep("b" * 64, state(2.0))
    restored = TrainingCheckpoints(tmp_path / "cache").find("a" * 64)
    assert restored is not None and torch.equal(restored["part"], torch.full((64,), 0.1))
    assert (restored["margins"], restored["rng"]) == ({3: 0.1}, (3, (1, 2), None))
    checkpoints.clear()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "turned", "tensor", "header", "bare", "empty"])
def test_a_damaged_checkpoint_is_none(tmp_path: Path, damage: str) -> None:
    TrainingCheckpoints(tmp_path).keep("a" * 64, state(1.0))
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    turned, tensor = bytearray(data), bytearray(data)
    turned[len(data) // 2] ^= 1
    tensor[-1] ^= 1
    header = data.replace(b'"F32"', b'"I32"')
    bare = save({"0": torch.zeros(3)})  # a safetensors file that is no checkpoint
    damaged = {
        "cut": data[:-9], "turned": turned, "tensor": tensor, "header": header, "bare": bare,
        "empty": b"",
    }  # fmt: skip
    path.write_bytes(damaged[damage])
    assert TrainingCheckpoints(tmp_path).find("a" * 64) is None
    assert not path.exists()


def test_checkpoints_are_written_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "EVERY", 3600.0)
    TrainingCheckpoints(tmp_path).keep("a" * 64, lambda: pytest.fail("asked for too early"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    warnings: list[str] = []
    checkpoints = TrainingCheckpoints(tmp_path, warn=warnings.append)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        checkpoints.keep("a" * 64, state(1.0))
        checkpoints.keep("a" * 64, state(2.0))
    assert len(warnings) == 1 and "no space left" in warnings[0]
    assert list(tmp_path.iterdir()) == []


# ---- killed by a signal

KILLED = """
import os, signal, sys
from pathlib import Path
from kvedit.training import resume
from kvedit.training.resume import TrainingCheckpoints
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.facts.fact import Fact

def keep(self, task, state, real=TrainingCheckpoints.keep):
    real(self, task, state)
    if state()["_step_number"] == 9:
        os.kill(os.getpid(), signal.SIGKILL)

resume.EVERY, resume.SHARE, TrainingCheckpoints.keep = -1.0, 1e9, keep
facts = [Fact.create(*pair) for pair in %r]
with KnowledgeBase.open(Path(sys.argv[1])) as knowledge:
    knowledge.add_group(facts, carry=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_group_that_is_killed_resumes(empty_store: Path) -> None:
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
    phases = [event.phase for event in events if event.message_type == "status"]
    assert "resuming the training that was interrupted" in phases
    steps = [event.step for event in events if event.message_type == "status" and event.step]
    assert steps[0] == 10
    assert list((empty_store / "cache").glob("training-*")) == []


def test_training_stops_when_time_is_up_and_resumes(empty_store: Path) -> None:
    group = [Fact.create(*pair) for pair in FREE[:3]]
    steps: list[int] = []
    with KnowledgeBase.open(
        empty_store, on_event=lambda event: steps.append(getattr(event, "step", 0))
    ) as knowledge:
        before = knowledge.engine.master.digest()
        for _ in range(2):  # a step each
            with pytest.raises(OutOfTimeError, match="middle of a group"):
                knowledge.add_group(group, carry=True, deadline=time.monotonic())
            assert knowledge.engine.master.digest() == before
        assert [edit.state for edit in knowledge.store.history()] == ["canceled"] * 2
        steps.clear()
        assert knowledge.add_group(group, carry=True)[0].outcome == "committed"
    assert next(step for step in steps if step) == 3


def test_the_state_of_a_loop_is_read_back_to_the_bit(engine: Engine, tmp_path: Path) -> None:
    parts: list[dict[str, int]] = []

    class Compared(TrainingCheckpoints):
        def keep(self, task: str, state: Callable[[], State]) -> None:
            current = state()
            super().keep(task, lambda: current)
            restored = self.find(task)
            assert restored is not None and same(current, restored)
            parts.append(restored["part"])

    group = replace(GROUP, epochs=4, refine_rounds=0)
    engine.train(task(engine), group=group, training_checkpoints=Compared(tmp_path))
    assert [part["done"] for part in parts] == list(range(1, parts[-1]["steps"] + 1))


def same(one: Any, other: Any) -> bool:
    """Whether two states have the same types, structure and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and same(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_states_of_all_kinds_are_read_back(tmp_path: Path) -> None:
    tied = torch.arange(6).reshape(2, 3)
    state: State = {
        "tied": [tied, tied, tied.T, tied[1]],
        "tensors": (
            torch.tensor(0.1, dtype=torch.float64), torch.tensor(True), torch.empty(0, 3),
            torch.tensor([0.1, -0.0], dtype=torch.bfloat16),
        ),
        "numbers": [0.1, -0.0, 1e-320, float("inf"), 2**70, True, None, "", "\u2028\U0001f600"],
        "nested": {0: {"a": ()}, (1, 2): [[]], "tensor": {}, None: {"tuple": [1]}},
        "random": random.Random(3).getstate(),
    }  # fmt: skip
    checkpoints = TrainingCheckpoints(tmp_path)
    checkpoints.keep("name", lambda: state)
    restored = checkpoints.find("name")
    assert restored is not None and same(state, restored)
    assert repr(restored["numbers"]) == repr(state["numbers"])
    with pytest.raises(TypeError, match="cannot hold a set"):
        checkpoints.keep("name", lambda: {"set": {1}})


def test_checkpoints_of_older_versions_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "lesson-4-0123456789abcdef.pt").write_bytes(b"kept")
    TrainingCheckpoints(tmp_path).clear()
    assert list(tmp_path.iterdir()) == []
