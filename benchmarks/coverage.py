"""What share of the labels a reduced draft vocabulary covers, by its size. Counted over prepared data; nothing is trained.

    python -m benchmarks.coverage [prepared data ...]

Without arguments, all prepared data in the cache. A vocabulary chosen from all conversations has seen the tokens it is
counted on. For the second figure it is chosen from nine conversations in ten and counted in the tenth, as on new text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from specauf import assets
from specauf.data.dataset import TokenDataset
from specauf.drafter.vocabulary import coverage, most_frequent

SIZES = (4096, 8192, 16384, 32768)
VOCAB = 49152
"""SmolLM2's."""


def labels_of(data: TokenDataset, keep: Sequence[bool]) -> torch.Tensor:
    """The supervised tokens of the conversations to keep."""
    lengths = data.offsets.diff()
    chosen = torch.tensor(list(keep)).repeat_interleave(lengths) & data.mask.bool()
    return data.ids[chosen]


def share(chosen_from: torch.Tensor, counted_in: torch.Tensor, size: int, vocab: int) -> float:
    kept = torch.zeros(vocab, dtype=torch.bool)
    kept[most_frequent(chosen_from, size, vocab)] = True
    return coverage(counted_in, kept)


def table(data: TokenDataset, vocab: int = VOCAB) -> str:
    n = len(data)
    everything = labels_of(data, [True] * n)
    nine, tenth = (labels_of(data, [(i % 10 == 9) == last for i in range(n)]) for last in (False, True))
    lines = [
        f"{n} conversations, {len(everything)} labels, {len(everything.unique())} different ones",
        "| draft vocabulary | of the target's | labels covered | in conversations it was not chosen from |",
        "|---|---|---|---|",
    ]
    for size in SIZES:
        seen, new = share(everything, everything, size, vocab), share(nine, tenth, size, vocab)
        lines.append(f"| {size} | {size / vocab:.0%} | {seen:.2%} | {new:.2%} |")
    return "\n".join(lines)


def main() -> None:
    given = [Path(a) for a in sys.argv[1:]]
    for directory in given or sorted((assets.cache_dir() / "prepared").iterdir()):
        print(f"{directory}\n{table(TokenDataset.load(directory))}\n")


if __name__ == "__main__":
    main()
