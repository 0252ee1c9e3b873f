"""Generation, greedy or sampled, of many texts at once with a KV cache.

Invariants:
- Texts of different lengths are padded on the left; a row does not depend on the others, except
  for numerical ties (see ``scoring``).
- A text never grows beyond the model's context.
- A model without a KV cache, or with one whose rows cannot be selected, recomputes the whole text.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvedit.model.devices import first_device, is_accelerated, is_spread
from kvedit.model.forward import next_logits
from kvedit.model.loading import context_of, has_own_code
from kvedit.model.prompts import Example
from kvedit.model.scoring import MAX_BATCH_ROWS, grouped

MAX_KV_CACHE_BYTES = 1 << 30  # a round number; rows that branch beyond it are recomputed
REPLACEMENT = "\ufffd"  # what bytes that are not a whole character are decoded to
MAX_ACCELERATOR_ROWS = 1024  # in a batch, where a small model's rows would leave most of it idle


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
    """Continue each prefix by up to ``limit`` tokens; the end tokens ``end`` are left out.

    Greedy at temperature 0, else sampled.  Prefixes of similar length share a batch.
    """
    texts: list[list[int]] = [[] for _ in prefixes]
    context = context_of(model)
    longest = max(map(len, prefixes), default=0) + limit
    for batch in _batches(model, prefixes, max_batch_rows(model, longest)):
        tokens = min(limit, context - len(prefixes[batch[-1]]))
        run = Decoding(model, [prefixes[i] for i in batch])
        rows = _finish(run, end, tokens, temperature, generator)
        for index, row in zip(batch, rows, strict=True):
            texts[index] = row
    return texts


@torch.no_grad()
def stream(model: Any, prefix: Sequence[int], *, end: frozenset[int], limit: int) -> Iterator[int]:
    """The greedy tokens of ``generate`` for one prefix, as they come."""
    run = Decoding(model, [prefix])
    for _ in range(min(limit, context_of(model) - len(prefix))):
        chosen = _choose(run.next_logits(), 0.0, None)
        if (token := int(chosen)) in end:
            break
        yield token
        run.append(chosen)


def pieces(tokens: Iterable[int], text_of: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of tokens as they come, in whole characters: a token may be a part of one, or turn
    the text before it into another.
    """
    ids: list[int] = []
    shown = text = ""
    for token in tokens:
        ids.append(token)
        text = text_of(ids)
        if text.startswith(shown) and not text.endswith(REPLACEMENT):
            yield text.removeprefix(shown)
            shown = text
    if text.startswith(shown) and text != shown:
        yield text.removeprefix(shown)


def _finish(
    run: Decoding,
    end: int | frozenset[int],
    limit: int,
    temperature: float,
    generator: torch.Generator | None,
) -> list[list[int]]:
    """Decode until all rows have ended or have ``limit`` tokens; ended rows leave the batch."""
    ends = frozenset({end}) if isinstance(end, int) else end
    active = list(range(run.rows))
    texts: list[list[int]] = [[] for _ in active]
    ended: set[int] = set()
    for _ in range(limit):
        chosen = _choose(run.next_logits(), temperature, generator)
        for row, token in zip(active, chosen.tolist(), strict=True):
            if token in ends:
                ended.add(row)
            elif row not in ended:
                texts[row].append(token)
        unfinished = [at for at, row in enumerate(active) if row not in ended]
        if not unfinished:
            break
        # Copying the KV cache costs: it pays once a quarter of the rows have ended.
        if len(unfinished) <= len(active) * 3 // 4 and run.can_select_rows:
            rows = torch.tensor(unfinished, device=chosen.device)
            run.append(chosen[rows], rows)
            active = [active[at] for at in unfinished]
        else:
            run.append(chosen)
    return texts


def generated_recall(
    examples: Sequence[Example], end: int, decode: Callable[..., list[list[int]]]
) -> tuple[list[bool], list[list[int]]]:
    """Exact recall by greedy generation, and the answers' tokens, one more at most than the longest
    expected answer has; ``decode`` is ``generate`` with its model bound.
    """
    limit = max((len(e.ids) - e.start for e in examples), default=0) + 1
    rows = decode([e.ids[: e.start] for e in examples], end=end, limit=limit)
    both = zip(rows, examples, strict=True)
    exact = [(*row, end)[: len(e.ids) - e.start] == e.ids[e.start :] for row, e in both]
    return exact, rows


def max_batch_rows(model: Any, tokens: int) -> int:
    """The number of texts of ``tokens`` tokens in a batch: on an accelerator those whose KV cache
    fits.
    """
    if not is_accelerated(model):
        return MAX_BATCH_ROWS
    fitting = MAX_KV_CACHE_BYTES // max(1, tokens * cache_bytes_per_token(model))
    return max(MAX_BATCH_ROWS, min(MAX_ACCELERATOR_ROWS, fitting))


def cache_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values by the configuration; assumed to be large if it does not say."""
    config = model.config.get_text_config()
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)
    except AttributeError:
        return MAX_KV_CACHE_BYTES


def _batches(model: Any, prefixes: Sequence[Sequence[int]], rows: int) -> Iterator[list[int]]:
    """Indices by length, of equal length for a model whose own code may not support padding."""
    equal_length = has_own_code(model)

    def fits(count: int, shortest: int, longest: int) -> bool:
        return count <= rows and not (equal_length and longest > shortest)

    return grouped([len(prefix) for prefix in prefixes], fits)


class Decoding:
    """Texts that are continued together, one token at a time; rows may be dropped or repeated."""

    def __init__(self, model: Any, prefixes: Sequence[Sequence[int]]) -> None:
        self._model = model
        width = max(map(len, prefixes))
        rows = [(width - len(prefix), prefix) for prefix in prefixes]
        ids = torch.tensor([[*[0] * gap, *prefix] for gap, prefix in rows], dtype=torch.long)
        mask = torch.tensor([[*[0] * gap, *[1] * len(prefix)] for gap, prefix in rows])
        self._padded = any(gap for gap, _ in rows)
        self.ids, self._mask = ids.to(first_device(model)), mask.to(first_device(model))
        self._new_ids = self.ids  # not in the cache yet
        self._cache: Any = None
        self._uncached = False  # there are too many rows for a KV cache

    @property
    def rows(self) -> int:
        """The number of texts."""
        return len(self.ids)

    @property
    def can_select_rows(self) -> bool:
        """Whether rows can be selected from the KV cache: not from the tuples of custom code."""
        return not self._cache or hasattr(self._cache, "batch_select_indices")

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """(rows, vocabulary): logits of each text's next token; called once before ``append``."""
        if self._uncached:
            parts = torch.split(self.ids, MAX_BATCH_ROWS)
            return torch.cat([next_logits(self._model, part) for part in parts])
        extra: dict[str, Tensor] = {}
        if self._padded:
            extra["attention_mask"] = self._mask
            if _takes_positions(type(self._model).forward):  # the instance's may be a hook
                positions = self._mask.cumsum(1).sub(1).clamp_min(0)
                extra["position_ids"] = positions[:, -self._new_ids.shape[1] :]
        out = self._model(
            input_ids=self._new_ids, past_key_values=self._cache, use_cache=True, **extra
        )
        self._cache = getattr(out, "past_key_values", None)
        logits: Tensor = out.logits[:, -1]
        return logits

    def append(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """Continue ``rows`` (N,), which may repeat, by ``tokens`` (N,); by default all rows."""
        if rows is not None:
            self._select(rows)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._new_ids = tokens[:, None] if self._cache else self.ids

    def _select(self, rows: Tensor) -> None:
        growth = len(rows) / self.rows
        too_large = growth > 1 and self._cache_bytes() * growth > MAX_KV_CACHE_BYTES
        still_too_large = self._uncached and len(rows) > MAX_BATCH_ROWS
        self._uncached = not self._padded and (too_large or still_too_large)
        self.ids, self._mask = self.ids[rows], self._mask[rows]
        if self._cache and self.can_select_rows and not self._uncached:
            # A cache over several devices takes indices from the CPU only.
            self._cache.batch_select_indices(rows.cpu() if is_spread(self._model) else rows)
        else:
            self._cache = None

    def _cache_bytes(self) -> float:
        """Bytes of the KV cache; infinite for a cache of an unknown kind."""
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
