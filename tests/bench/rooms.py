"""How a fact, a group and a question go through the modules of kvedit.

A call is traced while it runs.  A *move* is a call from one module into another, each pair counted
once; it *climbs* when the module that is called does not lie below the caller: the caller does not
import it, directly or through others, so the call goes to something that was handed down.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import kvedit
from kvedit import Fact, KnowledgeBase
from kvedit.bench.tables import Table
from kvedit.events import Event, Status
from kvedit.ingest.run import ingest

PACKAGE = Path(kvedit.__file__).resolve().parent
EVERYWHERE = ("events", "errors")  # plain values; they are no stops on the way

Move = tuple[str, str]
"""The modules of the caller and of what is called."""


@dataclass(frozen=True, slots=True)
class Route:
    """The distinct moves of one call, in the order of their first time."""

    name: str
    moves: tuple[Move, ...]

    @property
    def modules(self) -> list[str]:
        """The modules that were entered, in order."""
        return list(dict.fromkeys(module for move in self.moves for module in move))

    @property
    def climbs(self) -> list[Move]:
        """The moves that go up."""
        return [move for move in self.moves if move[1] not in below(move[0])]


@dataclass(frozen=True, slots=True)
class RoomsResult:
    """The routes of the calls that were traced."""

    routes: tuple[Route, ...]
    model: str = "the small model of the tests"


def rooms(emit: Callable[[Event], None]) -> RoomsResult:
    """Trace a fact through ``add``, a group through ``ingest`` and a question through ``ask``."""
    from tests.small_model import FREE, build, settings

    facts = [Fact.create(*pair) for pair in FREE[1:4]]
    with TemporaryDirectory(prefix="kvedit-rooms-") as folder:
        emit(Status(phase="training the small model"))
        model = build(Path(folder) / "model")["bf16"]
        store = Path(folder) / "store"
        store.mkdir()
        (store / "kvedit.toml").write_text(settings(), encoding="utf-8")
        with KnowledgeBase.create(store, model) as base:
            calls: dict[str, Callable[[], Any]] = {
                "a fact through KnowledgeBase.add": lambda: base.add(*FREE[0]),
                "a group through ingest": lambda: ingest(base, facts),
                "a question through KnowledgeBase.ask": lambda: base.ask("What is it?"),
            }
            routes = []
            for name, call in calls.items():
                emit(Status(phase=name))
                routes.append(trace(name, call))
    return RoomsResult(tuple(routes))


def trace(name: str, call: Callable[[], Any]) -> Route:
    """The route of a call, made once."""
    moves: dict[Move, None] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        callee, caller = _module(frame), _calling_module(frame)
        if callee and caller and callee != caller:
            moves[caller, callee] = None

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return Route(name, tuple(moves))


def _module(frame: FrameType) -> str | None:
    """The module of a frame, such as ``editing.edit``; None outside of kvedit."""
    name = str(frame.f_globals.get("__name__", ""))
    if not name.startswith("kvedit.") or frame.f_code.co_name.startswith("<"):
        return None
    module = name.removeprefix("kvedit.")
    return None if module in EVERYWHERE else module


def _calling_module(frame: FrameType) -> str | None:
    """The nearest caller in kvedit: torch and the standard library are passed through."""
    caller = frame.f_back
    while caller is not None:
        if module := _module(caller):
            return module
        caller = caller.f_back
    return None


@cache
def below(module: str) -> frozenset[str]:
    """The modules that a module imports, directly or through others."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        for other in _imports(todo.pop()) - seen:
            seen.add(other)
            todo.append(other)
    return frozenset(seen)


@cache
def _imports(module: str) -> frozenset[str]:
    path = PACKAGE / (module.replace(".", "/") + ".py")
    if not path.is_file():
        path = PACKAGE / module.replace(".", "/") / "__init__.py"
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvedit"):
            names.update({str(node.module), *(f"{node.module}.{a.name}" for a in node.names)})
    return frozenset(
        name.removeprefix("kvedit.")
        for name in names
        if (PACKAGE / (name.removeprefix("kvedit.").replace(".", "/") + ".py")).is_file()
    )


def tables(result: RoomsResult, moves: bool = False) -> list[Table]:
    """The counts of each route; with ``moves`` each of them too."""
    rows = tuple(
        (route.name, str(len(route.modules)), str(len(route.moves)), str(len(route.climbs)))
        for route in result.routes
    )
    counts = Table("Ways through the modules", ("way", "modules", "moves", "climbs"), rows)
    return [counts, *(_moves(route) for route in result.routes if moves)]


def _moves(route: Route) -> Table:
    climbs = set(route.climbs)
    rows = tuple((*move, "yes" if move in climbs else "-") for move in route.moves)
    return Table(route.name, ("from", "to", "climbs"), rows)
