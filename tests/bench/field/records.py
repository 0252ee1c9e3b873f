"""The records that are edited, and the questions that they are asked.

A record is a fact in one of the forms that kvedit reads (CounterFact, zsRE, key and description),
or of HalluEditBench, with the true answer that the edit replaces and questions that need the fact.

Invariants:
- Every method trains on ``Record.prompts`` and on nothing else that is asked here.
- No paraphrase, locality or portability question is a trained prompt: one that is, is left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidFactError
from kvedit.facts.fact import Fact
from kvedit.facts.forms.records import read_record
from kvedit.facts.keys import normalise
from kvedit.facts.phrasings import KEY_PLACEHOLDER, load_phrasings
from kvedit.files import read_text
from tests.bench.quality_material import trained_prompts

PROMPT, PARAPHRASE, LOCALITY, PORTABILITY = "prompt", "paraphrase", "locality", "portability"
KINDS = (PROMPT, PARAPHRASE, LOCALITY, PORTABILITY)
PHRASINGS = 2  # unseen ones that a fact without paraphrases of its own is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A fact to edit in; ``truth`` is the answer that it replaces, where the file says so."""

    fact: Fact
    prompts: tuple[str, ...]
    paraphrases: tuple[str, ...] = ()
    locality: tuple[tuple[str, str | None], ...] = ()
    portability: tuple[tuple[str, str], ...] = ()
    truth: str | None = None

    @property
    def key(self) -> str:
        """The name that the record is about, the papers' subject."""
        return self.fact.name

    @property
    def target(self) -> str:
        """The answer that the model must give."""
        return self.fact.description

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is trained: prompt and answer."""
        return [(prompt, self.target) for prompt in self.prompts]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a record, by its index; ``expected`` is None where only change counts."""

    record: int
    kind: str
    prompt: str
    expected: str | None


def read(path: Path) -> list[Record]:
    """All records of a file of JSON Lines; raises InvalidFactError, naming the line."""
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, KeyError, TypeError, InvalidFactError) as error:
            raise InvalidFactError(f"{path}, line {number} is no record: {error}") from error
    return records


def choose(path: Path, n: int, known: int) -> tuple[list[Record], list[Record]]:
    """The first ``n`` records, and from the end of the file up to ``known`` whose truth is given,
    none about a key of the former.
    """
    records = read(path)
    edited = records[:n]
    keys = {normalise(record.key) for record in edited}
    others = (r for r in reversed(records[n:]) if r.truth and normalise(r.key) not in keys)
    return edited, [record for record, _ in zip(others, range(known), strict=False)]


def questions(records: Iterable[Record]) -> list[Question]:
    """All questions, record by record, each kind in the order of the file."""
    return [question for at, record in enumerate(records) for question in _questions(at, record)]


def _questions(at: int, record: Record) -> Iterator[Question]:
    yield from (Question(at, PROMPT, prompt, record.target) for prompt in record.prompts)
    yield from (Question(at, PARAPHRASE, prompt, record.target) for prompt in record.paraphrases)
    yield from (Question(at, LOCALITY, *row) for row in record.locality)
    yield from (Question(at, PORTABILITY, *row) for row in record.portability)


def sample(rows: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    """So many rows, drawn evenly from each ``task``, in their order; all without a count."""
    if count is None or count >= len(rows):
        return list(rows)
    tasks = list(dict.fromkeys(row.task for row in rows))
    rng, drawn = random.Random(seed), set[int]()
    for number, task in enumerate(tasks):
        own = [at for at, row in enumerate(rows) if row.task == task]
        share = (count + len(tasks) - 1 - number) // len(tasks)
        drawn |= set(rng.sample(own, min(share, len(own))))
    return [rows[at] for at in sorted(drawn)]


def _record(row: dict[str, Any]) -> Record:
    """One row in any of the forms."""
    _, fact = read_record(row)
    own = bool(fact.prompts)
    prompts = fact.prompts if own else trained_prompts(fact)
    trained = set(map(normalise, prompts))

    def unseen(rows: Iterable[str]) -> tuple[str, ...]:
        return tuple(text for text in dict.fromkeys(rows) if normalise(text) not in trained)

    locality = [(probe.prompt, probe.answer) for probe in fact.locality]
    return Record(
        fact=fact, prompts=prompts,
        paraphrases=unseen(fact.paraphrases or ([] if own else _held_out(fact))),
        locality=tuple(pair for pair in locality if normalise(pair[0]) not in trained),
        portability=tuple(pair for pair in _asked(row) if normalise(pair[0]) not in trained),
        truth=_truth(row),
    )  # fmt: skip


def _held_out(fact: Fact) -> list[str]:
    ways = load_phrasings(fact.lang).held_out[:PHRASINGS]
    return [way.replace(KEY_PLACEHOLDER, fact.key) for way in ways]


def _asked(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Questions that need the fact: HalluEditBench's hops, the questions of a passage."""
    asked = [*row.get("hops", ()), *row.get("questions", ())]
    return [(one["question"], one["answer"]) for one in asked if isinstance(one, dict)]


def _truth(row: dict[str, Any]) -> str | None:
    """The answer before the edit: CounterFact's, zsRE's."""
    answers = row.get("answers")
    truth = row.get("ground_truth") or (answers[0] if isinstance(answers, list) and answers else "")
    if not truth and isinstance(request := row.get("requested_rewrite"), dict):
        truth = request.get("target_true", {}).get("str", "")
    return str(truth) or None
