"""What editing takes is known before the model is loaded, and a refusal says why."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from small_engine import make_engine
from small_model import FREE, settings

from kvedit import KnowledgeBase
from kvedit.config import GroupConfig, TrainingConfig
from kvedit.errors import ModelError, OutOfMemoryError
from kvedit.events import Warning_
from kvedit.facts.fact import Fact
from kvedit.model import forward, loading, scoring, targets
from kvedit.model.loading import BaseModel
from kvedit.training import memory
from kvedit.training.loops.group import group_batch, group_load
from kvedit.training.loops.loop import Task
from tests.bench import footprint

CONFIG = TrainingConfig()


def estimate(model: Any, config: TrainingConfig = CONFIG) -> memory.Estimate:
    return memory.Sizes(model).estimate(config)


def test_weights_are_counted_to_the_byte(load: Callable[[str], BaseModel]) -> None:
    for dtype in ("fp32", "bf16"):
        model = load(dtype).model
        expected = sum(p.numel() * p.element_size() for p in model.parameters())
        assert estimate(model).weights == expected


def test_the_master_is_of_the_touched_matrices(base: BaseModel) -> None:
    touched = sum(
        base.model.get_submodule(name).weight.numel() for name in targets.target_names(base.model)
    )
    assert estimate(base.model).master == 4 * touched


def test_fewer_layers_ranks_and_activations_take_less(base: BaseModel) -> None:
    full = estimate(base.model)
    few = memory.Sizes(base.model, ["down_proj"]).estimate(CONFIG)
    assert few.master < full.master and few.fisher < full.fisher
    assert estimate(base.model, replace(CONFIG, init_rank=2)).adapter < full.adapter
    long = memory.Load(texts=40, rank=2, length=512)
    sizes, checkpointing = memory.Sizes(base.model), replace(CONFIG, gradient_checkpointing=True)
    thrifty, plain = (sizes.estimate(config, long) for config in (checkpointing, CONFIG))
    assert thrifty.activations < plain.activations and thrifty.weights == plain.weights


def test_a_group_takes_more_the_larger_it_is(base: BaseModel) -> None:
    group = GroupConfig(rank=16)
    sizes = memory.Sizes(base.model)
    few, many = (sizes.estimate(CONFIG, group_load(group, facts)) for facts in (4, 128))
    assert many.adapter > few.adapter
    assert many.weights == few.weights and many.master == few.master
    # A step goes through the model a batch at a time, however many texts it has.
    long = sizes.estimate(CONFIG, group_load(group, 1024, length=512))
    assert long.activations == many.activations > 0
    bare = sizes.estimate(CONFIG, group_load(replace(group, reference_texts=0), 128))
    assert bare.activations < many.activations and bare.caches < many.caches
    assert group_load(group, 128, earlier=10_000) == group_load(group, 128)


def test_the_ranks_of_a_group_are_those_it_gets(load: Callable[[str], BaseModel]) -> None:
    """The estimate counts the coordinates that the engine really makes."""
    engine = make_engine(load("fp32"))
    group = GroupConfig(rank=32, epochs=1, refine_rounds=0, reference_texts=4)
    facts = engine.renderer.examples([(f"What is {key}?", text) for key, text in FREE[:4]])
    engine.train(Task([[fact] for fact in facts], []), group=group)
    rank = engine._adapter_for(4, group).ranks[0]
    assert rank == group_load(group, 4).rank == 8
    shapes = [engine.master.matrices[name].shape for name in engine.names]
    numbers = sum(2 * sum(shape) + 4 * max(shape) for shape in shapes)  # of each rank
    estimated = engine.estimate(group_load(group, 4))
    assert estimated.adapter == 4 * rank * numbers
    wide = replace(group, rank=4096)  # a matrix has no more directions than its smaller side
    assert engine.estimate(group_load(wide, 4)).adapter == 4 * 32 * numbers


def test_the_activations_of_a_step_are_counted(base: BaseModel) -> None:
    """What autograd holds between the forward and the backward pass of many texts."""
    model = base.model
    texts = [scoring.Example(tuple(range(9 + n % 5, 129 + n % 5)), 60) for n in range(48)]
    weight = model.get_submodule("model.layers.2.self_attn.q_proj").weight.requires_grad_(True)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = scoring.token_scores(model, texts)
    weight.requires_grad_(False)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(size for place, size in saved.items() if place not in parameters)
    expected = 48 * 120 * scoring.activation_bytes(model)
    expected += 2 * sum(60 for _ in texts) * forward.vocabulary_size(model) * 4
    assert scores.losses.requires_grad and expected / 2 < measured < expected * 1.2


def test_an_outline_has_shapes_and_no_weights(small: dict[str, Path], base: BaseModel) -> None:
    outline = loading.outline(str(small["bf16"]), revision=None, trust_remote_code=False)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in outline.parameters())
    assert estimate(outline.float()) == estimate(base.model)
    assert loading.outline("/nowhere", revision=None, trust_remote_code=False) is None


def test_what_cannot_fit_is_refused_before_it_is_loaded(
    small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as inside:
        inside.setattr(loading, "load", lambda *a, **b: pytest.fail("it was loaded"))
        with pytest.raises(ModelError, match="takes about") as raised:
            KnowledgeBase.create(tmp_path / "store", small["bf16"])
    assert "weights" in raised.value.message and "--targets" in str(raised.value.hint)
    assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "kvedit.toml").write_text(settings(), encoding="utf-8")
    KnowledgeBase.create(tmp_path / "store", small["bf16"], check_memory=False).close()


def test_available_memory_minds_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory.available() > 0
    unused = 10_000_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=unused))
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    assert memory.available() == unused  # no control group
    files = {"max": "5000\n", "current": "2000\n", "stat": "anon 900\n"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text, encoding="ascii")
    assert memory.available() == 3000
    stat = "anon 900\nactive_file 100\ninactive_file 200\n"
    (tmp_path / "memory.stat").write_text(stat, encoding="ascii")
    assert memory.available() == 3300  # what was read from files can be dropped
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert memory.available() == unused


def test_batches_shrink_with_the_vocabulary(base: BaseModel) -> None:
    assert scoring.batch_tokens(base.model) == scoring.MAX_BATCH_TOKENS
    assert scoring.batch_tokens(footprint.make("0.5B", torch.float32)) == 441


def test_checkpointing_changes_no_number(base: BaseModel) -> None:
    def gradient(*, on: bool) -> torch.Tensor:
        weight = base.model.get_submodule("model.layers.1.mlp.up_proj").weight
        weight.requires_grad_(True)
        with forward.checkpointed(base.model, on=on):
            answers = scoring.answer_logits(base.model, [scoring.Example(tuple(range(9, 30)), 4)])
            (found,) = torch.autograd.grad(answers.logits.logsumexp(1).sum(), weight)
        weight.requires_grad_(False)
        return torch.as_tensor(found)

    assert torch.equal(gradient(on=True), gradient(on=False))
    assert not any("forward" in vars(layer) for layer in targets.blocks(base.model)[1])


@pytest.mark.slow
def test_a_fact_is_trained_with_checkpointing(empty_store: Path) -> None:
    text = settings().replace("[training]", "[training]\ngradient_checkpointing = true")
    (empty_store / "kvedit.toml").write_text(text, encoding="utf-8")
    with KnowledgeBase.open(empty_store) as knowledge:
        assert knowledge.add(*FREE[0]).outcome == "committed"
        assert knowledge.ask(f"What is {FREE[0][0]}?") == FREE[0][1]


def test_a_group_that_cannot_fit_is_not_tried(
    empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    with KnowledgeBase.open(empty_store, on_event=events.append) as knowledge:
        needed = knowledge.engine.needed(knowledge.store.config.group, 2, memory.TEXT_TOKENS)
        monkeypatch.setattr(memory, "free", lambda: needed)
        tried: list[int] = []

        def train(facts: list[Fact], force: bool) -> object:
            tried.append(len(facts))
            raise ModelError("enough of it")

        monkeypatch.setattr(knowledge._groups, "_add_together", train)
        with pytest.raises(ModelError, match="enough"):
            knowledge.add_group([Fact.create(*one, lang="en") for one in FREE[:4]])
        assert tried == [2] and knowledge.largest_group == 2
    (warning,) = [e.text for e in events if isinstance(e, Warning_) and e.code == "out-of-memory"]
    assert "GiB" in warning and "4 facts do not fit together" in warning


@pytest.mark.parametrize("steps", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_whole_edits_are_measured(steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = footprint._qwen(64, 128, 4, 4, 2, True) | {"vocab_size": 10_000}
    monkeypatch.setattr(footprint, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(footprint, "DESCRIPTION", 12)
    monkeypatch.setattr(footprint, "CONTEXT", 64)
    result = footprint.measure(
        "tiny", torch.float32, steps, (1, 16), lambda event: None, counted=True
    )
    one, many = result.edits
    assert (one.facts, one.outcome, one.default_steps) == (1, "committed", CONFIG.max_steps)
    group = GroupConfig()
    passes = math.ceil(group.epochs * 16 / group_batch(group, 16))
    assert (many.facts, many.outcome, many.default_steps) == (16, "committed", passes)
    assert one.steps == (steps or CONFIG.max_steps)
    assert many.steps == steps if steps else many.steps >= passes
    for cost in result.edits:
        assert cost.peak > 0 and cost.tokens > 12 and cost.seconds > cost.timings["train"] > 0
        missing = max(0, cost.default_steps - cost.steps)
        assert cost.projected == pytest.approx(cost.seconds + missing * cost.step)
        assert cost.projected_cpu == pytest.approx(cost.cpu + missing * cost.cpu_step)
        assert cost.cpu > cost.cpu_step > 0
        assert cost.rate > 0 and cost.operations > 2 * 16 * cost.tokens * 64 * 64
    table = footprint._measured_table(result)
    assert tuple(table.columns) == ("what", "1 fact", "16 facts at once")
    cells_of = {name: cells for name, *cells in table.rows}
    assert cells_of["tokens a text"] == [str(cost.tokens) for cost in result.edits]
    assert cells_of["a step, s"] == [f"{cost.step:.2f}" for cost in result.edits]
    assert cells_of["share of the matrix rate"] == [
        f"{100 * cost.rate / result.matmul:.1f}%" for cost in result.edits
    ]
    assert len(cells_of) == len(table.rows) > 15


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("CUDA driver error: out of memory"),
        torch.OutOfMemoryError("Allocation on device"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_one_error_with_what_helps(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match="memory ran out") as raised, memory.watched():
        raise error
    assert "gradient_checkpointing" in raised.value.hint


def test_other_errors_are_let_through() -> None:
    for error in (RuntimeError("shapes do not match"), ValueError("out of memory"), ModelError("")):
        with pytest.raises(type(error)) as raised, memory.watched():
            raise error
        assert raised.value is error


def test_tensors_of_a_failed_attempt_are_freed() -> None:
    class Large:
        pass

    references: list[weakref.ref[Large]] = []

    def attempt() -> None:
        mine = Large()
        references.append(weakref.ref(mine))
        raise MemoryError

    with pytest.raises(OutOfMemoryError) as raised, memory.watched():
        attempt()
    assert raised.value.__context__ is not None and references[0]() is None
