"""Routes through modules, on three tiny ones; what is counted as a climb."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import rooms

SOURCES = {
    "low": "def each(act, values):\n    return [act(value) for value in values]\n",
    "mid": (
        "from kvedit.low import each\n\ndef double(values, act):\n    return each(act, values)\n"
    ),
    "high": (
        "from kvedit import mid\n\n"
        "def twice(value):\n    return 2 * value\n\n"
        "def run():\n    return mid.double([1, 2], twice)\n"
    ),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three modules in the place of kvedit's: ``high`` imports ``mid``, ``mid`` imports ``low``."""
    for name, source in SOURCES.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(rooms, "PACKAGE", tmp_path)
    for cached in (rooms.below, rooms._imports):
        cached.cache_clear()
    yield
    for cached in (rooms.below, rooms._imports):
        cached.cache_clear()


def load(name: str, **imported: Any) -> dict[str, Any]:
    """A module of ``SOURCES`` as its namespace, its imports given."""
    namespace: dict[str, Any] = {"__name__": f"kvedit.{name}", **imported}
    definitions = [line for line in SOURCES[name].splitlines() if not line.startswith("from ")]
    exec("\n".join(definitions), namespace)
    return namespace


@pytest.mark.usefixtures("package")
def test_below_is_what_is_imported_directly_or_through_others() -> None:
    assert rooms.below("low") == frozenset()
    assert rooms.below("mid") == {"low"}
    assert rooms.below("high") == {"mid", "low"}


@pytest.mark.usefixtures("package")
def test_a_call_to_what_was_handed_down_is_a_climb() -> None:
    low = load("low")
    mid = load("mid", each=low["each"])
    high = load("high", mid=type("mid", (), {"double": staticmethod(mid["double"])}))
    route = rooms.trace("a run", high["run"])
    assert route.moves == (("high", "mid"), ("mid", "low"), ("low", "high"))
    assert route.modules == ["high", "mid", "low"]
    assert route.climbs == [("low", "high")]
    counts, moves = rooms.tables(rooms.RoomsResult((route,)), moves=True)
    assert counts.rows == (("a run", "3", "3", "1"),)
    assert [row[2] for row in moves.rows] == ["-", "-", "yes"]


def test_a_route_of_the_package_has_its_modules_and_ends_with_the_call() -> None:
    from kvedit.facts import fact

    route = rooms.trace("a fact", lambda: fact.Fact.create("  Moss  clock", "It shows damp."))
    assert set(route.modules) <= {"facts.fact", *rooms.below("facts.fact")}
    assert ("facts.fact", "facts.language") in route.moves and route.climbs == []

    def fail() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        rooms.trace("a failure", fail)
    assert rooms.trace("nothing", lambda: None).moves == ()


def test_plain_values_are_no_stops() -> None:
    from kvedit.events import Score

    route = rooms.trace("an interval", lambda: Score(1, 2, "generated").interval())
    assert route.moves == () and "events" in rooms.EVERYWHERE
