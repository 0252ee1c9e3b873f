"""Equal keys, similar keys, keys and answers in a text, and lists of keys in a sentence.

Invariants:
- ``normalise`` is idempotent and never empty for a key that has a visible character.
- Similar keys are only reported: two keys are the same only if their normalised forms are equal.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from kvedit.events import Similar
from kvedit.facts.language import converter

KeyForm = Callable[[str], str]
"""The form under which two keys are one."""

NAMED = 5  # keys in a sentence, of a group of thousands
_SHORT = 3  # characters of a name for which a single different one is another person
_LOOSE = 60.0  # the least score of a suggestion
_NOT_EQUAL = 99.0  # the highest score of two keys that are not the same
_MEANINGFUL = frozenset("#%&*@")
_MAX_REPEATS = 8  # passes of normalisation over one key, at most
_ARTICLE = re.compile(r"^(?:an?|the) (?=.)")
_IDEOGRAPHS = re.compile(r"[\u4e00-\u9fff]+")
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # scripts


def in_words(keys: Sequence[str], most: int = NAMED) -> str:
    """The keys for a sentence: all of them, or the first few and how many more there are."""
    more = len(keys) - most
    return ", ".join(keys) if more <= 0 else f"{', '.join(keys[:most])} and {more:,} more"


def facts_text(count: int) -> str:
    """So many facts, for a sentence."""
    return "1 fact" if count == 1 else f"{count} facts"


def naming(keys: Iterable[str]) -> Callable[[str], bool]:
    """A test whether a text contains one of the keys, as separate words; in scripts without
    spaces, anywhere.
    """
    unique = set(keys)
    anywhere = {normalise(key) for key in unique if _NO_SPACES.search(key)}
    words = sorted(key.casefold() for key in unique if not _NO_SPACES.search(key))
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)")

    def names_one(text: str) -> bool:
        if words and pattern.search(text.casefold()):
            return True
        normal = normalise(text) if anywhere else ""
        return any(key in normal for key in anywhere)

    return names_one


def contains_answer(text: str, answer: str) -> bool:
    """Whether a text contains an answer, as separate words; in scripts without spaces, anywhere.

    Both in normal form, an answer without the article before it: the rule by which SQuAD compares
    answers, with containment for equality.
    """
    words = _ARTICLE.sub("", _words(answer))
    if _NO_SPACES.search(answer):
        return normalise(answer) in normalise(text)
    if not words:  # of signs alone
        return answer in text
    return f" {words} " in f" {_words(text)} "


_NOT_KEPT = {n: None for n in range(128) if not (chr(n).isalnum() or chr(n) in "#%&*@$+<=>^`|~")}


@lru_cache(maxsize=65_536)
def normalise(key: str) -> str:
    """Return the form under which keys are compared.

    NFKC, case folded, Traditional characters as Simplified ones; white space, punctuation and
    invisible characters removed.  Signs that distinguish names stay: symbols (C++), ``#%&*@`` (C#)
    and the point between two digits (3.11 is not 311).
    """
    if key.isascii() and "." not in key and (plain := key.lower().translate(_NOT_KEPT)):
        return plain  # what the steps below come to for such keys, which are most of them
    text = key
    for _ in range(_MAX_REPEATS):  # one pass can enable another: stop at the fixed point
        normal = _normalise_once(text)
        if normal == text:
            break
        text = normal
    return text


def exact_form(key: str) -> str:
    """The form under which keys are compared where signs and scripts count.

    NFKC, case folded, without white space and invisible characters.
    """
    text = key
    for _ in range(_MAX_REPEATS):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        form = "".join(char for char in folded if not _invisible(char)) or folded
        if form == text:
            break
        text = form
    return text


def similar(
    key: str, candidates: Iterable[str], *, threshold: float = 85.0, limit: int = 5
) -> list[Similar]:
    """Return the candidates similar to a key, best first; only the same key scores 100.

    The score is the better of rapidfuzz's ``ratio`` on normalised keys and ``token_sort_ratio``
    on their words (word order does not count).  A name of up to three characters is similar to
    another only if one contains the other: short Chinese names that share all but one character
    are different people, and warnings about them would hide the ones that matter.
    """
    hits = _scores(key, list(candidates), threshold)
    hits = [hit for hit in hits if hit.score == 100.0 or long_or_contained(key, hit.key)]
    return hits[:limit]


def did_you_mean(key: str, candidates: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return candidates the user may have meant: lower scores than ``similar``, short names too."""
    return [hit.key for hit in _scores(key, list(candidates), _LOOSE)[:limit]]


def _normalise_once(text: str) -> str:
    if _IDEOGRAPHS.fullmatch(text):  # only their script can change
        return converter("t2s")(text)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    normal = "".join(char for i, char in enumerate(text) if _is_significant(text, i, char))
    # A name of punctuation alone ("?!") must not become empty: all such names would be the same.
    normal = normal or "".join(char for char in text if not _invisible(char))
    return normal if normal.isascii() else converter("t2s")(normal)


def _is_significant(text: str, position: int, char: str) -> bool:
    if (char.isalnum() or char in _MEANINGFUL) and not _BLANK.match(char):
        return True
    if char == ".":
        around = text[max(0, position - 1) : position + 2]
        return len(around) == 3 and around[0].isdigit() and around[2].isdigit()
    return not _invisible(char) and not unicodedata.category(char).startswith("P")


_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Characters that show nothing although Unicode files them under letters, marks and symbols."""


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    return all(map(_invisible, text))


def _invisible(char: str) -> bool:
    """White space, control and format characters, surrogates, fillers and variation selectors."""
    if char.isspace() or _BLANK.match(char):
        return True
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")


def _words(key: str) -> str:
    """The words of a key, normalised, with single spaces between them."""
    return " ".join(filter(None, (normalise(word) for word in re.split(r"[\W_]+", key))))


def sorted_words(key: str) -> str:
    """The normalised words of a key in the order in which rapidfuzz compares them."""
    return " ".join(sorted(_words(key).split()))


def _scores(key: str, candidates: Sequence[str], threshold: float) -> list[Similar]:
    """All candidates at or above the threshold, best first, each once."""
    from rapidfuzz import fuzz, process

    best: dict[str, float] = {}
    for form, scorer in ((normalise, fuzz.ratio), (_words, fuzz.token_sort_ratio)):
        query = form(key)
        forms = [form(name) for name in candidates] if query else []  # in bulk: stores are large
        hits = process.extract(query, forms, scorer=scorer, score_cutoff=threshold, limit=None)
        for _, score, index in hits:
            name = candidates[index]
            ceiling = 100.0 if normalise(name) == normalise(key) else _NOT_EQUAL
            best[name] = max(min(float(score), ceiling), best.get(name, 0.0))
    ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))
    return [Similar(name, round(score, 1)) for name, score in ranked]


def long_or_contained(one: str, other: str) -> bool:
    """Whether two names are long enough to be similar, or one contains the other."""
    a, b = normalise(one), normalise(other)
    return min(len(a), len(b)) > _SHORT or a in b or b in a
