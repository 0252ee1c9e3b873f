"""The gate: whether an edit may be committed, and how one that may not is trained again.

Invariants:
- Nothing here touches the model or the store: scores come in, reasons go out.
- The gate gives reasons, in words, for every no.
"""

from dataclasses import dataclass, replace

from kvedit.config import GateConfig, TrainingConfig
from kvedit.events import Score
from kvedit.facts.keys import in_words


@dataclass(frozen=True, slots=True)
class Checks:
    """Scores of the merged, cast weights.

    ``locality`` counts the locality probes that kept their answers, of those that had them before
    the edit; ``lost`` are the keys of earlier facts that were recalled before and are not now.
    ``perplexity`` of ordinary text is a multiple of the base model's, ``growth`` one of that before
    the edit; None where the model reads no such text.
    """

    recall: Score
    paraphrase: Score
    locality: Score
    retention: Score
    lost: tuple[str, ...]
    perplexity: float | None = None
    growth: float | None = None


def refusals(checks: Checks, gate: GateConfig, *, significant: bool = False) -> tuple[str, ...]:
    """Why the edit must not be committed; empty when it may.

    ``significant``: locality probes, which are few, refuse it only for more than chance explains.
    """
    reasons = [
        _below("recall probes", checks.recall, gate.min_recall),
        _below("unseen phrasings", checks.paraphrase, gate.min_paraphrase),
        _below("locality probes", checks.locality, gate.min_locality, significant=significant),
    ]
    if misses(checks.retention, gate.min_retention):
        reasons.append(
            f"earlier facts lost: {in_words(checks.lost)} ({checks.retention.passed} of"
            f" {checks.retention.n} kept, {gate.min_retention:.0%} needed)"
        )
    if too_much_growth(checks, gate):
        reasons.append(
            f"perplexity of ordinary text: {checks.growth:.2f} times that before the edit, at most"
            f" {gate.max_perplexity_growth:g} allowed"
        )
    return tuple(reason for reason in reasons if reason)


def too_much_growth(checks: Checks, gate: GateConfig) -> bool:
    """Whether the model reads ordinary text worse than a single edit may make it."""
    return checks.growth is not None and not checks.growth <= gate.max_perplexity_growth


def _below(what: str, score: Score, minimum: float, *, significant: bool = False) -> str:
    if not misses(score, minimum, significant=significant):
        return ""
    return f"{what}: {score.passed} of {score.n} passed, {minimum:.0%} needed"


def misses(score: Score, minimum: float, *, significant: bool = False) -> bool:
    """Whether a score is below a minimum share; an empty one never is.

    ``significant``: only if its whole 95% interval is.
    """
    if score.rate is None:
        return False
    return (score.interval()[1] if significant else score.rate) < minimum


def only_unseen_missed(checks: Checks, gate: GateConfig) -> bool:
    """Whether all training prompts are recalled, and too few others."""
    recalled = checks.recall.passed == checks.recall.n
    return recalled and misses(checks.paraphrase, gate.min_paraphrase)


def is_harmed(checks: Checks, gate: GateConfig) -> bool:
    """Whether a single edit changed any locality probe, or too much of the model's reading."""
    return checks.locality.passed < checks.locality.n or too_much_growth(checks, gate)


def to_train_again(config: TrainingConfig, checks: Checks, gate: GateConfig) -> TrainingConfig:
    """How to train one fact again: by a larger margin where its answers were missed, up to the one
    from which a token counts less, with more penalty where locality was harmed.
    """
    unseen = misses(checks.paraphrase, gate.min_paraphrase)
    missed = unseen or checks.recall.passed < checks.recall.n
    larger = max(config.min_margin, min(4 * config.min_margin, config.target_margin))
    return replace(
        config, penalty_weight=config.penalty_weight * (4 if is_harmed(checks, gate) else 1),
        min_margin=larger if missed else config.min_margin,
        phrasings_per_step=config.phrasings_per_step + 2, seed=config.seed + 1,
    )  # fmt: skip
