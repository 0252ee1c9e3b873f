"""A look at a whole store, its model included, that changes nothing; and what can be mended.

Invariants:
- ``examine`` writes nothing into the store: it reads a copy of the database.
- What is wrong with one part is a finding; the other parts are looked at all the same.
- ``mend`` takes nothing from thin air: a text comes from the history, where the journal agrees with
  it, and what is removed can be made again.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from kvedit.config import Config
from kvedit.errors import KveditError, UsageError
from kvedit.facts.keys import in_words
from kvedit.files import remove, verify_manifest
from kvedit.model import loading
from kvedit.revisions import base_model, rebuild
from kvedit.store import integrity
from kvedit.store.checks import caches
from kvedit.store.checks.inspection import looked_at
from kvedit.store.rows import Finding
from kvedit.store.store import Store
from kvedit.trust.consent import NotAllowedError

Say = Callable[[str], None]


def examine(path: Path, say: Say) -> list[Finding]:
    """Everything that can be found wrong with a store: database, files, settings, model, revisions.

    Raises NoStoreError, StoreTooNewError, and LockedError if it is written all the time.
    """
    with looked_at(path) as (store, findings):
        if store is None:
            return findings
        findings += integrity.check(store)
        _use_settings(store)
        findings.append(base_model.check(store))
        if findings[-1].level == "ok":
            findings += _with_model(store, say)
        return findings


def _use_settings(store: Store) -> None:
    """Go on with the defaults where the settings cannot be read, which is a finding already."""
    try:
        store.settings = store.config
    except UsageError:
        store.settings = Config()


def _with_model(store: Store, say: Say) -> list[Finding]:
    try:
        return rebuild.check_revisions(store, base_model.load(store).master, say)
    except NotAllowedError as error:  # no fault of the store
        return [Finding("warning", f"no revision was rebuilt: {error.message}", error.hint)]
    except KveditError as error:
        return [Finding("error", error.message, error.hint)]


def mend(path: Path, say: Say, model: str | None = None) -> list[str]:
    """Mend what can be mended without loss; returns what was done.

    ``model``: where the base model lies now.  Raises what opening the store raises, LockedError
    while another process writes, ModelMismatchError if that is another model.
    """
    done: list[str] = []
    with Store.open(path) as store, store.lock():
        for edit in store.recover():
            done.append(f"ended the interrupted {edit.kind} of {in_words(edit.keys)}")
        if model is not None:
            base_model.relocate(store, loading.locate(model))
            done.append(f"the model is at {store.meta('model_path')}")
        done += _restore_texts(store)
        if count := store.name_pinned_checkpoints():
            done.append(f"gave {count} checkpoint(s) that stand for pruned deltas their name back")
        if count := store.forget_checkpoints():
            done.append(f"forgot {count} checkpoint(s) of another name than kvedit gives")
        done += _remove_damaged(store, say)
    return done


def _restore_texts(store: Store) -> Iterator[str]:
    for one in store.altered():
        if one.agreed:
            store.restore_text(one.id, one.text)
            yield f"the text of {one.key} is again what the history says"


def _remove_damaged(store: Store, say: Say) -> Iterator[str]:
    """Checkpoints and cached files that are damaged, and can be made again: not the checkpoints
    that stand for deltas which are no longer there.
    """
    pinned = store.pinned()
    for row in store.checkpoints():
        if row.revision in pinned:
            continue
        say(f"checking the checkpoint of revision {row.revision}")
        try:
            verify_manifest(row.path, row.digest)
        except (KveditError, OSError):
            store.remove_checkpoint(row.revision)
            yield f"removed the damaged checkpoint of revision {row.revision}"
    for path in sorted(store.cache.glob(caches.PATTERN)):
        if not caches.is_whole(path):
            remove(path)
            yield f"removed the damaged file {path.name} from the cache"
