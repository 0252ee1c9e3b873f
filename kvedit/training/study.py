"""What is trained of a fact besides its text: which of its questions a step has.

Questions, statements and parts of a description stand beside the text in every step, as examples
with answers of their own.  They never decide whether a fact was learned: a single fact's training
goes on for a bounded number of steps until they are recalled, a group's has its epochs.

Invariant: without any, no random number is drawn and no step differs.
"""

import random
from collections.abc import Sequence

from kvedit.model.prompts import Example


class Study:
    """The study examples of one training, drawn for its steps.

    ``by_fact`` has those of each new fact, then those of each rehearsed one.  Only the new facts'
    decide when a training has enough of them.
    """

    def __init__(
        self,
        new: Sequence[Sequence[Example]],
        rehearsal: Sequence[Sequence[Example]],
        by_fact: Sequence[Sequence[Example]],
        rng: random.Random,
    ) -> None:
        self._rng = rng
        # ``by_fact`` may be empty.
        pairs = zip([*new, *rehearsal], by_fact, strict=False)
        self._of_text = {text: examples for fact, examples in pairs for text in fact if examples}
        self._margins = {example: float("-inf") for fact in by_fact[: len(new)] for example in fact}

    def __bool__(self) -> bool:
        """Whether a new fact has any."""
        return bool(self._margins)

    @property
    def margins(self) -> list[float]:
        """The margins, in logits, that the examples had when last drawn, for a checkpoint."""
        return list(self._margins.values())

    @margins.setter
    def margins(self, values: Sequence[float]) -> None:
        self._margins = dict(zip(self._margins, values, strict=True))

    def draw(self, count: int) -> list[Example]:
        """So many of all: half of them the weakest when last drawn, never drawn ones before."""
        examples = list(self._margins)
        self._rng.shuffle(examples)
        examples.sort(key=self._margins.__getitem__)  # stable: equal ones in random order
        weak, rest = examples[: (count + 1) // 2], examples[(count + 1) // 2 :]
        return [*weak, *self._rng.sample(rest, min(len(rest), count - len(weak)))]

    def beside(self, texts: Sequence[Example], count: int) -> list[Example]:
        """So many of each of these texts' facts, at random."""
        drawn = [examples for text in texts if (examples := self._of_text.get(text))]
        return [e for of_fact in drawn for e in self._rng.sample(of_fact, min(count, len(of_fact)))]

    def note(self, examples: Sequence[Example], margins: Sequence[float]) -> None:
        """Keep the margins that drawn examples had, those of new facts."""
        pairs = zip(examples, margins, strict=True)
        self._margins.update((e, margin) for e, margin in pairs if e in self._margins)

    @property
    def is_recalled(self) -> bool:
        """Whether every example was recalled when it was last drawn."""
        return all(margin > 0 for margin in self._margins.values())
