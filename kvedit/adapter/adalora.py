"""An AdaLoRA adapter (Zhang et al. 2023, arXiv:2303.10512), wrapped once and reset for every edit.

It is PEFT's: its modules hold the factors.  The change of a matrix is ``B diag(E) A``.  What is
trained is ``A'`` or ``B'`` in the whitened coordinates of ``fisher``, with ``A = A' right`` and
``B = left B'``, so that ``penalty`` (the predicted harm to protected text, K-FAC) is the squared
Frobenius norm of ``B' diag(E) A'``.

The other side is frozen: orthonormal directions, the leading singular vectors of the loss's
gradient.  So the change is linear in what is trained, and its penalty is that side's squared norm.

AdaLoRA gives each matrix a rank of its own within a budget for all, by the importance of singular
values, which it has to estimate while it trains.  In whitened coordinates the gradient's singular
values say it before the first step: how much of the loss a direction takes away for the same harm.
So ``reset`` keeps the largest over all matrices, and E is one for those and zero for the others
(with 12 ranks a matrix the harm was that of 16 dealt out evenly, docs/log/2026-11-28.md).

The forward pass is ``x W^T + ((x A^T) diag(E)) B^T`` and its gradients go straight to the factors:
``W + B diag(E) A``, as the merge will leave it, and its gradient would be as large as the model.
The merge rounds that sum once more to the served dtype, by no more than outputs are rounded.

Invariants:
- Outside of training the adapter is off and the model computes with its own weights alone.
- ``factors`` is what the forward pass computed, without the ranks that were not allocated.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.adapter.batched import NAME, BatchedAdapters
from kvedit.adapter.deltas import Factors
from kvedit.adapter.fisher import WhiteningFactors
from kvedit.adapter.start import Directions
from kvedit.model.upcast import operand


def group_rank(rank: int, facts: int) -> int:
    """The rank for a group: ``rank`` for 64 facts, growing with the square root of their number."""
    return max(2, math.ceil(rank * math.sqrt(facts / 64)))


class Adapter:
    """AdaLoRA over the named matrices of a model."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], *, init_rank: int, target_rank: int
    ) -> None:
        """Wrap the modules in place, each with ``init_rank``, of which ``target_rank`` are used on
        average; PEFT requires that ``init_rank`` is the larger one.
        """
        from peft import AdaLoraConfig
        from peft.tuners.adalora import AdaLoraModel

        self.ranks = (init_rank, target_rank)
        config = AdaLoraConfig(
            init_r=init_rank, target_r=target_rank, lora_alpha=init_rank, lora_dropout=0.0,
            orth_reg_weight=0.0, target_modules=list(names), total_step=1,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of tied embeddings, which are not touched
            self._tuner: Any = AdaLoraModel(model, config, NAME)  # type: ignore[no-untyped-call]
        self._batches = _batched(model, names)
        for adapters, _ in self._batches:
            for at, module in enumerate(adapters.modules):
                module.forward = partial(_forward, module, adapters, at)
        self.turn(on=False)

    def unwrap(self) -> None:
        """Give the model its own modules back; the adapter cannot be used afterwards."""
        self._tuner.unload()

    def turn(self, *, on: bool) -> None:
        """Whether the forward pass uses the adapter."""
        (self._tuner.enable_adapter_layers if on else self._tuner.disable_adapter_layers)()

    def reset(
        self,
        whitening: Mapping[str, WhiteningFactors],
        directions: Mapping[str, Directions],
        penalty_gradient: Callable[[str, Tensor, bool], Tensor | None],
        *,
        allocate: bool,
    ) -> None:
        """Start an edit: the frozen side spans the steepest directions of the new facts' loss, the
        other one is zero.

        ``directions`` are those of that loss (see ``start``).  ``penalty_gradient`` multiplies
        rows with half a matrix's gradient of the Fisher penalty at the accumulated delta (see
        ``fisher``), None for zero: a later edit may undo what earlier ones moved.  ``allocate``:
        deal out ``target_rank`` times the number of matrices over all of them; otherwise every
        matrix has ``init_rank``.
        """
        smallest = self._smallest_value(directions) if allocate else 0.0
        for adapters, names in self._batches:
            adapters.start(
                [whitening[name] for name in names],
                [directions[name].above(smallest) for name in names],
                [partial(penalty_gradient, name) for name in names],
            )
            adapters.clear_gradients()

    def end(self) -> None:
        """After an edit: keep the modules, and no memory that the next ``reset`` takes again."""
        for adapters, _ in self._batches:
            adapters.end()

    def _smallest_value(self, directions: Mapping[str, Directions]) -> float:
        """The smallest singular value within the budget of ranks."""
        values = torch.cat([one.values.cpu() for one in directions.values()])
        budget = min(len(values), self.ranks[1] * len(directions))
        return float(values.topk(budget).values[-1])

    def state(self) -> dict[str, Any]:
        """The coordinates of each matrix, on the CPU."""
        return {
            name: tuple(part[at].detach().to("cpu", copy=True) for part in adapters.coordinates)
            for adapters, names in self._batches
            for at, name in enumerate(names)
        }

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from the ``state`` of an edit that was reset in the same way as this one."""
        for adapters, names in self._batches:
            for at, name in enumerate(names):
                for part, saved in zip(adapters.coordinates, state[name], strict=True):
                    part[at].copy_(saved)
            adapters.values_changed()

    def starting_values(self) -> list[Tensor]:
        """All E, A' and B', frozen factors too."""
        return [part for adapters, _ in self._batches for part in adapters.coordinates]

    def trained(self) -> list[Tensor]:
        """What is trained, A' or B', one tensor for all matrices of a shape."""
        return [adapters.trained for adapters, _ in self._batches]

    @torch.no_grad()
    def write(self) -> None:
        """Compute PEFT's A and B from A' and B', before the forward passes of a step."""
        for adapters, _ in self._batches:
            adapters.write_factors()

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """All that ``read_gradients`` reads, zeros where a backward pass left nothing: processes
        that share a step sum these in place before it.
        """
        return [gradient for adapters, _ in self._batches for gradient in adapters.gradients()]

    @torch.no_grad()
    def read_gradients(self) -> None:
        """Compute the gradients of what is trained from PEFT's A and B, after a backward pass."""
        for adapters, _ in self._batches:
            adapters.read_gradient()

    def penalty(self) -> Tensor:
        """Predicted harm to protected text: the sum of |B' diag(E) A'|^2 over all matrices, and the
        gradient term of the accumulated delta; a scalar, twice the nats a token (see ``fisher``).
        """
        penalties = [adapters.penalty() for adapters, _ in self._batches]
        return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum()

    def clear_gradients(self) -> None:
        """Drop the gradients of a step."""
        for adapters, _ in self._batches:
            adapters.clear_gradients()

    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """The change of each matrix, on the CPU in fp32; matrices without a rank are left out."""
        self.write()
        delta = {}
        for one, names in self._batches:
            for name, e, a, b in zip(names, one.e, one.factor_a, one.factor_b, strict=True):
                if bool((ranks := e[:, 0] != 0).any()):
                    delta[name] = Factors(b[:, ranks].cpu(), (a * e * one.scale)[ranks].cpu())
        return delta


def _batched(model: nn.Module, names: Sequence[str]) -> list[tuple[BatchedAdapters, list[str]]]:
    """The wrapped modules by shape, device and scale, with their names."""
    alike: dict[Any, list[str]] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        a, b = module.lora_A[NAME], module.lora_B[NAME]
        scale = float(module.scaling[NAME] / (module.ranknum[NAME].detach() + 1e-5))
        alike.setdefault((a.shape, b.shape, a.device, scale), []).append(name)
    return [
        (BatchedAdapters([model.get_submodule(name) for name in members], scale), members)
        for (*_, scale), members in alike.items()
    ]


def _forward(module: Any, adapters: BatchedAdapters, at: int, x: Tensor) -> Tensor:
    """The forward pass of a wrapped matrix, the one with index ``at`` of the batched adapters."""
    layer = module.base_layer
    if module.disable_adapters:
        unedited: Tensor = layer(x)
        return unedited
    # Conv1D keeps its weight the other way round.
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
    x = x.to(weight.device)  # as accelerate's hook does, which only runs in ``layer(x)``
    y: Tensor = _EditedProduct.apply(x, weight, module.lora_E[NAME], adapters, at)  # type: ignore[no-untyped-call]
    return y if layer.bias is None else y + layer.bias


class _EditedProduct(torch.autograd.Function):
    """``x (W + B diag(E) A)^T`` (..., out) for x (..., in).

    The gradients of the factors are summed over all batches of a step where the adapters are.
    (``e`` is an argument so that autograd calls ``backward`` even where x needs no gradient.)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, e: Tensor, adapters: BatchedAdapters, at: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.adapters, ctx.at = adapters, at
        y = adapters.multiply(at, operand(x.flatten(0, -2)), operand(weight))
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        rows, of_rows = operand(x.flatten(0, -2)), operand(gradient.flatten(0, -2))
        by = operand(weight) if ctx.needs_input_grad[0] else None
        of_x = ctx.adapters.multiply_back(ctx.at, rows, of_rows, by)
        if of_x is not None:
            of_x = of_x.to(x.dtype).view(x.shape)
        return of_x, None, None, None, None
