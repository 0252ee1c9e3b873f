"""Fisher moments: how far the model's answers on protected text move when a matrix changes.

For a matrix W with inputs x and output gradients g, Kronecker-factored Fisher information (K-FAC,
Martens and Grosse 2015, arXiv:1503.05671) predicts that a change D of W moves the output
distribution by a KL divergence of about half of ``trace(G D C D^T)`` nats a token, with
``C = E[x x^T]`` and ``G = E[g g^T]`` over protected text and answers sampled from the model.  With
Cholesky factors ``G + eps = K K^T`` and ``C + eps = H H^T`` and ``D = K^-T D' H^-1`` that trace is
``|D'|^2``.  In these whitened coordinates all directions have the same penalty, so an adapter
trained there moves in directions that protected text hardly uses.

Where a model is certain, its output distribution hardly moves until an answer is about to change,
and Fisher information does not see it.  ``margins`` measures instead how far the logit margins of
answers move, however large they are: recall depends on their sign.

Invariants:
- Moments are sums over tokens in fp32; adding two of them is measuring both texts.
- Measuring changes nothing in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
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


def _once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, computed once for tensors in the same memory: the layers that read the same
    inputs (q, k and v; gate and up) share the moments of these.
    """
    results: dict[tuple[object, ...], Tensor] = {}

    def shared(*arguments: Any) -> Tensor:
        key = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        if key not in results:
            results[key] = function(*arguments)
        return results[key]

    return shared


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
        add = _once(lambda one, two: one + weight * two)
        total = {}
        for name, matrix in self.moments.items():
            more = other.moments[name]
            gradients = matrix.gradients + weight * more.gradients
            total[name] = MatrixMoments(add(matrix.inputs, more.inputs), gradients)
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
        move = _once(Tensor.to)
        placed = {
            name: MatrixMoments(move(one.inputs, at := devices[name]), one.gradients.to(at))
            for name, one in self.moments.items()
        }
        return FisherMoments(placed, self.tokens)

    def to_tensors(self) -> dict[str, Tensor]:
        """As named tensors, for a file."""
        flat = {"tokens": torch.tensor(self.tokens)}
        for name, matrix in self.moments.items():
            flat |= {f"{name}.inputs": matrix.inputs, f"{name}.gradients": matrix.gradients}
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
    gradients = {}
    for name, one in fisher.moments.items():
        half = times(deltas[name].to(one.inputs.device), one.inputs / fisher.tokens)
        gradients[name] = times(half.T, one.gradients / fisher.tokens).T
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
    right = _once(lambda inputs: inverse_factor(inputs / fisher.tokens, input_damping))
    factors = {}
    for name, one in fisher.moments.items():
        left = inverse_factor(one.gradients / fisher.tokens, gradient_damping)
        left = left if left.ndim == 1 else left.T.contiguous()
        factors[name] = WhiteningFactors(left, right(one.inputs))
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


_Records = tuple[dict[str, Tensor], dict[str, Tensor]]


@contextmanager
def _recorded(model: nn.Module, names: Iterable[str]) -> Iterator[_Records]:
    """The last inputs of the named modules, and the last gradients of their outputs."""
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # A hook of accelerate may move the input to the device only inside the module.
        inputs[name] = args[0].detach().to(output.device)
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(partial(gradients.__setitem__, name))  # type: ignore[no-untyped-call]
        return output

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(record, name)))
        yield inputs, gradients


def gradients(
    model: nn.Module, names: Sequence[str], examples: Sequence[Example]
) -> dict[str, Tensor]:
    """The gradient of the mean answer loss with respect to each matrix, (out, in), fp32.

    Batch by batch: the logits of all texts of a group can take more memory than the model.
    """
    answers = sum(len(example.ids) - example.start for example in examples)
    total: dict[str, Tensor] = {}
    with _recorded(model, names) as (inputs, of_outputs):
        for batch in by_length(examples, batch_tokens(model)):
            _push(model, [examples[i] for i in sorted(batch)], answers)
            for name in names:  # summed over rows and positions
                rows = of_outputs[name].flatten(0, -2).float()
                gradient = rows.T @ inputs[name].flatten(0, -2).float()
                total[name] = total[name].add_(gradient) if name in total else gradient
    return total


def _push(model: nn.Module, part: Sequence[Example], answers: int) -> None:
    """Backward through the model: a batch's part of the mean loss over all answer tokens."""
    batch = answer_logits(model, part)
    loss = functional.cross_entropy(batch.logits, batch.targets)
    (loss * (len(batch.targets) / answers)).backward()  # type: ignore[no-untyped-call]


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
    with _recorded(model, names) as records:
        for batch in by_length(examples, batch_tokens(model)):
            part = [examples[i] for i in batch]
            of(answer_logits(model, part), chance).backward()  # type: ignore[no-untyped-call]
            lengths = [len(example.ids) for example in part]
            moments = _batch_moments(names, records, lengths)
            if total is not None:
                tokens = total.tokens + moments.tokens
                moments = replace(total.plus(moments, 1.0), tokens=tokens)
            total = moments
    if total is None:
        raise ModelError(
            "there is no protected text to measure", hint="Give some with init --protect FILE."
        )
    return total


def _batch_moments(names: Sequence[str], records: _Records, lengths: list[int]) -> FisherMoments:
    inputs, gradients = records
    moment = partial(_second_moment, lengths=torch.tensor(lengths))
    of_inputs = _once(moment)
    moments = {n: MatrixMoments(of_inputs(inputs[n]), moment(gradients[n])) for n in names}
    return FisherMoments(moments, sum(lengths))


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


def _second_moment(values: Tensor, lengths: Tensor) -> Tensor:
    rows = _tokens(values, lengths).float()
    return rows.square().sum(0) if rows.shape[1] > DENSE_LIMIT else rows.T @ rows
