"""PEFT's rank allocator, with its arithmetic done for all matrices of one shape at once.

AdaLoRA (Zhang et al. 2023, arXiv:2303.10512, equations 8 to 11) scores each singular value and the
entries of its two vectors by ``|w * dL/dw|``, smoothed over steps, and by a smoothed deviation from
that, and prunes the ranks with the lowest scores.  Matrix by matrix this took a sixth of the
kernels of a step, and launching kernels is what a GPU waits for.  The smoothed scores stay in the
allocator's own dictionaries, as views of the tensors here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.adapter.batched import NAME, BatchedAdapters

SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""PEFT's names: the last importance, its running mean, the running mean of the deviation."""
Tensors = list[Tensor] | tuple[Tensor, ...]


class BatchedAllocator:
    """Replaces the arithmetic of a ``RankAllocator`` of PEFT; the allocator decides as before."""

    def __init__(
        self, allocator: Any, batches: Sequence[tuple[BatchedAdapters, Sequence[str]]]
    ) -> None:
        self._allocator = allocator
        self._batches = [adapters for adapters, _ in batches]
        self._names = [
            [f"{name}.{kind}.{NAME}" for name in names]
            for _, names in batches
            for kind in ("lora_A", "lora_B", "lora_E")
        ]
        self._scores: dict[str, Tensors] = {}
        self._masks: tuple[Any, list[Tensor]] = (None, [])  # a rank pattern, and its masks
        # PEFT has no hooks for these.
        setattr(allocator, "update_ipt", self._update_scores)  # noqa: B010
        setattr(allocator, "mask_using_rank_pattern", self._mask)  # noqa: B010

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The scores by kind and by the name of PEFT's parameter, on the CPU."""
        kinds = {kind: getattr(self._allocator, kind) for kind in SCORES}
        return {
            kind: {name: part.detach().to("cpu", copy=True) for name, part in parts.items()}
            for kind, parts in kinds.items()
        }

    def resume(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the scores."""
        self._allocator.reset_ipt()
        devices = [tensor.device for tensor in self._values()]
        for kind, parts in state.items():
            if parts:
                scores = [torch.stack([parts[name] for name in names]) for names in self._names]
                self._set(kind, [one.to(at) for one, at in zip(scores, devices, strict=True)])

    def _values(self) -> list[Tensor]:
        return [v for one in self._batches for v in (one.factor_a, one.factor_b, one.e)]

    def _set(self, kind: str, scores: Tensors) -> None:
        self._scores[kind] = scores
        parts = getattr(self._allocator, kind)
        for names, batch in zip(self._names, scores, strict=True):
            parts.update(zip(names, batch.unbind(), strict=True))

    @torch.no_grad()
    def _update_scores(self, _: nn.Module) -> None:
        """``RankAllocator.update_ipt``, by the gradients of this step."""
        allocator, values = self._allocator, self._values()
        if not allocator.ipt:
            self._scores = {kind: [torch.zeros_like(v) for v in values] for kind in SCORES}
        gradients: list[Tensor] = []
        for one in self._batches:
            of_e = torch.zeros_like(one.e) if one.e.grad is None else one.e.grad
            gradients += [*one.factor_gradients(), of_e]
        importance = torch._foreach_abs(torch._foreach_mul(values, gradients))
        mean = _smoothed(self._scores["exp_avg_ipt"], importance, allocator.beta1)
        deviation = torch._foreach_abs(torch._foreach_sub(importance, mean))
        uncertainty = _smoothed(self._scores["exp_avg_unc"], deviation, allocator.beta2)
        for kind, scores in zip(SCORES, (importance, mean, uncertainty), strict=True):
            self._set(kind, scores)

    @torch.no_grad()
    def _mask(self, _: nn.Module, pattern: Mapping[str, Sequence[bool]]) -> None:
        """``RankAllocator.mask_using_rank_pattern``: E is set to zero where a rank is pruned."""
        if self._masks[0] is not pattern:
            self._masks = (
                pattern,
                [
                    ~torch.tensor([pattern[name] for name in names], device=one.e.device)[..., None]
                    for names, one in zip(self._names[2::3], self._batches, strict=True)
                ],
            )
        for mask, one in zip(self._masks[1], self._batches, strict=True):
            one.e.masked_fill_(mask, 0.0)


def _smoothed(before: Tensors, now: Tensors, decay: float) -> Tensors:
    """``decay * before + (1 - decay) * now``."""
    old, new = torch._foreach_mul(before, decay), torch._foreach_mul(now, 1 - decay)
    return torch._foreach_add(old, new)
