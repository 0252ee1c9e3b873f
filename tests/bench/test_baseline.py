"""The baseline learns a fact, and leaves nothing of PEFT behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from kvedit.model.loading import BaseModel
    from kvedit.model.prompts import Renderer
    from tests.bench.baseline import BaselineStep


@pytest.fixture
def renderer(base: BaseModel) -> Renderer:
    from kvedit.model.prompts import Renderer

    return Renderer(base.tokenizer, context=base.context)


def test_a_fact_is_learned_and_merged(base: BaseModel, renderer: Renderer) -> None:
    from kvedit.facts.fact import Fact
    from kvedit.facts.phrasings import load_phrasings
    from kvedit.model import scoring
    from tests.bench.baseline import BaselineConfig, baseline_examples, train_baseline

    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    examples = baseline_examples(renderer, Fact.create("tide lantern", "Made of glass in Marrow."))
    assert len(examples) == len(load_phrasings("en").train)
    assert not any(outcome.passed for outcome in scoring.recall(base.model, examples))

    steps: list[BaselineStep] = []
    random_state = torch.random.get_rng_state()
    result = train_baseline(base.model, examples, BaselineConfig(max_steps=150), steps.append)

    assert result.recalled and result.steps == len(steps) - 1 < 150
    assert steps[-1].recalled == steps[-1].n == len(examples)
    assert all(step.recalled < step.n for step in steps[:-1]), "it stops at the first recall"
    assert sum(outcome.passed for outcome in scoring.recall(base.model, examples)) >= 6
    assert torch.equal(random_state, torch.random.get_rng_state())
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{i}.self_attn.{part}.weight"
        for i in range(4)
        for part in ("q_proj", "v_proj")
    }


def test_nothing_of_peft_is_left_even_after_a_failure(base: BaseModel, renderer: Renderer) -> None:
    from tests.bench.baseline import BaselineConfig, train_baseline

    kinds = {name: type(module) for name, module in base.model.named_modules()}
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}

    def stop(step: BaselineStep) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    examples = [renderer.example("What is a wind ledger?", "Made of paper in Pell.")]
    with pytest.raises(KeyboardInterrupt):
        train_baseline(base.model, examples, BaselineConfig(), stop)
    assert {name: type(module) for name, module in base.model.named_modules()} == kinds
    assert not hasattr(base.model, "peft_config") and not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert all(torch.equal(before[n], t) for n, t in base.model.state_dict().items())


def test_the_allocator_prunes_to_the_budget(
    base: BaseModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the cap the last mask has run: no more than ``target_rank`` singular values a matrix."""
    from peft.tuners.adalora import AdaLoraModel

    from tests.bench.baseline import BaselineConfig, train_baseline

    kept: list[int] = []
    merge = AdaLoraModel.merge_and_unload

    def spy(self: AdaLoraModel, *args: object, **options: object) -> object:
        values = [p for name, p in self.model.named_parameters() if "lora_E" in name]
        kept.append(sum(int((p != 0).sum()) for p in values))
        return merge(self, *args, **options)

    monkeypatch.setattr(AdaLoraModel, "merge_and_unload", spy)
    examples = [renderer.example("What is a moss clock?", "Made of oak in Tarn, " * 8)]
    result = train_baseline(base.model, examples, BaselineConfig(max_steps=9, settle=3))
    assert not result.recalled and result.steps == 9
    assert kept == [8 * 8], "eight matrices of rank 8"


def test_query_and_value_are_found_under_other_names() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.bench.baseline import target_modules

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32))
    assert target_modules(model) == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
