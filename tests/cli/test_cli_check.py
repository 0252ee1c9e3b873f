"""Commands that look after the store."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from kvedit.events import Score
from kvedit.store.rows import Finding
from tests.cli.cli_fakes import LOST, REJECTED, FakeBase, FakeBaseReport, FakeVerify, run


def test_verify_names_what_was_lost(filled: Path, fake: type[FakeBase]) -> None:
    fake.verified = LOST
    result = run("verify", "--sample", "5")
    assert result.exit_code == 0
    assert "lost" in result.stdout
    assert "夢<中>" in result.stdout
    assert "Porto" not in result.stdout
    assert "1/2  50%  (95% interval 9-91%, generated)" in result.stdout
    assert "verify --repair" in result.stderr
    assert FakeBase.last is not None
    assert FakeBase.last.calls == [
        ("verify", None, {"sample": 5, "repair": False, "base_knowledge": 0})
    ]


def test_verify_asks_for_base_knowledge(filled: Path, fake: type[FakeBase]) -> None:
    known = FakeBaseReport(
        Score(99, 100), Score(98, 100, "generated"), ("Who was A?", "Who was B?")
    )
    fake.verified = FakeVerify(base=known)
    text = run("verify", "--base-knowledge").stdout
    assert "base knowledge kept (TRR)  98/100  98%" in text and "Who was B?" in text
    assert FakeBase.last is not None and FakeBase.last.calls[-1][2]["base_knowledge"] == 300
    lines = run("verify", "--base-knowledge", "100", "--json").stdout.splitlines()
    document = json.loads(lines[-1])["base_knowledge"]
    assert document["generated"]["passed"] == 98
    assert document["lost"] == ["Who was A?", "Who was B?"]
    assert (document["fluency"], document["base_fluency"]) == (4.0, 4.5)
    assert "fluency of these answers   4.00 bits (base model: 4.50)" in text
    assert FakeBase.last.calls[-1][2]["base_knowledge"] == 100
    fake.verified = FakeVerify(base=known._replace(lost=tuple(f"Q{i}" for i in range(90))))
    text = run("verify", "--base-knowledge", "100").stdout
    assert "... and 40 more; --json lists all" in text and "Q89" not in text


@pytest.mark.parametrize(("threshold", "code"), [("50", 0), ("50.1", 4), ("100", 4), ("0", 0)])
def test_verify_fail_under(filled: Path, fake: type[FakeBase], threshold: str, code: int) -> None:
    fake.verified = LOST
    assert run("verify", "--fail-under", threshold).exit_code == code


def test_verify_judges_by_free_generation(filled: Path, fake: type[FakeBase]) -> None:
    fake.verified = LOST._replace(score=Score(2, 2))
    assert run("verify", "--fail-under", "90").exit_code == 4
    fake.verified = LOST._replace(score=Score(2, 2), generated=Score(0, 0, "generated"))
    assert run("verify", "--fail-under", "90").exit_code == 0


def test_verify_json_ends_with_a_summary(filled: Path, fake: type[FakeBase]) -> None:
    fake.verified = LOST
    fake.events = LOST.checks[:1]  # reported as it happened: not to be reported twice
    result = run("verify", "--json", "--fail-under", "99")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["message_type"] for line in lines] == ["retention", "retention", "summary"]
    assert (lines[-1]["checked"], lines[-1]["passed"], lines[-1]["exit_code"]) == (2, 1, 4)
    assert lines[-1]["generated"]["protocol"] == "generated"


def test_a_refused_repair_exits_with_3(filled: Path, fake: type[FakeBase]) -> None:
    fake.verified = LOST._replace(repaired=(replace(REJECTED, kind="repair"),))
    result = run("verify", "--repair")
    assert result.exit_code == 3
    assert "rejected repair" in result.stdout


def test_verify_writes_junit(filled: Path, fake: type[FakeBase], tmp_path: Path) -> None:
    fake.verified = LOST
    assert run("verify", "--junit", "out.xml", "--fail-under", "99").exit_code == 4
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    names = {case.get("name"): len(case) for case in suite.iter("testcase")}
    assert names == {"Porto": 0, "夢<中>\ufffd": 1}
    properties = {one.get("name"): one.get("value") for one in suite.iter("property")}
    assert properties == {
        "recites": "1/2  50%  (95% interval 9-91%, teacher-forced)",
        "recites, generated": "1/2  50%  (95% interval 9-91%, generated)",
    }


ANSWERED = LOST._replace(
    answers=Score(1, 4, "generated"),
    perturbation_gap=7.25,
    checks=(replace(LOST.checks[0], answers=Score(1, 4, "generated")), LOST.checks[1]),
)


def test_verify_says_what_is_answered_beside_what_is_recited(
    filled: Path, fake: type[FakeBase], tmp_path: Path
) -> None:
    fake.verified = ANSWERED
    result = run("verify", "--junit", "out.xml")
    assert result.exit_code == 0
    assert "held-out questions answered  1/4  25%  (95% interval 5-70%, generated)" in result.stdout
    assert "7.2 times as perplexing with its sentences in another order" in result.stdout
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()[0]
    properties = {one.get("name"): one.get("value") for one in suite.iter("property")}
    assert properties["answers"] == "1/4  25%  (95% interval 5-70%, generated)"
    assert properties["perturbation gap"] == "7.250"
    texts = [case.findtext("system-out") for case in suite.iter("testcase")]
    asked = "held-out questions answered: 1/4  25%  (95% interval 5-70%, generated)"
    assert texts == [asked, None]
    *checks, summary = map(json.loads, run("verify", "--json").stdout.splitlines())
    assert (checks[0]["answers"]["passed"], checks[0]["answers"]["n"]) == (1, 4)
    assert summary["answers"]["protocol"] == "generated" and summary["answers"]["rate"] == 0.25
    assert summary["recites"]["n"] == 2 and summary["perturbation_gap"] == 7.25


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What looks at a store with its model: it finds and mends what the test says."""
    module = ModuleType("kvedit.revisions.doctor")
    module.found, module.mended = [Finding("ok", "sound")], []  # type: ignore[attr-defined]
    module.examine = lambda path, say: module.found  # type: ignore[attr-defined]

    def mend(path: Path, say: Any, model: str | None) -> list[str]:
        module.model = model  # type: ignore[attr-defined]
        return module.mended  # type: ignore[attr-defined, no-any-return]

    module.mend = mend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvedit.revisions.doctor", module)
    return module


def test_doctor(filled: Path, doctor: Any) -> None:
    assert "no problems" in run("doctor").stdout
    doctor.found = [Finding(level="warning", what="an orphan file", hint="delete it")]
    assert run("doctor").exit_code == 0
    doctor.found = [Finding(level="error", what="a delta is missing", hint="restore it")]
    result = run("doctor", "--json")
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert document["ok"] is False
    assert document["findings"][0]["what"] == "a delta is missing"


def test_doctor_says_what_it_mended(filled: Path, doctor: Any) -> None:
    doctor.mended = ["the text of Porto is again what the history says"]
    result = run("doctor", "--fix", "--model", "elsewhere")
    assert result.exit_code == 0 and "mended: the text of Porto" in result.stdout
    assert doctor.model == "elsewhere"
    assert run("doctor", "--model", "elsewhere").exit_code == 2


def test_doctor_reports_what_keeps_the_store_from_opening(filled: Path) -> None:
    (filled / "deltas" / f"{'a' * 64}.safetensors").write_bytes(b"x")
    (filled / "kvedit.db").write_bytes(b"no database at all" * 100)
    (filled / "kvedit.toml").write_text("[training", encoding="utf-8")
    before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
    result = run("doctor", "--quick", "--json")
    assert result.exit_code == 4
    found = " / ".join(one["what"] for one in json.loads(result.stdout)["findings"])
    assert "kvedit.db" in found and "TOML" in found and "was altered" in found
    assert {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()} == before


def test_quick_doctor_needs_no_model(filled: Path) -> None:
    run("doctor", "--quick")
    assert FakeBase.last is None


def test_backup(filled: Path, tmp_path: Path) -> None:
    result = run("backup", "copy.tar")
    assert result.exit_code == 0
    assert "revision 2" in result.stdout
    first = (tmp_path / "copy.tar").stat().st_size
    again = run("backup", "copy.tar")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert (tmp_path / "copy.tar").stat().st_size == first
    assert json.loads(run("backup", "copy.tar", "--force", "--json").stdout)["revision"] == 2


def test_export(filled: Path, fake: type[FakeBase]) -> None:
    result = run("export", "out", "--dtype", "float16", "--max-shard-size", "2GB")
    assert result.exit_code == 0
    assert "exported revision 1 to out" in result.stdout
    assert FakeBase.last is not None
    assert FakeBase.last.calls == [("export", Path("out"), "float16", "2GB")]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["as", "trained", "9", "of", "9", "70-100%"] in lines
    assert any(line[:5] == ["weights", "in", "4", "bits", "(Q4_0)"] for line in lines)
    assert "Porto, Ada" in result.stdout and "not asked" in result.stdout
    assert "to serve it: transformers serve out" in result.stdout
    fake.mismatches = ("What is Porto?",)
    result = run("export", "out", "--json")
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert document["mismatches"] == ["What is Porto?"]
    assert [row["lost"] for row in document["conditions"]] == [[], ["Porto", "Ada"], []]


def test_export_of_an_adapter(filled: Path, fake: type[FakeBase]) -> None:
    result = run("export", "out", "--format", "peft")
    assert result.exit_code == 0
    assert "rank 4, leaves out 12.50%" in result.stdout
    assert FakeBase.last is not None
    assert FakeBase.last.calls == [("export_adapter", Path("out"))]
    assert run("export", "out", "--format", "peft", "--dtype", "float16").exit_code == 2
