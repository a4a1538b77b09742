"""The accept rules, as pure functions of tensors: what makes speculative decoding exact.

The drafter proposes its argmax, a point mass, at every temperature. At T=0 a draft token is accepted while it equals the
target's argmax. At T>0 it is accepted with the probability that the target gives it; on a rejection the next token is drawn
from the target's law without the rejected token, renormalised. `accept_drawn` is for tokens drawn from the drafter's own
law instead, as z-lab's decoder does. Either way the output has the target's law, whatever the drafter proposes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specauf.config import SamplingConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped
    from torch import Tensor

ACCEPT, RESAMPLE, PROPOSE, CANDIDATE = -1, -2, -3, -4
"""Streams of the counter hash of (seed, stream, prompt, position), so that no draw depends on the batch layout. ACCEPT decides
acceptance at a position, RESAMPLE draws the token that ends a round.

PROPOSE and CANDIDATE draw draft tokens. They must share nothing with the first two, or the output loses the target's law.
None is an epoch: anchors are drawn by (seed, epoch, uid, position), and those of a rollout must not know how its tokens fell.
"""


def warp(
    logits: Float[Tensor, "b slots v"],
    ids: Int[Tensor, "b s"],
    lengths: Int[Tensor, " b"],
    sampling: SamplingConfig,
) -> Float[Tensor, "b slots v"]:
    """Logits under the repetition penalty, temperature, top-k and top-p, in Hugging Face's order.

    `ids[i, : lengths[i]]` are the tokens of row i up to and including the input of its last slot; the penalty of a slot
    sees the tokens up to that slot's input and no further. Temperature 0 leaves the scale alone: its argmax is taken.
    """
    b, slots, v = logits.shape
    flat = logits.reshape(b * slots, v)
    if sampling.repetition_penalty != 1.0:
        end = lengths[:, None] + torch.arange(1 - slots, 1, device=ids.device)  # b slots
        past = torch.arange(ids.shape[1], device=ids.device) < end[..., None]
        seen = torch.where(past, ids[:, None], ids[:, None, :1])  # pad with the first token: it is penalised once
        flat = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(seen.flatten(0, 1), flat)
    warpers: list[LogitsProcessor] = []
    if sampling.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.temperature and sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature and sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    for warper in warpers:
        flat = warper(ids[:0], flat)
    return flat.view(b, slots, v)


def accept_greedy(
    draft: Int[Tensor, "b k"], target: Float[Tensor, "b slots v"]
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """(A, the token after the accepted ones) at T=0. `target` are logits of the B = k+1 verified inputs, the anchor first."""
    choice = target.argmax(-1)  # b slots
    accepted = (draft == choice[:, :-1]).cumprod(1).sum(1)
    return accepted, choice.gather(1, accepted[:, None]).squeeze(1)


def accept_sampled(
    draft: Int[Tensor, "b k"],
    target: Float[Tensor, "b slots v"],
    accept_uniform: Float[Tensor, "b k"],
    ending_uniform: Float[Tensor, "b slots"],
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """(A, the token after the accepted ones) at T>0: rejection sampling of a point-mass proposal against the target.

    `target` are probabilities at the B = k+1 verified inputs. Draft token j is accepted when its uniform number is below
    its probability. The token that ends the round comes from the rejected slot's residual, or from the last slot in full.
    """
    chance = target[:, :-1].gather(2, draft[..., None]).squeeze(2)
    accepted = (accept_uniform < chance).cumprod(1).sum(1)
    ending = residual(at(target, accepted), draft, accepted)
    return accepted, draw(ending, ending_uniform.gather(1, accepted[:, None])).squeeze(1)


def residual(
    ending: Float[Tensor, "b v"], draft: Int[Tensor, "b k"], accepted: Int[Tensor, " b"]
) -> Float[Tensor, "b v"]:
    """The law of the token that ends a round: without the rejected draft token, or untouched when none was rejected."""
    k = draft.shape[1]
    if k == 0:
        return ending
    rejected = draft.gather(1, accepted.clamp(max=k - 1)[:, None])
    kept = ending.gather(1, rejected).masked_fill(accepted[:, None] < k, 0.0)
    return ending.scatter(1, rejected, kept)


def accept_drawn(
    draft: Int[Tensor, "b k"],
    target: Float[Tensor, "b slots v"],
    proposal: Float[Tensor, "b k v"],
    accept_uniform: Float[Tensor, "b k"],
    ending_uniform: Float[Tensor, "b slots"],
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """(A, the token after the accepted ones) at T>0 when draft token j was drawn from `proposal` j (Leviathan et al. 2023).

    It is accepted with probability min(1, p/q); the token that ends the round comes from `leftover`.
    """
    p, q = (t.gather(2, draft[..., None]).squeeze(2) for t in (target[:, :-1], proposal))
    accepted = (accept_uniform * q < p).cumprod(1).sum(1)
    nothing = F.pad(proposal, (0, 0, 0, 1))  # no token is proposed for the slot after the last: its law is whole
    ending = leftover(at(target, accepted), at(nothing, accepted))
    return accepted, draw(ending, ending_uniform.gather(1, accepted[:, None])).squeeze(1)


def leftover(target: Float[Tensor, "b v"], proposal: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """(p - q)+, not normalised. Where rounding leaves only zeros, p and q are equal, and p is used instead."""
    rest = (target - proposal).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)


def at(rows: Shaped[Tensor, "b n ..."], index: Int[Tensor, " b"]) -> Shaped[Tensor, "b ..."]:
    """One entry of each row."""
    return rows[torch.arange(len(rows), device=rows.device), index]


def draw(weights: Float[Tensor, "... v"], uniform: Float[Tensor, "... n"]) -> Int[Tensor, "... n"]:
    """One index per uniform with probability proportional to `weights`, by inversion in float64."""
    total = weights.double().cumsum(-1)
    index = torch.searchsorted(total, uniform * total[..., -1:], right=True)
    return index.clamp(max=weights.shape[-1] - 1)
