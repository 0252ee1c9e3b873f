"""Phrasings: the prompts that ask for a fact, those it is trained on and those it is only asked.

Invariant: the phrasings an edit trains on and those it is only probed with never overlap.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvedit.errors import UsageError
from kvedit.facts.fact import Fact

SHIPPED_PHRASINGS = Path(__file__).parents[1] / "data" / "phrasings"
KEY_PLACEHOLDER, PROMPT_PLACEHOLDER = "{key}", "{prompt}"


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Questions for a key, in the fact's language and in others (``cross``); and ``contexts``, what
    may stand before a prompt: before a relation's own, and where unseen phrasings were missed.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    cross_train: tuple[str, ...] = ()
    cross_held_out: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()


@cache
def load_phrasings(language: str, override: Path | None = None) -> Phrasings:
    """The phrasings of a language: a store's own file if it has one, else the shipped one.

    Raises UsageError for a file that is broken or empty, or a phrasing without the key.
    """
    folders = (override, SHIPPED_PHRASINGS) if override else (SHIPPED_PHRASINGS,)
    files = [folder / f"{language}.toml" for folder in folders]
    path = files[0] if files[0].is_file() else files[-1]
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}", hint="Correct it.") from error
    cross = table.get("cross", {})
    if not isinstance(cross, dict):
        raise UsageError(f"{path}: cross must be a table", hint="Write [cross] on its own line.")
    names = [(part, name) for part in (table, cross) for name in ("train", "held_out")]
    lists = [_texts(path, part, name, KEY_PLACEHOLDER) for part, name in names]
    phrasings = Phrasings(*[*lists, _texts(path, table, "contexts", PROMPT_PLACEHOLDER)])
    trained = {*phrasings.train, *phrasings.cross_train}
    if both := trained.intersection({*phrasings.held_out, *phrasings.cross_held_out}):
        raise UsageError(f"{path} trains and holds out {min(both)!r}", hint="Take one of them out.")
    if not phrasings.train or not phrasings.held_out:
        what = f"{path} needs `train` and `held_out`, each with a phrasing or more"
        raise UsageError(what, hint='Write train = ["What is {key}?"], and held_out likewise.')
    return phrasings


def _texts(path: Path, table: Mapping[str, Any], name: str, needed: str) -> tuple[str, ...]:
    values = table.get(name, [])
    if not isinstance(values, list):
        raise UsageError(f"{path}: {name} must be a list", hint=f'Write {name} = ["..."].')
    for value in values:
        if not isinstance(value, str) or needed not in value:
            what = f"{path}: {value!r} in {name} must be a text that contains {needed}"
            raise UsageError(what, hint=f"Put {needed} in, as the shipped ones do.")
    return tuple(values)


def training_prompts(fact: Fact, override: Path | None = None) -> tuple[str, ...]:
    """The prompts a fact is trained on: the shipped phrasings of its names, then its own; of a
    relation its own, alone and in contexts (ROME's prefixes, Meng et al. 2022, arXiv:2202.05262).
    """
    phrasings = load_phrasings(fact.lang, override)
    if fact.relation_of:
        after = [in_context(p, context) for p in fact.prompts for context in phrasings.contexts]
        return tuple(dict.fromkeys([*fact.prompts, *after]))
    shipped = [_fill(one, fact.key) for one in (*phrasings.train, *phrasings.cross_train)]
    aliases = [_fill(one, alias) for alias in fact.aliases for one in phrasings.train[:3]]
    return tuple(dict.fromkeys([*shipped, *aliases, *fact.prompts]))


def paraphrase_prompts(fact: Fact, override: Path | None = None) -> tuple[str, ...]:
    """Prompts for the same fact that no edit ever trains on."""
    phrasings = load_phrasings(fact.lang, override)
    ways = () if fact.relation_of else (*phrasings.held_out, *phrasings.cross_held_out)
    prompts = dict.fromkeys([*(_fill(one, fact.key) for one in ways), *fact.paraphrases])
    trained = set(training_prompts(fact, override))
    return tuple(prompt for prompt in prompts if prompt not in trained)


def in_context(prompt: str, context: str) -> str:
    """A prompt after a text that has nothing to do with it."""
    return context.replace(PROMPT_PLACEHOLDER, prompt)


def _fill(phrasing: str, key: str) -> str:
    return phrasing.replace(KEY_PLACEHOLDER, key)
