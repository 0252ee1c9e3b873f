"""How many facts the model holds at each revision, through rollbacks and erasures."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_steps import add, erase, new_store, prune, remove, roll_back, update


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
