"""The HTML report about a store: complete, escaped, in one file that needs nothing else."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from store_steps import (
    add,
    check,
    erase,
    fact,
    fill,
    new_store,
    prune,
    remove,
    roll_back,
)

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


class Outside(HTMLParser):
    """Counts the tables that do not stand in an element that scrolls, and headings by class."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside = 0
        self.columns: list[tuple[str, list[str], list[list[str]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("class") or ""
        if tag == "table":
            self.outside += self.open[-1:] != ["table"]
            self.columns.append((kind, [], []))
        elif tag == "div":
            self.open.append(kind)
        elif tag == "tr":
            self.columns[-1][2].append([])
        elif tag == "th":
            self.columns[-1][1].append(kind)
        elif tag == "td":
            self.columns[-1][2][-1].append(kind)

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self.open.pop()


def test_tables_scroll_and_headings_stand_over_their_numbers(store: Store) -> None:
    reject(store, "dagger", "recall 3 of 10")
    page = html_report.page(store)
    tables = Outside()
    tables.feed(page)
    assert tables.outside == 0 and len(tables.columns) == 5
    for _, headings, rows in tables.columns:
        places = [at for at, kind in enumerate(headings) if kind == "number"]
        for row in filter(None, rows):
            assert [at for at, kind in enumerate(row) if kind == "number"] == places
    assert ".table { overflow-x: auto" in page
    assert re.search(r"th\.number, td\.number \{ text-align: right", page)


def reject(store: Store, key: str, *reasons: str, outcome: str = "rejected") -> None:
    """Add a fact that is refused."""
    new = fact(key)
    fact_id = store.put_pending(new)
    edit = store.plan_edit("add", [FactChange(fact_id, None, new)], {})
    store.finish_edit(edit, outcome, list(reasons), {})


def test_no_path_of_the_machine_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "Jane Doe's" / "my facts"
    folder.parent.mkdir()
    store = new_store(folder)
    model = tmp_path / "models (old)" / "small model"
    store.set_metas({"model_name": str(model), "model_path": str(model)})
    add(store, "shebang", "The first line of a script: #!/usr/bin/env python3")
    reject(store, "dagger", f"no room at {folder}/deltas/x.safetensors: see /var/log/disk/full.log")
    reject(
        store,
        "ember",
        f"{model} has no tokenizer",
        "C:\\Users\\Jane Doe\\a b.bin",
        outcome="failed",
    )
    page = html_report.page(store)
    text = " ".join(text_of(page).split())
    assert "<title>kvedit: my facts, revision 1</title>" in page
    assert "Knowledge store my facts small model (bfloat16)" in text
    assert "dagger no room at x.safetensors: see full.log" in text
    assert "ember: small model has no tokenizer; a b.bin" in text
    assert "#!/usr/bin/env python3" in text  # what a fact says stays
    assert not any(part in page for part in (str(tmp_path), tmp_path.name, "Jane", "/var/log"))


def test_a_model_of_a_hub_keeps_its_name(store: Store) -> None:
    store.set_meta("model_name", "some-org/model-1.5")
    assert "some-org/model-1.5 (bfloat16)" in html_report.page(store)


def test_a_score_of_numerical_ties_alone_says_so(store: Store) -> None:
    anvil = store.require("anvil").id
    tie = check(anvil, margin=0.01, kind="paraphrase")
    store.record_results([tie], store.head())
    assert "generated 3 100.0% [20.7, 100.0], 1 of 1; numerical ties only" in plain(store)
    forced = [
        replace(tie, protocol="teacher-forced", margin=2.0, passed=ok) for ok in (True, False)
    ]
    free = replace(tie, margin=None)
    store.record_results([*forced, free], store.head())
    text = plain(store)
    assert "(paraphrases) generated 3 100.0% [20.7, 100.0], 1 of 1 100.0%" in text
    assert "(paraphrases) teacher-forced 3 66.7% [20.8, 93.9], 2 of 3; 1 numerical tie" in text


def plain(store: Store) -> str:
    """The text of a store's page, with single spaces."""
    return " ".join(text_of(html_report.page(store)).split())


def test_edits_of_an_erased_fact_say_what_is_gone(store: Store) -> None:
    roll_back(store, 2)
    erase(store, "anvil")
    text = plain(store)
    assert "Revisions that can no longer be restored: 4 erased." in text
    assert "erased facts are counted nowhere" in html_report.page(store)
    history = text[text.index("Edits, newest first") :]
    assert history.index("5 erase committed 5 - 1 fact 4 rollback") < history.index("add committed")
    assert "(can no longer be restored: erased)" in history and "anvil" not in text


def test_edits_whose_revisions_were_pruned_say_so(store: Store) -> None:
    remove(store, "bread")
    folder = store.checkpoints_path / f"{store.head():08d}"
    folder.mkdir()
    store.add_checkpoint(store.head(), folder, "its digest")
    prune(store, 4)
    text = plain(store)
    assert "Revisions that can no longer be restored: 3 pruned." in text
    assert "3 add committed 3 - candle (can no longer be restored: pruned)" in text
    assert "4 remove committed 4 - bread 3 add" in text and "erased" not in text


def test_a_history_with_signs_that_no_file_can_hold_has_a_page(
    store: Store, tmp_path: Path
) -> None:
    reject(store, "dagger", "no room")
    store._execute("UPDATE edits SET reasons = ? WHERE id = 4", ['["a\\ud800b"]'])
    html_report.write(store, tmp_path / "page.html")
    assert "dagger" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_store_of_3000_facts_has_a_small_page_soon(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    fill(store, 3000)
    began = time.process_time()
    page = html_report.page(store)
    assert time.process_time() - began < 10 and len(page.encode()) < 5_000_000
    text = " ".join(text_of(page).split())
    assert "All 3,000 facts" in text and "made-up thing 2999" in text
    assert "The latest 200 edits are shown; 2,800 earlier edits: kvedit history" in text
    assert "The latest 200 of 300 rejected facts are shown." in text
    assert "The weakest 30 of 2,700 committed facts." in text
    assert "Descriptions are cut at 200 characters." in text
    assert "2640 of 2700 committed facts recalled when last checked 60 regressed 2590 stale" in text
    history = text[text.index("Edits, newest first") :]
    assert "3000 add" in history and " 2801 add" in history and " 2800 add" not in history


def test_the_latest_facts_are_shown_where_there_are_too_many(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_report, "FACTS", 2)
    text = plain(store)
    facts = text[text.index("The latest 2 of 3 facts") :]
    assert "candle" in facts and "bread" in facts and "anvil" not in facts
    monkeypatch.setattr(html_report, "FACTS_BYTES", 30)
    assert "The latest 1 of 3 facts" in plain(store)


def test_what_facts_say_is_never_markup(store: Store) -> None:
    add(store, "<b>key</b>", "<script>alert(1)</script> & more")
    page = html_report.page(store)
    assert "<script" not in page and "<b>key" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_rejected_facts_have_their_reasons(store: Store) -> None:
    reject(store, "dagger", "recall 3 of 10", "2 earlier facts were lost")
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
