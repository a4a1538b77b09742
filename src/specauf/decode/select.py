"""Self-selection at test time (SpecDiff-2): several candidate blocks from one draft forward, verified as one tree.

Candidate 0 is the greedy chain. The others draw each slot by itself from the drafter's marginal, at a temperature of their
own. The target reads the prefix tree of all candidates in one pass, and the one with the longest expected accepted length
is then verified like any greedy draft. That is the SpecDiff-2 paper's rule as third parties tell it; the released code does
rejection sampling through the tree instead, which is not built here. The rule is exact: however a block was chosen, it is a
point mass, as long as the choice never sees the numbers that decide acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

from specauf.config import SamplingConfig
from specauf.decode.verify import CANDIDATE, draw, warp
from specauf.objective.blocks import counter_uniform
from specauf.strict import require

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Selection:
    candidates: int = 8
    """K: blocks to choose from, the greedy chain among them."""
    temperature: float = 1.5
    """T_s, at which the other K - 1 are drawn from the drafter."""

    def __post_init__(self) -> None:
        require(self.candidates >= 1, f"candidates must be at least 1, got {self.candidates}")
        require(self.temperature > 0, f"the candidates' temperature must be > 0, got {self.temperature}")

    @classmethod
    def of(cls, candidates: int, temperature: float) -> Selection | None:
        """None for one candidate: plain speculative decoding. Raises `ConfigError` out of range."""
        made = cls(candidates, temperature)
        alone = candidates == 1 and temperature != cls.temperature
        require(not alone, "--candidate-temperature is that of drawn blocks: give --candidates 2 or more with it")
        return made if candidates > 1 else None

    def __str__(self) -> str:
        return f"self-selection, K={self.candidates}, T_s={self.temperature:g}"


class Tree(NamedTuple):
    """The prefix tree of each row's candidates, nodes in the order of the candidates. Node 0 is the anchor."""

    tokens: Int[Tensor, "b n"]
    """Rows with fewer nodes than the widest are padded; nothing sees the padding."""
    parent: Int[Tensor, "b n"]
    depth: Int[Tensor, "b n"]
    path: Int[Tensor, "b candidates slots"]
    """The node of every slot of every candidate, slot 0 the anchor."""
    size: list[int]
    """Nodes of each row without the padding."""

    def sees(self, columns: Bool[Tensor, "b past"]) -> Bool[Tensor, "b 1 n all"]:
        """The attention mask: a node sees the given columns of the past, its ancestors and itself."""
        b, n = self.tokens.shape
        own = torch.eye(n, dtype=torch.bool, device=columns.device).expand(b, n, n)
        for _ in range(self.path.shape[2] - 1):
            own = own | own.gather(1, self.parent[..., None].expand(b, n, n))
        return torch.cat([columns[:, None].expand(b, n, -1), own], 2)[:, None]


def build_tree(anchor: Int[Tensor, "b one"], candidates: Int[Tensor, "b candidates k"]) -> Tree:
    """A single candidate gives a chain; candidates without tokens give the anchor alone."""
    b, count, k = candidates.shape
    alike = (candidates[:, :, None] == candidates[:, None]).int().cumprod(-1)  # b c c k: the same up to this slot
    owner = alike.argmax(2)  # b c k: the first candidate with this prefix
    fresh = owner == torch.arange(count, device=owner.device)[:, None]
    number = fresh.flatten(1).cumsum(1).view(b, count, k)  # from 1: the anchor is 0
    path = F.pad(number.gather(1, owner), (1, 0))
    size = (fresh.flatten(1).sum(1) + 1).tolist()
    below, above, slot = path[..., 1:].flatten(1), path[..., :-1].flatten(1), torch.arange(1, k + 1, device=path.device)
    tokens = anchor.repeat(1, max(size))
    return Tree(
        tokens.scatter(1, below, candidates.flatten(1)),
        torch.zeros_like(tokens).scatter(1, below, above),
        torch.zeros_like(tokens).scatter(1, below, slot.repeat(b, count)),
        path,
        size,
    )


def sample_candidates(
    logits: Float[Tensor, "b k v"], selection: Selection, seed: int, uid: Int[Tensor, " b"], anchors: Int[Tensor, " b"]
) -> Int[Tensor, "b candidates k"]:
    """The greedy chain of the drafter's `logits`, then the drawn ones: functions of seed, prompt, position and number."""
    device = logits.device
    position = anchors[:, None, None] + torch.arange(1, logits.shape[1] + 1, device=device)[:, None]
    number = torch.arange(1, selection.candidates, device=device)
    numbers = counter_uniform(seed, CANDIDATE, uid[:, None, None], position, number)
    drawn = draw((logits / selection.temperature).softmax(-1), numbers)
    return torch.cat([logits.argmax(-1)[..., None], drawn], 2).transpose(1, 2)


def choose(
    tree: Tree,
    candidates: Int[Tensor, "b candidates k"],
    logits: Float[Tensor, "b n v"],
    ids: Int[Tensor, "b s"],
    anchors: Int[Tensor, " b"],
    sampling: SamplingConfig,
) -> Int[Tensor, " b"]:
    """The candidate with the highest `score` under the target's warped `logits` of the nodes; the first of equals.

    Overwrites `ids` behind the anchors, where the repetition penalty reads each candidate's own path.
    """
    k = candidates.shape[2]
    after = anchors[:, None] + torch.arange(1, k + 1, device=ids.device)
    scores = []
    for draft, path in zip(candidates.unbind(1), tree.path.unbind(1), strict=True):
        ids.scatter_(1, after, draft)
        scores.append(score(draft, warp(along(logits, path), ids, anchors + 1 + k, sampling), sampling))
    return torch.stack(scores, 1).argmax(1)


def score(
    draft: Int[Tensor, "b k"], target: Float[Tensor, "b slots v"], sampling: SamplingConfig
) -> Float[Tensor, " b"]:
    """sum_m prod_{j<=m} p(draft_j), the expected A of the block; at T=0 A itself. `target` are logits, as `warp` left them."""
    if sampling.temperature == 0:
        chance = (draft == target[:, :-1].argmax(-1)).double()
    else:
        chance = target[:, :-1].softmax(-1).gather(2, draft[..., None]).squeeze(2)
    return chance.cumprod(1).sum(1)


def along(nodes: Float[Tensor, "b n d"], path: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The entries of the nodes on each row's path."""
    return nodes.gather(1, path[..., None].expand(-1, -1, nodes.shape[2]))
