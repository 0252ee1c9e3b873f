"""What ``bench speed`` found, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.report import Sheet, score_cell, time_row
from tests.bench.retain import KVEDIT, PLAIN, Edit
from tests.bench.speed import Estimate, SpeedResult, ingest_ratio, shares

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
        " of two square matrices, of 1024 rows on a CPU and 8192 on a GPU. Peak memory is the"
        " process's so far, after each stage."
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
        apart = ingest_ratio(result.ingested, result.plain, searched=False)
        if apart is not None:
            told = "the same without the search for what the model knows, once for a store"
            rows.append((f"{INGEST}, searched before", _estimate(apart), told))
    headers = ("against", "ratio", "of what")
    return Sheet("Plain recipe / kvedit, to the same recall of each new fact", headers, tuple(rows))


def _estimate(value: Estimate) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _shares(result: SpeedResult) -> Sheet:
    ingested = result.ingested
    rows = [(f"{KVEDIT}, one by one", name, _share(part)) for name, part in _of(result.edits)]
    rows += _parts("- of a lesson (train)", result.task.parts)
    rows += _parts(INGEST, ingested.parts)
    if ingested.task is not None:
        name = f"- of a lesson of {ingested.task.facts} facts (train)"
        rows += _parts(name, ingested.task.parts)
    return Sheet("Where the time goes", ("what", "part", "share"), tuple(rows))


def _parts(what: str, parts: dict[str, float]) -> list[tuple[str, str, str]]:
    whole = sum(parts.values()) or 1.0
    return [(what, name, _share(spent / whole)) for name, spent in parts.items()]


def _of(edits: Sequence[Edit]) -> list[tuple[str, float]]:
    return list(shares(edits).items())


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _arithmetic(result: SpeedResult) -> Sheet:
    lessons = [one for one in (result.task, result.ingested.task) if one is not None]
    names = [f"share of {dtype}" for dtype in result.matmul]
    rows = [
        (
            f"a lesson of {one.facts} facts, {one.steps} steps, {one.rehearsal} to rehearse",
            f"{one.seconds:.2f}",
            f"{one.operations / 1e9:.2f}",
            f"{one.rate / 1e9:.2f}",
            *[_share(one.rate / rate) for rate in result.matmul.values()],
        )
        for one in lessons
    ]
    for dtype, rate in result.matmul.items():
        rows.append(
            (f"matrix product, {dtype}", "-", "-", f"{rate / 1e9:.2f}", *["-"] * len(names))
        )
    headers = ("what", "seconds", "GFLOP", "GFLOP/s", *names)
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
