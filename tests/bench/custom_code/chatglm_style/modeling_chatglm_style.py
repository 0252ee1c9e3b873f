"""A tiny model in the manner of ChatGLM2, for tests: what makes such a model hard to edit.

Like ChatGLM2 it keeps texts as (position, row, width) inside, fuses query, key and value into one
projection with shared key heads, turns only half of each head's dimensions, caches plain tuples,
and hides its vocabulary projection inside the backbone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_chatglm_style import ChatGLMStyleConfig

Pair = tuple[Tensor, Tensor]


class RootMeanSquare(nn.Module):
    """Scale to unit root mean square, times a learned weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
        return (x.float() * scale).to(x.dtype) * self.weight


def turn_half(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the first half of the head; (position, row, head, width)."""
    half = x.shape[-1] // 2
    steps = torch.arange(0, half, 2, device=x.device).float() / half
    angles = positions.T[:, :, None].float() * (10000.0**-steps)
    cos, sin = angles.cos()[:, :, None].to(x.dtype), angles.sin()[:, :, None].to(x.dtype)
    even, odd = x[..., :half:2], x[..., 1:half:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([turned, x[..., half:]], -1)


class SelfAttention(nn.Module):
    """Attention with one fused projection and few key heads."""

    def __init__(self, config: ChatGLMStyleConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.width = config.hidden_size // self.heads
        fused = config.hidden_size + 2 * self.groups * self.width
        self.query_key_value = nn.Linear(config.hidden_size, fused, bias=True)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: Pair | None
    ) -> tuple[Tensor, Pair]:
        length, rows, _ = x.shape
        sizes = [self.heads * self.width, *[self.groups * self.width] * 2]
        q, k, v = self.query_key_value(x).split(sizes, -1)
        q = turn_half(q.view(length, rows, self.heads, self.width), positions)
        k = turn_half(k.view(length, rows, self.groups, self.width), positions)
        v = v.view(length, rows, self.groups, self.width)
        if past is not None:
            k, v = torch.cat([past[0], k]), torch.cat([past[1], v])
        share = self.heads // self.groups
        keys = k.repeat_interleave(share, 2).permute(1, 2, 0, 3)
        values = v.repeat_interleave(share, 2).permute(1, 2, 0, 3)
        mixed = functional.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3), keys, values, attn_mask=mask
        )
        joined = mixed.permute(2, 0, 1, 3).reshape(length, rows, -1)
        return self.dense(joined), (k, v)


class MLP(nn.Module):
    """A gated unit whose two halves are one projection."""

    def __init__(self, config: ChatGLMStyleConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        hidden: Tensor = self.dense_4h_to_h(functional.silu(gate) * up)
        return hidden


class Block(nn.Module):
    """One decoder block."""

    def __init__(self, config: ChatGLMStyleConfig) -> None:
        super().__init__()
        self.input_layernorm = RootMeanSquare(config.hidden_size)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RootMeanSquare(config.hidden_size)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: Pair | None
    ) -> tuple[Tensor, Pair]:
        mixed, kept = self.self_attention(self.input_layernorm(x), positions, mask, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class Encoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: ChatGLMStyleConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_layernorm = RootMeanSquare(config.hidden_size)


class ChatGLMStylePreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # a class hook
    """What both models share."""

    config_class = ChatGLMStyleConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]  # noqa: RUF012


class ChatGLMStyleModel(ChatGLMStylePreTrainedModel):
    """The backbone; its hidden states are (position, row, width)."""

    def __init__(self, config: ChatGLMStyleConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: tuple[Pair, ...] | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> BaseModelOutputWithPast:
        seen = past_key_values[0][0].shape[0] if past_key_values else 0
        rows, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=input_ids.device)
            position_ids = position_ids[None].expand(rows, length)
        mask = _mask(rows, length, seen, attention_mask, input_ids.device)
        x = self.embedding(input_ids).transpose(0, 1)
        kept = []
        for index, layer in enumerate(self.encoder.layers):
            past = past_key_values[index] if past_key_values else None
            x, pair = layer(x, position_ids, mask, past)
            kept.append(pair)
        x = self.encoder.final_layernorm(x)
        cache: Any = tuple(kept) if use_cache else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache)


def _mask(
    rows: int, length: int, seen: int, attention_mask: Tensor | None, device: torch.device
) -> Tensor:
    """(rows, 1, length, seen + length), bool: which positions each one may look at."""
    total = seen + length
    causal = torch.ones(length, total, dtype=torch.bool, device=device).tril(seen)
    mask = causal[None].expand(rows, length, total)
    if attention_mask is not None:
        own = torch.eye(total, dtype=torch.bool, device=device)[seen:]
        mask = (mask & attention_mask.bool()[:, None]) | own  # padding looks at itself: no NaN
    return mask[:, None]


class ChatGLMStyleForConditionalGeneration(ChatGLMStylePreTrainedModel, GenerationMixin):
    """The model with its vocabulary projection, which lies inside the backbone."""

    def __init__(self, config: ChatGLMStyleConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMStyleModel(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: tuple[Pair, ...] | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        out = self.transformer(
            input_ids, position_ids, attention_mask, past_key_values, use_cache=use_cache
        )
        logits = self.transformer.output_layer(out.last_hidden_state).transpose(0, 1)
        return CausalLMOutputWithPast(
            logits=logits.contiguous(), past_key_values=out.past_key_values
        )
