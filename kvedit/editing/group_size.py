"""How many facts there is memory for together.

Invariants:
- Once memory ran out with a number of facts, so many are not put together again.
- What cannot fit is not tried: where no limit is set, Linux ends a process that takes more memory
  than there is, and nothing could be halved any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from kvedit.config import GroupConfig
from kvedit.errors import OutOfMemoryError
from kvedit.facts.fact import Fact
from kvedit.training import memory
from kvedit.training.engine import Engine

_T = TypeVar("_T")


class Room:
    """What was found out so far; ``largest`` is None until memory ran out."""

    def __init__(self, engine: Engine, group: GroupConfig, warn: Callable[[str], None]) -> None:
        self._engine, self._group, self._warn = engine, group, warn
        self.largest: int | None = None

    def parts(self, items: Sequence[_T], most: int | None = None) -> list[Sequence[_T]]:
        """The items in order, in parts that fit as far as is known, each of at most ``most``."""
        bounds = [bound for bound in (self.largest, most) if bound is not None]
        size = min(bounds, default=len(items)) or 1
        return [items[at : at + size] for at in range(0, len(items), size)]

    def fits(self, facts: Sequence[Fact]) -> bool:
        """Whether there is room for all of them, as far as is known."""
        return len(self.parts(facts)) == 1 and not self._too_much(facts)

    def attempt(self, facts: Sequence[Fact], train: Callable[[], _T]) -> _T | None:
        """What ``train`` finds; None if there is no memory for so many facts, foreseen or found
        out: half of them may fit.

        Raises OutOfMemoryError for a single fact.
        """
        if not (why := self._too_much(facts)):
            try:
                return train()
            except OutOfMemoryError as error:
                if len(facts) == 1:
                    raise
                why = error.message
        # Only here is the error gone, and with it the frames that hold what the attempt had made.
        memory.give_back()
        self.largest = max(1, (len(facts) + 1) // 2)
        self._warn(
            f"{why}; {len(facts)} facts do not fit together, going on with {self.largest} at most"
        )
        return None

    def _too_much(self, facts: Sequence[Fact]) -> str:
        """Why a group cannot fit, as far as that can be known before; "" if it may."""
        if len(facts) == 1:
            return ""
        lengths = [len(example.ids) for fact in facts for example in self._engine.examples(fact)]
        length = max(memory.TEXT_TOKENS, sum(lengths) // len(lengths))
        needed = self._engine.needed(self._group, len(facts), length)
        if needed <= (free := memory.free()):
            return ""
        gib = 1024**3
        return f"teaching them takes about {needed / gib:.1f} GiB and {free / gib:.1f} are free"
