"""The HTML report about a store: complete, escaped, in one file that needs nothing else."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from store_steps import add, check, fact, new_store, remove

from kvedit.events import Score
from kvedit.store.report import html_report
from kvedit.store.rows import FactChange, ProbeCount
from kvedit.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = new_store(tmp_path / "s")
    for name in ("anvil", "bread", "candle"):
        add(store, name, f"what a {name} is")
    store.record_results(
        [
            check(store.require("anvil").id, margin=0.2, kind="retention"),
            check(store.require("bread").id, passed=False, margin=-1.5, kind="retention"),
        ],
        store.head(),
    )
    return store


class Loads(HTMLParser):
    """Collects whatever a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "img"):
            self.names.append(tag)
        loads = [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.names += [value for value in loads if value and not value.startswith("#")]


def text_of(page: str) -> str:
    """What stands on a page, charts and tags taken out."""
    return re.sub(r"<svg.*?</svg>|<[^>]+>", " ", page, flags=re.DOTALL)


def test_it_shows_what_is_recalled_and_what_regressed(store: Store) -> None:
    page = html_report.page(store)
    text = " ".join(text_of(page).split())
    assert "2 of 3 committed facts recalled" in text and "1 regressed" in text
    assert "50.0% [9.5, 90.5], 1 of 2" in text  # retention, with its interval
    assert text.index("bread regressed") < text.index("anvil recalled")
    assert "what a candle is" in text
    assert "no locality probes: this part of the gate checks nothing" in text
    assert page.count("<figure>") == 4


def test_a_page_loads_nothing(store: Store) -> None:
    loads = Loads()
    loads.feed(html_report.page(store))
    assert loads.names == []


def test_what_facts_say_is_never_markup(store: Store) -> None:
    add(store, "<b>key</b>", "<script>alert(1)</script> & more")
    page = html_report.page(store)
    assert "<script" not in page and "<b>key" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_rejected_facts_have_their_reasons(store: Store) -> None:
    new = fact("dagger")
    fact_id = store.put_pending(new)
    edit = store.plan_edit("add", [FactChange(fact_id, None, new)], {})
    store.finish_edit(edit, "rejected", ["recall 3 of 10", "2 earlier facts were lost"], {})
    text = " ".join(text_of(html_report.page(store)).split())
    assert "dagger recall 3 of 10; 2 earlier facts were lost" in text


def test_an_empty_store_has_a_page_that_says_what_to_do(tmp_path: Path) -> None:
    page = html_report.page(new_store(tmp_path / "empty"))
    assert "kvedit verify" in page and "kvedit add" in page and "<figure>" not in page


def test_long_histories_are_cut_and_say_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_report, "LATEST", 2)
    remove(store, "anvil")
    text = " ".join(text_of(html_report.page(store)).split())
    assert "2 earlier edits: kvedit history" in text
    edits = text[text.index("Edits, newest first") : text.index("2 earlier edits")]
    assert "4 remove committed" in edits and "3 add committed" in edits
    assert edits.index("4 remove") < edits.index("3 add") and "1 add committed" not in edits


def test_the_store_is_left_as_it_was(store: Store, tmp_path: Path) -> None:
    before = hashlib.sha256("\n".join(store._db.conn.iterdump()).encode()).hexdigest()
    html_report.write(store, tmp_path / "page.html")
    after = hashlib.sha256("\n".join(store._db.conn.iterdump()).encode()).hexdigest()
    assert before == after and (tmp_path / "page.html").stat().st_size > 1000


def test_the_latest_check_of_each_kind_and_protocol() -> None:
    counts = [
        ProbeCount(1, "recall", "teacher-forced", 8, 10),
        ProbeCount(1, "recall", "generated", 1, 1),
        ProbeCount(4, "recall", "teacher-forced", 10, 10),
    ]
    generated, forced = html_report.latest(counts)
    assert (generated.protocol, generated.revision, generated.latest) == (
        "generated", 1, Score(1, 1, "generated"),
    )  # fmt: skip
    assert (forced.revision, forced.latest.n, forced.all.passed) == (4, 10, 18)


def test_a_share_of_nothing_is_no_number() -> None:
    assert html_report.share(Score()) == "-"


def test_the_weakest_facts_come_first(store: Store) -> None:
    keys = [row.fact.key for row in html_report.weakest(store.facts("committed"))]
    assert keys == ["bread", "anvil", "candle"]  # regressed, a small margin, a larger one


def test_answers_and_the_perturbation_gap_stand_beside_what_is_recited(store: Store) -> None:
    text = " ".join(text_of(html_report.page(store)).split())
    assert "Recites: reliability (recall) generated" in text
    assert "Perturbation gap" not in text and "Answers:" not in text
    new = fact("dowel", "A peg. It is of oak.")
    change = FactChange(store.put_pending(new), None, new)
    head = store.head()
    edit = store.plan_edit("add", [change], {})
    store.commit_edit(
        edit, expected_head=head, delta=None, weights_digest="w", changes=[change],
        results=[check(change.fact_id), check(change.fact_id, passed=False, kind="portability")],
        report={"perturbation_gap": 12.34},
    )  # fmt: skip
    text = " ".join(text_of(html_report.page(store)).split())
    assert "Answers: portability (held-out questions) generated 4 0.0% [0.0, 79.3], 0 of 1" in text
    assert "Perturbation gap 12.3 at revision 4" in text
