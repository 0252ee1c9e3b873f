"""Similar keys among thousands: what is found, and what it costs."""

from __future__ import annotations

import time
import tracemalloc
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.facts import similarity
from kvedit.facts.keys import normalise, similar
from kvedit.facts.similarity import clusters, find_pairs

NAMES = st.lists(st.text("ab c李白", min_size=1, max_size=9), max_size=6, unique=True)


def expected_pairs(keys: list[str], stored: list[str]) -> dict[tuple[str, str], object]:
    """Every pair that ``similar`` finds one by one."""
    names = [*keys, *stored]
    return {
        (key, hit.key): pytest.approx(hit.score, abs=0.1)
        for at, key in enumerate(keys)
        for hit in similar(key, names[at + 1 :], limit=99)
        if hit.score < 100
    }


@settings(deadline=None)
@given(NAMES, NAMES)
def test_pairs_are_what_similar_finds_one_by_one(keys: list[str], stored: list[str]) -> None:
    names = [*keys, *stored]
    found = find_pairs(keys, stored)
    assert found.complete and found.count == len(found.closest)
    assert {(names[i], names[j]): s for i, j, s in found.closest} == expected_pairs(keys, stored)


@settings(max_examples=50, deadline=None)
@given(NAMES)
def test_clusters_are_the_pairs_joined(keys: list[str]) -> None:
    groups = clusters(keys)
    assert sorted(at for group in groups for at in group) == list(range(len(keys)))
    assert [group[0] for group in groups] == sorted(min(group) for group in groups)
    where = {at: number for number, group in enumerate(groups) for at in group}
    pairs = find_pairs(keys).closest
    assert all(where[i] == where[j] for i, j, _ in pairs)
    joined = {at for pair in pairs for at in pair[:2]}
    assert all(len(group) == 1 or set(group) <= joined for group in groups)


def test_thousands_of_keys_that_resemble_each_other_are_counted_in_seconds() -> None:
    keys = [f"customer support article number {n:04d}" for n in range(2500)]
    tracemalloc.start()
    begin = time.process_time()
    found = find_pairs(keys, most=3)
    assert time.process_time() - begin < 15
    assert found.count == 2500 * 2499 // 2 and len(found.closest) == 3
    assert [pair[2] for pair in found.closest] == [97.2] * 3
    assert len(clusters(keys)) == 1
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_progress_is_told_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    with patch.object(similarity, "_CELLS", 1000):
        find_pairs([f"key {n}" for n in range(90)], progress=lambda *at: told.append(at))
    assert len(told) > 3 and told[-1] == (90, 90)


def test_of_too_many_keys_the_neighbours_are_compared() -> None:
    keys = [f"{word} {word[::-1]}" for word in ("alder", "birch", "cedar", "larch", "maple")]
    keys += ["harbour lantern", "harbour lanterm", "jarbour lantern", "lantern of the harbour"]
    stored = ["cedar radecs", "larch hcral"]
    with patch.object(similarity, "MOST_COMPARED", 10):
        found = find_pairs(keys, stored)
    everything = find_pairs(keys, stored)
    assert not found.complete and everything.complete
    assert set(found.closest) <= set(everything.closest)
    names = [*keys, *stored]
    assert {(names[i], names[j]) for i, j, _ in found.closest} >= {
        ("harbour lantern", "harbour lanterm"),
        ("harbour lantern", "jarbour lantern"),
        ("cedar radec", "cedar radecs"),
    }
    assert found.count == len(found.closest)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=12))
def test_the_quick_way_for_plain_keys_gives_the_normal_form(key: str) -> None:
    assert normalise(key) == normalise(key + "\u200b")
