"""What an exported model still recalls where it is asked or held otherwise than it was trained.

Invariants:
- Each fact is asked its first training prompt, teacher-forced; only the condition differs.
- What is asked is the exported model as it is loaded from its folder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvedit.errors import KveditError
from kvedit.events import Score
from kvedit.facts.fact import Fact
from kvedit.model import devices, quantization, scoring
from kvedit.model.prompts import Example, Renderer
from kvedit.revisions.export import rounding
from kvedit.training.engine import Engine

AS_TRAINED = "as trained"
OTHER_SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You work at a help desk and answer the callers.",
)  # fmt: skip
"""The first that facts were not trained under is asked."""
ROUNDINGS = {8: "weights in 8 bits (Q8_0)", 4: "weights in 4 bits (Q4_0)"}


@dataclass(frozen=True, slots=True)
class Condition:
    """One row of the table: ``lost`` are the keys of facts recalled as trained and not so."""

    name: str
    score: Score
    lost: tuple[str, ...] = ()


def measure(
    engine: Engine,
    facts: Sequence[Fact],
    load: Callable[[], Any],
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Condition, ...]:
    """Ask every fact under each condition; ``load`` gives the exported model, a new one each time.

    Weights that are packed already, or spread over devices, are not rounded.
    """
    if not facts:
        return ()
    keys, asked = [fact.key for fact in facts], [engine.examples(fact)[0] for fact in facts]
    progress("asking it under other conditions")
    model = load()
    trained = _passed(model, asked)
    rows = [Condition(AS_TRAINED, _score(trained))]
    for name, renderer in _renderers(engine):
        examples = [_rendered(renderer, example) for example in asked]
        rows.append(_row(name, keys, trained, _passed(model, examples)))
    if quantization.method(engine.base.model) or devices.is_spread(engine.base.model):
        return tuple(rows)
    for bits, name in ROUNDINGS.items():
        progress(f"asking it with {name}")
        model = model if bits == 8 else load()
        rounding.round_weights(model, bits)
        rows.append(_row(name, keys, trained, _passed(model, asked)))
    return tuple(rows)


def _renderers(engine: Engine) -> Iterator[tuple[str, Renderer]]:
    """Other ways to put a question to the model, by name; those that give the same text as in
    training are left out.
    """
    prompts, base = engine.renderer.prompts, engine.base
    make = partial(
        Renderer, base.tokenizer, context=base.context, end=engine.renderer.end, prompts=prompts,
        stops=base.stops,
    )  # fmt: skip
    trained = (prompts.system, *engine.system_turns)
    other = next(text for text in OTHER_SYSTEM_PROMPTS if text not in trained)
    yield "another system prompt", make(system=other)
    yield "an empty system prompt", make(system="")
    if engine.renderer.chat:
        yield "no template", make(plain=True)


def _rendered(renderer: Renderer, example: Example) -> Example | None:
    """The question put in another way; None where the template refuses it or it does not fit."""
    try:
        return renderer.example(example.prompt, example.answer)
    except KveditError:
        return None


def _passed(model: Any, examples: Sequence[Example | None]) -> list[bool | None]:
    """Whether each is recalled; None where it was not asked."""
    present = [one for one in examples if one is not None]
    outcomes = iter(scoring.recall(model, present))
    return [None if one is None else next(outcomes).passed for one in examples]


def _score(passed: Sequence[bool | None]) -> Score:
    asked = [one for one in passed if one is not None]
    return Score(sum(asked), len(asked))


def _row(
    name: str, keys: Sequence[str], trained: Sequence[bool | None], passed: Sequence[bool | None]
) -> Condition:
    outcomes = zip(keys, trained, passed, strict=True)
    lost = tuple(key for key, before, after in outcomes if before and after is False)
    return Condition(name, _score(passed), lost)
