"""Fisher moments: how far the model's answers on protected text move when a matrix changes.

For a matrix W with inputs x and output gradients g, Kronecker-factored Fisher information (K-FAC,
Martens and Grosse 2015, arXiv:1503.05671) predicts that a change D of W moves the output
distribution by a KL divergence of about half of ``trace(G D C D^T)`` nats a token, with
``C = E[x x^T]`` and ``G = E[g g^T]`` over protected text and answers sampled from the model.  With
Cholesky factors ``G + eps = K K^T`` and ``C + eps = H H^T`` and ``D = K^-T D' H^-1`` that trace is
``|D'|^2``.  In these whitened coordinates all directions have the same penalty, so an adapter
trained there moves in directions that protected text hardly uses.  (The same penalty between
tasks: online structured Laplace approximation, Ritter et al. 2018, arXiv:1805.07810.)

Where a model is certain, its output distribution hardly moves until an answer is about to change,
and Fisher information does not see it.  ``margins`` measures instead how far the logit margins of
answers move, however large they are: recall depends on their sign.

Invariants:
- Moments are sums over tokens in fp32; adding two of them is measuring both texts.
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
"""Of wider sides only the diagonal is kept: larger factorizations cost more than they save."""


@dataclass(frozen=True, slots=True)
class MatrixMoments:
    """Second moments of one matrix: ``inputs`` (in, in) and ``gradients`` (out, out), as sums.

    Of a side wider than ``DENSE_LIMIT`` only the diagonal is kept, (in,) or (out,).
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

        The token count stays, so that text that was protected before is not protected less.
        """
        shared: dict[int, Tensor] = {}
        total = {}
        for name, matrix in self.moments.items():
            at, more = matrix.inputs.data_ptr(), other.moments[name]
            if at not in shared:
                shared[at] = matrix.inputs + weight * more.inputs
            total[name] = MatrixMoments(shared[at], matrix.gradients + weight * more.gradients)
        return FisherMoments(total, self.tokens)

    def scaled_like(self, other: FisherMoments) -> FisherMoments:
        """The moments, scaled so that an isotropic change has the same penalty as in another."""
        factor = other._size() / self._size()
        moments = {
            name: replace(matrix, gradients=matrix.gradients * factor)
            for name, matrix in self.moments.items()
        }
        return FisherMoments(moments, self.tokens)

    def _size(self) -> float:
        """The expected penalty of a random change of unit variance in every entry of a matrix."""
        traces = [_trace(one.inputs) * _trace(one.gradients) for one in self.moments.values()]
        return max(sum(traces) / self.tokens**2, torch.finfo(torch.float32).tiny)

    def placed(self, devices: Mapping[str, torch.device]) -> FisherMoments:
        """The same with each matrix's moments on its device; shared tensors stay shared."""
        if all(one.inputs.device == devices[name] for name, one in self.moments.items()):
            return self
        shared: dict[tuple[int, torch.device], Tensor] = {}
        placed = {}
        for name, matrix in self.moments.items():
            at = matrix.inputs.data_ptr(), devices[name]
            if at not in shared:
                shared[at] = matrix.inputs.to(devices[name])
            placed[name] = MatrixMoments(shared[at], matrix.gradients.to(devices[name]))
        return FisherMoments(placed, self.tokens)

    def to_tensors(self) -> dict[str, Tensor]:
        """As named tensors, for a file."""
        flat = {"tokens": torch.tensor(self.tokens)}
        for name, matrix in self.moments.items():
            flat[f"{name}.inputs"], flat[f"{name}.gradients"] = matrix.inputs, matrix.gradients
        return flat

    @classmethod
    def from_tensors(cls, flat: Mapping[str, Tensor]) -> FisherMoments:
        """The inverse of ``to_tensors``."""
        names = [name.removesuffix(".inputs") for name in flat if name.endswith(".inputs")]
        moments = {n: MatrixMoments(flat[f"{n}.inputs"], flat[f"{n}.gradients"]) for n in names}
        return cls(moments, int(flat["tokens"]))


def _trace(moment: Tensor) -> float:
    """The trace of a matrix, or of a diagonal given as a vector."""
    return float(moment.sum() if moment.ndim == 1 else moment.diagonal().sum())


def penalty_gradients(fisher: FisherMoments, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half the gradient of ``trace(G D C D^T)`` at the accumulated deltas D: ``G D C``, fp32."""
    count = fisher.tokens
    gradients = {}
    for name, matrix in fisher.moments.items():
        half = times(deltas[name].to(matrix.inputs.device), matrix.inputs / count)
        gradients[name] = times(half.T, matrix.gradients / count).T
    return gradients


@dataclass(frozen=True, slots=True)
class WhiteningFactors:
    """One matrix's whitened coordinates, ``D = left D' right``, fp32: ``left`` (out, out) is K^-T
    and ``right`` (in, in) is H^-1.  A vector stands for a diagonal matrix.
    """

    left: Tensor
    right: Tensor


def whitening(
    fisher: FisherMoments, *, input_damping: float, gradient_damping: float
) -> dict[str, WhiteningFactors]:
    """The whitening factors of each matrix; damping is relative to the mean eigenvalue."""
    shared: dict[int, Tensor] = {}  # q, k and v (gate and up) read the same inputs
    factors = {}
    for name, one in fisher.moments.items():
        at = one.inputs.data_ptr()
        if at not in shared:
            shared[at] = inverse_factor(one.inputs / fisher.tokens, input_damping)
        left = inverse_factor(one.gradients / fisher.tokens, gradient_damping)
        left = left if left.ndim == 1 else left.T.contiguous()
        factors[name] = WhiteningFactors(left, shared[at])
    return factors


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


def times(matrix: Tensor, factor: Tensor) -> Tensor:
    """``matrix @ factor``, the factor a matrix or a diagonal."""
    product: Tensor = matrix * factor if factor.ndim == 1 else matrix @ factor
    return product


class _Recorder:
    """Records the inputs of the named modules and the gradients of their outputs."""

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
            # A hook of accelerate may move the input to the device only inside the module.
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

    Batch by batch: the logits of all texts of a group can take more memory than the model.
    """
    answers = sum(len(example.ids) - example.start for example in examples)
    total: dict[str, Tensor] = {}
    recorder = _Recorder(model, names)
    try:
        for batch in by_length(examples, batch_tokens(model)):
            _push(model, [examples[i] for i in sorted(batch)], answers)
            for name in names:
                gradient = _outer(recorder.gradients[name], recorder.inputs[name])
                total[name] = total[name].add_(gradient) if name in total else gradient
    finally:
        recorder.close()
    return total


def _push(model: nn.Module, part: Sequence[Example], answers: int) -> None:
    """Backward through the model: a batch's part of the mean loss over all answer tokens."""
    batch = answer_logits(model, part)
    loss = functional.cross_entropy(batch.logits, batch.targets)
    (loss * (len(batch.targets) / answers)).backward()  # type: ignore[no-untyped-call]


def _outer(gradient: Tensor, inputs: Tensor) -> Tensor:
    """(out, in), fp32: summed over rows and positions."""
    return gradient.flatten(0, -2).float().T @ inputs.flatten(0, -2).float()


def information(answers: Answers, chance: torch.Generator) -> Tensor:
    """Minus log p of answers sampled from the model, summed, a scalar: the second moment of its
    gradient is the Fisher information.
    """
    weights = torch.softmax(answers.logits.detach().float().to(chance.device), -1)
    samples = torch.multinomial(weights, 1, generator=chance)[:, 0].to(answers.logits.device)
    return functional.cross_entropy(answers.logits, samples, reduction="sum")


def margins(answers: Answers, chance: torch.Generator) -> Tensor:
    """Logit margins of the answer tokens over all others together (logsumexp), summed with random
    signs, a scalar: without signs the gradients of several tokens at one position would add up.
    """
    targets = answers.targets[:, None]
    others = answers.logits.scatter(1, targets, float("-inf")).logsumexp(1)
    token_margins = answers.logits.gather(1, targets)[:, 0] - others
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
    """Moments over the tokens of texts.  The gradients are those of ``of``, a sum over answer
    tokens whose mean gradient is zero.
    """
    total: FisherMoments | None = None
    chance = generator(model, seed)
    recorder = _Recorder(model, names)
    try:
        for batch in by_length(examples, batch_tokens(model)):
            part = [examples[i] for i in batch]
            of(answer_logits(model, part), chance).backward()  # type: ignore[no-untyped-call]
            tokens = sum(len(example.ids) for example in part)
            moments = FisherMoments(_batch_moments(recorder, names, _lengths(part)), tokens)
            if total is not None:
                moments = replace(total.plus(moments, 1.0), tokens=total.tokens + tokens)
            total = moments
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
    moments = {}
    for name in names:
        x = recorder.inputs[name]
        if x.data_ptr() not in shared:
            shared[x.data_ptr()] = _second_moment(_tokens(x, lengths))
        gradients = _second_moment(_tokens(recorder.gradients[name], lengths))
        moments[name] = MatrixMoments(shared[x.data_ptr()], gradients)
    return moments


def _tokens(values: Tensor, lengths: Tensor) -> Tensor:
    """(tokens, width): (rows, positions, width) without padding.

    OPT flattens rows and positions; some custom code puts positions first, which can be told apart
    because a batch is never square (see ``answer_logits``).
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
