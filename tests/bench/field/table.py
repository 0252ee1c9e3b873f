"""What ``field`` measured: one table of all methods, those it is made of, and a line a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvedit.bench.memory import GIB
from kvedit.bench.tables import BRACKETS, Table, counts_cell, number_cell, score_cell
from tests.bench.field.run import Cost, FieldResult, Row
from tests.bench.field.scores import DEFINITIONS, Mean, Point
from tests.bench.quality_scores import Change

Cell = Callable[[Point], str]
HEAD = ("method", "way", "changes", "edits")


def line(row: Row) -> str:
    """One method in one line, by free generation."""
    last = row.points[-1]
    shares = (
        (name, getattr(last, name)) for name in ("reliability", "generalization", "locality", "trr")
    )
    parts = [f"{DEFINITIONS[name].title} {score.passed}/{score.n}" for name, score in shares]
    parts.append(f"{number_cell(_seconds(row))} s an edit")
    return f"{row.method} ({row.way}), {last.after} edits: {', '.join(parts)}"


def tables(result: FieldResult) -> list[Table]:
    """The one table, the scores of the other protocols, and what was expected."""
    made = [_whole(result)] if result.rows else []
    made += [
        _scores(result, "In the course of the edits", ("reliability", "err", "trr", "harmonic"),
                every=True),
        _scores(result, "By likelihood, length-normalised", ("es", "ps", "ns", "s")),
        _scores(result, "Teacher-forced, token by token",
                ("token_reliability", "token_generalization", "token_locality")),
        _scores(result, "Of what is generated, besides", ("portability", "rouge_l", "fluency")),
        _failures(result), _abilities(result),
    ] if result.rows else []  # fmt: skip
    return [*made, _cost(result), _definitions()]


def notes(result: FieldResult) -> str:
    """What the tables do not say."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return (
        f"{result.records} records of {result.data} (SHA-256 {result.data_digest[:12]}), base model"
        f" {result.fingerprint[:12]}; {versions}. Scores are version {result.definitions} of the"
        f" definitions below. {BRACKETS} Means have bootstrap intervals over records. Every method"
        " trains on the same prompts and answers, each with its end token, in the model's own chat"
        " template where it has one, and is asked so; methods that write text into the prompt do"
        " so before every question. All but kvedit are trained and asked in fp32. Free answers are"
        " greedy and have 16 tokens more than the longest target. Multiple choice: mean"
        " log-likelihood a token of each choice after the bare prompt, difference paired, interval"
        f" of Agresti and Min; {result.abilities} questions. {result.known} questions are about"
        " keys that nobody edits. Seconds leave the asking out: the median of single edits by the"
        " clock, and the mean of the process's own processor time; peak memory is that of the"
        " method's own process."
    )


def _head(row: Row, point: Point) -> tuple[str, ...]:
    return (row.method, row.way, row.changes, str(point.after))


def _points(result: FieldResult, *, every: bool = False) -> Iterator[tuple[tuple[str, ...], Point]]:
    """The base model's row and the last point of every method, or all of them."""
    yield ("(base model)", "-", "-", "0"), result.base
    for row in result.rows:
        for point in row.points if every else row.points[-1:]:
            yield _head(row, point), point


def cell(value: object) -> str:
    """A score or a mean, with its n and interval."""
    if not isinstance(value, Mean):
        return score_cell(value)  # type: ignore[arg-type]
    if value.value is None:
        return "-"
    low, high = value.interval
    return f"{value.value:.3f} [{low:.3f}, {high:.3f}] (n={value.n})"


def _whole(result: FieldResult) -> Table:
    names = ("reliability", "generalization", "locality", "harmonic", "trr")
    columns = (
        *HEAD, *(DEFINITIONS[name].title for name in names), "multiple choice, points",
        "s an edit", "processor s an edit", "peak, GiB", "remarks",
    )  # fmt: skip
    base = ("(base model)", "-", "-", "0", *(cell(getattr(result.base, n)) for n in names))
    rows = [(*base, "-", "-", "-", "-", "-")]
    for row in result.rows:
        last = row.points[-1]
        rows.append((
            *_head(row, last), *(cell(getattr(last, name)) for name in names),
            _difference(last.abilities), number_cell(_seconds(row)),
            number_cell(row.processor_seconds / max(1, last.after)), f"{row.peak / GIB:.2f}",
            "; ".join(_remarks(row)) or "-",
        ))  # fmt: skip
    return Table("All methods, by free generation", columns, tuple(rows))


def _seconds(row: Row) -> float | None:
    """The median of single edits, or the mean where they were made together."""
    if row.median_seconds is not None:
        return row.median_seconds
    return row.seconds / row.points[-1].after if row.points[-1].after else None


def _remarks(row: Row) -> Iterator[str]:
    if row.stopped:
        yield "stopped by the limit of time"
    yield from (f"{name}: {value}" for name, value in row.notes.items())


def _difference(changes: Sequence[Change]) -> str:
    if not changes:
        return "-"
    whole = changes[-1]
    low, high = (100 * bound for bound in whole.interval)
    return f"{100 * whole.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def _scores(result: FieldResult, title: str, names: Sequence[str], *, every: bool = False) -> Table:
    columns = (*HEAD, *(DEFINITIONS[name].title for name in names))
    rows = tuple(
        (*head, *(cell(getattr(point, name)) for name in names))
        for head, point in _points(result, every=every)
    )
    return Table(title, columns, rows)


def _failures(result: FieldResult) -> Table:
    """Of trained prompts and paraphrases together."""
    rows = tuple(
        (*head, counts_cell(dict(sorted(point.failures.items(), key=lambda one: -one[1]))))
        for head, point in _points(result)
    )
    return Table(
        "Wrong answers to trained prompts and paraphrases, by kind", (*HEAD, "kinds"), rows
    )


def _abilities(result: FieldResult) -> Table:
    columns = (*HEAD, "task", "before", "after", "gained, lost", "difference, points")
    rows = tuple(
        (*head, one.task, score_cell(one.before), score_cell(one.after),
         f"{one.gained}, {one.lost}", _difference([one]))
        for head, point in _points(result)
        for one in point.abilities
        if head[3] != "0"
    )  # fmt: skip
    return Table("Multiple choice, by mean log-likelihood", columns, rows)


def _cost(result: FieldResult) -> Table:
    taken = {(row.method, row.way): row for row in result.rows}
    rows = tuple(_cost_row(one, taken.get((one.method, one.way))) for one in result.costs)
    columns = (
        "method", "way", "edits, at most, s", "asking, about, s", "edits took, s", "asking took, s",
    )  # fmt: skip
    return Table("What was expected and what it took", columns, rows)


def _cost_row(one: Cost, row: Row | None) -> tuple[str, ...]:
    expected = (number_cell(one.editing, ".0f"), number_cell(one.asking, ".0f"))
    took = (row.seconds, row.asking_seconds) if row else (None, None)
    return (one.method, one.way, *expected, *(number_cell(value, ".0f") for value in took))


def _definitions() -> Table:
    rows = tuple((one.title, one.protocol, one.formula, one.source) for one in DEFINITIONS.values())
    return Table("What the columns say", ("column", "protocol", "formula", "source"), rows)
