"""The language of a text, and conversion between the Chinese scripts (OpenCC)."""

import re
from collections.abc import Callable
from functools import cache
from operator import ne

LANGUAGES = ("en", "zh-Hans", "zh-Hant")

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")


@cache
def converter(config: str) -> Callable[[str], str]:
    """OpenCC's conversion of this name: ``s2t`` to Traditional, ``t2s`` to Simplified.

    The converted text has as many characters.
    """
    import opencc  # its tables take a tenth of a second to load: only where there is Chinese

    convert: Callable[[str], str] = opencc.OpenCC(config).convert
    return convert


def detect_language(text: str, context: str = "") -> str:
    """Return ``en``, ``zh-Hans`` or ``zh-Hant`` for a text.

    Chinese when there are at least as many Chinese characters as Latin words, so that an English
    sentence may quote a Chinese name.  The script is the one that the conversion to the other
    changes in more places; ``context`` (a fact's key) is counted along with the text.  A text that
    is the same in both counts as ``zh-Hant``, the script of the embedded model's training text.
    """
    probe = text if _HAN.search(text) or _WORD.search(text) else context
    han = len(_HAN.findall(probe))
    if han == 0 or han < len(_WORD.findall(probe)):
        return "en"
    both = f"{text}\n{context}".encode("utf-8", "ignore").decode("utf-8")  # no lone surrogates
    return "zh-Hans" if _changes("s2t", both) > _changes("t2s", both) else "zh-Hant"


def _changes(config: str, text: str) -> int:
    """How many characters a conversion replaces."""
    return sum(map(ne, text, converter(config)(text)))
