"""Scoring answers by one forward pass: exact recall without generating.

Greedy decoding gives an answer exactly if and only if, at every position of the answer and its end
token, the target token has the highest logit given the target prefix.  One forward pass therefore
decides exact recall (protocol ``teacher-forced``), except for numerical ties: another batch shape
or a KV cache may round logits a step of the dtype apart the other way.  Outcomes say which those
are, and ``generation.generate`` decides them (protocol ``generated``).

Invariants:
- Examples are padded on the right only, so a causal model never sees the padding.
- Logits are computed at answer positions alone, where the model allows it: the vocabulary
  projection dominates small models.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.model.devices import first_device, is_accelerated, padded_rows, padded_width
from kvedit.model.forward import last_hidden, project, projects, vocabulary_size
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example
from kvedit.model.targets import blocks, is_matrix, matrix_shape

# Sizes of a batch, chosen for memory: its logits must not outweigh the model.
MAX_BATCH_TOKENS = 4096
MAX_BATCH_LOGITS = 64 * 1024 * 1024
MIN_BATCH_TOKENS = 256  # for a vocabulary so large that the limit on logits would leave less
MAX_BATCH_ROWS = 256
MAX_ACTIVATIONS = 256 * 1024 * 1024  # bytes, of a batch that is trained on
ACCELERATOR_BATCH_FACTOR = 4  # times the tokens: small batches do not fill an accelerator
SLICE_ROWS = 128  # of a logits table: about what fits a CPU's cache
ACCELERATOR_SLICE_LOGITS = 64 * 1024 * 1024  # there every kernel launch costs
TIE_TOLERANCE = 3.0  # steps of the dtype at the logit: margins another batch shape was seen to flip


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether an answer is recalled exactly, and its smallest logit margin over another token."""

    passed: bool
    margin: float
    ambiguous: bool = False  # a numerical tie, which may come out otherwise in another batch
    generated: bool = False  # ``passed`` was decided by free generation

    @property
    def robust(self) -> bool:
        """Whether it is recalled by a larger margin than rounding could reverse."""
        return self.passed and not self.ambiguous


@dataclass(frozen=True, slots=True)
class Answers:
    """Logits at the answer positions of a batch, flattened over its rows."""

    logits: Tensor  # (N, vocabulary), float
    targets: Tensor  # (N,), int64
    rows: Tensor  # (N,), int64: the example that each position belongs to


LossInstead = Callable[[Sequence[Example], Answers, Tensor], Tensor]
"""From examples, their logits and cross-entropies (N,): the losses (N,) to train on."""


def answer_logits(
    model: Any,
    examples: Sequence[Example],
    prefix_cache: PrefixCache | None = None,
    *,
    in_float: bool = True,
) -> Answers:
    """One forward pass over all examples; logits in the model's dtype unless ``in_float``."""
    if projects(model):
        logits = project(model, answer_states(model, examples, prefix_cache))
    else:
        ids = padded(examples).to(first_device(model))
        logits = _at_answers(model(input_ids=ids, use_cache=False).logits, examples)
    logits = logits.float() if in_float else logits
    targets = torch.tensor([t for e in examples for t in e.ids[e.start :]], dtype=torch.long)
    return Answers(logits, targets.to(logits.device), _answer_rows(examples).to(logits.device))


def answer_states(
    model: Any, examples: Sequence[Example], prefix_cache: PrefixCache | None
) -> Tensor:
    """(N, hidden): the last hidden states at all answer positions, example by example."""
    ids = padded(examples).to(first_device(model))
    return _at_answers(last_hidden(model, ids, examples, prefix_cache), examples)


def _at_answers(outputs: Tensor, examples: Sequence[Example]) -> Tensor:
    """(N, ...): of outputs (rows, width, ...), those that predict answer tokens."""
    places = [at for e in examples for at in range(e.start - 1, len(e.ids) - 1)]
    columns = torch.tensor(places, dtype=torch.long).to(outputs.device)
    return outputs[_answer_rows(examples).to(outputs.device), columns]


def _answer_rows(examples: Sequence[Example]) -> Tensor:
    lengths = torch.tensor([len(e.ids) - e.start for e in examples])
    return torch.arange(len(examples)).repeat_interleave(lengths)


@dataclass(frozen=True, slots=True)
class TokenMargins:
    """Logit margins of the answer tokens of some examples, in no particular order."""

    token_margins: Tensor  # (N,), logits: the target's over the best other token, -inf for NaN
    tolerances: Tensor  # (N,), logits: by how much rounding may move them
    rows: Tensor  # (N,), int64: the example that each token belongs to

    def margins(self, count: int) -> Tensor:
        """(count,): the smallest margin of each example, inf for one without tokens."""
        return self._smallest(self.token_margins, count)

    def outcomes(self, count: int) -> list[Outcome]:
        """Outcome of each example by its margins."""
        margins, slack = self.token_margins, self.tolerances
        parts = (margins, margins - slack, margins + slack)
        rows = zip(*(self._smallest(part, count).tolist() for part in parts), strict=True)
        return [Outcome(margin > 0, margin, low <= 0 < high) for margin, low, high in rows]

    def _smallest(self, values: Tensor, count: int) -> Tensor:
        empty = values.new_full((count,), float("inf"))
        return empty.scatter_reduce(0, self.rows, values, "amin")


@dataclass(frozen=True, slots=True)
class TokenScores(TokenMargins):
    """Margins with ``losses`` (N,), nats, float32, with a gradient where the model has one."""

    losses: Tensor


def token_scores(
    model: nn.Module, examples: Sequence[Example], prefix_cache: PrefixCache | None = None
) -> TokenScores:
    """Score every answer token, examples of similar length together to save padding."""
    return joined(
        batch_scores(model, examples, batch, prefix_cache) for batch in batches(model, examples)
    )


def joined(parts: Iterable[TokenScores]) -> TokenScores:
    """The scores of several batches as one."""
    parts, names = list(parts), ("token_margins", "tolerances", "rows", "losses")
    return TokenScores(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def batch_scores(
    model: Any,
    examples: Sequence[Example],
    batch: Sequence[int],
    prefix_cache: PrefixCache | None,
    instead: LossInstead | None = None,
) -> TokenScores:
    """Score the examples with these indices, together; ``instead`` may put other losses in place of
    the cross-entropies.
    """
    chosen = [examples[i] for i in batch]
    answers = answer_logits(model, chosen, prefix_cache, in_float=False)
    losses, token_margins = token_losses(answers.logits, answers.targets)
    if instead is not None:
        losses = instead(chosen, answers, losses)
    target_logits = answers.logits.detach().gather(1, answers.targets[:, None])[:, 0].float()
    places = torch.tensor(batch, device=answers.rows.device)
    tolerances = tie_tolerance(model, target_logits)
    return TokenScores(token_margins, tolerances, places[answers.rows], losses)


def tie_tolerance(model: nn.Module, logits: Tensor) -> Tensor:
    """By how much another batch shape or a KV cache may move the margin of these logits.

    Taken from the dtype that the model computes in: logits in fp32 may come from a narrower one.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return TIE_TOLERANCE * torch.finfo(dtype).eps * logits.abs()


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N,), with a gradient, and margin (N,) of each target, from logits
    (N, vocabulary) of any dtype.
    """
    losses, token_margins = _TokenLoss.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses, token_margins


class _TokenLoss(torch.autograd.Function):
    """``token_losses``, a few rows at a time: full tables in fp32 for the softmax, its logarithm
    and the margins took longer than the vocabulary projection itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(logits), device=logits.device)
        norms, token_margins = torch.empty_like(losses), torch.empty_like(losses)
        for rows in slices(logits):
            table = logits[rows].to(torch.float32, copy=True)  # written to below
            columns = targets[rows, None]
            norms[rows] = table.logsumexp(1)
            target_logits = table.gather(1, columns)[:, 0]
            losses[rows] = norms[rows] - target_logits
            token_margins[rows] = target_logits - table.scatter_(1, columns, -torch.inf).amax(1)
        ctx.save_for_backward(logits, targets, norms)
        token_margins = torch.nan_to_num(token_margins, nan=float("-inf"))
        ctx.mark_non_differentiable(token_margins)
        return losses, token_margins

    @staticmethod
    def backward(ctx: Any, loss_gradients: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        gradients = torch.empty_like(logits)
        for rows in slices(logits):
            softmax = logits[rows].to(torch.float32, copy=True).sub_(norms[rows, None]).exp_()
            softmax.scatter_add_(1, targets[rows, None], softmax.new_full((len(softmax), 1), -1.0))
            gradients[rows] = softmax.mul_(loss_gradients[rows, None])
        return gradients, None


def padded(examples: Sequence[Example]) -> Tensor:
    """(rows, width): token ids padded on the right."""
    width = padded_width(max(len(e.ids) for e in examples))
    if width == len(examples):  # never square: the Fisher moments tell rows from positions by size
        width = padded_width(width + 1)
    return padded_rows([e.ids for e in examples], width)


def batch_tokens(model: nn.Module) -> int:
    """The number of padded tokens in a batch, so that its logits stay within bounds."""
    factor = ACCELERATOR_BATCH_FACTOR if is_accelerated(model) else 1
    tokens = factor * min(MAX_BATCH_TOKENS, MAX_BATCH_LOGITS // vocabulary_size(model))
    return max(MIN_BATCH_TOKENS, tokens)


def step_tokens(model: nn.Module) -> int:
    """The number of padded tokens in a batch that is trained on or measured, whose activations in
    the upper half of the blocks are all kept.
    """
    factor = ACCELERATOR_BATCH_FACTOR if is_accelerated(model) else 1
    tokens = factor * MAX_ACTIVATIONS // max(1, activation_bytes(model))
    return min(batch_tokens(model), max(MIN_BATCH_TOKENS, tokens))


def activation_bytes(model: nn.Module) -> int:
    """Of one token, about: a number for each input and output of a linear layer (measured)."""
    layers = list(blocks(model)[1])
    upper = (m for block in layers[len(layers) // 2 :] for m in block.modules() if is_matrix(m))
    widths = sum(sum(matrix_shape(module)) for module in upper)
    return widths * next(model.parameters()).itemsize


def step_batches(model: nn.Module, examples: Sequence[Example]) -> Iterator[list[int]]:
    """``batches`` that are small enough to be trained on, each with a backward pass of its own."""
    return by_length(examples, step_tokens(model), equal_width=not is_accelerated(model))


def batches(model: nn.Module, examples: Sequence[Example]) -> Iterator[list[int]]:
    """``by_length`` for the model's device: on a CPU padding costs as much as text, on an
    accelerator it is the number of batches that costs.
    """
    return by_length(examples, batch_tokens(model), equal_width=not is_accelerated(model))


def by_length(
    examples: Sequence[Example], tokens: int = MAX_BATCH_TOKENS, *, equal_width: bool = False
) -> Iterator[list[int]]:
    """Batches of indices of similar length, each of a bounded number of padded tokens; with
    ``equal_width``, all examples of a batch are equally wide once they are padded.
    """

    def fits(rows: int, shortest: int, width: int) -> bool:
        narrower = equal_width and padded_width(shortest) < padded_width(width)
        return rows * width <= tokens and rows <= MAX_BATCH_ROWS and not narrower

    return grouped([len(example.ids) for example in examples], fits)


def grouped(lengths: Sequence[int], fits: Callable[[int, int, int], bool]) -> Iterator[list[int]]:
    """Batches of indices by length, as large as ``fits(rows, shortest, longest)`` allows."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and not fits(len(batch) + 1, lengths[batch[0]], lengths[index]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def recall(
    model: nn.Module, examples: Sequence[Example], prefix_cache: PrefixCache | None = None
) -> list[Outcome]:
    """Exact recall of each example by one forward pass (teacher-forced)."""
    outcomes: dict[int, Outcome] = {}
    for batch in batches(model, examples):
        answers = answer_logits(model, [examples[i] for i in batch], prefix_cache, in_float=False)
        margins = _token_margins(model, answers)
        outcomes.update(zip(batch, margins.outcomes(len(batch)), strict=True))
    return [outcomes[i] for i in range(len(examples))]


def _token_margins(model: nn.Module, answers: Answers) -> TokenMargins:
    """``token_scores`` without the losses, in a quarter of the time; overwrites the logits."""
    logits = answers.logits
    places = torch.arange(len(logits), device=logits.device), answers.targets
    target_logits = logits[places].float()
    logits[places] = float("-inf")
    others = torch.cat([logits[rows].float().amax(1) for rows in slices(logits)])
    token_margins = torch.nan_to_num(target_logits - others, nan=float("-inf"))
    return TokenMargins(token_margins, tie_tolerance(model, target_logits), answers.rows)


def slices(table: Tensor) -> Iterator[slice]:
    """Slices of a table's rows, small enough that copies of one stay in the processor's cache."""
    rows = SLICE_ROWS
    if table.device.type != "cpu":
        rows = max(rows, ACCELERATOR_SLICE_LOGITS // table.shape[1])
    for at in range(0, len(table), rows):
        yield slice(at, min(at + rows, len(table)))
