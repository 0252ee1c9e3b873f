"""The form in which facts go to whoever writes questions about them, and come back.

One JSON object a line: ``key``, ``description``, ``lang``, ``questions`` (``prompt``, ``answer``)
and ``statements``; a writer adds to the last two.

Invariants:
- A held-out question is not given to a writer: it would be asked for in other words, and trained.
- What one line has wrong is said with its number, before anything is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvedit.config import StudyConfig
from kvedit.errors import InvalidFactError
from kvedit.facts.fact import Fact, Written
from kvedit.facts.parts import parts
from kvedit.files import read_text

GIVEN, PARTS = "given", "parts"  # writers: whoever gave the fact, and string operations
_HINT = (
    'Write {"key": "...", "description": "...", "questions": [{"prompt": "...", "answer": "..."}]}.'
)


@dataclass(frozen=True, slots=True)
class StudyEntry:
    """A question, or a statement (no ``prompt``), of a fact: who wrote it, and whether it is only
    asked.
    """

    prompt: str
    answer: str
    writer: str
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """What came back about a fact."""

    key: str
    description: str
    texts: tuple[Written, ...]


def entries(fact: Fact, config: StudyConfig) -> list[StudyEntry]:
    """All that a fact has to be studied besides its text."""
    writers = {one.prompt or one.answer: one.writer for one in fact.written}
    entries = [
        StudyEntry(
            one.prompt, one.answer, writers.get(one.prompt, GIVEN), one.is_held_out(config.held_out)
        )
        for one in fact.all_questions
    ]
    entries += [StudyEntry("", one, writers.get(one, GIVEN)) for one in fact.all_statements]
    of_text = parts(fact) if config.parts else ()
    return [*entries, *(StudyEntry(one.prompt, one.answer, PARTS) for one in of_text)]


def lines(facts: Iterable[Fact], config: StudyConfig) -> Iterator[str]:
    """One line for each fact, without its parts."""
    for fact in facts:
        known = [one for one in entries(fact, config) if one.writer != PARTS and not one.held_out]
        questions = [{"prompt": one.prompt, "answer": one.answer} for one in known if one.prompt]
        statements = [one.answer for one in known if not one.prompt]
        document = {"key": fact.key, "description": fact.description, "lang": fact.lang}
        yield json.dumps(
            {**document, "questions": questions, "statements": statements}, ensure_ascii=False
        )


def read(source: Path | str, writer: str) -> list[StudyRecord]:
    """The records of a file or of standard input (``-``), whose texts are those of ``writer``.

    Raises InvalidFactError, naming the line, and what ``files.read_text`` raises.
    """
    name = "standard input" if str(source) == "-" else str(source)
    numbered = enumerate(read_text(source).splitlines(), 1)
    return [_record(line, f"{name}, line {n}", writer) for n, line in numbered if line.strip()]


def _record(line: str, where: str, writer: str) -> StudyRecord:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidFactError(f"{where} is not JSON: {error!s:.80}", hint=_HINT) from error
    if not isinstance(row, Mapping):
        raise InvalidFactError(f"{where} is no object", hint=_HINT)
    key, description = (_text(row, name, where) for name in ("key", "description"))
    texts = [_question(item, where, writer) for item in _list(row, "questions", where)]
    for item in _list(row, "statements", where):
        if not isinstance(item, str):
            raise InvalidFactError(f'{where}: "statements" must hold texts', hint=_HINT)
        texts.append(Written(prompt="", answer=item, writer=writer))
    return StudyRecord(key, description, tuple(texts))


def _question(item: object, where: str, writer: str) -> Written:
    if not isinstance(item, Mapping):
        raise InvalidFactError(f'{where}: "questions" must hold objects', hint=_HINT)
    prompt = _text(item, "question" if "prompt" not in item else "prompt", where)
    if not prompt.strip():
        raise InvalidFactError(f"{where}: a question is empty", hint="Take it out.")
    return Written(prompt=prompt, answer=_text(item, "answer", where), writer=writer)


def _text(row: Mapping[object, object], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise InvalidFactError(f'{where}: "{name}" must be a text', hint=_HINT)
    return value


def _list(row: Mapping[object, object], name: str, where: str) -> list[object]:
    value = row.get(name)
    if value is not None and not isinstance(value, list):
        raise InvalidFactError(f'{where}: "{name}" must be a list', hint=_HINT)
    return value or []
