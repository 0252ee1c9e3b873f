"""How many facts the model holds at each revision, through rollbacks and erasures."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_steps import (
    add,
    check,
    commit,
    erase,
    fact,
    new_store,
    prune,
    remove,
    roll_back,
    update,
)

from kvedit.store.rows import FactChange


@pytest.mark.parametrize("pruned", [False, True])
def test_held_counts_are_those_of_each_revision(tmp_path: Path, pruned: bool) -> None:
    store = new_store(tmp_path / "s")
    assert store.held_counts() == {0: 0}
    for name in ("anvil", "bread", "candle"):
        add(store, name, f"what a {name} is")
    update(store, "anvil", "a heavy block")
    remove(store, "bread")
    roll_back(store, 2)
    add(store, "dagger")
    if pruned:
        prune(store, 4)
    assert store.held_counts() == {0: 0, 1: 1, 2: 2, 3: 3, 4: 3, 5: 2, 6: 2, 7: 3}
    erase(store, "dagger")  # back to the weights of revision 6
    erase(store, "anvil")  # the others are trained again
    assert store.held_counts() == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1}
    held = {number: len(store.held_at(number)) for number in store.held_counts()}
    assert held == store.held_counts()


def test_the_revision_before_a_fact_is_before_the_group_that_did_not_learn_it(
    tmp_path: Path,
) -> None:
    """Its weights were trained on the fact all the same, and may recite it."""
    store = new_store(tmp_path / "s")

    def add_beside(key: str, *not_learned: str) -> int:
        new = fact(key)
        fact_id = store.put_pending(new)
        change = FactChange(fact_id, None, new)
        return commit(store, "add", [change], check(fact_id), not_learned=not_learned)

    add_beside("anvil")
    add_beside("bread", "candle")
    add_beside("dagger", "Candle")
    candle = add(store, "candle")
    assert store.not_learned() == {2: ("candle",), 3: ("Candle",)}
    assert store.revision_before(candle) == 1
    remove(store, "candle")
    add_beside("ewer")
    assert add(store, "candle") == candle
    assert store.revision_before(candle) == store.head() - 1  # it was gone in between


def test_an_edit_that_was_not_committed_says_nothing_about_a_fact_that_is(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    anvil = add(store, "anvil")
    held = store.require("anvil").fact
    edit_id = store.plan_edit("remove", [FactChange(anvil, held, None)], {})
    store.finish_edit(edit_id, "rejected", ["unseen phrasings"], {}, [check(anvil, passed=False)])
    assert [row.passed for row in store.results(anvil)] == [True]
    bread = store.put_pending(fact("bread"))
    edit_id = store.plan_edit("add", [FactChange(bread, None, fact("bread"))], {})
    store.finish_edit(edit_id, "rejected", ["recall"], {}, [check(bread, passed=False)])
    assert [row.passed for row in store.results(bread)] == [False]
