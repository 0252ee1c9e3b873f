"""How the texts of some facts are told from other texts, so that they can be taken out of them.

Invariant: what is taken out is replaced as a whole; half a text never stays behind.
"""

from collections.abc import Callable, Iterable, Set

from kvedit.facts.fact import Fact
from kvedit.facts.keys import KeyForm, naming, normalise

ERASED = "(erased)"  # stands where a text was
_OWN_WORDS = {"message_type", "kind", "outcome", "protocol"}  # fields that hold words of kvedit
LONG_TEXT = 12  # characters: a shorter description tells its fact only beside a name of it


class Wording:
    """How the texts of some facts are told from others; versions of a fact count as facts.

    ``subjects`` are those of relations that no other fact is about: they name the facts too.
    ``key_form`` is the form under which the store compares keys.
    """

    def __init__(
        self, facts: Iterable[Fact], subjects: Iterable[str] = (), key_form: KeyForm = normalise
    ) -> None:
        self.facts = frozenset(facts)
        keys = {name for fact in self.facts for name in (fact.key, *fact.aliases)}
        self.names = {*keys, *subjects}
        self.texts = {
            text for fact in self.facts for text in (fact.description, *fact.all_statements)
        }
        self.is_named = _naming(self.names)
        self._key_form = key_form
        self._norms = {key_form(name) for name in keys}
        self._asked = {prompt for fact in self.facts for prompt in _prompts(fact)}
        # A question's answer, often a few common words, tells its fact only beside a name of it.
        self._answers = {one.answer for fact in self.facts for one in fact.all_questions}
        self._is_named_anyhow = _naming(self.names | {fact.name for fact in self.facts})

    def tells(self, text: str | None) -> bool:
        """Whether a text contains one of the facts."""
        if not text:
            return False
        present = [one for one in self.texts if one in text]
        if any(len(one) >= LONG_TEXT for one in present):
            return True
        some = bool(present) or any(one in text for one in self._answers)
        return some and self._is_named_anyhow(text)

    def is_about(self, text: str | None) -> bool:
        """Whether a text names one of the facts, contains one, or is one of their questions."""
        return bool(text) and (text in self._asked or self.is_named(text or "") or self.tells(text))

    def has_key(self, key: object) -> bool:
        """Whether a key is one of theirs."""
        return isinstance(key, str) and self._key_form(key) in self._norms

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


def _prompts(fact: Fact) -> tuple[str, ...]:
    """Every question that is about a fact, or that was given with it."""
    asked = [*(one.prompt for one in fact.locality), *(one.prompt for one in fact.all_questions)]
    return (*fact.prompts, *fact.paraphrases, *asked)


def _naming(names: Set[str]) -> Callable[[str], bool]:
    return naming(names) if names else lambda text: False
