"""One process's share of a step's work among several: see ``training.share``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvedit.adapter.adalora import Adapter
from kvedit.distributed.crew import Crew
from kvedit.model import generation, scoring
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome, TokenScores
from kvedit.replay.kl import ReferenceTexts, robust_mean
from kvedit.training.share import Share


class Together(Share):
    """One process's share; all must make the same calls in the same order."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    def scores(
        self, model: Any, examples: Sequence[Example], prefix_cache: PrefixCache | None
    ) -> TokenScores:
        """Those of all examples; the losses of this process's own have a gradient."""
        self._check(examples)
        mine = self._mine([len(example.ids) for example in examples])
        own = _no_scores(model)
        if mine:
            own = scoring.token_scores(model, [examples[i] for i in mine], prefix_cache)
        rows = torch.tensor(mine, dtype=torch.long, device=own.rows.device)[own.rows]
        losses = self._joined(own.losses)
        told = self._crew.exchange((own.token_margins.cpu(), own.tolerances.cpu(), rows.cpu()))
        token_margins, tolerances, places = (
            torch.cat(parts).to(rows.device) for parts in zip(*told, strict=True)
        )
        return TokenScores(token_margins, tolerances, places, losses)

    def divergence(
        self,
        reference_texts: ReferenceTexts,
        model: Any,
        chosen: Sequence[int],
        prefix_cache: PrefixCache | None,
    ) -> Tensor:
        """Over all tokens; those of this process's own texts have a gradient."""
        self._check([reference_texts.examples[i] for i in chosen])
        mine = chosen[self._crew.rank :: self._crew.count]
        own = (
            reference_texts.divergences(model, mine, prefix_cache)
            if mine
            else _no_scores(model).losses
        )
        return robust_mean(self._joined(own))

    def recall(
        self, model: Any, examples: Sequence[Example], prefix_cache: PrefixCache | None
    ) -> list[Outcome]:
        """Each process asks its own; all get to know all outcomes."""
        mine = self._mine([len(example.ids) for example in examples])
        own = scoring.recall(model, [examples[i] for i in mine], prefix_cache)
        return self._in_order(mine, own)

    def generate(
        self,
        model: Any,
        prefixes: Sequence[Sequence[int]],
        *,
        end: int | frozenset[int],
        limit: int,
    ) -> list[list[int]]:
        """Each process continues its own; all get to know all rows."""
        mine = self._mine([len(prefix) for prefix in prefixes])
        own = generation.generate(model, [prefixes[i] for i in mine], end=end, limit=limit)
        return self._in_order(mine, own)

    def once(self, loss: Tensor) -> Tensor:
        """Zero but in process 0; gradients are summed."""
        return loss if self._crew.rank == 0 else loss * 0.0

    def agreed(self, value: float) -> float:
        """Process 0's value: the last bits of a price may differ, decisions must not."""
        found: float = self._crew.exchange(value)[0]
        return found

    def align(self, adapter: Adapter) -> None:
        """On a GPU two runs of one kernel may differ; singular vectors would then differ more."""
        self._crew.align(adapter.starting_values())

    def sum_gradients(self, adapter: Adapter) -> None:
        """Before the coordinates are changed: the allocator judges by these gradients too."""
        self._crew.sum(adapter.gradients())

    def _check(self, examples: Sequence[Example]) -> None:
        """Raise ProcessesDifferError where another process has other texts: each would teach a part
        of its own, and none the whole.
        """
        self._crew.require_alike(
            hash(tuple(example.ids for example in examples)),  # of numbers: the same everywhere
            "the processes have drawn different texts for one step",
            hint="Start all of them with the same versions of kvedit and Python, or one alone.",
        )

    def _mine(self, lengths: Sequence[int]) -> list[int]:
        """The indices of this process's texts: dealt out by length, so that none waits long."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return order[self._crew.rank :: self._crew.count]

    def _joined(self, own: Tensor) -> Tensor:
        """The values (N,) of all processes; those of this one keep their gradient."""
        parts = self._crew.exchange(own.detach().cpu())
        return torch.cat(
            [own if rank == self._crew.rank else part.to(own.device)
             for rank, part in enumerate(parts)]
        )  # fmt: skip

    def _in_order(self, mine: Sequence[int], own: Sequence[Any]) -> list[Any]:
        told = self._crew.exchange(list(zip(mine, own, strict=True)))
        found = dict(pair for part in told for pair in part)
        return [found[i] for i in range(len(found))]


def _no_scores(model: Any) -> TokenScores:
    """Those of no examples, where the model is."""
    empty = torch.empty(0, device=next(model.parameters()).device)
    return TokenScores(empty, empty, empty.long(), empty)
