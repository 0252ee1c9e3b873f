"""The table at the end of an export: what is recalled where the model is asked otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.model import generation
from kvedit.revisions.export import conditions, hf, rounding

NAMES = (
    "as trained", "another system prompt", "an empty system prompt", "no template",
    "weights in 8 bits (Q8_0)", "weights in 4 bits (Q4_0)",
)  # fmt: skip


def test_every_condition_is_asked_of_every_fact(trained: KnowledgeBase, tmp_path: Path) -> None:
    report = trained.export(tmp_path / "out")
    assert tuple(row.name for row in report.conditions) == NAMES
    assert all(row.score.n == 3 for row in report.conditions)
    first, *others = report.conditions
    assert (first.score.passed, first.lost) == (3, ())
    for row in others:
        assert len(row.lost) == 3 - row.score.passed
        assert set(row.lost) <= {key for key, _ in FREE[:3]}
    assert report.serve == f"transformers serve {tmp_path / 'out'}"
    # Without a template: the question, a line break, and what the model writes then.
    engine, model = trained.engine, hf.loaded(trained.engine, tmp_path / "out")
    examples = [engine.examples(row.fact)[0] for row in trained.store.facts("committed")]
    asked = [engine.renderer.tokens(f"{example.prompt}\n") for example in examples]
    said = generation.generate(model, asked, end=engine.renderer.end, limit=40)
    right = [engine.renderer.text(ids) == e.answer for ids, e in zip(said, examples, strict=True)]
    assert sum(right) == report.conditions[3].score.passed


def test_facts_below_the_rounding_are_named(
    trained: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "q4_0", lambda weight: weight.float() * 0)
    report = trained.export_adapter(tmp_path / "out")
    eight, four = report.conditions[-2:]
    assert eight.score.passed == 3 and four.score.passed == 0
    assert four.lost == tuple(key for key, _ in FREE[:3])


def test_a_template_that_takes_no_system_prompt_is_not_asked(trained: KnowledgeBase) -> None:
    tokenizer = trained.engine.base.tokenizer
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    facts = [row.fact for row in trained.store.facts("committed")]
    rows = conditions.measure(trained.engine, facts, lambda: trained.engine.base.model)[:4]
    assert [row.score.n for row in rows] == [3, 0, 0, 3]
    assert conditions.measure(trained.engine, [], lambda: None) == ()
