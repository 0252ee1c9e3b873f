"""Passages with questions about them: SQuAD, CMRC 2018, DRCD, as documents and as rows.

Invariants:
- A passage is a fact; its questions are probes, asked and never trained.
- Rows of one passage, which follow each other, become one fact.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from kvedit.errors import InvalidFactError
from kvedit.facts.forms.names import Record
from kvedit.facts.language import detect_language

_TEXTS = ("context", "context_text", "passage")
_QUESTIONS = ("qas", "qas_list", "questions")


def passages_of(document: Record) -> list[Record | InvalidFactError] | None:
    """The passages of a SQuAD-like document (title and paragraphs) as records, else None."""
    paragraphs = document.get("paragraphs")
    if not isinstance(paragraphs, list) or not any(map(_is_passage, paragraphs)):
        return None
    title = document.get("title", document.get("id"))
    numbers = range(1, len(paragraphs) + 1) if len(paragraphs) > 1 else (None,)
    return [_paragraph(title, *one) for one in zip(numbers, paragraphs, strict=True)]


def _is_passage(paragraph: object) -> bool:
    return isinstance(paragraph, Mapping) and _text_of(paragraph) is not None


def _paragraph(title: object, number: int | None, paragraph: object) -> Record | InvalidFactError:
    """A paragraph of a document with this title, which has several where there is a number."""
    if not isinstance(paragraph, Mapping) or not _is_passage(paragraph):
        return InvalidFactError(f"paragraph {number} has no text (context)")
    key = _key(title, number, paragraph)
    return {"title": key, "context": _text_of(paragraph), "qas": _questions(paragraph)}


def passage(record: Record) -> Record | None:
    """A single passage with its questions: a row of CMRC 2018, or rows that were joined."""
    text = _text_of(record)
    name = next((one for one in _QUESTIONS if isinstance(record.get(one), list)), None)
    if text is None or name is None:
        return None
    title = record.get("title", record.get("key", record.get("context_id", record.get("id"))))
    return {"key": _key(title, None, record), "description": text, "questions": _questions(record)}


def join_rows(records: Iterable[tuple[int, object]]) -> Iterator[tuple[int, object]]:
    """Records with the rows of one passage (SQuAD as a table) joined under the first one's number.

    A title that has several passages numbers them.
    """
    seen: dict[str, int] = {}
    for passage_of, rows in groupby(records, key=lambda row: _row_passage(row[1])):
        if passage_of is None:
            yield from rows
            continue
        numbered = list(rows)
        title = passage_of[0]
        seen[title] = seen.get(title, 0) + 1
        number = seen[title] if seen[title] > 1 else None
        questions = [_question(record) for _, record in numbered if isinstance(record, Mapping)]
        key = _key(title, number, {"context": passage_of[1]})
        yield (
            numbered[0][0],
            {"context": passage_of[1], "title": key, "qas": [q for q in questions if q]},
        )


def _row_passage(record: object) -> tuple[str, str] | None:
    """Title and text of a row that asks one question about a passage."""
    if not isinstance(record, Mapping) or not {"context", "question", "answers"} <= set(record):
        return None
    title, text = record.get("title") or record.get("id"), record["context"]
    return (title, text) if isinstance(title, str) and isinstance(text, str) else None


def _text_of(record: Record) -> object:
    return next((record[name] for name in _TEXTS if isinstance(record.get(name), str)), None)


def _key(title: object, number: int | None, record: Record) -> object:
    """The title, with a number where it has several passages."""
    if not isinstance(title, str | int) or isinstance(title, bool):
        return title
    if number is None:
        return str(title)
    chinese = detect_language(str(title), str(_text_of(record))) != "en"
    return f"{title}，第{number}段" if chinese else f"{title}, passage {number}"


def _questions(record: Record) -> list[dict[str, object]]:
    """Probes for the questions that have an answer; a question asked twice counts once."""
    lists = (record.get(name) for name in _QUESTIONS)
    items = next((one for one in lists if isinstance(one, list)), [])
    asked = (_question(item) for item in items if isinstance(item, Mapping))
    probes: dict[object, dict[str, object]] = {}
    for probe in asked:
        if probe is not None:
            probes.setdefault(probe["prompt"], probe)
    return list(probes.values())


def _question(item: Record) -> dict[str, object] | None:
    """A question with its first answer as a probe; None for one that has no answer."""
    prompt = item.get("question", item.get("query_text", item.get("prompt")))
    answer = _answer(item.get("answers", item.get("answer")))
    if not isinstance(prompt, str) or not prompt.strip() or not answer:
        return None
    return {"prompt": prompt, "answer": answer, "probe": True}


def _answer(answers: object) -> str | None:
    """The first answer, however it is wrapped."""
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if isinstance(answers, list):
        return next((found for found in map(_answer, answers) if found), None)
    return answers.strip() or None if isinstance(answers, str) else None
