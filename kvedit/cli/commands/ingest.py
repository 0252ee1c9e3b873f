"""The command for thousands of facts: ingest."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvedit.cli import common, parameters
from kvedit.cli.common import Settings, next_step, note
from kvedit.cli.output import clean, print_json_line, print_parts
from kvedit.cli.parameters import COUNT, FILE, SOURCE
from kvedit.cli.progress import Counting, make_reporter
from kvedit.cli.tables import ingest as tables
from kvedit.errors import InvalidFactError, KveditError, RejectedError
from kvedit.files import require_writable

if TYPE_CHECKING:
    from kvedit.facts.formats import Located, Reading
    from kvedit.ingest.preflight import NearKeys, Preflight
    from kvedit.ingest.report import IngestOptions, IngestReport
    from kvedit.store.store import Store

MOST_DIGITS = 18  # of a number of facts
ROWS_BETWEEN = 10_000
_UNSAFE = re.compile(r"[^\w.-]+")


def group_size(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    """Callback of --group: None for auto, or a number of facts."""
    if value == "auto":
        return None
    if not value.isdecimal() or len(value) > MOST_DIGITS or int(value) < 1:
        raise click.BadParameter(f"{value!r:.80} is neither auto nor a number of facts")
    return int(value)


@click.command()
@click.argument("source", metavar="FILE|DIR|-", type=SOURCE)
@click.option("--group", callback=group_size, default="auto", metavar="auto|N",
              help="Train N facts together; 1: each by itself. [auto]")  # fmt: skip
@click.option("--limit", type=COUNT, metavar="N", help="Train at most N facts.")
@click.option("--max-failures", type=COUNT, metavar="N",
              help="Stop when N facts were rejected or failed.")  # fmt: skip
@click.option("--max-time", callback=parameters.seconds, metavar="TIME",
              help="Stop after 90s, 30m, 2h or 1h30m, if need be within a group.")  # fmt: skip
@click.option("--key-column", metavar="NAME", help="Column or name that has the keys.")
@click.option("--description-column", metavar="NAME", help="The one that has the descriptions.")
@click.option("--encoding", callback=parameters.encoding, metavar="NAME",
              help="Encoding of the file, e.g. gb18030, big5, utf-16. [UTF-8]")  # fmt: skip
@click.option("--allow-placeholders", is_flag=True,
              help="Also train texts with {{name}}, <Name>, TODO and the like.")  # fmt: skip
@click.option("--skip-invalid", is_flag=True, help="Leave out invalid rows instead of stopping.")
@click.option("--retry-rejected", is_flag=True, help="Also train what was rejected before.")
@click.option("--rejected-file", type=FILE, metavar="FILE",
              help="Where to write the rejected facts. [exports/ of the store]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would happen; change nothing.")
@common.json_lines_option
@click.pass_obj
def ingest(settings: Settings, /, source: str, max_time: float | None, rejected_file: Path | None,
           dry_run: bool, as_json: bool, key_column: str | None,
           description_column: str | None, encoding: str | None, allow_placeholders: bool,
           **limits: Any) -> None:  # fmt: skip
    """Train a file or a folder of facts into the model.

    The file, or standard input ('-'), is JSON Lines, JSON, CSV, TSV or Markdown; the format is
    detected from the content. A fact has a key and a description, and may have aliases, prompts,
    paraphrases, locality, questions, lang and source. Other forms are read as well: tables of
    questions and answers, Alpaca, ShareGPT, OpenAI messages, SQuAD, CounterFact, zsRE, KnowEdit,
    UnKE. In CSV and TSV the first line names the columns, and '|' separates several values. In a
    folder every .txt or .md file is a fact, and its name the key. --dry-run says what a file was
    taken for and shows its first rows as they would be taught.

    All rows are checked before the first edit. Facts are then trained in groups, and each is
    committed or rejected as by `add`. After Ctrl-C, a crash or a limit, the same command continues
    where it stopped, even within a group. Rejected facts are written with their reasons to a file
    that can be corrected and given to `ingest` again; the exit code is then 3.

    \b
    Examples:
      kvedit ingest facts.jsonl
      kvedit ingest facts.csv --dry-run
      kvedit ingest 术语.csv --encoding gb18030 --key-column 编号 --description-column 说法
      kvedit ingest folder-of-texts --limit 20
      kvedit ingest facts.jsonl --max-time 8h --skip-invalid
      kvedit ingest --retry-rejected store/exports/rejected-facts.jsonl
    """
    from kvedit.facts.formats import Reading
    from kvedit.facts.forms.records import Columns

    _check_target(source, rejected_file)
    reading = Reading(Columns(key_column, description_column), encoding)
    preflight = _preflight(settings, source, reading, hold=not allow_placeholders)
    options = _options(preflight, dry_run, max_seconds=max_time, **limits)
    _report_problems(preflight, as_json=as_json)
    if dry_run:
        _show_plan(settings, preflight, options, as_json)
    _refuse_problems(preflight, options)
    report = _run(settings, preflight, options, as_json)
    report, path = _keep_rejected(settings, source, rejected_file, report, options.places)
    _show(settings, preflight, report, path, as_json)


def _options(preflight: Preflight, dry_run: bool, **given: Any) -> IngestOptions:
    """What the run is asked to do; a dry run needs no places of the facts."""
    from kvedit.ingest.report import IngestOptions

    entries = [*preflight.new, *(one.entry for one in preflight.rejected_before)]
    places = {} if dry_run else {entry.fact.key: entry.where for entry in entries}
    return IngestOptions(places=places, **given)


def _refuse_problems(preflight: Preflight, options: IngestOptions) -> None:
    """Stop before the first edit where rows are invalid, unless these are left out."""
    if preflight.stops(options.skip_invalid):
        raise InvalidFactError(
            f"{len(preflight.problems)} of {preflight.read} rows are invalid; nothing was changed",
            hint="Correct them, or add --skip-invalid to leave them out.",
        )


def _check_target(source: str, rejected_file: Path | None) -> None:
    """Fail now on a file that could not be written at the end, or that holds the input."""
    if rejected_file is None:
        return
    require_writable(rejected_file)
    if source != "-" and rejected_file.resolve() == Path(source).resolve():
        raise click.UsageError(f"--rejected-file {rejected_file} would replace the input")


def _preflight(settings: Settings, source: str, reading: Reading, *, hold: bool) -> Preflight:
    """The input compared with itself and the store, for which the model is not needed."""
    from kvedit.facts.formats import read_facts
    from kvedit.ingest.preflight import inspect_facts
    from kvedit.store.key_forms import key_form_at
    from kvedit.store.store import resolve_store

    with _open_store(settings) as store:
        rows = read_facts(source, reading)
        counted = _counted(rows, Counting(settings.quiet, "rows read"))
        form = key_form_at(resolve_store(settings.store))
        return inspect_facts(counted, store, hold_placeholders=hold, form=form)


def _counted(rows: Iterable[Located], progress: Counting) -> Iterator[Located]:
    """The rows, with a word now and then about how many were read."""
    for number, row in enumerate(rows):
        if number % ROWS_BETWEEN == 0:
            progress(number, 0)
        yield row


def _report_problems(preflight: Preflight, *, as_json: bool) -> None:
    """The invalid rows: all of them for a program, the first ones for a person."""
    from kvedit.events import Warning_

    if not as_json:
        lines = tables.problem_lines(preflight.problems)
        for line in (*lines, *tables.problem_lines(preflight.held_back, "held back")):
            click.echo(line, err=True)
        return
    for one in (*preflight.problems, *preflight.held_back):
        warning = Warning_(text=f"{one.where}: {one.reason}", code=one.kind, key=one.key)
        print_json_line(warning.to_json())


def _run(settings: Settings, preflight: Preflight, options: IngestOptions,
         as_json: bool) -> IngestReport:  # fmt: skip
    """Train what is new; with nothing to train the model is not even loaded."""
    from kvedit.ingest.report import FactOutcome, IngestReport
    from kvedit.ingest.run import ingest

    rejected = preflight.rejected_before
    if not preflight.new and not (options.retry_rejected and rejected):
        before = tuple(FactOutcome(one.entry.fact, "rejected", one.reasons) for one in rejected)
        with _open_store(settings) as store:
            head = 0 if store is None else store.head()
        return IngestReport(
            outcomes=(), unchanged=len(preflight.unchanged), rejected_before=before, revision=head
        )
    common.require_writable(settings)
    if not as_json and not settings.quiet:
        print_parts(*tables.form_parts(preflight, _phrasings(settings)), file=sys.stderr)
    entries = [*preflight.new, *preflight.unchanged, *(one.entry for one in rejected)]
    reporter = make_reporter(quiet=settings.quiet, as_json=as_json, many=True)
    report: IngestReport | None = None
    try:
        with common.knowledge_base(settings, reporter, create=True) as base:
            near = _similar_keys(settings, preflight, base.store)
            if near.count:
                text = tables.similar_keys_text(near)
                reporter.say(f"{text}; such facts are trained together, or their retention comes"
                             " first")  # fmt: skip
            report = ingest(base, [entry.fact for entry in entries], options, reporter)
    except (KveditError, OSError) as error:
        if report is None:
            raise
        return _ended_by(report, error)  # closing the store, after the facts
    return report


def _ended_by(report: IngestReport, error: Exception) -> IngestReport:
    """The report of a run that met an error after its facts; the first error is the one to say."""
    return report if report.error else replace(report, error=error)


def _keep_rejected(
    settings: Settings, source: str, chosen: Path | None, report: IngestReport,
    places: Mapping[str, str],
) -> tuple[IngestReport, Path | None]:  # fmt: skip
    """``_write_rejected``; where that fails, it is in the report and the summary is shown."""
    try:
        return report, _write_rejected(settings, source, chosen, report, places)
    except (KveditError, OSError) as error:
        return _ended_by(report, error), None


@contextmanager
def _open_store(settings: Settings) -> Iterator[Store | None]:
    """The store, for reading, or None if there is none yet."""
    from kvedit.store.store import Store, resolve_store

    path = resolve_store(settings.store)
    with Store.open(path, readonly=True) if Store.exists(path) else nullcontext() as store:
        yield store


def _phrasings(settings: Settings) -> Path:
    """The folder of a store's own phrasings, which need not be there."""
    from kvedit.store.store import resolve_store

    return resolve_store(settings.store) / "phrasings"


def _similar_keys(settings: Settings, preflight: Preflight, store: Store | None) -> NearKeys:
    from kvedit.ingest.preflight import near_keys

    keys = [] if store is None else store.keys()
    progress = Counting(settings.quiet, "keys compared")
    return near_keys([entry.fact for entry in preflight.new], keys, progress)


def _write_rejected(settings: Settings, source: str, chosen: Path | None, report: IngestReport,
                    places: Mapping[str, str]) -> Path | None:  # fmt: skip
    """The rejected facts with reasons, as JSON Lines; returns the file if there are any."""
    from kvedit.files import remove, write_atomic
    from kvedit.store.store import resolve_store

    if settings.rank:  # only rank 0 writes for the user
        return None
    lines = []
    for one in (*report.outcomes, *report.rejected_before):
        if one.outcome == "committed":
            continue
        fields = {**one.fact.to_json(), "outcome": one.outcome, "reasons": list(one.reasons)}
        if one.fact.key in places:  # remarks beside the fact, which the reader ignores
            fields["where"] = places[one.fact.key]
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    stem = "stdin" if source == "-" else _UNSAFE.sub("-", Path(source).resolve().stem)
    path = chosen or resolve_store(settings.store) / "exports" / f"rejected-{stem}.jsonl"
    if not lines and chosen is None:
        remove(path)  # written by an earlier run, and out of date
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines).encode())
    return path if lines else None


def _show(settings: Settings, preflight: Preflight, report: IngestReport, path: Path | None,
          as_json: bool) -> None:  # fmt: skip
    """The end of a run: one JSON line, or text and what to do next; leaves with the exit code."""
    message, hint, code = _end(settings, preflight, report)
    if message:
        common.print_error_line(as_json, message, hint, code)
        common.fail(message, hint)
    if as_json:
        fields = tables.ingest_fields(preflight, report)
        fields |= tables.form_fields(preflight, _phrasings(settings))
        print_json_line({**fields, "rejected_file": path and str(path), "exit_code": code})
    else:
        print_parts(*tables.ingest_parts(preflight, report))
        if path is not None:
            click.echo(clean(f"rejected facts and reasons: {path}"))
        if report.remaining:
            note(settings, "run the same command again to continue")
        elif path is not None:
            next_step(settings, "ingest", "--retry-rejected", str(path))
        elif report.count("committed"):
            next_step(settings, "status")
    click.get_current_context().exit(code)


def _end(settings: Settings, preflight: Preflight, report: IngestReport) -> tuple[str, str, int]:
    """The message and hint of the error that ended a run, if one did, and the exit code."""
    if report.error is not None:
        return common.explain_error(report.error, settings)
    if report.stopped == "interrupted":
        return "", "", common.EXIT_INTERRUPTED
    refused = report.count("rejected") + report.count("failed") + len(report.rejected_before)
    refused += len(preflight.held_back)
    return "", "", RejectedError.exit_code if refused else 0


def _show_plan(settings: Settings, preflight: Preflight, options: IngestOptions,
               as_json: bool) -> None:  # fmt: skip
    """What a run would do and how long it may take, as measured in this store; ends the command."""
    retried = len(preflight.rejected_before) if options.retry_rejected else 0
    new = len(preflight.new) + retried
    new = new if options.limit is None else min(new, options.limit)
    with _open_store(settings) as store:
        near = _similar_keys(settings, preflight, store)
        pace = (0, 0.0) if store is None else store.pace()
        retrained = 0 if store is None else _retrained(store, new, options.group)
    fields = tables.plan_fields(preflight, near, pace, new, retrained)
    fields |= tables.form_fields(preflight, _phrasings(settings))
    fields["would_stop"] = preflight.stops(options.skip_invalid)
    code = InvalidFactError.exit_code if fields["would_stop"] else 0
    if preflight.held_back or (preflight.rejected_before and not options.retry_rejected):
        code = code or RejectedError.exit_code
    if as_json:
        print_json_line({**fields, "exit_code": code})
    else:
        print_parts(*tables.form_parts(preflight, _phrasings(settings)))
        print_parts(*tables.plan_parts(preflight, near, fields))
        if fields["would_stop"]:
            note(settings, "correct the invalid rows, or add --skip-invalid to leave them out")
    click.get_current_context().exit(code)


def _retrained(store: Store, new: int, group: int | None) -> int:
    """How many earlier facts would be trained again together with the first group."""
    from kvedit.editing.plan import should_compact

    settings = store.config.group
    first, committed = min(new, group or settings.max_size), len(store.keys("committed"))
    compacts = first > 1 and should_compact(
        first, committed, store.added_since_compaction(), settings.compaction_ratio
    )
    return committed if compacts else 0
