"""How well the model reads ordinary text: the mean loss on texts that are never protected.

Locality probes ask where the model is sure, and hold long after its reading of ordinary text has
become worse.  This is the other half: perplexity, the exponential of a mean loss.

Invariant: a loss is kept with the revision that it is of; None stands for a model that reads none.
"""

import json

import torch

from kvedit.model.prompts import Example
from kvedit.model.scoring import token_scores
from kvedit.replay import general_texts
from kvedit.revisions.checkout import Checkout

_LOSSES = "reading_losses"  # by revision: of the base model and of the latest edit


class Reading:
    """The losses of a store's revisions, nats a token."""

    def __init__(self, checkout: Checkout) -> None:
        self._checkout = checkout
        self._texts: list[Example] | None = None

    def of(self, revision: int) -> float | None:
        """The loss of a revision: as it was kept, or measured now."""
        kept = self._kept()
        if str(revision) not in kept:
            self.keep(revision, self._checkout.at(revision, self.now))
            kept = self._kept()
        return kept[str(revision)]

    def now(self) -> float | None:
        """The loss of the weights as they are."""
        if self._texts is None:
            self._texts = general_texts.watched(self._checkout.engine.renderer)
        return _mean_loss(self._checkout.engine.base.model, self._texts) if self._texts else None

    def keep(self, revision: int, loss: float | None) -> None:
        """Keep a revision's loss, beside the base model's, in place of any other."""
        base = {number: kept for number, kept in self._kept().items() if number == "0"}
        unread = not revision and loss is not None and loss > general_texts.MAX_LOSS
        losses = {**base, str(revision): None if unread else loss}
        with self._checkout.best_effort():
            self._checkout.store.set_meta(_LOSSES, json.dumps(losses))

    def _kept(self) -> dict[str, float | None]:
        losses: dict[str, float | None] = json.loads(self._checkout.store.meta(_LOSSES) or "{}")
        return losses


@torch.no_grad()
def _mean_loss(model: torch.nn.Module, texts: list[Example]) -> float:
    return float(token_scores(model, texts).losses.mean())
