"""Which facts are taught together."""

from __future__ import annotations

from fake_knowledge import facts
from hypothesis import given
from hypothesis import strategies as st

from kvedit.facts import Fact
from kvedit.groups import FIRST, LARGEST, Groups


def fact(key: str) -> Fact:
    return Fact.create(key, "text", lang="en")


def all_of(groups: Groups) -> list[list[str]]:
    made = []
    while group := groups.take():
        made.append([one.key for one in group])
    return made


KEYS = st.lists(st.text("abc ", min_size=4, max_size=8).map(str.strip).filter(bool), unique=True)


@given(KEYS, st.integers(1, 5))
def test_every_fact_comes_once_in_groups_of_the_size(keys: list[str], size: int) -> None:
    made = all_of(Groups([fact(key) for key in keys], size))
    assert sorted(key for group in made for key in group) == sorted(keys)
    assert all(0 < len(group) <= size for group in made)


def test_close_keys_come_together() -> None:
    keys = ["tide lantern", "moss clock", "salt harp", "tide lanterns", "night ferry"]
    assert all_of(Groups([fact(key) for key in keys], 2)) == [
        ["tide lantern", "tide lanterns"],
        ["moss clock", "salt harp"],
        ["night ferry"],
    ]


def test_more_close_keys_than_a_group_holds() -> None:
    keys = [f"grey bucket {number}" for number in range(5)]
    assert [len(group) for group in all_of(Groups([fact(key) for key in keys], 2))] == [2, 2, 1]


def test_one_by_one_keeps_the_order() -> None:
    keys = ["tide lantern", "moss clock", "tide lanterns"]
    assert all_of(Groups([fact(key) for key in keys], 1)) == [[key] for key in keys]


def test_the_size_follows_success() -> None:
    groups = Groups(facts(81), None)
    sizes = []
    for outcome in (True, False, False, False, False, True, True):
        sizes.append(len(groups.take()))
        groups.learn(all_committed=outcome)
    assert sizes == [FIRST, 2 * FIRST, FIRST, FIRST // 2, FIRST // 4, FIRST // 8, FIRST // 4]
    fixed = Groups(facts(20), 3)
    fixed.learn(all_committed=True)
    assert len(fixed.take()) == 3 <= LARGEST
