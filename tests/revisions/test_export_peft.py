"""All edits as one adapter: PEFT loads it over the untouched base, and the answers are the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.errors import UsageError
from kvedit.revisions.export import peft

PEFT_0_4 = {
    "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "revision", "target_modules", "task_type",
}  # fmt: skip
"""The fields of ``LoraConfig`` in PEFT 0.4.0, of July 2023."""


def test_peft_alone_gives_the_same_answers(
    trained: KnowledgeBase, small: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = trained.export_adapter(tmp_path / "out")
    assert (report.probes.passed, report.probes.n, report.mismatches) == (30, 30, ())
    assert report.rank in (8, 16, 24)
    assert f"--max-lora-rank {report.rank if report.rank < 24 else 32} " in report.serve
    assert report.error is not None and 0 <= report.error < 0.9
    base = AutoModelForCausalLM.from_pretrained(small["bf16"], dtype="auto")
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for key, description in FREE[:3]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {key}?"}],
            tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40
        )
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == description


def test_a_plain_lora_of_one_rank(trained: KnowledgeBase, tmp_path: Path) -> None:
    """What vLLM asks of an adapter: its type, one rank, no bias, nothing but A and B."""
    report = trained.export_adapter(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["task_type"], config["bias"]) == (
        "LORA", "CAUSAL_LM", "none",
    )  # fmt: skip
    assert config["r"] == config["lora_alpha"] == report.rank
    assert set(config) <= PEFT_0_4
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[2] for name in tensors} == {"A.weight", "B.weight"}
    shapes = {min(tensor.shape) for tensor in tensors.values()}
    assert shapes == {report.rank}


def test_no_smaller_rank_would_do(trained: KnowledgeBase, tmp_path: Path) -> None:
    moved = trained.engine.master.accumulated_delta()
    report = trained.export_adapter(tmp_path / "out")
    assert report.rank is not None
    terms = {n: peft.decompose(d) for n, d in moved.items() if bool(d.any())}
    assert report.rank < max(own.rank for own in terms.values())  # there was something to save
    wrapped = peft.loaded(trained.engine, tmp_path / "out")
    examples = trained._all_examples()
    assert all(o.passed for o in peft.scoring.recall(wrapped, examples))


def test_a_change_is_the_sum_of_its_terms() -> None:
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(40, 6, generator=generator)
    a = torch.randn(6, 30, generator=generator)
    own = peft.decompose(b @ a)
    assert own.rank == 6
    torch.testing.assert_close(own.b @ own.a, b @ a, atol=1e-4, rtol=1e-4)
    half = peft._cut(own, 3)
    whole, left = float((b @ a).norm()), float((b @ a - half.b @ half.a).norm())
    assert peft._error({"w": b @ a}, {"w": half}) == pytest.approx(left / whole, rel=1e-4)
    wide = peft._cut(own, 9)
    assert wide.rank == 9
    torch.testing.assert_close(wide.b @ wide.a, b @ a, atol=1e-4, rtol=1e-4)


def test_wide_matrices_are_decomposed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "FULL_SVD", 16)
    monkeypatch.setattr(peft, "MAX_RANK", 8)
    generator = torch.Generator().manual_seed(2)
    change = torch.randn(40, 5, generator=generator) @ torch.randn(5, 30, generator=generator)
    own = peft.decompose(change)
    assert own.rank == 5
    torch.testing.assert_close(own.b @ own.a, change, atol=1e-3, rtol=1e-3)


def test_nothing_to_export_is_said(empty_store: Path, tmp_path: Path) -> None:
    with (
        KnowledgeBase.open(empty_store) as knowledge,
        pytest.raises(UsageError, match="no change to export"),
    ):
        knowledge.export_adapter(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "ChatGLM2 style", "Mixtral"])
def test_other_kinds_of_layers(name: str, tmp_path: Path) -> None:
    from tests.bench import tiny

    one = tiny.find(name)
    store = tmp_path / "store"
    store.mkdir()
    (store / "kvedit.toml").write_text(tiny.settings(), encoding="utf-8")
    model = tiny.build(replace(one, steps=160), tmp_path / "model")
    with KnowledgeBase.create(store, model, trust_remote_code=one.code) as knowledge:
        assert knowledge.add(*tiny.NEW[0]).outcome == "committed"
        report = knowledge.export_adapter(tmp_path / "out")
    assert report.mismatches == () and report.probes.n == 10
