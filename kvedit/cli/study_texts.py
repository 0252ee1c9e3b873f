"""What `kvedit study` does: show what a fact has to be studied, write it out, take it back.

Invariant: showing and writing out import no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.cli import common
from kvedit.cli.common import Settings, note
from kvedit.cli.output import (
    FirstLine,
    edit_parts,
    print_json_line,
    print_parts,
    print_result,
    table,
)
from kvedit.cli.progress import make_reporter
from kvedit.errors import UnknownKeyError
from kvedit.facts.keys import facts_text

if TYPE_CHECKING:
    from kvedit.editing.study.filters import StudyReport
    from kvedit.facts.forms.study import StudyEntry, StudyRecord

SHOWN_REFUSED = 20


def show(settings: Settings, key: str, *, as_json: bool) -> None:
    """What one fact has: trained or held out, written by whom."""
    from kvedit.facts.forms import study

    with common.read_only(settings) as store:
        fact, config = store.require(key).fact, store.config.study
    entries = study.entries(fact, config)
    document = {
        "key": fact.key,
        "description": fact.description,
        "study": [_document(one) for one in entries],
    }
    if not entries and not as_json:
        note(
            settings, f"{fact.key} has no questions, statements or parts: only its text is trained"
        )
        return
    cells = [
        (_use(one), one.writer, FirstLine(one.prompt or "-"), FirstLine(one.answer))
        for one in entries
    ]
    print_result(
        as_json, document, table(("used", "written by", "question", "answer or text"), cells)
    )


def _document(entry: StudyEntry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if name != "prompt" or value}


def _use(entry: StudyEntry) -> str:
    return "held out" if entry.held_out else "trained"


def write(settings: Settings, file: Path, *, as_json: bool) -> None:
    """The committed facts for a writer."""
    from kvedit.facts.forms.study import lines
    from kvedit.files import require_writable, write_atomic

    require_writable(file)
    with common.read_only(settings) as store:
        every = [row.fact for row in store.facts("committed")]
        facts = [fact for fact in every if not fact.relation_of]
        texts = [f"{line}\n" for line in lines(facts, store.config.study)]
    write_atomic(file, "".join(texts).encode())
    document = {"path": str(file), "facts": len(facts), "relations": len(every) - len(facts)}
    left_out = f", without {document['relations']} that are relations, which have no text"
    text = f"wrote {file}: {facts_text(len(facts))}{left_out if document['relations'] else ''}"
    print_result(as_json, document, text)


def take_back(
    settings: Settings, records: Sequence[StudyRecord], *, force: bool, as_json: bool
) -> int:
    """Train what may be kept of what came back, a fact at a time; returns the exit code."""
    try:
        common.require_keys(settings, [record.key for record in records])
    except UnknownKeyError as error:
        hint = f"Take its line out of the file, or correct the key. {error.hint}".rstrip()
        raise UnknownKeyError(error.message, hint=hint) from error
    common.require_writable(settings)
    reporter = make_reporter(quiet=settings.quiet, as_json=as_json)
    reports = []
    watched = common.watched_changes(settings, "study")
    with watched, common.knowledge_base(settings, reporter) as base:
        for record in records:
            report = base.study(record.key, record.texts, of=record.description, force=force)
            reports.append(report)
            _tell(report, as_json=as_json)
    failed = sum(one.edit is not None and one.edit.outcome != "committed" for one in reports)
    trained = [one for one in reports if one.edit is None or one.edit.outcome == "committed"]
    kept = sum(len(one.texts.kept) for one in trained)
    counts = {
        "facts": len(reports),
        "kept": kept,
        "not_learned": sum(len(one.texts.kept) for one in reports) - kept,
        "refused": sum(len(one.texts.refused) for one in reports),
        "rejected": failed,
    }
    code = 3 if failed else 0
    if as_json:
        summary = {"message_type": "summary", "kind": "study", **counts, "exit_code": code}
        print_json_line(summary)
    else:
        print_parts(*_summary(reports, counts))
    return code


def _tell(report: StudyReport, *, as_json: bool) -> None:
    if as_json:
        print_json_line({"message_type": "study", **report.to_json()})
    elif report.edit is not None:
        print_parts(*edit_parts(report.edit))


def _summary(reports: Sequence[StudyReport], counts: dict[str, int]) -> list[Any]:
    """How many were kept, and why others were not."""
    lost = f", {counts['not_learned']} not learned" if counts["not_learned"] else ""
    line = f"{counts['kept']} kept{lost}, {counts['refused']} refused"
    line += f", of {facts_text(counts['facts'])}"
    refused = [(report.key, one) for report in reports for one in report.texts.refused]
    if not refused:
        return [line]
    reasons = Counter(one.why for _, one in refused).most_common()
    cells = [
        (one.why, key, FirstLine(one.text.prompt or one.text.answer))
        for key, one in refused[:SHOWN_REFUSED]
    ]
    more = len(refused) - len(cells)
    rest = [f"... and {more} more; --json lists all"] if more else []
    counted = table(("refused", "because"), [(count, why) for why, count in reasons])
    return [line, "", counted, "", table(("because", "key", "text"), cells), *rest]
