"""The blocks below the edited ones, of which each of several processes keeps a piece.

No edit touches them and no gradient passes them, so they need not lie whole in every process.  Each
block's parameters are one row of bytes, cut into as many pieces as there are processes; a process
that runs the block asks for it, all send their pieces, and what was put together is dropped when
the block has run.  (The frozen part of what FSDP does, without its condition that all processes run
the model equally often: here texts are dealt out, and a process may have none.)

Invariants:
- A block that runs has the bytes it was loaded with.
- Between runs a process holds its own piece of each block and no more.
- Parameters that something else uses as well stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kvedit.errors import ModelError

if TYPE_CHECKING:
    from kvedit.distributed.crew import Crew

ALIGNED = 64
"""Where each parameter begins, in bytes: a view of another type must not begin just anywhere."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter's bytes lie in its block's row."""

    parameter: nn.Parameter
    start: int
    shape: torch.Size

    def view(self, row: Tensor) -> Tensor:
        """The parameter's values in the whole row."""
        dtype = self.parameter.dtype
        size = prod(self.shape) * dtype.itemsize
        return row[self.start : self.start + size].view(dtype).view(self.shape)


class _Block:
    """One block: this process's piece of it, and where its parameters lie in the whole."""

    def __init__(self, parameters: Sequence[nn.Parameter], rank: int, count: int) -> None:
        self._count = count
        self._places: list[_Place] = []
        rows, at = [], 0
        for parameter in parameters:
            self._places.append(_Place(parameter, at, parameter.shape))
            row = parameter.data.contiguous().view(-1).view(torch.uint8)
            rows.append(_filled(row, ALIGNED))
            at += len(rows[-1])
        whole = _filled(torch.cat(rows), ALIGNED * count)
        piece = len(whole) // count
        self.own = whole[rank * piece : (rank + 1) * piece].clone()
        self.drop()

    def gather(self) -> Tensor:
        """The whole row, from the pieces of all processes, which do this together."""
        whole = self.own.new_empty(self._count * len(self.own))
        dist.all_gather(list(whole.chunk(self._count)), self.own)
        return whole

    def fill(self, whole: Tensor) -> None:
        """Give the parameters their values."""
        for place in self._places:
            place.parameter.data = place.view(whole)

    def drop(self) -> None:
        """Let go of all values but this process's own piece."""
        for place in self._places:
            place.parameter.data = place.parameter.data.new_empty(0)


def _filled(row: Tensor, multiple: int) -> Tensor:
    """A row of bytes, with zeros to a multiple of a length."""
    return nn.functional.pad(row, (0, -len(row) % multiple))


class Shards:
    """The pieces of some blocks; made once, after which the blocks fetch what they need."""

    def __init__(self, crew: Crew, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Raises ModelError for packed weights, and where hooks already fetch the blocks."""
        self._crew = crew
        self._wanted: int | None = None
        _refuse(model, blocks)
        inside = {id(module) for block in blocks for module in block.modules()}
        others = (m for m in model.modules() if id(m) not in inside)
        shared = {id(p) for module in others for p in module.parameters(recurse=False)}
        self._blocks = []
        for index, block in enumerate(blocks):
            own = [p for p in block.parameters() if id(p) not in shared]
            shared |= {id(p) for p in own}
            self._blocks.append(_Block(own, crew.rank, crew.count))
            block.forward = partial(self._run, index, block.forward)
        crew.lends(self._serve)

    @property
    def bytes(self) -> int:
        """What this process keeps of all blocks."""
        return sum(block.own.nbytes for block in self._blocks)

    def to(self, device: torch.device) -> None:
        """Keep the pieces there; blocks are put together where they are kept."""
        for block in self._blocks:
            block.own = block.own.to(device)

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Run a block with its parameters there."""
        self._wanted = index
        try:
            self._crew.want(index)
            return forward(*args, **more)
        finally:
            self._wanted = None
            self._blocks[index].drop()

    def _serve(self, index: int) -> None:
        """Take part in putting a block together, for whoever wants it."""
        whole = self._blocks[index].gather()
        if index == self._wanted:
            self._blocks[index].fill(whole)


def _refuse(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    packed = any(not p.is_floating_point() for block in blocks for p in block.parameters())
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if packed or hooked:
        why = "its weights are packed" if packed else "a device map moves its parts about"
        raise ModelError(
            f"this model cannot be shared out over processes: {why}",
            hint="Take [model] shard out of kvedit.toml, or load the model without that.",
        )
