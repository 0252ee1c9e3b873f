"""Deltas: what an edit adds to the weights, and the full-precision weights they are added to.

Invariants:
- The master weights are fp32 and the only thing deltas are added to; the served ones are cast from
  them, once, so that thousands of small deltas are not lost to bf16 rounding.
- In memory a master matrix is a ``Split``: what is served, which is the model's own, and what that
  leaves out.  A matrix that no edit changed costs nothing, and none is ever formed as a whole here.
- Adding the same deltas in the same order gives the same bits: sums are formed in fp64 and rounded
  once for each delta.
- A delta's bytes depend on its factors alone, so its SHA-256 names it.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from kvedit.adapter.split import Split, Splitter, row_blocks, split
from kvedit.errors import CorruptStoreError, KveditError, ModelMismatchError
from kvedit.files import verify_manifest, write_manifest
from kvedit.mapped import mapping, system_error
from kvedit.model.loading import weights_digest

MASTER_FILE = "master.safetensors"
_MIN_NORM = 1e-12  # keeps the relative norm of a matrix of zeros finite


@dataclass(frozen=True, slots=True)
class Factors:
    """One matrix's change: ``b`` (out, rank) @ ``a`` (rank, in), fp32, including scale and E."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """How many rank-one terms it has."""
        return self.a.shape[0]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is a change of a matrix of this shape."""
        sides = (self.b, self.a)
        if not all(side.dim() == 2 and side.is_floating_point() for side in sides):
            return False
        return (*self.b.shape, *self.a.shape) == (shape[0], self.rank, self.rank, shape[1])


Delta = Mapping[str, Factors]


def joined(first: Delta, second: Delta) -> dict[str, Factors]:
    """The sum of two deltas, with their ranks added."""
    delta = {**first, **second}
    for name in first.keys() & second.keys():
        one, two = first[name], second[name]
        delta[name] = Factors(torch.cat([one.b, two.b], 1), torch.cat([one.a, two.a]))
    return delta


def to_bytes(delta: Delta) -> bytes:
    """A delta as safetensors."""
    sides = {f"{name}.a": factors.a for name, factors in delta.items()}
    sides |= {f"{name}.b": factors.b for name, factors in delta.items()}
    return save_tensors({name: side.contiguous() for name, side in sides.items()})


def from_bytes(data: bytes) -> dict[str, Factors]:
    """The inverse of ``to_bytes``; raises CorruptStoreError."""
    try:
        tensors = load_tensors(data)
        names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
        return {name: Factors(tensors[f"{name}.b"], tensors[f"{name}.a"]) for name in names}
    except (SafetensorError, KeyError) as error:
        raise CorruptStoreError(
            f"a delta cannot be read: {error}", hint="Run kvedit doctor, or restore a backup."
        ) from error


Snapshot = Mapping[str, Split]


class Master:
    """The touched matrices of a model in full precision, and the model's own, cast from them."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._weights = {name: _weight(model, name) for name in names}
        self._base = {name: Split(_own(weight)) for name, weight in self._weights.items()}
        self._state = dict(self._base)
        self._stale: set[str] = set()  # matrices whose cast may not be in the model yet

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """(out, in) of each touched matrix."""
        return {name: base.shape for name, base in self._base.items()}

    @property
    def matrices(self) -> Mapping[str, Tensor]:
        """The touched matrices in full precision, (out, in), fp32, on the CPU; each is formed when
        it is asked for, and not kept.
        """
        return _Formed(self._base, lambda name: self._state[name].rows())

    def served(self) -> dict[str, Tensor]:
        """The model's own copy of them, (out, in), in its dtype and on its device."""
        return dict(self._weights)

    def snapshot(self) -> dict[str, Split]:
        """The state that ``restore`` comes back to; cheap: no tensor is changed in place."""
        return dict(self._state)

    def restore(self, state: Snapshot) -> None:
        """Put a snapshot back, bit-exactly; what did not change since is not cast again."""
        changed = [name for name, own in state.items() if own is not self._state[name]]
        self._state = dict(state)
        self._serve(changed)

    def reset(self) -> None:
        """Back to the base model."""
        self.restore(self._base)

    def add(self, delta: Delta) -> None:
        """Add a delta and cast the matrices it touches to the served dtype.

        Raises ModelMismatchError, and changes nothing, when it was made for other matrices.
        """
        changed = {}
        for name, factors in delta.items():
            old = self._state.get(name)
            if old is None or not factors.fits(old.shape):
                raise ModelMismatchError(
                    f"a delta for {name} does not fit this model",
                    hint="Open the store with the model that it was made for.",
                )
            changed[name] = _sum(old, factors)
        self._state |= changed
        self._serve(delta)

    def _serve(self, names: Iterable[str]) -> None:
        """Cast these, and any that an interrupted call before has left."""
        self._stale.update(names)
        for name in sorted(self._stale):
            _set(self._weights[name], self._state[name].served)
            self._stale.discard(name)

    def write_into(self, model: nn.Module) -> None:
        """Give another copy of the base model these weights, cast to its own dtype."""
        for name, own in self._state.items():
            weight = _weight(model, name)
            with torch.no_grad():
                for part, block in own.blocks():
                    weight[part].copy_(block.to(weight.dtype))

    def digest(self) -> str:
        """SHA-256 of the touched matrices as served."""
        return weights_digest(iter(self._weights.items()))

    def accumulated_delta(self) -> Mapping[str, Tensor]:
        """Each matrix's difference from the base, (out, in), fp32, formed when it is asked for."""
        state = self._state

        def difference(name: str) -> Tensor:
            total = torch.zeros(self._base[name].shape)
            for part, block in _differences(state[name], self._base[name]):
                total[part] = block
            return total

        return _Formed(self._base, difference)

    @cached_property
    def _base_norms(self) -> dict[str, float]:
        return {name: max(_norm(base.blocks()), _MIN_NORM) for name, base in self._base.items()}

    def norms(self) -> dict[str, float]:
        """Relative Frobenius norms of the accumulated deltas: as a share of the base matrix's."""
        return {
            name: _norm(_differences(self._state[name], self._base[name])) / norm
            for name, norm in self._base_norms.items()
        }

    def write_checkpoint(self, folder: Path) -> str:
        """Write the matrices that differ from the base to a folder, its manifest last; returns the
        manifest's digest.  Raises OSError or KveditError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, own in self._state.items():
            if own is not self._base[name]:
                parts = {"": own.served, _REMAINDER: own.remainder, _TIES: own.ties}
                tensors |= {name + end: x.contiguous() for end, x in parts.items() if x is not None}
        try:
            save_file(tensors, folder / MASTER_FILE, {"matrices": self._identity})
        except SafetensorError as error:
            if (system := system_error(error)) is not None:
                raise system from error
            what = f"cannot write {folder}: {error}"
            raise KveditError(what, hint="Look at its disk, and try again.") from error
        return write_manifest(folder)

    def read_checkpoint(self, folder: Path, digest: str, *, trusted: bool = False) -> None:
        """Serve a checkpoint: its file is mapped, and read where it is used.

        Raises CorruptStoreError when any part is missing or altered, KveditError when it cannot be
        mapped, and changes nothing; ``trusted``: that was checked before.
        """
        if not trusted:
            verify_manifest(folder, digest)
        hint = "Run `kvedit doctor --fix`."
        try:
            with mapping(folder / MASTER_FILE):
                state = self._mapped(folder / MASTER_FILE)
        except (FileNotFoundError, SafetensorError) as error:
            what = f"the checkpoint {folder} cannot be read: {error}"
            raise CorruptStoreError(what, hint=hint) from error
        if state is None:
            raise CorruptStoreError(f"the checkpoint {folder} is for other matrices", hint=hint)
        self.restore(self._base | state)

    def _are_parts(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether every tensor has the shape of its matrix, and what is served its dtype."""
        for name, tensor in tensors.items():
            own = self._base.get(name.removesuffix(_REMAINDER).removesuffix(_TIES))
            if own is None or (tensor.shape != own.shape and not name.endswith(_TIES)):
                return False
            if name in self._base and tensor.dtype != own.served.dtype:
                return False
        return True

    @cached_property
    def _identity(self) -> str:
        """Of which matrices a checkpoint is: SHA-256 of names, shapes and dtypes."""
        form = [(name, tuple(own.shape), str(own.served.dtype)) for name, own in self._base.items()]
        return hashlib.sha256(repr(form).encode()).hexdigest()

    def _mapped(self, path: Path) -> dict[str, Split] | None:
        """The matrices of a checkpoint; None if it is for others."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            identity = (file.metadata() or {}).get("matrices")
        if identity is None:  # of format 1: all matrices, in fp32
            if {n: t.shape for n, t in tensors.items()} != self.shapes:
                return None
            return {n: split(t, self._base[n].served.dtype) for n, t in tensors.items()}
        if identity != self._identity or not self._are_parts(tensors):
            return None
        return {
            name: Split(tensors[name], tensors.get(name + _REMAINDER), tensors.get(name + _TIES))
            for name in self._base.keys() & tensors.keys()
        }


_REMAINDER, _TIES = ".remainder", ".ties"  # of a matrix, in a checkpoint


class _Formed(Mapping[str, Tensor]):
    """Matrices that are formed one at a time, each time they are asked for."""

    def __init__(self, names: Iterable[str], form: Callable[[str], Tensor]) -> None:
        self._names, self._form = dict.fromkeys(names), form

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._form(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _sum(old: Split, change: Factors) -> Split:
    """``old + b @ a``, formed in fp64 and rounded once to fp32."""
    a, b = change.a.double(), change.b.double()
    new = Splitter(old.shape, old.served.dtype)
    parts = row_blocks(old.shape)
    buffer = torch.empty(parts[0].stop, old.shape[1], dtype=torch.float64)
    for part in parts:
        block = buffer[: part.stop - part.start]
        torch.mm(b[part], a, out=block)
        new.put(part, block.add_(old.rows(part)))
    return new.done()


def _differences(one: Split, other: Split) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the difference, and where they are; none for one and the same matrix."""
    if one is not other:
        for part, block in one.blocks():
            yield part, block - other.rows(part)


def _norm(blocks: Iterable[tuple[slice, Tensor]]) -> float:
    """The Frobenius norm of a matrix that is given in blocks."""
    return math.hypot(*(float(block.norm()) for _, block in blocks))


def _own(weight: Tensor) -> Tensor:
    """(out, in), on the CPU, never written to: the model's own memory where serving replaces it."""
    kept = weight.detach()
    return kept if _is_replaced(weight) else kept.to("cpu", copy=True).contiguous()


def _is_replaced(weight: Tensor) -> bool:
    """Whether the model is given another tensor, and not other numbers in the same one: that needs
    a whole parameter (not a Conv1D's, turned) on the CPU.
    """
    return isinstance(weight, nn.Parameter) and weight.device.type == "cpu"


@torch.no_grad()
def _set(weight: Tensor, served: Tensor) -> None:
    if _is_replaced(weight):
        weight.data = served
    else:
        weight.copy_(served)


def _weight(model: nn.Module, name: str) -> Tensor:
    """A linear layer's weight as (out, in): Conv1D keeps it the other way round."""
    from transformers.pytorch_utils import Conv1D

    module = model.get_submodule(name)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, rank), (in, rank) and (rank,): the leading singular vectors and their values, by
    subspace iteration.

    Halko, Martinsson and Tropp 2011, algorithm 4.4, from a fixed start: ``torch.svd_lowrank``
    draws from the global generator, which a library must not touch.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank, generator=generator).to(matrix.device)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(2):
        inner, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ inner)
    u, values, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, v.T, values
