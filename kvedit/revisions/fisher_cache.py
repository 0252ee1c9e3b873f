"""Fisher moments beside the store, so that they are not measured again at every start.

Invariants:
- Moments are read only if the file is whole and they were measured on the same weights and the same
  texts.  The files are a cache and may be deleted at any time.
- What is read stays on the disk: each side comes into memory when it is asked for, and no longer.
"""

import json
import struct
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvedit.adapter.fisher import BLOCK, UNCUT, FisherMoments
from kvedit.errors import KveditError
from kvedit.files import clean_temporary, disk_errors, remove, write_atomic
from kvedit.mapped import mapping
from kvedit.store.checks import caches, known_files
from kvedit.store.store import Store

_FORMAT = f"blocks of {BLOCK} above {UNCUT}, sealed"
_SEAL = "sha256"  # the last tensor: the digest of all bytes before it


def write(store: Store, revision: int, name: str, fisher: FisherMoments, texts: str = "") -> None:
    """Keep moments that were measured at a revision.

    ``texts`` is a digest of the texts that they were measured on, where the weights do not say it.
    """
    path = _path(store, name)
    weights = store.revision(revision).weights_digest
    if _measured_on(path) == (_FORMAT, weights, texts):
        return
    label = {
        "format": _FORMAT, "revision": str(revision), "weights": weights, "texts": texts,
        "tokens": str(fisher.tokens), "inputs_of": json.dumps(dict(fisher.inputs_of)),
    }  # fmt: skip
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        clean_temporary(path.parent)
    write_atomic(path, caches.sealed(_pieces(fisher.sides, label)))


def _pieces(sides: Mapping[str, Tensor], label: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file of fp32 tensors, without a copy of all of them in memory."""
    spans: dict[str, object] = {"__metadata__": label}
    end = 0
    for name, side in sides.items():
        start, end = end, end + side.nbytes
        spans[name] = {"dtype": "F32", "shape": list(side.shape), "data_offsets": [start, end]}
    span = [end, end + caches.DIGEST_BYTES]
    spans[_SEAL] = {"dtype": "U8", "shape": [caches.DIGEST_BYTES], "data_offsets": span}
    text = json.dumps(spans).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for side in sides.values():
        yield side.contiguous().numpy().data.cast("B")


def clear(store: Store) -> None:
    """Remove all moments: the texts that they were measured on have changed."""
    for path in store.cache.glob(_path(store, "*").name):
        remove(path)


def read(store: Store, revision: int, name: str, texts: str = "") -> FisherMoments | None:
    """The moments of this revision's weights and of these texts; None if they are not there, or the
    file was altered.
    """
    path = _path(store, name)
    if _measured_on(path) != (_FORMAT, store.revision(revision).weights_digest, texts):
        return None
    if not _is_whole(store, path):
        remove(path)
        return None
    try:
        sides = _FileTensors(path)
        inputs_of = json.loads(sides.label["inputs_of"])
        return FisherMoments(sides, dict(inputs_of), int(sides.label["tokens"]))
    except (KeyError, TypeError, ValueError, RecursionError):  # no version of kvedit wrote it
        remove(path)
        return None


def _is_whole(store: Store, path: Path) -> bool:
    """Whether a file has its digest; one that did not change since is not read again."""
    files, digest = known_files.stamps([path]), f"sealed {path.name}"
    if known_files.are_known(store, digest, files):
        return True
    if whole := caches.is_whole(path):
        known_files.remember(store, digest, files)
    return whole


def _measured_on(path: Path) -> tuple[str, str, str] | None:
    """The form of a file's moments and the digests of the weights and of the texts that they were
    measured on.
    """
    try:
        with mapping(path), safe_open(path, framework="pt") as stream:
            label = stream.metadata() or {}
            return label.get("format", ""), label.get("weights", ""), label.get("texts", "")
    except KveditError:
        return None  # its bytes may be sound; it is measured again
    except (OSError, SafetensorError):
        remove(path)
        return None


def _path(store: Store, name: str) -> Path:
    return store.cache / f"{name}-fisher.safetensors"


class _FileTensors(Mapping[str, Tensor]):
    """The fp32 tensors of a safetensors file, each read when it is asked for.

    Not mapped: pages of a mapped file stay in a process's memory.  The file is kept open, and can
    be read when its name is gone.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        (size,) = struct.unpack("<Q", self._file.read(8))
        self._spans = json.loads(self._file.read(size))
        self.label: dict[str, str] = self._spans.pop("__metadata__")
        del self._spans[_SEAL]
        if any(span["dtype"] != "F32" for span in self._spans.values()):
            raise ValueError(f"{path} has other numbers than fp32")
        self._start = 8 + size

    def __getitem__(self, name: str) -> Tensor:
        span = self._spans[name]
        start, end = span["data_offsets"]
        data = bytearray(end - start)
        self._file.seek(self._start + start)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=torch.float32).view(span["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)
