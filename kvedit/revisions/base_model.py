"""The base model of a store: its fingerprint is kept when the store is made, checked at each open.

Invariants:
- What is kept is enough to load the same weights in the same way; other ones are refused.
- Nothing is loaded for a new store that would not fit, as far as that can be foreseen.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvedit.config import FILE_NAME, Config
from kvedit.distributed.worker import make_worker
from kvedit.errors import ModelMismatchError
from kvedit.model import devices, loading, quantization
from kvedit.model.loading import BaseModel, LoadOptions
from kvedit.store import known_files
from kvedit.store.rows import Finding
from kvedit.store.store import Store
from kvedit.training import memory
from kvedit.training.engine import Engine

PROTECTED, COMPLETE = "protected_text", "complete"
"""What a store says of its protected texts once its making is finished, or an edit made them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which model a store is to be for, and how it is loaded: see ``KnowledgeBase.create``."""

    source: str
    revision: str | None = None
    trust_remote_code: bool = False
    targets: Sequence[str] = ()
    device_map: str = ""
    load_in: str = ""


def create(path: Path, spec: ModelSpec, *, check_memory: bool) -> tuple[Store, Engine]:
    """A new store for a model, or one whose making was interrupted, and the model, loaded.

    Raises UsageError if there is a store already, ModelError if the model cannot be loaded or, with
    ``check_memory``, would not fit.
    """
    if (begun := _begun(path, spec)) is not None:
        return begun, load(begun)
    settings = Config.load(path / FILE_NAME)
    device_map = devices.absolute(spec.device_map, Path())
    spec = replace(spec, device_map=device_map, load_in=spec.load_in or settings.model.load_in)
    base = _load(path, spec, settings, check_memory=check_memory)
    engine = _engine(base, path, spec.targets, settings)
    return Store.create(path, _meta(spec, settings, engine)), engine


def _begun(path: Path, spec: ModelSpec) -> Store | None:
    """The store of an interrupted ``create`` for the same model; None if there is none."""
    if not Store.exists(path):
        return None
    store = Store.open(path)
    asked = (spec.source, spec.revision or "", " ".join(spec.targets))
    same = asked == tuple(map(store.meta, ("model_path", "model_revision", "targets")))
    if same and store.meta(PROTECTED) != COMPLETE:
        return store
    store.close()
    return None


def load(store: Store) -> Engine:
    """The model that the store was made for; raises ModelMismatchError if it is another now."""
    targets = (store.meta("targets") or "").split()
    return _engine(_load_again(store), store.path, targets, store.config)


def _load(path: Path, spec: ModelSpec, settings: Config, *, check_memory: bool) -> BaseModel:
    """For a new store: what the command says comes before what the settings say."""
    used = spec.device_map or devices.absolute(settings.model.device_map, path)
    given = LoadOptions(revision=spec.revision, trust_remote_code=spec.trust_remote_code).source
    outline = loading.outline(spec.source, **given) if check_memory else None
    if outline is not None:
        bits = quantization.bits(outline.config, spec.load_in)
        sizes = memory.Sizes(outline, spec.targets, bits=bits)
        memory.require(sizes.estimate(settings.training), spread=bool(used))
    return loading.load(spec.source, **given, device_map=used, load_in=spec.load_in)


def _meta(spec: ModelSpec, settings: Config, engine: Engine) -> dict[str, str]:
    """What a store keeps of its model, as ``load`` reads it."""
    base = engine.base
    return {
        "model_name": base.name,
        "model_path": spec.source,
        "model_fingerprint": base.fingerprint,
        "model_revision": spec.revision or "",
        "trust_remote_code": str(int(spec.trust_remote_code)),
        "targets": " ".join(spec.targets),
        "device_map": spec.device_map,
        "load_in": spec.load_in,
        "prompts": prompts_of(settings),
        "dtype": str(base.dtype).removeprefix("torch."),
        "weights_digest": engine.master.digest(),
    }


def prompts_of(settings: Config) -> str:
    """How questions are put, as text: facts trained in one form may not be recalled in another."""
    return json.dumps(asdict(settings.prompts), sort_keys=True)


def _load_again(store: Store) -> BaseModel:
    name = store.meta("model_name") or loading.EMBEDDED
    source = loading.locate(None if name == loading.EMBEDDED else store.meta("model_path"))
    load_in, requested = store.meta("load_in") or "", store.config.model.load_in
    if requested not in ("", load_in):
        raise ModelMismatchError(
            f"{store.path} was made for weights in {load_in or 'full width'}, not in {requested}",
            hint="Take [model] load_in out of kvedit.toml, or make a new store with kvedit init.",
        )
    device_map = devices.absolute(store.config.model.device_map, store.path)
    pinned = store.meta("model_fingerprint") or ""
    files = known_files.stamps(loading.weight_files(source))
    known = known_files.are_known(store, pinned, files)
    base = loading.load(
        source,
        known=pinned if known else None,
        revision=store.meta("model_revision") or None,
        trust_remote_code=store.meta("trust_remote_code") == "1",
        device_map=device_map or store.meta("device_map") or "",
        load_in=load_in,
    )
    if base.fingerprint != pinned:
        raise ModelMismatchError(
            f"the model at {source} is not the one that {store.path} was made for",
            hint="Put the original weights back, or make a new store with kvedit init.",
        )
    if not known:
        known_files.remember(store, pinned, files)
    return base


def check(store: Store, base: BaseModel) -> Finding:
    """Whether the base model's files, read again, are those that the store was made for."""
    if loading.fingerprint(base.path, base.model) == store.meta("model_fingerprint"):
        return Finding("ok", "base model: sound")
    return Finding("error", f"the model at {base.path} was altered", "Put the original back.")


def _engine(base: BaseModel, path: Path, targets: Sequence[str], settings: Config) -> Engine:
    return Engine(
        base, settings.training, phrasings=path / "phrasings", targets=targets,
        prompts=settings.prompts, worker=make_worker,
    )  # fmt: skip
