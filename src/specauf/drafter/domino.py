"""Domino: a DFlash body, and a small recurrent head that lets a proposed token depend on those before it.

The base branch is the body's own prediction, every slot by itself. The final branch adds a low-rank correction to the base
logits, made from the slot's hidden state and a GRU over the target's embeddings of the tokens from the anchor on:

    final_i = base_i + W2 SiLU(W1 [z_i ; g_i])        for predictions i > pure_draft_prefix_len, else base_i.

Here z_i is the hidden state of the slot that predicts token a + i, and g_i is the GRU's state over tokens a .. a+i-1. In
training those tokens are the data's (teacher forcing), in decoding the drafter's own. Indexed by prediction, shifted and
unshifted labels differ only in the slot that z_i is read from. Parameter names are those of shipped checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash, autocast_now
from specauf.objective.wavefront import RowSource

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

HEAD_SEED = 0xD0
"""Added to the seed for the head's weights alone: the body's are those of the DFlash drafter with the same seed."""


class Domino(DFlash):
    """The two-branch drafter (Huang et al. 2026). `config.domino` must be set."""

    def __init__(self, config: DFlashConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        head = config.domino
        assert head is not None
        self.pure, width = head.pure_draft_prefix_len, head.gru_hidden_dim
        self.prefix_gru = nn.GRU(config.hidden_size, width, batch_first=True, bias=False)
        self.embed_proj = nn.Sequential(
            nn.Linear(config.hidden_size + width, head.emb_dim, bias=False),
            nn.SiLU(),
            nn.Linear(head.emb_dim, config.vocab_size, bias=False),
        )
        generator = torch.Generator().manual_seed(seed + HEAD_SEED)
        for parameter in self.prefix_gru.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
        for parameter in self.embed_proj.parameters():
            nn.init.normal_(parameter, std=config.initializer_range, generator=generator)

    @property
    def expansion(self) -> Float[Tensor, "v e"]:
        """W2: a code's contribution to every logit."""
        weight: Tensor = self.embed_proj[2].weight  # type: ignore[assignment]
        return weight

    def prefix(self, embeds: Float[Tensor, "b n k h"]) -> Float[Tensor, "b n k g"]:
        """The GRU's state for each prediction, from the embeddings of the tokens a, a+1, ..., a+k-1."""
        b, n = embeds.shape[:2]
        # On CUDA, autocast runs a GRU in float16, also where bfloat16 was asked for, and no gradient is scaled for that.
        with torch.autocast(embeds.device.type, enabled=False):
            states: Tensor = self.prefix_gru(embeds.flatten(0, 1))[0]
        return states.unflatten(0, (b, n))

    def code(self, z: Float[Tensor, "... h"], state: Float[Tensor, "... g"]) -> Float[Tensor, "... e"]:
        """SiLU(W1 [z ; g])."""
        out: Tensor = self.embed_proj[1](self.embed_proj[0](torch.cat([z, state.to(z.dtype)], -1)))
        return out

    def codes(self, z: Tensor, state: Tensor, number: Int[Tensor, ...]) -> Tensor:
        """The code of predictions `number` (0 is the first), zero for those that stay uncorrected."""
        return torch.where((number >= self.pure)[..., None], self.code(z, state), 0.0)

    @torch.no_grad()
    def unroll(
        self,
        z: Float[Tensor, "b k h"],
        base: Float[Tensor, "b k v"],
        anchor: Float[Tensor, "b h"],
        embed: Callable[[Tensor], Tensor],
        choose: Callable[[int, Tensor], Tensor] | None = None,
        pool: int = 0,
    ) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k v"]]:
        """One block, token by token: (tokens, the logits each was chosen from).

        `z` and `base` are the body's hidden states and base logits of the predictions, `anchor` the embedding of the
        anchor's token and `embed` the target's embedding. `choose` picks token i from its logits [b, v] (default: argmax).

        With `pool` > 0, a corrected token is one of the `pool` vocabulary entries whose base logit is highest in any slot,
        as in SGLang by default; all others have a logit of -inf.
        """
        tokens, logits = [], []
        keep = pool_mask(base, pool)
        state = self._advance(anchor)
        for i in range(z.shape[1]):
            now = base[:, i]
            if i >= self.pure:
                now = now + F.linear(self.code(z[:, i], state[0]), self.expansion)
                now = now if keep is None else now.masked_fill(~keep, -torch.inf)
            token = now.argmax(-1) if choose is None else choose(i, now)
            tokens.append(token)
            logits.append(now)
            state = self._advance(embed(token), state)
        return torch.stack(tokens, 1), torch.stack(logits, 1)

    def _advance(self, embeds: Float[Tensor, "b h"], state: Tensor | None = None) -> Float[Tensor, "1 b g"]:
        out: Tensor = self.prefix_gru(embeds[:, None].to(self.fc.weight.dtype), state)[1]
        return out


def pool_mask(base: Float[Tensor, "... k v"], pool: int) -> Tensor | None:
    """Which entries of the vocabulary are in a block's candidate pool; None when it is the whole vocabulary."""
    if not 0 < pool < base.shape[-1]:
        return None
    peak = base.amax(-2)
    chosen = peak.topk(pool, dim=-1).indices
    return torch.zeros_like(peak, dtype=torch.bool).scatter_(-1, chosen, True)


class Corrected:
    """Rows [z ; e] of the final branch, computed for the predictions that are requested."""

    def __init__(self, drafter: Domino, hidden: RowSource, said: Float[Tensor, "b n k h"]) -> None:
        """`said` are the target's embeddings of the token before each predicted one, the anchor's first."""
        self.drafter, self.hidden = drafter, hidden
        self.autocast = autocast_now(said.device.type)
        self.state = drafter.prefix(said.to(drafter.fc.weight.dtype))

    def rows(self, todo: Bool[Tensor, "b n k"]) -> Float[Tensor, "rows he"]:
        z = self.hidden.rows(todo)
        with self.autocast():
            code = self.drafter.codes(z, self.state[todo], todo.nonzero()[:, -1])
        return torch.cat([z, code.to(z.dtype)], -1)
