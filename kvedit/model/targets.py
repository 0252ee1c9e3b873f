"""Which linear layers an edit touches: never embeddings, the vocabulary projection and routers."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from kvedit.errors import ModelError

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_SEPARATE = ("q_proj", "k_proj", "v_proj", "out_proj")

_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text internlm internlm3 olmo olmo2"
        " stablelm cohere granite smollm3 minicpm yi",
        (*_ATTENTION, *_GATED),
    ),
    # Mixtures of experts: a fact's tokens reach only a few experts, whose weights are one fused
    # parameter; every token passes the attention layers.
    ("mixtral qwen2_moe qwen3_moe olmoe phimoe gpt_oss", _ATTENTION),
    ("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    ("glm glm4", (*_ATTENTION, "gate_up_proj", "down_proj")),
    ("gpt2 gpt_bigcode", ("c_attn", "c_proj", "c_fc")),
    ("gpt_neo", (*_SEPARATE, "c_fc", "c_proj")),
    (
        "gpt_neox bloom falcon chatglm",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    ("gptj codegen", (*_SEPARATE, "qkv_proj", "fc_in", "fc_out")),
    ("opt", (*_SEPARATE, "fc1", "fc2")),
    ("phi", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    ("baichuan", ("W_pack", "o_proj", *_GATED)),
    ("internlm2", ("wqkv", "wo", "w1", "w2", "w3")),
    ("qwen", ("c_attn", "c_proj", "w1", "w2")),
)
TARGETS = {kind: names for kinds, names in _FAMILIES for kind in kinds.split()}
"""By transformers' model type: the last names of the linear layers that edits touch."""

_ROUTING = frozenset({"gate", "router", "shared_expert_gate"})


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its dotted name: the longest outermost list with layers."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    candidates = [
        (name, module)
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
        and {"vision", "audio"}.isdisjoint(name.replace("_", ".").split("."))
    ]
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks that kvedit recognizes",
            hint=f"Name its layers yourself. {_target_hint(model)}",
        )
    return max(candidates, key=lambda pair: (any(map(is_matrix, pair[1].modules())), len(pair[1])))


def target_names(model: nn.Module, requested: Sequence[str] = ()) -> list[str]:
    """Dotted names of the linear layers that edits touch: by default those of the upper blocks.

    The upper half of the blocks does as well as all of them at half of the cost (docs/log).
    Without ``requested``: those in ``TARGETS``, else every linear layer but routers and experts.
    An entry of ``requested`` is a layer's last name, or, if it has a dot or a wildcard, a pattern
    for dotted names in all blocks.  Raises ModelError, listing the choices.
    """
    if requested:
        return _requested_names(model, requested)
    names = _upper_half(model)
    listed = TARGETS.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    chosen = [name for name in names if _last_name(name) in listed]
    if chosen := chosen or [name for name in names if not _is_expert(name)]:
        return chosen
    kind = type(model).__name__
    raise ModelError(f"the blocks of {kind} have no linear layers", hint=_target_hint(model))


def _upper_half(model: nn.Module) -> list[str]:
    """All linear layers of the upper half of the blocks."""
    prefix, layers = blocks(model)
    return [
        f"{prefix}.{index}.{name}"
        for index in range(len(layers) // 2, len(layers))
        for name, module in layers[index].named_modules()
        if is_matrix(module)
    ]


def _is_expert(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in _ROUTING or any("expert" in part for part in parts)


def _requested_names(model: nn.Module, requested: Sequence[str]) -> list[str]:
    names = matrices(model)
    upper = set(_upper_half(model)) if not all(map(_is_pattern, requested)) else set()
    chosen: set[str] = set()
    for target in requested:
        if _is_pattern(target):
            matching = {name for name in names if fnmatchcase(name, target)}
        else:
            matching = {name for name in upper if _last_name(name) == target}
        matching = {name for name in matching if _last_name(name) not in _ROUTING}
        if not matching:
            kind = type(model).__name__
            raise ModelError(f"{kind} has no linear layer {target!r}", hint=_target_hint(model))
        chosen |= matching
    return [name for name in names if name in chosen]


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]


def _is_pattern(target: str) -> bool:
    return any(sign in target for sign in ".*?[")


def matrices(model: nn.Module) -> list[str]:
    """Dotted names of all linear layers but the vocabulary projection, in the model's order."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return [n for n, m in model.named_modules() if is_matrix(m) and m is not head]


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a plain linear projection (``nn.Linear``, or GPT-2's ``Conv1D``)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def matrix_shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer; Conv1D keeps its weight as (in, out)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a quantized weight has another shape
    width, out = module.weight.shape
    return out, width


def _target_hint(model: nn.Module) -> str:
    """What ``--targets`` may name in this model."""
    names = matrices(model)
    if not names:
        return "It has no plain linear layers: its projections are of a kind kvedit does not know."
    last = ", ".join(dict.fromkeys(map(_last_name, names)))
    return f"Pass --targets with names from: {last}; or a pattern such as {names[0]!r}."
