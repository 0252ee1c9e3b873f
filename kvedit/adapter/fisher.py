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

A side wider than ``UNCUT`` is cut into equal blocks of at most ``BLOCK``, and only the moments
within each are kept (block-diagonal K-FAC): its moments are then smaller than the matrix.

Invariants:
- Moments are sums over tokens in fp32; adding two of them is measuring both texts.
- Measuring changes nothing in the model.
- Batches are small, and logits are computed a few answer tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvedit.errors import ModelError
from kvedit.model.devices import generator
from kvedit.model.forward import project, projects, vocabulary_size
from kvedit.model.prompts import Example
from kvedit.model.scoring import answer_logits, answer_states, by_length, step_tokens

UNCUT, BLOCK = 1024, 512
"""The widest side that is kept whole, and the widest block of a wider one.  A small model's hidden
states are kept whole: in two halves of 288, perplexity grew by a third more with sixteen facts on
SmolLM2 (log of 2026-11-29)."""
MAX_LOGITS = 8 * 1024 * 1024  # in a table of logits


def block_count(side: int) -> int:
    """The smallest number of equal blocks, none too wide, that make up a side."""
    if side <= UNCUT:
        return 1
    return next(k for k in range(-(-side // BLOCK), side + 1) if side % k == 0)


@dataclass(frozen=True, slots=True)
class MatrixMoments:
    """Second moments of one matrix, as sums: of its inputs and of its outputs' gradients, each
    (blocks, width, width), the blocks on the diagonal.
    """

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True, slots=True)
class FisherMoments:
    """Moments of each touched matrix, summed over ``tokens`` tokens.

    ``sides`` has ``NAME.gradients`` for each matrix, and ``NAME.inputs`` for each whose inputs no
    matrix before it has read: q, k and v read the same.  ``inputs_of`` gives the name of that one
    for each matrix.  The sides may lie on the disk and be read when asked for.
    """

    sides: Mapping[str, Tensor]
    inputs_of: Mapping[str, str]
    tokens: int

    @property
    def moments(self) -> dict[str, MatrixMoments]:
        """The moments by matrix; all of them in memory."""
        sides = dict(self.sides)
        return {
            name: MatrixMoments(sides[f"{first}.inputs"], sides[f"{name}.gradients"])
            for name, first in self.inputs_of.items()
        }

    def plus(self, other: FisherMoments, weight: float) -> FisherMoments:
        """Add another text's moments, each of its tokens counted ``weight`` times.

        The sum is formed in the other's memory, whose values are lost.  The token count stays, so
        that text that was protected before is not protected less.
        """
        sides = {k: other.sides[k].mul_(weight).add_(side) for k, side in self.sides.items()}
        return FisherMoments(sides, self.inputs_of, self.tokens)

    def scaled_like(self, other: FisherMoments) -> FisherMoments:
        """The moments, scaled so that an isotropic change has the same penalty as in another."""
        factor = other._size() / self._size()
        sides = {
            key: side * factor if key.endswith(".gradients") else side
            for key, side in self.sides.items()
        }
        return FisherMoments(sides, self.inputs_of, self.tokens)

    def _size(self) -> float:
        """The expected penalty of a random change of unit variance in every entry of a matrix."""
        traces = {key: _trace(side) for key, side in self.sides.items()}
        size = sum(
            traces[f"{i}.inputs"] * traces[f"{n}.gradients"] for n, i in self.inputs_of.items()
        )
        return max(size / self.tokens**2, torch.finfo(torch.float32).tiny)

    def on_cpu(self) -> FisherMoments:
        """The same in the system's memory."""
        sides = {key: side.cpu() for key, side in self.sides.items()}
        return FisherMoments(sides, self.inputs_of, self.tokens)


def _trace(moment: Tensor) -> float:
    return float(moment.diagonal(dim1=-2, dim2=-1).sum())


def penalty_gradient(
    fisher: FisherMoments, name: str, delta: Tensor, rows: Tensor, *, of_outputs: bool
) -> Tensor:
    """``rows`` times half the gradient of ``trace(G D C D^T)`` at one matrix's accumulated delta D,
    which is ``G D C``, (out, in), and is not formed: (r, in) for rows (r, out) ``of_outputs``, else
    (r, out) for rows (r, in) times its transpose; fp32, where D is.
    """
    gradients = fisher.sides[f"{name}.gradients"].to(delta.device)
    inputs = fisher.sides[f"{fisher.inputs_of[name]}.inputs"].to(delta.device)
    sides = (gradients, inputs) if of_outputs else (inputs, gradients)
    moved = times(rows, sides[0]) @ (delta if of_outputs else delta.T)
    return times(moved, sides[1]).div_(fisher.tokens**2)


@dataclass(frozen=True, slots=True)
class WhiteningFactors:
    """One matrix's whitened coordinates, ``D = left D' right``, fp32: ``left`` is K^-T and
    ``right`` is H^-1, as the blocks (blocks, width, width) on their diagonals.
    """

    left: Tensor
    right: Tensor

    def whiten(self, gradient: Tensor) -> Tensor:
        """A gradient with respect to D, (out, in), as one with respect to D'."""
        return times(times(gradient.T, self.left).T, self.right.mT)


def whitening(
    fisher: FisherMoments,
    devices: Mapping[str, torch.device],
    input_damping: float,
    gradient_damping: float,
) -> dict[str, WhiteningFactors]:
    """The whitening factors of each matrix, on its device; damping is relative to the mean
    eigenvalue of a side.
    """

    def inverse(side: str, damping: float, device: torch.device) -> Tensor:
        moment = fisher.sides[side].to(device, torch.float64).div_(fisher.tokens)
        return inverse_factor(moment, damping)

    factors: dict[str, WhiteningFactors] = {}
    for name, first in fisher.inputs_of.items():
        left = inverse(f"{name}.gradients", gradient_damping, devices[name]).mT.contiguous()
        if first == name:
            right = inverse(f"{name}.inputs", input_damping, devices[name])
        else:
            right = factors[first].right
        factors[name] = WhiteningFactors(left, right)
    return factors


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The blocks of ``H^-1`` where ``H H^T = M + damping * mean eigenvalue``, for the blocks
    (blocks, width, width) of M, fp64, which are overwritten.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    diagonal += damping * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    factor = torch.linalg.cholesky(moment)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return inverse.float()


def times(rows: Tensor, blocks: Tensor) -> Tensor:
    """(rows, side): ``rows`` times the matrix with (blocks, width, width) on its diagonal."""
    if len(blocks) == 1:
        return rows @ blocks[0]
    parts = rows.reshape(len(rows), *blocks.shape[:2]).transpose(0, 1)
    product: Tensor = (parts @ blocks).transpose(0, 1).flatten(1)
    return product


@contextmanager
def observed(
    model: nn.Module,
    names: Iterable[str],
    forward: Callable[[str, Tensor], None],
    backward: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Inside, ``forward`` gets the inputs of each named module, and ``backward`` the gradients of
    its outputs, as they are computed.
    """

    def observe(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # A hook of accelerate may move the input to the device only inside the module.
        forward(name, args[0].detach().to(output.device))
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(partial(backward, name))  # type: ignore[no-untyped-call]
        return output

    projects(model)  # tries it once, which must not be observed
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(observe, name)))
        yield


def measured_batches(model: nn.Module, examples: Sequence[Example]) -> list[list[Example]]:
    """Batches that are small enough to go through the model with all their activations kept."""
    parts = by_length(examples, step_tokens(model))
    return [[examples[i] for i in sorted(batch)] for batch in parts]


def backward(
    model: nn.Module, examples: Sequence[Example], loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Backward through the model of a sum over answer tokens: ``loss`` of logits (N, vocabulary),
    float, and targets (N,), for a few tokens at a time.
    """
    if not projects(model):
        answers = answer_logits(model, examples)
        loss(answers.logits, answers.targets).backward()  # type: ignore[no-untyped-call]
        return
    states = answer_states(model, examples, None)
    targets = torch.tensor([t for e in examples for t in e.ids[e.start :]], device=states.device)
    leaf = states.detach().requires_grad_()
    rows = max(1, MAX_LOGITS // vocabulary_size(model))
    for part, wanted in zip(torch.split(leaf, rows), torch.split(targets, rows), strict=True):
        loss(logits := project(model, part).float(), wanted.to(logits.device)).backward()  # type: ignore[no-untyped-call]
    states.backward(leaf.grad)  # type: ignore[no-untyped-call]


def information(logits: Tensor, targets: Tensor, chance: torch.Generator) -> Tensor:
    """Minus log p of answers sampled from the model, summed, a scalar: the second moment of its
    gradient is the Fisher information.  (The targets do not matter.)
    """
    weights = torch.softmax(logits.detach().to(chance.device), -1)
    samples = torch.multinomial(weights, 1, generator=chance)[:, 0].to(logits.device)
    return functional.cross_entropy(logits, samples, reduction="sum")


def margins(logits: Tensor, targets: Tensor, chance: torch.Generator) -> Tensor:
    """Logit margins of the answer tokens over all others together (logsumexp), summed with random
    signs, a scalar: without signs the gradients of several tokens at one position would add up.
    """
    others = logits.scatter(1, targets[:, None], float("-inf")).logsumexp(1)
    token_margins = logits.gather(1, targets[:, None])[:, 0] - others
    size, device = (len(token_margins),), chance.device
    signs = torch.randint(0, 2, size, generator=chance, device=device).mul_(2).sub_(1)
    return (token_margins * signs.to(token_margins)).sum()


def measure(
    model: nn.Module,
    names: Sequence[str],
    examples: Sequence[Example],
    *,
    of: Callable[[Tensor, Tensor, torch.Generator], Tensor] = information,
    onto: FisherMoments | None = None,
    seed: int = 0,
) -> FisherMoments:
    """Moments over the tokens of texts.  The gradients are those of ``of``, a sum over answer
    tokens whose mean gradient is zero.  With ``onto`` they are added to these, which stay as they
    are; where these lie on the disk, memory holds the sum alone.
    """
    if not examples:
        raise ModelError(
            "there is no protected text to measure", hint="Give some with init --protect-file FILE."
        )
    sums, chance = _Sums(onto), generator(model, seed)
    with observed(model, names, sums.add_inputs, sums.add_gradients):
        for batch in measured_batches(model, examples):
            sums.begin([len(example.ids) for example in batch])
            backward(model, batch, lambda logits, targets: of(logits, targets, chance))
    return FisherMoments(sums.sides, sums.inputs_of, sums.tokens)


class _Sums:
    """Moments as they are measured: sums over batches, formed in place."""

    def __init__(self, onto: FisherMoments | None) -> None:
        self.sides: dict[str, Tensor] = {}
        self.inputs_of: dict[str, str] = {}
        self.tokens = onto.tokens if onto else 0
        self._before = onto.sides if onto else {}
        self._lengths = torch.empty(0)
        self._last: tuple[str, Tensor] | None = None  # kept, so that its memory is not used again

    def begin(self, lengths: list[int]) -> None:
        """The next batch has texts of these lengths."""
        self._lengths, self._last = torch.tensor(lengths), None
        self.tokens += sum(lengths)

    def add_inputs(self, name: str, inputs: Tensor) -> None:
        """A module's inputs; those that several modules read one after the other count once."""
        if name not in self.inputs_of:
            first, last = self._last or (name, inputs)
            shared = inputs.data_ptr() == last.data_ptr() and inputs.shape == last.shape
            self.inputs_of[name] = self.inputs_of.get(first, name) if shared else name
        self._last = name, inputs
        if self.inputs_of[name] == name:
            self._add(f"{name}.inputs", inputs)

    def add_gradients(self, name: str, gradients: Tensor) -> None:
        """The gradients of a module's outputs."""
        self._add(f"{name}.gradients", gradients)

    def _add(self, side: str, values: Tensor) -> None:
        rows = _tokens(values, self._lengths).float()
        parts = rows.view(len(rows), block_count(rows.shape[1]), -1).transpose(0, 1)
        if side not in self.sides and side in self._before:
            self.sides[side] = self._before[side].to(parts.device, copy=True)
        if side in self.sides:
            self.sides[side].baddbmm_(parts.mT, parts)
        else:
            self.sides[side] = parts.mT @ parts


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
