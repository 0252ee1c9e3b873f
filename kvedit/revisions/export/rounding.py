"""Weights rounded as GGUF files hold them: 8 and 4 bits in blocks of 32 numbers of a row.

The formulas are those of ``quantize_row_q8_0_ref`` and ``quantize_row_q4_0_ref`` in ggml
(github.com/ggml-org/ggml, src/ggml-quants.c).  What is rounded here is held in fp32: on a server
the numbers are the same, their sums may be rounded differently.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

BLOCK = 32


def q8_0(weight: Tensor) -> Tensor:
    """A matrix (out, in) as Q8_0 holds it, fp32: a scale in fp16 and 32 whole numbers a block."""
    blocks = _blocks(weight)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    levels = _divided(blocks, scale)
    rounded = levels.sign() * (levels.abs() + 0.5).floor()  # halves away from zero, as in C
    return (rounded * scale.half().float()).view(weight.shape)


def q4_0(weight: Tensor) -> Tensor:
    """A matrix (out, in) as Q4_0 holds it, fp32: the largest number of a block is level -8."""
    blocks = _blocks(weight)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    levels = (_divided(blocks, scale) + 8.5).floor().clamp(0, 15) - 8
    return (levels * scale.half().float()).view(weight.shape)


def _blocks(weight: Tensor) -> Tensor:
    return weight.float().reshape(*weight.shape[:-1], -1, BLOCK)


def _divided(blocks: Tensor, scale: Tensor) -> Tensor:
    """Blocks in units of their scale; zeros where that is zero."""
    return torch.where(scale == 0, 0.0, blocks / scale)


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> None:
    """Round the weights of a model in place to ``bits`` (8 or 4), and hold them all in fp32.

    Linear layers and embeddings, but not an adapter's own; the output layer keeps 8 bits, as
    llama.cpp keeps it wider; rows that are no whole number of blocks are left alone.
    """
    model.float()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    wide = None if output is None else output.weight
    done: set[int] = set()
    for weight, turned in _matrices(model):
        matrix = weight.t() if turned else weight
        if id(weight) in done or matrix.shape[1] % BLOCK:
            continue
        done.add(id(weight))
        rounded = q4_0(matrix) if bits == 4 and weight is not wide else q8_0(matrix)
        weight.copy_(rounded.t() if turned else rounded)


def _matrices(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """The weights to round, and whether they are (in, out)."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if "lora_" not in name and isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            yield module.weight, isinstance(module, Conv1D)
