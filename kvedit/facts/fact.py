"""A fact: a key, its description, and the questions with which it is trained and probed.

Invariants:
- ``Fact.create`` is the only way in for text from outside: its result is stripped, free of control
  characters, encodable as UTF-8, and within the length limits.
- ``Fact.from_json(fact.to_json()) == fact`` for every fact that ``create`` returned.
- A text that does not fit the model's context is refused later, by the trainer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from kvedit.errors import InvalidFactError
from kvedit.facts.keys import contains_answer, is_blank, normalise
from kvedit.facts.language import LANGUAGES, detect_language

_T = TypeVar("_T")
MAX_KEY = 200
"""The longest key or alias, in characters: a longer one is a text, not a name."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # and half surrogate pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalityProbe:
    """A question whose answer must not change; without ``answer``, the model's current one."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about a fact, with an answer of its own; a ``probe`` is asked, never trained."""

    prompt: str
    answer: str
    probe: bool = False

    def is_held_out(self, share: float) -> bool:
        """Whether it is only asked: a probe, or by its prompt's hash among this share of all."""
        digest = hashlib.sha256(normalise(self.prompt).encode("utf-8", "replace")).digest()
        return self.probe or int.from_bytes(digest[:8]) < share * 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A question, or a statement (an empty ``prompt``), that ``writer`` made from the description:
    ``model`` is the base model.
    """

    prompt: str
    answer: str
    writer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One fact; make it with ``Fact.create``, which checks and cleans.

    ``questions`` are trained, or asked, besides the description; ``statements`` say the same in
    other words and are trained as text; ``written`` are more of both, made from the description and
    worth nothing without it.  ``relation_of`` is the subject of a relation, whose
    description answers its own prompts only: no other phrasing is trained, and the key, which must
    be unique, says more than the subject.
    """

    key: str
    description: str
    lang: str
    aliases: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    locality: tuple[LocalityProbe, ...] = ()
    questions: tuple[Question, ...] = ()
    statements: tuple[str, ...] = ()
    written: tuple[Written, ...] = ()
    relation_of: str | None = None
    source: str | None = None

    @property
    def all_questions(self) -> tuple[Question, ...]:
        """The questions that were given, then those that were written."""
        written = (Question(prompt=w.prompt, answer=w.answer) for w in self.written if w.prompt)
        return (*self.questions, *written)

    @property
    def all_statements(self) -> tuple[str, ...]:
        """Those that were given, then those that were written."""
        return (*self.statements, *(one.answer for one in self.written if not one.prompt))

    @property
    def name(self) -> str:
        """What questions call it: the subject of a relation, else the key."""
        return self.relation_of or self.key

    @classmethod
    def create(
        cls,
        key: str,
        description: str,
        *,
        lang: str | None = None,
        aliases: Iterable[str] = (),
        prompts: Iterable[str] = (),
        paraphrases: Iterable[str] = (),
        locality: Iterable[LocalityProbe] = (),
        questions: Iterable[Question] = (),
        statements: Iterable[str] = (),
        written: Iterable[Written] = (),
        relation_of: str | None = None,
        source: str | None = None,
    ) -> Fact:
        """Check and clean the parts; detect the language unless it is given.

        Raises InvalidFactError for an empty, over-long or unprintable part, an unknown language, a
        question with two answers, or a relation without a prompt.  A question that was given is not
        written besides.
        """
        key = _name("key", key)
        description = _text("description", description)
        prompts = _unique(_text("prompt", prompt) for prompt in prompts)
        if relation_of and not prompts:
            raise InvalidFactError(
                f"the relation {key} has no prompt", hint="Give the question it answers in prompts."
            )
        asked = _questions(questions)
        return cls(
            key=key,
            description=description,
            lang=_language(lang) if lang else detect_language(description, key),
            aliases=_unique(_name("alias", alias) for alias in aliases),
            prompts=prompts,
            paraphrases=_unique(_text("paraphrase", text) for text in paraphrases),
            locality=tuple(_probe(probe) for probe in locality),
            questions=asked,
            statements=_unique(_text("statement", statement) for statement in statements),
            written=_written(written, asked),
            relation_of=_name("subject", relation_of) if relation_of else None,
            source=_text("source", source) if source else None,
        )

    def with_description(self, description: str) -> Fact:
        """The same fact, in the same language, with another description.

        Statements, which say what the old one said, are dropped, and so is all that was written
        from it, and questions whose answer does not stand in the new one.
        """
        text = _text("description", description)
        if text == self.description:
            return self
        kept = tuple(one for one in self.questions if contains_answer(text, one.answer))
        return replace(self, description=text, questions=kept, statements=(), written=())

    def to_json(self) -> dict[str, object]:
        """A JSON document; parts that are empty are left out."""
        probes = [_present(asdict(probe)) for probe in self.locality]
        questions = [_question_document(question) for question in self.questions]
        written = [_present(asdict(one)) for one in self.written]
        parts = {"locality": probes, "questions": questions, "written": written}
        return _present({**asdict(self), **parts})

    @classmethod
    def from_json(cls, document: object) -> Fact:
        """Read a JSON document as ``create`` would; unknown names are ignored.

        Raises InvalidFactError when a part is missing or has the wrong type.
        """
        if not isinstance(document, Mapping):
            raise InvalidFactError(
                f"a fact must be a JSON object, not {_kind(document)}",
                hint='Write {"key": "...", "description": "..."}.',
            )
        return cls.create(
            _string(document, "key"),
            _string(document, "description"),
            lang=_optional(document, "lang"),
            aliases=_strings(document, "aliases"),
            prompts=_strings(document, "prompts"),
            paraphrases=_strings(document, "paraphrases"),
            locality=[_probe_from(item) for item in _list(document, "locality")],
            questions=[_question_from(item) for item in _list(document, "questions")],
            statements=_strings(document, "statements"),
            written=[_written_from(item) for item in _list(document, "written")],
            relation_of=_optional(document, "relation_of"),
            source=_optional(document, "source"),
        )


def _text(what: str, value: str) -> str:
    """Strip a text; refuse an empty one and control characters."""
    cleaned = value.replace("\r\n", "\n").strip()
    if control := _CONTROL.search(cleaned):
        raise InvalidFactError(
            f"the {what} has a control character (U+{ord(control[0]):04X}) at position"
            f" {control.start()}",
            hint="Is this a text? Remove the character and try again.",
        )
    if is_blank(cleaned):
        unseen = " of visible characters" if cleaned else ""
        raise InvalidFactError(f"the {what} is empty{unseen}", hint=f"Give the {what} some text.")
    return cleaned


def _name(what: str, value: str) -> str:
    """Like ``_text``, on one line and short."""
    cleaned = _text(what, value)
    if "\n" in cleaned or "\t" in cleaned:
        raise InvalidFactError(
            f"the {what} has a line break or a tab: {cleaned!r:.80}",
            hint=f"A {what} is a name on one line.",
        )
    if len(cleaned) > MAX_KEY:
        raise InvalidFactError(
            f"the {what} has {len(cleaned)} characters, {MAX_KEY} are allowed",
            hint=f"A {what} is a name; put the long text into the description.",
        )
    return cleaned


def _language(lang: str) -> str:
    if lang not in LANGUAGES:
        hint = f"Known languages: {', '.join(LANGUAGES)}."
        raise InvalidFactError(f"unknown language {lang!r}", hint=hint)
    return lang


def _probe(probe: LocalityProbe) -> LocalityProbe:
    answer = None if probe.answer is None else _text("locality answer", probe.answer)
    return LocalityProbe(prompt=_text("locality prompt", probe.prompt), answer=answer)


def _questions(questions: Iterable[Question]) -> tuple[Question, ...]:
    """Cleaned, without repetitions; a prompt may have one answer only."""
    pairs = (
        (o, _text("question", o.prompt), _text("question's answer", o.answer)) for o in questions
    )
    cleaned = _unique(replace(one, prompt=prompt, answer=answer) for one, prompt, answer in pairs)
    answers: dict[str, str] = {}
    for one in cleaned:
        if answers.setdefault(one.prompt, one.answer) != one.answer:
            raise InvalidFactError(
                f"the question {one.prompt!r:.80} has two answers: {answers[one.prompt]!r:.40} and"
                f" {one.answer!r:.40}",
                hint="Keep one of them.",
            )
    return tuple(cleaned)


def _written(written: Iterable[Written], given: Iterable[Question]) -> tuple[Written, ...]:
    """Cleaned; the first answer to each question not given."""
    asked = {one.prompt for one in given}
    by_text: dict[str, Written] = {}
    for one in written:
        prompt = one.prompt and _text("question", one.prompt)
        answer, writer = _text("written answer", one.answer), _name("writer", one.writer)
        if prompt not in asked:
            cleaned = Written(prompt=prompt, answer=answer, writer=writer)
            by_text.setdefault(prompt or answer, cleaned)
    return tuple(by_text.values())


def _unique(values: Iterable[_T]) -> tuple[_T, ...]:
    """Without repetitions, in the same order."""
    return tuple(dict.fromkeys(values))


def _present(parts: dict[str, object]) -> dict[str, object]:
    """The parts that are not empty, tuples as lists."""
    lists = {name: list(v) if isinstance(v, tuple) else v for name, v in parts.items()}
    return {name: value for name, value in lists.items() if value not in ([], None)}


def _probe_from(item: object) -> LocalityProbe:
    """A locality probe is a question, or an object with a question and an answer."""
    if isinstance(item, str):
        return LocalityProbe(prompt=item)
    if not isinstance(item, Mapping):
        raise InvalidFactError(f'"locality" must hold objects or strings, not {_kind(item)}')
    return LocalityProbe(prompt=_string(item, "prompt"), answer=_optional(item, "answer"))


def _question_from(item: object) -> Question:
    """A question is an object with ``prompt`` (or ``question``), ``answer``, perhaps ``probe``."""
    if not isinstance(item, Mapping):
        raise InvalidFactError(
            f'"questions" must hold objects, not {_kind(item)}',
            hint='Write {"prompt": "...", "answer": "..."}.',
        )
    probe = item.get("probe", False)
    if not isinstance(probe, bool):
        raise InvalidFactError(f'"probe" must be true or false, not {_kind(probe)}')
    prompt = _string(item, "question" if "question" in item and "prompt" not in item else "prompt")
    return Question(prompt=prompt, answer=_string(item, "answer"), probe=probe)


def _written_from(item: object) -> Written:
    """An object with ``prompt`` (none for a statement), ``answer`` and ``writer``."""
    if not isinstance(item, Mapping):
        raise InvalidFactError(f'"written" must hold objects, not {_kind(item)}')
    prompt, answer = _optional(item, "prompt") or "", _string(item, "answer")
    return Written(prompt=prompt, answer=answer, writer=_string(item, "writer"))


def _question_document(question: Question) -> dict[str, object]:
    document: dict[str, object] = {"prompt": question.prompt, "answer": question.answer}
    return {**document, "probe": True} if question.probe else document


def _string(document: Mapping[object, object], name: str) -> str:
    value = document.get(name)
    if value is None:
        raise InvalidFactError(f'"{name}" is missing', hint=f'Add "{name}" to the object.')
    if not isinstance(value, str):
        raise InvalidFactError(f'"{name}" must be a string, not {_kind(value)}')
    return value


def _optional(document: Mapping[object, object], name: str) -> str | None:
    return None if document.get(name) is None else _string(document, name)


def _list(document: Mapping[object, object], name: str) -> list[object]:
    value = document.get(name)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise InvalidFactError(f'"{name}" must be a list, not {_kind(value)}')
    return list(value)


def _strings(document: Mapping[object, object], name: str) -> list[str]:
    values = _list(document, name)
    for value in values:
        if not isinstance(value, str):
            raise InvalidFactError(f'"{name}" must hold strings, not {_kind(value)}')
    return [value for value in values if isinstance(value, str)]


_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}


def _kind(value: object) -> str:
    """The JSON word for a value's type."""
    return "null" if value is None else _KINDS.get(type(value), "a number")
