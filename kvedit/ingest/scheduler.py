"""Which facts are trained together, and how many at a time.

Invariants:
- Every fact is scheduled once, and again only if it was put back.
- Facts with similar keys come in one group where the size allows: trained apart, the second would
  be trained against the first.
- Apart from that the order is the input's.
"""

from collections import Counter, deque
from collections.abc import Sequence

from kvedit.facts.fact import Fact
from kvedit.facts.similarity import clusters

MIN_GROUP = 4
GROUP_TRIES = 2  # a fact is tried in so many groups before it is tried by itself


class Scheduler:
    """Schedules facts in groups of ``size``, or of a size that follows success (None).

    The larger a group, the less a fact costs and the less it harms: each group is one more change
    of weights that no probe looks at.  So groups start at ``largest`` and are halved when one was
    rejected.
    """

    def __init__(self, facts: Sequence[Fact], size: int | None, *, largest: int = 1024) -> None:
        self._adaptive = size is None
        self._size = largest if size is None else size
        self._largest = largest
        self._last = 0
        self._tried: Counter[str] = Counter()
        self._alone: deque[Fact] = deque()
        self._waiting = deque(_clusters(facts) if self._size > 1 else [[fact] for fact in facts])

    def next_group(self) -> tuple[Fact, ...]:
        """The next group; empty when all facts were scheduled."""
        group: list[Fact] = []
        while self._waiting and len(group) + len(self._waiting[0]) <= self._size:
            group += self._waiting.popleft()
        if not group and self._waiting:  # more similar keys than fit into a group
            group, rest = self._waiting[0][: self._size], self._waiting[0][self._size :]
            self._waiting[0] = rest
        if not group and self._alone:
            group.append(self._alone.popleft())
        self._tried.update(fact.key for fact in group)
        self._last = len(group)
        return tuple(group)

    def put_back(self, facts: Sequence[Fact]) -> None:
        """Facts that a group did not learn: for the next one, or by themselves at the end."""
        has_company = len(facts) > 1 or bool(self._waiting)
        retry = [[f] for f in facts if has_company and self._tried[f.key] < GROUP_TRIES]
        self._alone.extend(fact for fact in facts if [fact] not in retry)
        self._waiting.extendleft(reversed(retry))

    def adapt(self, *, rejected: bool) -> None:
        """Adapt the size: half as many facts after a rejection, else twice as many."""
        if self._adaptive:
            size = self._last // 2 if rejected else self._size * 2
            self._size = min(self._largest, max(MIN_GROUP, size))

    def limit(self, size: int | None) -> None:
        """Never schedule a larger group again, because memory ran out with one."""
        if size is not None:
            self._largest = min(self._largest, size)
            self._size = min(self._size, size)


def _clusters(facts: Sequence[Fact]) -> list[list[Fact]]:
    """Facts whose keys are similar, directly or through others, at the place of the first one."""
    return [[facts[at] for at in group] for group in clusters([fact.key for fact in facts])]
