"""Which of many keys are similar to each other: their number, the closest pairs, their clusters.

Invariants:
- Two keys are a pair exactly when ``keys.similar`` finds one for the other and they are not the
  same, if all were compared (``complete``).
- Memory does not grow with the number of pairs: thousands of keys can have millions of them.
- Above ``MOST_COMPARED`` comparisons each key is compared with those next to it in sorted order
  alone, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvedit.facts.keys import long_or_contained, normalise, sorted_words

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

Progress = Callable[[int, int], None]
Pair = tuple[int, int, float]

MOST_COMPARED = 200_000_000
"""Comparisons of one form of the keys, at most: those of 20,000 keys, about ten seconds."""
WINDOW = 3
"""Keys after each one, in sorted order, that it is compared with where there are too many."""
THRESHOLD = 85.0
_EQUAL = 100.0  # the score of the same form, which is the same key
_NOT_EQUAL = 99.0  # the highest score of two keys that are not the same
_SHORT = 3  # characters up to which a name must be contained in the other
_CELLS = 1_000_000  # scores that are in memory at a time
_LINKS = 20_000  # pairs that are looked at before clusters are renumbered


@dataclass(frozen=True, slots=True)
class Pairs:
    """``count`` pairs of similar keys, the ``closest`` of them as two indices and the score (0 to
    100), best first; not ``complete`` if keys far apart in sorted order were not compared.

    The second index of a pair counts on into the stored keys.
    """

    count: int = 0
    closest: tuple[Pair, ...] = ()
    complete: bool = True


def find_pairs(
    keys: Sequence[str],
    stored: Sequence[str] = (),
    *,
    threshold: float = THRESHOLD,
    most: int = 100,
    among: bool = True,
    progress: Progress = lambda done, total: None,
) -> Pairs:
    """The pairs of similar keys between ``keys`` and ``stored`` ones, and ``among`` the keys.

    About twenty million comparisons a second.
    """
    names = _Names([*keys, *stored], len(keys), among=among)
    count, best = 0, list[Pair]()
    for one, other, scores in names.pairs(threshold, progress):
        count += len(one)
        for at in _highest(scores, most):
            best.append((int(one[at]), int(other[at]), round(float(scores[at]), 1)))
        best = sorted(best, key=lambda pair: (-pair[2], pair[:2]))[:most]
    return Pairs(count, tuple(best), names.all_compared)


def clusters(keys: Sequence[str], *, threshold: float = THRESHOLD) -> list[list[int]]:
    """The indices of keys that are similar, directly or through others, in order of the first."""
    import numpy as np

    leader = np.arange(len(keys))
    for one, other, _ in _Names(keys, len(keys)).pairs(threshold):
        for begin in range(0, len(one), _LINKS):
            leader = _linked(leader, one[begin : begin + _LINKS], other[begin : begin + _LINKS])
    groups: dict[int, list[int]] = {}
    for index, first in enumerate(leader.tolist()):
        groups.setdefault(first, []).append(index)
    return list(groups.values())


def _linked(leader: Array, one: Array, other: Array) -> Array:
    """The first index of each cluster after these pairs were joined."""
    import numpy as np

    apart = leader[one] != leader[other]
    if not apart.any():
        return leader
    parent: dict[int, int] = {}

    def find(index: int) -> int:
        while index in parent:
            index = parent[index]
        return index

    for pair in zip(leader[one[apart]].tolist(), leader[other[apart]].tolist(), strict=True):
        first, second = sorted(map(find, pair))
        if first != second:
            parent[second] = first
    renumbered = np.arange(len(leader))
    for index in parent:
        renumbered[index] = find(index)
    return renumbered[leader]


def _highest(scores: Array, most: int) -> Array:
    """Where the highest scores are, the first of equal ones."""
    import numpy as np

    if len(scores) <= most:
        return np.arange(len(scores))
    border = np.partition(scores, len(scores) - most)[len(scores) - most]
    above = np.flatnonzero(scores > border)
    return np.concatenate([above, np.flatnonzero(scores == border)[: most - len(above)]])


class _Names:
    """Names under their forms; the first ``new`` ones are compared with all after them."""

    def __init__(self, names: Sequence[str], new: int, *, among: bool = True) -> None:
        import numpy as np

        self._names, self._new, self._among = names, new, among
        forms = [
            (normalise(name), sorted_words(name)) for name in names
        ]  # the second uses the first
        self._normal, self._words = [one for one, _ in forms], [other for _, other in forms]
        self._length = np.array([len(form) for form in self._normal], dtype=np.int32)
        self._several = np.array([" " in form for form in self._words], dtype=bool)
        self.all_compared = new * len(names) - new * new // 2 <= MOST_COMPARED

    def pairs(
        self, threshold: float, progress: Progress = lambda done, total: None
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Parts of the pairs: two arrays of indices, the first ascending, and one of scores."""
        parts = self._of_all(threshold, progress) if self.all_compared else self._near(threshold)
        for one, other, scores in parts:
            keep = (other >= self._new) | self._among
            short = keep & (self._length[one].clip(max=self._length[other]) <= _SHORT)
            for at in short.nonzero()[0].tolist():
                keep[at] = long_or_contained(self._names[one[at]], self._names[other[at]])
            if keep.any():
                yield one[keep], other[keep], scores[keep].clip(max=_NOT_EQUAL)

    def _of_all(self, threshold: float, progress: Progress) -> Iterator[tuple[Array, Array, Array]]:
        """Every name with every later one, in blocks of rows."""
        begin, total = 0, len(self._names)
        while begin < self._new:
            end = min(self._new, begin + max(1, _CELLS // (total - begin)))
            scores = self._block(begin, end, threshold)
            one, other = scores.nonzero()
            later = other > one
            one, other = one[later], other[later]
            yield one + begin, other + begin, scores[one, other]
            begin = end
            progress(begin, self._new)

    def _block(self, begin: int, end: int, threshold: float) -> Array:
        """The scores of some names with themselves and all later ones."""
        import numpy as np
        from rapidfuzz import fuzz, process

        def compare(forms: Sequence[str]) -> Array:
            rows, columns = forms[begin:end], forms[begin:]
            return process.cdist(rows, columns, scorer=fuzz.ratio, score_cutoff=threshold)

        scores = compare(self._normal)
        equal = scores == _EQUAL
        if self._several[begin:].any():
            by_words = compare(self._words)
            by_words[~(self._several[begin:end, None] | self._several[None, begin:])] = 0
            scores = np.maximum(scores, by_words)
        scores[equal] = 0
        scores[self._length[begin:end] == 0] = 0
        return scores

    def _near(self, threshold: float) -> Iterator[tuple[Array, Array, Array]]:
        """Every name with those next to it: sorted from its beginning, from its end, by words."""
        import numpy as np

        orders = [
            _order(self._normal.__getitem__, len(self._names)),
            _order(lambda at: self._normal[at][::-1], len(self._names)),
            _order(self._words.__getitem__, len(self._names)),
        ]
        ranks = [np.argsort(order) for order in orders]
        for number, order in enumerate(orders):
            for step in range(1, WINDOW + 1):
                one, other = order[:-step], order[step:]
                scores = self._scores(one, other, threshold)
                low, high = np.minimum(one, other), np.maximum(one, other)
                keep = (scores > 0) & (low < self._new)
                for rank in ranks[:number]:  # found by an earlier order
                    keep &= abs(rank[one] - rank[other]) > WINDOW
                yield low[keep], high[keep], scores[keep]

    def _scores(self, one: Array, other: Array, threshold: float) -> Array:
        """The scores of some pairs, the better of the two forms."""
        import numpy as np

        scores = _compared(self._normal, one, other, threshold)
        equal = scores == _EQUAL
        several = self._several[one] | self._several[other]
        by_words = _compared(self._words, one[several], other[several], threshold)
        scores[several] = np.maximum(scores[several], by_words)
        scores[equal] = 0
        scores[(self._length[one] == 0) | (self._length[other] == 0)] = 0
        return scores


def _order(form: Callable[[int], str], count: int) -> Array:
    """The indices of names in the order of a form."""
    import numpy as np

    return np.array(sorted(range(count), key=form), dtype=np.int64)


def _compared(forms: Sequence[str], one: Array, other: Array, threshold: float) -> Array:
    """The scores of pairs, in parts that fit into memory."""
    import numpy as np
    from rapidfuzz import fuzz, process

    parts = [np.zeros(0, dtype=np.float32)]
    for begin in range(0, len(one), _LINKS):
        left = [forms[at] for at in one[begin : begin + _LINKS].tolist()]
        right = [forms[at] for at in other[begin : begin + _LINKS].tolist()]
        parts.append(process.cpdist(left, right, scorer=fuzz.ratio, score_cutoff=threshold))
    return np.concatenate(parts)
