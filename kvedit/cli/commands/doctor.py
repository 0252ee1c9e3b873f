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
from kvedit.cli.tables import finding_parts
from kvedit.errors import CorruptStoreError, GateFailedError
from kvedit.files import require_writable

if TYPE_CHECKING:
    from kvedit.store.rows import Finding

DOCTOR_HINT = "restore the store from a backup; without one, see docs/store-format.md"


@click.command()
@click.option("--quick", is_flag=True, help="Check database and files only, without the model.")
@json_option
@click.pass_obj
def doctor(settings: Settings, quick: bool, as_json: bool) -> None:
    """Check the store for damage.

    Database, deltas, checkpoints and model weights must agree with each other. Nothing is changed.
    The exit code is 4 if there are errors.

    \b
    Examples:
      kvedit doctor
      kvedit doctor --quick --json
    """
    findings = _findings(settings, quick=quick)
    errors = sum(finding.level == "error" for finding in findings)
    document = {"ok": not errors, "findings": [asdict(one) for one in findings]}
    print_result(as_json, document, *finding_parts(findings))
    if errors:
        raise GateFailedError(f"the store has {errors} error(s)", hint=DOCTOR_HINT)


def _findings(settings: Settings, *, quick: bool) -> Sequence[Finding]:
    """What is wrong; a store too damaged to open is a finding, not a crash."""
    from kvedit.store.rows import Finding

    errors = []
    if not quick:
        try:
            with common.knowledge_base(settings, make_reporter(quiet=settings.quiet)) as base:
                return base.doctor(deep=True)
        except CorruptStoreError as error:
            errors.append(Finding(level="error", what=error.message, hint=error.hint))
    with common.read_only(settings) as store:
        return [*errors, *store.integrity()]


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
    if file.exists() and not force:
        raise click.UsageError(f"{file} exists; choose another name, or --force to replace it")
    if file.exists() and not file.is_file():
        raise click.UsageError(f"{file} is no regular file; a backup cannot be written to it")
    require_writable(file)
    with common.read_only(settings) as store:
        store.backup(file)
        head = store.head()
    size = file.stat().st_size
    fields = {"path": str(file), "revision": head, "bytes": size}
    print_result(as_json, fields, f"wrote {file}: revision {head}, {output.size_text(size)}")
