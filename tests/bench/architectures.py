"""Every architecture through a store's whole life: add, recall, retain, change, undo, export.

Invariants:
- What a row claims was done by ``KnowledgeBase`` on a model saved to and loaded from a folder.
- A row that breaks off keeps what was measured before, and says why; the others go on.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvedit.bench.tables import Table
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import KveditError, UsageError
from kvedit.events import Event, Status
from kvedit.model.loading import has_own_code
from tests.bench import tiny
from tests.bench.tiny import ARCHITECTURES, Architecture

Emit = Callable[[Event], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class Row:
    """What one architecture did; a count is (passed, n), None is: not reached."""

    name: str
    model: str = ""
    dtype: str = ""
    matrices: int = 0
    added: tuple[int, int] | None = None
    recalled: tuple[int, int] | None = None
    retained: tuple[int, int] | None = None
    updated: bool | None = None
    removed: bool | None = None
    rolled_back: bool | None = None
    exported: tuple[int, int] | None = None
    reloaded: tuple[int, int] | None = None
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every step was reached and held."""
        counts = (self.added, self.recalled, self.retained, self.exported, self.reloaded)
        whole = all(count is not None and count[0] == count[1] > 0 for count in counts)
        return whole and all((self.updated, self.removed, self.rolled_back)) and not self.problems


@dataclass(frozen=True, slots=True)
class ArchitecturesResult:
    """A row for each architecture."""

    rows: tuple[Row, ...]
    model: str = "tiny models, trained here"

    @property
    def passed(self) -> bool:
        """Whether all of them passed."""
        return all(row.passed for row in self.rows)


def run(names: Sequence[str], dtype: str, emit: Emit) -> ArchitecturesResult:
    """Try the named architectures, or all; raises UsageError for a name that is none."""
    chosen = [_find(name) for name in names] or list(ARCHITECTURES)
    rows = []
    for number, one in enumerate(chosen, 1):
        emit(Status(phase=f"architecture {number} of {len(chosen)}", key=one.name))
        with TemporaryDirectory(prefix="kvedit-") as folder:
            rows.append(try_one(one, Path(folder), DTYPES[dtype]))
        gc.collect()
    return ArchitecturesResult(tuple(rows))


def _find(name: str) -> Architecture:
    try:
        return tiny.find(name)
    except KeyError:
        known = ", ".join(one.name for one in ARCHITECTURES)
        raise UsageError(f"no architecture {name!r}", hint=f"Known: {known}.") from None


def try_one(architecture: Architecture, folder: Path, dtype: torch.dtype = torch.float32) -> Row:
    """Build the tiny model in ``folder`` and take it through everything."""
    row = Row(architecture.name, dtype=str(dtype).removeprefix("torch."))
    began = time.monotonic()
    try:
        model = tiny.build(architecture, folder / "model", dtype)
        store = folder / "store"
        store.mkdir()
        (store / "kvedit.toml").write_text(tiny.settings(), encoding="utf-8")
        with KnowledgeBase.create(store, model, trust_remote_code=architecture.code) as knowledge:
            _live(knowledge, folder / "export", row)
        with KnowledgeBase.open(store) as knowledge:
            _reopened(knowledge, row)
    except (KveditError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        # The border of one architecture: a model that breaks is a finding, not the end.
        first = (str(error).splitlines() or [""])[0]
        row.problems.append(f"{type(error).__name__}: {first}")
    row.seconds = time.monotonic() - began
    return row


def _live(knowledge: KnowledgeBase, export: Path, row: Row) -> None:
    """The steps, in the order of the table's columns."""
    row.model = type(knowledge.engine.base.model).__name__
    row.matrices = len(knowledge.engine.names)
    reports = [knowledge.add(*fact) for fact in tiny.NEW]
    row.problems += [reason for report in reports for reason in report.reasons]
    row.added = (sum(r.outcome == "committed" for r in reports), len(reports))
    said = [knowledge.ask(f"What is {key}?") == text for key, text in tiny.NEW]
    row.recalled = (sum(said), len(said))
    check = knowledge.verify()
    row.retained = (check.score.passed, len(tiny.NEW))
    three = knowledge.store.head()
    report = knowledge.update(tiny.NEW[0][0], tiny.CHANGED)
    row.updated = knowledge.ask(f"What is {tiny.NEW[0][0]}?") == tiny.CHANGED
    row.problems += report.reasons
    report = knowledge.remove(tiny.NEW[1][0])
    row.removed = knowledge.ask(f"What is {tiny.NEW[1][0]}?") != tiny.NEW[1][1]
    row.problems += report.reasons
    _export(knowledge, export, row)
    row.rolled_back = _roll_back(knowledge, three)


def _roll_back(knowledge: KnowledgeBase, revision: int) -> bool:
    """Whether the weights served are, to the bit, those first committed at the revision."""
    knowledge.rollback(revision)
    wanted = knowledge.store.revision(revision).weights_digest
    return knowledge.engine.master.digest() == wanted


def _export(knowledge: KnowledgeBase, folder: Path, row: Row) -> None:
    """Export, and ask the folder again with transformers alone where that runs."""
    report = knowledge.export(folder)
    row.exported = (report.probes.passed, report.probes.n)
    questions = [f"What is {key}?" for key, _ in tiny.NEW]
    ours = [knowledge.ask(question, max_new_tokens=24) for question in questions]
    theirs = [_transformers_answer(knowledge, folder, question) for question in questions]
    row.reloaded = (sum(a == b for a, b in zip(ours, theirs, strict=True)), len(questions))


def _transformers_answer(knowledge: KnowledgeBase, folder: Path, question: str) -> str:
    """What transformers alone says, token by token, without any cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusted = has_own_code(knowledge.engine.base.model)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trusted
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    renderer = knowledge.engine.renderer
    ids = list(renderer.prefix(question))
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < 24 and ids[-1] != renderer.end:
            logits = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    said: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return said


def _reopened(knowledge: KnowledgeBase, row: Row) -> None:
    """Opening again rebuilds from the journal: the rollback must have lasted."""
    said = [knowledge.ask(f"What is {key}?") == text for key, text in tiny.NEW]
    if not all(said):
        row.problems.append("after reopening, the facts rolled back to are not answered")


def tables(result: ArchitecturesResult) -> list[Table]:
    """One row an architecture."""
    columns = (
        "architecture", "class", "matrices", "add", "recall", "retained", "update", "remove",
        "rollback", "export", "reload", "seconds", "problems",
    )  # fmt: skip
    rows = tuple(_cells(row) for row in result.rows)
    return [Table(f"{len(rows)} architectures, tiny models", columns, rows)]


def _cells(row: Row) -> tuple[str, ...]:
    def count(pair: tuple[int, int] | None) -> str:
        return "-" if pair is None else f"{pair[0]}/{pair[1]}"

    def word(value: bool | None) -> str:
        return "-" if value is None else ("yes" if value else "NO")

    return (
        row.name, row.model, str(row.matrices), count(row.added), count(row.recalled),
        count(row.retained), word(row.updated), word(row.removed), word(row.rolled_back),
        count(row.exported), count(row.reloaded), f"{row.seconds:.1f}", "; ".join(row.problems),
    )  # fmt: skip
