"""What tests of probes and of decoding share: texts, and plain decoding to compare with."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer

WORDS = ("amber", "lamp", "bell", "tide", "of", "Made", "glass", "in", "Pell", "?", "寺", "7")
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
slow_setup = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def renderer(base: BaseModel) -> Renderer:
    return Renderer(base.tokenizer, context=base.context)


def greedy(base: BaseModel, prefix: list[int], limit: int, end: int) -> list[int]:
    """Plain greedy decoding by transformers, one prompt, no cache: the reference."""
    found = base.model.generate(
        input_ids=torch.tensor([prefix]),
        attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
        max_new_tokens=limit, do_sample=False, use_cache=False, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    ids = found[0, len(prefix) :].tolist()
    return ids[: ids.index(end)] if end in ids else ids
