"""What an input of many facts would do to a store, worked out before the first edit.

Invariants:
- Nothing here changes the store.
- Every row of the input is counted exactly once: new, rejected before, unchanged, repeated, or a
  problem.
- The facts that may go in agree with each other and with the store: each name leads to one fact.
  Where two rows contradict each other neither goes in: nobody knows which is right.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvedit.facts.fact import Fact
from kvedit.facts.formats import Located
from kvedit.facts.keys import normalise, similar_pairs
from kvedit.store.rows import FactRow
from kvedit.store.store import Store


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
    """A row that cannot go in; ``kind`` is ``invalid``, ``conflict``, ``committed`` or ``name``."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """The input, sorted: the ``new`` facts are to be trained, the others are not."""

    new: tuple[Entry, ...] = ()
    rejected_before: tuple[RejectedBefore, ...] = ()
    unchanged: tuple[Entry, ...] = ()
    repeated: tuple[Entry, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def read(self) -> int:
        """How many rows the input has."""
        parts = (self.new, self.rejected_before, self.unchanged, self.repeated, self.problems)
        return sum(map(len, parts))


def inspect_facts(rows: Iterable[Located], store: Store | None) -> Preflight:
    """Sort the rows of an input by what has to be done; without a store all are new."""
    sorter = _Sorter(store.facts() if store else [], store.refusals() if store else {})
    for row in rows:
        sorter.add(row)
    return sorter.result()


def near_keys(facts: Sequence[Fact], stored: Sequence[str]) -> list[Near]:
    """Keys that are similar to each other or to keys in the store, the most similar first."""
    keys = [fact.key for fact in facts]
    among = similar_pairs(keys, keys)
    near = [Near(keys[i], keys[j], score, False) for i, j, score in among if i < j]
    near += [Near(keys[i], stored[j], score, True) for i, j, score in similar_pairs(keys, stored)]
    return sorted(near, key=lambda pair: -pair.score)


@dataclass(slots=True)
class _Sorter:
    """Takes rows one by one; contradictions are decided when all are there."""

    rows: Sequence[FactRow]
    reasons: dict[int, tuple[str, ...]]
    first: dict[str, Entry] = field(default_factory=dict)
    repeated: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    contradicted: dict[str, Entry] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)

    def add(self, row: Located) -> None:
        """A row without a fact, a new key, a repetition, or another text for the same key."""
        self.places[row.where] = len(self.places)
        if row.fact is None:
            self.problems.append(Problem(row.where, row.problem or "not a fact", "invalid"))
            return
        entry, norm = Entry(row.where, row.fact), normalise(row.fact.key)
        earlier = self.first.setdefault(norm, entry)
        if earlier is entry:
            return
        if earlier.fact.description == row.fact.description:
            self.repeated.append(entry)
        else:
            self.contradicted.setdefault(norm, entry)
            self.problems.append(_contradiction(entry, earlier))

    def result(self) -> Preflight:
        """All rows, sorted."""
        stored = {normalise(row.fact.key): row for row in self.rows}
        names = _Names(self.rows, self.first)
        new, rejected, unchanged = [], [], []
        for norm, entry in self.first.items():
            row, other = stored.get(norm), self.contradicted.get(norm)
            problem = _contradiction(entry, other) if other else _clash(entry, row, names)
            if problem is not None:
                self.problems.append(problem)
            elif row is not None and row.state == "committed":
                unchanged.append(entry)
            elif row is not None and row.state == "rejected" and row.fact == entry.fact:
                rejected.append(RejectedBefore(entry, self.reasons.get(row.id, ())))
            else:
                new.append(entry)
        problems = sorted(self.problems, key=lambda one: self.places[one.where])
        return Preflight(
            new=tuple(new), rejected_before=tuple(rejected), unchanged=tuple(unchanged),
            repeated=tuple(self.repeated), problems=tuple(problems),
        )  # fmt: skip


def _contradiction(entry: Entry, other: Entry) -> Problem:
    """Two rows say different things about one key; both are named, and why it is one key."""
    key, place = entry.fact.key, _short(other.where, entry.where)
    same = "" if other.fact.key == key else f", where the key is written {other.fact.key}"
    return Problem(entry.where, f"{key} has another text at {place}{same}", "conflict", key)


class _Names:
    """To which fact each key and alias leads, in the store and in the input."""

    def __init__(self, rows: Iterable[FactRow], entries: dict[str, Entry]) -> None:
        self._in_store: dict[str, str] = {}
        # Keys first: an alias must give way to a key.
        self._in_input = {owner: (owner, entry) for owner, entry in entries.items()}
        for row in rows:
            owner = normalise(row.fact.key)
            # A pending fact is replaced by the input's, with its aliases.
            if row.state == "committed" or (row.state == "pending" and owner not in entries):
                for name in _names(row.fact):
                    self._in_store[name] = row.fact.key
        for owner, entry in entries.items():
            for name in _names(entry.fact):
                self._in_input.setdefault(name, (owner, entry))

    def taken(self, entry: Entry) -> str | None:
        """Why a name of the entry leads elsewhere already; None if all are free."""
        key = normalise(entry.fact.key)
        for name in (entry.fact.key, *entry.fact.aliases):
            norm = normalise(name)
            holder = self._in_store.get(norm)
            if holder is not None and normalise(holder) != key:
                return f"{name} leads to the fact {holder} in the store"
            owner, other = self._in_input[norm]
            if owner != key:
                place = _short(other.where, entry.where)
                return f"{name} also leads to the fact {other.fact.key} at {place}"
        return None


def _names(fact: Fact) -> Iterator[str]:
    return map(normalise, (fact.key, *fact.aliases))


def _clash(entry: Entry, row: FactRow | None, names: _Names) -> Problem | None:
    """Why a fact contradicts the store or another row, if it does."""
    key = entry.fact.key
    if row is not None and row.state == "committed":
        if row.fact.description == entry.fact.description:
            return None
        reason = f"{key} is in the store with another text; to change it: kvedit update {key} FILE"
        return Problem(entry.where, reason, "committed", key)
    taken = names.taken(entry)
    return None if taken is None else Problem(entry.where, taken, "name", key)


def _short(where: str, beside: str) -> str:
    """A place without the file's name if that was just said."""
    name = beside.rpartition(", ")[0]
    return where.removeprefix(f"{name}, ") if name else where
