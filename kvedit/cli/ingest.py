"""The command for thousands of facts: ingest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvedit.cli.common import (
    EXIT_INTERRUPTED,
    Settings,
    json_lines_option,
    knowledge_base,
    next_step,
    note,
)
from kvedit.errors import InvalidFactError, RejectedError

if TYPE_CHECKING:
    from kvedit.cli.progress import Reporter
    from kvedit.facts.fact import Fact
    from kvedit.ingest.preflight import Near, Preflight
    from kvedit.ingest.run import FactOutcome, IngestOptions, IngestReport
    from kvedit.store.store import Store

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
_UNSAFE = re.compile(r"[^\w.-]+")


def group_size(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    """Callback of --group: None for auto, or a number of facts."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of facts")
    return int(value)


def seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Callback of --max-time: 90, 90s, 30m, 2h or 1h30m in seconds."""
    if value is None:
        return None
    found = _DURATION.fullmatch(value.strip())
    if not found or not any(found.groups()):
        raise click.BadParameter(f"{value!r} is no time; write 90s, 30m, 2h or 1h30m")
    hours, minutes, rest = (int(part or 0) for part in found.groups())
    return 3600.0 * hours + 60 * minutes + rest


@click.command()
@click.argument("source", metavar="FILE|DIR|-")
@click.option(
    "--group",
    callback=group_size,
    default="auto",
    metavar="auto|N",
    help="Facts that are trained together; 1: each by itself. [auto]",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Teach at most N facts.")
@click.option(
    "--max-failures",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop when N facts were rejected or failed.",
)
@click.option(
    "--max-time",
    callback=seconds,
    metavar="TIME",
    help="Stop after a time: 90s, 30m, 1h30m; in the middle of a group too.",
)
@click.option("--skip-invalid", is_flag=True, help="Go on without the rows that cannot go in.")
@click.option("--retry", is_flag=True, help="Also try again what was rejected before.")
@click.option(
    "--rejected",
    "rejected_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write the rejected facts. [exports/ of the store]",
)
@click.option("--dry-run", is_flag=True, help="Say what would happen; change nothing.")
@json_lines_option
@click.pass_obj
def ingest(
    settings: Settings,
    source: str,
    group: int | None,
    limit: int | None,
    max_failures: int | None,
    max_time: float | None,
    skip_invalid: bool,
    retry: bool,
    rejected_file: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Teach the model all facts of a FILE, a folder, or standard input ('-').

    FILE is JSON Lines, JSON, CSV or TSV; which, is found from the content. A fact has a key and a
    description, and may have aliases, prompts, paraphrases, locality, lang and source; CounterFact
    and zsRE records are read too. In a table the first line names the columns, and '|' stands
    between several values. In a folder every .txt or .md file is a fact, and its name the key.

    Everything is read and checked before the first edit. Facts are then taught in groups; each is
    committed or rejected as by `add`. Run the same command again after Ctrl-C, a crash or a limit,
    and it goes on where it stopped, in the middle of a group too. Rejected facts are listed with
    their reasons in a file that can be corrected and given to `ingest` again. If there are any, the
    exit code is 3.

    \b
    Examples:
      kvedit ingest facts.jsonl
      kvedit ingest facts.csv --dry-run
      kvedit ingest folder-of-texts --limit 20
      kvedit ingest facts.jsonl --max-time 8h --skip-invalid
    """
    from kvedit.ingest.run import IngestOptions

    _check_target(source, rejected_file)
    preflight = _preflight(settings, source)
    if dry_run:
        would = _count(preflight, limit, retry=retry)
        _show_plan(settings, preflight, would, group, as_json=as_json, skip=skip_invalid)
        return
    _refuse_problems(preflight, as_json=as_json, skip=skip_invalid)
    options = IngestOptions(
        group=group,
        limit=limit,
        max_failures=max_failures,
        max_seconds=max_time,
        retry=retry,
        skip_invalid=skip_invalid,
        places=_places(preflight),
    )
    _carry_out(settings, source, preflight, options, rejected_file, as_json=as_json)


def _check_target(source: str, rejected_file: Path | None) -> None:
    """Fail now on a file that could not be written at the end, or that holds the input."""
    if rejected_file is None:
        return
    if not rejected_file.resolve().parent.is_dir():
        raise click.UsageError(f"--rejected {rejected_file}: there is no such folder")
    if source != "-" and rejected_file.resolve() == Path(source).resolve():
        raise click.UsageError(f"--rejected {rejected_file} would replace the input")


def _preflight(settings: Settings, source: str) -> Preflight:
    """The input held against itself and the store; the model is not needed for that."""
    from kvedit.facts.formats import read_facts
    from kvedit.ingest.preflight import inspect_facts
    from kvedit.store.store import Store, resolve_store

    path = resolve_store(settings.store)
    if not Store.exists(path):
        return inspect_facts(read_facts(source), None)
    with Store.open(path, readonly=True) as store:
        return inspect_facts(read_facts(source), store)


def _places(preflight: Preflight) -> dict[str, str]:
    entries = [*preflight.new, *(one.entry for one in preflight.rejected_before)]
    return {entry.fact.key: entry.where for entry in entries}


def _refuse_problems(preflight: Preflight, *, as_json: bool, skip: bool) -> None:
    """Tell the rows that cannot go in; without --skip-invalid that is the end."""
    _tell_problems(preflight, as_json=as_json)
    if preflight.problems and not skip:
        raise InvalidFactError(
            f"{len(preflight.problems)} of {preflight.read} rows cannot go in; nothing was changed",
            hint="Correct them, or add --skip-invalid to go on without them.",
        )


def _tell_problems(preflight: Preflight, *, as_json: bool) -> None:
    """Each row that cannot go in: all of them for a program, the first ones for a human."""
    from kvedit.cli.ingest_tables import problem_lines
    from kvedit.cli.output import print_json_line
    from kvedit.events import Warning_

    if not as_json:
        for line in problem_lines(preflight.problems):
            click.echo(line, err=True)
        return
    for one in preflight.problems:
        warning = Warning_(text=f"{one.where}: {one.reason}", code=one.kind, key=one.key)
        print_json_line(warning.to_json())


def _carry_out(
    settings: Settings,
    source: str,
    preflight: Preflight,
    options: IngestOptions,
    rejected_file: Path | None,
    *,
    as_json: bool,
) -> None:
    """Teach, write down what was refused, and leave with the right exit code."""
    report = _run(settings, preflight, options, as_json)
    path = _write_rejected(settings, source, rejected_file, report, options.places)
    code = _exit_code(report)
    _show(settings, preflight, report, path, code, as_json=as_json)
    click.get_current_context().exit(code)


def _run(
    settings: Settings, preflight: Preflight, options: IngestOptions, as_json: bool
) -> IngestReport:
    """Teach what is new; with nothing to teach the model is not even loaded."""
    from kvedit.cli.ingest_progress import make_ingest_reporter
    from kvedit.ingest.run import FactOutcome, IngestReport, ingest

    again = [one.entry.fact for one in preflight.rejected_before]
    if not preflight.new and not (options.retry and again):
        refused = [
            FactOutcome(r.entry.fact, "rejected", r.reasons) for r in preflight.rejected_before
        ]
        return IngestReport(
            outcomes=(), unchanged=len(preflight.unchanged), rejected_before=tuple(refused),
            revision=_head(settings),
        )  # fmt: skip
    facts = [*(entry.fact for entry in (*preflight.new, *preflight.unchanged)), *again]
    reporter = make_ingest_reporter(quiet=settings.quiet, as_json=as_json)
    with knowledge_base(settings, reporter, create=True, shared=True) as base:
        _tell_near(reporter, [entry.fact for entry in preflight.new], base.store.keys())
        return ingest(base, facts, options, reporter)


def _head(settings: Settings) -> int:
    from kvedit.store.store import Store, resolve_store

    path = resolve_store(settings.store)
    if not Store.exists(path):
        return 0
    with Store.open(path, readonly=True) as store:
        return store.head()


def _tell_near(reporter: Reporter, facts: Sequence[Fact], held: Sequence[str]) -> None:
    from kvedit.cli.ingest_tables import near_text
    from kvedit.ingest.preflight import near_keys

    near = near_keys(facts, held)
    if near:
        reporter.say(f"{near_text(near)}; such facts are taught together, or checked first")


def _write_rejected(
    settings: Settings,
    source: str,
    chosen: Path | None,
    report: IngestReport,
    places: Mapping[str, str],
) -> Path | None:
    """The facts that were refused, with reasons, as JSON Lines; returns where, if there are any."""
    from kvedit.files import remove, write_atomic
    from kvedit.store.store import resolve_store

    lines = [_rejected_line(one, places) for one in _refused(report)]
    stem = "stdin" if source == "-" else _UNSAFE.sub("-", Path(source).resolve().stem)
    path = chosen or resolve_store(settings.store) / "exports" / f"rejected-{stem}.jsonl"
    if not lines and chosen is None:
        remove(path)  # what an earlier run left is no longer true
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines).encode())
    return path if lines else None


def _refused(report: IngestReport) -> list[FactOutcome]:
    return [
        *(one for one in report.outcomes if one.outcome != "committed"),
        *report.rejected_before,
    ]


def _rejected_line(one: FactOutcome, places: Mapping[str, str]) -> str:
    """A fact as `ingest` reads it, and beside it what the reader passes over."""
    remarks = {"outcome": one.outcome, "reasons": list(one.reasons)}
    where = {"where": places[one.fact.key]} if one.fact.key in places else {}
    document = {**one.fact.to_json(), **remarks, **where}
    return json.dumps(document, ensure_ascii=False) + "\n"


def _exit_code(report: IngestReport) -> int:
    if report.stopped == "interrupted":
        return EXIT_INTERRUPTED
    bad = report.count("rejected") + report.count("failed") + len(report.rejected_before)
    return RejectedError.exit_code if bad else 0


def _show(
    settings: Settings,
    preflight: Preflight,
    report: IngestReport,
    path: Path | None,
    code: int,
    *,
    as_json: bool,
) -> None:
    """The end of a run: one JSON line, or text and what to do next."""
    from kvedit.cli.ingest_tables import ingest_fields, ingest_lines
    from kvedit.cli.output import print_json_line, print_lines

    if as_json:
        place = None if path is None else str(path)
        fields = ingest_fields(preflight, report)
        print_json_line({**fields, "rejected_file": place, "exit_code": code})
        return
    print_lines(ingest_lines(preflight, report))
    if path is not None:
        click.echo(f"refused facts and reasons: {path}")
    if report.remaining:
        note(settings, "run the same command again to go on")
    elif path is not None:
        next_step(settings, "ingest", "--retry", str(path))
    elif report.count("committed"):
        next_step(settings, "status")


def _count(preflight: Preflight, limit: int | None, *, retry: bool) -> int:
    """How many facts a run would teach."""
    would = len(preflight.new) + (len(preflight.rejected_before) if retry else 0)
    return would if limit is None else min(would, limit)


def _show_plan(
    settings: Settings,
    preflight: Preflight,
    would: int,
    group: int | None,
    *,
    as_json: bool,
    skip: bool,
) -> None:
    """What would happen, and how long it may take by what was measured in this store."""
    from kvedit.cli.ingest_tables import plan_fields, plan_lines
    from kvedit.cli.output import print_json_line, print_lines
    from kvedit.store.store import Store, resolve_store

    path, near, pace, compaction = resolve_store(settings.store), _near(preflight, []), (0, 0.0), 0
    if Store.exists(path):
        with Store.open(path, readonly=True) as store:
            near, pace = _near(preflight, store.keys()), store.pace()
            compaction = _held_anew(store, would, group)
    fields = plan_fields(preflight, near, pace, would, compaction)
    code = InvalidFactError.exit_code if preflight.problems and not skip else 0
    _tell_problems(preflight, as_json=as_json)
    if as_json:
        print_json_line({**fields, "exit_code": code})
    else:
        print_lines(plan_lines(preflight, near, fields))
        if code:
            note(settings, "correct these rows, or add --skip-invalid to go on without them")
    click.get_current_context().exit(code)


def _held_anew(store: Store, would: int, group: int | None) -> int:
    """How many facts that are held the first group is taught together with."""
    from kvedit.editing.plan import should_compact

    settings = store.config.group
    first, held = min(would, group or settings.max_size), len(store.keys("committed"))
    begins = first > 1 and should_compact(
        first, held, store.added_since_compaction(), settings.compaction_ratio
    )
    return held if begins else 0


def _near(preflight: Preflight, held: Sequence[str]) -> list[Near]:
    from kvedit.ingest.preflight import near_keys

    return near_keys([entry.fact for entry in preflight.new], held)
