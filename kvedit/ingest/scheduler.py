"""Which facts are taught together, and how many at a time.

Invariants:
- Every fact is handed out once, and again only if it was put back.
- Facts with close keys come in one group where the size allows: apart, the second would be taught
  against the first, and conflicts happen between keys that mean nearly the same.
- A fact never waits for one that stands far behind it: apart from that, the order is the input's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from kvedit.facts.fact import Fact
from kvedit.facts.keys import similar_pairs

SMALLEST = 4
TOGETHER = 2
"""In so many groups a fact is tried before it is tried by itself."""


class Scheduler:
    """Hands out facts in groups of ``size``, or of a size that follows success (None).

    The larger a group, the less a fact costs and the less it harms: each group is one more change
    that moves what is not looked at.  So such groups begin with ``largest`` and fall by half when
    one was refused.
    """

    def __init__(self, facts: Sequence[Fact], size: int | None, *, largest: int = 1024) -> None:
        self._follows = size is None
        self._size = largest if size is None else size
        self._largest = largest
        self._last = 0
        self._tried: Counter[str] = Counter()
        self._alone: deque[Fact] = deque()
        self._waiting = deque(_clusters(facts) if self._size > 1 else [[fact] for fact in facts])

    def take(self) -> tuple[Fact, ...]:
        """The next group; empty when all facts were handed out."""
        group: list[Fact] = []
        while self._waiting and len(group) + len(self._waiting[0]) <= self._size:
            group += self._waiting.popleft()
        if not group and self._waiting:  # more close keys than a group has places
            group, rest = self._waiting[0][: self._size], self._waiting[0][self._size :]
            self._waiting[0] = rest
        if not group and self._alone:
            group.append(self._alone.popleft())
        self._tried.update(fact.key for fact in group)
        self._last = len(group)
        return tuple(group)

    def put_back(self, facts: Sequence[Fact]) -> None:
        """Facts that a group did not learn: for the next one, or by themselves at the end."""
        few = len(facts) > 1 or bool(self._waiting)
        again = [[fact] for fact in facts if few and self._tried[fact.key] < TOGETHER]
        self._alone.extend(fact for fact in facts if [fact] not in again)
        self._waiting.extendleft(reversed(again))

    def learn(self, *, refused: bool) -> None:
        """Let the size follow: half as many after a refusal, then up to twice as many again."""
        if self._follows:
            size = self._last // 2 if refused else self._size * 2
            self._size = min(self._largest, max(SMALLEST, size))

    def limit(self, size: int | None) -> None:
        """From now on no group is larger, because memory ran out with a larger one."""
        if size is not None:
            self._largest = min(self._largest, size)
            self._size = min(self._size, size)


def _clusters(facts: Sequence[Fact]) -> list[list[Fact]]:
    """Facts whose keys are close, directly or by way of others, each at its first one's place."""
    keys = [fact.key for fact in facts]
    leader = list(range(len(facts)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for one, other, _ in similar_pairs(keys, keys):
        first, second = sorted((find(one), find(other)))
        leader[second] = first
    clusters: dict[int, list[Fact]] = {}
    for index, fact in enumerate(facts):
        clusters.setdefault(find(index), []).append(fact)
    return list(clusters.values())
