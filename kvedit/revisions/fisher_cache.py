"""Fisher moments beside the store, so that they are not measured again at every start.

Invariant: moments are read only if the file is whole and they were measured on the same weights and
the same texts.  The files are a cache and may be deleted at any time.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from kvedit.adapter.fisher import FisherMoments
from kvedit.files import clean_temporary, disk_errors, remove, write_atomic
from kvedit.store.store import Store


def write(store: Store, revision: int, name: str, fisher: FisherMoments, texts: str = "") -> None:
    """Keep moments that were measured at a revision.

    ``texts`` is a digest of the texts that they were measured on, where the weights do not say it.
    """
    path = _path(store, name)
    weights = store.revision(revision).weights_digest
    if _measured_on(path) == (weights, texts):
        return
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        clean_temporary(path.parent)
    label = {"revision": str(revision), "weights": weights, "texts": texts}
    first_names: dict[int, str] = {}  # q, k and v share the moments of their inputs
    tensors = {}
    for part, tensor in fisher.to_tensors().items():
        first = first_names.setdefault(tensor.data_ptr(), part)
        if first == part:
            tensors[part] = tensor.contiguous()
        else:
            label[f"same:{part}"] = first
    write_atomic(path, save_tensors(tensors, label))


def read(store: Store, revision: int, name: str, texts: str = "") -> FisherMoments | None:
    """The moments of this revision's weights and of these texts; None if they are not there."""
    path = _path(store, name)
    if _measured_on(path) != (store.revision(revision).weights_digest, texts):
        return None
    with safe_open(path, framework="pt") as stream:
        tensors = {part: stream.get_tensor(part) for part in stream.keys()}  # noqa: SIM118
        label = stream.metadata()
    for part, first in label.items():
        if part.startswith("same:"):
            tensors[part.removeprefix("same:")] = tensors[first]
    return FisherMoments.from_tensors(tensors)


def _measured_on(path: Path) -> tuple[str, str] | None:
    """The digests of the weights and of the texts that a file's moments were measured on."""
    try:
        with safe_open(path, framework="pt") as stream:
            label = stream.metadata() or {}
            return label.get("weights", ""), label.get("texts", "")
    except (OSError, SafetensorError):
        remove(path)
        return None


def _path(store: Store, name: str) -> Path:
    return store.cache / f"{name}-fisher.safetensors"
