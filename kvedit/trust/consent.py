"""Consent to run a model's own Python code: given by a person, on this machine.

A consent is a file in the user's settings folder, named by a digest of the code.  A store never
holds one: whoever makes a store could write it into it.

Invariants:
- Other code, or other settings that choose it, need another consent.
- The digest is computed from the files each time: no list of known files is believed here.
"""

import hashlib
import json
import os
from pathlib import Path

from kvedit.errors import ModelError
from kvedit.files import disk_errors, now, remove, sha256_file, write_atomic
from kvedit.trust import fingerprint

ENVIRONMENT = "KVEDIT_CONFIG_DIR"
_CHOOSING = ("config.json", "tokenizer_config.json")  # they say which code is run


class NotAllowedError(ModelError):
    """The model brings code of its own, and nobody has consented to it on this machine."""


def settings_folder() -> Path:
    """The user's folder for what holds on this machine: ``KVEDIT_CONFIG_DIR``, else kvedit's in
    ``XDG_CONFIG_HOME``, ``APPDATA`` or ``~/.config``.
    """
    if given := os.environ.get(ENVIRONMENT):
        return Path(given).expanduser()
    for name in ("XDG_CONFIG_HOME", "APPDATA"):
        if (folder := Path(os.environ.get(name) or "")).is_absolute():
            return folder / "kvedit"
    return Path.home() / ".config" / "kvedit"


def of_folder(folder: Path) -> str:
    """The digest of the code in a model's folder, and of the settings that choose it."""
    names = [path.relative_to(folder).as_posix() for path in fingerprint.code_files(folder)]
    names += [name for name in _CHOOSING if (folder / name).is_file()]
    try:
        lines = [f"{name}\0{sha256_file(folder / name)}\n" for name in names]
    except OSError as error:
        what = f"{error.filename} cannot be read: {error.strerror}"
        raise ModelError(what, hint="Check the disk, and that you may read it.") from error
    return hashlib.sha256("".join(["code\n", *lines]).encode()).hexdigest()


def of_hub(name: str, commit: str | None) -> str:
    """The digest of the code of a model on a hub: its commit stands for it."""
    return hashlib.sha256(f"code of {name}@{commit}".encode()).hexdigest()


def is_given(digest: str) -> bool:
    """Whether somebody has consented to this code on this machine."""
    return _path(digest).is_file()


def give(digest: str, model: str) -> Path:
    """Record a consent; returns its file, which may be deleted to take it back."""
    path = _path(digest)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model": model, "given_at": now()}, ensure_ascii=False)
    write_atomic(path, text.encode())
    return path


def take_back(digest: str) -> None:
    """Remove a consent; none is no error."""
    remove(_path(digest))


def _path(digest: str) -> Path:
    return settings_folder() / "trusted-code" / f"{digest}.json"
