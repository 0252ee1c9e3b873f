"""The Fisher moments that an engine keeps: of the base model's text, and with committed facts.

The base's moments say how much all edits so far have changed the outputs on protected text.  The
total is what the next edit must leave alone, and gives the coordinates that it is trained in.

Invariant: moments are kept in the system's memory, or on the disk where they were read from; only
the whitening factors of the total are where the model is.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kvedit.adapter import fisher
from kvedit.adapter.deltas import Master
from kvedit.adapter.fisher import FisherMoments, WhiteningFactors
from kvedit.config import TrainingConfig
from kvedit.model.prompts import Example
from kvedit.training.memory import give_back
from kvedit.training.worker import Worker


class KeptMoments:
    """The part of an engine that measures what must stay, on the weights as they are."""

    def __init__(self, master: Master, worker: Worker, config: TrainingConfig) -> None:
        self.master, self.worker, self.config = master, worker, config
        self.names = list(master.matrices)
        self._fisher: tuple[FisherMoments, FisherMoments] | None = None
        self._whitening: dict[str, WhiteningFactors] | None = None

    @property
    def fisher(self) -> tuple[FisherMoments, FisherMoments] | None:
        """The moments of the base model's text, and these with the committed facts'."""
        return self._fisher

    @fisher.setter
    def fisher(self, value: tuple[FisherMoments, FisherMoments] | None) -> None:
        self._fisher = value
        self._whitening = None

    def _required(self) -> tuple[FisherMoments, FisherMoments]:
        if self._fisher is None:
            raise RuntimeError("protect comes before training and every other measurement")
        return self._fisher

    def measure(self, examples: Sequence[Example], **how: Any) -> FisherMoments:
        """Moments of some texts, which nothing is held to yet; see ``fisher.measure``."""
        with self.worker.in_step():
            measured = fisher.measure(self.worker.model, self.names, examples, **how).on_cpu()
        give_back()
        return measured

    def protect(
        self, examples: Sequence[Example], onto: FisherMoments | None = None
    ) -> FisherMoments:
        """Measure text that must stay, added to what was measured before (see ``measure``)."""
        measured = self.measure(examples, onto=onto)
        self.fisher = measured, measured
        return measured

    def remember(self, examples: Sequence[Example], weight: float | None = None) -> None:
        """Protect committed facts as well; ``weight`` says how often a token counts."""
        base, total = self._required()
        weight = self.config.fact_weight if weight is None else weight
        self._whitening = None  # its memory is needed
        self.fisher = base, total.plus(self.measure(examples), weight)

    def measure_at_head(
        self, protected: Sequence[Example], facts: Sequence[Example], weight: float
    ) -> None:
        """Measure all that must stay again, on the head's weights; how far earlier edits changed
        the base's text is still counted as it was measured on the base.
        """
        base, _ = self._required()
        at_head = self.measure(protected)
        self.fisher = base, at_head.plus(self.measure(facts), weight)

    def measure_margins(self, known: Sequence[Example]) -> None:
        """Let the logit margins of these texts' answers be what must stay, until set again."""
        base, _ = self._required()
        measured = self.measure(known, of=fisher.margins)
        self.fisher = base, measured.scaled_like(base)

    @property
    def whitening(self) -> dict[str, WhiteningFactors]:
        """The coordinates that the total moments give; kept until these change."""
        if self._whitening is None:
            config, (_, total) = self.config, self._required()
            devices = {name: weight.device for name, weight in self.master.served().items()}
            dampings = config.input_damping, config.gradient_damping
            self._whitening = fisher.whitening(total, devices, *dampings)
        return self._whitening

    def _penalty_gradient(self, share: float) -> Callable[[str, Tensor, bool], Tensor | None]:
        """Multiplies rows with a share of the gradient of the penalty on protected text at a
        matrix's accumulated delta (see ``fisher.penalty_gradient``); None where there is no delta.
        """
        base, _ = self._required()
        delta = self.master.accumulated_delta()

        def gradient(name: str, rows: Tensor, of_outputs: bool) -> Tensor | None:
            moved = delta[name]
            if not bool(moved.any()):
                return None
            moved = moved.to(rows.device)
            product = fisher.penalty_gradient(base, name, moved, rows, of_outputs=of_outputs)
            return product.mul_(share)

        return gradient
