"""Base models in 4 and 8 bits: edited layers are dequantized, the others stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_engine import make_engine
from small_model import FREE, settings
from torch import Tensor, nn

from kvedit import KnowledgeBase
from kvedit.config import TrainingConfig
from kvedit.errors import ModelError, ModelMismatchError, UsageError
from kvedit.facts.fact import Fact
from kvedit.model import loading, quantization, targets
from kvedit.model.loading import BaseModel
from kvedit.training import memory
from kvedit.training.loops.loop import Task

FACT = Fact.create(*FREE[0], lang="en")


class Linear8bitLt(nn.Linear):
    """As in bitsandbytes: integers from -127 to 127, and a scale for each row."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        weight = plain.weight.float()
        scales = weight.abs().amax(1)
        codes = (weight / scales[:, None] * 127).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.SCB = scales  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() * (self.weight.SCB[:, None] / 127)  # type: ignore[operator]
        return x @ weight.to(x.dtype).T


@pytest.fixture
def quantized(load: Callable[[str], BaseModel]) -> BaseModel:
    """The small model, every linear layer but the head quantized to 8 bits by this file's class."""
    base = load("bf16")
    for name in targets.matrices(base.model):
        parent, _, last = name.rpartition(".")
        plain: Any = base.model.get_submodule(name)
        setattr(base.model.get_submodule(parent), last, Linear8bitLt(plain))
    base.model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return base


def test_only_edited_layers_are_dequantized(quantized: BaseModel) -> None:
    ids = torch.arange(9, 41)[None]
    before = quantized.model(input_ids=ids).logits
    names = targets.target_names(quantized.model)
    below = quantized.model.get_submodule("model.layers.0.mlp.up_proj")
    quantization.dequantize(quantized.model, names)
    for name in targets.matrices(quantized.model):
        layer: Any = quantized.model.get_submodule(name)
        assert (type(layer) is nn.Linear) == (name in names)
        assert layer.weight.dtype == (torch.bfloat16 if name in names else torch.int8)
    assert quantized.model.get_submodule("model.layers.0.mlp.up_proj") is below
    assert torch.equal(quantized.model(input_ids=ids).logits, before)
    quantization.dequantize(quantized.model, names)  # nothing is left to do
    assert torch.equal(quantized.model(input_ids=ids).logits, before)


def test_a_quantized_base_is_trained_and_restored(quantized: BaseModel) -> None:
    engine = make_engine(quantized)
    weight = engine.base.model.get_submodule("model.layers.1.mlp.up_proj").weight.clone()
    before, digest = engine.master.snapshot(), engine.master.digest()
    result = engine.train(Task([engine.examples(FACT)]))
    engine.master.add(result.delta)
    assert result.trained.learned
    assert all(outcome.passed for outcome in engine.recall(engine.examples(FACT)))
    assert engine.generate(["What is tide lantern?"], limit=32) == [FACT.description]
    engine.master.restore(before)
    assert engine.master.digest() == digest
    assert torch.equal(engine.base.model.get_submodule("model.layers.1.mlp.up_proj").weight, weight)


def test_quantized_layers_take_less_memory(base: BaseModel) -> None:
    config = TrainingConfig()
    plain = memory.Sizes(base.model).estimate(config)
    sizes = [plain.weights]
    for bits in (8.0, 4.5):
        estimate = memory.Sizes(base.model, bits=bits).estimate(config)
        assert estimate.master == plain.master and estimate.fisher == plain.fisher
        sizes.append(estimate.weights)
    below = [n for n in targets.matrices(base.model) if n not in targets.target_names(base.model)]
    count = sum(base.model.get_submodule(name).weight.numel() for name in below)
    assert sizes[0] - sizes[1] == count * 3 and sizes[0] - sizes[2] == int(count * (4 - 4.5 / 8))


def test_bits_of_a_weight(base: BaseModel) -> None:
    config = base.model.config
    assert quantization.bits(config, "") is None and quantization.method(base.model) == ""
    assert (quantization.bits(config, "4bit"), quantization.bits(config, "8bit")) == (4.5, 8.0)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert (
        quantization.bits(config, "") == 4.5 and quantization.method(base.model) == "bitsandbytes"
    )


def test_other_methods_are_refused_with_a_hint(base: BaseModel) -> None:
    quantization.refuse_unknown("some/model", base.model)
    base.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="gptq") as raised:
        quantization.refuse_unknown("some/model", base.model)
    assert "--format peft" in raised.value.hint
    with pytest.raises(ModelError, match="3bit"):
        quantization.options("some/model", "3bit")


# ---- with bitsandbytes


@pytest.fixture(params=["4bit", "8bit"])
def store(request: pytest.FixtureRequest, small: dict[str, Path], tmp_path: Path) -> Path:
    """A store for the small model, quantized by bitsandbytes while it is loaded."""
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "store"
    path.mkdir()
    (path / "kvedit.toml").write_text(settings(), encoding="utf-8")
    KnowledgeBase.create(path, small["bf16"], load_in=request.param).close()
    return path


def test_a_bitsandbytes_base_is_edited_asked_verified_and_rolled_back(
    store: Path, tmp_path: Path
) -> None:
    with KnowledgeBase.open(store) as knowledge:
        model = knowledge.engine.base.model
        assert quantization.method(model) == "bitsandbytes"
        below: Any = model.get_submodule("model.layers.0.mlp.up_proj")
        assert type(below).__name__.startswith("Linear") and type(below) is not nn.Linear
        report = knowledge.add(*FREE[0])
        assert report.outcome == "committed", report.reasons
        group = knowledge.add_group([Fact.create(*pair) for pair in FREE[1:3]])
        assert group[0].outcome == "committed"
        digest = knowledge.engine.master.digest()
    with KnowledgeBase.open(store) as knowledge:  # quantized the same way again
        assert knowledge.engine.master.digest() == digest
        assert knowledge.ask(f"What is {FREE[0][0]}?") == FREE[0][1]
        verified = knowledge.verify()
        assert verified.generated.passed == verified.generated.n >= 2
        with pytest.raises(UsageError, match="quantized") as raised:
            knowledge.export(tmp_path / "export")
        assert "--format peft" in raised.value.hint and not (tmp_path / "export").exists()
        adapter = knowledge.export_adapter(tmp_path / "adapter")
        assert adapter.probes.n and adapter.probes.passed >= adapter.probes.n - 1
        knowledge.rollback(0)
        assert knowledge.engine.master.digest() == knowledge.store.revision(0).weights_digest
        assert {finding.level for finding in knowledge.doctor()} == {"ok"}
    text = (store / "kvedit.toml").read_text(encoding="utf-8")
    (store / "kvedit.toml").write_text(text + "[model]\nload_in = '2bit'\n", encoding="utf-8")
    with pytest.raises(ModelMismatchError, match="2bit"):
        KnowledgeBase.open(store)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_of_quantized_weights(small: dict[str, Path], tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = loading.load(str(small["bf16"]), load_in=f"{bits}bit")
    quantized.model.save_pretrained(tmp_path / "quantized")
    quantized.tokenizer.save_pretrained(tmp_path / "quantized")
    again = loading.load(str(tmp_path / "quantized"))
    outline = loading.outline(str(tmp_path / "quantized"), revision=None, trust_remote_code=False)
    assert quantization.bits(outline.config, "") == (4.5 if bits == 4 else 8.0)
    names = targets.target_names(again.model)
    for base in (quantized, again):
        quantization.dequantize(base.model, names)
    for name in names:
        one, other = (b.model.get_submodule(name).weight for b in (quantized, again))
        assert torch.equal(one, other) and one.dtype == again.dtype == torch.bfloat16
    engine = make_engine(again)
    result = engine.train(Task([engine.examples(FACT)]))
    engine.master.add(result.delta)
    assert all(outcome.passed for outcome in engine.recall(engine.examples(FACT)))


def test_without_bitsandbytes(small: dict[str, Path]) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ModelError, match="bitsandbytes"):
            loading.load(str(small["bf16"]), load_in="4bit")
