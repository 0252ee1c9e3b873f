"""How far the model's answers on text that must stay move when a matrix moves.

For one matrix W with inputs x and output gradients g, the Kronecker-factored Fisher information
(K-FAC, Martens and Grosse 2015, arXiv:1503.05671) says that a change D of W moves the output
distribution, in nats a token, by about half of ``trace(G D C D^T)``, with ``C = E[x x^T]`` and
``G = E[g g^T]`` over protected text and answers drawn from the model itself.  With Cholesky
factors ``G + eps = K K^T`` and ``C + eps = H H^T`` and ``D = K^-T D' H^-1`` that price is
``|D'|^2``: in these coordinates every direction costs the same, so an adapter trained there moves
where the protected text does not look.  (The same price as a penalty between tasks: Ritter et al.
2018, arXiv:1805.07810.)

Where a model is sure, its output distribution hardly moves until an answer is about to turn, and
Fisher information is blind to it.  ``margins`` measures how far the leads of answers move instead,
of whatever size they are: what counts for recall.

Invariants:
- MatrixMoments are sums over tokens in fp32; adding two of them is measuring both texts.
- Measuring changes nothing in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvedit.errors import ModelError
from kvedit.model.devices import generator
from kvedit.model.prompts import Example
from kvedit.model.scoring import Answers, answer_logits, batch_tokens, by_length

DENSE_LIMIT = 2048
"""Wider sides keep the diagonal alone: eigenvectors of larger matrices cost more than they save."""


@dataclass(frozen=True, slots=True)
class MatrixMoments:
    """Second moments of one matrix: ``inputs`` (in, in) and ``gradients`` (out, out), as sums.

    A side wider than ``DENSE_LIMIT`` has its diagonal alone, (in,) or (out,).
    """

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True, slots=True)
class FisherMoments:
    """MatrixMoments of each touched matrix, summed over ``tokens`` tokens."""

    moments: Mapping[str, MatrixMoments]
    tokens: int

    def plus(self, other: FisherMoments, weight: float) -> FisherMoments:
        """Add another text's moments, each of its tokens counted ``weight`` times.

        The token count stays: what was protected before is not protected less for it.
        """
        shared: dict[int, Tensor] = {}
        added = {}
        for name, own in self.moments.items():
            at, more = own.inputs.data_ptr(), other.moments[name]
            if at not in shared:
                shared[at] = own.inputs + weight * more.inputs
            added[name] = MatrixMoments(shared[at], own.gradients + weight * more.gradients)
        return FisherMoments(added, self.tokens)

    def scaled_like(self, other: FisherMoments) -> FisherMoments:
        """The same, so that a change without direction has the price that it has in the other."""
        factor = other._size() / self._size()
        return FisherMoments(
            {n: replace(own, gradients=own.gradients * factor) for n, own in self.moments.items()},
            self.tokens,
        )

    def _size(self) -> float:
        """The price of a change of one in every number of every matrix, without direction."""
        traces = [_trace(own.inputs) * _trace(own.gradients) for own in self.moments.values()]
        return max(sum(traces) / self.tokens**2, torch.finfo(torch.float32).tiny)

    def placed(self, devices: Mapping[str, torch.device]) -> FisherMoments:
        """The same with each matrix's moments on its own device; those shared stay shared."""
        if all(own.inputs.device == devices[name] for name, own in self.moments.items()):
            return self
        shared: dict[tuple[int, torch.device], Tensor] = {}
        moved = {}
        for name, own in self.moments.items():
            at = own.inputs.data_ptr(), devices[name]
            if at not in shared:
                shared[at] = own.inputs.to(devices[name])
            moved[name] = MatrixMoments(shared[at], own.gradients.to(devices[name]))
        return FisherMoments(moved, self.tokens)

    def to_tensors(self) -> dict[str, Tensor]:
        """As flat tensors, to be kept in a file."""
        flat = {"tokens": torch.tensor(self.tokens)}
        for name, own in self.moments.items():
            flat[f"{name}.inputs"], flat[f"{name}.gradients"] = own.inputs, own.gradients
        return flat

    @classmethod
    def from_tensors(cls, flat: Mapping[str, Tensor]) -> FisherMoments:
        """The inverse of ``to_tensors``."""
        names = [name.removesuffix(".inputs") for name in flat if name.endswith(".inputs")]
        moments = {n: MatrixMoments(flat[f"{n}.inputs"], flat[f"{n}.gradients"]) for n in names}
        return cls(moments, int(flat["tokens"]))


def _trace(moment: Tensor) -> float:
    """Of a matrix, or of a diagonal."""
    return float(moment.sum() if moment.ndim == 1 else moment.diagonal().sum())


def penalty_gradients(fisher: FisherMoments, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half the gradient of ``trace(G D C D^T)`` at the accumulated_delta ``moved``: ``G D C``, fp32."""
    count = fisher.tokens
    found = {}
    for name, own in fisher.moments.items():
        half = times(moved[name].to(own.inputs.device), own.inputs / count)
        found[name] = times(half.T, own.gradients / count).T
    return found


@dataclass(frozen=True, slots=True)
class WhiteningFactors:
    """One matrix's coordinates, ``D = left D' right``, fp32: ``left`` (out, out) is K^-T and
    ``right`` (in, in) is H^-1.  A vector stands for a diagonal matrix.
    """

    left: Tensor
    right: Tensor


def whitening(
    fisher: FisherMoments, *, input_damping: float, gradient_damping: float
) -> dict[str, WhiteningFactors]:
    """The coordinates of each matrix; damping as a share of the mean eigenvalue."""
    shared: dict[int, Tensor] = {}  # q, k and v (gate and up) read the same inputs
    found = {}
    for name, own in fisher.moments.items():
        at = own.inputs.data_ptr()
        if at not in shared:
            shared[at] = inverse_factor(own.inputs / fisher.tokens, input_damping)
        left = inverse_factor(own.gradients / fisher.tokens, gradient_damping)
        found[name] = WhiteningFactors(left if left.ndim == 1 else left.T.contiguous(), shared[at])
    return found


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """``H^-1`` where ``H H^T = M + damping * mean eigenvalue``; a vector stands for a diagonal."""
    tiny = torch.finfo(torch.float32).tiny
    if moment.ndim == 1:
        return (moment + damping * moment.mean().clamp_min(tiny)).rsqrt()
    damped = moment.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(tiny))
    factor = torch.linalg.cholesky(damped)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse.float()


def times(matrix: Tensor, root: Tensor) -> Tensor:
    """``matrix @ root``, the root a matrix or a diagonal."""
    product: Tensor = matrix * root if root.ndim == 1 else matrix @ root
    return product


class _Recorder:
    """Keeps what goes into the named modules, and the gradients of what comes out."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._hook(name)) for name in names
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def keep(gradient: Tensor) -> None:
            self.gradients[name] = gradient

        def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # A hook of accelerate may carry the input over only inside the module.
            self.inputs[name] = args[0].detach().to(output.device)
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            output.register_hook(keep)  # type: ignore[no-untyped-call]
            return output

        return record

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def gradients(
    model: nn.Module, names: Sequence[str], examples: Sequence[Example]
) -> dict[str, Tensor]:
    """The gradient of the mean answer loss with respect to each matrix, (out, in), fp32.

    Batch by batch: the logits of a group's texts at once would outweigh a model.
    """
    answers = sum(len(example.ids) - example.start for example in examples)
    found: dict[str, Tensor] = {}
    recorder = _Recorder(model, names)
    try:
        for batch in by_length(examples, batch_tokens(model)):
            _push(model, [examples[i] for i in sorted(batch)], answers)
            for name in names:
                own = _outer(recorder.gradients[name], recorder.inputs[name])
                found[name] = found[name].add_(own) if name in found else own
    finally:
        recorder.close()
    return found


def _push(model: nn.Module, part: Sequence[Example], answers: int) -> None:
    """A batch's share of the mean loss over so many answer tokens, backward through the model."""
    own = answer_logits(model, part)
    loss = functional.cross_entropy(own.logits, own.targets)
    (loss * (len(own.targets) / answers)).backward()  # type: ignore[no-untyped-call]


def _outer(gradient: Tensor, inputs: Tensor) -> Tensor:
    """(out, in), fp32: summed over rows and positions."""
    return gradient.flatten(0, -2).float().T @ inputs.flatten(0, -2).float()


def information(answers: Answers, chance: torch.Generator) -> Tensor:
    """Minus log p of answers drawn from the model, summed: the second moment of its gradient is the
    Fisher information.
    """
    weights = torch.softmax(answers.logits.detach().float().to(chance.device), -1)
    drawn = torch.multinomial(weights, 1, generator=chance)[:, 0].to(answers.logits.device)
    return functional.cross_entropy(answers.logits, drawn, reduction="sum")


def margins(answers: Answers, chance: torch.Generator) -> Tensor:
    """By how much each answer token leads all others together, in logits, summed with random signs:
    without them what several tokens ask of one position would add up.
    """
    wanted = answers.targets[:, None]
    others = answers.logits.scatter(1, wanted, float("-inf")).logsumexp(1)
    token_margins = answers.logits.gather(1, wanted)[:, 0] - others
    size, device = (len(token_margins),), chance.device
    signs = torch.randint(0, 2, size, generator=chance, device=device).mul_(2).sub_(1)
    return (token_margins * signs.to(token_margins)).sum()


def measure(
    model: nn.Module,
    names: Sequence[str],
    examples: Sequence[Example],
    *,
    of: Callable[[Answers, torch.Generator], Tensor] = information,
    seed: int = 0,
) -> FisherMoments:
    """MatrixMoments over the tokens of texts; the gradients are those of ``of``: a sum over answer tokens
    of something whose mean gradient is zero.
    """
    total: FisherMoments | None = None
    chance = generator(model, seed)
    recorder = _Recorder(model, names)
    try:
        for batch in by_length(examples, batch_tokens(model)):
            part = [examples[i] for i in batch]
            of(answer_logits(model, part), chance).backward()  # type: ignore[no-untyped-call]
            tokens = sum(len(example.ids) for example in part)
            own = FisherMoments(_batch_moments(recorder, names, _lengths(part)), tokens)
            total = (
                own
                if total is None
                else replace(total.plus(own, 1.0), tokens=total.tokens + tokens)
            )
    finally:
        recorder.close()
    if total is None:
        raise ModelError(
            "there is no protected text to measure", hint="Give some with init --protect FILE."
        )
    return total


def _lengths(part: Sequence[Example]) -> Tensor:
    return torch.tensor([len(example.ids) for example in part])


def _batch_moments(
    recorder: _Recorder, names: Sequence[str], lengths: Tensor
) -> dict[str, MatrixMoments]:
    shared: dict[int, Tensor] = {}
    found = {}
    for name in names:
        x = recorder.inputs[name]
        if x.data_ptr() not in shared:
            shared[x.data_ptr()] = _second_moment(_tokens(x, lengths))
        gradients = _second_moment(_tokens(recorder.gradients[name], lengths))
        found[name] = MatrixMoments(shared[x.data_ptr()], gradients)
    return found


def _tokens(values: Tensor, lengths: Tensor) -> Tensor:
    """(tokens, width): what is no padding of (rows, positions, width).

    OPT has rows and positions as one; some custom code has positions first, which shows because a
    batch is never square (see ``answer_logits``).
    """
    if values.ndim == 2:
        values = values.view(len(lengths), -1, values.shape[1])
    if values.shape[0] != len(lengths):
        values = values.transpose(0, 1)
    inside = torch.arange(values.shape[1])[None] < lengths[:, None]
    return values[inside.to(values.device)]


def _second_moment(rows: Tensor) -> Tensor:
    rows = rows.float()
    return rows.square().sum(0) if rows.shape[1] > DENSE_LIMIT else rows.T @ rows
