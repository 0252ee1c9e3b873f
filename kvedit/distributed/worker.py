"""A worker that does its share, as one of several processes: see ``training.worker``."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvedit.adapter.adalora import Adapter
from kvedit.distributed.processes import ProcessGroup, joined
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome, TokenScores
from kvedit.replay.kl import ReferenceTexts, Teacher
from kvedit.training.worker import Worker

TEXTS_PER_EXCHANGE = 256
"""For each process, in recall and generation: Ctrl-C takes effect at the next exchange."""
_T = TypeVar("_T")


def make_worker(model: Any, prefix_cache: PrefixCache) -> Worker:
    """One that shares the work if this program runs in several processes."""
    group = joined()
    return ParallelWorker(group, model, prefix_cache) if group else Worker(model, prefix_cache)


class ParallelWorker(Worker):
    """One process's share; all processes must make the same calls in the same order."""

    def __init__(
        self, group: ProcessGroup, model: Any, prefix_cache: PrefixCache | None = None
    ) -> None:
        super().__init__(model, prefix_cache)
        self._group = group

    def backward(
        self,
        examples: Sequence[Example],
        loss: Callable[[TokenScores], Tensor],
        teacher: Teacher | None = None,
    ) -> TokenScores:
        """The scores of all examples; the gradients of this process's own."""
        self._require_same_texts(examples)
        with self.in_step():
            mine = self._mine([len(example.ids) for example in examples])
            places = torch.tensor(mine, dtype=torch.long)

            def loss_of(scores: TokenScores) -> Tensor:
                rows = places.to(scores.rows.device)[scores.rows]
                return loss(replace(scores, rows=rows))

            own = None
            if mine:
                own = super().backward([examples[i] for i in mine], loss_of, teacher)
            parts = self._group.exchange("scores", own and _message(own, places))
        tensors = zip(*filter(None, parts), strict=True)
        device = next(self.model.parameters()).device
        return TokenScores(*(torch.cat(each).to(device) for each in tensors))

    def _add_divergence(
        self, reference_texts: ReferenceTexts, chosen: Sequence[int], weight: float
    ) -> None:
        """Of this process's own texts."""
        self._require_same_texts([reference_texts.examples[i] for i in chosen])
        with self.in_step():
            mine = chosen[self._group.rank :: self._group.count]
            super()._add_divergence(reference_texts, mine, weight)

    def recall(self, examples: Sequence[Example]) -> list[Outcome]:
        """Each process probes its own examples; all get all outcomes."""
        return self._dealt(examples, [len(example.ids) for example in examples], super().recall)

    def generate(
        self, prefixes: Sequence[Sequence[int]], *, end: int | frozenset[int], limit: int
    ) -> list[list[int]]:
        """Each process continues its own prefixes; all get all rows."""
        own = super().generate
        lengths = [len(prefix) for prefix in prefixes]
        return self._dealt(prefixes, lengths, lambda part: own(part, end=end, limit=limit))

    def once(self, loss: Tensor) -> Tensor:
        """Zero but on rank 0, because gradients are summed."""
        return loss if self._group.rank == 0 else loss * 0.0

    def agreed(self, value: float) -> float:
        """Rank 0's value: the last bits of a penalty may differ, decisions must not."""
        return float(self._group.exchange("agreement", value)[0])

    def on_main(self, work: Callable[[], _T]) -> _T:
        """As ``ProcessGroup.on_main``."""
        return self._group.on_main(work)

    def in_step(self) -> AbstractContextManager[None]:
        """As ``ProcessGroup.in_step``."""
        return self._group.in_step()

    def same_weights(self, digest: str) -> str:
        """The digest, equal in all processes."""
        hint = "Run them on devices of one kind with the same library versions, or one alone."
        self._group.require_alike(digest, "the processes do not have the same weights", hint=hint)
        return digest

    def align(self, adapter: Adapter) -> None:
        """On a GPU two runs of one kernel may differ; singular vectors would then differ more."""
        self._group.align(adapter.starting_values())

    def sum_gradients(self, adapter: Adapter) -> None:
        """After a backward pass, before the gradients are read: add up those of all processes."""
        self._group.sum(adapter.gradients())

    def _require_same_texts(self, examples: Sequence[Example]) -> None:
        """Where processes have drawn different texts, each would train a part of its own batch."""
        ids = hash(tuple(example.ids for example in examples))  # of numbers: the same everywhere
        what = "the processes have drawn different texts for one step"
        hint = "Start all of them with the same versions of kvedit and Python, or one alone."
        self._group.require_alike(ids, what, hint=hint)

    def _mine(self, lengths: Sequence[int]) -> list[int]:
        """The indices of this process's texts: dealt out by length, so that none waits long."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return order[self._group.rank :: self._group.count]

    def _dealt(
        self, items: Sequence[Any], lengths: Sequence[int], work: Callable[[Any], Sequence[_T]]
    ) -> list[_T]:
        """The results for all items, in order, of which each process works out a share."""
        results: dict[int, _T] = {}
        step = TEXTS_PER_EXCHANGE * self._group.count
        with self.in_step():
            for start in range(0, len(items), step):
                mine = [start + i for i in self._mine(lengths[start : start + step])]
                part = work([items[i] for i in mine]) if mine else []
                for shared in self._group.exchange("results", list(zip(mine, part, strict=True))):
                    results.update(shared)
        return [results[i] for i in range(len(items))]


def _message(scores: TokenScores, places: Tensor) -> tuple[Tensor, ...]:
    """A process's scores for the others, their rows those of all examples."""
    margins, tolerances, losses = scores.token_margins, scores.tolerances, scores.losses
    return margins.cpu(), tolerances.cpu(), places[scores.rows.cpu()], losses.cpu()
