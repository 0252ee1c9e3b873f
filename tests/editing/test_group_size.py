"""How many facts there is memory for: found out once, and kept to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvedit.config import GroupConfig
from kvedit.editing.group_size import Room
from kvedit.errors import OutOfMemoryError
from kvedit.facts.fact import Fact
from kvedit.model.prompts import Example
from kvedit.training import memory


class Roomy:
    """An engine for which everything seems to fit."""

    def examples(self, fact: Fact) -> list[Example]:
        return [Example((1, 2), 1, fact.key, fact.description)]

    def needed(self, group: GroupConfig, facts: int, length: int) -> int:
        return 0


def room(warn: Callable[[str], None] = lambda text: None) -> Room:
    engine: Any = Roomy()
    return Room(engine, GroupConfig(), warn)


def facts(count: int) -> list[Fact]:
    return [Fact.create(f"key {at}", f"text {at}") for at in range(count)]


@pytest.fixture(scope="module", autouse=True)
def nothing_to_give_back() -> Iterator[None]:
    """Garbage is not collected: that takes half a second wherever the whole suite is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "give_back", lambda: None)
        yield


def out_of_memory() -> None:
    raise OutOfMemoryError("no memory left")


@given(st.integers(0, 40), st.integers(2, 20), st.none() | st.integers(1, 20))
def test_what_did_not_fit_is_not_put_together_again(
    items: int, count: int, most: int | None
) -> None:
    said: list[str] = []
    made = room(said.append)
    assert made.largest is None and made.fits(facts(count))
    assert [i for part in made.parts(range(items), most) for i in part] == list(range(items))
    assert made.attempt(facts(count), out_of_memory) is None
    assert made.largest == (count + 1) // 2 < count and not made.fits(facts(count))
    assert f"{count} facts do not fit together" in said[0] and "no memory left" in said[0]
    parts = made.parts(range(items), most)
    assert [i for part in parts for i in part] == list(range(items))
    assert all(0 < len(part) <= min(made.largest, most or made.largest) for part in parts)


def test_a_single_fact_cannot_be_halved() -> None:
    made = room()
    with pytest.raises(OutOfMemoryError):
        made.attempt(facts(1), out_of_memory)
    assert made.largest is None


def test_what_fits_is_done() -> None:
    assert room().attempt(facts(3), lambda: "done") == "done"
