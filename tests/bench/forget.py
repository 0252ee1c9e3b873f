"""What an erased fact leaves behind: in the files of a store, and in what the model says.

Two stores begin as one.  In the first some facts are taught beside others and then erased; the
second is taught the others alone.

Invariants:
- Both models are asked the same questions: each erased fact's first training prompt, by free
  generation, and the likelihood of its text.
- Every byte of every file of the store is looked at, after it was closed.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from kvedit.bench.tables import Table
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.events import Event, Score, Status
from kvedit.facts.fact import Fact
from kvedit.model import scoring
from kvedit.model.prompts import Renderer

SEED = tuple(sorted((Path(__file__).parents[2] / "store" / "seed").glob("*.jsonl")))
Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetOptions:
    """``facts`` to erase and ``others`` to keep, in the order of ``facts_files``; ``time``: seconds
    in which the model is asked what it knows.
    """

    facts_files: tuple[Path, ...] = SEED
    facts: int = 20
    others: int = 8
    model: str | None = None
    time: float = 60.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one model says of the facts to be erased: how many it answers exactly, the mean loss of
    their texts in nats a token, and its answers.
    """

    model: str
    recalled: Score
    loss: float
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetResult:
    """``files_before`` and ``files_after`` name the files with a text or its ids in them."""

    outcome: str
    said: tuple[Said, ...]
    files_before: tuple[str, ...]
    files_after: tuple[str, ...]
    kept: Score
    erase_seconds: float


def forget(options: ForgetOptions, emit: Emit) -> ForgetResult:
    """Teach, erase, and compare with a model that was never taught."""
    texts = [path.read_text(encoding="utf-8") for path in options.facts_files]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    facts = [Fact.from_json(json.loads(line)) for line in lines]
    secret, others = facts[: options.facts], facts[options.facts :][: options.others]
    with TemporaryDirectory(prefix="kvedit-bench-") as folder:
        first, second = Path(folder) / "erased", Path(folder) / "never"
        KnowledgeBase.create(first, options.model, time=options.time, on_event=emit).close()
        shutil.copytree(first, second)
        emit(Status(phase=f"teaching {len(secret) + len(others)} facts"))
        with KnowledgeBase.open(first, on_event=emit) as knowledge:
            base = _said("base model", knowledge, secret)
            knowledge.add_group([*others, *secret], force=True)
            taught = _said("taught", knowledge, secret)
            forms = _forms(knowledge.engine.renderer, secret)
            before = _files_with(first, forms)
            report = knowledge.erase(*(fact.key for fact in secret), force=True)
            erased = _said("erased", knowledge, secret)
            kept = _said("", knowledge, others).recalled
        after = _files_with(first, forms)
        emit(Status(phase=f"teaching the {len(others)} others alone"))
        with KnowledgeBase.open(second, on_event=emit) as knowledge:
            knowledge.add_group(others, force=True)
            never = _said("never taught", knowledge, secret)
    return ForgetResult(
        outcome=report.outcome, said=(base, taught, erased, never), files_before=tuple(before),
        files_after=tuple(after), kept=kept, erase_seconds=report.seconds,
    )  # fmt: skip


def _said(name: str, knowledge: KnowledgeBase, facts: Sequence[Fact]) -> Said:
    engine = knowledge.engine
    examples = [engine.examples(fact)[0] for fact in facts]
    longest = max((len(one.ids) - one.start for one in examples), default=1)
    answers = engine.generate([one.prompt for one in examples], limit=longest)
    right = sum(one.answer == answer for one, answer in zip(examples, answers, strict=True))
    loss = float(scoring.token_scores(engine.base.model, examples).losses.mean())
    score = Score(right, len(examples), "generated")
    return Said(model=name, recalled=score, loss=loss, answers=tuple(answers))


def _forms(renderer: Renderer, facts: Sequence[Fact]) -> list[bytes]:
    """The texts in UTF-8, as JSON escapes them, and as ids in binary and in JSON."""
    forms: set[bytes] = set()
    for fact in facts:
        ids = list(renderer.tokens(fact.description))
        forms |= {fact.description.encode(), json.dumps(fact.description)[1:-1].encode()}
        forms |= {array(kind, ids).tobytes() for kind in "iq"}
        forms |= {separator.join(map(str, ids)).encode() for separator in (",", ", ")}
    return sorted(forms)


def _files_with(store: Path, forms: Sequence[bytes]) -> list[str]:
    files = [path for path in sorted(store.rglob("*")) if path.is_file()]
    return [one.name for one in files if any(form in one.read_bytes() for form in forms)]


def tables(result: ForgetResult) -> list[Table]:
    """What each model says, and where the texts stand."""
    never = result.said[-1]

    def row(one: Said) -> tuple[str, ...]:
        low, high = (round(100 * end) for end in one.recalled.interval())
        same = sum(a == b for a, b in zip(one.answers, never.answers, strict=True))
        recalled = f"{one.recalled.passed} of {one.recalled.n} ({low}-{high}%)"
        return one.model, recalled, f"{one.loss:.2f}", f"{same} of {len(never.answers)}"

    names = (
        "model",
        "texts recalled",
        "loss of the texts, nats a token",
        "answers as never taught",
    )
    left = (
        ("before the erasing", ", ".join(result.files_before) or "none"),
        ("after it", ", ".join(result.files_after) or "none"),
        ("other facts recalled after it", f"{result.kept.passed} of {result.kept.n}"),
        ("outcome", f"{result.outcome}, {result.erase_seconds:.0f} s"),
    )
    return [
        Table("The erased facts", names, tuple(map(row, result.said))),
        Table("Files of the store with a text in them", ("when", "files"), left),
    ]
