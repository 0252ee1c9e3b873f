"""What the rows of a database say, compared with what other rows say of the same.

A fact's text stands in its own row, in the history (``fact_versions``) and beside the edit that
wrote it (``edit_facts``): a letter that changed in one of them is found by the others.

Invariant: nothing here writes, and one broken row does not hide the next.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from kvedit.errors import CorruptStoreError
from kvedit.facts.keys import exact_form, normalise
from kvedit.store.checks.values import from_json
from kvedit.store.rows import (
    Finding,
    Row,
    fact_columns,
    fact_from_columns,
    fact_from_text,
    reasons_from,
    require_report,
)
from kvedit.trust import names

Query = Callable[[str], list[Row]]
RESTORE = "Restore the store from a backup."
FIX = "`kvedit doctor --fix` takes the text from the history, where all its copies agree."
_SETTLED = ("committed", "removed")  # states in which a fact's row is that of its last version
_ROWS = 5_000  # that are in memory at a time
_PARTS = (
    "key", "description", "lang", "source", "aliases", "prompts", "paraphrases", "locality",
    "questions", "statements", "written", "relation_of",
)  # fmt: skip
_WRITTEN = """
    SELECT v.id, v.fact_id, v.revision, v.state, v.fact, c.before, c.after, c.edit_id
    FROM fact_versions v LEFT JOIN revisions r ON r.id = v.revision
    LEFT JOIN edit_facts c ON c.edit_id = r.edit_id AND c.fact_id = v.fact_id
    ORDER BY v.fact_id, v.revision"""


def contents(query: Query) -> Iterator[Finding]:
    """What is wrong with the facts, their history, the edits, and any value of any row."""
    yield from _values(query)
    yield from _each(query("SELECT * FROM facts ORDER BY id"), _fact_row)
    yield from _each(query(_WRITTEN), _version)
    yield from _texts(query)
    yield from _each(query("SELECT * FROM edits ORDER BY id"), _edit)
    yield from _each(query("SELECT * FROM edit_facts"), _edit_fact)
    yield from _each(query("SELECT revision, path FROM checkpoints"), _checkpoint)
    yield from _each(query("SELECT id, delta FROM revisions WHERE delta NOT NULL"), _delta)


def _values(query: Query) -> Iterator[Finding]:
    """One finding for each table with a value that kvedit never writes; ``query`` says which."""
    for table in query("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"):
        if table["name"].startswith(("sqlite_", "_sqlite")):
            continue
        try:
            last: int | None = -(2**63)
            while last is not None:
                sql = f"SELECT rowid AS place, * FROM {table['name']} WHERE rowid > {last}"
                rows = query(f"{sql} ORDER BY rowid LIMIT {_ROWS}")
                last = rows[-1]["place"] if len(rows) == _ROWS else None
        except CorruptStoreError as error:
            yield Finding("error", f"{error.message} (table {table['name']})", RESTORE)


def _each(rows: Iterable[Row], check: Callable[[Row], None]) -> Iterator[Finding]:
    for row in rows:
        try:
            check(row)
        except CorruptStoreError as error:
            yield Finding("error", error.message, RESTORE)


def _fact_row(row: Row) -> None:
    fact = fact_from_columns(row)
    if row["norm_key"] not in (normalise(fact.key), exact_form(fact.key)):
        what = f"the normal form of the key {fact.key} is not that of the key"
        raise CorruptStoreError(what, hint=RESTORE)


def _version(row: Row) -> None:
    fact_from_text(row["fact"])
    if row["edit_id"] is not None and _journalled(row) != row["fact"]:
        key = from_json(row["fact"], dict, "a fact in the history").get("key")
        what = f"the text of {key} at revision {row['revision']} is another one in the journal"
        raise CorruptStoreError(f"{what} than in the history", hint=RESTORE)


def _edit(row: Row) -> None:
    what = f"of edit {row['id']}"
    require_report(from_json(row["report"], dict, f"the report {what}"), what)
    from_json(row["config"], dict, f"the config {what}")
    reasons_from(row["reasons"], what)


def _edit_fact(row: Row) -> None:
    fact_from_text(row["before"])
    fact_from_text(row["after"])


def _checkpoint(row: Row) -> None:
    names.checkpoint(row["revision"], row["path"])


def _delta(row: Row) -> None:
    names.delta(row["delta"])


def _texts(query: Query) -> Iterator[Finding]:
    for row in altered(query):
        key, parts = row.key, ", ".join(row.parts)
        hint = FIX if row.agreed else RESTORE
        yield Finding("error", f"{parts} of the fact {key} is not what the history says", hint)


@dataclass(frozen=True, slots=True)
class Altered:
    """A fact whose row is not what its last version says: which parts differ, and that version.

    ``agreed``: the journal has the same text as the history.
    """

    id: int
    key: str
    parts: tuple[str, ...]
    text: str
    agreed: bool


def altered(query: Query) -> list[Altered]:
    """The facts whose row is not what their last version says; unreadable ones are left out."""
    last = {row["fact_id"]: row for row in query(_WRITTEN)}
    found = []
    for row in query("SELECT * FROM facts ORDER BY id"):
        version = last.get(row["id"])
        if row["state"] not in _SETTLED:
            continue
        if version is None or version["state"] != row["state"]:
            found.append(Altered(row["id"], row["key"], ("the state",), "", agreed=False))
        elif parts := _different(row, version["fact"]):
            agreed = _journalled(version) == version["fact"]
            found.append(Altered(row["id"], row["key"], parts, version["fact"], agreed))
    return found


def _different(row: Row, text: str) -> tuple[str, ...]:
    try:
        fact = fact_from_text(text)
    except CorruptStoreError:
        return ()  # found as such
    expected: Mapping[str, object] = {} if fact is None else fact_columns(fact)
    return tuple(name for name in _PARTS if row[name] != expected.get(name))


def _journalled(version: Row) -> str | None:
    """The text of a version as it stands beside the edit that wrote it."""
    text = version["after"] if version["state"] == "committed" else version["before"]
    return None if text is None else str(text)
