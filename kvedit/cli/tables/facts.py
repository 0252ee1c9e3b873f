"""What a store holds and what its checks found: tables for people, documents for programs.

Pure functions: rows and reports in, parts for `output.print_parts` or plain values out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvedit.cli import output
from kvedit.cli.output import FirstLine, clean, pairs, styled, table
from kvedit.facts.keys import in_words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kvedit.events import Score
    from kvedit.store.rows import EditRow, FactRow, Finding, ProbeRow

Parts = list["RenderableType"]
SHOWN = 20
UNFINISHED = "if it was interrupted, repeat the command"
HALF_MADE = "kvedit init was interrupted; the same command again goes on"
CHANGE = (
    "{median:.1%} of the norm of a matrix (median of {matrices}), at most {most:.1%} ({matrix})"
)
"""How far the weights are from the base model's, relative to their Frobenius norms."""
SCORES = {
    "recites": (("recall", "retention"), "trained phrasings"),
    "generalizes": (("paraphrase",), "unseen phrasings"),
    "answers": (("portability",), "questions about it"),
}
"""What is known of a fact, the kinds of its probes, and what these ask."""


def when(time: str | None) -> str:
    """An ISO time to the minute, for a column."""
    return (time or "-").replace("T", " ")[:16]


def margin_text(margin: float | None) -> str:
    """A margin in logits, or a dash."""
    return "-" if margin is None else f"{margin:+.2f}"


def _margin_field(margin: float | None) -> str:
    return margin_text(margin) + ("" if margin is None else ", the lowest of its trained phrasings")


def first_of(items: Sequence[str], shown: int = SHOWN) -> list[str]:
    """The first items, and how many more there are."""
    more = len(items) - shown
    return [*items[:shown], *([f"... and {more} more; --json lists all"] if more > 0 else [])]


def counts_text(counts: Mapping[str, int]) -> str:
    """Counts by name: '2 committed, 1 pending'."""
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"


def fact_document(row: FactRow, edits: Sequence[EditRow],
                  results: Sequence[ProbeRow]) -> dict[str, Any]:  # fmt: skip
    """All about one fact as a JSON document, with the latest of its results."""
    names = ("kind", "protocol", "prompt", "expected", "answer", "passed", "margin", "revision")
    probes = [
        {**{name: getattr(one, name) for name in names}, "time": one.created_at}
        for one in results[:SHOWN]
    ]
    scores = {
        name: {**score.to_json(), "revision": revision}
        for name, (score, revision) in latest_scores(_of_state(row, results)).items()
    }
    edited = [edit.to_json() for edit in edits]
    return {**row.to_json(), **scores, "edits": edited, "results": probes}


def _of_state(row: FactRow, results: Sequence[ProbeRow]) -> Sequence[ProbeRow]:
    """The results that say what the model holds: those of a removal say what it no longer does."""
    return () if row.state == "removed" else results


def latest_scores(results: Sequence[ProbeRow]) -> dict[str, tuple[Score, int | None]]:
    """What a fact ``recites``, ``generalizes`` to and ``answers``: each of its phrasings and
    questions once, at the newest revision that has any, and this revision; results come newest
    first.
    """
    from kvedit.events import Score

    scores = {}
    for name, (kinds, _) in SCORES.items():
        rows = [one for one in results if one.kind in kinds and one.revision is not None]
        revision = rows[0].revision if rows else None
        at_newest = [one for one in rows if one.revision == revision]
        latest = {one.prompt: one.passed for one in reversed(at_newest)}
        protocol = "generated" if name == "answers" else "teacher-forced"
        scores[name] = Score(sum(latest.values()), len(latest), protocol), revision
    return scores


def _score_fields(results: Sequence[ProbeRow]) -> list[tuple[str, str]]:
    """The scores that a fact has, each with what was asked, and when."""
    return [
        (name, f"{SCORES[name][1]} at revision {revision}: {output.score_text(score)}")
        for name, (score, revision) in latest_scores(results).items()
        if score.n
    ]


def facts_table(rows: Sequence[FactRow]) -> Table:
    """One line for each fact."""
    cells = [
        (r.fact.key, r.state, styled(r.health), styled(r.revision), FirstLine(r.fact.description))
        for r in rows
    ]
    return table(("key", "state", "health", "revision", "description"), cells)


def fact_parts(row: FactRow, edits: Sequence[EditRow], results: Sequence[ProbeRow]) -> Parts:
    """All about one fact."""
    fact, checked = row.fact, row.last_checked_revision
    fields = [
        ("key", fact.key),
        ("aliases", ", ".join(fact.aliases)),
        ("relation of", fact.relation_of or ""),
        ("language", fact.lang),
        ("state", row.state + ("" if row.revision is None else f", revision {row.revision}")),
        ("health", styled(row.health)),
        ("checked", "never" if checked is None else f"at revision {checked}"),
        ("margin", _margin_field(row.margin)),
        *_score_fields(_of_state(row, results)),
        ("source", fact.source or ""),
    ]
    parts: Parts = [pairs([field for field in fields if field[1]]), "", styled(fact.description)]
    questions = [
        f"{one.prompt} - {one.answer}{' (never trained)' * one.probe}" for one in fact.all_questions
    ]
    of_its_own = {
        "prompts": fact.prompts, "paraphrases": fact.paraphrases, "questions": questions,
        "statements": fact.all_statements,
    }  # fmt: skip
    for title, lines in of_its_own.items():
        if lines:
            shown = (f"  {clean(one)}" for one in lines)
            parts += ["", styled(f"{title} of its own", "bold"), *shown]
    if edits:
        parts += ["", edits_table(edits)]
    if results:
        cells = [
            (styled(one.revision), one.kind, styled("passed" if one.passed else "failed"),
             margin_text(one.margin), one.protocol, one.prompt)
            for one in results[:SHOWN]
        ]  # fmt: skip
        names = ("revision", "probe", "result", "margin", "protocol", "prompt")
        parts += ["", table(names, cells)]
        if len(results) > SHOWN:
            parts.append(f"... and {len(results) - SHOWN} earlier ones")
    return parts


def edits_table(edits: Sequence[EditRow]) -> Table:
    """One row for each edit, with the reasons of those that were refused."""
    cells = [
        (styled(edit.revision), edit.kind, styled(edit.state),
         when(edit.finished_at or edit.started_at), _subject(edit))
        for edit in edits
    ]  # fmt: skip
    return table(("revision", "kind", "outcome", "time (UTC)", "fact"), cells)


def _subject(edit: EditRow) -> str:
    """What an edit was about, why it was refused, and whether its revision is still there."""
    key = str(edit.report.get("key") or "")  # of an erase: how many facts
    named = key if edit.kind == "erase" else in_words(edit.keys) or key
    if edit.kind == "rollback":
        named = f"{key}: {in_words(edit.keys)}" if edit.keys else key
    gone = f"(can no longer be restored: {edit.gone})" if edit.gone else ""
    texts = filter(None, (named, "; ".join(edit.reasons)))
    return " ".join(filter(None, (": ".join(texts), gone)))


def status_table(fields: Mapping[str, Any]) -> RenderableType:
    """Where the store stands."""
    last, unfinished, norm = map(fields.get, ("last_edit_at", "unfinished_at", "relative_norm"))
    gone = counts_text(fields["gone"])
    rows = [
        ("store", fields["path"]),
        ("model", f"{fields['model_name']} ({fields['dtype'] or 'dtype unknown'})"),
        ("fingerprint", (fields["model_fingerprint"] or "-")[:16]),
        ("half made", HALF_MADE if fields["half_made"] else None),
        ("revision", f"{fields['head']} (head)"),
        ("gone", fields["gone"] and f"revisions that can no longer be restored: {gone}"),
        ("facts", counts_text(fields["facts"])),
        ("health", counts_text(fields["health"])),
        ("edits", counts_text(fields["edits"])),
        ("last edit", f"{when(last)} UTC" if last else "never"),
        ("unfinished", unfinished and f"training, saved {when(unfinished)} UTC; {UNFINISHED}"),
        ("change", norm and CHANGE.format(**norm)),
        (
            "protected",
            f"{fields['protected']} texts, {fields['locality_probes']} of them locality probes",
        ),
        ("locality", fields["few_probes"] or None),
        ("checkpoints", fields["checkpoints"]),
        ("size", ", ".join(f"{name} {output.size_text(n)}" for name, n in fields["bytes"].items())),
    ]
    return pairs([row for row in rows if row[1] is not None and row[1] != {}])


def finding_parts(findings: Sequence[Finding]) -> Parts:
    """One row for each finding, its hint below, and a verdict."""
    rows = []
    for finding in findings:
        rows.append((styled(finding.level), finding.what))
        if finding.hint and finding.level != "ok":
            rows.append((styled(""), finding.hint))
    errors, warnings = (sum(f.level == name for f in findings) for name in ("error", "warning"))
    verdict = styled(f"{errors} error(s), {warnings} warning(s)", "")
    if not errors and not warnings:
        verdict = styled("no problems", "green")
    return [pairs(rows), verdict] if rows else [verdict]
