"""A model spread over devices: trained, asked and undone like any other, or refused in plain words.

This machine has one device.  What accelerate's hooks do to the modules, and weights that are
fetched from the disk at need, are the same with more of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_engine import StoreTemplate
from small_model import FREE, KNOWN, settings
from torch import nn

from kvedit import KnowledgeBase
from kvedit.errors import ModelError
from kvedit.model import devices, loading

BELOW = {"model.layers.0": "disk", "model.layers.1": "disk"}
HERE = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
HERE |= {"model.rotary_emb": "cpu", "model.layers.2": "cpu", "model.layers.3": "cpu"}


@pytest.fixture
def spread(tmp_path: Path) -> Path:
    """A device map that leaves the blocks below the edited ones on the disk."""
    path = tmp_path / "map.json"
    path.write_text(json.dumps({**HERE, **BELOW}), encoding="utf-8")
    return path


def create(path: Path, model: Path, device_map: str = "", toml: str = "", **more: Any) -> Any:
    path.mkdir(exist_ok=True)
    (path / "kvedit.toml").write_text(settings() + toml, encoding="utf-8")
    return KnowledgeBase.create(path, model, device_map=device_map, **more)


def test_device_maps_as_they_are_given(tmp_path: Path) -> None:
    assert devices.read("auto") == "auto"
    assert devices.read("cpu") == {"": "cpu"} and devices.read("cuda:1") == {"": "cuda:1"}
    file = tmp_path / "map.json"
    file.write_text('{"model": 0, "lm_head": "cpu"}', encoding="utf-8")
    assert devices.read(str(file)) == {"model": 0, "lm_head": "cpu"}
    assert devices.absolute("map.json", tmp_path) == str(file)
    assert devices.absolute("auto", tmp_path) == "auto" and devices.absolute("", tmp_path) == ""
    for text in ("[]", "{}", '{"model": null}', "{"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match="device map") as raised:
            devices.read(str(file))
        assert "sequential" in raised.value.hint
    for name in ("everywhere", str(tmp_path / "none.json")):
        with pytest.raises(ModelError, match="device map"):
            devices.read(name)


def test_a_device_that_is_not_there(small: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({**HERE, "model.layers.0": "disk"}), encoding="utf-8")
    with pytest.raises(ModelError, match="no model can be loaded"):
        loading.load(str(small["fp32"]), device_map=str(file))  # a block is left out
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no model can be loaded"):
            loading.load(str(small["fp32"]), device_map="cuda:0")


def test_what_stands_in_for_a_forward_puts_back_what_was_there() -> None:
    plain, hooked = nn.Linear(1, 1), nn.Linear(1, 1)
    hook = hooked.forward = lambda x: x + 1  # type: ignore[method-assign,assignment,misc]
    seen = []

    def make(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        seen.append(forward)
        return lambda x: index

    with devices.replaced_forward([plain, hooked], make):
        assert (plain.forward(torch.zeros(1)), hooked.forward(torch.zeros(1))) == (0, 1)
    assert seen[1] is hook and hooked.forward is hook and "forward" not in vars(plain)
    with pytest.raises(KeyError), devices.replaced_forward([hooked], make):
        raise KeyError
    assert hooked.forward is hook


def test_a_model_on_the_disk_in_part_says_what_the_whole_one_says(
    small: dict[str, Path], spread: Path
) -> None:
    from kvedit.model import generation, scoring, targets
    from kvedit.model.prefix_cache import PrefixCache
    from kvedit.model.prompts import Renderer

    plain = loading.load(str(small["fp32"]))
    base = loading.load(str(small["fp32"]), device_map=str(spread))
    assert devices.is_spread(base.model) and not devices.is_spread(plain.model)
    assert base.model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert base.device.type == "cpu"
    renderer = Renderer(base.tokenizer, context=base.context, stops=base.stops)
    asked = renderer.examples([(f"What is {key}?", answer) for key, answer in KNOWN.items()])
    prefix_cache = PrefixCache(base.model, targets.target_names(base.model))
    expected = scoring.recall(plain.model, asked)
    for _ in range(2):  # the second time from the prefix cache
        assert scoring.recall(base.model, asked, prefix_cache) == expected
    assert prefix_cache.usable
    assert scoring.recall(base.model, asked) == expected
    prefixes = [example.ids[: example.start] for example in asked]
    rows = [generation.generate(one.model, prefixes, end=0, limit=16) for one in (plain, base)]
    assert rows[0] == rows[1]


def test_a_spread_model_is_trained_to_the_same_bits(
    small: dict[str, Path], spread: Path, trained_template: StoreTemplate, tmp_path: Path
) -> None:
    with create(tmp_path / "store", small["bf16"], str(spread)) as knowledge:
        assert knowledge.add(*FREE[0]).outcome == "committed"
        assert knowledge.engine.master.digest() == trained_template.digests[1]
    with KnowledgeBase.open(tmp_path / "store") as knowledge:  # the map is remembered
        assert devices.is_spread(knowledge.engine.base.model)
        assert knowledge.ask(f"What is {FREE[0][0]}?") == FREE[0][1]
        assert knowledge.verify().generated.passed == 1
        for write in (knowledge.export, knowledge.export_adapter):
            report = write(tmp_path / f"out-{write.__name__}")
            assert report.mismatches == () and report.probes.n
        knowledge.rollback(0)
        assert knowledge.engine.master.digest() == trained_template.digests[0]


def test_checkpointing_goes_with_hooks(
    small: dict[str, Path], spread: Path, tmp_path: Path
) -> None:
    toml = "[model]\ndevice_map = 'map.json'\n"
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "map.json").write_bytes(spread.read_bytes())
    with create(tmp_path / "store", small["bf16"], toml=toml) as knowledge:
        assert devices.is_spread(knowledge.engine.base.model)
        assert not knowledge.store.meta("device_map")
    text = (tmp_path / "store" / "kvedit.toml").read_text(encoding="utf-8")
    text = text.replace("[training]", "[training]\ngradient_checkpointing = true")
    (tmp_path / "store" / "kvedit.toml").write_text(text, encoding="utf-8")
    with KnowledgeBase.open(tmp_path / "store") as knowledge:
        assert knowledge.add(*FREE[0]).outcome == "committed"


def test_edited_matrices_may_not_be_offloaded(small: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({**HERE, **BELOW, "model.layers.3": "disk"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"7 of 14 matrices .* offloaded") as raised:
        create(tmp_path / "store", small["bf16"], str(file))
    assert "--targets" in raised.value.hint
    assert not (tmp_path / "store" / "kvedit.db").exists()
    targets = ["model.layers.2.mlp.*"]
    with create(tmp_path / "store", small["bf16"], str(file), targets=targets) as knowledge:
        knowledge.engine.protect(knowledge.engine.renderer.examples([("What is it?", "Oak.")]))
        assert {name.split(".")[2] for name in knowledge.engine.names} == {"2"}


def test_one_device_by_its_name(small: dict[str, Path]) -> None:
    base = loading.load(str(small["fp32"]), device_map="cpu")
    assert not devices.is_spread(base.model) and base.device.type == "cpu"
    assert loading.reload(base).loading == base.loading
