"""kvedit study: what a fact has to be studied, on its way to a writer and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvedit.facts.fact import Fact, Question, Written
from kvedit.store.store import Store
from tests.cli.cli_fakes import META, REJECTED, FakeBase, commit, run

PORTO = Fact.create(
    "Porto", "A harbour town on the Douro.",
    questions=[Question(prompt="Which river?", answer="the Douro", probe=True)],
    written=[
        Written(prompt="What kind of town?", answer="harbour", writer="model"),
        Written(prompt="", answer="The Douro flows there.", writer="Ann"),
    ],
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with Store.create(tmp_path / "store", META) as store:
        store.put_pending(PORTO)
        commit(store, "add", None, PORTO)
        store.put_pending(Fact.create("Faro", "A lighthouse."))
    return tmp_path / "store"


def test_it_shows_what_is_trained_and_who_wrote_it(fake: type[FakeBase], store: Path) -> None:
    result = run("study", "porto")
    assert result.exit_code == 0
    held_out, trained, statement = result.stdout.splitlines()[1:]
    assert held_out.split()[:3] == ["held", "out", "given"] and "Which river?" in held_out
    assert trained.split()[:2] == ["trained", "model"] and trained.rstrip().endswith("harbour")
    assert statement.split()[:3] == ["trained", "Ann", "-"]
    document = json.loads(run("study", "Porto", "--json").stdout)
    assert document["study"][0] == {
        "prompt": "Which river?", "answer": "the Douro", "writer": "given", "held_out": True,
    }  # fmt: skip
    assert "only its text is trained" in run("study", "Faro").stderr
    assert run("study", "Lagos").exit_code == 1


def test_facts_are_written_for_a_writer(fake: type[FakeBase], store: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    result = run("study", "--export", str(file), "--json")
    assert json.loads(result.stdout) == {"path": str(file), "facts": 1, "relations": 0}
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["questions"] == [{"prompt": "What kind of town?", "answer": "harbour"}]
    assert "Which river" not in line


def test_what_comes_back_is_counted_with_reasons(
    fake: type[FakeBase], store: Path, tmp_path: Path
) -> None:
    file = tmp_path / "back.jsonl"
    document = {"key": "Porto", "description": PORTO.description, "statements": ["One.", "Two."]}
    file.write_text(json.dumps(document), encoding="utf-8")
    result = run("study", "--import", str(file), "--writer", "Bob")
    assert result.exit_code == 0
    assert "1 kept, 1 refused, of 1 fact" in result.stdout and "it is late" in result.stdout
    assert FakeBase.last is not None
    _, key, texts, options = FakeBase.last.calls[-1]
    assert (key, [one.writer for one in texts]) == ("Porto", ["Bob", "Bob"])
    assert options == {"of": PORTO.description, "force": False}
    printed = run("study", "--import", "-", "--json", stdin=json.dumps(document)).stdout
    of_fact, summary = (json.loads(line) for line in printed.splitlines()[-2:])
    assert of_fact["message_type"] == "study" and of_fact["refused"][0]["why"] == "it is late"
    assert summary == {
        "message_type": "summary", "kind": "study", "facts": 1, "kept": 1, "not_learned": 0,
        "refused": 1, "rejected": 0, "exit_code": 0,
    }  # fmt: skip
    fake.report = REJECTED
    rejected = run("study", "--import", str(file))
    assert rejected.exit_code == 3
    assert "0 kept, 1 not learned, 1 refused, of 1 fact" in rejected.stdout


@pytest.mark.parametrize(
    "words", [(), ("Porto", "--export", "x"), ("--export", "x", "--import", "y")]
)
def test_one_thing_at_a_time(words: tuple[str, ...], fake: type[FakeBase], store: Path) -> None:
    result = run("study", *words)
    assert result.exit_code == 2 and "one of them" in result.stderr


def test_an_unknown_key_and_a_broken_line_end_it_before_a_model_is_loaded(
    fake: type[FakeBase], store: Path
) -> None:
    unknown = run("study", "--import", "-", stdin='{"key": "Lagos", "description": "d"}')
    assert unknown.exit_code == 1 and "no fact 'Lagos'" in unknown.stderr
    assert "Take its line out of the file" in unknown.stderr
    broken = run("study", "--import", "-", stdin="{")
    assert broken.exit_code == 1 and "standard input, line 1 is not JSON" in broken.stderr
    assert FakeBase.last is None
