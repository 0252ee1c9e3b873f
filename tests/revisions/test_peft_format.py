"""A LoRA adapter as files: loaded, it is the sum of its terms; written twice, the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import KNOWN
from torch import Tensor

from kvedit.adapter.deltas import Factors
from kvedit.model import loading
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.model.targets import target_names
from kvedit.revisions.export import peft_format

RANK = 3


@pytest.fixture
def factors(base: BaseModel) -> dict[str, Factors]:
    """A change of every touched matrix, large enough to be seen in the logits."""
    drawn = torch.Generator().manual_seed(0)
    found = {}
    for name in target_names(base.model):
        out, width = base.model.get_submodule(name).weight.shape
        b, a = (torch.randn(s, generator=drawn) for s in ((out, RANK), (RANK, width)))
        found[name] = Factors(b * 0.1, a * 0.1)
    return found


def said(base: BaseModel, model: torch.nn.Module | None = None) -> Tensor:
    """The logits after a question, of the model or of what is given instead."""
    renderer = Renderer(base.tokenizer, context=base.context)
    (example,) = renderer.examples([(f"What is {next(iter(KNOWN))}?", "x")])
    with torch.no_grad():
        asked = model if model is not None else base.model
        logits: Tensor = asked(torch.tensor([example.ids])).logits
    return logits


def merged(base: BaseModel, factors: dict[str, Factors], rank: int) -> BaseModel:
    """The model with the first ``rank`` terms added to its weights."""
    with torch.no_grad():
        for name, own in factors.items():
            base.model.get_submodule(name).weight += own.b[:, :rank] @ own.a[:rank]
    return base


@pytest.mark.parametrize("rank", [RANK, 1, 0])
def test_loaded_it_is_the_sum_of_its_first_terms(
    base: BaseModel, factors: dict[str, Factors], rank: int, tmp_path: Path
) -> None:
    before = said(base)
    peft_format.write(tmp_path, factors, base=base.path, conv=False)
    wrapped = peft_format.load(loading.reload(base).model, tmp_path)
    peft_format.cut(wrapped.base_model.model, factors, rank)
    answer = said(base, wrapped)
    torch.testing.assert_close(answer, said(merged(base, factors, rank)), atol=1e-4, rtol=1e-4)
    assert torch.allclose(answer, before, atol=1e-3) == (rank == 0)


def test_what_is_loaded_is_asked_and_not_trained(
    base: BaseModel, factors: dict[str, Factors], tmp_path: Path
) -> None:
    peft_format.write(tmp_path, factors, base=base.path, conv=False)
    wrapped = peft_format.load(loading.reload(base).model, tmp_path)
    assert not wrapped.training
    assert not any(p.requires_grad for n, p in wrapped.named_parameters() if "lora_" in n)


def test_the_same_factors_are_the_same_bytes(factors: dict[str, Factors], tmp_path: Path) -> None:
    turned = dict(reversed(factors.items()))
    for folder, own in (("one", factors), ("two", factors), ("turned", turned)):
        peft_format.write(tmp_path / folder, own, base="base", conv=False)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    for name in names:
        first = (tmp_path / "one" / name).read_bytes()
        assert first == (tmp_path / "two" / name).read_bytes()
        assert first == (tmp_path / "turned" / name).read_bytes()
