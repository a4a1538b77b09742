"""DFlash: a few transformer layers that turn [anchor, MASK, MASK, ...] and the target's features into a block of tokens.

The target's tapped hidden states are projected once (`fc`, `hidden_norm`) and enter every layer as extra keys and values;
they are never updated. Queries come from the block alone. Parameter names are those of shipped checkpoints. Embedding and
LM head belong to the target and are neither held nor saved here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from specauf.drafter.attention import block_attention
from specauf.drafter.config import DFlashConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class ContextKV(NamedTuple):
    """One layer's keys (rotated) and values of the context; index s is the absolute position."""

    key: Float[Tensor, "b kv s d"]
    value: Float[Tensor, "b kv s d"]


class BlockKV(NamedTuple):
    """One layer's keys (rotated) and values of the block slots."""

    key: Float[Tensor, "b kv n slots d"]
    value: Float[Tensor, "b kv n slots d"]


class RMSNorm(nn.RMSNorm):
    """Normalised in float32 whatever the input's dtype, as the Qwen3 layers do."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:  # on CUDA one kernel, which keeps no normalised copy of x
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.normalized_shape, None, self.eps).to(x.dtype) * self.weight


def rotate(
    x: Float[Tensor, "b heads s d"], positions: Int[Tensor, "b s"], theta: float
) -> Float[Tensor, "b heads s d"]:
    """Rotary embedding over the full head dimension, halves rotated against each other (the neox form)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = positions[:, None, :, None].float() * frequency  # b 1 s d/2
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def autocast_now(device: str) -> Callable[[], torch.autocast]:
    """Autocast as it is now, for rows that are computed later."""
    on = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if on else torch.bfloat16
    return functools.partial(torch.autocast, device, dtype, on)


class Attention(nn.Module):
    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def _heads(self, x: Float[Tensor, "b s hd"]) -> Float[Tensor, "b heads s d"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def context(self, projected: Float[Tensor, "b s h"], positions: Int[Tensor, "b s"]) -> ContextKV:
        key = self.k_norm(self._heads(self.k_proj(projected)))
        return ContextKV(rotate(key, positions, self.theta), self._heads(self.v_proj(projected)))

    def block(self, x: Float[Tensor, "b n slots h"], anchors: Int[Tensor, "b n"]) -> BlockKV:
        """Keys (rotated) and values of every slot, for the slots of the same block."""
        _, n, slots, _ = x.shape
        positions = (anchors[..., None] + torch.arange(slots, device=x.device)).flatten(1)
        flat = x.flatten(1, 2)
        key = rotate(self.k_norm(self._heads(self.k_proj(flat))), positions, self.theta)
        return BlockKV(*(t.unflatten(2, (n, slots)) for t in (key, self._heads(self.v_proj(flat)))))

    def forward(
        self,
        x: Float[Tensor, "b n q h"],
        anchors: Int[Tensor, "b n"],
        context: ContextKV,
        block: BlockKV,
        first: int = 0,
    ) -> Float[Tensor, "b n q heads_d"]:
        """The attention output of slots `first`, first+1, ... of their blocks, before the output projection."""
        _, n, slots, _ = x.shape
        positions = (anchors[..., None] + torch.arange(first, first + slots, device=x.device)).flatten(1)
        query = rotate(self.q_norm(self._heads(self.q_proj(x.flatten(1, 2)))), positions, self.theta)
        query = query.unflatten(2, (n, slots))
        out = block_attention(query, block.key, block.value, context.key, context.value, anchors)  # b heads n q d
        return out.permute(0, 2, 3, 1, 4).flatten(-2)


class MLP(nn.Module):
    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, anchors: Tensor, context: ContextKV) -> Tensor:
        normed = self.input_layernorm(x)
        return self.finish(x, self.self_attn(normed, anchors, context, self.self_attn.block(normed, anchors)))

    def finish(self, x: Float[Tensor, "... h"], seen: Float[Tensor, "... heads_d"]) -> Float[Tensor, "... h"]:
        """From attention output to the next hidden states, for any slots: from here on each is computed by itself."""
        x = x + self.self_attn.o_proj(seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Pending:
    """Blocks up to the query side of the last layer, which is computed only for the slots that are requested.

    Every slot has keys and values in every layer, and a query in all but the last. In the last layer a slot's query, output
    projection and MLP serve its own prediction alone, so they are not needed when nobody reads it.
    """

    def __init__(self, drafter: DFlash, x: Float[Tensor, "b n slots h"], anchors: Tensor, context: ContextKV) -> None:
        self.layer: Layer = drafter.layers[-1]  # type: ignore[assignment]
        self.norm, self.x, self.anchors, self.context = drafter.norm, x, anchors, context
        self.first = drafter.config.first_slot
        self.normed = self.layer.input_layernorm(x)
        self.block = self.layer.self_attn.block(self.normed, anchors)
        self.autocast = autocast_now(x.device.type)

    def rows(self, todo: Bool[Tensor, "b n k"]) -> Float[Tensor, "rows h"]:
        """Final hidden states of the predictions where `todo` is true, in `nonzero` order; 0 is slot `first_slot`'s."""
        with self.autocast():
            return self._rows(todo)

    def _rows(self, todo: Tensor) -> Tensor:
        slots, asked = todo.any(1).any(0).nonzero().squeeze(1), todo.any(-1)
        if not len(slots):
            return self.norm(self.x[:0, 0, 0])  # the drafter's, so that a step with nothing to read has a gradient: 0
        first, last = int(slots[0]), int(slots[-1]) + 1
        now = slice(first + self.first, last + self.first)
        x, normed, todo = self.x[:, :, now], self.normed[:, :, now], todo[..., first:last]
        anchors, block = self.anchors, self.block
        width = int(asked.sum(1).max())
        if width < asked.shape[1]:
            # Only the blocks with a requested slot, left-aligned in their row. Their padding is dropped below.
            chosen = (~asked).int().argsort(dim=1, stable=True)[:, :width]
            row = torch.arange(len(chosen), device=chosen.device)[:, None]
            x, normed, anchors, todo = x[row, chosen], normed[row, chosen], anchors[row, chosen], todo[row, chosen]
            block = BlockKV(*(t.transpose(1, 2)[row, chosen].transpose(1, 2) for t in block))
        seen = self.layer.self_attn(normed, anchors, self.context, block, now.start)
        out: Tensor = self.norm(self.layer.finish(x[todo], seen[todo]))
        return out


class DFlash(nn.Module):
    """The masked block drafter (Chen, Liang and Liu 2026), for training, replay and live decoding alike."""

    def __init__(self, config: DFlashConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.t2d: Tensor
        self.d2t: Tensor
        if config.draft_vocab_size is not None:  # undecided while t2d is false everywhere; see vocabulary.py
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)

    def context(self, features: Float[Tensor, "b s taps_h"], positions: Int[Tensor, "b s"]) -> list[ContextKV]:
        """Keys and values of the context in every layer, from the tapped hidden states in the order of the ids."""
        projected = self.hidden_norm(self.fc(features))
        return [layer.self_attn.context(projected, positions) for layer in self.layers]  # type: ignore[operator, union-attr]

    def forward(
        self, embeds: Float[Tensor, "b n slots h"], anchors: Int[Tensor, "b n"], context: list[ContextKV]
    ) -> Float[Tensor, "b n slots h"]:
        """Final hidden state of every slot; `predictions` picks those that go through the target's LM head.

        `embeds` are the target's embeddings of [anchor token, MASK, ...]; slot k sits at rotary position anchor + k and
        sees context positions < anchor and its own block.
        """
        x: Tensor = embeds
        for layer, kv in zip(self.layers, context, strict=True):
            x = layer(x, anchors, kv)
        return self.norm(x)

    def predictions(self, hidden: Float[Tensor, "b n slots h"]) -> Float[Tensor, "b n k h"]:
        """The hidden states of the slots that propose the B-1 tokens after the anchor."""
        first = self.config.first_slot
        return hidden[:, :, first : first + self.config.num_predictions]

    def pending(
        self, embeds: Float[Tensor, "b n slots h"], anchors: Int[Tensor, "b n"], context: list[ContextKV]
    ) -> Pending:
        """`forward` up to the last layer's query side, which `Pending` computes for the predictions that are requested."""
        x = embeds
        for layer, kv in zip(self.layers[:-1], context, strict=False):
            x = layer(x, anchors, kv)
        return Pending(self, x, anchors, context[-1])
