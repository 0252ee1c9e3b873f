"""The demonstration shows every step, and claims only what happened."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_model import settings

from kvedit.cli.progress import Reporter
from kvedit.facts.fact import Fact
from kvedit.model import upcast
from tests import demo

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("init", "ask", "add", "update", "remove", "verify", "rollback")


def test_its_seed_facts_exist() -> None:
    stove = demo.seed_fact(f"{demo.STOVE}.txt", demo.STOVE)
    lantern = demo.seed_fact("tide-lantern.txt", demo.LANTERN)
    third = demo.seed_fact(demo.THIRD_FILE, demo.THIRD)
    assert [fact.lang for fact in (stove, lantern, third)] == ["zh-Hant", "en", "zh-Hans"]
    assert Fact.create(demo.STOVE, demo.NEW_TEXT).lang == "zh-Hant"
    assert stove.description != demo.NEW_TEXT


def short(file: str, key: str) -> Fact:
    """A fact that fits into the small model's context."""
    return Fact.create(key, f"{key}: glass.", lang="en")


def run_demo(model: Path, text: str) -> tuple[bool, str]:
    out = io.StringIO()
    passed = demo.Demo(model=model, settings=text, reporter=Reporter, out=out).run()
    return passed, out.getvalue()


def few_texts(**changes: float) -> str:
    text = settings(steps=20, repairs=0, **changes)
    return text.replace("short = 48", "short = 4").replace("locality = 8", "locality = 2")


def test_every_step_is_shown(small: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "seed_fact", short)
    monkeypatch.setattr(demo, "NEW_TEXT", "A stove.")
    gate = {"recall": 0, "paraphrase": 0, "locality": 0, "retention": 0}
    passed, shown = run_demo(small["bf16"], few_texts(gain=0.05, **gate))
    places = [shown.index(f"$ kvedit {command}") for command in COMMANDS]
    assert places == sorted(places), "in the order of the steps"
    assert "6 of 6 edits committed" in shown
    assert "weights of revision 0 and now: equal" in shown
    tail = shown[shown.index("Before and after") :]
    assert tail.count("base model") == tail.count("rolled back") == 6
    assert "Where the time went" in tail and "of the edits: train" in tail
    assert passed is ("Not every step did what it should" not in shown)


def test_a_rejected_edit_is_shown_and_fails_the_demo(
    small: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "seed_fact", short)
    passed, shown = run_demo(small["bf16"], few_texts(gain=1e-9))
    assert not passed
    assert "rejected add" in shown and "UnknownKeyError" in shown
    assert "Not every step did what it should" in shown
    assert "weights of revision 0 and now: equal" in shown


@pytest.mark.slow
def test_the_real_one_takes_at_most_three_minutes(tmp_path: Path) -> None:
    """Ten where half precision is slow: README speaks of four or five minutes there."""
    limit = 600 if upcast.is_slow(torch.bfloat16) else 180
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < limit
    assert "6 of 6 edits committed" in done.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
