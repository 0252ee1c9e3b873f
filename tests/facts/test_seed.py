"""The seed facts: valid by the rules of the program, ours, and asked in words of their own."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from kvedit.facts import keys
from kvedit.facts.fact import Fact
from kvedit.facts.language import detect_language
from kvedit.facts.readers import read_description
from tests.jsonl_facts import read_facts_jsonl

ROOT = Path(__file__).resolve().parents[2]
SEED = ROOT / "store" / "seed"
FILES = sorted(SEED.glob("*.jsonl"))
LENGTHS = {"en": (60, 220), "zh-Hans": (25, 110), "zh-Hant": (25, 110)}
TEXT_FILES = {"夢中情爐.txt": "夢中情爐", "tide-lantern.txt": "tide lantern"}


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return [fact for path in FILES for fact in read_facts_jsonl(path)]


def test_one_file_for_each_language() -> None:
    assert [path.stem for path in FILES] == sorted(LENGTHS)


def test_no_line_is_lost_or_changed_by_the_reader(facts: list[Fact]) -> None:
    raw = [json.loads(line) for path in FILES for line in path.read_text("utf-8").splitlines()]
    assert [(f.key, f.description, list(f.paraphrases)) for f in facts] == [
        (row["key"], row["description"], row["paraphrases"]) for row in raw
    ]


def test_at_least_ten_facts_in_each_language(facts: list[Fact]) -> None:
    counts = Counter(fact.lang for fact in facts)
    assert set(counts) == set(LENGTHS)
    assert min(counts.values()) >= 10
    assert counts.total() >= 36


def test_the_language_given_is_the_language_detected(facts: list[Fact]) -> None:
    assert {f.key: detect_language(f.description) for f in facts} == {f.key: f.lang for f in facts}


def test_descriptions_are_neither_short_nor_long(facts: list[Fact]) -> None:
    for fact in facts:
        low, high = LENGTHS[fact.lang]
        assert low <= len(fact.description) <= high, fact.key


def test_keys_and_aliases_are_all_different(facts: list[Fact]) -> None:
    names = Counter(keys.normalise(name) for fact in facts for name in (fact.key, *fact.aliases))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_keys_are_near_each_other(facts: list[Fact]) -> None:
    for one, other in combinations([fact.key for fact in facts], 2):
        assert keys.similar(one, [other]) == []


def test_descriptions_and_questions_are_all_different(facts: list[Fact]) -> None:
    texts = Counter(text for fact in facts for text in (fact.description, *fact.paraphrases))
    assert max(texts.values()) == 1


def test_every_fact_has_questions_of_its_own(facts: list[Fact]) -> None:
    for fact in facts:
        path = ROOT / "kvedit" / "data" / "phrasings" / f"{fact.lang}.toml"
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        shipped = {
            phrasing.replace("{key}", fact.key)
            for part in (table, table["cross"])
            for phrasing in (*part["train"], *part["held_out"])
        }
        assert len(fact.paraphrases) >= 2, fact.key
        assert not shipped & set(fact.paraphrases), fact.key
        assert all(fact.key.casefold() in text.casefold() for text in fact.paraphrases), fact.key


def test_locality_questions_do_not_name_the_fact(facts: list[Fact]) -> None:
    asked = [(fact, probe.prompt) for fact in facts for probe in fact.locality]
    assert len(asked) >= 10
    assert [prompt for fact, prompt in asked if fact.key.casefold() in prompt.casefold()] == []


def test_every_fact_says_where_it_comes_from(facts: list[Fact]) -> None:
    assert all(fact.source for fact in facts)


@pytest.mark.parametrize("name", sorted(TEXT_FILES))
def test_the_text_files_hold_the_seed_descriptions(facts: list[Fact], name: str) -> None:
    by_key = {fact.key: fact for fact in facts}
    assert read_description(str(SEED / name)) == by_key[TEXT_FILES[name]].description
