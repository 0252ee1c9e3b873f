"""Commands that change what the model knows."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest

from kvedit.cli.output import from_difference
from kvedit.cli.progress import make_reporter
from kvedit.events import EditReport, RetentionCheck, Score, Status, Warning_
from kvedit.facts.fact import Question
from kvedit.store.store import Store
from tests.cli.cli_fakes import COMMITTED, REJECTED, FakeBase, run


def test_add_takes_questions_and_shows_what_is_answered(fake: type[FakeBase]) -> None:
    answered = Score(1, 2, "generated")
    fake.report = replace(COMMITTED, answers=answered, perturbation_gap=3.04)
    words = ("--question", "Which river?", "The Douro.", "--statement", "It has a port.")
    result = run("add", "Porto", "--text", "A harbour town.", *words)
    assert result.exit_code == 0
    assert "1 of 2 held-out questions answered" in result.stdout
    assert "50% (9-91%), generated" in result.stdout
    assert "3.0 times as perplexing with its sentences in another order" in result.stdout
    assert FakeBase.last is not None
    options = FakeBase.last.calls[-1][3]
    assert options["questions"] == [Question(prompt="Which river?", answer="The Douro.")]
    assert options["statements"] == ("It has a port.",)
    twice = ("--question", "Which river?", "The Tejo.")
    refused = run("add", "Porto", "--text", "A harbour town.", *words, *twice)
    assert refused.exit_code == 1 and "has two answers" in refused.stderr


def test_add_makes_a_missing_store_and_says_so(fake: type[FakeBase], tmp_path: Path) -> None:
    result = run("add", "夢中情爐", "--text", "一座會唱歌的爐子。", "--alias", "情爐")
    assert result.exit_code == 0
    assert "no store at" in result.stderr
    assert "embedded model" in result.stderr
    assert Store.exists(tmp_path / "store")
    options = {
        "aliases": ("情爐",),
        "lang": None,
        "prompts": (),
        "paraphrases": (),
        "questions": [],
        "statements": (),
        "force": False,
    }
    assert FakeBase.last is not None
    assert FakeBase.last.calls[1:] == [("add", "夢中情爐", "一座會唱歌的爐子。", options)]


def test_the_report_of_an_edit_has_scores_time_and_the_next_step(filled: Path) -> None:
    result = run("add", "夢中情爐", "--text", "新的")
    first, *lines = result.stdout.splitlines()
    assert first == "committed add 夢中情爐: revision 1"
    text = "\n".join(lines)
    columns = [re.split("  +", line.strip()) for line in lines]
    assert columns[:3] == [
        [
            "reliability",
            "8 of 8 trained phrasings recalled exactly",
            "100% (68-100%), teacher-forced",
        ],
        [
            "generalization",
            "5 of 6 unseen phrasings recalled exactly",
            "83.3% (44-97%), generated",
        ],
        [
            "locality",
            "32 of 32 answers to other questions unchanged",
            "100% (89-100%), generated",
        ],
    ]
    assert "retention" not in text  # nothing was measured
    assert "夢中情人 (88)" in text
    assert "42 steps in 3.1 s (train 2.5 s, gate 0.5 s)" in text
    assert "kvedit ask" in result.stderr and "--compare-base" in result.stderr


def test_next_steps_name_the_store_they_are_for(filled: Path) -> None:
    filled.rename(filled.parent / "other store")
    result = run("--store", "other store", "add", "夢中情爐", "--text", "新的")
    assert "kvedit --store 'other store' ask" in result.stderr


def test_quiet_prints_the_result_alone(filled: Path, fake: type[FakeBase]) -> None:
    fake.events = (Status(phase="train", step=1, total=2),)
    result = run("-q", "add", "x", "--text", "y")
    assert result.stdout.startswith("committed")
    assert result.stderr == ""


def test_verbose_lists_the_ranks(filled: Path) -> None:
    assert "layers.0.q_proj" not in run("add", "x", "--text", "y").stdout
    rows = [line.split() for line in run("-v", "add", "x", "--text", "y").stdout.splitlines()]
    assert ["16", "1.23%", "layers.0.q_proj"] in rows


def test_a_rejected_edit_lists_its_reasons_and_exits_with_3(
    filled: Path, fake: type[FakeBase]
) -> None:
    fake.report = REJECTED
    result = run("add", "夢中情爐", "--text", "新的")
    assert result.exit_code == 3
    assert result.stdout.startswith("rejected add 夢中情爐: the model is exactly as it was before")
    assert re.search("because +recall 6 of 8 is under 100%", result.stdout)
    assert "retention: Porto was lost" in result.stdout
    assert "--force" in result.stderr


def test_an_unchanged_fact_is_no_error(filled: Path, fake: type[FakeBase]) -> None:
    fake.report = EditReport(kind="add", outcome="unchanged", key="Porto")
    result = run("add", "Porto", "--text", "A harbour town.")
    assert result.exit_code == 0
    assert result.stdout == "unchanged Porto: the store already says exactly this\n"
    assert "kvedit show Porto" in result.stderr


def test_what_a_forced_edit_broke_is_named(filled: Path, fake: type[FakeBase]) -> None:
    fake.report = replace(COMMITTED, broke=("Porto", "Faro"))
    result = run("add", "x", "--text", "y", "--force")
    assert "Porto, Faro" in result.stdout
    assert FakeBase.last is not None
    assert FakeBase.last.calls[0][-1]["force"] is True


def test_json_lines_of_an_edit(filled: Path, fake: type[FakeBase]) -> None:
    check = RetentionCheck(key="Porto", revision=1, passed=True, margin=1.0)
    fake.events = (
        Status(phase="train", key="夢中情爐", step=3, total=9, loss=0.5, recall=(1, 8)),
        Warning_(text="much like 夢中情人 (88)", code="similar", key="夢中情爐"),
        check,
        check,
        COMMITTED,
    )
    result = run("add", "夢中情爐", "--text", "新的", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    types = [line["message_type"] for line in lines]
    assert types == ["status", "warning", "retention", "edit", "summary"]
    assert lines[3]["reliability"]["passed"] == 8
    assert lines[-1] == {
        "message_type": "summary",
        "kind": "add",
        "revision": 1,
        "committed": 1,
        "unchanged": 0,
        "rejected": 0,
        "seconds": 3.14,
        "exit_code": 0,
    }
    assert "夢中情爐" in result.stdout
    assert result.stderr == ""


def test_json_summary_of_a_rejected_edit(filled: Path, fake: type[FakeBase]) -> None:
    fake.report = REJECTED
    result = run("update", "Porto", "--text", "新的", "--json")
    assert result.exit_code == 3
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["kind"], summary["rejected"], summary["exit_code"]) == ("update", 1, 3)


def test_warnings_go_to_stderr_even_when_quiet(filled: Path, fake: type[FakeBase]) -> None:
    fake.events = (Warning_(text="much like 夢中情人 (88)"),)
    result = run("-q", "add", "x", "--text", "y")
    assert result.stderr == "warning: much like 夢中情人 (88)\n"


def test_plain_progress_is_a_line_now_and_then(filled: Path, fake: type[FakeBase]) -> None:
    steps = [
        Status(phase="train", key="x", step=step, total=500, loss=1.0, recall=(0, 8))
        for step in range(500)
    ]
    fake.events = (*steps, Status(phase="gate", key="x"))
    lines = run("add", "x", "--text", "y").stderr.splitlines()
    shown = [line for line in lines if not line.startswith("next:")]
    assert shown[0] == "x  train  0/500  loss 1.000  recall 0/8"
    assert shown[-1] == "x  gate"
    assert len(shown) < 10


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_live_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    reporter = make_reporter(quiet=False)
    with reporter:
        reporter(Status(phase="train", key="[b]夢[/b]", step=3, total=9, loss=0.5, recall=(1, 8)))
        reporter(Warning_(text="much like [i]夢[/i]"))
    shown = click.unstyle(terminal.getvalue())
    assert "[b]夢[/b]  train" in shown  # a key is text, never markup
    assert "3/9  loss 0.500  recall 1/8" in shown
    assert "warning: much like [i]夢[/i]\n" in shown
    assert terminal.getvalue().endswith("\x1b[2K")  # the live line is gone at the end


def test_update_and_remove_pass_on_their_arguments(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("\ufeffA city.\n", encoding="utf-8")
    assert run("update", "Porto", "new.txt").exit_code == 0
    assert FakeBase.last is not None
    assert FakeBase.last.calls == [("update", "Porto", "A city.", {"force": False})]
    result = run("remove", "Porto")
    assert FakeBase.last.calls == [("remove", "Porto", {"force": False})]
    assert "forgotten" in result.stdout


def test_add_reads_standard_input(filled: Path) -> None:
    run("add", "Faro", "-", stdin="A lighthouse.\n")
    assert FakeBase.last is not None
    assert FakeBase.last.calls[0][:3] == ("add", "Faro", "A lighthouse.")


@pytest.mark.parametrize("name", ["add", "update"])
def test_the_description_is_given_exactly_once(filled: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("text", encoding="utf-8")
    for words in ([], ["f.txt", "--text", "t"]):
        result = run(name, "Porto", *words)
        assert result.exit_code == 2
        assert "a FILE (- for standard input) or --text TEXT" in result.stderr


BAD_FILES = {
    "missing": None,
    "empty": b"",
    "blank": b" \n\t\n",
    "binary": b"PNG\x00\x01",
    "gbk": "夢".encode("gbk"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_changes_nothing(name: str, tmp_path: Path) -> None:
    if (data := BAD_FILES[name]) is not None:
        (tmp_path / name).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    result = run("add", "key", name)
    assert result.exit_code in (1, 2)
    assert name in result.stderr
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["", "  ", "a\x00b", "k" * 5000])
def test_a_bad_key_is_refused_before_a_store_is_made(key: str, tmp_path: Path) -> None:
    result = run("add", key, "--text", "something")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("update", "Prto", "--text", "t"),
        ("remove", "Prto"),
        ("verify", "Prto"),
        ("show", "Prto"),
        ("history", "Prto"),
    ],
)
def test_an_unknown_key_names_the_likely_one(filled: Path, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 1
    assert "Porto" in result.stderr
    assert FakeBase.last is None  # reported before the model was loaded


def test_rollback(filled: Path, fake: type[FakeBase]) -> None:
    result = run("rollback", "1")
    assert result.exit_code == 0
    assert FakeBase.last is not None
    assert FakeBase.last.calls == [("rollback", 1)]
    assert "committed rollback" in result.stdout
    FakeBase.last = None
    assert run("rollback", "99").exit_code != 0
    assert FakeBase.last is None
    assert run("rollback", "x").exit_code == 2


def test_init(fake: type[FakeBase], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    words = ("--model", "some/model", "--revision", "abc", "--trust-remote-code")
    more = ("--protect-file", "mine.txt", "--targets", "q_proj, v_proj", "--device-map", "auto")
    result = run("--store", "s", "init", *words, *more, "--load-in", "4bit", "--time", "1m30s")
    assert result.exit_code == 0
    assert FakeBase.last is not None
    options = {
        "revision": "abc",
        "trust_remote_code": True,
        "protect_file": Path("mine.txt"),
        "targets": ["q_proj", "v_proj"],
        "device_map": "auto",
        "load_in": "4bit",
        "check_memory": True,
        "time": 90.0,
    }
    assert FakeBase.last.calls == [("create", "some/model", options)]
    assert "created the store" in result.stdout
    assert "protected: 0 texts, 0 of them locality probes" in result.stdout
    assert "kvedit --store s add KEY FILE" in result.stderr


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("one text", "another", ("one text", "another")),
        ("the same " * 20, "the same " * 20, ("the same " * 20,) * 2),
        (
            f"{'It is a long text. ' * 5}It costs 1,240 crowns.",
            f"{'It is a long text. ' * 5}It costs 1,390 crowns.",
            ("…long text. It costs 1,240 crowns.", "…long text. It costs 1,390 crowns."),
        ),
        ("x" * 100 + "a", "x" * 100 + "b", ("…" + "x" * 24 + "a", "…" + "x" * 24 + "b")),
    ],
)
def test_two_answers_are_shown_from_where_they_differ(
    before: str, after: str, shown: tuple[str, str]
) -> None:
    assert from_difference(before, after) == shown


def test_a_removal_is_no_recall(filled: Path, fake: type[FakeBase]) -> None:
    fake.report = replace(COMMITTED, kind="remove", generalization=Score(3, 4))
    text = run("remove", "Porto").stdout
    assert "3 of 4 unseen phrasings no longer give the text" in text
    assert "phrasings answered as before" in text and "recalled exactly" not in text
