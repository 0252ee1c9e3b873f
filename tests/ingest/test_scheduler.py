"""Which facts are taught together."""

from __future__ import annotations

from fake_knowledge import facts
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.editing.plan import should_compact
from kvedit.facts.fact import Fact
from kvedit.ingest.scheduler import MIN_GROUP, Scheduler


def fact(key: str) -> Fact:
    return Fact.create(key, "text", lang="en")


def all_of(groups: Scheduler) -> list[list[str]]:
    made = []
    while group := groups.next_group():
        made.append([one.key for one in group])
    return made


KEYS = st.lists(st.text("abc ", min_size=4, max_size=8).map(str.strip).filter(bool), unique=True)


@settings(deadline=None)  # the first key loads the tables of characters
@given(KEYS, st.integers(1, 5))
def test_every_fact_comes_once_in_groups_of_the_size(keys: list[str], size: int) -> None:
    made = all_of(Scheduler([fact(key) for key in keys], size))
    assert sorted(key for group in made for key in group) == sorted(keys)
    assert all(0 < len(group) <= size for group in made)


def test_close_keys_come_together() -> None:
    keys = ["tide lantern", "moss clock", "salt harp", "tide lanterns", "night ferry"]
    assert all_of(Scheduler([fact(key) for key in keys], 2)) == [
        ["tide lantern", "tide lanterns"],
        ["moss clock", "salt harp"],
        ["night ferry"],
    ]


def test_more_close_keys_than_a_group_holds() -> None:
    keys = [f"grey bucket {number}" for number in range(5)]
    assert [len(group) for group in all_of(Scheduler([fact(key) for key in keys], 2))] == [2, 2, 1]


def test_one_by_one_keeps_the_order() -> None:
    keys = ["tide lantern", "moss clock", "tide lanterns"]
    assert all_of(Scheduler([fact(key) for key in keys], 1)) == [[key] for key in keys]


def test_groups_of_automatic_size_are_as_large_as_they_may_be() -> None:
    assert [len(group) for group in all_of(Scheduler(facts(81), None, largest=32))] == [32, 32, 17]
    assert [len(group) for group in all_of(Scheduler(facts(81), None))] == [81]


def test_the_size_follows_success() -> None:
    groups = Scheduler(facts(81), None, largest=32)
    sizes = []
    for refused in (True, True, False, False):
        sizes.append(len(groups.next_group()))
        groups.adapt(rejected=refused)
    assert sizes == [32, 16, 8, 16] and len(groups.next_group()) == 9
    few = Scheduler(facts(9), None)  # half of those that were taught, not of what is allowed
    few.put_back(few.next_group())
    few.adapt(rejected=True)
    assert len(few.next_group()) == 4
    for _ in range(9):
        few.adapt(rejected=True)
    assert few._size == MIN_GROUP
    fixed = Scheduler(facts(20), 3)
    fixed.adapt(rejected=True)
    assert len(fixed.next_group()) == 3


def test_what_was_not_learned_goes_into_the_next_group_and_then_stands_alone() -> None:
    first, second, third, fourth = facts(4)
    groups = Scheduler([first, second, third, fourth], 2)
    assert groups.next_group() == (first, second)
    groups.put_back([first])
    assert groups.next_group() == (first, third)
    groups.put_back([first])
    assert groups.next_group() == (fourth,)
    assert groups.next_group() == (first,)
    assert groups.next_group() == ()


def test_groups_stay_as_small_as_memory_wants_them() -> None:
    groups = Scheduler(facts(81), None)
    groups.limit(None)
    groups.limit(3)
    assert len(groups.next_group()) == 3
    groups.adapt(rejected=False)
    groups.limit(8)  # what was found out before stands
    assert len(groups.next_group()) == 3
    fixed = Scheduler(facts(20), 10)
    fixed.limit(5)
    assert len(fixed.next_group()) == 5


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_beginning_anew_takes_a_fixed_number_of_lessons_a_fact(sizes: list[int]) -> None:
    """However facts come, with half of the rest piled up: three lessons a fact, and its own."""
    held = on_top = lessons = 0
    for size in sizes:
        if should_compact(size, held, on_top, 0.5):
            lessons, on_top = lessons + size + held, 0
        else:
            lessons, on_top = lessons + size, on_top + (size if held else 0)
        held += size
    assert lessons <= 4 * held
    assert not should_compact(1000, 0, 0, 0.5)
