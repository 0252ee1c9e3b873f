"""Commands that look after the store: doctor and backup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvedit.cli import common, output
from kvedit.cli.common import Settings, json_option
from kvedit.cli.output import print_result
from kvedit.cli.parameters import FILE
from kvedit.cli.progress import make_reporter
from kvedit.cli.tables.facts import finding_parts
from kvedit.errors import CorruptStoreError, GateFailedError
from kvedit.files import require_writable

if TYPE_CHECKING:
    from kvedit.store.rows import Finding

DOCTOR_HINT = "do what the findings say; where they say nothing, restore the store from a backup"


@click.command()
@click.option("--quick", is_flag=True, help="Check database and files only, without the model.")
@click.option("--fix", is_flag=True, help="Mend what can be mended without loss, then check.")
@click.option("--model", type=click.Path(file_okay=False), metavar="DIR",
              help="With --fix: where the base model lies now.")  # fmt: skip
@json_option
@click.pass_obj
def doctor(settings: Settings, quick: bool, fix: bool, model: str | None, as_json: bool) -> None:
    """Check the store for damage.

    Database, history, settings, deltas, checkpoints, cached files and the base model are looked at,
    each of them whatever is wrong with the others; every revision is rebuilt and its weights are
    compared with the journal. Nothing is changed. The exit code is 4 if there are errors.

    With --fix the store is mended first: interrupted edits are ended, damaged checkpoints and
    cached files are removed (they can be made again), and a fact whose text was altered gets the
    text of its history, where the journal has the same.

    \b
    Examples:
      kvedit doctor
      kvedit doctor --quick --json
      kvedit doctor --fix
      kvedit doctor --fix --model /data/models/my-model
    """
    if model and not fix:
        raise click.UsageError("--model goes with --fix")
    findings = [*(_mended(settings, model) if fix else ()), *_findings(settings, quick=quick)]
    errors = sum(finding.level == "error" for finding in findings)
    document = {"ok": not errors, "findings": [asdict(one) for one in findings]}
    print_result(as_json, document, *finding_parts(findings))
    if errors:
        raise GateFailedError(f"the store has {errors} error(s)", hint=DOCTOR_HINT)


def _findings(settings: Settings, *, quick: bool) -> Sequence[Finding]:
    """What is wrong with the store, whose files stay as they are."""
    from kvedit.store.store import resolve_store

    path = resolve_store(settings.store)
    if quick:
        from kvedit.store.checks.inspection import examine_files

        return examine_files(path)
    from kvedit.events import Status
    from kvedit.revisions.doctor import examine

    with make_reporter(quiet=settings.quiet) as reporter:
        return examine(path, lambda text: reporter(Status(phase=text)))


def _mended(settings: Settings, model: str | None) -> list[Finding]:
    """What was mended; a store that cannot be opened stays as it is, and is reported after this."""
    from kvedit.events import Status
    from kvedit.revisions.doctor import mend
    from kvedit.store.rows import Finding
    from kvedit.store.store import resolve_store

    with make_reporter(quiet=settings.quiet) as reporter:
        try:
            path = resolve_store(settings.store)
            done = mend(path, lambda text: reporter(Status(phase=text)), model)
        except CorruptStoreError as error:
            return [Finding("warning", f"not everything was mended: {error.message}", error.hint)]
    return [Finding("ok", f"mended: {what}") for what in done]


@click.command()
@click.argument("file", type=FILE)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
@click.pass_obj
def backup(settings: Settings, file: Path, force: bool, as_json: bool) -> None:
    """Write a consistent copy of the store to a tar FILE.

    The copy holds database, deltas and checkpoints, and may be made while another kvedit command is
    running. To restore it, unpack FILE into an empty folder.

    \b
    Examples:
      kvedit backup monday.tar
    """
    from kvedit.store.backup import write_backup

    if file.exists() and not force:
        raise click.UsageError(f"{file} exists; choose another name, or --force to replace it")
    if file.exists() and not file.is_file():
        raise click.UsageError(f"{file} is no regular file; a backup cannot be written to it")
    require_writable(file)
    with common.read_only(settings) as store:
        write_backup(store, file)
        head = store.head()
    size = file.stat().st_size
    fields = {"path": str(file), "revision": head, "bytes": size}
    print_result(as_json, fields, f"wrote {file}: revision {head}, {output.size_text(size)}")
