"""The configuration of a model in the manner of Baichuan2."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class BaichuanStyleConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # a class hook
    """The usual sizes."""

    model_type = "baichuan_style"

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        model_max_length: int = 256,
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.model_max_length = model_max_length
        super().__init__(**more)
