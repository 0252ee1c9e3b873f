"""Probes: what one forward pass says of recall is what greedy generation does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_decoding import greedy, renderer, slow_setup, texts
from small_model import KNOWN, phrasings

from kvedit.model import devices, generation, scoring
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example


@slow_setup
@given(prompt=texts, answer=texts, generated=st.booleans(), keep=st.integers(0, 12))
def test_one_forward_pass_decides_what_generation_does(
    base: BaseModel, prompt: str, answer: str, generated: bool, keep: int
) -> None:
    """Random answers are hardly ever recalled, so half are generated, complete or cut."""
    make = renderer(base)
    prefix = make.prefix(prompt)
    row = greedy(base, prefix, 24, make.end)
    if generated:
        tokens = [*row[:keep], make.end] if keep < 12 else [*row, make.end]
    else:
        tokens = [*make.tokens(answer), make.end]
    example = Example((*prefix, *tokens), len(prefix))
    [outcome] = scoring.recall(base.model, [example])
    again = greedy(base, prefix, len(tokens), make.end)
    assert outcome.passed == ((*again, make.end)[: len(tokens)] == tuple(tokens))
    assert outcome.passed == (outcome.margin > 0)


def test_known_answers_are_recalled_and_wrong_ones_are_not(base: BaseModel) -> None:
    make = renderer(base)
    pairs = [(f"What is {key}?", answer) for key, answer in KNOWN.items()]
    right = scoring.recall(base.model, make.examples(pairs))
    assert all(o.passed and o.margin > 0 for o in right)
    answers = [answer for _, answer in pairs]
    turned = zip(pairs, answers[1:] + answers[:1], strict=True)
    wrong = [make.example(prompt, other) for (prompt, answer), other in turned if answer != other]
    assert len(wrong) > 10
    assert not any(o.passed or o.margin > 0 for o in scoring.recall(base.model, wrong))


def test_an_answer_that_does_not_end_is_not_recalled(base: BaseModel) -> None:
    make = renderer(base)
    key, answer = next(iter(KNOWN.items()))
    cut = make.text(make.tokens(answer)[:3])
    ended = make.example(f"What is {key}?", cut)
    unended = make.example(f"What is {key}?", cut, ended=False)
    assert unended.ids == ended.ids[:-1]
    outcomes = scoring.recall(base.model, [ended, unended])
    assert [o.passed for o in outcomes] == [False, True]


def test_the_margin_is_the_smallest_of_its_tokens(base: BaseModel) -> None:
    make = renderer(base)
    example = make.example("What is amber lamp?", KNOWN["amber lamp"])
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([example.ids])).logits[0].float()
    token_margins = []
    for at in range(example.start, len(example.ids)):
        row = logits[at - 1].clone()
        target = float(row[example.ids[at]])
        row[example.ids[at]] = float("-inf")
        token_margins.append(target - float(row.max()))
    [outcome] = scoring.recall(base.model, [example])
    assert outcome.margin == pytest.approx(min(token_margins), abs=1e-4)


def test_a_tie_and_nan_are_not_recalled() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [float("nan"), 0.0, 0.0]])
    targets = torch.tensor([0, 0, 0])
    losses, token_margins = scoring.token_losses(logits, targets)
    scores = scoring.TokenScores(token_margins, torch.zeros(3), torch.tensor([0, 1, 2]), losses)
    assert scores.margins(4).tolist() == [0.0, 1.0, float("-inf"), float("inf")]
    assert [o.passed for o in scores.outcomes(3)] == [False, True, False]


def test_what_rounding_could_turn_is_ambiguous() -> None:
    """Four answers of two tokens: the weaker one decides, by its tolerance."""
    token_margins = torch.tensor([5.0, 0.6, 5.0, 0.4, 5.0, -0.4, 5.0, -0.6])
    tolerances = torch.full((8,), 0.5)
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    outcomes = scoring.TokenMargins(token_margins, tolerances, rows).outcomes(4)
    assert [o.passed for o in outcomes] == [True, True, False, False]
    assert [o.ambiguous for o in outcomes] == [False, True, True, False]
    assert [o.robust for o in outcomes] == [True, False, False, False]
    nan, lost = torch.tensor([float("nan")]), torch.tensor([float("-inf")])
    scores = scoring.TokenMargins(lost, nan, torch.tensor([0]))
    assert not scores.outcomes(1)[0].passed and not scores.outcomes(1)[0].ambiguous


def test_the_tolerance_is_that_of_the_dtype(load: Callable[[str], BaseModel]) -> None:
    logits = torch.tensor([16.0, -4.0])
    wide, narrow = (scoring.tie_tolerance(load(name).model, logits) for name in ("fp32", "bf16"))
    step = 0.125  # between 16 and the next number in bf16
    torch.testing.assert_close(narrow, scoring.TIE_TOLERANCE * torch.tensor([step, step / 4]))
    assert wide.max() < 1e-4


def test_robust_answers_are_the_same_in_every_batch(load: Callable[[str], BaseModel]) -> None:
    """In bf16, of answers some of which the model is not sure of: alone, together, with a cache."""
    base = load("bf16")
    make = renderer(base)
    asked = [way.replace("{key}", key) for way in phrasings()[::2] for key in list(KNOWN)]
    rows = generation.generate(base.model, [make.prefix(p) for p in asked], end=make.end, limit=24)
    examples = [
        Example((*make.prefix(p), *row, make.end), len(make.prefix(p)))
        for p, row in zip(asked, rows, strict=True)
    ]
    together = scoring.recall(base.model, examples)
    alone = [scoring.recall(base.model, [example])[0] for example in examples]
    assert all(o.passed or o.ambiguous for o in together), "what is generated is recalled"
    turned = [a for a, b in zip(together, alone, strict=True) if a.passed != b.passed]
    assert not any(outcome.robust for outcome in turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margins_without_losses_are_those_with_them(base: BaseModel, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 50, generator=generator).mul(3).round().to(dtype)  # with ties
    logits[7, 3] = float("nan")
    targets = logits.float().argmax(1)
    targets[::5] = 0
    rows = torch.arange(300) // 2
    _, token_margins = scoring.token_losses(logits, targets)
    expected = scoring.TokenMargins(token_margins, torch.zeros(300), rows).margins(151)
    assert (expected == 0).any() and (expected > 0).any() and expected[3] == float("-inf")
    margins = scoring._token_margins(base.model, scoring.Answers(logits.clone(), targets, rows))
    assert torch.equal(margins.margins(151), expected)
    target_logits = logits.gather(1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(
        margins.tolerances, scoring.tie_tolerance(base.model, target_logits), equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_are_cross_entropy(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 50, generator=generator).to(dtype)
    targets = torch.randint(50, (300,), generator=generator)
    penalty_gradients = torch.rand(300, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses, _ = scoring.token_losses(ours, targets)
    expected = torch.nn.functional.cross_entropy(theirs.float(), targets, reduction="none")
    (losses * penalty_gradients).sum().backward()
    (expected * penalty_gradients).sum().backward()
    assert torch.equal(logits, ours.detach())  # the table was not written to
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_company_in_a_batch_does_not_matter(base: BaseModel) -> None:
    make = renderer(base)
    pairs = [
        (way.replace("{key}", key), answer)
        for way, (key, answer) in zip(phrasings(), KNOWN.items(), strict=False)
    ]
    pairs += [("x", "Made of oak." * 9), ("What is tide lantern? " * 6, "y")]
    examples = make.examples(pairs)
    together = scoring.recall(base.model, examples)
    alone = [scoring.recall(base.model, [example])[0] for example in examples]
    for one, other in zip(together, alone, strict=True):
        assert one.passed == other.passed
        assert one.margin == pytest.approx(other.margin, abs=1e-3)


def test_batches_are_bounded_and_complete() -> None:
    examples = [Example(tuple(range(1 + i * 37 % 900)), 1) for i in range(400)]
    batches = list(scoring.by_length(examples))
    assert sorted(i for batch in batches for i in batch) == list(range(400))
    for batch in batches:
        width = max(len(examples[i].ids) for i in batch)
        assert len(batch) <= scoring.MAX_BATCH_ROWS
        assert len(batch) == 1 or len(batch) * width <= scoring.MAX_BATCH_TOKENS
    equal = list(scoring.by_length(examples, equal_width=True))
    assert sorted(i for batch in equal for i in batch) == list(range(400))
    for batch in equal:
        assert len({devices.padded_width(len(examples[i].ids)) for i in batch}) == 1
    assert list(scoring.by_length([])) == []
    assert scoring.recall(torch.nn.Linear(1, 1), []) == []


def test_probing_leaves_weights_and_gradients_alone(load: Callable[[str], BaseModel]) -> None:
    base = load("bf16")
    make = renderer(base)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    scoring.recall(base.model, make.examples([("amber", "lamp")]))
    generation.generate(base.model, [make.prefix("amber")], end=make.end, limit=4)
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
