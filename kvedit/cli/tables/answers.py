"""Answers for people: what they stood on, where they come from, how two revisions differ.

Pure functions: what `kvedit.asking` returns in, parts for `output.print_parts` or lines out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvedit.cli.output import FirstLine, clean, pairs, styled, table
from kvedit.cli.tables.facts import Parts, when
from kvedit.facts.keys import in_words

if TYPE_CHECKING:
    from kvedit.asking.diff import RevisionDiff
    from kvedit.asking.explain import Change, Explanation, NearFact
    from kvedit.asking.questions import Answer
    from kvedit.asking.recall import Recalled

ORIGINS = {"model": "the model's recitation", "store": "the store's text"}
CHANGE_COLOURS = {"added": "green", "updated": "yellow", "removed": "red", "none": "cyan"}


def source_lines(found: Answer | Recalled) -> Iterator[str]:
    """The facts that an answer stands on, one a line, and those that did not fit."""
    for one in found.sources:
        spelt = "" if one.score == 100 else f", spelt nearly so ({one.score:.0f})"
        differs = "" if one.exact else "; the store has another text"
        yield clean(f"recalled {one.key} ({ORIGINS[one.origin]}{spelt}{differs}): {one.text}")
    for key in found.recited:
        yield clean(f"no text of {key} is put before the question: it is one of its own phrasings")
    for key in found.left_out:
        yield clean(f"not recalled {key}: its text does not fit into the model's context")
    if not (found.sources or found.recited or found.left_out):
        yield "recalled nothing: the question names no fact"


def explanation_parts(explanation: Explanation) -> Parts:
    """The answer, the edits that changed it, and the facts near it."""
    rows: list[tuple[object, object]] = [
        (f"revision {explanation.revision}", explanation.answer),
        ("base model", explanation.base_answer),
    ]
    parts: Parts = [pairs(rows)]
    if not explanation.changes:
        parts += ["", "no edit changed this answer: the base model says the same"]
    for change in explanation.changes:
        answers = (change.before, change.answer_before), (change.revision, change.answer_after)
        parts += ["", f"changed at revision {change.revision}: {_edit_text(change)}"]
        parts.append(pairs([(f"revision {number}", text) for number, text in answers], 2))
    if explanation.facts:
        cells = [
            (styled(fact.key, "bold"), _why(fact), styled(fact.state), FirstLine(fact.description))
            for fact in explanation.facts
        ]
        parts += ["", table(("nearest facts", "because", "state", "description"), cells)]
    return parts


def _edit_text(change: Change) -> str:
    return clean(f"{change.kind} {in_words(change.keys)}, {when(change.finished_at)} UTC")


def _why(fact: NearFact) -> str:
    """Why a fact is listed."""
    reasons = []
    if fact.named:
        reasons.append("named" if fact.named == 100 else f"named nearly so ({fact.named:.0f})")
    if fact.edited:
        reasons.append("edited there")
    return ", ".join(reasons) or f"shares words ({fact.nearness:.2f})"


def diff_parts(difference: RevisionDiff) -> Parts:
    """The facts that differ, with both answers, and how many were asked."""
    parts: Parts = []
    for fact in difference.facts:
        text = "answered otherwise, not edited" if fact.change == "none" else fact.change
        head = styled(f"{text}: ", CHANGE_COLOURS[fact.change])
        parts.append(head.append(clean(fact.key), style="bold"))
        sides = (difference.before, fact.answer_before, fact.before), (
            difference.after, fact.answer_after, fact.after)  # fmt: skip
        asked = [("asked", fact.prompt)] if fact.prompt else []
        rows = [(f"revision {number}", said if said is not None else text or "-")
                for number, said, text in sides]  # fmt: skip
        parts.append(pairs([*asked, *rows], 2))
    return [*parts, _summary(difference)]


def _summary(difference: RevisionDiff) -> str:
    edited = sum(fact.change != "none" for fact in difference.facts)
    differ = "1 fact differs" if edited == 1 else f"{edited} facts differ"
    other = len(difference.facts) - edited
    more = f", {other} more answered otherwise" if other else ""
    asked = f"{difference.asked} asked at both revisions" if difference.asked else "none was asked"
    return f"{differ}{more}; {asked}"
