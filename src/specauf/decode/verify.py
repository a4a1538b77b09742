"""The accept rules, as pure functions of tensors: what makes speculative decoding exact.

The drafter's proposal is its argmax at every temperature, a point mass. At T=0 a draft token is accepted while it equals
the target's argmax. At T>0 it is accepted with the probability the target gives it; on a rejection the next token is drawn
from the target without it, renormalised. Either way the output has the target's law, whatever the drafter says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specauf.config import SamplingConfig
from specauf.objective.blocks import counter_hash

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

ACCEPT, RESAMPLE = 1, 2
"""Streams of `uniform`: one number decides acceptance at a position, another draws the token that ends a round."""


def uniform(seed: int, stream: int, uid: Int[Tensor, ...], position: Int[Tensor, ...]) -> Float[Tensor, ...]:
    """float64 in [0, 1): a function of (seed, stream, prompt, position), so no draw depends on the batch layout."""
    return (counter_hash(seed, stream, uid, position) >> 10).double() * 2.0**-53


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
    if sampling.repetition_penalty != 1.0:
        logits = logits.clone()
        penalise = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        for row, length in enumerate(lengths.tolist()):
            for slot in range(slots):
                prefix = ids[row : row + 1, : length - slots + 1 + slot]
                logits[row, slot] = penalise(prefix, logits[row, slot][None])[0]
    warpers: list[LogitsProcessor] = []
    if sampling.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature and sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature and sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    flat = logits.reshape(b * slots, v)
    for warper in warpers:
        flat = warper(ids[:0], flat)
    return flat.view(b, slots, v)


def accept_greedy(
    draft: Int[Tensor, "b k"], target: Float[Tensor, "b slots v"]
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """(A, the token after them) at T=0. `target` are logits of the B = k+1 verified inputs, the anchor first."""
    choice = target.argmax(-1)  # b slots
    accepted = (draft == choice[:, :-1]).cumprod(1).sum(1)
    return accepted, choice.gather(1, accepted[:, None]).squeeze(1)


def accept_sampled(
    draft: Int[Tensor, "b k"],
    target: Float[Tensor, "b slots v"],
    accept_uniform: Float[Tensor, "b k"],
    ending_uniform: Float[Tensor, "b slots"],
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """(A, the token after them) at T>0: rejection sampling of a point-mass proposal against the target.

    `target` are probabilities at the B = k+1 verified inputs. Draft token j is accepted when its uniform is below its
    probability; the token that ends the round comes from the rejected slot's residual, or from the last slot in full.
    """
    chance = target[:, :-1].gather(2, draft[..., None]).squeeze(2)
    accepted = (accept_uniform < chance).cumprod(1).sum(1)
    ending = target.gather(1, accepted[:, None, None].expand(-1, 1, target.shape[2])).squeeze(1)
    return accepted, draw(residual(ending, draft, accepted), ending_uniform.gather(1, accepted[:, None]).squeeze(1))


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


def draw(weights: Float[Tensor, "b v"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """One index per row with probability proportional to `weights`, by inversion in float64."""
    total = weights.double().cumsum(-1)
    index = torch.searchsorted(total, (uniform.double() * total[:, -1])[:, None], right=True).squeeze(1)
    return index.clamp(max=weights.shape[1] - 1)
