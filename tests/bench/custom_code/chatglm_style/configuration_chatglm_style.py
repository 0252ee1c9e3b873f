"""The configuration of a model in the manner of ChatGLM2: its own names for the usual sizes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class ChatGLMStyleConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # a class hook
    """Sizes under ChatGLM2's names; ``seq_length`` is the context."""

    model_type = "chatglm_style"

    def __init__(
        self,
        num_layers: int = 4,
        padded_vocab_size: int = 272,
        hidden_size: int = 64,
        ffn_hidden_size: int = 128,
        num_attention_heads: int = 4,
        multi_query_group_num: int = 2,
        seq_length: int = 256,
        **more: Any,
    ) -> None:
        self.num_layers = num_layers
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.num_attention_heads = num_attention_heads
        self.multi_query_group_num = multi_query_group_num
        self.seq_length = seq_length
        super().__init__(**more)
