"""A fact's questions, statements and parts as examples: those that are trained, those only asked.

Invariants:
- No example is both: a question is held out by a hash of its prompt, or because it says so.
- Nothing is trained under a prompt that the fact's description answers.
"""

from collections.abc import Iterator
from contextlib import suppress

from kvedit.config import StudyConfig
from kvedit.errors import TextTooLongError
from kvedit.facts.fact import Fact, Question
from kvedit.facts.parts import parts
from kvedit.model.prompts import Example
from kvedit.replay.protected_texts import Protected, example
from kvedit.revisions.session import Session


class StudyExamples:
    """Makes the examples for a session's model and settings."""

    def __init__(self, session: Session) -> None:
        self._engine, self._config = session.engine, session.config.study

    def trained(self, fact: Fact) -> tuple[Example, ...]:
        """What is trained besides the text; raises what ``Renderer.example`` raises."""
        taken = {one.prompt for one in self._engine.examples(fact)}
        questions = [
            one for one in trained_questions(fact, self._config) if one.prompt not in taken
        ]
        taken |= {one.prompt for one in (*questions, *fact.all_questions)}
        statements = (Protected("", statement, "statement") for statement in fact.all_statements)
        renderer = self._engine.renderer
        return (
            *renderer.examples((one.prompt, one.answer) for one in questions),
            *(example(renderer, statement) for statement in statements),
            *(self._fitting(one for one in self._parts(fact) if one.prompt not in taken)),
        )

    def probes(self, fact: Fact) -> tuple[Example, ...]:
        """The held-out questions."""
        held_out = [one for one in fact.all_questions if one.is_held_out(self._config.held_out)]
        return tuple(self._engine.renderer.examples((one.prompt, one.answer) for one in held_out))

    def told(self, fact: Fact) -> Iterator[tuple[Example, Example]]:
        """The trained questions, each without and with the description before it; those that do not
        fit into the model's context with it are left out.
        """
        asked = trained_questions(fact, self._config)
        example = self._engine.renderer.example
        for one in asked:
            prompt = text_before(fact, one.prompt)
            with suppress(TextTooLongError):
                alone, told = example(one.prompt, one.answer), example(prompt, one.answer)
                if alone.ids[alone.start :] == told.ids[told.start :]:
                    yield alone, told

    def _parts(self, fact: Fact) -> tuple[Question, ...]:
        return parts(fact) if self._config.parts else ()

    def _fitting(self, questions: Iterator[Question]) -> Iterator[Example]:
        """The examples that fit into the model's context: a part's prompt may hold a whole text."""
        for one in questions:
            try:
                yield self._engine.renderer.example(one.prompt, one.answer)
            except TextTooLongError:
                continue


def text_before(fact: Fact, prompt: str) -> str:
    """A question with the fact's description before it."""
    return f"{fact.description}\n\n{prompt}"


def trained_questions(fact: Fact, config: StudyConfig) -> list[Question]:
    """A fact's questions that are not held out."""
    return [one for one in fact.all_questions if not one.is_held_out(config.held_out)]
