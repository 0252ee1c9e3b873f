"""How the texts of some facts are told from other texts, so that they can be taken out of them.

Invariant: what is taken out is replaced as a whole; half a text never stays behind.
"""

from collections.abc import Iterable

from kvedit.facts.fact import Fact
from kvedit.facts.keys import naming, normalise

ERASED = "(erased)"  # stands where a text was
_OWN_WORDS = {"message_type", "kind", "outcome", "protocol"}  # fields that hold words of kvedit
LONG_TEXT = 12  # characters: a shorter description tells its fact only beside a name of it


class Wording:
    """How the texts of some facts are told from others; versions of a fact count as facts."""

    def __init__(self, facts: Iterable[Fact]) -> None:
        self.facts = frozenset(facts)
        self.names = {name for fact in self.facts for name in (fact.key, *fact.aliases)}
        self.descriptions = {fact.description for fact in self.facts}
        self.is_named = naming(self.names) if self.names else lambda text: False
        self._norms = {normalise(name) for name in self.names}
        asked = (
            (*fact.prompts, *fact.paraphrases, *(probe.prompt for probe in fact.locality))
            for fact in self.facts
        )
        self._asked = {prompt for prompts in asked for prompt in prompts}

    def tells(self, text: str | None) -> bool:
        """Whether a text contains one of the facts."""
        present = [one for one in self.descriptions if one in (text or "")]
        return any(len(one) >= LONG_TEXT for one in present) or (
            bool(present) and self.is_named(text or "")
        )

    def is_about(self, text: str | None) -> bool:
        """Whether a text names one of the facts, contains one, or is one of their questions."""
        return bool(text) and (text in self._asked or self.is_named(text or "") or self.tells(text))

    def has_key(self, key: object) -> bool:
        """Whether a key is one of theirs."""
        return isinstance(key, str) and normalise(key) in self._norms

    def without(self, value: object) -> object:
        """A JSON document in which every text about the facts is replaced by ``ERASED``."""
        if isinstance(value, str):
            return ERASED if self.is_about(value) else value
        if isinstance(value, list):
            return [self.without(item) for item in value]
        if isinstance(value, dict):
            kept = {name: value[name] for name in _OWN_WORDS & value.keys()}
            return {name: self.without(item) for name, item in value.items()} | kept
        return value
