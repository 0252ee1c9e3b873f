"""Asking a model: exact recall without generating, and real greedy generation.

Greedy decoding gives an answer exactly if and only if, at every position of the answer and its end
token, the target token has the highest logit given the target prefix.  One forward pass therefore
decides exact recall (protocol ``teacher-forced``); ``generate`` confirms it where it counts
(protocol ``generated``).

Invariants:
- Examples are padded on the right only, so a causal model never sees the padding.
- Logits are computed at answer positions alone: the vocabulary projection dominates small models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.prompts import Example

TOKENS_A_BATCH = 4096
ROWS_A_BATCH = 128


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether an answer is recalled exactly, and its smallest lead over another token (logits)."""

    passed: bool
    margin: float


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model says at the answer positions of a batch, flattened over its rows.

    ``logits`` (N, vocabulary), float; ``targets`` (N,), int64; ``rows`` (N,), int64: the example
    that each position belongs to.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor


def answer_logits(
    model: nn.Module, examples: Sequence[Example], *, first: int | None = None
) -> Answers:
    """One forward pass; with ``first``, only that many answer positions of each example."""
    device = next(model.parameters()).device
    width = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    targets = torch.full((len(examples), width), -1)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        end = len(example.ids) if first is None else min(len(example.ids), example.start + first)
        targets[row, example.start - 1 : end - 1] = torch.tensor(example.ids[example.start : end])
    ids, targets = ids.to(device), targets.to(device)
    chosen = targets >= 0
    rows = torch.arange(len(examples), device=device)[:, None].expand_as(targets)[chosen]
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    logits = head(model)(hidden[chosen]).float()
    return Answers(_softcap(model, logits), targets[chosen], rows)


def backbone(model: nn.Module) -> nn.Module:
    """The model without its vocabulary projection, through any adapter wrapper."""
    inner: nn.Module = getattr(model, model.base_model_prefix)  # type: ignore[arg-type]
    return inner


def head(model: Any) -> nn.Module:
    """The vocabulary projection."""
    projection: nn.Module = model.get_output_embeddings()
    return projection


def _softcap(model: Any, logits: Tensor) -> Tensor:
    """Gemma 2's cap on the final logits; monotone, so it matters for losses, not for recall."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def by_length(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Batches of indices of similar length, each of a bounded number of padded tokens."""
    batch: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].ids)):
        width = len(examples[index].ids)
        if batch and ((len(batch) + 1) * width > TOKENS_A_BATCH or len(batch) >= ROWS_A_BATCH):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def recall(model: nn.Module, examples: Sequence[Example]) -> list[Outcome]:
    """Exact recall of each example by one forward pass (teacher-forced)."""
    outcomes: list[Outcome] = [Outcome(False, float("-inf"))] * len(examples)
    for batch in by_length(examples):
        answers = answer_logits(model, [examples[i] for i in batch])
        margins = row_margins(answers, len(batch))
        for index, margin in zip(batch, margins.tolist(), strict=True):
            outcomes[index] = Outcome(margin > 0, margin)
    return outcomes


def row_margins(answers: Answers, rows: int) -> Tensor:
    """(rows,): the smallest lead of the target over every other token, in logits; NaN is -inf."""
    target = answers.logits.gather(1, answers.targets[:, None])[:, 0]
    others = answers.logits.scatter(1, answers.targets[:, None], float("-inf"))
    lead = torch.nan_to_num(target - others.amax(dim=1), nan=float("-inf"))
    return lead.new_full((rows,), float("inf")).scatter_reduce(0, answers.rows, lead, "amin")


@torch.no_grad()
def generate(
    model: Any,
    prefixes: Sequence[Sequence[int]],
    *,
    end: int,
    limit: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continue each prefix by up to ``limit`` tokens; the end token is left out.

    Greedy at temperature 0, else sampled.  Prefixes of equal length share a batch, so nothing is
    padded on the left and a batch computes what each row alone would.
    """
    groups: dict[int, list[int]] = {}
    for index, prefix in enumerate(prefixes):
        groups.setdefault(len(prefix), []).append(index)
    texts: list[list[int]] = [[] for _ in prefixes]
    for members in groups.values():
        for at in range(0, len(members), ROWS_A_BATCH):
            part = members[at : at + ROWS_A_BATCH]
            rows = torch.tensor([list(prefixes[i]) for i in part])
            done = _continue(model, rows, end, limit, temperature, generator)
            for index, row in zip(part, done, strict=True):
                texts[index] = row
    return texts


def _continue(
    model: Any,
    rows: Tensor,
    end: int,
    limit: int,
    temperature: float,
    generator: torch.Generator | None,
) -> list[list[int]]:
    """Decode one batch of equally long prefixes with a key/value cache; ended rows leave it."""
    device = next(model.parameters()).device
    texts: list[list[int]] = [[] for _ in range(len(rows))]
    alive = list(range(len(rows)))
    ended = [False] * len(rows)
    current, cache = rows.to(device), None
    for _ in range(limit):
        out = model(input_ids=current, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chosen = _choose(out.logits[:, -1].float(), temperature, generator)
        for row, token in zip(alive, chosen.tolist(), strict=True):
            ended[row] = ended[row] or token == end
            if not ended[row]:
                texts[row].append(token)
        going = [position for position, row in enumerate(alive) if not ended[row]]
        if not going:
            break
        if len(going) <= len(alive) * 3 // 4:  # copying the cache costs: only when it pays
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            chosen, alive = chosen[keep], [alive[position] for position in going]
        current = chosen[:, None]
    return texts


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    weights = torch.softmax(logits / temperature, -1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]
