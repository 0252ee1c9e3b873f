"""A fact's examples: by place in the list of its prompts, checked, and kept."""

from __future__ import annotations

from functools import partial

import pytest
from small_model import FREE

from kvedit.errors import InvalidFactError
from kvedit.facts.fact import Fact
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.training.examples.of_facts import SYSTEM_TURNS, FactExamples

FACT = Fact.create(*FREE[0], lang="en")


def examples_of(base: BaseModel, share: float = 0.0) -> FactExamples:
    make = partial(Renderer, base.tokenizer, context=base.context, stops=base.stops)
    return FactExamples(make(), lambda text: make(system=text), share)


def test_prompts_that_are_never_trained_have_no_other_system_prompt(base: BaseModel) -> None:
    plain, mixed = examples_of(base), examples_of(base, 0.5)
    assert (plain.system_turns, mixed.system_turns) == ((), SYSTEM_TURNS)
    assert plain.unseen(FACT) == mixed.unseen(FACT)
    pairs = zip(plain.trained(FACT), mixed.trained(FACT), strict=True)
    changed = [at for at, (one, other) in enumerate(pairs) if one != other]
    assert changed == list(range(1, len(plain.trained(FACT)), 2))
    assert mixed.trained(FACT) is not mixed.trained(FACT)  # what is kept cannot be changed


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_control_tokens_are_refused_in_the_text_and_in_questions(
    base: BaseModel, share: float
) -> None:
    examples = examples_of(base, share)
    with pytest.raises(InvalidFactError):
        examples.trained(Fact.create("lamp", "It is <|end|> lit.", lang="en"))
    with pytest.raises(InvalidFactError):
        examples.prefixes(FACT, ["Is it <|user|> lit?"])


def test_questions_are_put_as_they_are_trained_and_undone(base: BaseModel) -> None:
    plain, mixed = examples_of(base), examples_of(base, 0.5)
    prompts = [example.prompt for example in plain.trained(FACT)]
    prefixes = mixed.prefixes(FACT, ["Who made it?", prompts[1]])
    assert list(prefixes) == [*prompts, "Who made it?"]
    assert prefixes["Who made it?"] == plain.prefixes(FACT, ["Who made it?"])["Who made it?"]
    back = mixed.prior(FACT, dict.fromkeys(prefixes, "Made of oak."))
    assert [list(one.ids[: one.start]) for one in back] == list(prefixes.values())
    later = mixed.prior(FACT, {"Who made it?": "Nobody.", prompts[1]: "Of oak."})  # in any order
    assert list(later[1].ids[: later[1].start]) == prefixes[prompts[1]]
