"""The results of ``bench speed`` as tables."""

from __future__ import annotations

from collections.abc import Mapping

from kvedit.bench.speed import parts_of
from kvedit.bench.tables import Table, score_cell
from tests.bench.report import time_row
from tests.bench.retain import BASELINE, KVEDIT
from tests.bench.speed import Estimate, SpeedResult, ingest_ratio

INGEST = "ingest"


def tables(result: SpeedResult) -> list[Table]:
    """Seconds a fact, their parts, arithmetic, memory and verification."""
    return [
        _seconds(result),
        _ratios(result),
        _shares(result),
        _arithmetic(result),
        Table("Verifying all facts", ("facts", "phrasings", "seconds", "held"), (_verify(result),)),
        _memory(result),
    ]


def notes(result: SpeedResult) -> str:
    """What the tables do not say."""
    return (
        f"Served in {result.dtype}; making a store took {result.setup_seconds:.0f} s. Learned: all"
        " training phrasings recalled by the merged model, teacher-forced. Ratios over 1 mean that"
        " the baseline takes longer; brackets: bootstrap 95% intervals of the medians."
        " Operations are counted, not estimated: each matrix product (m x k by k x n) and attention"
        " of a whole training, forward and backward, as 2 m k n (torch's FlopCounterMode), over the"
        " seconds of the same training without the counter. The machine: the fastest of many"
        " products of two square matrices, of 1024 rows on a CPU and 8192 on a GPU. Peak memory"
        " is the process's so far, after each stage."
    )


def _seconds(result: SpeedResult) -> Table:
    rows = [time_row(f"{KVEDIT}, one by one", result.edits)]
    ingested = result.ingested
    each = ingested.seconds / max(1, ingested.committed)
    outcomes = f"{ingested.committed} of {ingested.facts} committed, {each:.2f} s a committed fact"
    rows.append((INGEST, "-", f"{ingested.seconds / ingested.facts:.2f}", outcomes))
    if result.baseline:
        rows.append(time_row(BASELINE, result.baseline))
    return Table("Seconds a fact, model loaded", ("what", "median", "mean", "steps"), tuple(rows))


def _ratios(result: SpeedResult) -> Table:
    rows = []
    if result.ratio is not None:
        span = f"{min(result.ratios):.2f} to {max(result.ratios):.2f}"
        pairs = f"median of {len(result.ratios)} facts that both learned, {span}"
        rows.append(("one by one, paired", _estimate(result.ratio), pairs))
    if result.ingest_ratio is not None:
        text = "the baseline's median over ingest's mean, learned facts"
        rows.append((INGEST, _estimate(result.ingest_ratio), text))
        apart = ingest_ratio(result.ingested, result.baseline, extracted=False)
        if apart is not None:
            text = "the same without the extraction of what the model knows, once for a store"
            rows.append((f"{INGEST}, extracted before", _estimate(apart), text))
    columns = ("against", "ratio", "of what")
    return Table("Baseline / kvedit, to the same recall of each new fact", columns, tuple(rows))


def _estimate(value: Estimate) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _shares(result: SpeedResult) -> Table:
    ingested, group = result.ingested, result.group_task
    rows = _parts(f"{KVEDIT}, one by one", parts_of(result.edits))
    rows += _parts("- of the training of one fact", result.task.parts)
    rows += _parts(INGEST, ingested.parts)
    if group is not None:
        rows += _parts(f"- of the training of {group.facts} facts", group.parts)
    return Table("Where the time goes", ("what", "part", "share"), tuple(rows))


def _parts(what: str, parts: Mapping[str, float]) -> list[tuple[str, str, str]]:
    total = sum(parts.values()) or 1.0
    return [(what, name, _share(spent / total)) for name, spent in parts.items()]


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _arithmetic(result: SpeedResult) -> Table:
    tasks = [one for one in (result.task, result.group_task) if one is not None]
    names = [f"share of {dtype}" for dtype in result.matmul]
    rows = [
        (
            f"training of {one.facts} facts, {one.steps} steps, {one.rehearsal} rehearsed",
            f"{one.seconds:.2f}",
            f"{one.operations / 1e9:.2f}",
            f"{one.rate / 1e9:.2f}",
            *[_share(one.rate / rate) for rate in result.matmul.values()],
        )
        for one in tasks
    ]
    for dtype, rate in result.matmul.items():
        rows.append(
            (f"matrix product, {dtype}", "-", "-", f"{rate / 1e9:.2f}", *["-"] * len(names))
        )
    columns = ("what", "seconds", "GFLOP", "GFLOP/s", *names)
    return Table("Arithmetic", columns, tuple(rows))


def _verify(result: SpeedResult) -> tuple[str, ...]:
    run = result.verified
    return (
        str(run.facts),
        f"{run.phrasings} teacher-forced, {run.facts} generated",
        f"{run.seconds:.2f}",
        score_cell(run.held),
    )


def _memory(result: SpeedResult) -> Table:
    rows = tuple((stage, f"{peak / 2**20:,.0f}") for stage, peak in result.peaks.items())
    return Table("Peak memory", ("after", "MiB"), rows)
