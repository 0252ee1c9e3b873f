"""Where an adapter starts: at the steepest directions of the new facts' loss.

The gradient of a matrix is as large as the matrix in fp32.  With one batch of examples it exists
only while its directions are computed, in the middle of the backward pass; with several it is a
sum, and they go through the model as often as the sums need to fit into ``MAX_GRADIENTS``.

Invariant: the directions are those of the whole gradient, however many passes it takes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from kvedit.adapter.deltas import leading
from kvedit.adapter.fisher import WhiteningFactors, backward, measured_batches, observed
from kvedit.model.prompts import Example

MAX_GRADIENTS = 256 * 1024 * 1024  # bytes
MAX_PASSES = 8
"""Over the examples, at most, whatever ``MAX_GRADIENTS`` says."""


@dataclass(frozen=True, slots=True)
class Directions:
    """Leading singular vectors of a whitened gradient, fp32: ``left`` (out, n), ``right`` (in, n),
    and their singular values (n,); n the rank, or the shorter side where that is smaller.
    """

    left: Tensor
    right: Tensor
    values: Tensor

    def above(self, smallest: float) -> "Directions":
        """Those with at least this singular value."""
        chosen = self.values >= smallest
        return Directions(self.left[:, chosen], self.right[:, chosen], self.values[chosen])


def steepest(
    model: nn.Module,
    whitening: Mapping[str, WhiteningFactors],
    examples: Sequence[Example],
    rank: int,
) -> dict[str, Directions]:
    """For each matrix the leading singular vectors of ``left^T gradient right^T``, the gradient
    that of the examples' mean answer loss.
    """
    directions = {}

    def take(name: str, gradient: Tensor) -> None:
        steep = whitening[name].whiten(gradient)
        directions[name] = Directions(*leading(steep, min(rank, *steep.shape)))

    gradients(model, list(whitening), examples, take)
    return directions


def gradients(
    model: nn.Module,
    names: Sequence[str],
    examples: Sequence[Example],
    take: Callable[[str, Tensor], None],
) -> None:
    """Hand over the gradient of the mean answer loss with respect to each matrix, (out, in), fp32,
    one after the other.
    """
    batches = measured_batches(model, examples)
    for part in _parts(model, names) if len(batches) > 1 else [names]:
        _Pass(model, part, batches, take).run()


def _parts(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """The names in turn, so that the gradients of some of them fit into memory."""
    sizes: dict[str, int] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        sizes[name] = 4 * module.weight.numel()
    limit = max(MAX_GRADIENTS, sum(sizes.values()) // MAX_PASSES)
    part: list[str] = []
    for name in names:
        if part and sum(sizes[one] for one in part) + sizes[name] > limit:
            yield part
            part = []
        part.append(name)
    yield part


class _Pass:
    """All batches through the model, for the gradients of some matrices."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Sequence[Sequence[Example]],
        take: Callable[[str, Tensor], None],
    ) -> None:
        self._model, self._names, self._batches, self._take = model, names, batches, take
        self._inputs: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._is_last = False

    def run(self) -> None:
        """Batch by batch; in the last one each gradient is complete as soon as it is computed."""
        answers = sum(len(e.ids) - e.start for batch in self._batches for e in batch)

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(logits, targets, reduction="sum") / answers

        with observed(self._model, self._names, self._inputs.__setitem__, self._add):
            for number, batch in enumerate(self._batches, 1):
                self._is_last = number == len(self._batches)
                backward(self._model, batch, loss)

    def _add(self, name: str, of_outputs: Tensor) -> None:
        rows = of_outputs.flatten(0, -2).float()  # summed over rows and positions
        gradient = rows.T @ self._inputs.pop(name).flatten(0, -2).float()
        if name in self._sums:
            gradient = self._sums.pop(name).add_(gradient)
        if self._is_last:
            self._take(name, gradient)
        else:
            self._sums[name] = gradient
