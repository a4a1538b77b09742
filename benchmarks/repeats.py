"""Rollouts with made-up texts among them that repeat: what the drafter is to learn copying from.

    python -m benchmarks.repeats runs/regenerated-once runs/regenerated-and-repeats [share]

`share` (0.5) of a made-up text is added for every rollout. A text is a segment of 8 to 96 tokens, repeated until it has
`LENGTH` tokens and supervised from its second occurrence on. Seven in ten segments are different tokens drawn as often as the
rollouts use them, where language does not help; the others are stretches of the rollouts.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import torch

from specauf.config import digest
from specauf.data.dataset import TokenDataset, read_heldout, write_heldout

LENGTH, SHORTEST, LONGEST, RANDOM = 384, 8, 96, 0.7


def repeats(data: TokenDataset, count: int, seed: int = 0) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Rows (uid, ids int32 [s], loss mask uint8 [s])."""
    rng, said, rows = random.Random(seed), data.ids[data.mask.bool()], []
    for _ in range(count):
        period = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
        start = rng.randrange(len(said) - period)
        segment = said[start : start + period]
        if rng.random() < RANDOM:
            drawn: dict[int, None] = {}
            while len(drawn) < period:
                drawn[int(said[rng.randrange(len(said))])] = None
            segment = torch.tensor(list(drawn), dtype=torch.int32)
        ids = segment.repeat(LENGTH // period + 1)[:LENGTH]
        rows.append((rng.getrandbits(62), ids, (torch.arange(LENGTH) >= period).to(torch.uint8)))
    return rows


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: python -m benchmarks.repeats ROLLOUTS OUT [SHARE]")
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    share = float(sys.argv[3]) if len(sys.argv) > 3 else 0.5
    data = TokenDataset.load(source)
    rows = [(e.uid, e.input_ids.int(), e.loss_mask.to(torch.uint8)) for e in data]
    added = repeats(data, round(share * len(rows)))
    names = [*data.meta["conversation_ids"], *(f"repeats-{i}" for i in range(len(added)))]
    ledger = dict(data.meta["ledger"])
    for count in ("records_in", "kept"):
        ledger[count] += len(added)
    meta = data.meta | {"conversation_ids": names, "ledger": ledger, "repeats": len(added)}
    out.mkdir(parents=True, exist_ok=True)
    write_heldout(out, read_heldout(source))
    TokenDataset.from_rows(rows + added, meta | {"key": digest([meta["key"], share])}).save(out)
    print(f"{len(rows)} rollouts and {len(added)} made-up texts in {out}")


if __name__ == "__main__":
    main()
