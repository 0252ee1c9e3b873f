"""The largest group that fits into memory is found once, and no larger one is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvedit.config import GroupConfig
from kvedit.editing.group_size import GroupSize
from kvedit.errors import OutOfMemoryError
from kvedit.facts.fact import Fact
from kvedit.model.prompts import Example
from kvedit.training.worker import Worker


class LargeEngine:
    """An engine for which everything seems to fit."""

    worker = Worker(None)

    def examples(self, fact: Fact) -> list[Example]:
        return [Example((1, 2), 1, fact.key, fact.description)]

    def needed(self, group: GroupConfig, facts: int, length: int) -> int:
        return 0


def group_size(warn: Callable[[str], None] = lambda text: None) -> GroupSize:
    engine: Any = LargeEngine()
    return GroupSize(engine, GroupConfig(), warn)


def facts(count: int) -> list[Fact]:
    return [Fact.create(f"key {at}", f"text {at}") for at in range(count)]


@pytest.fixture(scope="module", autouse=True)
def nothing_to_release() -> Iterator[None]:
    """Garbage is not collected: that takes half a second wherever the whole suite is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvedit.editing.group_size.release_memory", lambda: None)
        yield


def out_of_memory() -> None:
    raise OutOfMemoryError("no memory left")


@given(st.integers(0, 40), st.integers(2, 20), st.none() | st.integers(1, 20))
def test_no_group_of_a_size_that_did_not_fit_is_tried_again(
    items: int, count: int, most: int | None
) -> None:
    warnings: list[str] = []
    size = group_size(warnings.append)
    assert size.largest is None and size.fits(facts(count))
    assert [i for part in size.parts(range(items), most) for i in part] == list(range(items))
    assert size.attempt(facts(count), out_of_memory) is None
    assert size.largest == (count + 1) // 2 < count and not size.fits(facts(count))
    assert f"{count} facts do not fit together" in warnings[0] and "no memory left" in warnings[0]
    parts = size.parts(range(items), most)
    assert [i for part in parts for i in part] == list(range(items))
    assert all(0 < len(part) <= min(size.largest, most or size.largest) for part in parts)


def test_a_single_fact_cannot_be_halved() -> None:
    size = group_size()
    with pytest.raises(OutOfMemoryError):
        size.attempt(facts(1), out_of_memory)
    assert size.largest is None


def test_a_group_that_fits_is_trained() -> None:
    assert group_size().attempt(facts(3), lambda: "done") == "done"
