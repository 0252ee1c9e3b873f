"""Which facts a question names: keys and aliases found in a text.

A name is found where its normal form stands (``facts.keys.normalise``), then where something is
spelt nearly like it (rapidfuzz).  Longer names come first, and no name counts inside another.

Invariants:
- Where words have spaces between them, a name is found as whole words only; in scripts without
  spaces anywhere.
- A single ideograph, and a word that any question may contain ("can", "什么"), only count in
  quotation marks or alone; a word with capitals ("IT", "WHO") where it is written like that.
- A near spelling has as many words, the same numbers, and the same words of up to four letters:
  "Henry IV" and "Henry V", "Anna" and "Anne" are not the same.  A single word may be
  in the plural; to differ otherwise it must be long, and a capital stays one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from kvedit.facts.keys import normalise

Prefer = Callable[[list[str]], list[str]]
EXACT = 100.0
LONGER = 2  # characters by which a near spelling may be longer or shorter than the name
SHORT_WORD = 4  # letters of a word that must be spelt rightly
SHORTEST_NEAR = 4  # characters of a name that may be spelt otherwise
LONG_WORD = 8  # letters of a name of one word that may be spelt otherwise, but for a plural
WORD_THRESHOLD = 92.0  # rapidfuzz's ratio of a name of one word
WORDS_THRESHOLD, EACH_WORD_THRESHOLD = 90.0, 82.0  # of one of several, and of each of its words
IDEOGRAPHS_THRESHOLD = 85.0
NEAR_CANDIDATES = 50
LONGEST_NEAR = 200  # words of a question in which near spellings are looked for
UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_JOINED = frozenset("#%&*@")  # signs that are part of a name, as in ``facts.keys``
_MARKUP = str.maketrans(dict.fromkeys("`<>|=^~", " "))
_QUOTES = frozenset("\"'“”‘’«»「」『』《》〈〉")
_DISAMBIGUATION = re.compile(r"\s*(?:[(（\[【][^()（）]*[)）\]】]|,[^,]*\d[^,]*)\s*$")
_ROMAN = re.compile(r"[ivxlcdm]+")
_EVERYDAY_WORDS = """
a about all also am an and any are as at be been but by can could describe description did do does
explain for from give had has have he her here him his how i if in is it its know like many may me
mean might more most much must my name new no not of on one only or our please say she should so
some tell than that the their them then there these they this those to us was we were what when
where which who whom whose why will with would yes you your
什么 是 的 了 吗 呢 介绍 请问 关于 知道 怎么 怎样 如何 哪里 哪个 谁 为什么 多少 几 一下
我 你 他 她 它
"""
_EVERYDAY = frozenset(_EVERYDAY_WORDS.split())  # normal forms


class Mention(NamedTuple):
    """A fact that a question names: its key, the name found (key or alias, or what stands in it
    before a bracket), and how alike the spelling is (100: the same normal form).
    """

    key: str
    name: str
    score: float = EXACT


class _Unit(NamedTuple):
    """A word, or one character of a script without spaces: where it stands in the text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Span:
    """Units ``first`` to ``last`` (left out) of a question that name some facts."""

    first: int
    last: int
    size: int
    mentions: tuple[Mention, ...]


class NameIndex:
    """The names of many facts; ``names`` are pairs of a name and the key of its fact."""

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        self._names: dict[str, list[tuple[str, str]]] = {}
        pairs = list(names)
        for name, key in pairs:
            self._names.setdefault(normalise(name), []).append((name, key))
        complete = set(self._names)
        for name, key in pairs:
            short = _DISAMBIGUATION.sub("", name)
            if (form := normalise(short)) and form not in complete:
                self._names.setdefault(form, []).append((short, key))

    def mentioned(self, text: str, limit: int = 3, prefer: Prefer = list) -> list[Mention]:
        """The facts that a text names, the longest name first, each once; at most ``limit``.

        ``prefer`` puts the keys of facts that go by the same name in order; it may leave some out.
        """
        question = _Question(text)
        chosen = _apart(self._exact(question))
        covered = {at for span in chosen for at in range(span.first, span.last)}
        chosen += _apart(self._near(question, covered))
        unique: dict[str, Mention] = {}
        for span in chosen:
            by_key = {mention.key: mention for mention in span.mentions}
            order = prefer(list(by_key)) if len(by_key) > 1 else []
            for key in (*order, *by_key):
                unique.setdefault(key, by_key[key])
        return list(unique.values())[:limit]

    def _exact(self, question: _Question) -> Iterator[_Span]:
        for first, last, form in question.spans(self._longest, starts=self._starts):
            found = self._names.get(form)
            if found and question.is_name(form, first, last, found):
                mentions = tuple(Mention(key, name) for name, key in found)
                yield _Span(first, last, len(form), mentions)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._names), default=0)

    @cached_property
    def _starts(self) -> frozenset[str]:
        return frozenset(form[:1] for form in self._names)

    @cached_property
    def _forms(self) -> list[str]:
        """The normal forms of names that are long enough to be spelt otherwise."""
        return [form for form in self._names if len(form) >= SHORTEST_NEAR]

    def _near(self, question: _Question, covered: set[int]) -> Iterator[_Span]:
        from rapidfuzz import fuzz, process

        if len(question.units) > LONGEST_NEAR:
            return
        for first, last in _runs(len(question.units), covered):
            text = normalise(question.text_of(first, last))
            forms = self._forms
            hits = process.extract(
                text, forms, scorer=fuzz.partial_ratio, score_cutoff=75, limit=NEAR_CANDIDATES
            )
            for form, _, _ in hits:
                yield from self._nearest(question, first, last, form)

    def _nearest(self, question: _Question, first: int, last: int, form: str) -> Iterator[_Span]:
        """Where in a run of units something is spelt most nearly like a name."""
        name, _ = self._names[form][0]
        scored = (
            (_likeness(name, form, question.text_of(a, b), spelt), a, b)
            for a, b, spelt in question.spans(len(form) + LONGER, first, last)
            if len(spelt) >= len(form) - LONGER
        )
        score, a, b = max(scored, default=(0.0, 0, 0))
        if score:
            mentions = tuple(Mention(k, n, round(score, 1)) for n, k in self._names[form])
            yield _Span(a, b, len(form), mentions)


class _Question:
    """A text cut into units."""

    def __init__(self, text: str) -> None:
        self.text = unicodedata.normalize("NFKC", text).translate(_MARKUP)
        self.units = _units(self.text)

    def text_of(self, first: int, last: int) -> str:
        """The text of some units, with what stands between them."""
        return self.text[self.units[first].start : self.units[last - 1].end]

    def spans(
        self, longest: int, first: int = 0, last: int | None = None,
        starts: frozenset[str] | None = None,
    ) -> Iterator[tuple[int, int, str]]:  # fmt: skip
        """Every run of units whose normal form has up to ``longest`` characters, with that form;
        only those that begin with one of ``starts``, if given: of a long text few do.
        """
        end = len(self.units) if last is None else last
        for a in range(first, end):
            # Two units as well: Traditional characters are converted by the word they stand in.
            begins = {normalise(self.text_of(a, b))[:1] for b in (a + 1, min(a + 2, end))}
            if starts is not None and starts.isdisjoint(begins):
                continue
            for b in range(a + 1, end + 1):
                form = normalise(self.text_of(a, b))
                if len(form) > longest:
                    break
                yield a, b, form

    def is_name(self, form: str, first: int, last: int, found: Sequence[tuple[str, str]]) -> bool:
        """Whether what is written there is meant as a name: an everyday word mostly is not."""
        ideograph = len(form) == 1 and UNSPACED.match(form)
        if not ideograph and form not in _EVERYDAY:
            return True
        if (first, last) == (0, len(self.units)) or self._quoted(first, last):
            return True
        written = self.text_of(first, last)
        if written == written.lower() or all(name != written for name, _ in found):
            return False
        return first > 0 or (len(written) > 1 and written.isupper())

    def _quoted(self, first: int, last: int) -> bool:
        before = self.text[: self.units[first].start][-1:]
        after = self.text[self.units[last - 1].end :][:1]
        return before in _QUOTES and after in _QUOTES and bool(before and after)


def _units(text: str) -> list[_Unit]:
    """The words of a text, and each character of a script without spaces."""
    units: list[_Unit] = []
    word = False  # whether the last unit is a word that goes on
    for at, char in enumerate(text):
        unspaced = bool(UNSPACED.match(char))
        part = not unspaced and _is_part_of_word(text, at)
        if part and word:
            units[-1] = _Unit(units[-1].start, at + 1)
        elif part or unspaced:
            units.append(_Unit(at, at + 1))
        word = part
    return units


def _is_part_of_word(text: str, at: int) -> bool:
    char = text[at]
    if char == ".":
        return text[at - 1 : at].isdigit() and text[at + 1 : at + 2].isdigit()
    return char.isalnum() or char in _JOINED or unicodedata.category(char)[0] in "SM"


def _apart(spans: Iterable[_Span]) -> list[_Span]:
    """The longest spans, none of which overlaps another; of the same length the nearest."""
    taken: set[int] = set()
    chosen = []
    order = sorted(spans, key=lambda s: (-s.mentions[0].score, -s.size, s.first))
    for span in order:
        if taken.isdisjoint(range(span.first, span.last)):
            chosen.append(span)
            taken.update(range(span.first, span.last))
    return sorted(chosen, key=lambda s: (-s.size, s.first))


def _runs(count: int, covered: set[int]) -> Iterator[tuple[int, int]]:
    """Runs of units that no name was found in."""
    start = 0
    for at in range(count + 1):
        if at == count or at in covered:
            if at > start:
                yield start, at
            start = at + 1


@lru_cache(maxsize=8192)
def _words(text: str) -> tuple[str, ...]:
    return tuple(text[unit.start : unit.end] for unit in _units(text))


def _likeness(name: str, form: str, written: str, spelt: str) -> float:
    """How alike a name and something written are, 0 to 100; 0 where they are not the same name.

    ``form`` and ``spelt`` are their normal forms.
    """
    from rapidfuzz import fuzz

    if re.findall(r"\d+", form) != re.findall(r"\d+", spelt):
        return 0.0
    score = fuzz.ratio(form, spelt)
    if UNSPACED.search(form):
        ends = form[:1] == spelt[:1] and form[-1:] == spelt[-1:]
        return score if ends and score >= IDEOGRAPHS_THRESHOLD else 0.0
    words, others = _words(unicodedata.normalize("NFKC", name)), _words(written)
    if len(words) != len(others):
        return 0.0
    if len(words) == 1:
        return score if _same_single_word(words[0], others[0], score) else 0.0
    pairs = zip(map(normalise, words), map(normalise, others), strict=True)
    alike = score >= WORDS_THRESHOLD and all(_same_word(*pair) for pair in pairs)
    return score if alike else 0.0


def _same_single_word(word: str, other: str, score: float) -> bool:
    """Whether a name of one word is meant: in the plural, or with a letter missing or too many."""
    if _is_plural(normalise(word), normalise(other)):
        return True
    capital = word[0].isupper() == other[0].isupper()
    return capital and len(word) >= LONG_WORD and score >= WORD_THRESHOLD


def _same_word(word: str, other: str) -> bool:
    from rapidfuzz import fuzz

    if word == other or _is_plural(word, other):
        return True
    if min(len(word), len(other)) <= SHORT_WORD or any(map(_ROMAN.fullmatch, (word, other))):
        return False
    return fuzz.ratio(word, other) >= EACH_WORD_THRESHOLD


def _is_plural(word: str, other: str) -> bool:
    return other in (f"{word}s", f"{word}es")
