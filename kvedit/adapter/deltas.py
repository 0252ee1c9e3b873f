"""Deltas: what an edit adds to the weights, and the full-precision copy they are added to.

Invariants:
- The master copy is fp32 and the only thing deltas are added to; the served weights are cast from
  it, once, so that thousands of small deltas are not lost to bf16 rounding.
- Adding the same deltas in the same order gives the same bits: sums are formed in fp64 and rounded
  once for each delta.
- A delta's bytes depend on its factors alone, so its SHA-256 names it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from kvedit.errors import CorruptStoreError, ModelMismatchError
from kvedit.files import verify_manifest, write_atomic, write_manifest
from kvedit.model.loading import weights_digest

_MASTER_FILE = "master.safetensors"
_BLOCK = 2**18  # fp64 numbers of a sum formed at a time: they stay in the processor's cache
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


class Master:
    """The touched matrices of a model in fp32, and the model's own copy cast from them."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._weights = {name: _weight(model, name) for name in names}
        # Copies: ``to`` alone gives an fp32 model's own memory, which serving then overwrites.
        self._base = {
            name: weight.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, weight in self._weights.items()
        }
        self._master = dict(self._base)
        self._stale: set[str] = set()  # matrices whose cast may not be in the model yet

    @property
    def matrices(self) -> Mapping[str, Tensor]:
        """The touched matrices in full precision, (out, in), fp32, on the CPU."""
        return self._master

    def served(self) -> dict[str, Tensor]:
        """The model's own copy of them, (out, in), in its dtype and on its device."""
        return dict(self._weights)

    def snapshot(self) -> dict[str, Tensor]:
        """The state that ``restore`` comes back to; cheap: no tensor is changed in place."""
        return dict(self._master)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put a snapshot back, bit-exactly; what did not change since is not cast again."""
        changed = [name for name, tensor in state.items() if tensor is not self._master[name]]
        self._master = dict(state)
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
            old = self._master.get(name)
            if old is None or old.shape != (factors.b.shape[0], factors.a.shape[1]):
                raise ModelMismatchError(
                    f"a delta for {name} does not fit this model",
                    hint="Open the store with the model that it was made for.",
                )
            changed[name] = _sum(old, factors)
        self._master |= changed
        self._serve(delta)

    def _serve(self, names: Iterable[str]) -> None:
        """Cast these, and any that an interrupted call before has left."""
        self._stale.update(names)
        for name in sorted(self._stale):
            weight = self._weights[name]
            with torch.no_grad():
                weight.copy_(self._master[name].to(weight.dtype))
            self._stale.discard(name)

    def write_into(self, model: nn.Module) -> None:
        """Give another copy of the base model these weights, cast to its own dtype."""
        for name, master in self._master.items():
            weight = _weight(model, name)
            with torch.no_grad():
                weight.copy_(master.to(weight.dtype))

    def digest(self) -> str:
        """SHA-256 of the touched matrices as served."""
        return weights_digest(iter(self._weights.items()))

    def accumulated_delta(self) -> dict[str, Tensor]:
        """Each matrix's difference from the base, (out, in), fp32."""
        return {name: self._master[name] - base for name, base in self._base.items()}

    @cached_property
    def _base_norms(self) -> dict[str, Tensor]:
        return {name: base.norm().clamp_min(_MIN_NORM) for name, base in self._base.items()}

    def norms(self) -> dict[str, float]:
        """Relative Frobenius norms of the accumulated deltas: as a share of the base matrix's."""
        return {
            name: float(_distance(self._master[name], self._base[name]) / norm)
            for name, norm in self._base_norms.items()
        }

    def write_checkpoint(self, folder: Path) -> str:
        """Write the master copy to a folder, its manifest last; returns the manifest's digest."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / _MASTER_FILE, save_tensors(self._master))
        return write_manifest(folder)

    def read_checkpoint(self, folder: Path, digest: str) -> None:
        """Load a checkpoint; raises CorruptStoreError when any part is missing or altered."""
        verify_manifest(folder, digest)
        try:
            tensors = load_tensors((folder / _MASTER_FILE).read_bytes())
        except (OSError, SafetensorError) as error:
            raise CorruptStoreError(f"the checkpoint {folder} cannot be read: {error}") from error
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in self._base.items()}:
            raise CorruptStoreError(f"the checkpoint {folder} is for other matrices")
        self._master = {name: tensors[name] for name in self._base}
        self._serve(self._master)


def _sum(old: Tensor, change: Factors) -> Tensor:
    """(out, in): ``old + b @ a``, formed in fp64 and rounded once to fp32."""
    a, b = change.a.double(), change.b.double()
    total, rows = torch.empty_like(old), _block_rows(old)
    buffer = old.new_empty(rows, old.shape[1], dtype=torch.float64)
    for out, before, left in zip(*(torch.split(x, rows) for x in (total, old, b)), strict=True):
        block = buffer[: len(before)]
        torch.mm(left, a, out=block)
        out.copy_(block.add_(before))
    return total


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """The Frobenius norm of the difference, a scalar."""
    blocks = zip(*(torch.split(x, _block_rows(one)) for x in (one, other)), strict=True)
    norm: Tensor = torch.stack([(first - second).norm() for first, second in blocks]).norm()
    return norm


def _block_rows(matrix: Tensor) -> int:
    return max(1, _BLOCK // matrix.shape[1])


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
