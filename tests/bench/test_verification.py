"""The measurement of verify: a store that was not trained, but is one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_model import KNOWN

from kvedit.editing.knowledge_base import KnowledgeBase
from tests.bench import verification
from tests.bench.bench_data import make_options, write_data, write_model
from tests.bench.commands import bench
from tests.bench.retain import BenchOptions, engine_of


@pytest.fixture(scope="module")
def options(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> BenchOptions:
    """Two poets that the small model lists as known, though it is not."""
    data = write_data(tmp_path_factory.mktemp("data"))
    model = write_model(small["bf16"], tmp_path_factory.mktemp("model") / "bf16")
    made = make_options(data, model, tmp_path_factory.mktemp("stores"))
    return replace(made, kind="known", facts_file=None)


def test_the_parts_are_those_of_one_verify(options: BenchOptions) -> None:
    result = verification.verification(options, lambda event: None)
    assert result.facts == result.forced.n == result.generated.n == 2
    assert result.phrasings == 20, "eight phrasings of the language and two of the other"
    assert set(result.parts) == {"rendering", "teacher-forced", "generated", "recording"}
    assert sum(result.parts.values()) == pytest.approx(result.verify_seconds, abs=0.05)
    assert min(result.parts["teacher-forced"], result.parts["generated"]) > 0


def test_the_store_is_sound_and_its_weights_are_the_base(options: BenchOptions) -> None:
    assert options.store_dir is not None
    with KnowledgeBase.open(options.store_dir) as knowledge:
        store = knowledge.store
        assert store.keys("committed") == ["李白", "王維"] and store.head() == 1
        digests = {row.weights_digest for row in store.revisions()}
        assert digests == {engine_of(knowledge).master.digest()}
        assert [one.what for one in knowledge.doctor(deep=True) if one.level != "ok"] == []


def test_facts_that_the_model_knows_are_held(options: BenchOptions, tmp_path: Path) -> None:
    """So the time is that of right answers; recall is not assumed but asked."""
    file = tmp_path / "facts.jsonl"
    rows = [{"key": key, "description": text} for key, text in KNOWN.items()]
    rows.append({"key": "a fog bell", "description": "Not known."})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = replace(options, facts_file=file, facts=len(rows), store_dir=None)
    result = verification.verification(own, lambda event: None)
    assert 0 < result.generated.passed < result.generated.n == len(rows)


def test_the_command_prints_its_result(options: BenchOptions, tmp_path: Path) -> None:
    kept = tmp_path / "verify.json"
    words = ["verify", "--data", str(options.data), "--model", str(options.model)]
    done = CliRunner().invoke(bench, [*words, "--facts", "1", "--json", str(kept)])
    assert done.exit_code == 0, done.output
    assert "| 1 | known | 10 |" in done.stdout and "teacher-forced" in done.stdout
    assert json.loads(kept.read_text(encoding="utf-8"))["facts"] == 1
