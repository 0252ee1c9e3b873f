"""Without training: the facts' texts in the prompt, all of them or those that the question names.

What a user would pick first.  A fact's text is its first prompt with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from rapidfuzz import fuzz

from kvedit.facts.keys import normalise
from kvedit.model.prompts import Example
from tests.bench.field.asked import Asked
from tests.bench.field.method import PROMPT, Method
from tests.bench.field.records import Record

ANSWER_TOKENS = 64  # of the context that are left for the question's answer


def text_of(record: Record) -> str:
    """A fact as it is written into a prompt."""
    return f"{record.prompts[0]} {record.target}"


@dataclass(kw_only=True)
class InContext(Method):
    """All facts, the newest first to stay where the context is full."""

    instruction: str = "Answer briefly, by these facts where they apply:"
    changes: ClassVar[str] = PROMPT
    _records: list[Record] = field(default_factory=list, init=False)
    _left_out: int = field(default=0, init=False)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """They come behind those that were there."""
        self._records += records

        def rewrite(prompt: str) -> str:
            chosen = self.chosen(prompt)
            while chosen and self._length(asked, chosen, prompt) > asked.renderer.context:
                chosen = chosen[1:]
                self._left_out = max(self._left_out, len(self._records) - len(chosen))
            return self._written(chosen, prompt)

        return replace(asked, rewrite=rewrite)

    def chosen(self, prompt: str) -> list[Record]:
        """The records that the question is asked with."""
        return list(self._records)

    def passes(self, example: Example) -> float:
        """None."""
        return 0

    def notes(self) -> dict[str, Any]:
        """How many facts did not fit into the context."""
        return {"facts that did not fit": self._left_out}

    def _written(self, chosen: Sequence[Record], prompt: str) -> str:
        if not chosen:
            return prompt
        return "\n".join([self.instruction, *map(text_of, chosen), "", prompt])

    def _length(self, asked: Asked, chosen: Sequence[Record], prompt: str) -> int:
        return len(asked.renderer.prefix(self._written(chosen, prompt))) + ANSWER_TOKENS


@dataclass(kw_only=True)
class Retrieval(InContext):
    """Those facts alone whose key the question has in it, or nearly; the question itself where
    there is none.
    """

    least: float = 90.0  # of rapidfuzz's partial ratio
    most: int = 3

    def chosen(self, prompt: str) -> list[Record]:
        """The best of them, the best one last."""
        asked = normalise(prompt)
        scored = [
            (fuzz.partial_ratio(normalise(record.key), asked), at)
            for at, record in enumerate(self._records)
            if len(normalise(record.key)) <= len(asked)
        ]
        best = sorted(pair for pair in scored if pair[0] >= self.least)[-self.most :]
        return [self._records[at] for _, at in best]
