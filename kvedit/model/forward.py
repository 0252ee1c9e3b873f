"""Parts of a forward pass: the decoder, the vocabulary projection, and how a CPU computes them.

Invariant: logits are computed from hidden states only where that gives the model's own logits,
which is tried once for each model and not guessed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from kvedit.model.devices import first_device, padded_width, replaced_forward
from kvedit.model.prefix_cache import PrefixCache, run_full
from kvedit.model.prompts import Example
from kvedit.model.targets import blocks

_PROJECTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def backbone(model: Any) -> nn.Module:
    """The model without its vocabulary projection, through any adapter wrapper."""
    inner: nn.Module = getattr(model, model.base_model_prefix, model)
    return inner


def head(model: Any) -> Any:
    """The vocabulary projection; None where the model does not say which it is."""
    return model.get_output_embeddings()


def vocabulary_size(model: nn.Module) -> int:
    """The rows of the model's largest embedding (custom code may not say which one it is)."""
    sizes = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    return max(sizes, default=1)


def projects(model: Any) -> bool:
    """Whether the logits are the projection of the backbone's output, tried once for each model.

    They are not if the projection lies elsewhere, the logits are scaled, or the backbone's output
    has another layout: all of them common in custom code.
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
    model.eval()  # dropout would make two equal computations differ
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        hidden = run_full(backbone(model), ids)
        projected = _softcap(model, head(model)(hidden).float())
    finally:
        model.train(training)
    if projected.shape != logits.shape:
        return False
    tolerance = 0.01 * float(logits.std()) + 1e-4
    return bool((projected.to(logits.device) - logits).abs().max() <= tolerance)


def last_hidden(
    model: Any, ids: Tensor, examples: Sequence[Example], prefix_cache: PrefixCache | None
) -> Tensor:
    """(rows, width, hidden): the backbone's output, from the prefix cache where it is usable."""
    if prefix_cache is None or not prefix_cache.usable:
        return run_full(backbone(model), ids)
    return prefix_cache.run(backbone(model), ids, [example.ids for example in examples])


def project(model: Any, hidden: Tensor) -> Tensor:
    """(N, vocabulary): logits of hidden states (N, hidden), which are padded to few shapes."""
    count = len(hidden)
    spare = padded_width(count) - count
    rows = torch.cat([hidden, hidden.new_zeros(spare, hidden.shape[1])]) if spare else hidden
    return _softcap(model, head(model)(rows))[:count]


def next_logits(model: Any, ids: Tensor) -> Tensor:
    """(rows, vocabulary): logits of the token after each row of ``ids`` (rows, width), unpadded."""
    if projects(model):
        return project(model, last_hidden(model, ids, (), None)[:, -1])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, -1]


def _softcap(model: Any, logits: Tensor) -> Tensor:
    """Gemma 2's cap on the final logits; monotone, so it matters for losses, not for recall."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@contextmanager
def checkpointed(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Inside, blocks drop their activations and recompute them in the backward pass.

    Done here and not by transformers, which ties it to training mode and so to dropout.
    """
    layers = list(blocks(model)[1]) if on else []
    with replaced_forward(layers, lambda _, forward: partial(_recomputed, forward)):
        yield


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def quick_attention(model: nn.Module) -> Iterator[None]:
    """Inside, a CPU computes attention as plain products instead of by its fused kernel.

    That kernel saves memory and its forward pass is quick, but its backward pass took five times as
    long in half precision, more than all matrices of the model together.  Accelerators keep theirs.
    """
    if first_device(model).type != "cpu":
        yield
        return
    cuda: Any = torch.backends.cuda  # the setting applies to the CPU too, whatever its name
    before = cuda.fp16_bf16_reduction_math_sdp_allowed()
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before)
