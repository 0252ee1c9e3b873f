"""LoadOptions a base model, and naming the matrices that edits may touch.

Invariants:
- A store's model is known by its fingerprint; a folder that answers to the same name but holds
  other weights is refused.
- Which matrices are touched follows from the architecture and the names a user gives, in a fixed
  order; never the embeddings, the vocabulary projection, or a router.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from kvedit.errors import ModelError
from kvedit.model import devices, quantization, upcast

log = logging.getLogger(__name__)

KERNELS = "8192"  # oneDNN's cache holds 1,024 by default, fewer than a store's texts need
EMBEDDED = "kvedit-tiny"
EMBEDDED_PATH = Path(__file__).parents[1] / "data" / EMBEDDED
_CONTEXTS = (
    "max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "model_max_length",
)  # fmt: skip
_EDGE = 16 * 1024 * 1024  # bytes of each end of a file that its fingerprint covers


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded: from a hub at ``revision``, with its own code or without, over the
    devices of ``device_map`` (see ``placement.read``; "": on one), packed while it is loaded if
    ``load_in`` says so (see ``quantised``; "": as it is stored).
    """

    revision: str | None = None
    trust_remote_code: bool = False
    device_map: str = ""
    load_in: str = ""

    @property
    def source(self) -> dict[str, Any]:
        """What transformers wants to know for any part of a model."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded model: in evaluation mode, all parameters frozen."""

    model: Any
    tokenizer: Any
    name: str
    path: str
    fingerprint: str
    loading: LoadOptions = LoadOptions()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is served in."""
        found: torch.dtype = self.model.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where tokens are handed in."""
        return devices.first_device(self.model)

    @property
    def context(self) -> int:
        """The longest text it takes, in tokens."""
        return context_of(self.model)

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens at which its generation settings end an answer."""
        settings = getattr(self.model, "generation_config", None)
        found = getattr(settings, "eos_token_id", None)
        if found is None:
            return ()
        return (found,) if isinstance(found, int) else tuple(found)


def context_of(model: Any) -> int:
    """The longest text a model takes, in tokens; 2048 where its configuration does not say."""
    config = model.config.get_text_config()
    for name in _CONTEXTS:
        if isinstance(found := getattr(config, name, None), int):
            return found
    return 2048


def has_own_code(model: Any) -> bool:
    """Whether the model came with its own Python code."""
    return type(model).__module__.startswith("transformers_modules")


def locate(model: str | Path | None) -> str:
    """The folder or hub name to load: the embedded model when none is given."""
    if model is None or str(model) == EMBEDDED:
        return str(EMBEDDED_PATH)
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else str(model)


def load(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str = "",
    load_in: str = "",
) -> BaseModel:
    """Load a model and its tokenizer from a folder or a hub, in the dtype it is stored in.

    Raises ModelError, with what to do, when there is none, no tokenizer, custom code that was not
    allowed, or a device map that does not fit.
    """
    from transformers import AutoTokenizer

    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # kvedit shows its own progress
    loading = LoadOptions(
        revision=revision,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        load_in=load_in,
    )
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{source} holds no model: config.json is missing", hint=_WHAT_A_MODEL_IS)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **loading.source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot("tokenizer", source, error) from error
    model = _load_weights(source, loading)
    quantization.refuse_unknown(source, model)
    model.eval().requires_grad_(False)
    return BaseModel(model, tokenizer, _name(source), source, fingerprint(source, model), loading)


def _load_weights(source: str, loading: LoadOptions) -> Any:
    """The model, where it is to be."""
    from transformers import AutoModelForCausalLM

    options = {**loading.source, **quantization.options(source, loading.load_in, **loading.source)}
    errors: tuple[type[Exception], ...] = (
        OSError, ValueError, KeyError, ImportError, SafetensorError
    )  # fmt: skip
    if loading.device_map:
        options["device_map"] = devices.read(loading.device_map)
        errors = (*errors, RuntimeError, AssertionError)  # a device that is not there
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **options)
    except errors as error:
        raise _cannot("model", source, error) from error
    # cuDNN's attention writes a plan for every new shape, and here nearly every shape is new: the
    # plans took five times as long as all else that decoding does.
    torch.backends.cuda.enable_cudnn_sdp(False)
    placed = loading.device_map or quantization.method(model)  # packed ones are put there as loaded
    model = model if placed else model.to(device())
    upcast.widen(model)
    return model


def reload(base: BaseModel, *, device_map: str | None = None) -> BaseModel:
    """Another copy of a base model, on the same devices or by another device map."""
    loading = base.loading if device_map is None else replace(base.loading, device_map=device_map)
    return load(base.path, **{item.name: getattr(loading, item.name) for item in fields(loading)})


_WHAT_A_MODEL_IS = (
    "Give the name of a causal language model on a hub, or a folder with config.json, the weights"
    " and the tokenizer's files."
)


def _cannot(what: str, source: str, error: Exception) -> ModelError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = _WHAT_A_MODEL_IS
    if "trust_remote_code" in str(error):
        hint = "It brings its own code. If you trust it: --trust-remote-code."
    return ModelError(f"no {what} can be loaded from {source}: {first}", hint=hint)


def device() -> torch.device:
    """This process's device: its card, or the CPU."""
    from accelerate import Accelerator

    found: torch.device = Accelerator().device
    return found


def _name(source: str) -> str:
    return EMBEDDED if source == str(EMBEDDED_PATH) else source


def fingerprint(source: str, model: Any) -> str:
    """SHA-256 that tells one set of weights from another.

    For a folder: each weight and code file's name, size, and first and last 16 MiB, so that it
    takes moments for a large model too.  For a hub model: the commit it was loaded at.
    """
    digest = hashlib.sha256()
    folder = Path(source)
    if not folder.is_dir():
        digest.update(f"{source}@{getattr(model.config, '_commit_hash', None)}".encode())
        return digest.hexdigest()
    kinds = ("*.safetensors", "*.bin", "*.py")  # a model's own code is part of what it answers
    for path in sorted(path for kind in kinds for path in folder.glob(kind)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(_EDGE, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_SEPARATE = ("q_proj", "k_proj", "v_proj", "out_proj")

_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text internlm internlm3 olmo olmo2"
        " stablelm cohere granite smollm3 minicpm yi",
        (*_ATTENTION, *_GATED),
    ),
    # Mixtures of experts: a fact's tokens reach a few experts only, and those are one fused
    # parameter; attention is what every token passes.
    ("mixtral qwen2_moe qwen3_moe olmoe phimoe gpt_oss", _ATTENTION),
    ("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    ("glm glm4", (*_ATTENTION, "gate_up_proj", "down_proj")),
    ("gpt2 gpt_bigcode", ("c_attn", "c_proj", "c_fc")),
    ("gpt_neo", (*_SEPARATE, "c_fc", "c_proj")),
    ("gpt_neox bloom falcon chatglm", _FUSED),
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
    """The stack of decoder blocks and its dotted name: the longest outermost list with layers."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    found = [
        (name, module)
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
        and not {"vision", "audio"} & set(name.replace("_", ".").split("."))
    ]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no stack of decoder blocks that kvedit can find",
            hint=f"Name its layers yourself. {_choice(model)}",
        )
    return max(found, key=lambda pair: (any(map(is_matrix, pair[1].modules())), len(pair[1])))


def target_names(model: nn.Module, wanted: Sequence[str] = ()) -> list[str]:
    """Dotted names of the linear layers that edits touch, all in the upper half of the blocks.

    The upper half does as well as all of them (docs/log) at half of the cost.  Without
    ``wanted``: those of our table, or else every linear layer but routers and experts.  A name in
    ``wanted`` is a layer's last name, or, where it has a dot or a star, a pattern for whole names,
    which then reaches every block.  Raises ModelError, naming what there is.
    """
    if wanted:
        return _wanted(model, wanted)
    names = _upper(model)
    config = getattr(model, "config", None)
    listed = TARGETS.get(getattr(config, "model_type", ""), ())
    chosen = [name for name in names if name.rpartition(".")[2] in listed]
    chosen = chosen or [name for name in names if not _is_expert(name)]
    if not chosen:
        raise ModelError(
            f"no linear layers were found in the blocks of {type(model).__name__}",
            hint=_choice(model),
        )
    return chosen


def _upper(model: nn.Module) -> list[str]:
    """All linear layers of the upper half of the blocks."""
    stack, layers = blocks(model)
    return [
        f"{stack}.{index}.{name}"
        for index in range(len(layers) // 2, len(layers))
        for name, module in layers[index].named_modules()
        if is_matrix(module)
    ]


def _is_expert(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in _ROUTING or any("expert" in part for part in parts)


def _wanted(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    every = matrices(model)
    upper = set(_upper(model)) if any(_is_last_name(one) for one in wanted) else set()
    chosen: set[str] = set()
    for one in wanted:
        if _is_last_name(one):
            own = {name for name in upper if name.rpartition(".")[2] == one}
        else:
            own = {name for name in every if fnmatchcase(name, one)}
        own = {name for name in own if name.rpartition(".")[2] not in _ROUTING}
        if not own:
            raise ModelError(
                f"{type(model).__name__} has no linear layer {one!r}", hint=_choice(model)
            )
        chosen |= own
    return [name for name in every if name in chosen]


def _is_last_name(target: str) -> bool:
    return not any(sign in target for sign in ".*?[")


def matrices(model: nn.Module) -> list[str]:
    """Dotted names of all linear layers but the vocabulary projection, in the model's order."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return [n for n, m in model.named_modules() if is_matrix(m) and m is not head]


def _choice(model: nn.Module) -> str:
    """What a user can pass, in the model's own words."""
    names = matrices(model)
    if not names:
        return "It has no plain linear layers: its projections are of a kind kvedit does not know."
    last = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return f"Pass --targets with names from: {last}; or a pattern such as {names[0]!r}."


@contextmanager
def checkpointed(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Inside, blocks forget their activations and compute them again for backward.

    Done here and not by transformers, which couples it to training mode and so to dropout.
    """
    layers = list(blocks(model)[1]) if on else []
    with devices.instead(layers, lambda _, forward: partial(_twice, forward)):
        yield


@contextmanager
def quick_attention(model: nn.Module) -> Iterator[None]:
    """Inside, a CPU computes attention as plain products instead of by its fused kernel.

    That kernel saves memory and is quick forwards; backwards it took five times as long in half
    precision, more than all matrices of the model together.  An accelerator's kernels are left
    alone.
    """
    if devices.first_device(model).type != "cpu":
        yield
        return
    cuda: Any = torch.backends.cuda  # the setting counts on the CPU as well, whatever its name
    before = cuda.fp16_bf16_reduction_math_sdp_allowed()
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before)


def _twice(forward: Callable[..., Any], *args: Any, **more: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **more)
    return checkpoint(forward, *args, use_reentrant=False, **more)


def vocabulary(model: nn.Module) -> int:
    """How many tokens the model knows: the rows of its largest embedding (custom code may not say
    which one it is).
    """
    found = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    return max(found, default=1)


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a plain linear projection (``nn.Linear``, or GPT-2's ``Conv1D``)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def weights_digest(weights: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of matrices, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        raw = tensor.detach().to("cpu").contiguous().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()
