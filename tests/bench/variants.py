"""The same group of facts added under several settings, each time to a copy of one store.

Invariants:
- All begin with the same weights, protected texts and Fisher moments; only the settings that a
  variant names differ.
- What is shown is what the gate saw: the merged weights, in the dtype that is served.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvedit import KnowledgeBase
from kvedit.bench.tables import Table, number_cell, score_cell
from kvedit.config import FILE_NAME
from kvedit.events import EditReport, Event, Score
from kvedit.facts.fact import Fact
from tests.bench.levers import as_toml
from tests.bench.quality_material import ENGLISH, read_facts

Setting = tuple[str, str, Any]
"""Section, name and value."""
DEFAULTS: tuple[Setting, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantsOptions:
    """``store`` is never written to; the first of ``variants`` is usually ``DEFAULTS``."""

    store: Path
    facts: str = ENGLISH
    limit: int | None = 16
    variants: tuple[tuple[Setting, ...], ...] = (DEFAULTS,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What one of them came to: the group's own edit, with ``learned`` of its facts."""

    name: str
    learned: Score
    edit: EditReport


@dataclass(frozen=True, slots=True)
class VariantsResult:
    """All of them, in order."""

    variants: tuple[Variant, ...]


def variants(
    options: VariantsOptions,
    emit: Callable[[Event], None],
    tell: Callable[[VariantsResult, Variant], None] = lambda result, point: None,
) -> VariantsResult:
    """Add the facts under each variant's settings."""
    facts = read_facts(options.facts)[: options.limit]
    done: list[Variant] = []
    for settings in options.variants:
        with TemporaryDirectory(prefix="kvedit-bench-") as home:
            done.append(_add(_store(options.store, Path(home), settings), facts, settings, emit))
        tell(VariantsResult(tuple(done)), done[-1])
    return VariantsResult(tuple(done))


def _store(source: Path, home: Path, settings: Sequence[Setting]) -> Path:
    """A copy of the store with some settings changed."""
    folder = Path(shutil.copytree(source, home / "store"))
    file = folder / FILE_NAME
    document = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for section, name, value in settings:
        document.setdefault(section, {})[name] = value
    file.write_text(as_toml(document), encoding="utf-8")
    return folder


def _add(
    folder: Path, facts: Sequence[Fact], settings: Sequence[Setting], emit: Callable[[Event], None]
) -> Variant:
    with KnowledgeBase.open(folder, on_event=emit) as base:
        edit = base.add_group(facts, carry=True)[0]
    learned = len(edit.keys) if edit.outcome == "committed" else 0
    name = " ".join(f"{section}.{name}={value}" for section, name, value in settings)
    return Variant(name=name or "defaults", learned=Score(learned, len(facts)), edit=edit)


def line(variant: Variant) -> str:
    """One of them, as soon as it is there."""
    edit = variant.edit
    return (
        f"{variant.name}: learned {score_cell(variant.learned)},"
        f" unseen {score_cell(edit.generalization)}, locality {score_cell(edit.locality)},"
        f" {edit.steps} steps"
    )


def tables(result: VariantsResult) -> list[Table]:
    """A row for each variant."""
    columns = (
        "settings", "learned", "unseen phrasings", "locality", "perplexity", "steps",
        "training, s", "probes, s",
    )  # fmt: skip
    rows = tuple(
        (one.name, score_cell(one.learned), score_cell(one.edit.generalization),
         score_cell(one.edit.locality), number_cell(one.edit.perplexity), str(one.edit.steps),
         number_cell(one.edit.timings.get("train")), number_cell(one.edit.timings.get("probe")))
        for one in result.variants
    )  # fmt: skip
    return [Table("One group under several settings", columns, rows)]
