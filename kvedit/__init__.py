"""kvedit: a key-value store of facts inside a language model's weights.

Importing the package loads nothing heavy: the names below arrive when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvedit.config import Config as Config
    from kvedit.editing.knowledge_base import KnowledgeBase as KnowledgeBase
    from kvedit.errors import KveditError as KveditError
    from kvedit.events import EditReport as EditReport
    from kvedit.events import Score as Score
    from kvedit.facts.fact import Fact as Fact
    from kvedit.facts.fact import LocalityProbe as LocalityProbe
    from kvedit.facts.fact import Question as Question
    from kvedit.facts.fact import Written as Written
    from kvedit.store.store import Store as Store

__version__ = "0.1.0"

_HOME = {
    "Config": "kvedit.config",
    "EditReport": "kvedit.events",
    "Fact": "kvedit.facts.fact",
    "KnowledgeBase": "kvedit.editing.knowledge_base",
    "KveditError": "kvedit.errors",
    "LocalityProbe": "kvedit.facts.fact",
    "Question": "kvedit.facts.fact",
    "Score": "kvedit.events",
    "Store": "kvedit.store.store",
    "Written": "kvedit.facts.fact",
}

__all__ = [  # noqa: RUF022 - the class most people come for stands first
    "KnowledgeBase", "Config", "EditReport", "Fact", "KveditError", "LocalityProbe", "Question",
    "Score", "Store", "Written", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
