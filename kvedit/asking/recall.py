"""Recite, then answer: the texts of the facts that a question names go before the question.

A text comes from the model, which is asked for the fact as it was trained ("What is KEY?"), or from
the store.  The model's own recitation says what the weights hold, and works for an exported model
too (docs/guides/export.md).

Invariants:
- Facts and weights are those of one revision.
- A question that names no fact stays as it is, so that the answer is the same to the bit; so does
  one of a fact's own phrasings, which the fact was trained or probed to answer by its text.
- What is put before a question never drives it out of the model's context: texts that do not fit
  are left out, and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvedit.asking.mentions import Mention, NameIndex
from kvedit.asking.nearness import nearest
from kvedit.errors import UsageError
from kvedit.events import JsonDict
from kvedit.facts.fact import Fact
from kvedit.facts.keys import normalise

if TYPE_CHECKING:
    from kvedit.revisions.session import Session

Messages = Sequence[Mapping[str, str]]
SOURCES = ("model", "store")
RECITATION_TOKENS = 512  # at which the model's recitation of a fact is cut
ANSWER_TOKENS = 64  # of the context that stay free for an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A text that an answer stood on.

    ``name`` is the key or alias that was found, ``score`` how alike the question spells it (100:
    the same normal form), ``origin`` is ``model`` or ``store``; ``exact`` says whether the text is
    the store's, word for word.
    """

    key: str
    name: str
    score: float
    origin: str
    text: str
    exact: bool

    def to_json(self) -> JsonDict:
        """A JSON document of all fields."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """A conversation with the texts of the facts that it names.

    ``recited`` are the keys of facts whose own phrasing the last question is: nothing was put
    before it.  ``left_out`` are those whose texts did not fit into the model's context.
    """

    messages: tuple[Mapping[str, str], ...]
    sources: tuple[Source, ...] = ()
    recited: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Facts:
    """The facts of a revision, found by their names, and what the model recited of them."""

    revision: int
    by_key: dict[str, Fact]
    names: NameIndex
    recited: dict[str, str] = field(default_factory=dict)


def with_texts(message: Mapping[str, str], texts: Sequence[str]) -> list[Mapping[str, str]]:
    """A user's message with texts that it can be answered from."""
    if not texts:
        return [message]
    return [{**message, "content": "\n\n".join([*texts, message["content"]])}]


class Recaller:
    """Finds the facts that a conversation names, and puts their texts into it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._facts: _Facts | None = None

    def recall(self, messages: Messages, origin: str | None = None) -> Recalled:
        """The conversation with the texts of the facts that the user's messages name, each once,
        before the message that names it first; by the weights in memory.

        ``origin`` is ``model`` or ``store``, by default the setting of the store.  Raises
        UsageError for another one.
        """
        settings = self._session.config.recall
        origin = origin or settings.source
        if origin not in SOURCES:
            hint = f"Use one of {', '.join(SOURCES)}."
            raise UsageError(f"there is no source of recalled texts called {origin!r}", hint=hint)
        asked = [self._asked_for(message, settings.max_facts) for message in messages]
        named = [[m for m in turn if not own] for turn, own in asked]
        known: set[str] = set()
        for turn in named:
            turn[:] = [mention for mention in turn if mention.key not in known]
            known.update(mention.key for mention in turn)
        found = self._sources([m for turn in named for m in turn], origin)
        recalled = self._fitting(messages, [tuple(found[m.key] for m in turn) for turn in named])
        recited = [m.key for turn, own in asked[-1:] if own for m in turn]
        return replace(recalled, recited=tuple(recited))

    def _asked_for(self, message: Mapping[str, str], most: int) -> tuple[list[Mention], bool]:
        """The facts that a user's message names; and whether it is a phrasing of one's own."""
        if message["role"] != "user":
            return [], False
        named = self.mentioned(message["content"], most)
        own = [mention for mention in named if self._is_own(mention.key, message["content"])]
        return own or named, bool(own)

    def _is_own(self, key: str, text: str) -> bool:
        engine, fact = self._session.engine, self._facts_now().by_key[key]
        phrasings = [*engine.examples(fact), *engine.paraphrases(fact)]
        return normalise(text) in {normalise(example.prompt) for example in phrasings}

    def mentioned(self, text: str, most: int) -> list[Mention]:
        """The facts that a text names at the revision in memory, at most ``most``."""
        facts = self._facts_now()

        def prefer(keys: list[str]) -> list[str]:
            return [fact.key for fact, _ in nearest(text, [facts.by_key[key] for key in keys])]

        return facts.names.mentioned(text, most, prefer)

    def _facts_now(self) -> _Facts:
        """The facts at the revision of the weights in memory; kept until these are another's."""
        revision, store = self._session.revision, self._session.store
        if self._facts is None or self._facts.revision != revision:
            held = list(store.held_at(revision).values())
            names = [(name, fact.key) for fact in held for name in (fact.key, *fact.aliases)]
            self._facts = _Facts(revision, {fact.key: fact for fact in held}, NameIndex(names))
        return self._facts

    def _sources(self, mentions: Sequence[Mention], origin: str) -> dict[str, Source]:
        """The texts of facts, by key."""
        held = self._facts_now().by_key
        stored = {mention.key: held[mention.key].description for mention in mentions}
        texts = self._recited(list(stored)) if origin == "model" else stored
        return {
            m.key: Source(
                key=m.key, name=m.name, score=m.score, origin=origin, text=texts[m.key],
                exact=texts[m.key] == stored[m.key],
            )
            for m in mentions
        }  # fmt: skip

    def _recited(self, keys: Sequence[str]) -> dict[str, str]:
        """What the model answers when it is asked for facts by their first training prompt; kept,
        since the same weights say the same.
        """
        facts, engine = self._facts_now(), self._session.engine
        new = [key for key in keys if key not in facts.recited]
        prompts = [engine.examples(facts.by_key[key])[0].prompt for key in new]
        texts = engine.generate(prompts, limit=RECITATION_TOKENS) if new else []
        facts.recited.update(zip(new, texts, strict=True))
        return {key: facts.recited[key] for key in keys}

    def _fitting(self, messages: Messages, turns: list[tuple[Source, ...]]) -> Recalled:
        """The conversation with as many of the texts as fit: the earliest turns' go first, and of
        a turn the last.
        """
        left_out: list[str] = []
        renderer = self._session.engine.renderer
        while True:
            brought = tuple(
                turn
                for message, sources in zip(messages, turns, strict=True)
                for turn in with_texts(message, [source.text for source in sources])
            )
            sources = tuple(source for turn in turns for source in turn)
            room = renderer.context - ANSWER_TOKENS
            if not sources or len(renderer.dialogue(brought)) <= room:
                return Recalled(messages=brought, sources=sources, left_out=tuple(left_out))
            at = next(number for number, turn in enumerate(turns) if turn)
            left_out.append(turns[at][-1].key)
            turns[at] = turns[at][:-1]
