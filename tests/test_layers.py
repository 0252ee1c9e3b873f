"""The layers of the package: who may import whom, and who may not load torch.

The table below is the one place where the order stands.  A module imports from its own line or from
lines above it, never from below; modules of one line never import each other in a circle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kvedit"

LAYERS: dict[str, tuple[str, ...]] = {
    "base": ("errors", "facts", "keys", "config", "files", "metrics", "events"),
    "store": (
        "forms",
        "structured",
        "spreadsheets",
        "formats",
        "readers",
        "intake",
        "groups",
        "migrations",
        "records",
        "database",
        "journal",
        "inspection",
        "store",
    ),
    "model": (
        "prompts",
        "placement",
        "prices",
        "stacks",
        "widened",
        "quantised",
        "models",
        "adapters",
        "deltas",
        "lora",
        "crew",
        "shards",
        "probes",
        "decoding",
        "protect",
        "recitation",
        "curvature",
        "lower",
        "anchors",
        "share",
        "memory",
    ),
    "loop": (
        "bookmarks",
        "training",
        "descent",
        "breadth_first",
        "retention",
        "engine",
        "processes",
        "plain",
    ),
    "edit": (
        "pinned",
        "room",
        "fold",
        "export",
        "lora_export",
        "plans",
        "examiner",
        "transaction",
        "verify",
        "workspace",
        "together",
        "editor",
        "ingest",
    ),
    "use": ("reports", "plots", "bench", "pretrain"),
    "cli": ("cli", "demo", "__main__"),
}
ROOT = "__init__"  # the package itself: anyone may import it, so it may load next to nothing
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
DEPTH = {layer: depth for depth, layer in enumerate(LAYERS)}

HEAVY = frozenset({"torch", "transformers", "peft", "accelerate"})
NEVER_HEAVY = frozenset({*LAYERS["base"], *LAYERS["store"], "reports", "plots"})
LIGHT_AT_IMPORT = frozenset({*NEVER_HEAVY, *LAYERS["cli"], ROOT})
FORBIDDEN = {"model": frozenset(LAYERS["store"])}  # the model layer knows nothing of the store
PEFT_SEAM = frozenset({"adapters", "lora", "plain"})  # plain: the baseline, PEFT as it comes

FILES = sorted(p for p in PACKAGE.rglob("*.py") if "data" not in p.relative_to(PACKAGE).parts)


def unit(path: Path) -> str:
    """The name in the table for a file: the module, or the sub-package that holds it."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


def imported(node: ast.AST, path: Path) -> Iterator[str]:
    """The absolute dotted names that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:
            parents = path.relative_to(PACKAGE.parent).parent.parts
            kept = parents[: len(parents) - node.level + 1]
            origin = ".".join([*kept, *([node.module] if node.module else [])])
        if origin == "kvedit":
            yield from (f"kvedit.{alias.name}" for alias in node.names)
        else:
            yield origin


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(path: Path, *, run_at_import: bool) -> Iterator[ast.AST]:
    """Every node of a file, or those alone that run when the module is imported."""
    todo: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        yield node
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if run_at_import and function:
            continue
        if run_at_import and isinstance(node, ast.If) and is_type_checking(node):
            todo.extend(node.orelse)
            continue
        todo.extend(ast.iter_child_nodes(node))


def imports(path: Path, *, run_at_import: bool) -> set[str]:
    nodes = statements(path, run_at_import=run_at_import)
    return {name for node in nodes for name in imported(node, path)}


def ours(names: set[str]) -> set[str]:
    """The units of kvedit among some imported names; a name that is no module means the root."""
    found = {name.split(".")[1] for name in names if name.startswith("kvedit.")}
    units = {name if name in LAYER_OF else ROOT for name in found}
    return units | ({ROOT} if "kvedit" in names else set())


def heavy(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} & HEAVY


@pytest.fixture(scope="module")
def loaded_by() -> dict[str, set[str]]:
    """Unit -> units that it imports when it is imported itself."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        found = ours(imports(path, run_at_import=True)) - {unit(path)}
        graph.setdefault(unit(path), set()).update(found)
    return graph


def test_there_is_something_to_check() -> None:
    assert {"errors", "facts", "store"} <= {unit(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_is_in_the_table(path: Path) -> None:
    assert unit(path) in {*LAYER_OF, ROOT}, f"give {name_of(path)} a line in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_from_its_own_line_or_above(path: Path) -> None:
    if unit(path) == ROOT:
        pytest.skip("the root imports lazily; see test_light_modules_load_nothing_heavy")
    layer = LAYER_OF[unit(path)]
    wrong = {
        target
        for target in ours(imports(path, run_at_import=False)) - {ROOT, unit(path)}
        if DEPTH[LAYER_OF[target]] > DEPTH[layer] or target in FORBIDDEN.get(layer, frozenset())
    }
    assert not wrong, f"{name_of(path)} (line {layer!r}) must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_torch_stays_in_the_layers_that_need_it(path: Path) -> None:
    everywhere = heavy(imports(path, run_at_import=False))
    if unit(path) in NEVER_HEAVY:
        assert not everywhere, f"{name_of(path)} must never import {sorted(everywhere)}"
    if unit(path) in LIGHT_AT_IMPORT:
        at_import = heavy(imports(path, run_at_import=True))
        assert not at_import, f"move {sorted(at_import)} of {name_of(path)} into the function"
    if unit(path) not in PEFT_SEAM:
        assert "peft" not in everywhere, f"{name_of(path)}: adapters.py is the seam to PEFT"


def test_light_modules_load_nothing_heavy(loaded_by: dict[str, set[str]]) -> None:
    direct = {unit(p) for p in FILES if heavy(imports(p, run_at_import=True))}
    for start in sorted(LIGHT_AT_IMPORT & set(loaded_by)):
        seen, todo = {start}, [start]
        while todo:
            for target in loaded_by.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
        assert not seen & direct, f"importing {start} loads torch by way of {sorted(seen & direct)}"


def test_no_circles(loaded_by: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for target in sorted(loaded_by.get(module, set()) - {ROOT}):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(loaded_by):
        visit(module, ())


def test_the_command_line_really_starts_without_torch() -> None:
    code = (
        f"import sys, kvedit, kvedit.cli; print(sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
