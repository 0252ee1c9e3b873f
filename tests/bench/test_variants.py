"""The benchmark of settings, on the small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_model import FREE

from kvedit.store.store import Store
from tests.bench.commands import bench


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    rows = [json.dumps({"key": key, "description": text}) for key, text in FREE[:2]]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def test_each_variant_begins_with_the_same_store(
    empty_store: Path, facts: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "variants.json"
    given = ["--store", str(empty_store), "--facts", str(facts), "--json", str(kept)]
    still = "group.step_gain=1e-9 group.refine_rounds=0"
    result = CliRunner().invoke(bench, ["-q", "variants", *given, "--variant", still])
    assert result.exit_code == 0, result.output
    rows = json.loads(kept.read_text(encoding="utf-8"))["variants"]
    assert [row["name"] for row in rows] == ["defaults", still.replace("1e-9", "1e-09")]
    assert [row["learned"]["passed"] for row in rows] == [2, 0]
    with Store.open(empty_store) as store:
        assert not store.facts()


def test_a_setting_that_cannot_be_read_is_refused(empty_store: Path) -> None:
    given = ["variants", "--store", str(empty_store), "--variant", "training.seed"]
    result = CliRunner().invoke(bench, given)
    assert result.exit_code == 2 and "SECTION.NAME=VALUE" in result.output
