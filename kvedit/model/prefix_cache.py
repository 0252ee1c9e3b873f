"""The blocks below the edited ones, computed once for each text.

No edit touches them, so what they make of a text stays the same for all steps, probes and merges.
A forward pass then begins at the first edited block: the lower ones are made to hand on what was
kept.

Invariants:
- What is kept belongs to the base weights below the first edited block, which never change.
- A model that the shortcut does not fit (its blocks pass on more than hidden states) is found out
  on its first text and run as a whole.
- Memory is bounded: the texts that were used longest ago are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from kvedit.model.devices import first_device, padded_width, replaced_forward
from kvedit.model.targets import blocks

MAX_PREFIX_CACHE_BYTES = 1 << 30
NEAR = 0.02  # relative: other batch shapes round otherwise in half precision
_Ids = tuple[int, ...]


class _Reached(Exception):  # no error: it ends a forward pass that has gone far enough
    """The first edited block was reached."""


class PrefixCache:
    """What the blocks below the edited ones make of texts.  ``usable`` tells whether it may be."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        """``names`` are the touched matrices; ``model`` must not be wrapped yet."""
        stack, layers = blocks(model)
        touched = {name.removeprefix(f"{stack}.").split(".", 1)[0] for name in names}
        first = min((int(part) for part in touched if part.isdecimal()), default=0)
        self._below, self._first = list(layers[:first]), layers[first]
        self._kept: OrderedDict[_Ids, Tensor] = OrderedDict()
        self._bytes = 0
        self.usable = bool(self._below)
        self._checked = False

    @property
    def below(self) -> list[nn.Module]:
        """The blocks that no edit touches and no gradient passes."""
        return list(self._below)

    def run(self, backbone: nn.Module, ids: Tensor, texts: Sequence[_Ids]) -> Tensor:
        """(rows, width, hidden): what the last block says to token ids padded on the right."""
        kept = pad_sequence(self.states(backbone, texts), batch_first=True)
        kept = functional.pad(kept, (0, 0, 0, ids.shape[1] - kept.shape[1]))
        if not self._checked:
            self._check(backbone, ids, kept, [len(text) for text in texts])
        if not self.usable:
            whole: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
            return whole
        return self._run(backbone, ids, kept)

    def _run(self, backbone: nn.Module, ids: Tensor, kept: Tensor) -> Tensor:
        with self._handing_on(kept):
            found: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
        return found

    @torch.no_grad()
    def _check(
        self, backbone: nn.Module, ids: Tensor, kept: Tensor, lengths: Sequence[int]
    ) -> None:
        """See once whether the shortcut gives what the whole model gives, padding left out."""
        self._checked = True
        whole = backbone(input_ids=ids, use_cache=False).last_hidden_state
        try:
            short = self._run(backbone, ids, kept)
        except (TypeError, AttributeError, IndexError, ValueError, RuntimeError):
            self.usable = False
            return
        rows = [(short[row, :length], whole[row, :length]) for row, length in enumerate(lengths)]
        apart = max(float((one - other).norm() / other.norm()) for one, other in rows)
        self.usable = apart <= NEAR

    def states(self, backbone: nn.Module, texts: Sequence[_Ids]) -> list[Tensor]:
        """What reaches the first edited block: (length, width) for each text."""
        missing = [ids for ids in dict.fromkeys(texts) if ids not in self._kept]
        found = dict(zip(missing, self._compute(backbone, missing), strict=True))
        states = [found[ids] if ids in found else self._kept[ids] for ids in texts]
        for ids in texts:
            self._keep(ids, found.get(ids))
        return states

    def _compute(self, backbone: nn.Module, texts: Sequence[_Ids]) -> list[Tensor]:
        if not texts:
            return []
        device = first_device(backbone)
        ids = torch.zeros(len(texts), padded_width(max(map(len, texts))), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        hidden = self._reach(backbone, ids.to(device))
        return [hidden[row, : len(text)].clone() for row, text in enumerate(texts)]

    @torch.no_grad()
    def _reach(self, backbone: nn.Module, ids: Tensor) -> Tensor:
        """Run the model until its first edited block; (rows, width, hidden)."""
        reached: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            reached.append(args[0] if args else named["hidden_states"])
            raise _Reached

        handle = self._first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            backbone(input_ids=ids, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return reached[0]

    def _keep(self, ids: _Ids, state: Tensor | None) -> None:
        if state is not None and ids not in self._kept:
            self._kept[ids] = state
            self._bytes += state.nbytes
        if ids in self._kept:
            self._kept.move_to_end(ids)
        while self._bytes > MAX_PREFIX_CACHE_BYTES:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def forget(self) -> None:
        """Give back the memory of what was kept."""
        self._kept.clear()
        self._bytes = 0

    @contextmanager
    def _handing_on(self, hidden: Tensor) -> Iterator[None]:
        """Let the lower blocks hand on ``hidden`` (rows, width, hidden) instead of computing it."""
        with replaced_forward(
            self._below, lambda index, _: _hands_on(hidden if index == 0 else None)
        ):
            yield


def _hands_on(instead: Tensor | None) -> Any:
    """A block's forward pass that gives back its input, or ``instead`` of it."""

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if instead is None else instead

    return forward
