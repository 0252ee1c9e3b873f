"""Asking with recall, explanations, and differences of revisions."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from kvedit.asking.explain import Change, Explanation, NearFact
from kvedit.asking.recall import SOURCES
from kvedit.cli.commands import ask
from kvedit.facts.fact import Fact
from kvedit.store.store import Store
from tests.cli.cli_fakes import FakeBase, FakeSource, commit, run

PORTO = {
    "key": "Porto", "name": "Porto", "score": 100.0, "origin": "store",
    "text": "A harbour town.", "exact": True,
}  # fmt: skip


def calls() -> list[object]:
    assert FakeBase.last is not None
    return [call[0] if len(call) < 5 else (call[0], call[4]) for call in FakeBase.last.calls]


@pytest.mark.parametrize(
    ("options", "recall"),
    [
        ((), None),
        (("--recall",), True),
        (("--show-recall",), True),
        (("--recall-from", "model"), "model"),
        (("--recall", "--recall-from", "store"), "store"),
    ],
)
def test_each_option_of_recall_turns_it_on(
    filled: Path, options: tuple[str, ...], recall: object
) -> None:
    assert run("ask", "x", *options).stdout == "now: x\n"
    assert calls() == ["ask" if recall is None else ("ask", recall)]


def test_every_source_can_be_chosen() -> None:
    (option,) = (one for one in ask.ask.params if one.name == "recall_from")
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == SOURCES


def test_sources_stand_in_the_json_of_a_recalled_answer_only(filled: Path) -> None:
    assert json.loads(run("ask", "x", "--recall", "--json").stdout)["sources"] == [PORTO]
    assert "sources" not in json.loads(run("ask", "x", "--json").stdout)
    document = json.loads(run("chat", "--recall", "--json", stdin="x\n").stdout)
    assert document["sources"] == [PORTO]


def test_show_recall_says_on_stderr_what_the_answer_stood_on(
    filled: Path, fake: type[FakeBase]
) -> None:
    result = run("ask", "x", "--show-recall")
    assert result.stderr == "recalled Porto (the store's text): A harbour town.\n"
    near = FakeSource(score=92.3, origin="model", text="A harbour.", exact=False)
    fake.sources = (near,)
    how = "the model's recitation, spelt nearly so (92); the store has another text"
    assert f"recalled Porto ({how}): A harbour." in run("ask", "x", "--show-recall").stderr
    fake.sources = ()
    nothing = "recalled nothing: the question names no fact\n"
    assert run("ask", "x", "--show-recall").stderr == nothing


def test_a_recalled_answer_streams_too(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "_on_terminal", lambda: True)
    result = run("ask", "x", "--show-recall")
    assert result.stdout == "2: x\n"
    assert (
        "no text of Lagos is put before the question: it is one of its own phrasings"
        in result.stderr
    )
    assert "not recalled Faro: its text does not fit" in result.stderr
    assert run("chat", "--recall", stdin="x\n").stdout == "2: x\n"


def test_explain_shows_the_edit_and_the_facts(filled: Path, fake: type[FakeBase]) -> None:
    assert "no edit changed this answer" in run("explain", "Where is Porto?").stdout
    fake.explanation = Explanation(
        question="", revision=2, answer="A harbour town.", base_answer="A wine.", asked=3,
        changes=(Change(
            before=1, revision=2, kind="add", keys=("Porto",), finished_at="2026-11-29T02:31:47",
            answer_before="A sweet wine.", answer_after="A harbour town.",
        ),),
        facts=(
            NearFact(key="Porto", named=100.0, nearness=0.5, edited=True, state="committed",
                     description="A harbour town."),
            NearFact(key="夢中情爐", named=0.0, nearness=0.1, edited=False, state="removed",
                     description="一座會唱歌的爐子。"),
        ),
    )  # fmt: skip
    shown = run("explain", "Where is Porto?").stdout
    assert "changed at revision 2: add Porto, 2026-11-29 02:31 UTC" in shown
    assert "A sweet wine." in shown
    assert "named, edited there" in shown
    assert "shares words (0.10)" in shown
    document = json.loads(run("explain", "-", "--json", stdin="Where?").stdout)
    assert document["question"] == "Where?"
    assert document["changes"][0]["keys"] == ["Porto"]
    assert [fact["key"] for fact in document["facts"]] == ["Porto", "夢中情爐"]


def test_diff_without_questions_loads_no_model(filled: Path) -> None:
    with Store.open(filled) as store:
        porto = store.require("Porto").fact
        commit(store, "update", porto, porto.with_description("A city."))
        commit(store, "remove", store.require("情爐").fact, None)
        commit(store, "add", None, Fact.create("Faro", "A lighthouse."))
    shown = run("diff", "2", "5", "--ask", "0").stdout.splitlines()
    assert shown[0] == "removed: 夢中情爐"
    assert "updated: Porto" in shown and "added: Faro" in shown
    assert shown[-1] == "3 facts differ; none was asked"
    document = json.loads(run("diff", "5", "2", "--ask", "0", "--json").stdout)
    changes = {fact["key"]: fact["change"] for fact in document["facts"]}
    assert changes == {"夢中情爐": "added", "Porto": "updated", "Faro": "removed"}
    assert FakeBase.last is None


def test_diff_of_a_revision_that_does_not_exist(filled: Path) -> None:
    result = run("diff", "0", "9", "--ask", "0")
    assert result.exit_code == 2
    assert "there is no revision 9" in result.stderr


def test_diff_asks(filled: Path) -> None:
    shown = run("diff", "1", "2").stdout
    assert "1 fact differs; 32 asked at both revisions" in shown
    assert "asked       What is Porto?" in shown
    assert calls() == ["diff"]
