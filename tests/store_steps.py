"""Steps that tests of the store share: commit and roll back without a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from kvedit.facts.fact import Fact
from kvedit.files import put
from kvedit.store import integrity
from kvedit.store.forget.scrub import scrub
from kvedit.store.rows import FactChange, ProbeRow, Row, fact_columns, fact_text
from kvedit.store.store import Store

META = {"model_name": "tiny", "model_fingerprint": "base-digest", "dtype": "bfloat16"}


def new_store(path: Path) -> Store:
    """An empty store."""
    return Store.create(path, META)


def fact(key: str, text: str = "some text", **parts: object) -> Fact:
    """A valid English fact."""
    return Fact.create(key, text, lang="en", **parts)  # type: ignore[arg-type]


def check(
    fact_id: int, *, passed: bool = True, margin: float = 1.0, kind: str = "recall"
) -> ProbeRow:
    """One probe's outcome."""
    return ProbeRow(
        fact_id=fact_id,
        kind=kind,
        protocol="generated",
        prompt="what?",
        expected="a",
        answer="a" if passed else "b",
        passed=passed,
        margin=margin,
    )


def delta_for(store: Store, text: str) -> str:
    """Put a delta's file into the store."""
    return put(store.deltas, text.encode(), ".safetensors")


def digest_of(store: Store, delta: str | None = None) -> str:
    """What the weights' digest would be: a function of the deltas in order."""
    deltas = [str(row.delta) for row in store.lineage(store.head())] + ([delta] if delta else [])
    return hashlib.sha256("".join(deltas).encode()).hexdigest() if deltas else "base-digest"


def commit(
    store: Store,
    kind: str,
    changes: list[FactChange],
    *results: ProbeRow,
    not_learned: tuple[str, ...] = (),
) -> int:
    """Plan, train and commit one edit; returns the revision."""
    head = store.head()
    edit_id = store.plan_edit(kind, changes, {"seed": 0})
    delta = delta_for(store, f"delta of edit {edit_id}")
    store.mark_trained(edit_id, delta)
    return store.commit_edit(
        edit_id,
        expected_head=head,
        delta=delta,
        weights_digest=digest_of(store, delta),
        changes=changes,
        results=results,
        report={
            "steps": 3,
            "relative_norms": {"up": 0.01 * edit_id, "down": 0.02 * edit_id},
            "not_learned": list(not_learned),
        },
    )


def add(store: Store, key: str, text: str = "some text", **parts: object) -> int:
    """Add a fact and commit it; returns its id."""
    new = fact(key, text, **parts)
    fact_id = store.put_pending(new)
    commit(store, "add", [FactChange(fact_id, None, new)], check(fact_id))
    return fact_id


def update(store: Store, key: str, text: str) -> int:
    """Change a fact's text; returns the revision."""
    row = store.require(key)
    changed = row.fact.with_description(text)
    return commit(store, "update", [FactChange(row.id, row.fact, changed)], check(row.id))


def remove(store: Store, key: str) -> int:
    """Take a fact out; returns the revision."""
    row = store.require(key)
    return commit(store, "remove", [FactChange(row.id, row.fact, None)])


def roll_back(store: Store, revision: int) -> int:
    """Roll back to a revision; returns the new one."""
    changes = store.rollback_changes(revision)
    edit_id = store.plan_edit("rollback", changes, {})
    return store.commit_edit(
        edit_id,
        expected_head=store.head(),
        delta=None,
        weights_digest=store.revision(revision).weights_digest,
        changes=changes,
        results=[],
        report={},
        restores=revision,
    )


def erase(store: Store, *keys: str) -> int:
    """Erase facts, and clean the files, without a model."""
    plan = store.erase_plan([store.require(key).id for key in keys])
    store.clean_rejected_files(store.wording(plan.fact_ids))
    store.release_protected(store.wording(plan.fact_ids))
    edit = store.plan_edit("erase", [], {})
    delta, weights, changes = None, "", []
    if plan.restores is not None:
        weights = store.revision(plan.restores).weights_digest
    else:
        delta = delta_for(store, f"the others, of edit {edit}")
        store.mark_trained(edit, delta)
        weights = hashlib.sha256(delta.encode()).hexdigest()
        rows = [row for row in store.facts("committed") if row.id not in plan.fact_ids]
        changes = [FactChange(row.id, row.fact, row.fact) for row in rows]
    revision = store.commit_edit(
        edit,
        expected_head=store.head(),
        delta=delta,
        weights_digest=weights,
        changes=changes,
        results=[],
        report={"kind": "erase", "key": "1 fact"},
        restores=plan.restores or 0,
        erases=plan.fact_ids,
    )
    scrub(store)
    return revision


def prune(store: Store, before: int) -> None:
    """Drop deltas, where a checkpoint stands for them already."""
    store.mark_pruned(store.prune_plan(before).dropped)
    store.recover()


def fill(store: Store, count: int) -> None:
    """Put facts, each with an edit and checks of its own, into an empty store's tables at once.

    Every tenth was rejected; keys and texts are of several lengths and scripts.
    """
    tables: dict[str, list[Row]] = {}
    revision = 0
    for number in range(1, count + 1):
        learned = number % 10 != 0
        rows = _made_up(number, revision, learned)
        for table, row in rows + _checks(number, revision + 1 if learned else None):
            tables.setdefault(table, []).append(row)
        revision += learned
    store._db.conn.execute("PRAGMA foreign_keys = OFF")  # edits and revisions name each other
    with store._transaction():
        for table, filled in tables.items():
            marks = ", ".join(f":{name}" for name in filled[0])
            sql = f"INSERT INTO {table} ({', '.join(filled[0])}) VALUES ({marks})"
            store._db.conn.executemany(sql, filled)
        store._execute("UPDATE meta SET value = ? WHERE name = 'head'", [str(revision)])
    store._db.conn.execute("PRAGMA foreign_keys = ON")


_WHEN = "2026-01-01T00:00:00+00:00"
_NORMS = {f"layers.{i}.{name}": 0.001 for i in range(24) for name in ("up", "down")}


def _made_up(number: int, parent: int, learned: bool) -> list[tuple[str, Row]]:
    """The rows of a fact and of its edit."""
    ending = ("", " 架空之物", " " + "Donaudampfschifffahrt" * 6)[number % 3]
    key = f"made-up thing {number}{ending}"
    text = f"{key} is number {number}. " + "It is 没有 <real> & never was. " * (number % 30)
    new, state, revision = fact(key, text), ("rejected", "committed")[learned], parent + 1
    edit: Row = {"id": number, "kind": "add", "state": state, "parent": parent}
    edit |= {"revision": revision if learned else None, "started_at": _WHEN}
    edit |= {"reasons": json.dumps([] if learned else [f"recall {number % 8} of 8"])}
    edit |= {"report": json.dumps({"seconds": 3.25, "relative_norms": _NORMS})}
    times = {"created_at": _WHEN, "updated_at": _WHEN}
    made: Row = {"id": revision, "parent": parent, "edit_id": number, "kind": "add"}
    made |= {"delta": f"{number:064x}", "weights_digest": "w", "created_at": _WHEN}
    version = {"fact_id": number, "revision": revision, "state": state, "fact": fact_text(new)}
    return [
        ("facts", {"id": number, **fact_columns(new), "state": state, **times}),
        ("edits", edit),
        ("edit_facts", {"edit_id": number, "fact_id": number}),
        *([("revisions", made), ("fact_versions", version)] if learned else []),
    ]


def _checks(number: int, revision: int | None) -> list[tuple[str, Row]]:
    """The rows of a fact's checks; the first of each was a numerical tie."""
    health = {"fact_id": number, "last_checked_revision": revision, "last_checked_at": _WHEN}
    passed = number % 50 != 7
    health |= {"passed": passed, "margin": (number % 90 + 1) / 10 * (1 if passed else -1)}
    rows = [("fact_health", health)] if revision else []
    for place in range(12):
        probe: Row = {"fact_id": number, "edit_id": number, "revision": revision}
        probe |= {"kind": ("recall", "paraphrase", "retention")[place % 3], "prompt": "what?"}
        probe |= {"protocol": "teacher-forced" if place else "generated", "margin": 1.5}
        probe |= {"passed": number % 40 != place, "created_at": _WHEN}
        rows.append(("probe_results", probe))
    return rows


def committed_texts(store: Store) -> dict[str, str]:
    """Key and text of every committed fact."""
    return {row.fact.key: row.fact.description for row in store.facts("committed")}


def problems(store: Store) -> list[str]:
    """What the integrity check complains about."""
    return [finding.what for finding in integrity.check(store) if finding.level != "ok"]


def checkpoint(store: Store) -> None:
    """Write a checkpoint of the head, of a model with four weights."""
    import torch

    from kvedit.adapter.deltas import Master
    from kvedit.revisions.rebuild import checkpoint_if_due

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    checkpoint_if_due(store, Master(model, ["0"]), every=1)
