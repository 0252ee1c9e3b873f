"""Prefix cache: activations below the edited blocks, computed once for each text.

A forward pass from the cache starts at the first edited block: those below return the cached states
instead of computing them.

Invariants:
- Cached states belong to the base weights below the first edited block, which never change.
- A model that cannot be run this way (its blocks exchange more than hidden states) is detected on
  its first batch and always run in full.
- Memory is bounded: the least recently used texts are dropped first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from kvedit.model.devices import first_device, padded_rows, padded_width, replaced_forward
from kvedit.model.targets import blocks

MAX_PREFIX_CACHE_BYTES = 1 << 30  # a round number: 930,000 tokens of 576 bf16 values
MAX_RELATIVE_ERROR = 0.02  # of the first batch: other shapes round differently in half precision
_Ids = tuple[int, ...]


class _FirstEditedBlockReached(Exception):  # no error: it ends the forward pass there
    """The forward pass has computed the input of the first edited block."""


class PrefixCache:
    """Outputs of the blocks below the edited ones, by text; used only while it is ``usable``."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        """``names`` are the edited matrices; ``model`` must not be wrapped by an adapter yet."""
        prefix, layers = blocks(model)
        edited = {name.removeprefix(f"{prefix}.").split(".", 1)[0] for name in names}
        first = min((int(part) for part in edited if part.isdecimal()), default=0)
        self.below: list[nn.Module] = list(layers[:first])
        self._first = layers[first]
        self._states: OrderedDict[_Ids, Tensor] = OrderedDict()
        self._bytes = 0
        self.usable = bool(self.below)
        self._checked = False

    def run(self, backbone: nn.Module, ids: Tensor, texts: Sequence[_Ids]) -> Tensor:
        """(rows, width, hidden): the last hidden states of token ids padded on the right."""
        states = pad_sequence(self.states(backbone, texts), batch_first=True)
        states = functional.pad(states, (0, 0, 0, ids.shape[1] - states.shape[1]))
        if not self._checked:
            self._check(backbone, ids, states, [len(text) for text in texts])
        return self._run(backbone, ids, states) if self.usable else run_full(backbone, ids)

    def _run(self, backbone: nn.Module, ids: Tensor, states: Tensor) -> Tensor:
        """The forward pass from the first edited block's input (rows, width, hidden) on."""
        with replaced_forward(self.below, lambda i, _: _returns(states if i == 0 else None)):
            return run_full(backbone, ids)

    @torch.no_grad()
    def _check(
        self, backbone: nn.Module, ids: Tensor, states: Tensor, lengths: Sequence[int]
    ) -> None:
        """Compare once with the model run in full, padding left out."""
        self._checked = True
        full = run_full(backbone, ids)
        try:
            cached = self._run(backbone, ids, states)
        except (TypeError, AttributeError, IndexError, ValueError, RuntimeError):
            self.usable = False
            return
        rows = [(cached[row, :length], full[row, :length]) for row, length in enumerate(lengths)]
        error = max(float((one - other).norm() / other.norm()) for one, other in rows)
        self.usable = error <= MAX_RELATIVE_ERROR

    def states(self, backbone: nn.Module, texts: Sequence[_Ids]) -> list[Tensor]:
        """The input of the first edited block: (length, hidden) for each text."""
        states = {ids: self._states[ids] for ids in texts if ids in self._states}
        if missing := [ids for ids in dict.fromkeys(texts) if ids not in states]:
            ids = padded_rows(missing, padded_width(max(map(len, missing))))
            hidden = self._run_below(backbone, ids.to(first_device(backbone)))
            states |= {text: hidden[row, : len(text)].clone() for row, text in enumerate(missing)}
        for text in texts:
            self._store(text, states[text])
        return [states[text] for text in texts]

    @torch.no_grad()
    def _run_below(self, backbone: nn.Module, ids: Tensor) -> Tensor:
        """Run the model up to its first edited block; (rows, width, hidden)."""
        inputs: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs.append(args[0] if args else named["hidden_states"])
            raise _FirstEditedBlockReached

        handle = self._first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            backbone(input_ids=ids, use_cache=False)
        except _FirstEditedBlockReached:
            pass
        finally:
            handle.remove()
        return inputs[0]

    def _store(self, text: _Ids, state: Tensor) -> None:
        if text not in self._states:
            self._states[text] = state
            self._bytes += state.nbytes
        self._states.move_to_end(text)
        while self._bytes > MAX_PREFIX_CACHE_BYTES:
            self._bytes -= self._states.popitem(last=False)[1].nbytes

    def forget(self) -> None:
        """Drop all states and free their memory."""
        self._states.clear()
        self._bytes = 0


def run_full(backbone: nn.Module, ids: Tensor) -> Tensor:
    """(rows, width, hidden): the last hidden states of the model run in full."""
    hidden: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _returns(states: Tensor | None) -> Any:
    """A block's forward pass that returns ``states``, or its input for None."""
    return lambda hidden_states, *_, **__: hidden_states if states is None else states
