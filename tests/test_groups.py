"""Which facts are taught together."""

from __future__ import annotations

from fake_knowledge import facts
from hypothesis import given
from hypothesis import strategies as st

from kvedit.facts import Fact
from kvedit.groups import FIRST, SMALLEST, Groups, Room


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


def test_a_run_that_goes_on_begins_as_large_as_what_is_there() -> None:
    assert len(Groups(facts(200), None, held=40).take()) == 40
    assert len(Groups(facts(200), None, held=3).take()) == 16
    assert len(Groups(facts(200), None, largest=32, held=90).take()) == 32
    assert len(Groups(facts(200), 5, held=90).take()) == 5


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


def test_each_group_is_as_large_as_all_before_it() -> None:
    groups = Groups(facts(81), None, largest=24)
    sizes = []
    while group := groups.take():
        sizes.append(len(group))
        groups.learn(refused=False)
    assert sizes == [FIRST, FIRST, 24, 24, 1]


def test_what_was_put_back_does_not_count() -> None:
    groups = Groups(facts(81), None)
    group = groups.take()
    groups.put_back(group[:8])
    groups.learn(refused=False)
    assert len(groups.take()) == FIRST
    groups.learn(refused=False)
    assert len(groups.take()) == 2 * FIRST - 8


def test_the_size_follows_success() -> None:
    groups = Groups(facts(81), None, largest=32)
    sizes = []
    for refused in (True, True, False):
        groups.learn(refused=refused)
        sizes.append(len(groups.take()))
    assert sizes == [FIRST // 2, SMALLEST, SMALLEST * 2]
    many = Groups(facts(81), None)
    for _ in range(9):
        many.learn(refused=True)
    assert len(many.take()) == SMALLEST
    fixed = Groups(facts(20), 3)
    fixed.learn(refused=True)
    assert len(fixed.take()) == 3


def test_what_was_not_learned_goes_into_the_next_group_and_then_stands_alone() -> None:
    first, second, third, fourth = facts(4)
    groups = Groups([first, second, third, fourth], 2)
    assert groups.take() == (first, second)
    groups.put_back([first])
    assert groups.take() == (first, third)
    groups.put_back([first])
    assert groups.take() == (fourth,)
    assert groups.take() == (first,)
    assert groups.take() == ()


def test_groups_stay_as_small_as_memory_wants_them() -> None:
    groups = Groups(facts(81), None)
    groups.limit(None)
    groups.limit(3)
    assert len(groups.take()) == 3
    groups.learn(refused=False)
    groups.limit(8)  # what was found out before stands
    assert len(groups.take()) == 3
    fixed = Groups(facts(20), 10)
    fixed.limit(5)
    assert len(fixed.take()) == 5


@given(st.lists(st.integers()), st.integers(1, 20), st.none() | st.integers(1, 20))
def test_what_there_is_room_for(items: list[int], count: int, most: int | None) -> None:
    room = Room()
    assert room.largest is None
    assert [i for part in room.parts(items, most) for i in part] == items
    bound = room.halve(count)
    assert bound == room.largest and (bound < count or count == 1)
    parts = room.parts(items, most)
    assert [i for part in parts for i in part] == items
    assert all(0 < len(part) <= min(bound, most or bound) for part in parts)
