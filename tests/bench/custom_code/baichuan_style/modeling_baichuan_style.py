"""A tiny model in the manner of Baichuan2, for tests.

Like Baichuan2 it fuses query, key and value into ``W_pack``, normalises the rows of its vocabulary
projection while it answers, and caches plain tuples; as in older custom code there is no cache
unless one asks for it and no way to hand in positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_baichuan_style import BaichuanStyleConfig

Pair = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Attention with one fused projection; nearness is a slope for each head (ALiBi)."""

    def __init__(self, config: BaichuanStyleConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, bias: Tensor, past: Pair | None) -> tuple[Tensor, Pair]:
        rows, length, width = x.shape
        shape = (rows, length, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.W_pack(x).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, width)), (k, v)


class MLP(nn.Module):
    """A gated unit."""

    def __init__(self, config: BaichuanStyleConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return hidden


class Block(nn.Module):
    """One decoder block."""

    def __init__(self, config: BaichuanStyleConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, bias: Tensor, past: Pair | None) -> tuple[Tensor, Pair]:
        mixed, kept = self.self_attn(self.input_layernorm(x), bias, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class NormHead(nn.Module):
    """A vocabulary projection that compares directions: its rows are scaled to one length."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, width))
        self.length = 8.0

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.length * functional.normalize(self.weight))


class BaichuanStylePreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # a class hook
    """What both models share."""

    config_class = BaichuanStyleConfig
    base_model_prefix = "model"


class BaichuanStyleModel(BaichuanStylePreTrainedModel):
    """The backbone."""

    def __init__(self, config: BaichuanStyleConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: tuple[Pair, ...] | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        seen = past_key_values[0][0].shape[2] if past_key_values else 0
        bias = self._bias(input_ids.shape[1], seen, attention_mask, input_ids.device)
        x = self.embed_tokens(input_ids)
        kept = []
        for index, layer in enumerate(self.layers):
            x, pair = layer(x, bias, past_key_values[index] if past_key_values else None)
            kept.append(pair)
        cache: Any = tuple(kept) if use_cache else None
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)

    def _bias(
        self, length: int, seen: int, attention_mask: Tensor | None, device: torch.device
    ) -> Tensor:
        """(rows or 1, heads, length, seen + length): far is worse, later and padding impossible."""
        heads = self.config.num_attention_heads
        slopes = 2.0 ** -torch.arange(1, heads + 1, device=device)
        at = torch.arange(seen + length, device=device)
        far = (at[None] - at[seen:, None]).float()
        bias = (slopes[:, None, None] * far).masked_fill(far > 0, -1e4)[None]
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask.bool()[:, None, None], -1e4)
        return bias


class BaichuanStyleForCausalLM(BaichuanStylePreTrainedModel, GenerationMixin):
    """The model with its vocabulary projection."""

    def __init__(self, config: BaichuanStyleConfig) -> None:
        super().__init__(config)
        self.model = BaichuanStyleModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: tuple[Pair, ...] | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)
