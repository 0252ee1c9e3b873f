"""The part of a knowledge base that asks: answers, recall, explanations, differences.

Invariants:
- Nothing here changes the model for good, or the store.
- Answers are greedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvedit.asking import diff, explain
from kvedit.asking.diff import RevisionDiff
from kvedit.asking.explain import Explanation
from kvedit.asking.recall import Recalled, Recaller, Source
from kvedit.events import Warning_
from kvedit.model import generation
from kvedit.revisions.session import Session

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said at a revision, and the texts it stood on; ``cut``: it would have gone on.
    The other parts are those of ``Recalled``.
    """

    text: str
    revision: int
    cut: bool = False
    sources: tuple[Source, ...] = ()
    recited: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


class Questions:
    """Questions to a model that is kept at the head of a store.

    ``recall`` brings the texts of the facts that a question names into the conversation: True for
    the source that the setting ``[recall] source`` names, or ``"model"``, ``"store"``.  A question
    that names no fact, or is one of a fact's own phrasings, is answered as without it.
    """

    def __init__(self, session: Session) -> None:
        self.store, self.engine, self._session = session.store, session.engine, session
        self._recaller = Recaller(session)

    def ask(
        self, prompt: str, *, at: int | None = None, max_new_tokens: int = 256,
        recall: bool | str = False,
    ) -> str:  # fmt: skip
        """The model's greedy answer at the head, or at another revision."""
        messages = [{"role": "user", "content": prompt}]
        return self.answer(messages, at=at, max_new_tokens=max_new_tokens, recall=recall).text

    def ask_base(self, prompt: str, *, max_new_tokens: int = 256) -> str:
        """The base model's greedy answer."""
        return self.ask(prompt, at=0, max_new_tokens=max_new_tokens)

    def chat(
        self, messages: Messages, *, max_new_tokens: int = 256, recall: bool | str = False
    ) -> str:
        """The model's next turn in a conversation of ``role`` and ``content``."""
        return self.answer(messages, max_new_tokens=max_new_tokens, recall=recall).text

    def answer(
        self, messages: Messages, *, at: int | None = None, max_new_tokens: int = 256,
        recall: bool | str = False,
    ) -> Answer:  # fmt: skip
        """The model's next turn in a conversation, at the head or at another revision, with the
        sources that it stood on.  Raises TextTooLongError if the context has no place for one.
        """
        return self._session.at(at, lambda: self._answer(messages, max_new_tokens, recall))

    def _answer(self, messages: Messages, limit: int, recall: bool | str) -> Answer:
        found = self._recalled(messages, recall)
        prefix = self.engine.renderer.question(found.messages)
        renderer = self.engine.renderer
        tokens = self.engine.proceed([prefix], end=renderer.stops, limit=limit)[0]
        return Answer(
            text=renderer.answer_text(tokens), revision=self._session.revision,
            cut=self._note_cut(len(tokens), limit), sources=found.sources,
            recited=found.recited, left_out=found.left_out,
        )  # fmt: skip

    def _note_cut(self, tokens: int, limit: int) -> bool:
        """Say so where an answer of so many tokens may not have ended; returns whether it may."""
        if tokens >= limit:
            text = f"the answer at revision {self._session.revision} was cut at {limit} tokens"
            self._session.emit(Warning_(text=text, code="cut"))
        return tokens >= limit

    def stream(
        self, messages: Messages, *, limit: int = 256, recall: bool | str = False
    ) -> Iterator[str]:
        """``chat``, in pieces as they are generated."""
        renderer, model = self.engine.renderer, self.engine.base.model
        prefix = renderer.question(self._recalled(messages, recall).messages)
        tokens = generation.stream(model, prefix, end=renderer.stops, limit=limit)
        return generation.pieces(self._counted(tokens, limit), renderer.answer_text)

    def _counted(self, tokens: Iterator[int], limit: int) -> Iterator[int]:
        """The tokens; says at their end whether that is the answer's."""
        seen = 0
        for token in tokens:
            seen += 1
            yield token
        self._note_cut(seen, limit)

    def recall(self, messages: Messages, *, source: bool | str = True) -> Recalled:
        """A conversation with the texts of the facts that it names, to be answered by ``chat``."""
        return self._recalled(messages, source)

    def _recalled(self, messages: Messages, recall: bool | str) -> Recalled:
        if not recall:
            return Recalled(messages=tuple(messages))
        return self._recaller.recall(messages, None if recall is True else str(recall))

    def explain(
        self, question: str, *, at: int | None = None, max_new_tokens: int = 96, limit: int = 5
    ) -> Explanation:
        """Which facts an answer may come from, and the edit at which it changed, found by asking
        about log2 of the revisions there are; ``limit`` is the number of facts.
        """
        return explain.explain(
            self._session, question, at=at, max_new_tokens=max_new_tokens, limit=limit
        )

    def diff(self, before: int, after: int, *, ask: int = 32) -> RevisionDiff:
        """Which facts, and which answers about them, differ between two revisions; at most ``ask``
        facts are asked, those that changed first.
        """
        return diff.diff(self._session, before, after, ask=ask)
