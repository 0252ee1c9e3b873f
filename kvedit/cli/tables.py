"""What the store and the checks hold, as tables for people and documents for programs.

Pure functions: rows and reports in, lines or plain values out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from kvedit.cli.output import edit_lines, pad, score_text, seconds_text, size_text, table
from kvedit.facts.keys import in_words

if TYPE_CHECKING:
    from kvedit.editing.verify import BaseKnowledgeReport, VerifyReport
    from kvedit.revisions.export_hf import ExportReport
    from kvedit.store.rows import EditRow, FactRow, Finding, ProbeRow

HEALTH_COLOURS = {"recalled": "green", "regressed": "red", "stale": "yellow"}
LEVEL_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}
SHOWN_CHECKS = 50


def coloured(word: str | None, colours: Mapping[str, str]) -> str:
    """The word in its colour, if it has one."""
    text = word or "-"
    return click.style(text, fg=colours[text]) if text in colours else text


def when(time: str | None) -> str:
    """An ISO time to the minute, for a column."""
    return (time or "-").replace("T", " ")[:16]


def margin_text(margin: float | None) -> str:
    """A margin in logits, or a dash."""
    return "-" if margin is None else f"{margin:+.2f}"


def answer_lines(answers: Mapping[str, Any]) -> list[str]:
    """The answer alone, or the base model's answer and this one, named."""
    if answers["before"] is None:
        return [answers["answer"]]
    now = f"revision {answers['revision']}"
    names = [pad(name, len(now)) for name in ("base", now)]
    return [
        f"{click.style(names[0], fg='yellow')}  {answers['before']}",
        f"{click.style(names[1], fg='green')}  {answers['answer']}",
    ]


def result_fields(row: ProbeRow) -> dict[str, Any]:
    """A probe's result as a JSON document."""
    names = ("kind", "protocol", "prompt", "expected", "answer", "passed", "margin", "revision")
    return {**{name: getattr(row, name) for name in names}, "time": row.created_at}


def fact_document(
    row: FactRow, edits: Sequence[EditRow], results: Sequence[ProbeRow]
) -> dict[str, Any]:
    """All about one fact as a JSON document."""
    return {
        **row.to_json(),
        "edits": [edit.to_json() for edit in edits],
        "results": [result_fields(result) for result in results],
    }


def facts_table(rows: Sequence[FactRow]) -> list[str]:
    """One line for each fact."""
    cells = [
        (
            row.fact.key,
            row.state,
            coloured(row.health, HEALTH_COLOURS),
            "-" if row.revision is None else row.revision,
            row.fact.description,
        )
        for row in rows
    ]
    return table(("key", "state", "health", "revision", "description"), cells)


def fact_lines(row: FactRow, edits: Sequence[EditRow], results: Sequence[ProbeRow]) -> list[str]:
    """All about one fact."""
    fact = row.fact
    checked = row.last_checked_revision
    pairs = [
        ("key", fact.key),
        ("aliases", ", ".join(fact.aliases)),
        ("language", fact.lang),
        ("state", row.state + ("" if row.revision is None else f", revision {row.revision}")),
        ("health", coloured(row.health, HEALTH_COLOURS)),
        ("checked", "never" if checked is None else f"at revision {checked}"),
        ("margin", margin_text(row.margin)),
        ("source", fact.source or ""),
    ]
    lines = [f"{label:<9} {value}" for label, value in pairs if value]
    lines += ["", fact.description]
    lines += _section("own prompts", fact.prompts) + _section("own paraphrases", fact.paraphrases)
    if edits:
        lines += ["", *edits_table(edits)]
    return lines + (["", *results_table(results)] if results else [])


def _section(title: str, items: Sequence[str]) -> list[str]:
    return ["", click.style(title, bold=True), *(f"  {item}" for item in items)] if items else []


def results_table(results: Sequence[ProbeRow]) -> list[str]:
    """The latest probes of a fact."""
    cells = [
        (
            row.kind,
            click.style("passed", fg="green") if row.passed else click.style("failed", fg="red"),
            margin_text(row.margin),
            row.protocol,
            row.prompt,
        )
        for row in results
    ]
    return table(("probe", "result", "margin", "protocol", "prompt"), cells)


def edits_table(edits: Sequence[EditRow]) -> list[str]:
    """One line for each edit, with the reasons of those that were refused."""
    cells = [
        (
            "-" if edit.revision is None else edit.revision,
            edit.kind,
            edit.state,
            when(edit.finished_at or edit.started_at),
            in_words(edit.keys) + (f": {'; '.join(edit.reasons)}" if edit.reasons else ""),
        )
        for edit in edits
    ]
    return table(("revision", "kind", "outcome", "time (UTC)", "fact"), cells)


def status_lines(fields: Mapping[str, Any]) -> list[str]:
    """Where the store stands."""
    sizes = fields["bytes"]
    pairs = [
        ("store", fields["path"]),
        ("model", f"{fields['model_name']} ({fields['dtype'] or 'dtype unknown'})"),
        ("fingerprint", (fields["model_fingerprint"] or "-")[:16]),
        ("revision", f"{fields['head']} (head)"),
        ("facts", _counts(fields["facts"])),
        ("health", _counts(fields["health"], HEALTH_COLOURS)),
        ("edits", _counts(fields["edits"])),
        ("last edit", f"{when(fields['last_edit_at'])} UTC" if fields["last_edit_at"] else "never"),
        *_unfinished(fields["unfinished_at"]),
        *_relative_norm(fields["relative_norm"]),
        ("protected", f"{fields['protected']} texts"),
        ("checkpoints", fields["checkpoints"]),
        ("size", ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items())),
    ]
    return [f"{label:<12} {value}" for label, value in pairs]


def _unfinished(kept: str | None) -> list[tuple[str, str]]:
    """A lesson that is being taught, or was broken off."""
    told = f"a lesson, kept {when(kept)} UTC; if nothing runs, the same command goes on with it"
    return [("unfinished", told)] if kept else []


def _relative_norm(moved: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How far the weights are from the base model's."""
    if moved is None:
        return []
    parts = f"{moved['median']:.1%} of the length of a matrix (median of {moved['matrices']})"
    return [("moved", f"{parts}, at most {moved['most']:.1%} ({moved['matrix']})")]


def _counts(counts: Mapping[str, int], colours: Mapping[str, str] | None = None) -> str:
    """Counts by name: '2 committed, 1 pending'."""
    parts = [f"{number} {coloured(name, colours or {})}" for name, number in counts.items()]
    return ", ".join(parts) or "none"


def verify_fields(report: VerifyReport) -> dict[str, Any]:
    """The summary of a verification."""
    return {
        "message_type": "summary",
        "kind": "verify",
        "revision": report.revision,
        "checked": len(report.checks),
        "passed": sum(check.passed for check in report.checks),
        "generated": report.generated.to_json(),
        "teacher_forced": report.score.to_json(),
        "base": None if report.base is None else _base_fields(report.base),
        "repaired": sum(edit.outcome == "committed" for edit in report.repaired),
        "seconds": round(report.seconds, 3),
    }


def _base_fields(base: BaseKnowledgeReport) -> dict[str, Any]:
    return {
        "generated": base.generated.to_json(),
        "teacher_forced": base.score.to_json(),
        "lost": list(base.lost),
        "fluency": base.fluency,
        "base_fluency": base.base_fluency,
    }


def verify_lines(report: VerifyReport, *, verbose: bool = False) -> list[str]:
    """What a verification found: the facts that were lost first, then the scores."""
    lost = [check for check in report.checks if not check.passed]
    shown = report.checks if verbose else lost[:SHOWN_CHECKS]
    lines = []
    if shown:
        cells = [(_result(one.passed), margin_text(one.margin), one.key) for one in shown]
        lines += [*table(("result", "margin", "key"), cells), ""]
    if not verbose and len(lost) > len(shown):
        lines.append(f"... and {len(lost) - len(shown)} more; --json lists all")
    for edit in report.repaired:
        lines += edit_lines(edit)
    if not report.checks and report.base is None:
        return [*lines, "no committed facts to check"]
    if report.base is not None:
        lines += _lost_base_lines(report.base, verbose=verbose)
    lines.append(f"revision {report.revision}, {seconds_text(report.seconds)}")
    for score in (report.generated, report.score):
        if score.n:
            lines.append(f"  facts recalled (ERR)       {score_text(score)}")
    for score in (report.base.generated, report.base.score) if report.base else ():
        if score.n:
            lines.append(f"  base knowledge kept (TRR)  {score_text(score)}")
    return lines + (_fluency_lines(report.base) if report.base else [])


def _fluency_lines(base: BaseKnowledgeReport) -> list[str]:
    """How varied the answers are, beside the base model's."""
    if base.fluency is None or base.base_fluency is None:
        return []
    own = f"{base.fluency:.2f} bits  (the base model's: {base.base_fluency:.2f})"
    return [f"  fluency of these answers   {own}"]


def _lost_base_lines(base: BaseKnowledgeReport, *, verbose: bool) -> list[str]:
    """Questions that the base model could answer, and that are answered otherwise now."""
    shown = base.lost if verbose else base.lost[:SHOWN_CHECKS]
    if not shown:
        return []
    lines = ["answered otherwise than by the base model:", *(f"  {one}" for one in shown)]
    left = len(base.lost) - len(shown)
    return [*lines, *([f"  ... and {left} more; --json lists all"] if left else []), ""]


def _result(passed: bool) -> str:
    return click.style("recalled", fg="green") if passed else click.style("lost", fg="red")


def finding_fields(finding: Finding) -> dict[str, str]:
    """A finding as a JSON document."""
    return {"level": finding.level, "what": finding.what, "hint": finding.hint}


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """One line for each finding, its hint below, and a verdict."""
    lines = []
    for finding in findings:
        level = coloured(finding.level, LEVEL_COLOURS)
        lines.append(f"{pad(level, 8)} {finding.what}")
        if finding.hint and finding.level != "ok":
            lines.append(f"{'':8} {finding.hint}")
    counts = {level: sum(one.level == level for one in findings) for level in LEVEL_COLOURS}
    if not counts["error"] and not counts["warning"]:
        return [*lines, click.style("all is well", fg="green")]
    return [*lines, f"{counts['error']} error(s), {counts['warning']} warning(s)"]


def export_fields(report: ExportReport) -> dict[str, Any]:
    """An export as a JSON document."""
    return {
        "path": str(report.path),
        "revision": report.revision,
        "probes": report.probes.to_json(),
        "mismatches": list(report.mismatches),
        "rank": report.rank,
        "error": report.error,
    }


def export_lines(report: ExportReport) -> list[str]:
    """Where the model went and whether it answers as it should."""
    lines = [f"exported revision {report.revision} to {report.path}"]
    if report.rank is not None:
        lines.append(f"  adapter       rank {report.rank}, leaves out {report.error:.2%}")
    if report.probes.n:
        lines.append(f"  same answers  {score_text(report.probes)}")
    return [*lines, *(f"  differs: {prompt}" for prompt in report.mismatches[:SHOWN_CHECKS])]
