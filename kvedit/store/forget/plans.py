"""What erasing and pruning would do, to be announced before it is done."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ErasePlan:
    """What erasing facts does, to be announced before it is done.

    ``lost`` are the revisions whose weights go, ``kept`` those that can still be restored.  The
    model becomes that of revision ``restores``, or, if it is None, is trained from the base model
    with the ``retrained`` other facts.  ``shared_with`` are keys of other facts that have the text
    too, ``protected`` counts the protected texts that have it.
    """

    keys: tuple[str, ...]
    fact_ids: tuple[int, ...]
    lost: tuple[int, ...]
    kept: tuple[int, ...]
    restores: int | None
    retrained: int
    delta_files: int
    delta_bytes: int
    shared_with: tuple[str, ...]
    protected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What pruning does, to be announced before it is done.

    The deltas of the ``dropped`` revisions go, with the ``checkpoints`` that nothing needs then;
    ``lost`` are the revisions that can no longer be restored, ``kept`` those that still can;
    ``stands_on`` is the revision whose checkpoint replaces deltas, if any does.
    """

    before: int
    stands_on: int | None
    dropped: tuple[int, ...]
    lost: tuple[int, ...]
    kept: tuple[int, ...]
    checkpoints: tuple[int, ...]
    delta_bytes: int
