"""How many facts are trained together: determined by running out of memory and halving.

``accelerate.utils.find_executable_batch_size`` calls one function again with a smaller number; here
each attempt is an edit with its own journal entry, and the rest of the facts needs its turn too.

Invariants:
- Once memory ran out with a number of facts, no larger group than half of them is tried.
- What cannot fit by estimate is not tried: Linux kills a process that takes more than there is.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import release_memory

from kvedit.config import GroupConfig
from kvedit.errors import OutOfMemoryError
from kvedit.facts.fact import Fact
from kvedit.training import memory
from kvedit.training.engine import Engine

_T = TypeVar("_T")


class GroupSize:
    """The largest group that fits; ``largest`` is None until memory ran out."""

    def __init__(self, engine: Engine, group: GroupConfig, warn: Callable[[str], None]) -> None:
        self._engine, self._group, self._warn = engine, group, warn
        self.largest: int | None = None

    def parts(self, items: Sequence[_T], most: int | None = None) -> list[Sequence[_T]]:
        """The items in order, in parts of at most ``largest`` and ``most``."""
        bounds = [bound for bound in (self.largest, most) if bound is not None]
        size = min(bounds, default=max(1, len(items)))
        return [items[at : at + size] for at in range(0, len(items), size)]

    def fits(self, facts: Sequence[Fact]) -> bool:
        """Whether they may be trained together, as far as is known."""
        return len(self.parts(facts)) == 1 and not self._refusal(facts)

    def attempt(self, facts: Sequence[Fact], train: Callable[[], _T]) -> _T | None:
        """The result of ``train``; None, with ``largest`` halved, if these do not fit together.

        Raises OutOfMemoryError for a single fact.
        """
        if not (reason := self._refusal(facts)):
            try:
                return train()
            except OutOfMemoryError as error:
                if len(facts) == 1:
                    raise
                reason = error.message
        # Outside ``except``: only now are the error and the frames that hold its tensors gone.
        release_memory()
        self.largest = (len(facts) + 1) // 2
        both = f"{len(facts)} facts do not fit together, going on with {self.largest} at most"
        self._warn(f"{reason}; {both}")
        return None

    def _refusal(self, facts: Sequence[Fact]) -> str:
        """Why the estimate says that a group cannot fit; "" if it may."""
        if len(facts) == 1:
            return ""
        lengths = [len(example.ids) for fact in facts for example in self._engine.examples(fact)]
        length = max(memory.TEXT_TOKENS, sum(lengths) // len(lengths))
        needed = self._engine.needed(self._group, len(facts), length) / 1024**3
        free = self._engine.worker.on_main(memory.free) / 1024**3  # all processes decide alike
        too_large = f"training them takes about {needed:.1f} GiB and {free:.1f} are free"
        return too_large if needed > free else ""
