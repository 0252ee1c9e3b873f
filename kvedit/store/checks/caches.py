"""Cached files that end in a digest of themselves: what was measured and can be measured again.

The last 32 bytes are the SHA-256 of all bytes before them.  In a safetensors file they are a tensor
of their own.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from kvedit.store.rows import Finding

PATTERN = "*-fisher.safetensors"
DIGEST_BYTES = 32
_CHUNK = 1024 * 1024


def sealed(pieces: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The pieces of a file, and their digest at the end."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    yield digest.digest()


def is_whole(path: Path) -> bool:
    """Whether a file ends in its digest; False as well if it cannot be read."""
    try:
        left = path.stat().st_size - DIGEST_BYTES
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while left > 0 and (piece := stream.read(min(left, _CHUNK))):
                digest.update(piece)
                left -= len(piece)
            return left == 0 and stream.read() == digest.digest()
    except OSError:
        return False


def findings(folder: Path, *, deep: bool) -> Iterator[Finding]:
    """The cached files that were altered; none without ``deep``."""
    hint = "It is measured again when it is needed; `kvedit doctor --fix` removes it."
    for path in sorted(folder.glob(PATTERN)) if deep else ():
        if not is_whole(path):
            yield Finding("warning", f"the cached file {path} is damaged", hint)
