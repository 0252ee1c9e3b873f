"""The command for thousands of facts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fake_knowledge import FakeEngine, FakeKnowledge, facts

from kvedit.cli.progress import LiveReporter, PlainReporter, progress_line
from kvedit.errors import DiskFullError
from kvedit.events import EditReport, IngestProgress, Score, Status, Warning_
from kvedit.facts.fact import Fact
from kvedit.store.store import Store
from tests.cli.cli_fakes import FakeBase, run


class LearningBase(FakeBase):
    """A fake base that learns at once."""

    engine = FakeEngine()
    largest_group: ClassVar[int | None] = None
    refuses: ClassVar[set[str]] = set()
    stops_at: ClassVar[str | None] = None
    learned: ClassVar[list[str]] = []

    def add_group(self, group: Any, **given: bool) -> tuple[EditReport, ...]:
        knowledge = FakeKnowledge(self.store, self.on_event or (lambda e: None), self._before)
        knowledge.refuses = self.refuses
        reports = knowledge.add_group(group)
        self.learned += knowledge.trained
        return reports

    def _before(self, fact: Fact) -> None:
        if fact.key == self.stops_at:
            raise KeyboardInterrupt

    def verify(self, keys: Any = None, **options: Any) -> Any:
        return FakeKnowledge(self.store).verify(sample=options["sample"])


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch, fake: type[FakeBase]) -> Iterator[type[LearningBase]]:
    import sys

    kind = type("Base", (LearningBase,), {"refuses": set(), "learned": []})
    monkeypatch.setattr(sys.modules["kvedit.editing.knowledge_base"], "KnowledgeBase", kind)
    yield kind


def write(path: str, given: list[Fact], *more: str) -> None:
    lines = [json.dumps(fact.to_json()) for fact in given]
    Path(path).write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_goes_in_and_a_missing_store_is_made(base: type[LearningBase]) -> None:
    write("f.jsonl", facts(3))
    result = run("ingest", "f.jsonl")
    assert result.exit_code == 0, result.output
    assert "no store at" in result.stderr
    assert "3/3 facts  3 committed" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "3 rows: 3 new"
    assert lines[1].startswith("3 committed: revision 3")
    assert "retention  3/3  100%" in lines[2]
    with Store.open(Path("store"), readonly=True) as store:
        assert len(store.facts("committed")) == 3


def test_the_same_command_again_does_nothing_and_needs_no_model(base: type[LearningBase]) -> None:
    write("f.jsonl", facts(3))
    run("ingest", "f.jsonl")
    FakeBase.last = None
    result = run("ingest", "f.jsonl")
    assert result.exit_code == 0
    assert "3 rows: 3 in the store already" in result.stdout
    assert FakeBase.last is None


def test_invalid_rows_are_named_before_anything_is_made(base: type[LearningBase]) -> None:
    conflict = json.dumps({"key": facts(1)[0].key, "description": "Something else."})
    write("f.jsonl", facts(2), "{", conflict)
    result = run("ingest", "f.jsonl")
    assert result.exit_code == 1
    assert "invalid row: f.jsonl, line 3: not valid JSON" in result.stderr
    assert "line 4: " in result.stderr and "has another text at line 1" in result.stderr
    assert "3 of 4 rows are invalid; nothing was changed" in result.stderr
    assert "--skip-invalid" in result.stderr
    assert not Path("store").exists()
    skipped = run("ingest", "f.jsonl", "--skip-invalid")
    assert skipped.exit_code == 0
    assert "line 3: not valid JSON" in skipped.stderr
    assert "4 rows: 1 new, 3 invalid" in skipped.stdout


def test_a_text_too_long_for_the_model_is_named_by_its_line(base: type[LearningBase]) -> None:
    write("f.jsonl", [*facts(1), Fact.create("long", "x" * 101)])
    result = run("ingest", "f.jsonl")
    assert result.exit_code == 1
    assert "f.jsonl, line 2: the text has too many tokens" in result.stderr
    assert base.learned == []
    assert run("ingest", "f.jsonl", "--skip-invalid").exit_code == 0
    rejected = json_lines(Path("store/exports/rejected-f.jsonl").read_text())
    assert [(r["key"], r["outcome"]) for r in rejected] == [("long", "invalid")]


def test_rejected_facts_are_written_and_can_be_fed_in_again(base: type[LearningBase]) -> None:
    bad = facts(4)[2]
    base.refuses = {bad.key}
    write("f.jsonl", facts(4))
    result = run("ingest", "f.jsonl")
    assert result.exit_code == 3
    assert re.search(f"rejected +{bad.key}: recall probes", result.stdout)
    path = Path("store/exports/rejected-f.jsonl")
    assert f"rejected facts and reasons: {path}" in result.stdout
    assert f"ingest --retry-rejected {path}" in result.stderr
    (row,) = json_lines(path.read_text(encoding="utf-8"))
    assert row["reasons"] == ["recall probes: 1 of 10 passed, 100% needed"]
    assert row["where"] == "f.jsonl, line 3"
    again = run("ingest", "f.jsonl")
    assert again.exit_code == 3
    assert "1 rejected before" in again.stdout
    assert json_lines(path.read_text(encoding="utf-8"))[0]["reasons"] == row["reasons"]
    base.refuses = set()
    assert run("ingest", "--retry-rejected", str(path)).exit_code == 0
    assert run("ingest", "f.jsonl").exit_code == 0
    assert not path.exists()


def test_the_rejected_file_can_be_named(base: type[LearningBase]) -> None:
    write("f.jsonl", facts(1))
    assert run("ingest", "f.jsonl", "--rejected-file", "no/such/file").exit_code == 2
    assert run("ingest", "f.jsonl", "--rejected-file", "./f.jsonl").exit_code == 2
    assert run("ingest", "f.jsonl", "--rejected-file", "r.jsonl").exit_code == 0
    assert Path("r.jsonl").read_text() == ""


def test_ctrl_c_ends_with_a_summary_and_the_next_run_continues(base: type[LearningBase]) -> None:
    write("f.jsonl", facts(5))
    base.stops_at = facts(5)[2].key
    result = run("ingest", "f.jsonl", "--group", "1")
    assert result.exit_code == 130
    assert "2 committed" in result.stdout
    assert "interrupted" in result.stdout and "3 left" in result.stdout
    assert "run the same command again" in result.stderr
    base.stops_at = None
    assert run("ingest", "f.jsonl").exit_code == 0
    assert sorted(base.learned) == sorted(fact.key for fact in facts(5))


@pytest.mark.parametrize("error", [DiskFullError("no space left", hint="Free some."),
                                   OSError(5, "Input/output error", "deltas/a")])  # fmt: skip
def test_a_run_that_an_error_ends_says_what_was_committed(
    base: type[LearningBase], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def verify(self: Any, keys: Any = None, **options: Any) -> None:
        raise error

    monkeypatch.setattr(base, "verify", verify)
    base.refuses = {facts(4)[2].key}
    write("f.jsonl", facts(4))
    result = run("ingest", "f.jsonl", "--json")
    assert result.exit_code == 1
    *_, said, summary = json_lines(result.stdout)
    text = "no space left" if isinstance(error, DiskFullError) else "deltas/a: Input/output error"
    assert (said["message_type"], said["message"], said["exit_code"]) == ("error", text, 1)
    assert f"error: {text}" in result.stderr
    assert (summary["message_type"], summary["exit_code"]) == ("summary", 1)
    assert (summary["committed"], summary["rejected"], summary["stopped"]) == (3, 1, "error")
    (row,) = json_lines(Path(summary["rejected_file"]).read_text(encoding="utf-8"))
    assert row["key"] == facts(4)[2].key


def test_an_error_of_closing_or_of_the_rejected_file_does_not_hide_the_summary(
    base: type[LearningBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(self: Any, *error: object) -> None:
        raise DiskFullError("no space left for the cache")

    monkeypatch.setattr(base, "__exit__", leave)
    write("f.jsonl", facts(2))
    result = run("ingest", "f.jsonl")
    assert result.exit_code == 1
    assert "2 committed: revision 2" in result.stdout
    assert "no space left for the cache" in result.stderr
    base.refuses = {facts(3)[2].key}
    monkeypatch.setattr("kvedit.files.write_atomic", leave)
    write("f.jsonl", facts(3))
    result = run("ingest", "f.jsonl", "--json")
    assert result.exit_code == 1
    *_, said, summary = json_lines(result.stdout)
    assert (said["message_type"], summary["rejected"]) == ("error", 1)


def test_limits(base: type[LearningBase]) -> None:
    write("f.jsonl", facts(5))
    result = run("ingest", "f.jsonl", "--limit", "2")
    assert result.exit_code == 0
    assert "stopped at --limit; 3 left" in result.stdout
    assert "run the same command again" in result.stderr
    result = run("ingest", "f.jsonl", "--max-time", "0s")
    assert "stopped at --max-time; 3 left" in result.stdout
    base.refuses = {fact.key for fact in facts(5)}
    result = run("ingest", "f.jsonl", "--max-failures", "1", "--group", "1")
    assert result.exit_code == 3
    assert "stopped at --max-failures; 2 left" in result.stdout


@pytest.mark.parametrize(
    "words", [("--group", "0"), ("--group", "some"), ("--max-time", "soon"), ("--limit", "0")]
)
def test_options_that_make_no_sense(base: type[LearningBase], words: tuple[str, ...]) -> None:
    write("f.jsonl", facts(1))
    assert run("ingest", "f.jsonl", *words).exit_code == 2


def test_sources_that_cannot_be_read(base: type[LearningBase]) -> None:
    assert run("ingest", "none.jsonl").exit_code == 2
    Path("text").write_text("Once upon a time.")
    result = run("ingest", "text")
    assert result.exit_code == 1
    assert "in no format" in result.stderr
    assert "kvedit add KEY text" in result.stderr
    assert not Path("store").exists()


def test_standard_input_and_folders(base: type[LearningBase]) -> None:
    table = "key,description\nPorto,A harbour town.\n"
    assert run("ingest", "-", stdin=table).exit_code == 0
    os.mkdir("texts")
    Path("texts/夢中情爐.txt").write_text("一座會唱歌的爐子。", encoding="utf-8")
    assert run("ingest", "texts").exit_code == 0
    assert base.learned == ["Porto", "夢中情爐"]


def test_a_dry_run_says_what_would_happen_and_changes_nothing(base: type[LearningBase]) -> None:
    write("f.jsonl", facts(3), json.dumps(facts(1)[0].to_json()))
    result = run("ingest", "f.jsonl", "--dry-run")
    assert result.exit_code == 0
    assert "4 rows: 3 new, 1 repeated" in result.stdout
    assert "no fact was trained in this store yet" in result.stdout
    assert not Path("store").exists()
    run("ingest", "f.jsonl", "--limit", "1")
    write("f.jsonl", facts(3), '{"key": "x"}')
    result = run("ingest", "f.jsonl", "--dry-run")
    assert result.exit_code == 1
    assert "line 4" in result.stderr
    assert "would stop before the first edit, for the invalid rows" in result.stdout
    plan = "would train 2 new facts, and 1 earlier one again with them: about 6.0 s, at 2.0 s"
    assert plan in result.stdout
    alone = run("ingest", "f.jsonl", "--dry-run", "--skip-invalid", "--group", "1")
    assert "would train 2 new facts: about 4.0 s, at 2.0 s a fact" in alone.stdout
    assert "would stop" not in alone.stdout
    assert base.learned == [facts(1)[0].key]


def test_a_dry_run_with_json(base: type[LearningBase]) -> None:
    write("f.jsonl", [Fact.create("tide lantern", "a"), Fact.create("tide lanterns", "b")], "7")
    result = run("ingest", "f.jsonl", "--dry-run", "--json")
    warning, summary = json_lines(result.stdout)
    assert (warning["message_type"], warning["code"]) == ("warning", "invalid")
    assert summary["dry_run"] and summary["would_stop"] and summary["would_train"] == 2
    assert summary["similar"][0] == {"key": "tide lantern", "other": "tide lanterns", "score": 96.0}
    assert (summary["seconds_per_fact"], summary["exit_code"]) == (None, 1)


def test_what_a_file_was_taken_for_is_said(base: type[LearningBase]) -> None:
    Path("faq.csv").write_text("question,answer\nWhen does it open?,At six.\nWho?,Ada.\n,\n")
    result = run("ingest", "faq.csv", "--dry-run")
    more = "(and 3 more phrasings)"
    assert result.stdout.startswith(
        f"read as CSV, questions and answers\n  asked   When does it open? {more}\n"
        f"  answer  At six.\n  asked   Who? {more}\n  answer  Ada.\n"
    )
    summary = json_lines(run("ingest", "faq.csv", "--dry-run", "--json").stdout)[-1]
    assert summary["forms"] == {"CSV, questions and answers": 2}
    own, *in_contexts = summary["first_rows"][0]["prompts"]
    assert own == "When does it open?" and len(in_contexts) == 3
    assert all(prompt.endswith(own) for prompt in in_contexts)
    result = run("ingest", "faq.csv")
    assert "read as CSV, questions and answers" in result.stderr
    assert "read as" not in run("-q", "ingest", "faq.csv").output


def test_placeholders_are_held_back_unless_allowed(base: type[LearningBase]) -> None:
    write("f.jsonl", [Fact.create("you", "I am {{name}}."), Fact.create("lamp", "It shines.")])
    result = run("ingest", "f.jsonl")
    assert result.exit_code == 3
    assert "held back: f.jsonl, line 1: the description has the placeholder '{{name}}'" in (
        result.stderr
    )
    assert "2 rows: 1 new, 1 held back (placeholders; --allow-placeholders" in result.stdout
    assert base.learned == ["lamp"]
    lines = json_lines(run("ingest", "f.jsonl", "--dry-run", "--json").stdout)
    assert [line.get("code") for line in lines] == ["placeholder", None]
    assert (lines[-1]["held_back"], lines[-1]["exit_code"]) == (1, 3)
    assert run("ingest", "f.jsonl", "--allow-placeholders").exit_code == 0
    assert base.learned == ["lamp", "you"]


def test_keys_that_count_as_one_are_listed(base: type[LearningBase]) -> None:
    Path("f.csv").write_text("key,description\nA-1,x\na1,x\nC,y\nC++,z\n", encoding="utf-8")
    result = run("ingest", "f.csv", "--dry-run")
    assert "2 keys count as one: A-1 and a1" in result.stdout
    summary = json_lines(run("ingest", "f.csv", "--dry-run", "--json").stdout)[-1]
    assert summary["same"] == [{"key": "A-1", "other": "a1"}]


def test_an_encoding_is_one_message_and_an_option(base: type[LearningBase]) -> None:
    data = "名称,说明\n灯塔,港口墙上的灯。\n钟楼,整点敲响的钟。\n".encode("gbk")
    Path("f.csv").write_bytes(data)
    result = run("ingest", "f.csv", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr.count("UTF-8") == 2 and "--encoding gb18030" in result.stderr
    assert "2 new" in run("ingest", "f.csv", "--dry-run", "--encoding", "gbk").stdout
    assert run("ingest", "f.csv", "--encoding", "rot13").exit_code == 2


def test_thousands_of_similar_keys_are_a_summary(base: type[LearningBase]) -> None:
    write("f.jsonl", [Fact.create(f"support article {n:04d}", f"Text {n}.") for n in range(600)])
    result = run("ingest", "f.jsonl", "--dry-run", "--json")
    summary = json_lines(result.stdout)[-1]
    assert (summary["similar_pairs"], len(summary["similar"])) == (600 * 599 // 2, 100)
    assert summary["all_keys_compared"] is True
    assert "179,700 pairs of keys are similar" in run("ingest", "f.jsonl", "--dry-run").stdout


def test_json_lines_end_with_a_summary(base: type[LearningBase]) -> None:
    write("f.jsonl", facts(3), "7")
    base.refuses = {facts(3)[1].key}
    result = run("ingest", "f.jsonl", "--json", "--skip-invalid")
    lines = json_lines(result.stdout)
    assert {line["message_type"] for line in lines} >= {"warning", "edit", "progress", "summary"}
    summary = lines[-1]
    expected = {"read": 4, "new": 3, "invalid": 1, "committed": 2, "rejected": 1}
    assert {name: summary[name] for name in expected} == expected
    assert summary["retention"]["protocol"] == "generated"
    assert (summary["kind"], summary["exit_code"], summary["remaining"]) == ("ingest", 3, 0)
    assert Path(summary["rejected_file"]).is_file()
    assert result.stderr == ""


PROGRESS = IngestProgress(
    done=12, total=1500, committed=11, rejected=1, retention=Score(59, 60, "generated"),
    seconds_per_fact=8.2, seconds_left=12202.0,
)  # fmt: skip


def test_a_progress_line() -> None:
    assert progress_line(PROGRESS) == (
        "12/1500 facts  3 h 23 min left  11 committed  1 rejected  retention 98.3% (91-100%)"
        "  8.2 s/fact"
    )


def test_plain_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = PlainReporter(many=True)
    for number in range(200):
        reporter(Status(phase="learn", key="x", step=number, total=100))
        reporter(IngestProgress(done=number, total=200))
        reporter(Warning_(text="much like y", code="similar-key", key="x"))
    reporter(EditReport(kind="add", outcome="rejected", key="x", reasons=("recall", "locality")))
    reporter(Warning_(text="recovered"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 6
    assert lines[-2:] == ["rejected add x: recall; locality", "warning: recovered"]


def test_live_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    import click

    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with LiveReporter(many=True) as reporter:
        reporter(Status(phase="learn", key="夢中情爐", step=3, total=9))
        reporter(PROGRESS)
        reporter(EditReport(kind="add", outcome="rejected", key="x", reasons=("recall",)))
    shown = click.unstyle(terminal.getvalue())
    assert "12/1500 facts" in shown
    assert "夢中情爐  learn" in shown
    assert "rejected add x: recall" in shown
