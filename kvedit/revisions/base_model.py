"""The base model of a store: its fingerprint is kept when the store is made, checked at each open.

Invariants:
- What is kept is enough to load the same weights in the same way; other ones are refused.
- The fingerprint is compared before anything of the model is loaded, and a store never leads to a
  model's own code being run: consent to that is given on this machine (see ``trust.consent``).
- Nothing is loaded for a new store that would not fit, as far as that can be foreseen.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvedit.config import FILE_NAME, Config
from kvedit.distributed.worker import make_worker
from kvedit.errors import KveditError, ModelMismatchError
from kvedit.model import devices, loading, quantization
from kvedit.model.loading import BaseModel, LoadOptions
from kvedit.store.checks import known_files
from kvedit.store.integrity import COMPLETE, PROTECTED
from kvedit.store.rows import Finding
from kvedit.store.store import Store
from kvedit.training import memory
from kvedit.training.engine import Engine
from kvedit.trust import consent, fingerprint, names
from kvedit.trust.fingerprint import Fingerprint


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
        if spec.trust_remote_code:
            allow_code(begun)
        return begun, load(begun)
    settings = Config.load(path / FILE_NAME)
    identity, commit = loading.identify(spec.source, spec.revision)
    device_map = devices.absolute(spec.device_map, Path())
    spec = replace(spec, device_map=device_map, load_in=spec.load_in or settings.model.load_in)
    base = _load(path, spec, settings, identity, check_memory=check_memory)
    engine = _engine(base, path, spec.targets, settings)
    if spec.trust_remote_code:
        consent.give(_code(spec.source, commit), spec.source)
    return Store.create(path, _meta(spec, settings, engine, identity.files)), engine


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


def _load(
    path: Path, spec: ModelSpec, settings: Config, identity: Fingerprint, *, check_memory: bool
) -> BaseModel:
    """For a new store: what the command says comes before what the settings say."""
    used = spec.device_map or devices.absolute(settings.model.device_map, path)
    given = LoadOptions(revision=spec.revision, trust_remote_code=spec.trust_remote_code).source
    outline = loading.outline(spec.source, **given) if check_memory else None
    if outline is not None:
        bits = quantization.bits(outline.config, spec.load_in)
        sizes = memory.Sizes(outline, spec.targets, bits=bits)
        memory.require(sizes.estimate(settings.training), spread=bool(used))
    options = {**given, "device_map": used, "load_in": spec.load_in}
    return loading.load(spec.source, known=identity.digest, **options)


def _meta(
    spec: ModelSpec, settings: Config, engine: Engine, files: fingerprint.Files
) -> dict[str, str]:
    """What a store keeps of its model, as ``load`` reads it."""
    base = engine.base
    return {
        "model_name": base.name,
        "model_path": spec.source,
        "model_fingerprint": base.fingerprint,
        _FILES: json.dumps(dict(files)),
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
    load_in, requested = store.meta("load_in") or "", store.config.model.load_in
    if requested not in ("", load_in):
        raise ModelMismatchError(
            f"{store.path} was made for weights in {load_in or 'full width'}, not in {requested}",
            hint="Take [model] load_in out of kvedit.toml, or make a new store with kvedit init.",
        )
    source = source_of(store)
    commit = require_same(store, source)
    device_map = devices.absolute(store.config.model.device_map, store.path)
    return loading.load(
        source,
        known=store.meta("model_fingerprint") or "",
        revision=commit,
        trust_remote_code=_may_run_code(store, source, commit),
        device_map=device_map or store.meta("device_map") or "",
        load_in=load_in,
    )


def source_of(store: Store) -> str:
    """Where a store's base model is: an absolute folder, or a name on a hub.

    Raises CorruptStoreError if the store names anything else.
    """
    if (store.meta("model_name") or loading.EMBEDDED) == loading.EMBEDDED:
        return loading.locate(None)
    return names.model(store.meta("model_path"), store.path)


def require_same(store: Store, source: str, *, in_full: bool = False) -> str | None:
    """Raise ModelMismatchError, or ModelError, unless the model at ``source`` is the store's.

    Nothing of the model is loaded.  Files whose size and time of change are those of the last time
    are not read again but ``in_full``.  Returns the model's commit if it is on a hub.
    """
    pinned = store.meta("model_fingerprint") or ""
    folder = Path(source)
    files = known_files.stamps(fingerprint.deciding_files(folder)) if folder.is_dir() else {}
    if not in_full and store.meta(_FILES) and known_files.are_known(store, pinned, files):
        return None
    found, commit = loading.identify(source, names.hub_revision(store.meta("model_revision")))
    if found.digest != pinned:
        if store.meta(_FILES) is not None or not _was_the_same(pinned, source):
            raise fingerprint.difference(source, _files(store), found.files)
        pinned = found.digest
        _keep(store, found)
    known_files.remember(store, pinned, files)
    return commit


_FILES = "model_files"  # the digest of each file of the model's folder; older stores have none


def _files(store: Store) -> fingerprint.Files:
    """What the fingerprint is of; nothing where the store does not say it."""
    try:
        files = json.loads(store.meta(_FILES) or "{}")
    except (ValueError, RecursionError):
        return {}
    good = isinstance(files, dict) and all(isinstance(leaf, str) for leaf in files.values())
    return files if good and fingerprint.root(files) == store.meta("model_fingerprint") else {}


def _was_the_same(pinned: str, source: str) -> bool:
    """Whether this is the model by the fingerprint of older versions."""
    folder = Path(source)
    if folder.is_dir():
        return fingerprint.of_ends(folder) == pinned
    return fingerprint.of_hub(source, None).digest == pinned


def _keep(store: Store, found: Fingerprint) -> None:
    """Give a store of an older version the fingerprint of whole files."""
    if not store.readonly:
        store.set_metas({"model_fingerprint": found.digest, _FILES: json.dumps(dict(found.files))})


def _code(source: str, commit: str | None) -> str:
    """The digest of a model's own code, for ``consent``."""
    folder = Path(source)
    return consent.of_folder(folder) if folder.is_dir() else consent.of_hub(source, commit)


def _may_run_code(store: Store, source: str, commit: str | None) -> bool:
    """Whether the model's own code is run: if it is needed, and somebody has consented here.

    Raises NotAllowedError where the consent is missing.
    """
    if store.meta("trust_remote_code") != "1":
        return False
    if not consent.is_given(_code(source, commit)):
        raise consent.NotAllowedError(
            f"the model at {source} brings its own Python code, and nobody has allowed it to run on"
            " this machine",
            hint="A store cannot allow it. Read the code; if you trust it: kvedit trust.",
        )
    return True


def allow_code(store: Store) -> Path:
    """Consent, on this machine, to the code of a store's model, without running it.

    Returns the file that holds the consent.  Raises what ``require_same`` raises.
    """
    source = source_of(store)
    commit = require_same(store, source, in_full=True)
    return consent.give(_code(source, commit), source)


def relocate(store: Store, source: str) -> None:
    """Record that a store's model lies elsewhere now; ModelMismatchError for another model."""
    require_same(store, source, in_full=True)
    name = loading.EMBEDDED if source == loading.locate(None) else source
    store.set_metas({"model_path": source, "model_name": name})


def code_files(source: str) -> list[Path]:
    """The Python files of a model in a folder."""
    return fingerprint.code_files(Path(source))


def check(store: Store) -> Finding:
    """Whether the base model's files, read again, are those that the store was made for."""
    try:
        require_same(store, source_of(store), in_full=True)
    except KveditError as error:
        return Finding("error", f"base model: {error.message}", error.hint)
    return Finding("ok", "base model: sound")


def _engine(base: BaseModel, path: Path, targets: Sequence[str], settings: Config) -> Engine:
    return Engine(
        base, settings.training, phrasings=path / "phrasings", targets=targets,
        prompts=settings.prompts, worker=make_worker,
    )  # fmt: skip
