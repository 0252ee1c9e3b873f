"""Which form a record is in, and the fact that it describes.

Invariants:
- A record in kvedit's own form is read exactly as ``Fact.from_json`` reads it.
- Columns that the user names come before every form.
- A record in no form gives an error that names what it has and what is missing, never half a fact.
- The parts of a form keep the names that it does not read, so that these can be told; what the data
  sets of the field have besides is known, and left out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kvedit.errors import InvalidFactError, UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.forms import editing_sets, exchanges, passages, relations
from kvedit.facts.forms.names import (
    ANSWERS,
    NEEDED,
    PARTS,
    QUESTIONS,
    SYNONYMS,
    Record,
    column_name,
    first_of,
    standard_names,
)
from kvedit.facts.keys import in_words


@dataclass(frozen=True, slots=True)
class Columns:
    """The names under which a file has keys and descriptions, where the user gives them.

    Raises UsageError if one name is to be both.
    """

    key: str | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        chosen = [column_name(name) for name in (self.key, self.description) if name]
        if len(chosen) > len(set(chosen)):
            raise UsageError(
                f"the column {self.key!r} cannot be both the key and the description",
                hint="Give --key-column and --description-column different names.",
            )

    def __bool__(self) -> bool:
        return bool(self.key or self.description)


ANY_COLUMNS = Columns()


class NoFormError(InvalidFactError):
    """A record is in no form: what is ``missing`` from the names that it has, and the form of a
    data set that has such names.
    """

    def __init__(self, names: Iterable[str], missing: Sequence[str], like: str = "") -> None:
        are = "is" if len(missing) == 1 else "are"
        found = in_words([repr(name) for name in names if name], most=12) or "none"
        but = f"; as {like} it lacks a part, or has one in another shape" if like else ""
        super().__init__(
            f"{' and '.join(missing)} {are} missing or empty; it has {found}{but}", hint=CHOOSE
        )


@dataclass(frozen=True, slots=True)
class Form:
    """What a record was taken for, and the parts of its fact."""

    name: str
    parts: Record

    @property
    def unread(self) -> tuple[str, ...]:
        """The record's names that are no part of a fact."""
        return tuple(name for name in self.parts if name not in PARTS)


CHOOSE = (
    "Say which are the two parts: --key-column NAME --description-column NAME; the forms that are"
    " read are listed in docs/guides/file-forms.md."
)
OWN = "key and description"
_RELATIONS = ({"prompt", "target_new"}, {"src", "alt"})  # of CounterFact and zsRE
_Form = Callable[[Record], Record | None]
_FORMS: tuple[tuple[str, frozenset[str], _Form], ...] = (
    ("CounterFact", frozenset({"requested_rewrite"}), relations.counterfact_original),
    ("KnowEdit", frozenset({"subject", "prompt", "target_new"}), editing_sets.knowedit),
    (
        "KnowEdit WikiBio",
        frozenset({"concept", "text", "labels", "locality"}),
        editing_sets.wikibio,
    ),
    ("CounterFact or zsRE", frozenset({"subject"}), relations.flat),
    ("WikiBigEdit", frozenset({"subject", "update", "ans"}), editing_sets.wikibigedit),
    ("HalluEditBench", frozenset({"subject", "object", "question"}), editing_sets.hallueditbench),
    ("UnKE", frozenset({"question", "answer"}), editing_sets.unke),
    ("passages with questions (SQuAD)", frozenset(), passages.passage),
    ("OpenAI messages", frozenset({"messages"}), exchanges.messages),
    *(
        ("ShareGPT conversations", frozenset({name}), exchanges.sharegpt)
        for name in exchanges.CONVERSATIONS
    ),
    (
        "Dolly (instruction, context, response)",
        frozenset({"instruction", "context", "response"}),
        exchanges.dolly,
    ),
    (
        "Alpaca (instruction, input, output)",
        frozenset({"instruction", "output"}),
        exchanges.alpaca,
    ),
)
"""The forms, the names that each needs, and what makes a fact of a record in it."""


@lru_cache(maxsize=1000)
def _possible(names: tuple[str, ...]) -> tuple[tuple[str, _Form], ...]:
    """The forms that a record with these names may be in; asked for every row of a table."""
    has = frozenset(names)
    return tuple((label, form) for label, needed, form in _FORMS if needed <= has)


def form_of(record: Record, columns: Columns = ANY_COLUMNS) -> Form:
    """A record's form; raises NoFormError, and InvalidFactError for one that cannot be taught."""
    if columns:
        return Form(_renamed(tuple(record), columns), _by_columns(record, columns))
    if "key" in record and "description" in record:
        return Form(OWN, record)
    for name, form in _possible(tuple(record)):
        if (parts := form(record)) is not None:
            return Form(name, parts)
    renamed = standard_names(record)
    if "key" in renamed and "description" in renamed:
        return Form(_renamed(tuple(record)), renamed)
    if (parts := exchanges.table_row(record)) is not None:
        return Form("questions and answers", parts)
    like = next((label for label, needed, _ in _FORMS if needed and needed <= set(record)), "")
    raise NoFormError(map(str, record), _missing(record, renamed), like)


def _missing(record: Record, renamed: Record) -> list[str]:
    """What a record lacks: the other half of what it has."""
    if "subject" not in record and any(names <= set(record) for names in _RELATIONS):
        return ['"subject"']
    asks, answers = first_of(record, QUESTIONS), first_of(record, ANSWERS)
    if "key" not in renamed and bool(asks) != bool(answers):
        return ['"answer"' if asks else '"question"']
    return [f'"{name}"' for name in NEEDED if name not in renamed]


def read_record(record: object, columns: Columns = ANY_COLUMNS) -> tuple[Form, Fact]:
    """The form and the fact of a record; raises InvalidFactError."""
    if not isinstance(record, Mapping):
        return Form(OWN, {}), Fact.from_json(record)
    form = form_of(record, columns)
    return form, Fact.from_json(form.parts)


def looks_like_fact(record: Record, columns: Columns = ANY_COLUMNS) -> bool:
    """Whether an object is one fact, rather than a mapping of keys to descriptions."""
    try:
        form_of(record, columns)
    except NoFormError:
        return False
    except InvalidFactError:
        return True
    return True


def names_fit(names: Iterable[str], columns: Columns = ANY_COLUMNS) -> bool:
    """Whether a table with these columns has a fact in each row."""
    return looks_like_fact(dict.fromkeys(filter(None, names), "x"), columns)


@lru_cache(maxsize=1000)
def _renamed(names: tuple[str, ...], columns: Columns = ANY_COLUMNS) -> str:
    """The form of a record with other names: which of them are key and description."""
    chosen = []
    for part, wanted in (("key", columns.key), ("description", columns.description)):
        name = wanted or (part if part in names else None)
        name = name or next((one for one in SYNONYMS[part] if one in names), part)
        chosen.append(part if name == part else f"{name} as {part}")
    return OWN if chosen == list(NEEDED) else ", ".join(chosen)


def _by_columns(record: Record, columns: Columns) -> Record:
    """A record by the two names that the user gave; a missing one is kvedit's or a synonym."""
    parts = dict(record)
    for part, wanted in (("key", columns.key), ("description", columns.description)):
        if wanted is None:
            continue
        name = next((n for n in record if column_name(n) == column_name(wanted)), None)
        if name is None:
            raise NoFormError(map(str, record), [repr(wanted)])
        value = parts.pop(name)
        parts[part] = str(value) if isinstance(value, int | float) else value
    parts = standard_names(parts)
    if not set(NEEDED) <= set(parts):
        raise NoFormError(map(str, record), _missing(record, parts))
    return parts
