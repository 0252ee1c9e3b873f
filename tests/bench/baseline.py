"""The baseline: what most people would write first, kept as the baseline of the benchmarks.

For each fact a fresh AdaLoRA adapter from PEFT on the query and value projections, all of the
fact's training prompts in every step, PEFT's own loss and allocator, until each prompt is
recalled; then the adapter is merged into the served weights and the next fact begins.  Nothing is
protected, nothing is checked afterwards.

Invariants:
- Nothing of PEFT is left in the model after a fact, whether it was learned or not.
- The global random state is as before: a run depends on ``BaselineConfig.seed`` alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.errors import ModelError
from kvedit.facts.fact import Fact
from kvedit.facts.phrasings import KEY_PLACEHOLDER, load_phrasings
from kvedit.model.prompts import Example, Renderer
from kvedit.model.targets import blocks, is_matrix

QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q", "v"),
    ("wq", "wv"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
    ("W_pack",),
    ("wqkv",),
    ("qkv",),
)
"""Names of the query and value projections in the architectures on the hubs, most common first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineConfig:
    """The recipe's settings.

    ``max_steps`` is also the allocator's ``total_step``: it prunes from ``settle`` steps after the
    start to ``settle`` steps before the end.  ``orthogonality`` is PEFT's default weight.
    """

    init_rank: int = 12
    target_rank: int = 8
    alpha: int = 32
    dropout: float = 0.1
    learning_rate: float = 5e-3
    max_steps: int = 100
    settle: int = 20
    orthogonality: float = 0.5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BaselineStep:
    """Where the loop stands: ``recalled`` of ``n`` training prompts in the training forward."""

    step: int
    total: int
    loss: float
    recalled: int
    n: int


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """How one fact went.

    ``seconds`` are those of wrapping, training and merging; ``recalled`` says whether every prompt
    was recalled in the last training forward, dropout and all, before the merge.
    """

    steps: int
    seconds: float
    recalled: bool
    loss: float


OnStep = Callable[[BaselineStep], None]


def baseline_examples(renderer: Renderer, fact: Fact) -> list[Example]:
    """The recipe's training set: the training phrasings of the fact's own language."""
    ways = load_phrasings(fact.lang).train
    return [
        renderer.example(way.replace(KEY_PLACEHOLDER, fact.key), fact.description) for way in ways
    ]


def target_modules(model: nn.Module) -> list[str]:
    """Dotted names of the query and value projections; all linear layers of the blocks if unnamed.

    Raises ModelError for a model without linear layers in its blocks.
    """
    stack, layers = blocks(model)
    names = [
        f"{stack}.{name}" for name, module in layers.named_modules() if name and is_matrix(module)
    ]
    for suffixes in QUERY_AND_VALUE:
        projections = [name for name in names if name.rsplit(".", 1)[-1] in suffixes]
        if projections:
            return projections
    if not names:
        raise ModelError(f"{type(model).__name__} has no linear layers in its blocks")
    return names


def train_baseline(
    model: Any,
    examples: Sequence[Example],
    config: BaselineConfig | None = None,
    on_step: OnStep = lambda step: None,
) -> BaselineResult:
    """Train one fact to a bare model and merge it, as the baseline does."""
    config = config or BaselineConfig()
    began = time.monotonic()
    with merged_afterwards(model, config.seed, lambda: _adalora(model, config)) as wrapped:
        steps, recalled, loss = _learn(wrapped, examples, config, on_step)
    return BaselineResult(steps, time.monotonic() - began, recalled, loss)


@contextmanager
def merged_afterwards(model: Any, seed: int, make_config: Callable[[], Any]) -> Iterator[Any]:
    """PEFT around a bare model, merged into it at the end and left out when training is broken off;
    the global random state is as before.
    """
    from peft import get_peft_model

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of tied embeddings, which are not touched
            wrapped = get_peft_model(model, make_config())
        try:
            yield wrapped
            wrapped.merge_and_unload(progressbar=False)
        except BaseException:
            wrapped.unload()
            raise
        finally:
            model.eval().requires_grad_(False)


def _adalora(model: Any, config: BaselineConfig) -> Any:
    """PEFT's settings.  ``tinit < total_step - tfinal`` must hold, or the allocator fails."""
    from peft import AdaLoraConfig

    settle = min(config.settle, (config.max_steps - 1) // 2)
    return AdaLoraConfig(
        init_r=config.init_rank,
        target_r=config.target_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        orth_reg_weight=config.orthogonality,
        target_modules=target_modules(model),
        tinit=settle,
        tfinal=settle,
        deltaT=1,
        total_step=config.max_steps,
    )


def _learn(
    wrapped: Any, examples: Sequence[Example], config: BaselineConfig, on_step: OnStep
) -> tuple[int, bool, float]:
    """Steps until a training forward recalls every prompt; (updates made, recalled, loss)."""
    batch = batch_of(examples, wrapped.device)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)
    wrapped.train()
    loss = float("nan")
    for step in range(1, config.max_steps + 1):
        out = wrapped(**batch, use_cache=False)
        loss = float(out.loss.detach())
        recalled = recalled_rows(out.logits.detach(), batch["labels"])
        on_step(BaselineStep(step, config.max_steps, loss, recalled, len(examples)))
        if recalled == len(examples):
            return step - 1, True, loss
        torch.autograd.backward(out.loss)
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return config.max_steps, False, loss


def batch_of(examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
    """ids, mask and labels, int64 (examples, width); labels are -100 but at the answers."""
    width = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        mask[row, :size] = 1
        labels[row, example.start : size] = torch.tensor(example.ids[example.start :])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def recalled_rows(logits: Tensor, labels: Tensor) -> int:
    """How many rows of the training forward have the right token first at every answer position.

    Logits of what a model has before the row (virtual tokens) do not count.
    """
    targets = labels[:, 1:]
    right = logits[:, -labels.shape[1] : -1].argmax(-1) == targets
    return int((right | (targets == -100)).all(dim=1).sum())
