"""Inputs of many facts and runs over them, as text for people and documents for programs.

Pure functions: results in, lines or plain values out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from kvedit.cli.output import score_text, seconds_text

if TYPE_CHECKING:
    from kvedit.ingest.preflight import Near, Preflight, Problem
    from kvedit.ingest.run import IngestReport

SHOWN = 20
SHOWN_NEAR = 3
STOPPED = {
    "limit": "stopped at --limit",
    "failures": "stopped at --max-failures",
    "time": "stopped at --max-time",
    "errors": "stopped: one fact after the other failed, so the trouble is not with the facts",
    "interrupted": "interrupted: the edit in flight did not happen, all before it is committed",
}


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """The rows that cannot go in, the first ones by name."""
    named = problems[:SHOWN]
    lines = [f"{click.style('bad row:', fg='yellow')} {one.where}: {one.reason}" for one in named]
    more = len(problems) - len(lines)
    return [*lines, f"... and {more} more; --json lists all"] if more else lines


def near_text(near: Sequence[Near]) -> str:
    """'12 pairs of keys are much alike: A and B (91), ...'."""
    named = [f"{one.key} and {one.other} ({one.score:.0f})" for one in near[:SHOWN_NEAR]]
    count = "2 keys are" if len(near) == 1 else f"{len(near)} pairs of keys are"
    rest = ", ..." if len(near) > SHOWN_NEAR else ""
    return f"{count} much alike: {', '.join(named)}{rest}"


def intake_fields(preflight: Preflight) -> dict[str, int]:
    """How the rows of an input were sorted."""
    return {
        "read": preflight.read,
        "new": len(preflight.new),
        "unchanged": len(preflight.unchanged),
        "repeated": len(preflight.repeated),
        "rejected_before": len(preflight.rejected_before),
        "invalid": len(preflight.problems),
    }


def intake_line(preflight: Preflight) -> str:
    """The same in words; what there is none of is left out."""
    words = {
        "new": "to teach",
        "unchanged": "in the store already",
        "repeated": "repeated",
        "rejected_before": "rejected before",
        "invalid": "cannot go in",
    }
    fields = intake_fields(preflight)
    parts = [f"{fields[name]} {text}" for name, text in words.items() if fields[name]]
    rows = "1 row" if preflight.read == 1 else f"{preflight.read} rows"
    return f"{rows}: {', '.join(parts)}"


def ingest_fields(preflight: Preflight, report: IngestReport) -> dict[str, Any]:
    """The summary of a run."""
    counts = {name: report.count(name) for name in ("committed", "rejected", "failed")}
    tried = sum(counts.values())
    return {
        "message_type": "summary",
        "kind": "ingest",
        "dry_run": False,
        "revision": report.revision,
        **intake_fields(preflight),
        **counts,
        "invalid": len(preflight.problems) + report.count("invalid"),
        "rejected_before": len(report.rejected_before),
        "remaining": report.remaining,
        "stopped": report.stopped or None,
        "retention": report.retention.to_json(),
        "lost": list(report.lost),
        "repaired": sum(edit.outcome == "committed" for edit in report.repaired),
        "seconds": round(report.seconds, 3),
        "seconds_per_fact": round(report.seconds / tried, 3) if tried else None,
    }


def ingest_lines(preflight: Preflight, report: IngestReport) -> list[str]:
    """The end of a run for a human: counts, what still holds, refusals with reasons, time."""
    lines = [intake_line(preflight), _counts(report)]
    if report.retention.n:
        lines.append(f"  retention   {score_text(report.retention)}  facts asked again")
    lines += [f"  {click.style('lost', fg='red')} {key}" for key in report.lost[:SHOWN]]
    refused = [one for one in report.outcomes if one.outcome != "committed"]
    for one in [*refused, *report.rejected_before][:SHOWN]:
        why = "; ".join(one.reasons) or "reason unknown"
        lines.append(f"  {click.style(one.outcome, fg='red')} {one.fact.key}: {why}")
    if report.stopped:
        lines.append(f"{STOPPED[report.stopped]}; {report.remaining} left")
    return lines


def _counts(report: IngestReport) -> str:
    counts = {name: report.count(name) for name in ("committed", "rejected", "failed")}
    if not any(counts.values()):
        return f"nothing was taught: revision {report.revision}"
    parts = [f"{counts['committed']} committed"]
    parts += [f"{counts[name]} {name}" for name in ("rejected", "failed") if counts[name]]
    text = f"{click.style(', '.join(parts), bold=True)}: revision {report.revision}"
    each = seconds_text(report.seconds / sum(counts.values()))
    return f"{text}, {seconds_text(report.seconds)} ({each} a fact)"


def plan_fields(
    preflight: Preflight,
    near: Sequence[Near],
    pace: tuple[int, float],
    would: int,
    compaction: int,
) -> dict[str, Any]:
    """What a run would do: teach so many facts, and with the first group ``compaction`` that are held;
    ``pace`` is facts and seconds measured, none measured no estimate.
    """
    each = pace[1] / pace[0] if pace[0] else None
    return {
        "message_type": "summary",
        "kind": "ingest",
        "dry_run": True,
        **intake_fields(preflight),
        "would_teach": would,
        "would_teach_anew": compaction,
        "similar": [{"key": n.key, "other": n.other, "score": n.score} for n in near],
        "seconds_per_fact": None if each is None else round(each, 3),
        "seconds_estimated": None if each is None else round(each * (would + compaction), 1),
    }


def plan_lines(preflight: Preflight, near: Sequence[Near], fields: dict[str, Any]) -> list[str]:
    """What a run would do, for a human."""
    lines = [intake_line(preflight)]
    lines += [near_text(near)] if near else []
    each, total = fields["seconds_per_fact"], fields["seconds_estimated"]
    if not fields["would_teach"]:
        time = "nothing to do"
    elif each is None:
        time = "no estimate of the time: no fact was taught in this store yet"
    else:
        time = f"about {seconds_text(total)}, at {seconds_text(each)} a fact as measured here"
    compaction = fields["would_teach_anew"]
    beside = (
        f", and once more {compaction} that {'is' if compaction == 1 else 'are'} held"
        if compaction
        else ""
    )
    lines.append(f"would teach {fields['would_teach']}{beside}: {time}")
    return [*lines, "nothing was changed"]
