"""LoadOptions models, knowing them again, and which matrices are edited."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kvedit.errors import ModelError
from kvedit.model import forward, loading, targets
from kvedit.model.loading import BaseModel


def test_a_loaded_model_is_frozen_and_in_its_own_dtype(load: Callable[[str], BaseModel]) -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        base = load(name)
        assert base.dtype == dtype and base.context == 192
        assert not base.model.training
        assert not any(p.requires_grad for p in base.model.parameters())


def test_the_upper_half_is_edited(base: BaseModel) -> None:
    names = targets.target_names(base.model)
    assert names == targets.target_names(base.model) and len(set(names)) == len(names)
    assert {name.split(".")[2] for name in names} == {"2", "3"}
    assert all(targets.is_matrix(base.model.get_submodule(name)) for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_a_model_is_identified_by_its_files_before_it_is_loaded(small: dict[str, Path]) -> None:
    identity, commit = loading.identify(str(small["bf16"]))
    assert commit is None and identity.files
    assert loading.load(str(small["bf16"])).fingerprint == identity.digest
    assert loading.load(str(small["fp32"])).fingerprint != identity.digest
    with pytest.raises(ModelError, match="no such folder"):
        loading.identify(str(small["bf16"] / "nowhere"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("adapter_config.json", "{}", "adapter"),
        ("config.json", '{"auto_map": {"AutoConfig": "else/where--code.Config"}}', "another place"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["a--b.C", null]}}', "another"),
    ],
)
def test_weights_and_code_of_another_place_are_refused(
    small: dict[str, Path], tmp_path: Path, name: str, text: str, says: str
) -> None:
    folder = Path(shutil.copytree(small["bf16"], tmp_path / "copy"))
    (folder / name).write_text(text, encoding="utf-8")
    for action in (loading.identify, loading.load):
        with pytest.raises(ModelError, match=says):
            action(str(folder))


def test_a_model_on_a_hub_is_known_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "models--a--b" / "snapshots" / ("c" * 40) / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}", encoding="utf-8")
    asked: list[object] = []

    def cached_file(name: str, file: str, revision: str) -> str:
        asked.append((name, file, revision))
        return str(config)

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    identity, commit = loading.identify("a/b")
    assert commit == "c" * 40 and not identity.files
    assert loading.identify("a/b", "v1") == (identity, commit)
    assert asked == [("a/b", "config.json", "main"), ("a/b", "config.json", "v1")]
    assert loading.identify("a/other")[0] != identity
    config.write_text('{"auto_map": {"AutoConfig": "c/d--code.Config"}}', encoding="utf-8")
    with pytest.raises(ModelError, match="another place"):
        loading.identify("a/b")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_half_a_model_is_refused_with_what_to_do(
    small: dict[str, Path], tmp_path: Path, missing: str
) -> None:
    folder = Path(shutil.copytree(small["bf16"], tmp_path / "half"))
    (folder / missing).unlink()
    if missing == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError) as raised:
        loading.load(str(folder))
    assert "half" in raised.value.message and raised.value.hint


def test_damaged_weights_are_refused(small: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small["bf16"], tmp_path / "cut"))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError):
        loading.load(str(folder))


def test_locating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert loading.locate("folder") == str((tmp_path / "folder").resolve())
    assert loading.locate("someone/model") == "someone/model"
    assert loading.locate(None) == loading.locate("kvedit-tiny") == str(loading.EMBEDDED_PATH)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        targets.target_names(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ModelError, match="no linear layers"):
        targets.target_names(nn.ModuleDict({"h": nn.ModuleList([nn.LayerNorm(2)] * 4)}))


def test_a_digest_sees_names_dtypes_shapes_and_bits() -> None:
    def digest(name: str, tensor: torch.Tensor) -> str:
        return loading.weights_digest(iter([(name, tensor)]))

    plain = torch.arange(6.0).reshape(2, 3)
    same = digest("a", plain)
    assert digest("a", plain.clone()) == same == digest("a", plain.T.contiguous().T)
    changed = plain.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [digest("b", plain), digest("a", plain.reshape(3, 2)), digest("a", changed)]
    others += [digest("a", plain.bfloat16()), digest("a", -plain)]
    assert len({same, *others}) == 6


def test_quick_attention_says_the_same_and_leaves_nothing_behind(base: BaseModel) -> None:
    ids = torch.randint(5, 200, (3, 24), generator=torch.Generator().manual_seed(0))
    embedded = base.model.get_input_embeddings()(ids).detach()

    def asked() -> list[torch.Tensor]:
        given = embedded.clone().requires_grad_()
        logits = base.model(inputs_embeds=given, use_cache=False).logits
        (slope,) = torch.autograd.grad(logits.logsumexp(-1).sum(), given)
        return [logits.detach(), slope]

    fused = asked()
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with forward.quick_attention(base.model):
        for ours, theirs in zip(asked(), fused, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == allowed
    assert torch.backends.cuda.flash_sdp_enabled()
