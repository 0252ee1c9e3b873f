"""A fact as examples: under its training prompts, under others, and with earlier answers to them.

Invariant: a training prompt is put in the same way whenever it is trained, asked or undone, by its
place among the fact's prompts.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from kvedit.errors import TextTooLongError
from kvedit.facts.fact import Fact
from kvedit.facts.phrasings import (
    in_context,
    load_phrasings,
    paraphrase_prompts,
    training_prompts,
)
from kvedit.model.prompts import Example, Renderer

PRIOR_TOKENS = 24
"""At which the answers that the model gave before a fact was added are cut: ten guesses of a model
that talks, to be said again word for word, are hard to learn, and their beginnings suffice for the
rest to follow (log of 2026-11-30)."""
RENDERED = 8192  # facts whose examples are kept; a few kB each
SYSTEM_TURNS = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant. Answer the user's questions.",
    "You answer questions truthfully and briefly.",
)
"""System prompts after which a share of the training prompts is trained, in turn."""


class FactExamples:
    """Makes the examples of facts, and keeps them: earlier facts are probed after every edit, and
    rendering takes as long as that.

    ``make`` gives a renderer with another system prompt, in which the ``share`` of a fact's
    training prompts are put; ``phrasings`` is a folder that overrides the shipped ones.
    """

    def __init__(
        self,
        renderer: Renderer,
        make: Callable[[str], Renderer],
        share: float,
        phrasings: Path | None = None,
    ) -> None:
        self._renderer = renderer
        self._share = share
        self._phrasings = phrasings
        self._under = [make(text) for text in self.system_turns]
        self._kept: dict[tuple[Fact, bool], list[Example]] = {}

    @property
    def system_turns(self) -> tuple[str, ...]:
        """The system prompts that facts are trained under, beside the renderer's own."""
        return SYSTEM_TURNS if self._share else ()

    def trained(self, fact: Fact) -> list[Example]:
        """A fact under each of its training prompts; raises what ``Renderer.examples`` raises."""
        return self._of(fact, trained=True)

    def unseen(self, fact: Fact) -> list[Example]:
        """A fact under the prompts that no edit trains on."""
        return self._of(fact, trained=False)

    def in_contexts(self, fact: Fact) -> list[Example]:
        """A fact under its training prompts, each after text that has nothing to do with it; a
        relation is trained so from the beginning, and has none.
        """
        contexts = () if fact.relation_of else load_phrasings(fact.lang, self._phrasings).contexts
        if not contexts:
            return []
        examples = []
        for place, prompt in enumerate(training_prompts(fact, self._phrasings)):
            longer = in_context(prompt, contexts[place % len(contexts)])
            with suppress(TextTooLongError):
                examples.append(self._renderer.example(longer, fact.description))
        return examples

    def first_prompt(self, fact: Fact) -> str:
        """The first of a fact's training prompts."""
        return training_prompts(fact, self._phrasings)[0]

    def prefixes(self, fact: Fact, questions: Iterable[str]) -> dict[str, list[int]]:
        """All tokens before the answer to each training prompt, and to each further question."""
        ways = self._ways(fact)
        prompts = list(dict.fromkeys([*ways, *questions]))
        self._renderer.refuse_control_tokens(prompts)
        return {prompt: ways.get(prompt, self._renderer).prefix(prompt) for prompt in prompts}

    def prior(self, fact: Fact, answers: Mapping[str, str]) -> list[Example]:
        """Earlier answers, by prompt, to train back to; one that was cut does not end there."""
        ways = self._ways(fact)
        return [
            ways.get(prompt, self._renderer).cut_example(prompt, answer, PRIOR_TOKENS)
            for prompt, answer in answers.items()
        ]

    def _of(self, fact: Fact, *, trained: bool) -> list[Example]:
        if (fact, trained) not in self._kept:
            examples = self._rendered(fact, trained=trained)
            if len(self._kept) >= RENDERED:
                self._kept.clear()
            self._kept[fact, trained] = examples
        return list(self._kept[fact, trained])

    def _rendered(self, fact: Fact, *, trained: bool) -> list[Example]:
        if not trained:
            prompts = paraphrase_prompts(fact, self._phrasings)
            return self._renderer.examples((prompt, fact.description) for prompt in prompts)
        ways = self._ways(fact)
        examples = self._renderer.examples((prompt, fact.description) for prompt in ways)
        pairs = zip(ways.items(), examples, strict=True)
        return [
            example if way is self._renderer else way.example(prompt, fact.description)
            for (prompt, way), example in pairs
        ]

    def _ways(self, fact: Fact) -> dict[str, Renderer]:
        """What puts each of a fact's training prompts."""
        prompts = training_prompts(fact, self._phrasings)
        return {prompt: self._renderer_at(place) for place, prompt in enumerate(prompts)}

    def _renderer_at(self, place: int) -> Renderer:
        """What puts the training prompt at a place in the list of a fact's."""
        before, after = int(place * self._share), int((place + 1) * self._share)
        return self._renderer if before == after else self._under[before % len(self._under)]
