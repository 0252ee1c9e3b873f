"""What ``bench speed`` found, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from kvedit.bench.report import Sheet, score_cell, time_row
from kvedit.bench.retain import KVEDIT, PLAIN, Edit
from kvedit.bench.speed import Estimate, SpeedResult, shares

INGEST = "ingest"


def sheets(result: SpeedResult) -> list[Sheet]:
    """Seconds a fact, their parts, arithmetic, memory and verification."""
    return [
        _seconds(result),
        _ratios(result),
        _shares(result),
        _arithmetic(result),
        Sheet("Verifying all facts", ("facts", "phrasings", "seconds", "held"), (_verify(result),)),
        _memory(result),
    ]


def notes(result: SpeedResult) -> str:
    """What the tables do not say."""
    return (
        f"Served in {result.dtype}; making a store took {result.setup_seconds:.0f} s. Learned: all"
        " training phrasings recalled by the merged model, teacher-forced. Ratios over 1 mean that"
        " the plain recipe takes longer; brackets: bootstrap 95% intervals of the medians."
        " Operations are counted, not estimated: each matrix product (m x k by k x n) and attention"
        " of a whole lesson, forward and backward, as 2 m k n (torch's FlopCounterMode), over the"
        " seconds of the same lesson without the counter. The machine: the fastest of many products"
        " of two 1024 x 1024 matrices, 2 x 1024^3. Peak memory is the process's so far, after each"
        " stage."
    )


def _seconds(result: SpeedResult) -> Sheet:
    rows = [time_row(f"{KVEDIT}, one by one", result.edits)]
    ingested = result.ingested
    each = ingested.seconds / max(1, ingested.committed)
    found = f"{ingested.committed} of {ingested.facts} committed, {each:.2f} s a committed fact"
    rows.append((INGEST, "-", f"{ingested.seconds / ingested.facts:.2f}", found))
    if result.plain:
        rows.append(time_row(PLAIN, result.plain))
    return Sheet("Seconds a fact, model loaded", ("what", "median", "mean", "steps"), tuple(rows))


def _ratios(result: SpeedResult) -> Sheet:
    rows = []
    if result.ratio is not None:
        span = f"{min(result.ratios):.2f} to {max(result.ratios):.2f}"
        pairs = f"median of {len(result.ratios)} facts that both learned, {span}"
        rows.append(("one by one, paired", _estimate(result.ratio), pairs))
    if result.ingest_ratio is not None:
        told = "plain's median over ingest's mean, learned facts"
        rows.append((INGEST, _estimate(result.ingest_ratio), told))
    headers = ("against", "ratio", "of what")
    return Sheet("Plain recipe / kvedit, to the same recall of each new fact", headers, tuple(rows))


def _estimate(value: Estimate) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _shares(result: SpeedResult) -> Sheet:
    lesson = sum(result.lesson.parts.values()) or 1.0
    rows = [(f"{KVEDIT}, one by one", name, _share(part)) for name, part in _of(result.edits)]
    rows += [
        ("- of a lesson (train)", name, _share(spent / lesson))
        for name, spent in result.lesson.parts.items()
    ]
    whole = result.ingested.seconds or 1.0
    rows += [(INGEST, name, _share(spent / whole)) for name, spent in result.ingested.parts.items()]
    return Sheet("Where the time goes", ("what", "part", "share"), tuple(rows))


def _of(edits: Sequence[Edit]) -> list[tuple[str, float]]:
    return list(shares(edits).items())


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _arithmetic(result: SpeedResult) -> Sheet:
    lesson = result.lesson
    rows = [
        (
            f"a lesson of {lesson.steps} steps, {lesson.rehearsal} facts to rehearse",
            f"{lesson.seconds:.2f}",
            f"{lesson.operations / 1e9:.2f}",
            f"{lesson.rate / 1e9:.2f}",
            "",
        )
    ]
    for dtype, rate in result.matmul.items():
        share = _share(lesson.rate / rate)
        rows.append((f"matrix product, {dtype}", "-", "-", f"{rate / 1e9:.2f}", share))
    headers = ("what", "seconds", "GFLOP", "GFLOP/s", "the lesson's share of it")
    return Sheet("Arithmetic", headers, tuple(rows))


def _verify(result: SpeedResult) -> tuple[str, ...]:
    found = result.verified
    return (
        str(found.facts),
        f"{found.phrasings} teacher-forced, {found.facts} generated",
        f"{found.seconds:.2f}",
        score_cell(found.held),
    )


def _memory(result: SpeedResult) -> Sheet:
    rows = tuple((stage, f"{peak / 2**20:,.0f}") for stage, peak in result.peaks.items())
    return Sheet("Peak memory", ("after", "MiB"), rows)
