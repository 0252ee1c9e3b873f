"""Killed at any instant, an edit is either committed or did not happen (see ``crash_rounds``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).parents[1] / "crash_rounds.py"


def rounds(model: Path, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the driver in a folder; every round, after checking that none broke a promise."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), "--model", str(model), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(folder)},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    broken = [line for line in lines if line.get("wrong")]
    assert not broken, broken
    assert done.returncode == 0, done.stderr
    assert lines[-1]["rounds"] == len(lines) - 1
    return lines[:-1]


def test_killed_at_every_point_of_an_add(small: dict[str, Path], ram_path: Path) -> None:
    lines = rounds(small["bf16"], ram_path, "--points", "add")
    labels = " ".join(line["point"] for line in lines)
    # Before and after each step of the flow, and on both sides of the commit.
    for step in ("put_pending", "plan_edit", "mark_trained", "commit_edit", "add_checkpoint"):
        assert all(f"{when} {step}" in labels for when in ("before", "inside", "after")), step
    assert labels.count("before fsync") >= 10 and labels.count("after rename") >= 5
    assert {(line["journal"], line["head"]) for line in lines} >= {
        ("none", "old"),
        ("planned", "old"),
        ("trained", "old"),
        ("committed", "new"),
    }
    # The commit is one point: before it all is old, after it all is new.
    heads = [line["head"] for line in lines]
    turn = next(n for n, line in enumerate(lines) if line["point"] == "after commit_edit")
    assert set(heads[:turn]) == {"old"} and set(heads[turn:]) == {"new"}


TRANSACTIONS = {
    "init": ("add_protected", "set_metas"),
    "update": ("plan_edit", "mark_trained", "commit_edit", "add_checkpoint"),
    "remove": ("plan_edit", "mark_trained", "commit_edit", "add_checkpoint"),
    "rollback": ("plan_edit", "commit_edit"),
    "compaction": ("plan_edit", "mark_trained", "commit_edit", "add_checkpoint"),
    "erase": ("plan_edit", "mark_trained", "commit_edit", "set_metas"),
    "prune": ("mark_pruned",),
}


def test_killed_at_every_step_of_the_journal(small: dict[str, Path], ram_path: Path) -> None:
    """Other commands: before, inside and after each of their transactions; training is random."""
    lines = rounds(small["bf16"], ram_path, "--quick", "--points", *TRANSACTIONS)
    for command, steps in TRANSACTIONS.items():
        points = {line["point"] for line in lines if line["command"] == command}
        expected = {f"{when} {step}" for step in steps for when in ("before", "inside", "after")}
        assert expected <= points, (command, expected - points)
    assert any(line["point"] == "after VACUUM" for line in lines)
    assert sum(line["point"] == "before unlink" for line in lines) >= 4
    for line in lines:
        # The commit is one point: before it all is old, after it all is new.
        if line["command"] != "init" and line["point"].endswith("commit_edit"):
            assert line["head"] == ("new" if line["point"].startswith("after") else "old"), line


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["init", "update", "remove", "rollback", "compaction", "erase", "prune"]
)
def test_killed_at_every_point(small: dict[str, Path], ram_path: Path, command: str) -> None:
    lines = rounds(small["bf16"], ram_path, "--points", command)
    assert len({line["head"] for line in lines}) == 2


@pytest.mark.slow
def test_killed_at_random_moments(
    small: dict[str, Path], ram_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = rounds(small["bf16"], ram_path, "--rounds", "100")
    heads = [line["head"] for line in lines]
    with capsys.disabled():
        print(f"\n100 kills: {heads.count('old')} before the commit, {heads.count('new')} after")
    assert sum(line["killed"] for line in lines) > 60
