"""A copy of a store's database, for a look that must change nothing.

Opening a database in place may write: SQLite puts an interrupted commit into place, makes files of
its own, and an older format is upgraded.  All of that happens in the copy.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kvedit.errors import KveditError, LockedError
from kvedit.files import disk_errors

TRIES = 5
_HINT = "Check the permissions of the store's folder and of the files in it."
_PARTS = ("", "-wal", "-journal")  # the last one is of a database that is not in WAL mode


@contextmanager
def copied(database: Path) -> Iterator[Path]:
    """The copy, of one moment, in a folder of its own that goes away at the end.

    Raises LockedError if the database is written all the time.
    """
    with TemporaryDirectory(prefix="kvedit-look-") as folder:
        target = Path(folder) / database.name
        for _ in range(TRIES):
            before = _last_write(database)
            _copy(database, target)
            if _last_write(database) == before:
                break
        else:
            hint = "Wait until the other command has ended, then try again."
            raise LockedError(f"{database} is being written all the time", hint=hint)
        yield target


def _copy(database: Path, target: Path) -> None:
    for end in _PARTS:
        source, copy = (path.with_name(path.name + end) for path in (database, target))
        copy.unlink(missing_ok=True)
        try:
            stream = open(source, "rb")  # noqa: SIM115
        except FileNotFoundError:
            continue
        except OSError as error:
            raise KveditError(f"cannot read {source}: {error.strerror}", hint=_HINT) from error
        with stream, disk_errors(copy), open(copy, "wb") as out:
            shutil.copyfileobj(stream, out)


def _last_write(database: Path) -> list[tuple[int, int]]:
    """Size in bytes and time of change of a database and of what is not put into place yet."""
    files = (database.with_name(database.name + end) for end in _PARTS)
    status = [file.stat() for file in files if file.exists()]
    return [(one.st_size, one.st_mtime_ns) for one in status]
