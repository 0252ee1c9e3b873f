"""Letting a model go on: greedy or sampled, many texts at once, with a cache of keys and values.

Invariants:
- Texts of different lengths are padded on the left; what a row says does not depend on the others,
  but for near-ties (see ``probes``).
- A text never grows beyond the model's context.
- A model without a cache, or with one that rows cannot be taken from, reads all again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvedit.model.devices import first_device, is_accelerated, is_spread
from kvedit.model.forward import next_logits
from kvedit.model.loading import context_of, has_own_code
from kvedit.model.prompts import Example
from kvedit.model.scoring import MAX_BATCH_ROWS

MAX_KV_CACHE_BYTES = 1 << 30
"""Of keys and values that are kept for rows that branch; more rows than fit read all again."""
MAX_ACCELERATOR_ROWS = 1024
"""In a batch on an accelerator, which a small model's rows do not fill."""


@torch.no_grad()
def generate(
    model: Any,
    prefixes: Sequence[Sequence[int]],
    *,
    end: int | frozenset[int],
    limit: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continue each prefix by up to ``limit`` tokens; the end token, or any of them, is left out.

    Greedy at temperature 0, else sampled.  Prefixes of similar length share a batch, padded on the
    left where they differ.  Decoding stops where the model's context ends.
    """
    texts: list[list[int]] = [[] for _ in prefixes]
    context = context_of(model)
    longest = max(map(len, prefixes), default=0) + limit
    for part in _batches(model, prefixes, max_batch_rows(model, longest)):
        room = min(limit, context - len(prefixes[part[-1]]))
        run = Decoding(model, [prefixes[i] for i in part])
        for index, row in zip(part, _finish(run, end, room, temperature, generator), strict=True):
            texts[index] = row
    return texts


def _finish(
    run: Decoding,
    end: int | frozenset[int],
    limit: int,
    temperature: float,
    generator: torch.Generator | None,
) -> list[list[int]]:
    """Decode until all rows have ended or have ``limit`` tokens; rows that have ended leave."""
    ends = frozenset({end}) if isinstance(end, int) else end
    alive = list(range(run.rows))
    texts: list[list[int]] = [[] for _ in alive]
    ended: set[int] = set()
    for _ in range(limit):
        chosen = _choose(run.next_logits(), temperature, generator)
        for row, token in zip(alive, chosen.tolist(), strict=True):
            if token in ends:
                ended.add(row)
            elif row not in ended:
                texts[row].append(token)
        going = [at for at, row in enumerate(alive) if row not in ended]
        if not going:
            break
        few = len(going) <= len(alive) * 3 // 4  # copying the cache costs: when it pays
        if few and run.divisible:
            kept = torch.tensor(going, device=chosen.device)
            run.go_on(chosen[kept], kept)
            alive = [alive[at] for at in going]
        else:
            run.go_on(chosen)
    return texts


def generated(
    examples: Sequence[Example], end: int, proceed: Callable[..., list[list[int]]]
) -> list[list[int]]:
    """What is answered by real greedy generation, as tokens, up to a little more than the longest
    answer expected; ``proceed`` as ``generate`` of a model.
    """
    limit = max((len(e.ids) - e.start for e in examples), default=0) + 1
    return proceed([e.ids[: e.start] for e in examples], end=end, limit=limit)


def recalled(examples: Sequence[Example], rows: Sequence[Sequence[int]], end: int) -> list[bool]:
    """Whether what was ``generated`` is exactly what is expected, tokens and end compared."""
    return [
        (*row, end)[: len(e.ids) - e.start] == e.ids[e.start :]
        for row, e in zip(rows, examples, strict=True)
    ]


def generated_recall_of(
    examples: Sequence[Example], end: int, proceed: Callable[..., list[list[int]]]
) -> list[bool]:
    """Exact recall by real greedy generation; ``proceed`` as ``generate`` of a model."""
    return recalled(examples, generated(examples, end, proceed), end)


def max_batch_rows(model: Any, tokens: int) -> int:
    """How many texts of so many tokens go on together: on an accelerator more, where their keys and
    values fit.
    """
    if not is_accelerated(model):
        return MAX_BATCH_ROWS
    fitting = MAX_KV_CACHE_BYTES // max(1, tokens * _cached_a_token(model))
    return max(MAX_BATCH_ROWS, min(MAX_ACCELERATOR_ROWS, fitting))


def _cached_a_token(model: Any) -> int:
    """Bytes of keys and values, as the configuration says; taken for large where it does not."""
    config = model.config.get_text_config()
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)
    except AttributeError:
        return MAX_KV_CACHE_BYTES


def _batches(model: Any, prefixes: Sequence[Sequence[int]], rows: int) -> Iterator[list[int]]:
    """Indices by length; of one length each for a model whose own code may not know padding."""
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    alike = has_own_code(model)
    batch: list[int] = []
    for index in order:
        other = alike and batch and len(prefixes[batch[0]]) != len(prefixes[index])
        if batch and (other or len(batch) >= rows):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class Decoding:
    """Texts that are continued together, a token at a time; rows may leave, or branch."""

    def __init__(self, model: Any, prefixes: Sequence[Sequence[int]]) -> None:
        self._model = model
        device = first_device(model)
        width = max(len(prefix) for prefix in prefixes)
        ids = torch.zeros(len(prefixes), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prefix in enumerate(prefixes):
            ids[row, width - len(prefix) :] = torch.tensor(prefix)
            mask[row, width - len(prefix) :] = 1
        self._padded = not bool(mask.all())
        self.ids, self._mask = ids.to(device), mask.to(device)
        self._unread = self.ids
        self._cache: Any = None
        self._large = False  # too many rows to keep a cache of

    @property
    def rows(self) -> int:
        """How many texts there are."""
        return len(self.ids)

    @property
    def divisible(self) -> bool:
        """Whether some rows can go on without the others, with what is cached of them.

        Of custom code's tuples which side is the row is not for us to guess.
        """
        return not self._cache or hasattr(self._cache, "batch_select_indices")

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """(rows, vocabulary): what the model says after all that was chosen; asked for once before
        each ``go_on``.
        """
        if self._large:
            parts = (
                self.ids[at : at + MAX_BATCH_ROWS] for at in range(0, self.rows, MAX_BATCH_ROWS)
            )
            return torch.cat([next_logits(self._model, part) for part in parts])
        extra: dict[str, Tensor] = {}
        if self._padded:
            extra["attention_mask"] = self._mask
            if _takes_positions(type(self._model).forward):  # its own may be a hook
                positions = self._mask.cumsum(1).sub(1).clamp_min(0)
                extra["position_ids"] = positions[:, -self._unread.shape[1] :]
        out = self._model(
            input_ids=self._unread, past_key_values=self._cache, use_cache=True, **extra
        )
        self._cache = getattr(out, "past_key_values", None)
        logits: Tensor = out.logits[:, -1]
        return logits

    def go_on(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """Let ``rows`` (N,), which may repeat, go on with ``tokens`` (N,); by default all."""
        if rows is not None:
            self._take(rows)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._unread = tokens[:, None] if self._cache else self.ids

    def _take(self, rows: Tensor) -> None:
        more = len(rows) / self.rows
        grown = more > 1 and self._bytes() * more > MAX_KV_CACHE_BYTES
        still = self._large and len(rows) > MAX_BATCH_ROWS
        self._large = not self._padded and (grown or still)
        self.ids, self._mask = self.ids[rows], self._mask[rows]
        if self._cache and self.divisible and not self._large:
            # A cache over several devices takes indices from the CPU alone.
            self._cache.batch_select_indices(rows.cpu() if is_spread(self._model) else rows)
        else:
            self._cache = None

    def _bytes(self) -> float:
        """What is cached; infinite where that cannot be told."""
        layers = getattr(self._cache, "layers", None)
        if not layers or not all(hasattr(layer, "keys") for layer in layers):
            return math.inf
        parts = (part for layer in layers for part in (layer.keys, layer.values))
        return float(sum(part.nbytes for part in parts if part is not None))


@cache
def _takes_positions(forward: Callable[..., Any]) -> bool:
    """Whether a model's forward pass takes ``position_ids`` (BLOOM's, with ALiBi, does not)."""
    return "position_ids" in inspect.signature(forward).parameters


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.float().argmax(-1)
    weights = torch.softmax(logits.float() / temperature, -1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]
