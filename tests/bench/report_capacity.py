"""The results of ``bench capacity`` as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from kvedit.bench.tables import BRACKETS, Table, counts_cell
from kvedit.facts.keys import in_words
from tests.bench.capacity import Capacity, CapacityResult, FactRecord, difference, first_lost
from tests.bench.report import points_tables

NAMED = 12
_ASPECTS: tuple[tuple[str, Callable[[FactRecord], float | None]], ...] = (
    ("similarity of the closest other key, 0 to 100", lambda record: record.nearest),
    ("tokens of the answer", lambda record: record.tokens),
    ("bits of the answer", lambda record: record.bits),
    ("smallest margin when committed, logits", lambda record: record.margin),
)

_NOTES = (
    "A fact's bits: negative log2 likelihood of its answer, the end token included, under the base"
    " model, the mean over its training phrasings. Stored: the bits of the facts recalled under all"
    " training phrasings at the end, by generation and teacher-forced. The largest N is the last"
    " mark before the share of all facts given, refused ones too, that is recalled falls below 95%"
    " under either protocol; before the last mark, generation asks one phrasing of each fact. Lost:"
    f" committed and not recalled at the end. {BRACKETS} Differences: bootstrap 95% intervals."
)


def notes(result: CapacityResult) -> str:
    """What the tables do not say."""
    return _NOTES


def tables(result: CapacityResult) -> list[Table]:
    """All models beside each other, then each by itself."""
    shown = [_summary(result.models)]
    for one in result.models:
        shown += [
            *points_tables(one.points, f": {one.model}"),
            _aspects(one),
            _lost(one),
        ]
    return shown


def _summary(models: Sequence[Capacity]) -> Table:
    rows = [
        (
            one.model,
            f"{one.parameters:,}",
            f"{one.touched:,}",
            f"{one.largest}" if one.fell else f"{one.largest} or more",
            f"{sum(record.held for record in one.facts)} of {len(one.facts)}",
            f"{one.stored_bits:,.0f}",
            f"{one.bits_per_touched:.2g}",
            f"{one.bits_per_parameter:.2g}",
            counts_cell(one.run.outcomes),
        )
        for one in models
    ]
    columns = (
        "model", "parameters", "touched", "largest N with 95% held", "held at the end",
        "bits stored", "a touched parameter", "a parameter", "outcomes",
    )  # fmt: skip
    return Table("Capacity", columns, tuple(rows))


def _aspects(one: Capacity) -> Table:
    """Held, lost and never committed facts beside each other."""
    held = [record for record in one.facts if record.held and record.outcome == "committed"]
    lost = [record for record in one.facts if not record.held and record.outcome == "committed"]
    never = [record for record in one.facts if record.outcome != "committed"]
    rows = []
    for name, value in _ASPECTS:
        groups = [_values(records, value) for records in (held, lost, never)]
        rows.append((name, *map(_mean, groups), _difference(groups[1], groups[0])))
    columns = (
        "mean", f"held ({len(held)})", f"lost ({len(lost)})", f"not committed ({len(never)})",
        "lost less held",
    )  # fmt: skip
    return Table(f"What lost facts are like: {one.model}", columns, tuple(rows))


def _values(
    records: Sequence[FactRecord], value: Callable[[FactRecord], float | None]
) -> list[float]:
    return [number for record in records if (number := value(record)) is not None]


def _mean(values: Sequence[float]) -> str:
    return f"{mean(values):.2f}" if values else "-"


def _difference(one: Sequence[float], other: Sequence[float]) -> str:
    gap = difference(one, other)
    return "-" if gap is None else f"{gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"


def _lost(one: Capacity) -> Table:
    rows = []
    for mark, keys in first_lost(one.facts).items():
        rows.append((str(mark), str(len(keys)), in_words(keys, NAMED)))
    columns = ("not recalled from this mark on", "how many", "which")
    return Table(f"Which facts went first: {one.model}", columns, tuple(rows))
