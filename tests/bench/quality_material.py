"""What ``quality`` trains and asks: facts, keys that nobody trains, questions, choices, texts.

The facts by default are the glossary beside this module, written for this project: the wiki of a
company that does not exist, 120 entries of twenty kinds, the first of each kind in Chinese too.

Invariants:
- The same files, limits and seed give the same material in the same order.
- No general question names a key that is trained or a key that nobody trains.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidFactError, UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.keys import normalise
from kvedit.facts.language import detect_language
from kvedit.facts.phrasings import (
    KEY_PLACEHOLDER,
    SHIPPED_PHRASINGS,
    load_phrasings,
    paraphrase_prompts,
)
from kvedit.files import read_text
from tests.jsonl_facts import read_facts_jsonl

GLOSSARY = Path(__file__).parent / "glossary"
SHIPPED_PROMPTS = SHIPPED_PHRASINGS.parent / "protected_prompts.txt"
SEED = Path(__file__).parents[2] / "store" / "seed" / "zh-Hant.jsonl"
ENGLISH, CHINESE, MIXED = "glossary", "glossary-zh", "glossary-mixed"
BUILT_IN = (ENGLISH, CHINESE, MIXED)
"""Names that ``facts`` takes instead of a file.  The Chinese ones begin with 夢中情爐, a seed fact;
the mixed ones alternate between the languages as long as there are entries in both.
"""
UNTAUGHT_KEYS = 20  # at most, of the facts that ``limit`` leaves out
UNTAUGHT_PHRASINGS = 2  # of those that edits train on, and as many others


@dataclass(frozen=True, slots=True)
class Choice:
    """A multiple-choice question; ``answer`` is the index of the right choice."""

    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Phrasing:
    """A question for a fact; ``other`` says that it is not in the fact's own language."""

    fact: int
    prompt: str
    other: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MaterialOptions:
    """Where the material comes from; parts without a file are empty.

    ``facts`` is a file or one of ``BUILT_IN``; ``asked`` is how many phrasings of each kind a fact
    is asked (None: all), ``text_tokens`` about how many tokens of text are read.
    """

    facts: str = ENGLISH
    limit: int | None = None
    untaught: Path | None = None
    abilities: Path | None = None
    text: Path | None = None
    text_tokens: int = 8000
    questions: int = 300
    questions_files: tuple[Path, ...] = ()
    asked: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """All that is trained and asked; ``trained`` are phrasings that every method trains on,
    ``unseen`` those that none does; ``untaught`` pairs a key that nobody trains with a question.
    """

    facts: tuple[Fact, ...]
    trained: tuple[Phrasing, ...]
    unseen: tuple[Phrasing, ...]
    untaught: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    abilities: tuple[Choice, ...]
    texts: tuple[str, ...]


def load(options: MaterialOptions) -> Material:
    """Read all of it; raises UsageError or InvalidFactError, naming the file and the line."""
    everything = read_facts(options.facts)
    facts = everything[: options.limit]
    keys = _untaught_keys(options, everything[len(facts) :])
    rng = random.Random(options.seed)
    named = [normalise(key) for key in (*(fact.key for fact in facts), *keys)]
    return Material(
        facts=facts,
        trained=_phrasings(facts, options.asked, rng, trained=True),
        unseen=_phrasings(facts, options.asked, rng, trained=False),
        untaught=tuple((key, prompt) for key in keys for prompt in _untaught_prompts(key)),
        questions=_questions(options, named),
        abilities=abilities(options.abilities) if options.abilities else (),
        texts=_texts(options.text) if options.text else (),
    )


def read_facts(source: str) -> tuple[Fact, ...]:
    """The facts of a file, or those of a name in ``BUILT_IN``."""
    if source not in BUILT_IN:
        return tuple(read_facts_jsonl(source))
    english = list(read_facts_jsonl(GLOSSARY / "en.jsonl"))
    chinese = list(read_facts_jsonl(GLOSSARY / "zh.jsonl"))
    seed = next(fact for fact in read_facts_jsonl(SEED) if fact.key == "夢中情爐")
    if source == ENGLISH:
        return tuple(english)
    if source == CHINESE:
        return (seed, *chinese)
    pairs = zip_longest(english, chinese)
    mixed = (zh if zh and at % 2 else en for at, (en, zh) in enumerate(pairs))
    return (seed, *mixed)


def trained_prompts(fact: Fact) -> tuple[str, ...]:
    """The prompts that every method trains on: the shipped ones in the fact's own language, and the
    fact's own.
    """
    shipped = (way.replace(KEY_PLACEHOLDER, fact.key) for way in load_phrasings(fact.lang).train)
    return tuple(dict.fromkeys((*shipped, *fact.prompts)))


def _phrasings(
    facts: Sequence[Fact], count: int | None, rng: random.Random, *, trained: bool
) -> tuple[Phrasing, ...]:
    rows: list[Phrasing] = []
    for at, fact in enumerate(facts):
        prompts = list(trained_prompts(fact) if trained else paraphrase_prompts(fact))
        ways = load_phrasings(fact.lang).cross_held_out
        other = {way.replace(KEY_PLACEHOLDER, fact.key) for way in ways}
        drawn = prompts if count is None else rng.sample(prompts, min(count, len(prompts)))
        rows += [Phrasing(at, prompt, prompt in other) for prompt in drawn]
    return tuple(rows)


def _untaught_keys(options: MaterialOptions, left_out: Sequence[Fact]) -> list[str]:
    """Those of a file, else of the facts that were left out, else those of the glossary."""
    if options.untaught is None and left_out:
        return [fact.key for fact in left_out[:UNTAUGHT_KEYS]]
    if options.untaught is None and options.facts not in BUILT_IN:
        return []
    path = options.untaught or GLOSSARY / "untaught.jsonl"
    return [_string(row, "key", where) for where, row in _rows(path)]


def _untaught_prompts(key: str) -> Iterator[str]:
    ways = load_phrasings(detect_language(key, key))
    some = (*ways.train[:UNTAUGHT_PHRASINGS], *ways.held_out[:UNTAUGHT_PHRASINGS])
    return (way.replace(KEY_PLACEHOLDER, key) for way in some)


def _questions(options: MaterialOptions, named: Sequence[str]) -> tuple[str, ...]:
    """A sample of those in the files, then the shipped prompts; none that names a key.

    The shipped ones come last: a store protects nearly all of them, and then they do not count.
    """
    shipped = SHIPPED_PROMPTS.read_text(encoding="utf-8").splitlines()
    drawn = [text for path in options.questions_files for text in _file_questions(path)]
    random.Random(options.seed).shuffle(drawn)
    unrelated = (
        text
        for text in dict.fromkeys((*drawn, *shipped))
        if text.strip() and not any(key in normalise(text) for key in named)
    )
    return tuple(unrelated)[: options.questions]


def _file_questions(path: Path) -> Iterator[str]:
    """Of a row of JSON its ``questions``, ``question`` or ``prompt``; else the line itself."""
    for where, row in _rows(path, plain=True):
        if isinstance(row, str):
            yield row
        elif isinstance(row.get("questions"), list):
            yield from (_string(one, "question", where) for one in row["questions"])
        else:
            yield _string(row, "question" if "question" in row else "prompt", where)


def _texts(path: Path) -> tuple[str, ...]:
    """Of a row of JSON its ``description`` or ``text``; else the line itself."""
    rows = _rows(path, plain=True)
    names = ((w, r, "description" if "description" in r else "text") for w, r in rows)
    return tuple(r if isinstance(r, str) else _string(r, name, w) for w, r, name in names)


def abilities(path: Path) -> tuple[Choice, ...]:
    """The choices of a file."""
    return tuple(_choice(row, where) for where, row in _rows(path))


def _choice(row: dict[str, Any], where: str) -> Choice:
    choices, answer = row.get("choices"), row.get("answer")
    valid = isinstance(choices, list) and all(isinstance(one, str) for one in choices)
    if not valid or type(answer) is not int or not 0 <= answer < len(choices):
        raise UsageError(f"{where} needs choices (texts) and answer (the index of the right one)")
    task = str(row.get("task") or row.get("source") or "abilities")
    return Choice(task, _string(row, "prompt", where), tuple(choices), answer)


def _rows(path: Path, *, plain: bool = False) -> Iterator[tuple[str, Any]]:
    """Place and object of every line that is not blank; with ``plain`` a line may be text."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number}"
        if plain and line.strip() and not line.lstrip().startswith("{"):
            yield where, line.strip()
        elif line.strip():
            yield where, _object(line, where)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidFactError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise InvalidFactError(f"{where} must be a JSON object")
    return row


def _string(row: Any, name: str, where: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f'{where} has no "{name}"')
    return value


def prompts_of(rows: Iterable[tuple[str, str]]) -> list[str]:
    """The questions of ``Material.untaught``."""
    return [prompt for _, prompt in rows]


def tasks_of(abilities: Iterable[Choice]) -> tuple[str, ...]:
    """The names of the tasks, in order."""
    return tuple(dict.fromkeys(one.task for one in abilities))
