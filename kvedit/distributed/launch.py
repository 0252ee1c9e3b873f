"""A command that a launcher started several times: who was launched, and the store of each process.

Rank 0 runs the command on the store.  The others run it on a scratch replica that goes away at the
end, and their output is dropped, so the rest of the program need not know of ranks.

Invariants:
- Rank 0 alone writes the store, and the journal says what was committed, whoever dies.
- A replica's files are links to the store's, and nothing writes into an existing file: a new one
  takes the place of the link.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kvedit.errors import UsageError

VARIABLES = (
    ("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"), ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)  # fmt: skip
"""How launchers number the processes that they start: rank, and how many there are."""
DIGITS = 9  # of a rank, at most


def launched_rank() -> int | None:
    """This process's rank if a launcher started several, by what the environment says:
    ``accelerate launch``, torchrun, and MPI where accelerate calls it.
    """
    for rank, size in VARIABLES:
        several = os.environ.get(size, "1") not in ("", "1")
        if several and rank in os.environ and "MASTER_ADDR" in os.environ:
            return _number(rank)
    return None


def _number(name: str) -> int:
    """A number that the launcher gives in the environment.  Raises UsageError."""
    value = os.environ[name]
    if not value.isdecimal() or len(value) > DIGITS:
        hint = f"Start the processes with accelerate launch or torchrun, or unset {name}."
        raise UsageError(f"{name}={value!r:.40} is no rank of a process", hint=hint)
    return int(value)


@contextmanager
def shared_store(option: str | None) -> Iterator[str]:
    """Join the group; the store that this process works on, for ``--store``.

    Raises ProcessError.  Standard input, if it is an argument, is read on rank 0 for all.
    """
    from kvedit.distributed import processes  # loads torch
    from kvedit.store.store import resolve_store

    path = resolve_store(option)
    group = processes.join()
    with TemporaryDirectory(prefix="kvedit-rank-") as scratch:
        with group.in_step():  # nothing is written before all have copied
            if group.rank:
                _replicate(path, Path(scratch))
        if "-" in sys.argv[1:]:
            data = group.on_main(sys.stdin.buffer.read)
            sys.stdin = io.TextIOWrapper(io.BytesIO(data))
        yield scratch if group.rank else str(path)


def _replicate(store: Path, replica: Path) -> None:
    """Copy the database as it is now, and link every other file."""
    import sqlite3

    from kvedit.store.database import DB_NAME

    for file in sorted(store.rglob("*")):
        target = replica / file.relative_to(store)
        if file.is_dir():
            target.mkdir()
        elif not file.name.startswith((DB_NAME, "lock", ".tmp-")):
            target.symlink_to(file.resolve())
    if (store / DB_NAME).is_file():
        source = f"{(store / DB_NAME).resolve().as_uri()}?mode=ro"
        current, copy = sqlite3.connect(source, uri=True), sqlite3.connect(replica / DB_NAME)
        with closing(current), closing(copy):
            current.backup(copy)


def leave(code: int, output: str) -> int:
    """Leave the group; the exit code of this process.

    ``output`` is what a process other than rank 0 has not shown: nothing is lost by it where all
    have come to the same end, else it says why this process could not go on.
    """
    from kvedit.distributed.processes import joined

    group = joined()
    if group is None:
        return code
    group.end()
    if not group.lost:
        return 0 if group.rank else code
    sys.stderr.write(output)
    sys.stdout.flush()
    sys.stderr.flush()
    # In order torch cannot close connections to a process that is gone: it would hang or abort.
    os._exit(code or 1)
