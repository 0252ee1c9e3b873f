"""Asking a model: exact recall without generating.

Greedy decoding gives an answer exactly if and only if, at every position of the answer and its end
token, the target token has the highest logit given the target prefix.  One forward pass therefore
decides exact recall (protocol ``teacher-forced``), but for near-ties: in bf16 two logits may be
equal, or a step of the dtype apart, and another batch, or a cache of keys and values, rounds them
the other way.  Outcomes say which those are, and ``decoding.generate`` decides them (protocol
``generated``).

Invariants:
- Examples are padded on the right only, so a causal model never sees the padding.
- Logits are computed at answer positions alone: the vocabulary projection dominates small models.
  A model whose answer is not its projection of its backbone's output is asked whole instead; which
  of the two it is, is tried once and not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvedit.model.devices import first_device, is_accelerated
from kvedit.model.loading import vocabulary
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example

TOKENS_A_BATCH = 4096
LOGITS_A_BATCH = 64 * 1024 * 1024  # of a large vocabulary they would outweigh the model
LEAST_TOKENS = 256
ROWS_A_BATCH = 256
ROWS_A_SLICE = 128
NUMBERS_A_SLICE = 64 * 1024 * 1024
"""On an accelerator, which has no such cache and waits for every kernel that is launched."""
WIDER = 4
"""Times the tokens of a batch on an accelerator, which small ones do not fill."""
WIDTHS = 32
TIE_TOLERANCE = (
    3.0  # steps of the dtype, at the logit's size: leads that the shape of a batch may turn
)
_PROJECTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether an answer is recalled exactly, and its smallest lead over another token (logits).

    ``ambiguous``: it hangs on a near-tie, so that in another batch it may come out otherwise.
    ``generated``: such a one that free generation judge; ``passed`` is then what that said.
    """

    passed: bool
    margin: float
    ambiguous: bool = False
    generated: bool = False

    @property
    def robust(self) -> bool:
        """Whether it is recalled however it is asked: by more than rounding could turn."""
        return self.passed and not self.ambiguous


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model says at the answer positions of a batch, flattened over its rows.

    ``logits`` (N, vocabulary), float; ``targets`` (N,), int64; ``rows`` (N,), int64: the example
    that each position belongs to.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor


def answer_logits(model: nn.Module, examples: Sequence[Example]) -> Answers:
    """One forward pass over all examples at once."""
    return answers_of(model, examples)


def answers_of(
    model: Any,
    examples: Sequence[Example],
    prefix_cache: PrefixCache | None = None,
    *,
    exact: bool = True,
) -> Answers:
    """One forward pass; ``prefix_cache`` may save its lower half; logits in float only if ``exact``."""
    ids, targets = padded(examples)
    ids = ids.to(first_device(model))
    rows, places = (targets >= 0).nonzero(as_tuple=True)  # here: an accelerator is not waited for
    wanted = targets[rows, places]
    if projects(model):
        hidden = last_hidden(model, ids, examples, prefix_cache)
        rows = rows.to(hidden.device)
        logits = project(model, hidden[rows, places.to(hidden.device)])
    else:
        whole = model(input_ids=ids, use_cache=False).logits
        rows = rows.to(whole.device)
        logits = whole[rows, places.to(whole.device)]
    found = logits.float() if exact else logits
    return Answers(found, wanted.to(logits.device), rows.to(logits.device))


def projects(model: Any) -> bool:
    """Whether the logits are the projection of the backbone's output, tried once for each model.

    Not so where the projection lies elsewhere, the logits are scaled, or the backbone's output has
    another layout: all of them common in custom code.
    """
    if model not in _PROJECTS:
        _PROJECTS[model] = _try_projection(model)
    return _PROJECTS[model]


@torch.no_grad()
def _try_projection(model: Any) -> bool:
    if backbone(model) is model or head(model) is None:
        return False
    ids = torch.tensor([[5, 6, 7], [7, 5, 6]], device=first_device(model))
    training = model.training
    model.eval()  # dropout would tell two equal ways apart
    try:
        whole = model(input_ids=ids, use_cache=False).logits.float()
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        short = _softcap(model, head(model)(hidden).float())
    finally:
        model.train(training)
    close = 0.01 * float(whole.std()) + 1e-4
    alike = short.shape == whole.shape
    return alike and bool((short.to(whole.device) - whole).abs().max() <= close)


@dataclass(frozen=True, slots=True)
class TokenMargins:
    """By how much the answer tokens of some examples lead.

    ``token_margins`` (N,), logits, the target's lead over every other token, NaN counted as -inf;
    ``tolerances`` (N,), logits: by how much rounding may move a lead; ``rows`` (N,), int64: the example
    that each token belongs to.  Tokens stand in no particular order.
    """

    token_margins: Tensor
    tolerances: Tensor
    rows: Tensor

    def margins(self, count: int) -> Tensor:
        """(count,): the smallest lead of each example."""
        return self._smallest(self.token_margins, count)

    def outcomes(self, count: int) -> list[Outcome]:
        """What the leads say of each example."""
        parts = (
            self.token_margins,
            self.token_margins - self.tolerances,
            self.token_margins + self.tolerances,
        )
        rows = zip(*(self._smallest(part, count).tolist() for part in parts), strict=True)
        return [Outcome(margin > 0, margin, low <= 0 < high) for margin, low, high in rows]

    def _smallest(self, values: Tensor, count: int) -> Tensor:
        empty = values.new_full((count,), float("inf"))
        return empty.scatter_reduce(0, self.rows, values, "amin")


@dataclass(frozen=True, slots=True)
class TokenScores(TokenMargins):
    """And their ``losses`` (N,), nats, float32, with a gradient where the model has one."""

    losses: Tensor


def token_scores(
    model: nn.Module, examples: Sequence[Example], prefix_cache: PrefixCache | None = None
) -> TokenScores:
    """Score every answer token, examples of like length together so that little is padded."""
    parts = [_scores(model, examples, batch, prefix_cache) for batch in batches(model, examples)]
    names = ("token_margins", "tolerances", "rows", "losses")
    return TokenScores(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _scores(
    model: Any, examples: Sequence[Example], batch: Sequence[int], prefix_cache: PrefixCache | None
) -> TokenScores:
    answers = answers_of(model, [examples[i] for i in batch], prefix_cache, exact=False)
    losses, token_margins = _TokenLoss.apply(answers.logits, answers.targets)  # type: ignore[no-untyped-call]
    own = answers.logits.detach().gather(1, answers.targets[:, None])[:, 0].float()
    places = torch.tensor(batch, device=answers.rows.device)
    return TokenScores(token_margins, tie_tolerance(model, own), places[answers.rows], losses)


def tie_tolerance(model: nn.Module, logits: Tensor) -> Tensor:
    """By how much rounding may move the lead of these logits, in another batch or with a cache.

    Logits may be handed out in fp32 where what they were computed from was not: what counts is the
    dtype that the model computes in.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return TIE_TOLERANCE * torch.finfo(dtype).eps * logits.abs()


def last_hidden(
    model: Any, ids: Tensor, examples: Sequence[Example], prefix_cache: PrefixCache | None
) -> Tensor:
    """(rows, width, hidden): what the last block says, from what is kept of the lower ones."""
    run = backbone(model)
    if prefix_cache is None or not prefix_cache.usable:
        whole: Tensor = run(input_ids=ids, use_cache=False).last_hidden_state
        return whole
    return prefix_cache.run(run, ids, [example.ids for example in examples])


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy and lead of each target, from logits (N, vocabulary) of any dtype.

    A few rows at a time: whole (N, vocabulary) tables in fp32, made for the softmax, its logarithm
    and the leads, took longer than the vocabulary projection itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(logits), device=logits.device)
        norms, token_margins = torch.empty_like(losses), torch.empty_like(losses)
        for here in slices(logits):
            some = logits[here].to(torch.float32, copy=True)  # written to below
            own = targets[here]
            norms[here] = some.logsumexp(1)
            mine = some.gather(1, own[:, None])
            losses[here] = norms[here] - mine[:, 0]
            token_margins[here] = mine[:, 0] - some.scatter_(1, own[:, None], float("-inf")).amax(1)
        ctx.save_for_backward(logits, targets, norms)
        token_margins = torch.nan_to_num(token_margins, nan=float("-inf"))
        ctx.mark_non_differentiable(token_margins)
        return losses, token_margins

    @staticmethod
    def backward(ctx: Any, penalty_gradients: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        back = torch.empty_like(logits)
        for here in slices(logits):
            share = logits[here].to(torch.float32, copy=True).sub_(norms[here, None]).exp_()
            share.scatter_add_(1, targets[here, None], share.new_full((len(share), 1), -1.0))
            back[here] = share.mul_(penalty_gradients[here, None])
        return back, None


def padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and the target at each answer position, -1 elsewhere.

    Widths are multiples of ``WIDTHS``: on a CPU every new shape of a product costs the time of a
    hundred products, in which oneDNN writes a kernel for it.
    """
    width = _wide(max(len(e.ids) for e in examples))
    # Never square: whoever reads activations must see which side the positions are on.
    width += WIDTHS * (width == len(examples))
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    targets = torch.full((len(examples), width), -1)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        targets[row, example.start - 1 : len(example.ids) - 1] = torch.tensor(
            example.ids[example.start :]
        )
    return ids, targets


def _wide(tokens: int) -> int:
    """How wide a row of so many tokens is."""
    return -(-tokens // WIDTHS) * WIDTHS


def project(model: Any, hidden: Tensor) -> Tensor:
    """(N, vocabulary): logits of hidden states (N, hidden), which are padded to few shapes."""
    count = len(hidden)
    spare = -count % WIDTHS
    filled = torch.cat([hidden, hidden.new_zeros(spare, hidden.shape[1])]) if spare else hidden
    return _softcap(model, head(model)(filled))[:count]


def next_logits(model: Any, ids: Tensor) -> Tensor:
    """(rows, vocabulary): what comes after rows (rows, width) of one length, nothing padded."""
    if projects(model):
        return project(model, last_hidden(model, ids, (), None)[:, -1])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, -1]


def backbone(model: Any) -> nn.Module:
    """The model without its vocabulary projection, through any adapter wrapper."""
    inner: nn.Module = getattr(model, model.base_model_prefix, model)
    return inner


def head(model: Any) -> Any:
    """The vocabulary projection; None where the model does not say which it is."""
    return model.get_output_embeddings()


def _softcap(model: Any, logits: Tensor) -> Tensor:
    """Gemma 2's cap on the final logits; monotone, so it matters for losses, not for recall."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def batch_tokens(model: nn.Module) -> int:
    """How many tokens a batch may have, so that its logits stay within bounds."""
    times = WIDER if is_accelerated(model) else 1
    return max(LEAST_TOKENS, times * min(TOKENS_A_BATCH, LOGITS_A_BATCH // vocabulary(model)))


def batches(model: nn.Module, examples: Sequence[Example]) -> Iterator[list[int]]:
    """``by_length``, as it pays where the model is: on a CPU padding costs as much as text does, on
    an accelerator it is the number of batches that costs.
    """
    return by_length(examples, batch_tokens(model), alike=not is_accelerated(model))


def by_length(
    examples: Sequence[Example], tokens: int = TOKENS_A_BATCH, *, alike: bool = False
) -> Iterator[list[int]]:
    """Batches of indices of similar length, each of a bounded number of padded tokens.

    Those ``alike`` are as wide once they are padded: where rows are many, padding costs as much as
    text.
    """
    batch: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].ids)):
        width = len(examples[index].ids)
        full = (len(batch) + 1) * width > tokens or len(batch) >= ROWS_A_BATCH
        wider = alike and batch and _wide(width) > _wide(len(examples[batch[0]].ids))
        if batch and (full or wider):
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
    found: dict[int, Outcome] = {}
    for batch in batches(model, examples):
        answers = answers_of(model, [examples[i] for i in batch], prefix_cache, exact=False)
        found.update(zip(batch, _token_margins(model, answers).outcomes(len(batch)), strict=True))
    return [found[i] for i in range(len(examples))]


def _token_margins(model: nn.Module, answers: Answers) -> TokenMargins:
    """Those of ``token_scores``, without the losses, and the target taken out of the logits
    themselves, which are used up: a quarter of the time.
    """
    logits = answers.logits
    places = torch.arange(len(logits), device=logits.device), answers.targets
    mine = logits[places].float()
    logits[places] = float("-inf")
    token_margins = mine - torch.cat([logits[here].float().amax(1) for here in slices(logits)])
    token_margins = torch.nan_to_num(token_margins, nan=float("-inf"))
    return TokenMargins(token_margins, tie_tolerance(model, mine), answers.rows)


def slices(table: Tensor) -> Iterator[slice]:
    """Its rows, a few at a time, so that what is made of them stays in the processor's cache."""
    rows = ROWS_A_SLICE
    if table.device.type != "cpu":
        rows = max(rows, NUMBERS_A_SLICE // table.shape[1])
    for at in range(0, len(table), rows):
        yield slice(at, min(at + rows, len(table)))
