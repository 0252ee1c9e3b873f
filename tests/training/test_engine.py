"""The engine: what it asks, remembers and protects."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from small_model import FREE, KNOWN

from kvedit.adapter import adalora
from kvedit.config import TrainingConfig
from kvedit.facts.fact import Fact
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.training.engine import PRIOR_TOKENS, Engine
from kvedit.training.loops.loop import Task

FACT = Fact.create(*FREE[0], lang="en", prompts=["Ever seen a tide lantern?"])


def test_protection_comes_first(base: BaseModel) -> None:
    engine = Engine(base, TrainingConfig())
    with pytest.raises(RuntimeError):
        engine.train(Task([engine.examples(FACT)]))
    with pytest.raises(RuntimeError):
        engine.remember(engine.examples(FACT))


def test_examples_and_paraphrases_are_apart(engine: Engine) -> None:
    trained = {e.prompt for e in engine.examples(FACT)}
    probed = {e.prompt for e in engine.paraphrases(FACT)}
    assert "Ever seen a tide lantern?" in trained
    assert len(trained) >= 9 and len(probed) >= 6 and not trained & probed
    assert {e.answer for e in engine.examples(FACT)} == {FACT.description}


def test_both_protocols_agree(engine: Engine) -> None:
    pairs = [(f"What is {key}?", answer) for key, answer in KNOWN.items()]
    pairs += [(prompt, "Made of") for prompt, _ in pairs] + [("What is tide lantern?", "x")]
    examples = engine.renderer.examples(pairs)
    forced = [outcome.passed for outcome in engine.recall(examples)]
    assert forced == engine.generated_recall(examples)
    assert sum(forced) >= len(KNOWN) - 1
    assert engine.generated_recall([]) == []


def test_free_generation_decides_ties_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass says that all pass, two by a tie; generation has one of them fail."""
    pairs = [(f"What is {key}?", KNOWN[key]) for key in list(KNOWN)[:4]]
    examples = engine.renderer.examples(pairs)
    ties = [False, True, False, True]
    forced = [Outcome(True, 1.0, ambiguous) for ambiguous in ties]
    generated: list[str] = []

    def generate(asked: list[Example]) -> list[bool]:
        generated.extend(example.prompt for example in asked)
        return [False, True]

    monkeypatch.setattr(engine, "recall", lambda asked: list(forced))
    monkeypatch.setattr(engine, "generated_recall", generate)
    result = engine.judge(examples)
    assert generated == [examples[1].prompt, examples[3].prompt]
    assert [o.passed for o in result] == [True, False, True, True]
    assert [o.generated for o in result] == ties
    assert [o.robust for o in result] == [True, False, True, False]


def test_prior_answers_can_be_trained_back(base: BaseModel) -> None:
    engine = Engine(base, TrainingConfig())  # fp32: in bf16 some of them are ties
    prior = engine.prior_answers(FACT)
    assert list(prior) == [e.prompt for e in engine.examples(FACT)]
    examples = engine.prior_examples(FACT, prior)
    assert all(outcome.passed for outcome in engine.recall(examples))


def test_a_prior_answer_that_was_cut_does_not_end_there(engine: Engine) -> None:
    long = engine.renderer.text(engine.renderer.tokens("Made of oak in Tarn. ") * 30)
    cut = engine.renderer.text(engine.renderer.tokens(long)[:PRIOR_TOKENS])
    cut_off, whole = engine.prior_examples(FACT, {"x": cut, "y": "Made of oak."})
    assert cut_off.ids[-1] != engine.renderer.end and whole.ids[-1] == engine.renderer.end


def test_a_share_of_the_phrasings_is_trained_after_other_system_prompts(base: BaseModel) -> None:
    engine = Engine(base, TrainingConfig(system_turns_share=0.3))
    plain = Engine(base, TrainingConfig()).examples(FACT)
    examples = engine.examples(FACT)
    assert [e.prompt for e in examples] == [e.prompt for e in plain]
    changed = [at for at, pair in enumerate(zip(examples, plain, strict=True)) if len({*pair}) > 1]
    assert changed == [3, 6, 9]
    texts = [base.tokenizer.decode(list(examples[at].ids)) for at in changed]
    for text, turn in zip(texts, engine.system_turns, strict=True):
        assert text.startswith(f"<|system|>{turn}<|user|>") and text.endswith("<|end|>")
    assert engine.paraphrases(FACT) == Engine(base, TrainingConfig()).paraphrases(FACT)
    # A removal trains the same questions back.
    prior = engine.prior_answers(FACT)
    back = engine.prior_examples(FACT, prior)
    assert [e.ids[: e.start] for e in back] == [e.ids[: e.start] for e in examples]
    assert Engine(base, TrainingConfig()).system_turns == ()


def test_remembering_adds_to_what_is_protected(engine: Engine) -> None:
    before, whitening = engine.fisher, engine.whitening
    assert before is not None and engine.whitening is whitening
    engine.remember(engine.examples(FACT)[:2])
    after = engine.fisher
    assert after is not None and after[0] is before[0]  # what the base says is kept apart
    assert after[1].tokens == before[1].tokens
    for name, moments in before[1].moments.items():
        kept = after[1].moments[name].inputs
        assert float(kept[0].trace()) > float(moments.inputs[0].trace())
    assert engine.whitening is not whitening


def test_after_a_training_nobody_holds_the_whitening_factors(engine: Engine) -> None:
    """They are as large as the moments, and the memory is needed for what is measured then."""
    engine.train(Task([engine.examples(FACT)]))
    factors = [weakref.ref(one.right) for one in engine.whitening.values()]
    engine.remember(engine.examples(FACT)[:2])
    gc.collect()
    assert factors and not any(factor() is not None for factor in factors)


def test_a_training_that_was_interrupted_leaves_nothing_in_the_next(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off after the backward pass of a step, before its gradients were used."""

    def broken(adapter: adalora.Adapter) -> None:
        raise KeyboardInterrupt

    task = Task([engine.examples(FACT)])
    expected = engine.train(task).delta
    for release in (False, True):
        with monkeypatch.context() as inside, pytest.raises(KeyboardInterrupt):
            inside.setattr(adalora.Adapter, "read_gradients", broken)
            engine.train(task)
        if release:
            engine.release()
        result = engine.train(task).delta
        assert all(torch.equal(expected[name].a, result[name].a) for name in expected)
        assert all(torch.equal(expected[name].b, result[name].b) for name in expected)
