"""An AdaLoRA adapter, PEFT's, that is wrapped once and reset for every edit.

The adapter's change of a matrix is ``B diag(E) A``.  Here A and B are not free parameters: what
is trained are ``A'`` and ``B'`` in the coordinates of ``fisher``, with ``A = A' right`` and
``B = left B'``, so that ``penalty`` (the predicted harm to protected text) is the squared Frobenius
norm of ``B' diag(E) A'``.  PEFT's modules hold the factors and its allocator prunes the ranks.

For a single fact A', B' and E are all trained.  For a group the shorter side is a frame,
orthonormal and left as it is, with E at one: the change is linear in the side that is trained, and
its price is that side's squared norm.

A matrix is run as the merge would leave it: ``W + B diag(E) A`` is formed in fp32 and cast once, so
that what is trained is what will be served (and a product with the sum is quicker than PEFT's own
forward pass, which makes five passes over the outputs).

Invariants:
- While no edit is being trained the adapter is off and the model computes its own weights alone.
- ``factors`` is what the forward pass computed, ranks that the allocator masked left out.
- The allocator's last mask is always run: ``begin_pruning`` sets its schedule from the step at
  which the fact was learned, so that an early stop never merges ranks that were to go.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.adapter.batched import NAME, Slot, Stack
from kvedit.adapter.deltas import Factors
from kvedit.adapter.fisher import WhiteningFactors
from kvedit.model.targets import is_matrix
from kvedit.model.upcast import product

_SEEN = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what PEFT's allocator judges ranks by
Tensors = list[Tensor] | tuple[Tensor, ...]
_NEVER = 1_000_000  # a step that no schedule reaches: no pruning before the fact is learned


def group_rank(rank: int, facts: int) -> int:
    """Directions of a matrix for so many facts: ``rank`` for 64, with the root of their number."""
    return max(2, math.ceil(rank * math.sqrt(facts / 64)))


class Adapter:
    """AdaLoRA over the named matrices of a model."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], *, init_rank: int, target_rank: int
    ) -> None:
        """Wrap the modules in place; ``init_rank`` must be larger than ``target_rank``."""
        from peft import AdaLoraConfig
        from peft.tuners.adalora import AdaLoraModel

        self.rank = init_rank
        self.ranks = (init_rank, target_rank)
        self._config = AdaLoraConfig(
            init_r=init_rank,
            target_r=target_rank,
            lora_alpha=init_rank,
            lora_dropout=0.0,
            orth_reg_weight=0.0,
            target_modules=list(names),
            tinit=0,
            tfinal=0,
            deltaT=1,
            total_step=_NEVER,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of tied embeddings, which are not touched
            self._tuner: Any = AdaLoraModel(model, self._config, NAME)  # type: ignore[no-untyped-call]
        self._allocator: Any = self._tuner.rankallocator
        self._stacks = _stacked(model, names)
        self._slots = {
            name: Slot(stack.modules[at], stack, at)
            for stack, own in self._stacks
            for at, name in enumerate(own)
        }
        self._ranks = _Ranks(self._allocator, self._stacks)
        for slot in self._slots.values():
            if slot.stack.lean:  # a quantised layer keeps PEFT's forward pass
                slot.module.forward = partial(_run, slot)
        self.turn(on=False)

    def unwrap(self) -> None:
        """Give the model its own modules back; the adapter is of no use afterwards."""
        self._tuner.unload()

    def turn(self, *, on: bool) -> None:
        """Let the forward pass use the adapter, or not."""
        if on:
            self._tuner.enable_adapter_layers()
        else:
            self._tuner.disable_adapter_layers()

    def reset(
        self,
        whitening: Mapping[str, WhiteningFactors],
        gradients: Mapping[str, Tensor],
        penalty_gradient: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        *,
        frozen_factor: bool = False,
    ) -> None:
        """Start an edit: A' and B' span where the fact's own gradient is steepest, E is zero.

        ``gradients`` (out, in) for each matrix are those of the new fact's loss; the leading
        singular vectors of ``left^T gradient right^T`` are the start, so that E has a gradient
        from the first step on (with A and B at random it would have to find its direction first).
        ``penalty_gradient`` (out, in) is the slope of the protected text's price where the weights are now:
        what earlier edits moved, a later one may move back.  ``weights`` (out, in) are the matrices
        as they are, in full precision where there is room for it.  With ``frozen_factor`` one side stays
        what it is at the start, the other begins at zero, and E is one.
        """
        for stack, names in self._stacks:
            stack.start(
                [whitening[name] for name in names],
                [gradients[name] for name in names],
                [penalty_gradient[name] for name in names],
                [weights[name] for name in names],
                self.rank,
                frozen_factor=frozen_factor,
            )
            stack.forget()
        self._config.tinit, self._config.tfinal = _NEVER - 2, 0
        self._config.total_step = _NEVER
        self._config.rank_pattern = None
        self._allocator.reset_ipt()

    def state(self) -> dict[str, Any]:
        """Where an edit stands, on the CPU: coordinates, and what the allocator has seen."""
        config = self._config
        return {
            "slots": {
                name: tuple(_copy(part[at]) for part in (stack.e, stack.a, stack.b))
                for stack, names in self._stacks
                for at, name in enumerate(names)
            },
            "schedule": (config.tinit, config.tfinal, config.total_step, config.rank_pattern),
            "seen": self._ranks.state(),
        }

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the ``state`` of an edit that began as this one, just reset, does."""
        for stack, names in self._stacks:
            for at, name in enumerate(names):
                own = (stack.e, stack.a, stack.b)
                for whole, part in zip(own, state["slots"][name], strict=True):
                    whole[at].copy_(part)
            stack.changed()
        config = self._config
        config.tinit, config.tfinal, config.total_step, config.rank_pattern = state["schedule"]
        self._ranks.resume(state["seen"])

    def starting_values(self) -> list[Tensor]:
        """What an edit starts from, frames as well."""
        return [part for stack, _ in self._stacks for part in (stack.e, stack.a, stack.b)]

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is trained, all matrices of one shape together: the singular values, and the
        coordinates A' and B', frames left out.
        """
        stacks = [stack for stack, _ in self._stacks]
        values = [
            stack.e for stack in stacks if not stack.frozen_factor
        ]  # a frame's E stays at one
        return values, [side for stack in stacks for side in stack.trained]

    @torch.no_grad()
    def write(self) -> None:
        """Carry A' and B' over into PEFT's A and B, before the forward passes of a step."""
        for stack, _ in self._stacks:
            stack.carry_over()

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """All that ``read_gradients`` reads, zeros where a backward pass left nothing: processes
        that share a step sum these in place before.
        """
        found: list[Tensor] = []
        for stack, _ in self._stacks:
            stack.share_out()
            found += stack.factor_gradients()
            for parameter in (stack.e, *stack.trained):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found.append(parameter.grad)
        return found

    @torch.no_grad()
    def read_gradients(self) -> None:
        """Carry the gradients of PEFT's A and B over to A' and B', after a backward pass."""
        for stack, _ in self._stacks:
            stack.share_out()
            stack.carry_back()
        # Those of A and B stay until ``allocate`` has read them.

    def penalty(self) -> Tensor:
        """Predicted harm to protected text, the sum of |B' diag(E) A'|^2, a scalar."""
        penalties = [stack.penalty() for stack, _ in self._stacks]
        return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum()

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Multiply the singular values: the proximal step of the price, whatever Adam's scale."""
        for stack, _ in self._stacks:
            stack.e.mul_(factor)

    def begin_pruning(self, step: int, *, steps: int) -> None:
        """From this step on shrink the ranks to their budget over ``steps`` steps."""
        self._config.tinit, self._config.tfinal = step, 1
        self._config.total_step = step + steps + 1

    def allocate(self, step: int) -> None:
        """Let PEFT's allocator see the step's gradients and mask; then forget them."""
        self._tuner.update_and_allocate(step)
        for stack, _ in self._stacks:
            stack.forget()

    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """The change of each matrix, on the CPU in fp32; matrices that got no rank are left out."""
        self.write()
        found = {}
        for name, slot in self._slots.items():
            kept = slot.e[:, 0] != 0
            if bool(kept.any()):
                a = (slot.module.lora_A[NAME] * slot.e * slot.stack.scale)[kept]
                b = slot.module.lora_B[NAME][:, kept]
                found[name] = Factors(b.float().cpu().clone(), a.float().cpu().clone())
        return found


class _Ranks:
    """PEFT's ``RankAllocator`` with its arithmetic done for all matrices of a shape at once.

    One by one it launched a sixth of the kernels of a step, which is what a GPU waits for.  What it
    has seen stays in its own dictionaries, as parts of what stands here.
    """

    def __init__(self, allocator: Any, stacks: Sequence[tuple[Stack, Sequence[str]]]) -> None:
        self._allocator = allocator
        self._stacks = [stack for stack, _ in stacks]
        self._names = [
            [f"{name}.{kind}.{NAME}" for name in names]
            for _, names in stacks
            for kind in ("lora_A", "lora_B", "lora_E")
        ]
        self._seen: dict[str, Tensors] = {}
        self._kept: tuple[Any, list[Tensor]] = (None, [])  # a pattern, and its masks
        # PEFT has no hooks for these.
        setattr(allocator, "update_ipt", self._look)  # noqa: B010
        setattr(allocator, "mask_using_rank_pattern", self._mask)  # noqa: B010

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What the allocator has seen, by kind and by the name of PEFT's parameter, on the CPU."""
        kinds = {kind: getattr(self._allocator, kind) for kind in _SEEN}
        return {kind: {n: _copy(part) for n, part in own.items()} for kind, own in kinds.items()}

    def resume(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set what it has seen."""
        self._allocator.reset_ipt()
        places = [tensor.device for tensor in self._values()]
        for kind, own in state.items():
            if own:
                whole = [torch.stack([own[name] for name in names]) for names in self._names]
                self._keep(kind, [one.to(at) for one, at in zip(whole, places, strict=True)])

    def _values(self) -> list[Tensor]:
        return [v for stack in self._stacks for v in (stack.factor_a, stack.factor_b, stack.e)]

    def _keep(self, kind: str, seen: Tensors) -> None:
        self._seen[kind] = seen
        parts = getattr(self._allocator, kind)
        for names, whole in zip(self._names, seen, strict=True):
            parts.update(zip(names, whole.unbind(), strict=True))

    @torch.no_grad()
    def _look(self, _: nn.Module) -> None:
        """``update_ipt``: how much each number counts, by the gradients of this step."""
        allocator, values = self._allocator, self._values()
        if not allocator.ipt:
            self._seen = {kind: [torch.zeros_like(v) for v in values] for kind in _SEEN}
        penalty_gradients = []
        for stack in self._stacks:
            of_e = torch.zeros_like(stack.e) if stack.e.grad is None else stack.e.grad
            penalty_gradients += [*stack.factor_gradients(), of_e]
        seen = torch._foreach_abs(torch._foreach_mul(values, penalty_gradients))
        mean = _smoothed(self._seen["exp_avg_ipt"], seen, allocator.beta1)
        apart = torch._foreach_abs(torch._foreach_sub(seen, mean))
        unsure = _smoothed(self._seen["exp_avg_unc"], apart, allocator.beta2)
        for kind, found in zip(_SEEN, (seen, mean, unsure), strict=True):
            self._keep(kind, found)

    @torch.no_grad()
    def _mask(self, _: nn.Module, pattern: Mapping[str, Sequence[bool]]) -> None:
        """``mask_using_rank_pattern``: E is zero where a rank was pruned, from then on."""
        of, masks = self._kept
        if of is not pattern:
            own = self._names[2::3]
            dead = [~torch.tensor([pattern[name] for name in names])[..., None] for names in own]
            masks = [
                mask.to(stack.e.device) for mask, stack in zip(dead, self._stacks, strict=True)
            ]
            self._kept = pattern, masks
        for mask, stack in zip(masks, self._stacks, strict=True):
            stack.e.masked_fill_(mask, 0.0)


def _copy(part: Tensor) -> Tensor:
    """On the CPU, in memory of its own."""
    return part.detach().to("cpu", copy=True)


def _smoothed(before: Tensors, now: Tensors, share: float) -> Tensors:
    """``share`` of what was, and the rest of what is."""
    kept, new = torch._foreach_mul(before, share), torch._foreach_mul(now, 1 - share)
    return torch._foreach_add(kept, new)


def _stacked(model: nn.Module, names: Sequence[str]) -> list[tuple[Stack, list[str]]]:
    """The wrapped modules by shape, by where they are and by whether they are plain matrices."""
    alike: dict[Any, list[str]] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        a, b = module.lora_A[NAME], module.lora_B[NAME]
        lean = _is_plain(module.base_layer)
        scale = float(module.scaling[NAME] / (module.ranknum[NAME].detach() + 1e-5))
        alike.setdefault((a.shape, b.shape, a.device, lean, scale), []).append(name)
    return [
        (Stack([model.get_submodule(name) for name in own], lean, scale), own)
        for (*_, lean, scale), own in alike.items()
    ]


def _is_plain(layer: Any) -> bool:
    """Whether a layer is a floating-point matrix that is really there: no quantisation."""
    if not is_matrix(layer) or layer.weight.device.type == "meta":
        return False
    return bool(layer.weight.is_floating_point())


def _run(slot: Slot, x: Tensor) -> Tensor:
    """The forward pass of a wrapped matrix."""
    layer = slot.module.base_layer
    if slot.module.disable_adapters:
        off: Tensor = layer(x)
        return off
    x = x.to(slot.edited.device)  # what accelerate's hook does for a layer that it is asked through
    y: Tensor = _Edited.apply(x, slot.e, slot)  # type: ignore[no-untyped-call]
    return y if layer.bias is None else y + layer.bias


class _Edited(torch.autograd.Function):
    """``x M^T``, M = W + B diag(E) A being given: x (..., in).

    The gradient of M is added up in the stack over all batches of a step; ``read_gradients`` takes
    those of the factors from it at once.  (``e`` is here so that there is something to be asked
    for a gradient, even where x has none.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Tensor, slot: Slot) -> Tensor:
        ctx.save_for_backward(x, slot.edited)
        ctx.slot = slot
        return product(x, slot.edited.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        x, edited = ctx.saved_tensors
        whole = product(gradient.flatten(0, -2).T, x.flatten(0, -2))
        ctx.slot.stack.add(ctx.slot.at, whole)
        return product(gradient, edited) if ctx.needs_input_grad[0] else None, None, None
