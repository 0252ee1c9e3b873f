"""Scores that need no model: intervals, exact match, overlap and the fluency of a text.

Invariants:
- Nothing in this module imports another module of kvedit.
- Every function is total: an empty input has a defined value.
"""

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

Z_95 = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution, for two-sided 95% intervals."""

_TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_]+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NGRAM_WEIGHTS = ((2, 2 / 3), (3, 4 / 3))


def wilson(passed: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95% interval of a share, as fractions; (0, 1) for ``n`` 0.

    Raises ValueError unless 0 <= passed <= n.
    Formula: E. B. Wilson, JASA 22 (1927) 209-212.
    """
    if not 0 <= passed <= n:
        raise ValueError(f"passed must be between 0 and n, got {passed} of {n}")
    if n == 0:
        return (0.0, 1.0)
    share, z2 = passed / n, Z_95 * Z_95
    center = share + z2 / (2 * n)
    spread = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    # Rounding must not exclude the share itself at the ends (7 of 7 lies in [0.65, 1.0]).
    low = 0.0 if passed == 0 else (center - spread) / scale
    high = 1.0 if passed == n else (center + spread) / scale
    return (max(0.0, low), min(1.0, high))


def bootstrap(
    draw: Callable[[random.Random], float], seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """Return the percentile bootstrap 95% interval of a statistic.

    ``draw`` computes the statistic of one resample, drawn with the generator it receives.
    """
    rng = random.Random(seed)
    values = sorted(draw(rng) for _ in range(resamples))
    return values[round(0.025 * resamples)], values[max(0, round(0.975 * resamples) - 1)]


def exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected text, apart from white space around it."""
    return answer.strip() == expected.strip()


def normalised(answer: str) -> str:
    """An answer as it is compared: NFKC, without case, punctuation, English articles and more white
    space than one.

    Formula: SQuAD's ``normalize_answer`` (``evaluate-v1.1.py``), which LocFT's ``eval_edit_metric``
    and EasyEdit's ``evaluate_utils`` use; punctuation here is that of Unicode.
    """
    text = unicodedata.normalize("NFKC", answer).casefold()
    text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", text).split())


def normalised_exact(answer: str, expected: str) -> bool:
    """Whether both are the same once they are ``normalised``; a text of which nothing is left then
    must be the same as it stands.
    """
    wanted = normalised(expected)
    return normalised(answer) == wanted if wanted else exact(answer, expected)


def harmonic_mean(shares: Sequence[float]) -> float:
    """Return the harmonic mean of shares, 0 where one is 0 or there is none.

    The papers' S of efficacy, paraphrase and neighbourhood scores: ROME (arXiv 2202.05262).
    """
    if not shares or min(shares) <= 0:
        return 0.0
    return len(shares) / sum(1 / share for share in shares)


def rouge_l_recall(answer: str, expected: str) -> float:
    """Return the longest common subsequence of characters as a share of the expected text's; 1 for
    an empty one.

    Formula: Lin, ROUGE (2004), R of ROUGE-L, a token being a character so that Chinese counts too;
    the subsequence is rapidfuzz's.
    """
    from rapidfuzz.distance import LCSseq  # here: `kvedit --help` needs none of it

    return LCSseq.similarity(answer, expected) / len(expected) if expected else 1.0


def word_f1(answer: str, expected: str) -> float:
    """Return the harmonic mean of the shares of words that two texts have in common, once they are
    ``normalised``; 1 for two texts without words, 0 where one alone has none.

    Formula: SQuAD's ``f1_score`` (``evaluate-v1.1.py``); a Chinese character is a word.
    """
    given, wanted = (Counter(words(normalised(text))) for text in (answer, expected))
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def words(text: str) -> list[str]:
    """The words of a text without case and punctuation; a Chinese character is one."""
    return _TOKEN.findall(text.casefold())


def ngram_entropy(text: str) -> float:
    """Return the fluency of a text in bits: low for repetitive text.

    The mean of the bigram and trigram entropies, weighted 2/3 and 4/3, as in MEMIT,
    ``experiments/py/eval_utils_counterfact.py``.  A token is one Chinese character or one word.
    """
    tokens = words(text)
    weighted = [weight * _entropy(tokens, size) for size, weight in _NGRAM_WEIGHTS]
    return sum(weighted) / len(weighted)


def _entropy(tokens: list[str], size: int) -> float:
    """Shannon entropy in bits of the n-grams of ``size`` tokens; 0 when there are none."""
    counts = Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
    total = sum(counts.values())
    return sum(c / total * math.log2(total / c) for c in counts.values())
