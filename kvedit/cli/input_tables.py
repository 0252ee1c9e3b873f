"""What an input file was taken for, its first rows as they would be taught, keys that count as one.

Pure functions, as in ``tables``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.cli.output import FirstLine, pairs
from kvedit.cli.tables import SHOWN, Parts

if TYPE_CHECKING:
    from kvedit.ingest.preflight import Preflight


def form_fields(preflight: Preflight, phrasings: Path | None) -> dict[str, Any]:
    """What an input was taken for, its first rows as they would be taught, and equal keys."""
    from kvedit.model.prompts import training_prompts

    return {
        "forms": dict(preflight.forms),
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
    from kvedit.model.prompts import training_prompts

    parts: Parts = []
    many = len(preflight.forms) > 1
    for form, count in preflight.forms.items():
        number = "1 row" if count == 1 else f"{count:,} rows"
        parts.append(f"{f'{number} read' if many else 'read'} as {form}")
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
