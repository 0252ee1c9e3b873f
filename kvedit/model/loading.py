"""Loading a base model, and recognizing it by its files.

Invariants:
- A store's model is known by its fingerprint, not by the name of its folder.
- A model's own code runs only where ``trust_remote_code`` says so, and never code that lies in
  another place than the model: the fingerprint is not of that.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from kvedit import mapped
from kvedit.errors import KveditError, ModelError, OutOfMemoryError
from kvedit.model import devices, quantization, upcast
from kvedit.paths import home_path
from kvedit.trust import fingerprint
from kvedit.trust.fingerprint import Fingerprint

ONEDNN_CACHE_KERNELS = "8192"  # the default, 1,024, is fewer than the shapes of a store's texts
EMBEDDED = "kvedit-tiny"
EMBEDDED_PATH = Path(__file__).parents[1] / "data" / EMBEDDED
_CONTEXT_SETTINGS = (
    "max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "model_max_length",
)  # fmt: skip
_DEFAULT_CONTEXT = 2048  # tokens, where a configuration has none of these
_LOAD_ERRORS = (
    OSError, ValueError, LookupError, ImportError, SafetensorError, UnpicklingError, AttributeError,
    TypeError, AssertionError, ArithmeticError, RuntimeError, SyntaxError, MemoryError,
)  # fmt: skip
"""What transformers raises for configurations and files that do not make a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded."""

    revision: str | None = None  # on a hub
    trust_remote_code: bool = False
    device_map: str = ""  # see ``devices.read``; "": on one device
    load_in: str = ""  # quantized while it is loaded (see ``quantization``); "": as it is stored

    @property
    def source(self) -> dict[str, Any]:
        """The arguments that transformers takes for any part of a model."""
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
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device that takes its input tokens."""
        return devices.first_device(self.model)

    @property
    def context(self) -> int:
        """The longest text it takes, in tokens."""
        return context_of(self.model)

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens at which its generation settings end an answer."""
        settings = getattr(self.model, "generation_config", None)
        stops = getattr(settings, "eos_token_id", None)
        return (stops,) if isinstance(stops, int) else tuple(stops or ())


def context_of(model: Any) -> int:
    """The longest text a model takes, in tokens."""
    config = model.config.get_text_config()
    for name in _CONTEXT_SETTINGS:
        if isinstance(context := getattr(config, name, None), int):
            return context
    return _DEFAULT_CONTEXT


def has_own_code(model: Any) -> bool:
    """Whether the model came with its own Python code."""
    return type(model).__module__.startswith("transformers_modules")


def locate(model: str | Path | None) -> str:
    """The folder or hub name to load: the embedded model if none is given."""
    if model is None or str(model) == EMBEDDED:
        return str(EMBEDDED_PATH)
    path = home_path(model)
    return str(path.resolve()) if path.is_dir() else str(model)


def load(source: str, *, known: str | None = None, **options: Any) -> BaseModel:
    """Load a model and its tokenizer from a folder or a hub, in the dtype it is stored in.

    ``options`` are those of ``LoadOptions``; ``known`` is the fingerprint where it was computed
    before, or is not needed.  Raises ModelError, with a hint, if there is no
    model or no tokenizer, if custom code was not allowed, or if the device map does not fit.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    loading = LoadOptions(**options)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_CACHE_KERNELS)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{source} holds no model: config.json is missing", hint=_MODEL_HINT)
    refuse_other_places(folder)
    if known is None:
        known = identify(source, loading.revision)[0].digest
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **loading.source)
    except _LOAD_ERRORS as error:
        raise _load_error("tokenizer", source, error) from error
    model = _load_weights(source, loading)
    quantization.refuse_unknown(source, model)
    model.eval().requires_grad_(False)
    name = EMBEDDED if source == str(EMBEDDED_PATH) else source
    return BaseModel(model, tokenizer, name, source, known, loading)


def _load_weights(source: str, loading: LoadOptions) -> Any:
    """The model on its device or devices."""
    from transformers import AutoModelForCausalLM

    options = {**loading.source, **quantization.options(source, loading.load_in, **loading.source)}
    if loading.device_map:
        options["device_map"] = devices.read(loading.device_map)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **options)
    except _LOAD_ERRORS as error:
        raise _load_error("model", source, error) from error
    # cuDNN's attention builds a plan for every new shape, and nearly every shape is new in
    # decoding: the plans took five times as long as the rest of it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    placed = loading.device_map or quantization.method(model)  # quantized: placed while loading
    model = model if placed else model.to(device())
    upcast.upcast_model(model)
    return model


def outline(source: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The model on the meta device, in the dtype it is stored in; None where its configuration or
    code does not allow that.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, **options)
        with torch.device("meta"):
            return make.from_config(config, dtype=config.dtype or torch.float32, **options)
    except _LOAD_ERRORS:
        return None  # loading the weights will say what is wrong


def reload(base: BaseModel, *, device_map: str | None = None) -> BaseModel:
    """Another copy of a base model, on the same devices or by another device map."""
    options = asdict(base.loading)
    if device_map is not None:
        options |= {"device_map": device_map}
    return load(base.path, known=base.fingerprint, **options)


_MODEL_HINT = (
    "Give the name of a causal language model on a hub, or a folder with config.json, the weights"
    " and the tokenizer's files."
)


def _load_error(part: str, source: str, error: Exception) -> KveditError:
    failed = mapped.failure(source, error)
    if isinstance(failed, OutOfMemoryError):
        return failed
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = mapped.LOOK_AT_THE_DISK if mapped.is_of_the_disk(error) else _MODEL_HINT
    if "trust_remote_code" in str(error):
        hint = "It brings its own code. If you trust it: --trust-remote-code."
    return ModelError(f"no {part} can be loaded from {source}: {reason}", hint=hint)


def device() -> torch.device:
    """This process's device: its accelerator, or the CPU."""
    from accelerate import Accelerator

    chosen: torch.device = Accelerator().device
    return chosen


def identify(source: str, revision: str | None = None) -> tuple[Fingerprint, str | None]:
    """The fingerprint of the model at ``source``, and its commit if it is on a hub.

    Nothing of it is loaded; of a model on a hub its configuration is downloaded.  Raises
    ModelError.
    """
    folder = Path(source)
    if folder.is_dir():
        refuse_other_places(folder)
        return fingerprint.of_folder(folder), None
    if folder.is_absolute():
        raise ModelError(f"there is no model at {source}: no such folder", hint=_MODEL_HINT)
    commit = _commit(source, revision)
    return fingerprint.of_hub(source, commit), commit


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a model on a hub, or in the local cache of one."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        file = cached_file(name, "config.json", revision=revision or "main")
    except _LOAD_ERRORS as error:
        raise _load_error("model", name, error) from error
    refuse_other_places(Path(str(file)).parent)
    return extract_commit_hash(file, None)


def refuse_other_places(folder: Path) -> None:
    """Raise ModelError if a model takes weights or code from another place than its folder."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter, whose weights come on top of those of another model",
            hint="Merge the adapter into its model first (PEFT: merge_and_unload).",
        )
    for name in ("config.json", "tokenizer_config.json"):
        for part in _class_names(folder / name):
            if "--" in part:
                raise ModelError(
                    f"{folder / name} takes code from another place: {part!r:.200}",
                    hint="Put that code into the model's folder and name it there.",
                )


def _class_names(path: Path) -> list[str]:
    """The classes of its own that a configuration names."""
    try:
        table = json.loads(path.read_bytes())["auto_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []  # loading it will say what is wrong
    values = table.values() if isinstance(table, dict) else [table]
    return [
        str(name) for value in values for name in (value if isinstance(value, list) else [value])
    ]


def weights_digest(weights: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of matrices, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
