"""What the benchmarks ask: facts to add, and base facts that must stay.

DIR holds ``poets.jsonl``, ``relations.jsonl`` and ``relation_phrasings.json``; which of their facts
a model was pretrained on stands in the model's own folder (``pretrained_poets.txt`` and
``pretrained_relations.tsv``, written by ``tests.bench.pretrain``).

Facts to train are held-out poets, held-out relations, or those of a file; poets that the model was
pretrained on serve where facts must hold already.

Invariants:
- A base fact whose name occurs in a text that training may have seen is never asked.
- The same files and seed give the same facts in the same order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from kvedit.errors import InvalidFactError, UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.keys import normalise
from kvedit.facts.phrasings import KEY_PLACEHOLDER, load_phrasings
from tests.bench.pretrain import prompt_form
from tests.jsonl_facts import read_facts_jsonl

POETS_LIST, RELATIONS_LIST = "pretrained_poets.txt", "pretrained_relations.tsv"
POETS, RELATIONS, KNOWN = "poets", "relations", "known"
OWN_PROMPTS = 4
"""Number of a relation's phrasings that are trained besides the shipped ones, and of others that
are not."""
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Poet:
    """A poet and what is said of them, in Traditional Chinese."""

    key: str
    description: str


@dataclass(frozen=True, slots=True)
class BaseFact:
    """A question that the base model may answer, and the name it is about."""

    name: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Relation:
    """A held-out relation: its subject, its object, and questions that end where that begins."""

    subject: str
    object: str
    prompts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BenchData:
    """The facts of a folder, separated by what the model was pretrained on.

    For a model that says nothing about its pretraining every poet is held out, and every relation
    may be known.
    """

    known: tuple[Poet, ...]
    held_out: tuple[Poet, ...]
    relations: tuple[BaseFact, ...]
    held_out_relations: tuple[Relation, ...] = ()


def load(data: Path, model: str) -> BenchData:
    """Read a folder for a model; raises UsageError for what is missing or broken."""
    lists = Path(model)
    known = set(_lines(lists / POETS_LIST))
    listed = set(_lines(lists / RELATIONS_LIST))
    poets = [Poet(str(row["key"]), str(row["description"])) for row in _rows(data / "poets.jsonl")]
    return BenchData(
        known=tuple(poet for poet in poets if poet.key in known),
        held_out=tuple(poet for poet in poets if poet.key not in known),
        relations=tuple(_relations(data, listed)),
        held_out_relations=tuple(_held_out_relations(data, listed)),
    )


def in_common(folders: Sequence[BenchData]) -> list[BenchData]:
    """The same, but held out is only what no model was pretrained on: they are trained alike."""
    poets = set.intersection(*(set(one.held_out) for one in folders))
    relations = set.intersection(*(set(one.held_out_relations) for one in folders))
    return [
        replace(
            one,
            held_out=tuple(poet for poet in one.held_out if poet in poets),
            held_out_relations=tuple(r for r in one.held_out_relations if r in relations),
        )
        for one in folders
    ]


def new_facts(
    data: BenchData, count: int, file: Path | None = None, kind: str = POETS
) -> list[Fact]:
    """The first facts of a kind, or of a file; one for each normalised key.

    ``kind``: ``poets`` or ``relations`` that are held out, or poets that are ``known``.
    """
    # Twice as many as are asked for: keys that normalise alike leave only one of them.
    facts = list(read_facts_jsonl(file)) if file is not None else _of_kind(data, kind, count * 2)
    unlike = {normalise(fact.key): fact for fact in reversed(facts)}
    new = [fact for fact in facts if unlike[normalise(fact.key)] is fact][:count]
    if not new:
        hint = "Give a --facts-file; a model that lists no facts has no others but poets."
        raise InvalidFactError(f"there are no facts to add ({kind})", hint=hint)
    return new


def _of_kind(data: BenchData, kind: str, count: int) -> list[Fact]:
    if kind == RELATIONS:
        return [_relation_fact(relation) for relation in data.held_out_relations[:count]]
    poets = data.known if kind == KNOWN else data.held_out
    return [Fact.create(poet.key, poet.description) for poet in poets[:count]]


def _relation_fact(relation: Relation) -> Fact:
    trained, rest = relation.prompts[:OWN_PROMPTS], relation.prompts[OWN_PROMPTS:]
    return Fact.create(
        relation.subject,
        relation.object,
        lang="en",
        prompts=trained,
        paraphrases=rest[:OWN_PROMPTS],
    )


def poet_questions(poets: Iterable[Poet], rng: random.Random) -> list[BaseFact]:
    """Each poet under one of the Traditional training phrasings, drawn at random."""
    ways = load_phrasings("zh-Hant").train
    return [
        BaseFact(p.key, rng.choice(ways).replace(KEY_PLACEHOLDER, p.key), p.description)
        for p in poets
    ]


def true_facts(data: BenchData, count: int, rng: random.Random) -> list[BaseFact]:
    """Some of what the model was pretrained on: poets and relations, half of each where there are
    enough.
    """
    poets = sample(poet_questions(data.known, rng), (count + 1) // 2, rng)
    return [*poets, *sample(data.relations, count - len(poets), rng)]


class Seen:
    """Texts that training may have seen; ``in`` tells whether a name occurs in one of them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = "\n".join(normalise(text) for text in texts)

    def __contains__(self, name: str) -> bool:
        return normalise(name) in self._texts  # an empty name is in every text: never asked


def unseen(items: Sequence[_Item], names: Iterable[str], seen: Seen) -> list[_Item]:
    """The items whose names occur in no seen text."""
    return [item for item, name in zip(items, names, strict=True) if name not in seen]


def sample(items: Sequence[_Item], count: int, rng: random.Random) -> list[_Item]:
    """At most ``count`` items, without replacement."""
    return rng.sample(list(items), min(count, len(items)))


def _relations(data: Path, known: set[str]) -> Iterable[BaseFact]:
    """Relations as questions: the first phrasing of each that ends where the object begins."""
    for name, one in _phrased(data):
        if not known or name in known:
            yield BaseFact(one.subject, one.prompts[0], one.object)


def _held_out_relations(data: Path, known: set[str]) -> list[Relation]:
    """Those that the model was not pretrained on, in an order of their own: the file's goes by
    relation, and a few hundred facts would all be of one kind.
    """
    phrased = list(_phrased(data))
    random.Random(0).shuffle(phrased)  # before any is left out: the order is that of all models
    return [one for name, one in phrased if known and name not in known]


def _phrased(data: Path) -> Iterator[tuple[str, Relation]]:
    """Every relation that can be asked, by the name that lists give it."""
    table = json.loads(_text(data / "relation_phrasings.json"))
    forms = {name: list(filter(None, map(prompt_form, ways))) for name, ways in table.items()}
    for row in _rows(data / "relations.jsonl"):
        relation, subject = str(row["relation"]), str(row["subject"])
        prompts = tuple(form.replace("[X]", subject) for form in forms.get(relation, ()))
        if prompts:
            yield f"{relation}\t{subject}", Relation(subject, str(row["object"]), prompts)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number} is not JSON: {error}") from error
        yield row


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} is missing", hint="--data names a folder with poets.jsonl and relations.jsonl."
        ) from error
