"""What ``quality`` measured: tables, and one line a method while it runs."""

from __future__ import annotations

from kvedit.bench.memory import GIB
from kvedit.bench.tables import BRACKETS, Table, counts_cell, number_cell, score_cell
from kvedit.events import Score
from tests.bench.quality import QualityResult
from tests.bench.quality_probes import ANSWER_TOKENS, FIRST_TOKENS
from tests.bench.quality_scores import (
    GRAM,
    Change,
    MethodScores,
    mean_steps,
    median_seconds,
    seconds_a_fact,
)

RECALLS = ("kept", "retained", "trained", "unseen", "unseen_own")
COLUMNS = (
    "method", "facts kept, of all", "ERR (of those learned)", "trained phrasings",
    "unseen phrasings", "unseen, own language",
)  # fmt: skip


def line(method: MethodScores) -> str:
    """One method in one line, by free generation."""
    parts = [
        f"facts kept {_short(method.kept.generated)}",
        f"unseen phrasings {_short(method.unseen.generated)}",
        f"first {FIRST_TOKENS} tokens unchanged {_short(method.first_tokens)}",
        f"leaks {_short(method.leaked)}, keys never taught {_short(method.leaked_keys)}",
        f"{number_cell(seconds_a_fact(method))} s a fact",
    ]
    if method.perplexity is not None:
        parts.insert(-1, f"perplexity x{method.perplexity.ratio:.3f}")
    return f"{method.method}: {', '.join(parts)}"


def _short(score: Score) -> str:
    return f"{score.passed}/{score.n}"


def tables(result: QualityResult) -> list[Table]:
    """Recall under both protocols, what else changed, abilities, and what it cost."""
    made = [
        _recall(result, "generated", "Recall by free greedy generation"),
        _recall(result, "forced", "The same, teacher-forced"),
        _likeness(result),
        _changed(result),
        _costs(result),
    ]
    if result.base.abilities:
        made.insert(-1, _abilities(result))
    return made


def notes(result: QualityResult) -> str:
    """What the tables do not say."""
    return (
        f"{result.facts} facts, each method from the same base model in a process of its own."
        f" {BRACKETS} A fact is kept if all trained phrasings that were asked are exact; trained"
        " phrasings are those in the fact's own language and its own prompts, which every method"
        " trains on; unseen ones are trained by none, but add and ingest train on others in the"
        " other language. Learned: committed, or recalled teacher-forced when it had been trained."
        f" General questions are asked before and after, {ANSWER_TOKENS} tokens, greedily; none is"
        f" in a store's protected text. A leak is {GRAM} words or Chinese characters in a row of a"
        " trained text. Perplexity: interval of the ratio by bootstrap over texts. Multiple choice:"
        " mean log-likelihood a token of each choice after the bare prompt; difference paired, in"
        " points, interval of Agresti and Min (Wald's with half a pair added to each cell). LoRA is"
        " trained and asked in fp32, and compared with the base model in fp32. Peak memory is"
        " that of loading and training, of the process."
    )


def _recall(result: QualityResult, protocol: str, title: str) -> Table:
    rows = tuple(
        (one.method, *(score_cell(getattr(getattr(one, name), protocol)) for name in RECALLS))
        for one in result.methods
    )
    return Table(title, COLUMNS, rows)


def _likeness(result: QualityResult) -> Table:
    columns = ("method", "all answers", "those that are not exact")
    rows = tuple(
        (one.method, _percent(one.likeness), _percent(one.near_miss)) for one in result.methods
    )
    return Table(
        "Characters that answers to unseen phrasings have in common with the text, median",
        columns, rows,
    )  # fmt: skip


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _changed(result: QualityResult) -> Table:
    columns = (
        "method", f"first {FIRST_TOKENS} tokens unchanged", "whole answer unchanged",
        "general answers with a leak", "answers about keys never taught, with a leak",
        "keys never taught, with a leak", "perplexity", "ratio",
    )  # fmt: skip
    bases = (result.base, result.base_fp32) if result.base_fp32 else (result.base,)
    rows = [_changed_row(one) for one in (*bases, *result.methods)]
    title = f"What else changed, on {result.questions} general questions"
    return Table(title, columns, tuple(rows))


def _changed_row(one: MethodScores) -> tuple[str, ...]:
    scores = (one.first_tokens, one.whole, one.leaked, one.leaked_untaught, one.leaked_keys)
    text = one.perplexity
    if text is None:
        return (one.method, *map(score_cell, scores), "-", "-")
    low, high = text.interval
    ratio = f"{text.ratio:.3f} [{low:.3f}, {high:.3f}]"
    return (one.method, *map(score_cell, scores), f"{text.value:.2f} ({text.tokens} tokens)", ratio)


def _abilities(result: QualityResult) -> Table:
    columns = ("method", "task", "before", "after", "gained, lost", "difference, points")
    rows = tuple(_ability_row(one.method, task) for one in result.methods for task in one.abilities)
    return Table("Multiple choice, by mean log-likelihood", columns, rows)


def _ability_row(method: str, task: Change) -> tuple[str, ...]:
    low, high = (100 * bound for bound in task.interval)
    return (
        method, task.task, score_cell(task.before), score_cell(task.after),
        f"{task.gained}, {task.lost}", f"{100 * task.difference:+.1f} [{low:+.1f}, {high:+.1f}]",
    )  # fmt: skip


def _costs(result: QualityResult) -> Table:
    columns = (
        "method", "outcomes", "s a fact", "median s", "steps a fact", "all, s", "peak, GiB",
        "asking, s",
    )  # fmt: skip
    rows = [_cost_row(one) for one in result.methods]
    if result.store is not None:
        spent, peak = number_cell(result.store.seconds, ".1f"), _gib(result.store.peak)
        rows.insert(0, ("(making the store)", *["-"] * 4, spent, peak, "-"))
    return Table("What it cost, model loaded", columns, tuple(rows))


def _cost_row(one: MethodScores) -> tuple[str, ...]:
    return (
        one.method, counts_cell(one.outcomes), number_cell(seconds_a_fact(one)),
        number_cell(median_seconds(one)), number_cell(mean_steps(one), ".1f"),
        number_cell(one.seconds, ".1f"), _gib(one.peak), number_cell(one.asking_seconds, ".0f"),
    )  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
