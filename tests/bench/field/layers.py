"""Where the locating editors work: the MLP matrices of a block, their inputs and outputs at the
last token of the key, second moments of inputs over text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.errors import ModelError
from kvedit.model.devices import first_device, padded_rows
from kvedit.model.forward import backbone
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import by_length
from kvedit.model.targets import blocks, is_matrix
from tests.bench.field.asked import Asked
from tests.bench.field.records import Record

MLP_OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
MLP_IN = ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w1",
          "w3")  # fmt: skip
"""What the architectures on the hubs call an MLP's last matrix, and its first ones."""
CONTEXT_TOKENS = 10  # of a text of the model's own that stands before a prompt


def layer_at(model: nn.Module, depth: float) -> int:
    """The block at a share of the depth: 21 / 32 is the 22nd of 32."""
    count = len(blocks(model)[1])
    return min(count - 1, round(depth * count))


def mlp_out(model: nn.Module, layer: int) -> Any:
    """The matrix that an MLP ends with; raises ModelError where its name is not known."""
    return _mlp(model, layer, MLP_OUT)[-1]


def mlp_in(model: nn.Module, layer: int) -> list[Any]:
    """The matrices that an MLP begins with."""
    return _mlp(model, layer, MLP_IN)


def _mlp(model: nn.Module, layer: int, names: Sequence[str]) -> list[Any]:
    block = blocks(model)[1][layer]
    found = [
        module for name, module in block.named_modules()
        if is_matrix(module) and name.rpartition(".")[2] in names and "att" not in name
    ]  # fmt: skip
    if not found:
        raise ModelError(f"block {layer} of {type(model).__name__} has none of {', '.join(names)}")
    return found


@torch.no_grad()
def add_to(matrix: Any, delta: Tensor) -> None:
    """Add ``delta`` (out, in) to a linear layer; Conv1D keeps its weight the other way round."""
    own = delta if isinstance(matrix, nn.Linear) else delta.T
    matrix.weight.data += own.to(matrix.weight.dtype)


@dataclass(frozen=True, slots=True)
class Placed:
    """A prompt with its answer, and the index of the key's last token."""

    example: Example
    at: int


def contexts(renderer: Renderer, texts: Sequence[Sequence[int]], count: int) -> list[str]:
    """The empty one, and the beginnings of so many texts of the model's own, as MEMIT has them."""
    starts = (renderer.text(text[:CONTEXT_TOKENS]).replace("\n", " ").strip() for text in texts)
    return ["", *(f"{start}. " for start in list(filter(None, starts))[:count])]


def placed(asked: Asked, record: Record, befores: Sequence[str]) -> list[Placed]:
    """A record's first prompt behind each context."""
    examples = (asked.renderer.example(b + record.prompts[0], record.target) for b in befores)
    return [Placed(e, key_end(asked.renderer, e, record.key)) for e in examples]


def key_end(renderer: Renderer, example: Example, key: str) -> int:
    """The token with which a key ends in the prompt; where it does not occur, the prompt's last."""
    wanted = key.casefold()
    for end in range(1, example.start + 1):
        if wanted in renderer.text(example.ids[:end]).casefold():
            return end - 1
    return example.start - 1


@torch.no_grad()
def at_keys(model: Any, module: nn.Module, rows: Sequence[Placed]) -> tuple[Tensor, Tensor]:
    """(n, in) and (n, out): a module's inputs and outputs at the keys' last tokens."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    cut = [Example(row.example.ids[: row.at + 1], row.at) for row in rows]
    for batch in by_length(cut):
        some = [cut[at] for at in batch]
        places = range(len(some)), [e.start for e in some]
        with watched(module) as seen:
            read(model, [e.ids for e in some])
        ins, outs = seen[0]
        values = zip(ins[places].float(), outs[places].float(), strict=True)
        found |= dict(zip(batch, values, strict=True))
    pairs = [found[at] for at in range(len(rows))]
    return torch.stack([i for i, _ in pairs]), torch.stack([o for _, o in pairs])


@torch.no_grad()
def second_moments(
    model: Any, modules: Sequence[nn.Module], texts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """For each module (in, in), float64: the mean outer product of its inputs over all tokens."""
    sums: dict[int, Any] = dict.fromkeys(range(len(modules)), 0.0)
    rows = [Example(tuple(text), 0) for text in texts if text]
    for batch in by_length(rows):
        some = [rows[at] for at in batch]
        real = torch.arange(max(len(e.ids) for e in some))[None] < torch.tensor(
            [[len(e.ids)] for e in some]
        )

        def collect(number: int, inputs: Tensor, keep: Tensor = real) -> None:
            tokens = inputs[keep.to(inputs.device)].double()
            sums[number] = sums[number] + tokens.T @ tokens

        with _all_watched(modules, collect):
            read(model, [e.ids for e in some])
    tokens = sum(len(row.ids) for row in rows)
    return [sums[number] / tokens for number in range(len(modules))]


@contextmanager
def _all_watched(
    modules: Sequence[nn.Module], collect: Callable[[int, Tensor], None]
) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda _, i, o, number=number: collect(number, i[0]))
        for number, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs (rows, width, ...) of each run of a module inside the block."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        seen.append((inputs[0], output[0] if isinstance(output, tuple) else output))

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def read(model: Any, rows: Sequence[Sequence[int]]) -> None:
    """Run the blocks over texts, padded on the right, without the vocabulary projection."""
    ids = padded_rows(rows, max(map(len, rows))).to(first_device(model))
    backbone(model)(input_ids=ids, use_cache=False)
