"""Blocks that several processes share: each holds less, and nothing comes out otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import FREE, settings

from kvedit.distributed.shards import Shards, _Block
from kvedit.errors import ModelError
from kvedit.model.loading import BaseModel
from tests.distributed.test_processes import kvedit, pair, run


def test_a_block_is_put_together_from_its_pieces() -> None:
    layer = torch.nn.Linear(7, 5).to(torch.bfloat16)
    norm = torch.nn.LayerNorm(3)  # another dtype, and lengths that fit nothing
    parameters = [*layer.parameters(), *norm.parameters()]
    wanted = [p.detach().clone() for p in parameters]
    pieces = []
    for rank in range(3):
        for parameter, value in zip(parameters, wanted, strict=True):
            parameter.data = value.clone()
        block = _Block(parameters, rank, 3)
        pieces.append(block.own)
        assert all(p.numel() == 0 for p in parameters)
    assert len({len(piece) for piece in pieces}) == 1
    block.fill(torch.cat(pieces))
    assert all(torch.equal(p, value) for p, value in zip(parameters, wanted, strict=True))


class Alone:
    """Stands for a crew whose other processes have nothing."""

    rank, count = 0, 2

    def lends(self, lend: Callable[[int], object]) -> None:
        """Nobody asks."""


def test_what_is_used_elsewhere_too_stays_whole(base: BaseModel) -> None:
    model, crew = base.model, Alone()
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[3].mlp.down_proj.weight
    Shards(crew, model, [layers[0], layers[1]])  # type: ignore[arg-type]
    assert layers[1].mlp.down_proj.weight.numel() > 0
    assert layers[1].mlp.up_proj.weight.numel() == layers[0].mlp.down_proj.weight.numel() == 0
    assert model.model.embed_tokens.weight.numel() > 0


def test_packed_weights_are_not_shared(base: BaseModel) -> None:
    layers = base.model.model.layers
    packed = torch.zeros(4, dtype=torch.uint8)
    layers[0].register_parameter("packed", torch.nn.Parameter(packed, requires_grad=False))
    with pytest.raises(ModelError, match="packed"):
        Shards(Alone(), base.model, [layers[0]])  # type: ignore[arg-type]


# ---- two processes, for real


def test_each_holds_less_and_says_the_same(small: dict[str, Path]) -> None:
    first, second = (json.loads(text) for text in run("shard_calls", str(small["bf16"])))
    assert first["before"] - first["after"] == first["lower"] > 0
    assert first["after"] == first["left"] == second["after"]
    assert first["lower"] / 2 <= first["piece"] < first["lower"] * 0.55
    assert first["alone"] and first["dealt"] and first["few"], first
    assert first["recalled"] >= 10  # it was asked something, and knew it


def test_the_same_facts_are_committed_with_shared_blocks(empty_store: Path, tmp_path: Path) -> None:
    (empty_store / "kvedit.toml").write_text(settings() + "[model]\nshard = true\n", "utf-8")
    rows = [{"key": key, "description": text, "lang": "en"} for key, text in FREE[:4]]
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = kvedit(empty_store, "-v", "ingest", str(file), "--group", "4", "--json")
    command.insert(1, command.pop(command.index("-v")))
    with pair(*command) as made:
        ended = [one.communicate(timeout=240) for one in made]
        assert [one.returncode for one in made] == [0, 0], ended
    summary: dict[str, Any] = json.loads(ended[0][0].splitlines()[-1])
    assert summary["committed"] == summary["retention"]["passed"] == 4
    assert "keeps its piece of the 2 lower blocks" in ended[0][1]

    from kvedit.editing.knowledge_base import KnowledgeBase

    (empty_store / "kvedit.toml").write_text(settings(), encoding="utf-8")
    with KnowledgeBase.open(empty_store) as knowledge:  # one process, the whole model
        assert [f.what for f in knowledge.doctor() if f.level != "ok"] == []
        report = knowledge.verify()
        assert report.generated.passed == report.score.passed == 4
