"""Commands that ask the model or read the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.cells import cell_len

from kvedit.cli.commands import ask
from kvedit.facts.fact import Fact, Question
from kvedit.store.rows import FactChange, ProbeRow, ProtectedRow
from kvedit.store.store import Store
from tests.cli.cli_fakes import META, FakeAnswer, FakeBase, commit, run

# --- asking ----------------------------------------------------------------------------------


def test_ask_prints_the_answer_alone(filled: Path) -> None:
    result = run("ask", "What is Porto?", "--at", "1", "--max-new-tokens", "9")
    assert result.stdout == "now: What is Porto?\n"
    assert FakeBase.last is not None
    assert FakeBase.last.calls == [("ask", "What is Porto?", 1, 9)]


def test_ask_compare_base_shows_both(filled: Path) -> None:
    lines = run("ask", "x", "--compare-base").stdout.splitlines()
    assert lines == ["base model  base: x", "revision 2  now: x"]


def test_ask_json(filled: Path) -> None:
    document = json.loads(run("ask", "-", "--compare-base", "--json", stdin="問\n").stdout)
    answers = {"answer": "now: 問", "base_answer": "base: 問"}
    assert document == {"prompt": "問", "revision": 2, "cut": False, **answers}


def test_an_empty_prompt_is_a_usage_error(filled: Path) -> None:
    assert run("ask", " ").exit_code == 2


def test_chat_keeps_the_conversation(filled: Path) -> None:
    result = run("chat", stdin="hello\n\nagain\n/new\nfresh\n/exit\nnever\n")
    assert result.stdout.splitlines() == ["1: hello", "3: again", "1: fresh"]
    assert "/exit" in result.stderr


def test_ctrl_c_ends_an_answer_and_not_the_chat(filled: Path) -> None:
    result = run("chat", stdin="endless\nhello\n")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["1: ", "3: hello"]


def test_ask_streams_on_a_terminal(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "_on_terminal", lambda: True)
    assert run("ask", "x", "--max-new-tokens", "9").stdout == "1: x\n"
    assert FakeBase.last is not None
    assert FakeBase.last.calls == [("stream", "x", 9)]
    assert run("ask", "x", "--at", "1").stdout == "now: x\n"


def test_chat_wants_utf8(filled: Path) -> None:
    result = run("chat", stdin="夢\n".encode("gbk"))
    assert result.exit_code == 1
    assert "standard input is not UTF-8" in result.stderr


def test_chat_json_is_one_document(filled: Path) -> None:
    document = json.loads(run("chat", "--json", stdin="hello").stdout)
    assert document["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "now: hello"},
    ]


# --- reading ---------------------------------------------------------------------------------


def test_list(filled: Path) -> None:
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == ["key", "state", "health", "revision", "description"]
    assert any(line.startswith("夢中情爐  committed") and "唱歌" in line for line in lines)
    assert any(line.startswith("Porto     committed") for line in lines)
    assert [row["key"] for row in json.loads(run("list", "--json").stdout)] == ["夢中情爐", "Porto"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_long_text_is_shortened_between_words(
    filled: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    text = "A lighthouse above the harbour " * 9
    with Store.open(filled) as store:
        commit(store, "add", None, Fact.create("Faro", text))
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("list").stdout.splitlines()
    assert all(cell_len(line) <= columns for line in lines)
    shown = lines[-1].partition("A lighthouse")[2]
    assert shown.endswith("…") and shown[:-1].split()[-1] in text.split()


def test_control_characters_are_escaped(filled: Path, fake: type[FakeBase]) -> None:
    said = FakeAnswer("a\x1b[31m\u202eb\n", 2, (), (), ())
    fake.answer = lambda self, messages, **options: said  # type: ignore[method-assign]
    assert run("ask", "x").stdout == "a\\x1b[31m\\u202eb\n\n"
    assert "\\x1b[31m" in run("ask", "x", "--compare-base").stdout


def test_list_of_an_empty_store(tmp_path: Path) -> None:
    Store.create(tmp_path / "store", META).close()
    result = run("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no committed facts" in result.stderr
    assert json.loads(run("list", "--json").stdout) == []


def test_list_by_state(filled: Path) -> None:
    with Store.open(filled) as store:
        store.put_pending(Fact.create("Faro", "A lighthouse."))
    assert "Faro" not in run("list").stdout
    assert "Faro" in run("list", "--state", "pending").stdout
    assert len(json.loads(run("list", "--state", "all", "--json").stdout)) == 3


def test_show_finds_aliases_and_shows_all(filled: Path) -> None:
    text = run("show", "情爐").stdout
    for part in ("夢中情爐", "zh-Hant", "revision 1", "一座會唱歌的爐子。", "recall", "+2.50"):
        assert part in text
    document = json.loads(run("show", "情爐", "--json").stdout)
    assert document["description"] == "一座會唱歌的爐子。"
    assert document["results"][0]["passed"] is True
    assert document["edits"][0]["kind"] == "add"


def test_show_says_what_a_fact_recites_and_answers(filled: Path) -> None:
    questions = [
        Question(prompt="Which river?", answer="The Douro."),
        Question(prompt="Which country?", answer="Portugal", probe=True),
    ]
    with Store.open(filled) as store:
        fact = Fact.create("Faro", "A port.", questions=questions, statements=["Ships call."])
        commit(store, "add", None, fact)
        fact_id = store.require("Faro").id
        for passed in (False, True):  # the later one counts
            probe = ProbeRow(
                fact_id=fact_id, kind="portability", protocol="generated", prompt="Which country?",
                expected="Portugal", answer="Portugal.", passed=passed,
            )  # fmt: skip
            store.record_results([probe], store.head())
    text = run("show", "Faro").stdout
    for part in ("Which river? - The Douro.\n", "Portugal (never trained)", "Ships call."):
        assert part in text
    assert "questions about it at revision 3: 1/1  100%  (95% interval 21-100%, generated)" in text
    document = json.loads(run("show", "Faro", "--json").stdout)
    assert document["questions"][1] == {
        "prompt": "Which country?", "answer": "Portugal", "probe": True,
    }  # fmt: skip
    assert (document["answers"]["passed"], document["answers"]["n"]) == (1, 1)
    assert document["answers"]["revision"] == 3
    assert (document["generalizes"]["n"], document["generalizes"]["revision"]) == (0, None)
    assert (document["recites"]["passed"], document["recites"]["n"]) == (1, 1)
    listed = json.loads(run("list", "--json").stdout)
    assert listed[-1]["statements"] == ["Ships call."]


def test_similar_names_keys_with_scores(filled: Path) -> None:
    assert "100    夢中情爐" in run("similar", "梦中情炉").stdout
    assert json.loads(run("similar", "梦中情炉", "--json").stdout)[0]["key"] == "夢中情爐"
    none = run("similar", "zzzz")
    assert (none.exit_code, none.stdout) == (0, "")


def test_history_is_latest_first(filled: Path) -> None:
    edits = json.loads(run("history", "--json").stdout)
    assert [edit["revision"] for edit in edits] == [2, 1]
    assert [edit["keys"] for edit in edits] == [["Porto"], ["夢中情爐"]]
    assert "Porto" in run("history", "--limit", "1").stdout
    assert "夢中情爐" not in run("history", "--limit", "1").stdout
    assert "Porto" not in run("history", "情爐").stdout


def test_history_shows_why_an_edit_was_refused(filled: Path) -> None:
    with Store.open(filled) as store:
        fact = Fact.create("Faro", "A lighthouse.")
        edit = store.plan_edit("add", [FactChange(store.put_pending(fact), None, fact)], {})
        store.finish_edit(edit, "rejected", ["recall 1 of 8"], {})
    text = run("history").stdout
    assert "rejected" in text
    assert "Faro: recall 1 of 8" in text


def test_status(filled: Path) -> None:
    text = run("status").stdout
    assert "kvedit-tiny" in text and "unfinished" not in text and "change" not in text
    assert "no locality probes: this part of the gate checks nothing" in text
    fields = json.loads(run("status", "--json").stdout)
    assert fields["head"] == 2 and fields["locality_probes"] == 0
    with Store.open(filled) as store:
        probe = ProtectedRow(role="locality", prompt="q", answer="a")
        store.add_protected([probe] * 31)
        assert "only 31 locality probes" in run("status").stdout
        store.add_protected([probe])
    assert "32 texts, 32 of them locality" in run("status").stdout.replace("\n", " ")
    assert json.loads(run("status", "--json").stdout)["few_probes"] == ""
    (filled / "cache").mkdir(exist_ok=True)
    (filled / "cache" / "training-5-0123456789abcdef.safetensors").write_bytes(b"kept")
    assert "if it was interrupted, repeat the command" in run("status").stdout


def test_the_store_is_found_in_the_environment(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVEDIT_STORE", str(filled.rename(filled.parent / "moved")))
    assert "Porto" in run("list").stdout
    assert run("--store", "nowhere", "list").exit_code == 10


def test_report_writes_a_page_and_says_where(filled: Path, tmp_path: Path) -> None:
    text = run("report", "-o", "page.html").stdout
    assert text.startswith("wrote page.html: revision 2, ")
    assert "夢中情爐" in (tmp_path / "page.html").read_text(encoding="utf-8")
    document = json.loads(run("report", "--json").stdout)
    assert document["path"] == "kvedit-report.html" and document["bytes"] > 1000


def test_report_where_there_is_no_folder_is_an_error_that_says_so(filled: Path) -> None:
    result = run("report", "-o", "nowhere/page.html")
    assert result.exit_code in (1, 2) and "nowhere" in result.stderr


def test_a_store_whose_making_was_interrupted_is_half_made(tmp_path: Path) -> None:
    meta = {name: value for name, value in META.items() if name != "protected_text"}
    Store.create(tmp_path / "store", meta).close()
    result = run("status", "--json")
    assert json.loads(result.stdout)["half_made"] is True
    assert "half made    kvedit init was interrupted" in run("status").stdout
    for words in (("list",), ("history",), ("ask", "What?"), ("ask", "What?", "--at", "0")):
        said = run(*words).stderr
        assert said.count("is half made: `kvedit init` was interrupted; run it again") == 1, words
    said = run("list").stderr
    assert "next: kvedit init" in said and "add" not in said
    with Store.open(tmp_path / "store") as store:
        store.set_meta("protected_text", "complete")
    assert "half made" not in run("status").stdout + run("list").stderr


@pytest.mark.parametrize("columns", ["0", "1", "-5", "abc"])
def test_a_terminal_of_no_width_still_shows_something(
    filled: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "Porto" in run("list").stdout and "fingerprint" in run("status").stdout


def test_a_removed_fact_recites_nothing(filled: Path) -> None:
    with Store.open(filled) as store:
        row = store.require("Porto")
        commit(store, "remove", row.fact, None)
    text = run("show", "Porto").stdout
    assert "removed" in text and "recites" not in text
    assert json.loads(run("show", "Porto", "--json").stdout)["recites"]["n"] == 0
