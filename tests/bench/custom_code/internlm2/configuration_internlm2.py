"""The configuration of a model in the manner of InternLM2, under its model type."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class InternLM2StyleConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # a class hook
    """The usual sizes."""

    model_type = "internlm2"

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        max_position_embeddings: int = 256,
        rope_theta: float = 10000.0,
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        super().__init__(**more)
