"""A tiny model in the manner of InternLM2, for tests.

Like InternLM2 it fuses query, key and value into ``wqkv``, group by group: the queries of one key
head, its key, its value, then the next head's; calls the other projections ``wo``, ``w1``, ``w2``,
``w3`` and the vocabulary projection ``output``; its blocks give back tuples, and it caches tuples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_internlm2 import InternLM2StyleConfig

Pair = tuple[Tensor, Tensor]


class RootMeanSquare(nn.Module):
    """Scale to unit root mean square, times a learned weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
        return (x.float() * scale).to(x.dtype) * self.weight


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate the halves of each head by its position; (rows, heads, length, width)."""
    width = x.shape[-1]
    steps = torch.arange(0, width, 2, device=x.device).float() / width
    angles = positions[:, None, :, None].float() * (theta**-steps)
    both = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, -1)
    other = torch.cat([-second, first], -1)
    return x * both.cos().to(x.dtype) + other * both.sin().to(x.dtype)


class Attention(nn.Module):
    """Attention with one fused projection and few key heads."""

    def __init__(self, config: InternLM2StyleConfig) -> None:
        super().__init__()
        self.keys = config.num_key_value_heads
        self.share = config.num_attention_heads // self.keys
        self.width = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_theta
        fused = (self.share + 2) * self.keys * self.width
        self.wqkv = nn.Linear(config.hidden_size, fused, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: Pair | None
    ) -> tuple[Tensor, Pair]:
        rows, length, _ = x.shape
        fused = self.wqkv(x).view(rows, length, self.keys, self.share + 2, self.width)
        q = fused[..., : self.share, :].flatten(2, 3).transpose(1, 2)
        k, v = fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)
        q, k = turned(q, positions, self.theta), turned(k, positions, self.theta)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        keys, values = k.repeat_interleave(self.share, 1), v.repeat_interleave(self.share, 1)
        mixed = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.wo(mixed.transpose(1, 2).flatten(2)), (k, v)


class FeedForward(nn.Module):
    """A gated unit: ``w1`` is the gate, ``w3`` what passes it, ``w2`` the way back."""

    def __init__(self, config: InternLM2StyleConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return hidden


class Block(nn.Module):
    """One decoder block."""

    def __init__(self, config: InternLM2StyleConfig) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = RootMeanSquare(config.hidden_size)
        self.ffn_norm = RootMeanSquare(config.hidden_size)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: Pair | None
    ) -> tuple[Tensor, Pair]:
        mixed, kept = self.attention(self.attention_norm(x), positions, mask, past)
        x = x + mixed
        return x + self.feed_forward(self.ffn_norm(x)), kept


class InternLM2StylePreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # a class hook
    """What both models share."""

    config_class = InternLM2StyleConfig
    base_model_prefix = "model"


class InternLM2StyleModel(InternLM2StylePreTrainedModel):
    """The backbone."""

    def __init__(self, config: InternLM2StyleConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RootMeanSquare(config.hidden_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tok_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[Pair, ...] | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        length = input_ids.shape[1]
        seen = past_key_values[0][0].shape[2] if past_key_values else 0
        at = torch.arange(seen + length, device=input_ids.device)
        positions = at[None, seen:] if position_ids is None else position_ids
        mask = (at[None] <= at[seen:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
        x = self.tok_embeddings(input_ids)
        kept = []
        for index, layer in enumerate(self.layers):
            past = past_key_values[index] if past_key_values else None
            x, pair = layer(x, positions, mask, past)
            kept.append(pair)
        cache: Any = tuple(kept) if use_cache else None
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)


class InternLM2StyleForCausalLM(InternLM2StylePreTrainedModel, GenerationMixin):
    """The model with its vocabulary projection."""

    def __init__(self, config: InternLM2StyleConfig) -> None:
        super().__init__(config)
        self.model = InternLM2StyleModel(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.tok_embeddings
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.output = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[Pair, ...] | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        logits = self.output(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)
