"""Commands that look after the store: verify, doctor, backup, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvedit.cli.common import (
    Settings,
    json_lines_option,
    json_option,
    knowledge_base,
    next_step,
    read_only,
    require_keys,
)
from kvedit.errors import CorruptStoreError, GateFailedError, RejectedError

if TYPE_CHECKING:
    from kvedit.cli.progress import Reporter
    from kvedit.editing.verify import VerifyReport
    from kvedit.events import Event, Score
    from kvedit.store.rows import Finding

DOCTOR_HINT = "a good backup restores everything; without one, see docs/store-format.md"


@click.command()
@click.argument("keys", nargs=-1)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Check only N facts, those most at risk first.",
)
@click.option("--repair", is_flag=True, help="Train the facts again that are no longer recalled.")
@click.option(
    "--base",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=300,
    metavar="[N]",
    help="Also ask N questions that the base model could answer (TRR).  [300 if N is left out]",
)
@click.option(
    "--fail-under",
    type=click.FloatRange(0, 100),
    metavar="P",
    help="Exit with code 4 if less than P percent of the facts are recalled.",
)
@click.option(
    "--junit",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the results as JUnit XML.",
)
@json_lines_option
@click.pass_obj
def verify(
    settings: Settings,
    keys: tuple[str, ...],
    sample: int | None,
    repair: bool,
    base: int | None,
    fail_under: float | None,
    junit: Path | None,
    as_json: bool,
) -> None:
    """Check what the model still recalls.

    All committed facts are asked again, or only the KEYS, and the results are recorded. With
    --base also some of what the model knew before the first edit: of its own protected texts
    those that it was sure of, and that name no fact of the store.

    \b
    Examples:
      kvedit verify
      kvedit verify --base 500
      kvedit verify 夢中情爐 Porto
      kvedit verify --sample 100 --repair
      kvedit verify --fail-under 99 --junit report.xml
    """
    from kvedit.cli.progress import make_reporter

    require_keys(settings, keys)
    reporter = make_reporter(quiet=settings.quiet, as_json=as_json)
    with knowledge_base(settings, reporter, shared=True) as knowledge:
        report = knowledge.verify(list(keys) or None, sample=sample, repair=repair, base_knowledge=base or 0)
    if junit is not None:
        from kvedit.cli.junit import write_junit

        write_junit(junit, report)
    code = verify_code(report, fail_under)
    show_verify(settings, reporter, report, code)
    if code == GateFailedError.exit_code:
        raise GateFailedError(f"{recalled_text(report)}: less than --fail-under {fail_under:g}%")
    click.get_current_context().exit(code)


def headline_score(report: VerifyReport) -> Score:
    """Free generation where it was run, else the teacher-forced score."""
    return report.generated if report.generated.n else report.score


def recalled_text(report: VerifyReport) -> str:
    """The headline of a verification in a few words."""
    score = headline_score(report)
    return f"recalled {score.passed} of {score.n} ({score.protocol})"


def verify_code(report: VerifyReport, fail_under: float | None) -> int:
    """The exit code: 4 below the gate, 3 if a repair was refused, else 0."""
    score = headline_score(report)
    if fail_under is not None and score.n and 100 * score.passed < fail_under * score.n:
        return GateFailedError.exit_code
    refused = any(edit.outcome != "committed" for edit in report.repaired)
    return RejectedError.exit_code if refused else 0


def show_verify(
    settings: Settings, reporter: Reporter, report: VerifyReport, exit_code: int
) -> None:
    """The result of a verification: JSON Lines, or text and what to do next."""
    from kvedit.cli.output import print_json_line, print_lines
    from kvedit.cli.progress import JsonReporter
    from kvedit.cli.tables import verify_fields, verify_lines

    if isinstance(reporter, JsonReporter):
        events: list[Event] = [*report.checks, *report.repaired]
        for event in events:
            reporter(event)
        print_json_line({**verify_fields(report), "exit_code": exit_code})
        return
    print_lines(verify_lines(report, verbose=settings.verbosity > 0))
    if not report.repaired and not all(check.passed for check in report.checks):
        next_step(settings, "verify", "--repair")


@click.command()
@click.option(
    "--quick", is_flag=True, help="Only database, files and digests; do not load the model."
)
@json_option
@click.pass_obj
def doctor(settings: Settings, quick: bool, as_json: bool) -> None:
    """Check that the store is sound.

    Database, deltas, checkpoints and model weights must fit together. Nothing is changed. Errors
    make the exit code 4.

    \b
    Examples:
      kvedit doctor
      kvedit doctor --quick --json
    """
    from kvedit.cli.output import print_json, print_lines
    from kvedit.cli.tables import finding_fields, finding_lines

    findings = _findings(settings, quick=quick)
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        print_json({"ok": not errors, "findings": [finding_fields(one) for one in findings]})
    else:
        print_lines(finding_lines(findings))
    if errors:
        raise GateFailedError(f"{errors} error(s) found", hint=DOCTOR_HINT)


def _findings(settings: Settings, *, quick: bool) -> Sequence[Finding]:
    """What is wrong; a store too damaged to open is a finding, not a crash."""
    from kvedit.cli.progress import make_reporter

    if not quick:
        try:
            with knowledge_base(settings, make_reporter(quiet=settings.quiet)) as base:
                return base.doctor(deep=True)
        except CorruptStoreError as error:
            return [_opening_error(error), *_integrity(settings)]
    return _integrity(settings)


def _integrity(settings: Settings) -> Sequence[Finding]:
    with read_only(settings) as store:
        return store.integrity()


def _opening_error(error: CorruptStoreError) -> Finding:
    from kvedit.store.rows import Finding

    return Finding(level="error", what=error.message, hint=error.hint)


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
@click.pass_obj
def backup(settings: Settings, file: Path, force: bool, as_json: bool) -> None:
    """Write a consistent copy of the store to a tar FILE.

    The copy holds database, deltas and checkpoints. Safe while another kvedit is at work. To
    restore, unpack FILE into an empty folder.

    \b
    Examples:
      kvedit backup monday.tar
    """
    from kvedit.cli.output import print_json, size_text

    if file.exists() and not force:
        raise click.UsageError(f"{file} exists; choose another name, or --force to replace it")
    with read_only(settings) as store:
        store.backup(file)
        fields = {"path": str(file), "revision": store.head(), "bytes": file.stat().st_size}
    if as_json:
        print_json(fields)
    else:
        size = size_text(file.stat().st_size)
        click.echo(f"wrote {file}: revision {fields['revision']}, {size}")


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the weights. [that of the base model]",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf", "peft"]),
    default="hf",
    show_default=True,
    help="A whole model, or one LoRA adapter over the untouched base model.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Size of one weight file, such as 2GB.")
@json_option
@click.pass_obj
def export(
    settings: Settings,
    directory: Path,
    dtype: str | None,
    kind: str,
    max_shard_size: str | None,
    as_json: bool,
) -> None:
    """Write the model to a folder that transformers and vLLM load.

    The written files are loaded again and all facts asked once more: a differing answer makes
    the exit code 4. An adapter has the smallest rank with which every probe still passes; --dtype
    and --max-shard-size are for whole models.

    \b
    Examples:
      kvedit export my-model
      kvedit export my-model --dtype float16 --max-shard-size 2GB
      kvedit export my-adapter --format peft
    """
    from kvedit.cli.output import print_json, print_lines
    from kvedit.cli.progress import make_reporter
    from kvedit.cli.tables import export_fields, export_lines

    if kind == "peft" and (dtype or max_shard_size):
        raise click.UsageError("--dtype and --max-shard-size do not go with --format peft")
    with knowledge_base(settings, make_reporter(quiet=settings.quiet or as_json)) as base:
        if kind == "peft":
            report = base.export_adapter(directory)
        else:
            report = base.export(directory, dtype=dtype, max_shard_size=max_shard_size)
    if as_json:
        print_json(export_fields(report))
    else:
        print_lines(export_lines(report))
    if report.mismatches:
        raise GateFailedError(f"{len(report.mismatches)} answer(s) differ in the exported model")
