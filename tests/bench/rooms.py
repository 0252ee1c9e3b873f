"""How a fact, a group and a question go through the modules of kvedit.

A call is traced while it runs.  A *move* is a call from one module into another, each pair counted
once; it *climbs* when the module that is called does not lie below the caller: the caller does not
import it, directly or through others, so the call goes to something that was handed down.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import kvedit

PACKAGE = Path(kvedit.__file__).resolve().parent
LISTENERS = ("events", "errors")  # plain values; they are no stops on the way


@dataclass
class Route:
    """The distinct moves of one call, in the order of their first time."""

    moves: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def rooms(self) -> list[str]:
        """The modules that were entered, in order."""
        return list(dict.fromkeys(room for move in self.moves for room in move))

    @property
    def climbs(self) -> list[tuple[str, str]]:
        """The moves that go up."""
        return [move for move in self.moves if move[1] not in below(move[0])]


def trace(call: Callable[[], Any]) -> Route:
    """The route of a call, made once."""
    route = Route()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        callee, caller = _room(frame), _calling_room(frame)
        if callee and caller and callee != caller:
            route.moves[caller, callee] = route.moves.get((caller, callee), 0) + 1

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return route


def _room(frame: FrameType) -> str | None:
    """The module of a frame, such as ``editing.edit``; None outside of kvedit."""
    name = str(frame.f_globals.get("__name__", ""))
    if not name.startswith("kvedit.") or frame.f_code.co_name.startswith("<"):
        return None
    room = name.removeprefix("kvedit.")
    return None if room in LISTENERS else room


def _calling_room(frame: FrameType) -> str | None:
    """The nearest caller in kvedit: torch and the standard library are passed through."""
    caller = frame.f_back
    while caller is not None:
        if room := _room(caller):
            return room
        caller = caller.f_back
    return None


@cache
def below(room: str) -> frozenset[str]:
    """The modules that a module imports, directly or through others."""
    seen: set[str] = set()
    todo = [room]
    while todo:
        for other in _imports(todo.pop()) - seen:
            seen.add(other)
            todo.append(other)
    return frozenset(seen)


@cache
def _imports(room: str) -> frozenset[str]:
    path = PACKAGE / (room.replace(".", "/") + ".py")
    if not path.is_file():
        path = PACKAGE / room.replace(".", "/") / "__init__.py"
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvedit"):
            names.update({str(node.module), *(f"{node.module}.{a.name}" for a in node.names)})
    return frozenset(
        name.removeprefix("kvedit.")
        for name in names
        if (PACKAGE / (name.removeprefix("kvedit.").replace(".", "/") + ".py")).is_file()
    )


def routes(folder: Path) -> dict[str, Route]:
    """A fact through ``add``, a group through ``ingest``, a question through ``ask``, on the small
    model of the tests.
    """
    from small_model import FREE, build, settings

    from kvedit import Fact, KnowledgeBase
    from kvedit.ingest.run import ingest

    model = build(folder / "model")["bf16"]
    store = folder / "store"
    store.mkdir()
    (store / "kvedit.toml").write_text(settings(), encoding="utf-8")
    facts = [Fact.create(*pair) for pair in FREE[1:4]]
    with KnowledgeBase.create(store, model) as base:
        return {
            "a fact through KnowledgeBase.add": trace(lambda: base.add(*FREE[0])),
            "a group through ingest": trace(lambda: ingest(base, facts)),
            "a question through KnowledgeBase.ask": trace(lambda: base.ask("What is it?")),
        }


def main() -> None:
    """Print the table, and with -v each move."""
    with TemporaryDirectory() as folder:
        measured = routes(Path(folder))
    sys.stdout.write("| way | modules | moves | climbs |\n|---|---|---|---|\n")
    for name, route in measured.items():
        counts = len(route.rooms), len(route.moves), len(route.climbs)
        sys.stdout.write(f"| {name} | {counts[0]} | {counts[1]} | {counts[2]} |\n")
    for name, route in measured.items() if "-v" in sys.argv else ():
        sys.stdout.write(f"\n{name}\n")
        for caller, callee in route.moves:
            mark = "  climbs" if (caller, callee) in route.climbs else ""
            sys.stdout.write(f"  {caller} -> {callee}{mark}\n")


if __name__ == "__main__":
    main()
