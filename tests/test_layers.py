"""The house: its folders, who may import whom, who may not load torch, and how large a room is.

``KNOWS`` is the one place where the order stands: a folder imports from those it names and from
what they know in turn.  Every import counts, also one inside a function and one for types alone.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kvedit"
BASE = "kvedit"  # the modules that stand beside the folders

KNOWS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "facts": (BASE,),
    "trust": (BASE,),
    "store": ("facts", "trust"),
    "model": ("facts", "trust"),
    "adapter": ("model",),
    "replay": ("model",),
    "training": ("adapter", "replay"),
    "distributed": ("store", "training"),
    "revisions": ("store", "distributed"),
    "asking": ("revisions",),
    "editing": ("asking",),
    "ingest": ("editing",),
    "bench": ("ingest",),
    "cli": ("bench",),
}
ROOMS_A_FOLDER = 10
LINES_A_ROOM = 350
LINES_A_FUNCTION = {"median": 8, "p90": 20, "longest": 60}

HEAVY = frozenset({"torch", "transformers", "peft", "accelerate"})
NEVER_HEAVY = frozenset({BASE, "facts", "trust", "store"})
LIGHT_AT_IMPORT = frozenset({*NEVER_HEAVY, "cli"})
PEFT_SEAM = ("adapter/adalora.py", "revisions/export/peft_format.py")

FILES = sorted(p for p in PACKAGE.rglob("*.py") if "data" not in p.relative_to(PACKAGE).parts)
DOORS = (PACKAGE / "__init__.py", PACKAGE / "__main__.py")  # they hand names on, lazily
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def folder_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else BASE


@cache
def known_to(folder: str) -> frozenset[str]:
    """A folder and all that it may import from."""
    return frozenset({folder}).union(*(known_to(other) for other in KNOWS[folder]))


def nodes(path: Path, *, run_at_import: bool) -> Iterator[ast.AST]:
    """Every node of a file, or those alone that run when the module is imported."""
    todo: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        yield node
        if run_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if run_at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
            continue
        todo.extend(ast.iter_child_nodes(node))


@cache
def imports(path: Path, *, run_at_import: bool = False) -> frozenset[str]:
    """The dotted names that a file imports; of ours the modules."""
    names: set[str] = set()
    for node in nodes(path, run_at_import=run_at_import):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: imports are absolute"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(part if part in MODULES else str(node.module) for part in parts)
    return frozenset(names)


def imported_files(path: Path, *, run_at_import: bool = False) -> set[Path]:
    """Our own modules that a file imports."""
    names = imports(path, run_at_import=run_at_import)
    found = {MODULES.get(name) or MODULES.get(f"{name}.__init__") for name in names}
    return {file for file in found if file not in (None, path, *DOORS)}


def heavy(path: Path, *, run_at_import: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, run_at_import=run_at_import)} & HEAVY


def functions() -> Iterator[tuple[str, int]]:
    """Every function of the package and how many lines it has."""
    for path in FILES:
        for node in nodes(path, run_at_import=False):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{name_of(path)}:{node.lineno} {node.name}"
                yield where, (node.end_lineno or node.lineno) - node.lineno + 1


def test_there_is_something_to_check() -> None:
    assert {folder_of(path) for path in FILES} == set(KNOWS)
    assert any(imported_files(path) for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_from_folders_that_its_own_may_know(path: Path) -> None:
    if path in DOORS:
        return
    allowed = known_to(folder_of(path))
    wrong = {name_of(file) for file in imported_files(path) if folder_of(file) not in allowed}
    assert not wrong, f"{name_of(path)} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_torch_and_peft_stay_where_they_belong(path: Path) -> None:
    if folder_of(path) in NEVER_HEAVY:
        assert not heavy(path), f"{name_of(path)} must never import {sorted(heavy(path))}"
    if folder_of(path) in LIGHT_AT_IMPORT:
        at_import = heavy(path, run_at_import=True)
        assert not at_import, f"move {sorted(at_import)} of {name_of(path)} into the function"
    if name_of(path) not in PEFT_SEAM:
        assert "peft" not in heavy(path), f"{name_of(path)}: {PEFT_SEAM} is the seam to PEFT"


def test_the_folders_form_no_circle() -> None:
    graph = {folder: set(known) for folder, known in KNOWS.items()}
    while graph:
        ground = [folder for folder, known in graph.items() if not known & set(graph)]
        assert ground, f"a circle among {sorted(graph)}"
        for folder in ground:
            del graph[folder]


def test_no_circle_of_modules() -> None:
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(map(name_of, [*trail, path]))
        if path not in done:
            for file in sorted(imported_files(path, run_at_import=True)):
                visit(file, (*trail, path))
            done.add(path)

    for path in FILES:
        visit(path, ())


def test_light_modules_load_nothing_heavy() -> None:
    for start in (path for path in FILES if folder_of(path) in LIGHT_AT_IMPORT):
        seen, todo = {start}, [start]
        while todo:
            for file in imported_files(todo.pop(), run_at_import=True) - seen:
                seen.add(file)
                todo.append(file)
        loaded = sorted(name_of(file) for file in seen if heavy(file, run_at_import=True))
        assert not loaded, f"importing {name_of(start)} loads torch by way of {loaded}"


def test_a_folder_has_few_rooms() -> None:
    for folder in {path.parent for path in FILES}:
        rooms = [p for p in FILES if p.parent == folder and p.name != "__init__.py"]
        assert len(rooms) <= ROOMS_A_FOLDER, f"{folder}: {sorted(map(name_of, rooms))}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_is_not_too_large(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES_A_ROOM


def test_functions_are_short() -> None:
    lengths = dict(functions())
    longest = max(lengths, key=lambda where: lengths[where])
    assert lengths[longest] <= LINES_A_FUNCTION["longest"], longest
    assert statistics.median(lengths.values()) <= LINES_A_FUNCTION["median"]
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= LINES_A_FUNCTION["p90"]


def test_the_command_line_really_starts_without_torch() -> None:
    code = (
        f"import sys, kvedit, kvedit.cli; print(sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
