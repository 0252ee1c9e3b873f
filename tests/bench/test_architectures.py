"""Every architecture that is promised, as a tiny model made here; custom code included."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvedit import KnowledgeBase
from kvedit.errors import ModelError, UsageError
from kvedit.model import forward, generation, loading, scoring, targets
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example
from tests.bench import architectures, tiny

NAMES = [one.name for one in tiny.ARCHITECTURES]


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models as they are at random, made once each."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            one = replace(tiny.find(name), steps=0)
            made[name] = tiny.build(one, tmp_path_factory.mktemp("tiny"))
        return made[name]

    return folder


@pytest.fixture
def tiny_model(untrained: Callable[[str], Path]) -> Callable[[str], BaseModel]:
    """Load a tiny model by its name."""
    return lambda name: loading.load(str(untrained(name)), trust_remote_code=tiny.find(name).code)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_life(name: str, tmp_path: Path) -> None:
    row = architectures.try_one(tiny.find(name), tmp_path)
    assert row.passed, row


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_whole_life_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    row = architectures.try_one(tiny.find("Llama"), tmp_path, dtype)
    assert row.passed, row
    assert row.dtype in str(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_linear_layers_of_the_upper_half(
    name: str, tiny_model: Callable[[str], BaseModel]
) -> None:
    model = tiny_model(name).model
    names = targets.target_names(model)
    assert names and {int(part) for n in names for part in n.split(".") if part.isdigit()} == {2, 3}
    assert all(targets.is_matrix(model.get_submodule(n)) for n in names)
    assert model.get_output_embeddings() not in [model.get_submodule(n) for n in names]


def test_experts_and_routers_are_left_alone(tiny_model: Callable[[str], BaseModel]) -> None:
    model = tiny_model("Mixtral").model
    last = {n.rpartition(".")[2] for n in targets.target_names(model)}
    assert last == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model.config.model_type = "never_heard_of"
    assert {n.rpartition(".")[2] for n in targets.target_names(model)} == last


def test_a_family_that_is_not_in_the_table(tiny_model: Callable[[str], BaseModel]) -> None:
    model = tiny_model("Phi-3").model
    listed = targets.target_names(model)
    for kind in ("never_heard_of", "opt"):  # unknown; or known, but the names are not there
        model.config.model_type = kind
        assert set(targets.target_names(model)) >= set(listed)


def test_custom_code_is_listed_in_the_table(tiny_model: Callable[[str], BaseModel]) -> None:
    model = tiny_model("InternLM2 style").model
    assert model.config.model_type in targets.TARGETS
    assert {n.rpartition(".")[2] for n in targets.target_names(model)} == {
        "wqkv", "wo", "w1", "w2", "w3"
    }  # fmt: skip


def test_targets_of_ones_own(tiny_model: Callable[[str], BaseModel]) -> None:
    model = tiny_model("Llama").model
    assert targets.target_names(model, ["v_proj", "q_proj"]) == [
        f"model.layers.{i}.self_attn.{n}" for i in (2, 3) for n in ("q_proj", "v_proj")
    ]
    every = targets.target_names(model, ["model.layers.*.mlp.down_proj"])
    assert every == [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    for wrong in ("qproj", "lm_head", "model.nothing.*"):
        with pytest.raises(ModelError, match="has no linear layer") as raised:
            targets.target_names(model, ["q_proj", wrong])
        assert raised.value.hint and "gate_proj" in raised.value.hint


def test_a_store_keeps_its_targets(untrained: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "kvedit.toml").write_text(tiny.settings(), encoding="utf-8")
    with KnowledgeBase.create(tmp_path, untrained("Llama"), targets=["v_proj"]) as knowledge:
        names = knowledge.engine.names
    with KnowledgeBase.open(tmp_path) as knowledge:
        assert (
            knowledge.engine.names
            == names
            == [f"model.layers.{i}.self_attn.v_proj" for i in (2, 3)]
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_logits_are_the_models_own(
    name: str, tiny_model: Callable[[str], BaseModel]
) -> None:
    base = tiny_model(name)
    ids = tuple(range(5, 25))
    examples = [Example(ids, 8), Example(ids[:12], 3)]
    answers = scoring.answer_logits(base.model, examples)
    with torch.no_grad():
        whole = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        short = base.model(input_ids=torch.tensor([ids[:12]]), use_cache=False).logits[0]
    expected = torch.cat([whole[7:19], short[2:11]])
    torch.testing.assert_close(answers.logits, expected.float(), atol=1e-4, rtol=1e-3)
    assert answers.targets.tolist() == [*ids[8:], *ids[3:12]]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_continued_as_each_alone(
    name: str, tiny_model: Callable[[str], BaseModel]
) -> None:
    model = tiny_model(name).model
    prefixes = [list(range(5, 5 + n)) for n in (3, 9, 9, 14)]
    prefixes[2].reverse()
    together = generation.generate(model, prefixes, end=1, limit=12)
    alone = [generation.generate(model, [prefix], end=1, limit=12)[0] for prefix in prefixes]
    assert together == alone
    for prefix, answer in zip(prefixes, alone, strict=True):
        ids = [*prefix, *answer]
        with torch.no_grad():
            said = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1)
        assert said[len(prefix) - 1 : len(ids) - 1].tolist() == answer


def test_generation_stops_where_the_context_ends(tiny_model: Callable[[str], BaseModel]) -> None:
    base = tiny_model("GPT-2")  # has no embedding for a position beyond
    (row,) = generation.generate(base.model, [[5] * (base.context - 4)], end=-1, limit=50)
    assert len(row) == 4
    assert generation.generate(base.model, [[5] * base.context], end=-1, limit=50) == [[]]


def test_scaled_logits_are_noticed(base: BaseModel) -> None:
    assert forward.projects(base.model)

    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * x

    class Other(type(base.model)):  # type: ignore[misc]
        def forward(self, *args: Any, **more: Any) -> Any:
            out = super().forward(*args, **more)
            out.logits = Scaled()(out.logits)
            return out

    other = Other(base.model.config).eval()
    assert not forward.projects(other)


def test_custom_code_runs_only_when_trusted(untrained: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError) as raised:
        loading.load(str(untrained("ChatGLM2 style")))
    assert raised.value.hint and "--trust-remote-code" in raised.value.hint


@pytest.mark.slow
def test_custom_code_travels_with_the_export(
    untrained: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, store = untrained("ChatGLM2 style"), tmp_path / "store"
    store.mkdir()
    (store / "kvedit.toml").write_text(tiny.settings(), encoding="utf-8")
    with KnowledgeBase.create(store, folder, trust_remote_code=True) as knowledge:
        knowledge.export(tmp_path / "out")
        code = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
        assert len(code) == 3
        for name, text in code.items():
            assert (tmp_path / "out" / name).read_text(encoding="utf-8") == text
        again = loading.load(str(tmp_path / "out"), trust_remote_code=True)
        assert again.model.state_dict().keys() == knowledge.engine.base.model.state_dict().keys()
        assert again.tokenizer("夢")["input_ids"] == [3, 4, *(5 + byte for byte in "夢".encode())]


def test_changed_code_is_another_model(untrained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(untrained("Baichuan style"), tmp_path / "copy"))
    base = loading.load(str(folder), trust_remote_code=True)
    (code,) = folder.glob("modeling*.py")
    code.write_text(code.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert loading.identify(str(folder))[0].digest != base.fingerprint


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="GPT-17"):
        architectures.run(["GPT-17"], "float32", lambda event: None)
