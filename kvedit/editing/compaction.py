"""When a group is trained together with all that is held, from the base model on."""

from __future__ import annotations


def should_compact(facts: int, held: int, on_top: int, share: float) -> bool:
    """Whether a group of so many is taught together with all that is held, from the base model on.

    On top of what earlier groups taught a group learns less and harms more; and as long as what has
    piled up ``on_top``, of what is ``held``, is a fixed ``share`` of the rest, beginning anew takes
    a fixed number of lessons a fact.
    """
    return held > 0 and facts + min(held, on_top) >= max(0, held - on_top) * share
