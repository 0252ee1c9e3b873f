"""A mapping that fails ends in an error that says so, and costs nothing but time."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from disk_faults import Fault, mapped
from mmap_faults import CODES, calls, wrong

from kvedit import KnowledgeBase
from kvedit.errors import KveditError, OutOfMemoryError
from kvedit.store.store import Store

pytestmark = pytest.mark.usefixtures("random_training")


@pytest.mark.parametrize("kind", ["add", "prune"])
def test_each_mapping_may_fail(trained_store: Path, ram_path: Path, kind: str) -> None:
    """Another error at each call; all errors at all calls of all commands are in the bench."""
    labels = calls(Path(shutil.copytree(trained_store, ram_path / "0")), kind)
    assert len(labels) >= 4 and any("master" in label for label in labels)
    for number, label in enumerate(labels, 1):
        path = Path(shutil.copytree(trained_store, ram_path / str(number)))
        assert wrong(path, kind, number, CODES[number % len(CODES)]) is None, label


@pytest.mark.parametrize("code", CODES, ids=[errno.errorcode[code] for code in CODES])
@pytest.mark.parametrize("call", [1, 2])
def test_weights_that_cannot_be_mapped_are_said_to_be_so(
    trained_store: Path, code: int, call: int
) -> None:
    with mapped(Fault(call, code)), pytest.raises(KveditError) as raised:
        KnowledgeBase.open(trained_store).close()
    assert "model.safetensors" in raised.value.message or "small" in raised.value.message
    assert "Give the name" not in raised.value.hint
    words = "memory" if code == errno.ENOMEM else "disk"
    assert words in raised.value.hint
    assert isinstance(raised.value, OutOfMemoryError) == (code == errno.ENOMEM)


@pytest.mark.parametrize("call", [3, 4])
def test_a_pruned_store_whose_checkpoint_cannot_be_mapped_is_not_called_damaged(
    trained_store: Path, call: int
) -> None:
    with KnowledgeBase.open(trained_store) as base:
        base.prune(3)
    with Store.open(trained_store) as store:
        assert store.gaps()
    with mapped(Fault(call, errno.EIO)), pytest.raises(KveditError) as raised:
        KnowledgeBase.open(trained_store).close()
    assert "cannot read" in raised.value.message and "damaged" not in str(raised.value)
    assert "disk" in raised.value.hint
