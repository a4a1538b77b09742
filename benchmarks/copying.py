"""How far a drafter can copy: what the target's features say of earlier tokens, and what training on nothing but repeats adds.

    python -m benchmarks.copying drafters/smollm2-135m-auf [steps]

Texts are made up: tokens of HumanEval's prompts, all different, in an order drawn at random and repeated. No knowledge of
language helps there, every block can be copied, and prompt lookup accepts all of it.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from specauf.bench.tasks import load_task, render_prompts
from specauf.config import TargetConfig
from specauf.drafter.checkpoint import load_drafter
from specauf.drafter.dflash import DFlash
from specauf.objective.blocks import block_inputs
from specauf.target import Target

LENGTH, ANCHORS, BATCH, BACK, RATE = 256, 32, 4, 4, 1e-3


class Repeats:
    """Batches of texts that repeat a segment of 10 to 64 tokens, and anchors at which the next block was there before."""

    def __init__(self, target: Target, block_size: int, seed: int) -> None:
        prompts = render_prompts(target, load_task("humaneval")[:40], enable_thinking=False)
        self.tokens = torch.tensor(sorted({token for p in prompts for token in p.prompt}))
        self.block_size, self.seed, self.rng = block_size, torch.Generator().manual_seed(seed), random.Random(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """(ids int64 [b, s], anchors int64 [b, n])"""
        rows, anchors = [], []
        for _ in range(BATCH):
            period = round(math.exp(self.rng.uniform(math.log(10), math.log(64))))
            segment = self.tokens[torch.randperm(len(self.tokens), generator=self.seed)[:period]]
            rows.append(segment.repeat(LENGTH // period + 1)[:LENGTH])
            anchors.append(torch.randint(period + 1, LENGTH - self.block_size, (ANCHORS,), generator=self.seed))
        return torch.stack(rows), torch.stack(anchors)


def explained(target: Target, layer_ids: Sequence[int], data: Repeats, batches: int = 12) -> list[list[float]]:
    """For each layer, the share of variance of the embedding k tokens before (k = 0..BACK) that is linear in its output.

    By ridge regression on four fifths of the positions, measured on the others. The text is not repeated here.
    """
    inputs, wanted = [], []
    for _ in range(batches):
        ids = data.tokens[torch.randint(len(data.tokens), (BATCH, LENGTH), generator=data.seed)]
        inputs.append(target.run(ids, layer_ids).features[:, BACK:].flatten(0, 1).float())
        said = [target.embed(ids[:, BACK - k : LENGTH - k]).flatten(0, 1).float() for k in range(BACK + 1)]
        wanted.append(torch.stack(said, 1))
    x, y = torch.cat(inputs).unflatten(1, (len(layer_ids), -1)), torch.cat(wanted)
    n = len(x) * 4 // 5
    found = []
    for layer in range(len(layer_ids)):
        seen = (x[:, layer] - x[:n, layer].mean(0)) / x[:n, layer].std(0)
        seen = torch.cat([seen, torch.ones(len(x), 1)], 1)
        gram = seen[:n].T @ seen[:n] + 300 * torch.eye(seen.shape[1])
        row = []
        for k in range(BACK + 1):
            weight = torch.linalg.solve(gram, seen[:n].T @ y[:n, k])
            left = (y[n:, k] - seen[n:] @ weight).square().sum() / (y[n:, k] - y[:n, k].mean(0)).square().sum()
            row.append(1 - float(left))
        found.append(row)
    return found


def predicted(target: Target, drafter: DFlash, ids: Tensor, anchors: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and, for each slot of each block, whether its best token of `among` (sorted ids) is right: bool [b, n, k]."""
    config, k = drafter.config, drafter.config.num_predictions
    features = target.run(ids, config.target_layer_ids).features.float()
    embeds = target.embed(block_inputs(ids, anchors, config.block_size, config.mask_token_id)).float()
    with torch.autocast("cpu", torch.bfloat16):
        context = drafter.context(features, torch.arange(LENGTH).expand(BATCH, -1))
        hidden = drafter.predictions(drafter(embeds, anchors, context))
        logits = F.linear(hidden, target.head_weight[among]).float()
    labels = ids[:, None].expand(-1, ANCHORS, -1).gather(2, anchors[..., None] + torch.arange(1, k + 1))
    labels = torch.searchsorted(among, labels)
    return F.cross_entropy(logits.flatten(0, 2), labels.flatten()), logits.argmax(-1) == labels


def told(right: Sequence[Tensor]) -> str:
    all_right = torch.cat(list(right))
    slots = ", ".join(f"{share:.2f}" for share in all_right.float().mean((0, 1)).tolist())
    return f"tau {1 + float(all_right.int().cumprod(-1).sum(-1).float().mean()):.2f}, right by slot: {slots}"


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m benchmarks.copying DRAFTER [STEPS]")
    steps, every = int(sys.argv[2]) if len(sys.argv) > 2 else 0, 100
    torch.manual_seed(0)
    target, drafter = Target.load(TargetConfig(dtype="bfloat16")), load_drafter(sys.argv[1]).float()
    taps, data = drafter.config.target_layer_ids, Repeats(target, drafter.config.block_size, seed=1)
    print("share of the embedding k tokens before that a layer's output holds linearly; * is a tap of the drafter")
    print("| layer | " + " | ".join(f"k = {k}" for k in range(BACK + 1)) + " |")
    shown = sorted({*range(1, target.num_layers - 1, 3), *taps})
    for layer, row in zip(shown, explained(target, shown, data), strict=True):
        print(f"| {layer}{'*' * (layer in taps)} | " + " | ".join(f"{max(0, share):.2f}" for share in row) + " |")
    everything = torch.arange(target.head_weight.shape[0])

    @torch.no_grad()
    def measured() -> str:
        return told([predicted(target, drafter, *data.batch(), everything)[1] for _ in range(20)])

    print("as it is:", measured(), flush=True)
    optimizer = torch.optim.AdamW(drafter.parameters(), weight_decay=0.0)
    right, began = list[Tensor](), time.perf_counter()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATE * min(1, step / 50)
        loss, seen = predicted(target, drafter, *data.batch(), data.tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        right.append(seen)
        if step % every == 0:
            print(f"steps {step - every + 1} to {step}, {time.perf_counter() - began:.0f} s: {told(right)}", flush=True)
            right.clear()
    if steps:
        print("afterwards:", measured())


if __name__ == "__main__":
    main()
