"""What an ingest reads, plans and came to: the form of the input, its first rows as they would be
taught, keys that count as one, outcomes.

Pure functions, as in ``facts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.cli import output
from kvedit.cli.output import FirstLine, clean, pairs, seconds_text, styled
from kvedit.cli.tables.facts import SHOWN, Parts, counts_text, first_of

if TYPE_CHECKING:
    from kvedit.ingest.preflight import NearKeys, Preflight, Problem
    from kvedit.ingest.report import IngestReport

SHOWN_SIMILAR, SHOWN_NAMES = 3, 12
STOPPED = {
    "limit": "stopped at --limit",
    "failures": "stopped at --max-failures",
    "time": "stopped at --max-time",
    "errors": "stopped: many facts in a row failed, so the cause is not in the facts themselves",
    "interrupted": "interrupted: the running edit was discarded, all earlier ones are committed",
    "error": "stopped by an error: the running edit was discarded, all earlier ones are committed",
}
PREFLIGHT = {
    "new": "new",
    "unchanged": "in the store already",
    "repeated": "repeated",
    "rejected_before": "rejected before",
    "held_back": "held back (placeholders; --allow-placeholders trains them)",
    "invalid": "invalid",
}


def form_fields(preflight: Preflight, phrasings: Path | None) -> dict[str, Any]:
    """What an input was taken for, its first rows as they would be taught, and equal keys."""
    from kvedit.facts.phrasings import training_prompts

    return {
        "forms": dict(preflight.forms), "not_read": list(preflight.unread),
        "first_rows": [
            {"key": one.fact.key, "prompts": list(training_prompts(one.fact, phrasings)),
             "answer": one.fact.description, "where": one.where,
             "probes": [one.prompt for one in one.fact.questions if one.probe]}
            for one in preflight.first_rows
        ],
        "same": [{"key": one.key, "other": one.other} for one in preflight.same],
        "same_pairs": preflight.same_count,
    }  # fmt: skip


def form_parts(preflight: Preflight, phrasings: Path | None) -> Parts:
    """The same for a person."""
    from kvedit.facts.keys import in_words
    from kvedit.facts.phrasings import training_prompts

    parts: Parts = []
    many = len(preflight.forms) > 1
    for form, count in preflight.forms.items():
        number = "1 row" if count == 1 else f"{count:,} rows"
        parts.append(f"{f'{number} read' if many else 'read'} as {form}")
    if preflight.unread:
        names = [name or "a column without a name" for name in preflight.unread]
        parts.append(f"not read: {in_words(names, most=SHOWN_NAMES)}")
    for one in preflight.first_rows:
        prompt, *more = training_prompts(one.fact, phrasings)
        asked = f"{prompt}  (and {len(more)} more phrasings)" if more else prompt
        rows = [("asked", FirstLine(asked)), ("answer", FirstLine(one.fact.description))]
        probes = [question.prompt for question in one.fact.questions if question.probe]
        if probes:
            number = f"  (and {len(probes) - 1} more, never trained)" if probes[1:] else ""
            rows.append(("probe", FirstLine(f"{probes[0]}{number or '  (never trained)'}")))
        parts.append(pairs(rows, 2))
    return [*parts, same_keys_text(preflight)] if preflight.same_count else parts


def same_keys_text(preflight: Preflight) -> str:
    """'2 pairs of keys count as one: C and c, A-1 and A1'."""
    named = [f"{one.key} and {one.other}" for one in preflight.same[:SHOWN]]
    count = "2 keys" if preflight.same_count == 1 else f"{preflight.same_count:,} pairs of keys"
    rest = ", ..." if preflight.same_count > SHOWN else ""
    return f"{count} count as one: {', '.join(named)}{rest}"


def problem_lines(problems: Sequence[Problem], what: str = "invalid row") -> list[str]:
    """The rows that cannot be ingested, the first ones by name."""
    return first_of([f"{what}: {clean(f'{one.where}: {one.reason}')}" for one in problems])


def similar_keys_text(near: NearKeys) -> str:
    """'12 pairs of keys are similar: A and B (91), ...'."""
    named = [f"{n.key} and {n.other} ({n.score:.0f})" for n in near.closest[:SHOWN_SIMILAR]]
    count = "2 keys are" if near.count == 1 else f"{near.count:,} pairs of keys are"
    count = count if near.complete else f"at least {count}"
    rest = ", ..." if near.count > SHOWN_SIMILAR else ""
    return f"{count} similar: {', '.join(named)}{rest}"


def preflight_fields(preflight: Preflight) -> dict[str, int]:
    """How the rows of an input were sorted."""
    sorted_rows = (
        preflight.new, preflight.unchanged, preflight.repeated, preflight.rejected_before,
        preflight.held_back, preflight.problems,
    )  # fmt: skip
    return {"read": preflight.read, **dict(zip(PREFLIGHT, map(len, sorted_rows), strict=True))}


def preflight_line(preflight: Preflight) -> str:
    """The same in words; what there is none of is left out."""
    fields = preflight_fields(preflight)
    counts = {text: fields[name] for name, text in PREFLIGHT.items() if fields[name]}
    if not counts:
        return "the input has no rows"
    rows = "1 row" if preflight.read == 1 else f"{preflight.read} rows"
    return f"{rows}: {', '.join(f'{number} {text}' for text, number in counts.items())}"


def ingest_fields(preflight: Preflight, report: IngestReport) -> dict[str, Any]:
    """The summary of a run."""
    counts = _outcome_counts(report)
    tried = sum(counts.values())
    return {
        "message_type": "summary", "kind": "ingest", "dry_run": False,
        "revision": report.revision, **preflight_fields(preflight), **counts,
        "invalid": len(preflight.problems) + report.count("invalid"),
        "rejected_before": len(report.rejected_before), "remaining": report.remaining,
        "stopped": report.stopped or None, "error": str(report.error) if report.error else None,
        "retention": report.retention.to_json(), "lost": list(report.lost),
        "repaired": sum(edit.outcome == "committed" for edit in report.repaired),
        "seconds": round(report.seconds, 3),
        "seconds_per_fact": round(report.seconds / tried, 3) if tried else None,
    }  # fmt: skip


def _outcome_counts(report: IngestReport) -> dict[str, int]:
    return {name: report.count(name) for name in ("committed", "rejected", "failed")}


def ingest_parts(preflight: Preflight, report: IngestReport) -> Parts:
    """The end of a run: counts, what is still recalled, refusals with reasons, time."""
    parts: Parts = [preflight_line(preflight), _outcome_line(report)]
    rows: list[tuple[object, object]] = []
    if report.retention.n:
        score = output.score_text(report.retention)
        rows.append(("retention", f"{score} of the facts that were asked again at the end"))
    rows += [(styled("lost"), key) for key in report.lost[:SHOWN]]
    refused = [one for one in report.outcomes if one.outcome != "committed"]
    for one in [*refused, *report.rejected_before][:SHOWN]:
        reasons = "; ".join(one.reasons) or "reason unknown"
        rows.append((styled(one.outcome), f"{one.fact.key}: {reasons}"))
    parts += [pairs(rows, 2)] if rows else []
    if report.stopped:
        parts.append(f"{STOPPED[report.stopped]}; {report.remaining} left")
    return parts


def _outcome_line(report: IngestReport) -> str:
    counts = _outcome_counts(report)
    if not any(counts.values()):
        return f"nothing was trained: revision {report.revision}"
    refused = {name: n for name, n in counts.items() if n or name == "committed"}
    each = seconds_text(report.seconds / sum(counts.values()))
    time = f"{seconds_text(report.seconds)} ({each} a fact)"
    return f"{counts_text(refused)}: revision {report.revision}, {time}"


def plan_fields(preflight: Preflight, near: NearKeys, pace: tuple[int, float], new: int,
                retrained: int) -> dict[str, Any]:  # fmt: skip
    """What a run would do: train ``new`` facts, the first group together with ``retrained`` earlier
    ones; ``pace`` is facts and seconds measured in this store, without any there is no estimate.
    """
    each = pace[1] / pace[0] if pace[0] else None
    return {
        "message_type": "summary", "kind": "ingest", "dry_run": True,
        **preflight_fields(preflight), "would_train": new, "would_retrain": retrained,
        "similar": [{"key": n.key, "other": n.other, "score": n.score} for n in near.closest],
        "similar_pairs": near.count, "all_keys_compared": near.complete,
        "seconds_per_fact": None if each is None else round(each, 3),
        "seconds_estimated": None if each is None else round(each * (new + retrained), 1),
    }  # fmt: skip


def plan_parts(preflight: Preflight, near: NearKeys, fields: dict[str, Any]) -> Parts:
    """What a run would do, for a person."""
    each, total = fields["seconds_per_fact"], fields["seconds_estimated"]
    if not fields["would_train"]:
        time = "nothing to do"
    elif each is None:
        time = "no estimate of the time, because no fact was trained in this store yet"
    else:
        time = f"about {seconds_text(total)}, at {seconds_text(each)} a fact as measured here"
    retrained = fields["would_retrain"]
    ones = "one" if retrained == 1 else "ones"
    earlier = f", and {retrained} earlier {ones} again with them" if retrained else ""
    similar = [similar_keys_text(near)] if near.count else []
    new = fields["would_train"]
    facts = "1 new fact" if new == 1 else f"{new} new facts"
    plan = f"would train {facts}{earlier}: {time}"
    if fields["would_stop"]:
        plan = f"would stop before the first edit, for the invalid rows; without them it {plan}"
    return [preflight_line(preflight), *similar, plan, "nothing was changed"]
