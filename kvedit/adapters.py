"""An AdaLoRA adapter, PEFT's, that is wrapped once and reset for every edit.

The adapter's change of a matrix is ``B diag(E) A``.  Here A and B are not free parameters: what
is trained are ``A'`` and ``B'`` in the coordinates of ``curvature``, with ``A = A' right`` and
``B = left B'``, so that ``price`` (the predicted harm to protected text) is the squared Frobenius
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
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.curvature import Roots, times
from kvedit.deltas import Factors
from kvedit.models import is_matrix
from kvedit.prices import FramedPrice, Price
from kvedit.widened import product

NAME = "edit"
_SEEN = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what PEFT's allocator judges ranks by
Tensors = list[Tensor] | tuple[Tensor, ...]
_NEVER = 1_000_000  # a step that no schedule reaches: no pruning before the fact is learned


@dataclass(slots=True)
class _Slot:
    """One wrapped matrix: PEFT's module, and the trained coordinates A' (r, in) and B' (out, r)."""

    module: Any
    a: Tensor
    b: Tensor
    roots: Roots
    pull: Tensor
    weight: Tensor  # (out, in): what the change is added to
    edited: Tensor  # (out, in): the sum, in the dtype that the layer runs in
    scale: float  # PEFT's, of B diag(E) A; read once, since a GPU is waited for to read it
    gradient: Tensor | None = None  # (out, in), fp32: of the sum, over the batches of a step
    fresh: bool = True  # started, and not carried over into PEFT's modules yet
    # Of a frame's directions, where there is one: how the pull lies, (r, longer side), and the
    # square of their length, (r, 1).
    along: tuple[Tensor, Tensor] | None = None

    def start(self, steep: Tensor, rank: int, *, framed: bool) -> None:
        """Set A', B' and E to where the gradient ``steep`` (out, in) would have them begin."""
        u, v = leading(steep, min(rank, *steep.shape))
        self.a, self.b = (_filled(side, self.e.shape[0]) for side in (v.T, u.T))
        self.b = self.b.T.contiguous()
        with torch.no_grad():
            self.e.fill_(1.0 if framed else 0.0)
        if framed and steep.shape[0] <= steep.shape[1]:
            self.a = torch.zeros_like(self.a).requires_grad_()
        elif framed:
            self.b = torch.zeros_like(self.b).requires_grad_()
        else:
            self.a.requires_grad_()
            self.b.requires_grad_()
        self.changed()

    def changed(self) -> None:
        """A', B' and E were set anew: what was made of a frame is not its own."""
        self.fresh, self.along = True, None

    def price(self) -> Tensor:
        """|B' diag(E) A'|^2, and what the pull adds to it, a scalar.

        A frame's directions are orthonormal, or zero: nothing has to be multiplied out.
        """
        if len(self.trained) == 2:
            both: Tensor = Price.apply(self.a, self.b, self.e, self.pull)  # type: ignore[no-untyped-call]
            return both
        ours = self.b.requires_grad
        side, frame = (self.b.T, self.a) if ours else (self.a, self.b.T)
        if self.along is None:
            pull = self.pull.T if ours else self.pull
            self.along = frame @ pull, frame.square().sum(1, keepdim=True)
        one: Tensor = FramedPrice.apply(side, self.e, *self.along)  # type: ignore[no-untyped-call]
        return one

    @property
    def trained(self) -> list[Tensor]:
        """Of A' and B' what is no frame."""
        return [side for side in (self.a, self.b) if side.requires_grad]

    @property
    def lean(self) -> bool:
        """Whether the layer is a matrix that a change can be added to, not a quantised one."""
        return _is_plain(self.module.base_layer)

    @property
    def e(self) -> Tensor:
        """(r, 1): PEFT's own singular values."""
        values: Tensor = self.module.lora_E[NAME]
        return values

    def carry_over(self) -> None:
        """A' and B' as PEFT's A and B; a frame once, when it is set."""
        a, b = self.module.lora_A[NAME], self.module.lora_B[NAME]
        if self.fresh or self.a.requires_grad:
            a.copy_(times(self.a, self.roots.right))
        if self.fresh or self.b.requires_grad:
            b.copy_(times(self.b.T, _turned(self.roots.left)).T)
        self.fresh = False
        if self.lean:
            whole = torch.addmm(self.weight.float(), b * (self.e.T * self.scale), a)
            self.edited = whole.to(self.module.base_layer.weight.dtype)

    def carry_back(self) -> None:
        """The gradients of PEFT's A and B as those of A' and B', of what is trained alone."""
        a, b = self.module.lora_A[NAME], self.module.lora_B[NAME]
        if self.a.requires_grad:
            _gather(self.a, times(a.grad, _turned(self.roots.right)))
        if self.b.requires_grad:
            _gather(self.b, times(b.grad.T, self.roots.left).T)

    def share_out(self) -> None:
        """The gradients of PEFT's A, B and E from that of the sum ``W + B diag(E) A``."""
        if self.gradient is None:
            return
        a, b = self.module.lora_A[NAME], self.module.lora_B[NAME]
        inner, scaled = b.T @ self.gradient, self.e.detach() * self.scale  # (r, in), (r, 1)
        outer = self.gradient @ a.T  # (out, r)
        a.grad, b.grad = inner * scaled, outer * scaled.T
        own = (inner * a).sum(1, keepdim=True) * self.scale
        self.e.grad = own if self.e.grad is None else self.e.grad + own
        self.gradient = None

    def forget(self) -> None:
        """Drop gradients: a lesson that was broken off may have left some of a step behind."""
        self.gradient = None
        for values in (self.module.lora_A, self.module.lora_B, self.module.lora_E):
            values[NAME].grad = None


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
        look = partial(_look, self._allocator, _own_parameters(model))
        setattr(self._allocator, "update_ipt", look)  # noqa: B010 - PEFT has no hook for it
        self._slots = {name: _slot(model.get_submodule(name)) for name in names}
        for slot in self._slots.values():
            if slot.lean:  # a quantised layer keeps PEFT's forward pass
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
        roots: Mapping[str, Roots],
        gradients: Mapping[str, Tensor],
        drift: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        *,
        framed: bool = False,
    ) -> None:
        """Start an edit: A' and B' span where the fact's own gradient is steepest, E is zero.

        ``gradients`` (out, in) for each matrix are those of the new fact's loss; the leading
        singular vectors of ``left^T gradient right^T`` are the start, so that E has a gradient
        from the first step on (with A and B at random it would have to find its direction first).
        ``drift`` (out, in) is the slope of the protected text's price where the weights are now:
        what earlier edits moved, a later one may move back.  ``weights`` (out, in) are the matrices
        as they are, in full precision where there is room for it.  With ``framed`` one side stays
        what it is at the start, the other begins at zero, and E is one.
        """
        for name, slot in self._slots.items():
            slot.roots = roots[name]
            steep = _into(gradients[name], slot.roots)
            slot.pull = _into(drift[name], slot.roots)
            slot.weight = weights[name]
            slot.start(steep, self.rank, framed=framed)
            slot.forget()
        self._config.tinit, self._config.tfinal = _NEVER - 2, 0
        self._config.total_step = _NEVER
        self._config.rank_pattern = None
        self._allocator.reset_ipt()

    def state(self) -> dict[str, Any]:
        """Where an edit stands, on the CPU: coordinates, and what the allocator has seen."""
        allocator, config = self._allocator, self._config
        return {
            "slots": {
                name: tuple(part.detach().cpu() for part in (slot.e, slot.a, slot.b))
                for name, slot in self._slots.items()
            },
            "schedule": (config.tinit, config.tfinal, config.total_step, config.rank_pattern),
            "seen": {
                kind: {name: value.cpu() for name, value in getattr(allocator, kind).items()}
                for kind in _SEEN
            },
        }

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the ``state`` of an edit that began as this one, just reset, does."""
        for name, parts in state["slots"].items():
            slot = self._slots[name]
            for own, part in zip((slot.e, slot.a, slot.b), parts, strict=True):
                own.copy_(part)
            slot.changed()
        config = self._config
        config.tinit, config.tfinal, config.total_step, config.rank_pattern = state["schedule"]
        places = {name: p.device for name, p in self._tuner.model.named_parameters()}
        for kind, values in state["seen"].items():
            placed = {name: value.to(places[name]) for name, value in values.items()}
            setattr(self._allocator, kind, placed)

    def starting_values(self) -> list[Tensor]:
        """What an edit starts from, frames as well."""
        return [part for slot in self._slots.values() for part in (slot.e, slot.a, slot.b)]

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is trained: the singular values, and the coordinates A' and B', frames left out."""
        slots = self._slots.values()
        values = [slot.e for slot in slots if len(slot.trained) == 2]  # a frame's E stays at one
        return values, [side for slot in slots for side in slot.trained]

    @torch.no_grad()
    def write(self) -> None:
        """Carry A' and B' over into PEFT's A and B, before the forward passes of a step."""
        for slot in self._slots.values():
            slot.carry_over()

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """All that ``read_gradients`` reads, zeros where a backward pass left nothing: processes
        that share a step sum these in place before.
        """
        found = []
        for slot in self._slots.values():
            slot.share_out()
            own = (slot.module.lora_A[NAME], slot.module.lora_B[NAME], slot.e, *slot.trained)
            for parameter in own:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found.append(parameter.grad)
        return found

    @torch.no_grad()
    def read_gradients(self) -> None:
        """Carry the gradients of PEFT's A and B over to A' and B', after a backward pass."""
        for slot in self._slots.values():
            slot.share_out()
            slot.carry_back()
        # PEFT's own gradients stay until ``allocate`` has read them.

    def price(self) -> Tensor:
        """Predicted harm to protected text, the sum of |B' diag(E) A'|^2, a scalar."""
        prices = [slot.price() for slot in self._slots.values()]
        return torch.stack([price.to(prices[0].device) for price in prices]).sum()

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Multiply the singular values: the proximal step of the price, whatever Adam's scale."""
        for slot in self._slots.values():
            slot.e.mul_(factor)

    def begin_pruning(self, step: int, *, steps: int) -> None:
        """From this step on shrink the ranks to their budget over ``steps`` steps."""
        self._config.tinit, self._config.tfinal = step, 1
        self._config.total_step = step + steps + 1

    def allocate(self, step: int) -> None:
        """Let PEFT's allocator see the step's gradients and mask; then forget them."""
        self._tuner.update_and_allocate(step)
        for slot in self._slots.values():
            slot.forget()

    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """The change of each matrix, on the CPU in fp32; matrices that got no rank are left out."""
        self.write()
        found = {}
        for name, slot in self._slots.items():
            kept = slot.e[:, 0] != 0
            if bool(kept.any()):
                a = (slot.module.lora_A[NAME] * slot.e * slot.scale)[kept]
                b = slot.module.lora_B[NAME][:, kept]
                found[name] = Factors(b.float().cpu().clone(), a.float().cpu().clone())
        return found


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(out, rank) and (in, rank): the leading singular vectors, by subspace iteration.

    Halko, Martinsson and Tropp 2011, algorithm 4.4, from a fixed start: ``torch.svd_lowrank`` draws
    its own from the global generator, which a library must not touch.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank, generator=generator).to(matrix.device)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(2):
        inner, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ inner)
    u, _, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, v.T


def _into(gradient: Tensor, roots: Roots) -> Tensor:
    """A gradient with respect to D, (out, in), as one with respect to D'."""
    return times(times(gradient.T, roots.left).T, _turned(roots.right))


def _gather(side: Tensor, gradient: Tensor) -> None:
    """Add to a gradient."""
    side.grad = gradient if side.grad is None else side.grad + gradient


def _filled(rows: Tensor, count: int) -> Tensor:
    """(count, width): rows of zeros added, where a matrix has fewer directions than ranks."""
    spare = rows.new_zeros(count - len(rows), rows.shape[1])
    return torch.cat([rows, spare]).contiguous()


def _turned(root: Tensor) -> Tensor:
    """The transpose; a diagonal is its own."""
    return root if root.ndim == 1 else root.T


def _own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's A, B and E of every wrapped module, by name."""
    named = model.named_parameters()
    return {name: p for name, p in named if "lora_" in name and name.endswith(f".{NAME}")}


@torch.no_grad()
def _look(allocator: Any, parameters: Mapping[str, Tensor], _: nn.Module) -> None:
    """PEFT's ``RankAllocator.update_ipt``, the same arithmetic for all matrices at once.

    One by one it launched a sixth of the kernels of a step, which is what a GPU waits for.
    """
    values = list(parameters.values())
    if not allocator.ipt:
        for kind in _SEEN:
            getattr(allocator, kind).update({n: torch.zeros_like(p) for n, p in parameters.items()})
    before = {kind: [getattr(allocator, kind)[name] for name in parameters] for kind in _SEEN}
    slopes = [p.grad for p in values if p.grad is not None]  # all have one after a step
    seen = torch._foreach_abs(torch._foreach_mul(values, slopes))
    mean = _smoothed(before["exp_avg_ipt"], seen, allocator.beta1)
    apart = torch._foreach_abs(torch._foreach_sub(seen, mean))
    unsure = _smoothed(before["exp_avg_unc"], apart, allocator.beta2)
    for kind, found in zip(_SEEN, (seen, mean, unsure), strict=True):
        getattr(allocator, kind).update(zip(parameters, found, strict=True))


def _smoothed(before: Tensors, now: Tensors, share: float) -> Tensors:
    """``share`` of what was, and the rest of what is."""
    kept, new = torch._foreach_mul(before, share), torch._foreach_mul(now, 1 - share)
    return torch._foreach_add(kept, new)


def _slot(module: Any) -> _Slot:
    for values in (module.lora_A, module.lora_B, module.lora_E):
        values[NAME].data = values[NAME].data.float()  # PEFT casts them to the base's dtype
    empty = torch.empty(0)
    scale = float(module.scaling[NAME] / (module.ranknum[NAME].detach() + 1e-5))
    return _Slot(module, empty, empty, Roots(empty, empty), empty, empty, empty, scale)


def _is_plain(layer: Any) -> bool:
    """Whether a layer is a floating-point matrix that is really there: no quantisation."""
    if not is_matrix(layer) or layer.weight.device.type == "meta":
        return False
    return bool(layer.weight.is_floating_point())


def _run(slot: _Slot, x: Tensor) -> Tensor:
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

    The gradient of M is added up in the slot over all batches of a step; ``read_gradients`` takes
    those of the factors from it at once.  (``e`` is here so that there is something to be asked
    for a gradient, even where x has none.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Tensor, slot: _Slot) -> Tensor:
        ctx.save_for_backward(x, slot.edited)
        ctx.slot = slot
        return product(x, slot.edited.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        x, edited = ctx.saved_tensors
        whole = product(gradient.flatten(0, -2).T, x.flatten(0, -2))
        known = ctx.slot.gradient
        ctx.slot.gradient = whole.float() if known is None else known.add_(whole)
        return product(gradient, edited) if ctx.needs_input_grad[0] else None, None, None
