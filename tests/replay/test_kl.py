"""Reference texts of the base model and the KL divergence from it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from small_model import FREE, KNOWN
from torch.nn import functional

from kvedit.facts.fact import Fact
from kvedit.model import forward
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import answer_logits, batch_scores
from kvedit.replay.kl import CAUCHY_SCALE, ReferenceTexts, robust_mean
from kvedit.training.engine import Engine
from kvedit.training.loops.loop import Task


@pytest.fixture
def texts(base: BaseModel) -> list[Example]:
    make = Renderer(base.tokenizer, context=base.context)
    return make.examples((f"What is {key}?", answer) for key, answer in KNOWN.items())


def test_the_base_model_has_no_divergence(base: BaseModel, texts: list[Example]) -> None:
    reference_texts = ReferenceTexts.measure(base.model, texts)
    assert len(reference_texts) == len(texts)
    assert float(
        reference_texts.divergences(base.model, range(len(texts))).mean()
    ) == pytest.approx(0, abs=1e-4)


def test_the_divergence_is_kl_of_the_answer_tokens(engine: Engine) -> None:
    texts = engine.renderer.examples((f"What is {k}?", a) for k, a in list(KNOWN.items())[:5])
    model = engine.base.model
    reference_texts = ReferenceTexts.measure(model, texts, engine.worker.prefix_cache)
    before = answer_logits(model, texts).logits.detach()
    fact = [engine.examples(Fact.create(*FREE[0], lang="en"))]
    engine.master.add(engine.train(Task(fact)).delta)
    after = answer_logits(model, texts).logits.detach()
    theirs, ours = before.log_softmax(1), after.log_softmax(1)
    expected = functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    measured = reference_texts.divergences(
        model, range(len(texts)), engine.worker.prefix_cache
    ).mean()
    assert float(measured) == pytest.approx(float(expected), rel=0.1, abs=2e-3)
    assert float(measured) > 1e-4


def test_changed_tokens_do_not_drown_the_rest() -> None:
    little, much = torch.tensor(0.001, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    robust_mean(torch.stack([little, much])).backward()
    assert little.grad is not None and much.grad is not None
    assert float(little.grad) == pytest.approx(0.5, rel=0.02)  # half of two, as in a mean
    assert float(much.grad) == pytest.approx(0.5 * CAUCHY_SCALE / (CAUCHY_SCALE + 5))


def test_its_gradient_is_that_of_the_kl(base: BaseModel, texts: list[Example]) -> None:
    logits = torch.randn(200, 30, requires_grad=True)
    base_logits = torch.randn(200, 30)
    from kvedit.replay.kl import _Divergence

    ours = _Divergence.apply(logits, base_logits).sum()  # type: ignore[no-untyped-call]
    (gradient,) = torch.autograd.grad(ours, logits)
    again = logits.detach().clone().requires_grad_()
    expected = functional.kl_div(
        again.log_softmax(1), base_logits.log_softmax(1), log_target=True, reduction="sum"
    )
    (other,) = torch.autograd.grad(expected, again)
    torch.testing.assert_close(ours.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_texts_that_name_an_edited_key_are_left_out(base: BaseModel, texts: list[Example]) -> None:
    reference_texts = ReferenceTexts.measure(base.model, texts)
    name = texts[0].prompt.rstrip("?").split()[-1]
    naming = [text for text in texts if name in text.prompt]
    assert 0 < len(naming) < len(texts)
    assert len(reference_texts.without([name])) == len(texts) - len(naming)
    assert (
        len(reference_texts.without([])) == len(reference_texts.without([name[:-1]])) == len(texts)
    )


def test_a_model_whose_logits_are_no_projection_has_no_reference_texts(
    base: BaseModel, texts: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvedit.replay.kl.projects", lambda model: False)
    assert len(ReferenceTexts.measure(base.model, texts)) == 0
    assert forward.projects(base.model)


def test_a_teacher_that_reads_the_text_is_learned_from(engine: Engine) -> None:
    answer = next(iter(KNOWN.values()))
    question, label = engine.renderer.examples([("Of what is it?", answer), ("Where?", "in Tarn")])
    told = engine.renderer.example(f"What is {next(iter(KNOWN))}?", answer)  # it knows this answer
    model, make = engine.base.model, engine.renderer.example
    teacher = engine.teacher([(question, told)])
    examples = [label, question]
    plain = batch_scores(model, examples, [0, 1], None)
    taught = batch_scores(model, examples, [0, 1], None, partial(teacher.losses, model))
    of_question = plain.rows == 1
    assert torch.equal(taught.losses[~of_question], plain.losses[~of_question])
    assert torch.equal(taught.token_margins, plain.token_margins)
    theirs = answer_logits(model, [told]).logits.log_softmax(1)
    ours = answer_logits(model, [question]).logits.log_softmax(1)
    divergences = functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(1)
    targets = torch.tensor(question.ids[question.start :])
    expected = torch.where(theirs.argmax(1) == targets, divergences, plain.losses[of_question])
    torch.testing.assert_close(taught.losses[of_question], expected, rtol=0.05, atol=0.02)
    assert not torch.equal(taught.losses[of_question], plain.losses[of_question])
    # Who reads the same teaches nothing; a wrong answer is learned from its label.
    same = engine.teacher([(question, question)])
    losses = batch_scores(model, [question], [0], None, partial(same.losses, model)).losses
    wrong = make("Of what is it?", "zzz")
    by_label = engine.teacher([(wrong, wrong)])
    assert len(by_label) == 1 and float(losses.min()) == pytest.approx(0, abs=1e-3)
    told_off = batch_scores(model, [wrong], [0], None, partial(by_label.losses, model)).losses
    assert torch.equal(told_off[:1], batch_scores(model, [wrong], [0], None).losses[:1])
