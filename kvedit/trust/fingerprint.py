"""What a base model is known by: the SHA-256 of every file that decides an answer.

The digest is a Merkle tree: blocks of a file, files of a folder.  Blocks are hashed by several
threads, so that whole files are read about as quickly as the disk gives them.

Invariants:
- Nothing of the model is run or unpickled here: files are bytes.
- A file that can change an answer counts with all of its bytes; one that cannot (a README, a log)
  may come and go.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvedit.errors import ModelError, ModelMismatchError

_BLOCK = 64 * 1024 * 1024  # bytes
_ENDS = 16 * 1024 * 1024  # bytes of each end of a file, which the fingerprint of format 2 is of
_DECIDES = re.compile(
    r".*\.(safetensors|bin|pt|pth|py|jinja|model|tiktoken|spm|vocab|bpe|codes)"
    r"|(vocab|merges)([._-].*)?\.txt"
    r"|(.*config|.*tokenizer.*|.*vocab.*|special_tokens_map|added_tokens|chat_template|.*\.index"
    r"|merges|normalizer|emoji)\.json"
)
"""Names of the files that transformers reads for a causal language model."""
_NESTED = (".py", ".jinja")  # the files below the top folder that it reads
Files = Mapping[str, str]
"""Of each file, by its path in the model's folder: size and digest."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The digest of a model, in hex, and what it is of; no files for a model on a hub."""

    digest: str
    files: Files


def of_folder(folder: Path) -> Fingerprint:
    """The fingerprint of the model in a folder; raises ModelError if a file cannot be read."""
    names = [path.relative_to(folder).as_posix() for path in deciding_files(folder)]
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            files = {name: _leaf(folder / name, threads) for name in names}
    except OSError as error:
        what = f"{error.filename} cannot be read: {error.strerror}"
        raise ModelError(what, hint="Check the disk, and that you may read it.") from error
    return Fingerprint(root(files), files)


def of_hub(name: str, commit: str | None) -> Fingerprint:
    """The fingerprint of a model on a hub: its commit stands for its files."""
    return Fingerprint(hashlib.sha256(f"{name}@{commit}".encode()).hexdigest(), {})


def root(files: Files) -> str:
    """The digest of a whole folder, from those of its files."""
    lines = "".join(f"{name}\0{leaf}\n" for name, leaf in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def deciding_files(folder: Path) -> list[Path]:
    """The files in a folder that decide what its model answers, sorted; none if it is no folder."""
    return sorted(path for path in _candidates(folder) if _DECIDES.fullmatch(path.name))


def code_files(folder: Path) -> list[Path]:
    """The Python files in a model's folder, sorted."""
    return [path for path in deciding_files(folder) if path.suffix == ".py"]


def _candidates(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        top = Path(parent) == folder
        for name in names:
            path = Path(parent, name)
            if (top or path.suffix in _NESTED) and path.is_file():
                yield path


def _leaf(path: Path, threads: ThreadPoolExecutor) -> str:
    """Size and digest of a file: that of its blocks' digests."""
    size = path.stat().st_size
    starts = range(0, max(1, size), _BLOCK)
    digest = hashlib.sha256()
    for block in threads.map(lambda start: _block(path, start), starts):
        digest.update(block)
    return f"{size} {digest.hexdigest()}"


def _block(path: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        left = _BLOCK
        while left and (piece := stream.read(min(left, 1024 * 1024))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()


def of_ends(folder: Path) -> str:
    """The fingerprint as older stores have it: of name, size and both ends of weights and code."""
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "*.bin", "*.py")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_ENDS))
            stream.seek(max(_ENDS, size - _ENDS))
            digest.update(stream.read(_ENDS))
    return digest.hexdigest()


def difference(source: str, expected: Files, found: Files) -> ModelMismatchError:
    """The error for a model whose files are others now: it names them."""
    changed = [
        *(f"{name} is missing" for name in expected.keys() - found.keys()),
        *(f"{name} is new" for name in found.keys() - expected.keys()),
        *(f"{name} has changed" for name in expected.keys() & found.keys()
          if expected[name] != found[name]),
    ]  # fmt: skip
    few = ", ".join(sorted(changed)[:5]) + ", …" * (len(changed) > 5)
    return ModelMismatchError(
        f"the model at {source} is not the one that the store was made for"
        + f": {few}" * bool(changed and expected),
        hint="Put the original files back, or make a new store with kvedit init.",
    )
