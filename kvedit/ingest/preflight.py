"""What an input of many facts would do to a store, worked out before the first edit.

Invariants:
- Nothing here changes the store.
- Every row of the input is counted exactly once: new, rejected before, unchanged, repeated, held
  back, or a problem.
- The facts that may go in agree with each other and with the store: each name leads to one fact.
  Where two rows contradict each other neither goes in: nobody knows which is right.
"""

from __future__ import annotations

import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvedit.facts.fact import Fact
from kvedit.facts.formats import Located
from kvedit.facts.forms.placeholders import placeholder
from kvedit.facts.keys import KeyForm, normalise
from kvedit.facts.similarity import Progress, find_pairs
from kvedit.store.rows import FactRow
from kvedit.store.store import Store

FIRST_ROWS = 2  # to show how they would be taught
SAME_KEPT = 100  # pairs of keys that count as one, of which all are counted
UNREAD_KEPT = 100  # names, about: a file may have others in each row


@dataclass(frozen=True, slots=True)
class Entry:
    """A fact and the place it came from."""

    where: str
    fact: Fact


@dataclass(frozen=True, slots=True)
class RejectedBefore:
    """A fact that the gate rejected in an earlier run, and why."""

    entry: Entry
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot go in; ``kind`` is ``invalid``, ``conflict``, ``committed``, ``name`` or
    ``placeholder``.
    """

    where: str
    reason: str
    kind: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Near:
    """Two keys that are similar; ``in_store`` if the store has the other one already."""

    key: str
    other: str
    score: float
    in_store: bool


@dataclass(frozen=True, slots=True)
class NearKeys:
    """``count`` pairs of similar keys, the closest of them, and whether all keys were compared."""

    count: int = 0
    closest: tuple[Near, ...] = ()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class SameKey:
    """Two keys of the input, written differently, that count as one."""

    key: str
    other: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """The input, sorted: the ``new`` facts are to be trained, the others are not.

    ``held_back`` are rows with a placeholder that nobody has filled in.  Of the pairs of keys that
    count as one there are ``same_count``, of which the first are in ``same``.  ``forms`` says how
    many rows were taken for what, ``unread`` which of their names were read in none of them.
    """

    new: tuple[Entry, ...] = ()
    rejected_before: tuple[RejectedBefore, ...] = ()
    unchanged: tuple[Entry, ...] = ()
    repeated: tuple[Entry, ...] = ()
    problems: tuple[Problem, ...] = ()
    held_back: tuple[Problem, ...] = ()
    same: tuple[SameKey, ...] = ()
    same_count: int = 0
    forms: Mapping[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def first_rows(self) -> tuple[Entry, ...]:
        """The first rows that are to be trained, to show how they would be taught."""
        return self.new[:FIRST_ROWS]

    def stops(self, skip_invalid: bool) -> bool:
        """Whether invalid rows end a run before its first edit."""
        return bool(self.problems) and not skip_invalid

    @property
    def read(self) -> int:
        """How many rows the input has."""
        parts = (
            self.new, self.rejected_before, self.unchanged, self.repeated, self.problems,
            self.held_back,
        )  # fmt: skip
        return sum(map(len, parts))


def inspect_facts(
    rows: Iterable[Located], store: Store | None, *, hold_placeholders: bool = False,
    form: KeyForm = normalise,
) -> Preflight:  # fmt: skip
    """Sort the rows of an input by what has to be done; without a store, all are new and ``form``
    says which keys are one.
    """
    sorter = _Sorter(
        store.facts() if store else [], store.refusals() if store else {},
        placeholder if hold_placeholders else lambda fact: None, store.key_form if store else form,
    )  # fmt: skip
    for row in rows:
        sorter.add(row)
    return sorter.result()


def near_keys(
    facts: Sequence[Fact],
    stored: Sequence[str],
    progress: Progress = lambda done, total: None,
) -> NearKeys:
    """Keys that are similar to each other or to keys in the store, the most similar first."""
    keys = [fact.key for fact in facts]
    pairs = find_pairs(keys, stored, progress=progress)
    names = [*keys, *stored]
    closest = [Near(keys[i], names[j], score, j >= len(keys)) for i, j, score in pairs.closest]
    return NearKeys(pairs.count, tuple(closest), pairs.complete)


@dataclass(slots=True)
class _Sorter:
    """Takes rows one by one; contradictions are decided when all are there."""

    rows: Sequence[FactRow]
    reasons: dict[int, tuple[str, ...]]
    placeholder: Callable[[Fact], str | None]
    form: KeyForm
    read: int = 0
    first: dict[str, Entry] = field(default_factory=dict)
    numbers: array[int] = field(default_factory=lambda: array("q"))  # of the rows in ``first``
    repeated: list[Entry] = field(default_factory=list)
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    held_back: list[Problem] = field(default_factory=list)
    contradicted: dict[str, Entry] = field(default_factory=dict)
    same: list[SameKey] = field(default_factory=list)
    same_count: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    unread: dict[str, None] = field(default_factory=dict)

    def add(self, row: Located) -> None:
        """A row without a fact, a new key, a repetition, or another text for the same key."""
        self.read += 1
        if row.fact is None:
            self._refuse(Problem(row.where, row.problem or "not a fact", "invalid"))
            return
        self.forms[row.form] += 1
        if len(self.unread) < UNREAD_KEPT:
            self.unread.update(dict.fromkeys(row.unread))
        if reason := self.placeholder(row.fact):
            self.held_back.append(Problem(row.where, reason, "placeholder", row.fact.key))
            return
        entry, norm = Entry(row.where, row.fact), self.form(row.fact.key)
        earlier = self.first.setdefault(norm, entry)
        if earlier is entry:
            self.numbers.append(self.read)
            return
        self._note_same(row.fact.key, earlier.fact.key)
        if earlier.fact.description == row.fact.description:
            self.repeated.append(entry)
        else:
            self.contradicted.setdefault(norm, entry)
            self._refuse(_contradiction(entry, earlier))

    def _refuse(self, problem: Problem) -> None:
        self.problems.append((self.read, problem))

    def _note_same(self, key: str, other: str) -> None:
        if key != other:
            self.same_count += 1
            if len(self.same) < SAME_KEPT:
                self.same.append(SameKey(other, key))

    def result(self) -> Preflight:
        """All rows, sorted."""
        stored = {self.form(row.fact.key): row for row in self.rows}
        names = _Names(self.rows, self.first, self.form)
        new, rejected, unchanged = [], [], []
        for number, (norm, entry) in zip(self.numbers, self.first.items(), strict=True):
            row, other = stored.get(norm), self.contradicted.get(norm)
            if row is not None:
                self._note_same(entry.fact.key, row.fact.key)
            problem = _contradiction(entry, other) if other else _clash(norm, entry, row, names)
            if problem is not None:
                self.problems.append((number, problem))
            elif row is not None and row.state == "committed":
                unchanged.append(entry)
            elif row is not None and row.state == "rejected" and row.fact == entry.fact:
                rejected.append(RejectedBefore(entry, self.reasons.get(row.id, ())))
            else:
                new.append(entry)
        problems = sorted(self.problems, key=lambda one: one[0])
        return Preflight(
            new=tuple(new), rejected_before=tuple(rejected), unchanged=tuple(unchanged),
            repeated=tuple(self.repeated), problems=tuple(problem for _, problem in problems),
            held_back=tuple(self.held_back), same=tuple(self.same), same_count=self.same_count,
            forms=dict(self.forms), unread=tuple(self.unread),
        )  # fmt: skip


def _contradiction(entry: Entry, other: Entry) -> Problem:
    """Two rows say different things about one key; both are named, and why it is one key."""
    key, place = entry.fact.key, _short(other.where, entry.where)
    same = "" if other.fact.key == key else f", where the key is written {other.fact.key}"
    return Problem(entry.where, f"{key} has another text at {place}{same}", "conflict", key)


class _Names:
    """To which fact each key and alias leads, in the store and in the input."""

    def __init__(
        self, rows: Iterable[FactRow], entries: dict[str, Entry], form: KeyForm
    ) -> None:  # fmt: skip
        self._form = form
        self._in_store: dict[str, str] = {}
        self._entries = entries  # keys first: an alias must give way to a key
        self._aliases: dict[str, tuple[str, Entry]] = {}
        for row in rows:
            owner = form(row.fact.key)
            # A pending fact is replaced by the input's, with its aliases.
            if row.state == "committed" or (row.state == "pending" and owner not in entries):
                for name in (row.fact.key, *row.fact.aliases):
                    self._in_store[form(name)] = row.fact.key
        for owner, entry in entries.items():
            for name in map(form, entry.fact.aliases):
                self._aliases.setdefault(name, (owner, entry))

    def taken(self, norm_key: str, entry: Entry) -> str | None:
        """Why a name of the entry leads elsewhere already; None if all are free."""
        names = [(entry.fact.key, norm_key)]
        names += [(alias, self._form(alias)) for alias in entry.fact.aliases]
        for name, norm in names:
            called = name if norm == norm_key else f"the alias {name} of {entry.fact.key}"
            holder = self._in_store.get(norm)
            if holder is not None and self._form(holder) != norm_key:
                return f"{called} leads to the fact {holder} in the store"
            owner, other = self._holder(norm, norm_key, entry)
            if owner != norm_key:
                place = _short(other.where, entry.where)
                return f"{called} also leads to the fact {other.fact.key} at {place}"
        return None

    def _holder(self, norm: str, norm_key: str, entry: Entry) -> tuple[str, Entry]:
        """The fact of the input that a name leads to."""
        if norm == norm_key:
            return norm, entry
        return (norm, self._entries[norm]) if norm in self._entries else self._aliases[norm]


def _clash(norm: str, entry: Entry, row: FactRow | None, names: _Names) -> Problem | None:
    """Why a fact contradicts the store or another row, if it does."""
    key = entry.fact.key
    if row is not None and row.state == "committed":
        if row.fact.description == entry.fact.description:
            return None
        change = f"kvedit update {shlex.quote(key)} FILE"
        reason = f"{key} is in the store with another text; to change it: {change}"
        return Problem(entry.where, reason, "committed", key)
    taken = names.taken(norm, entry)
    return None if taken is None else Problem(entry.where, taken, "name", key)


def _short(where: str, beside: str) -> str:
    """A place without the file's name if that was just said."""
    name = beside.rpartition(", ")[0]
    return where.removeprefix(f"{name}, ") if name else where
