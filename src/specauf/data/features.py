"""Optional store of the target's features: written once, memory-mapped, resumable, keyed by what produced it.

The size is estimated first, and a cache over the budget is refused before a byte is written. Shards are whole files, so a
killed build resumes at the first missing one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence

from specauf.config import FeaturesConfig, digest
from specauf.files import atomic_file, atomic_write_text, save_tensors
from specauf.strict import UserError
from specauf.target import Target

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from specauf.data.dataset import TokenDataset

log = logging.getLogger(__name__)

SHARD_TOKENS = 16384
BATCH_TOKENS = 2048
LOGITS_ROWS = 128
"""Rows of the target's logits that exist at once."""


class FeatureCache:
    """Features of the first `len(self)` conversations of a dataset, read without a copy."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.meta: dict[str, Any] = json.loads((directory / "meta.json").read_text())
        self.where: list[tuple[int, int, int]] = []  # shard, first row, rows
        self._shards: list[dict[str, Tensor]] = []
        for number, lengths in enumerate(self.meta["shards"]):
            first = 0
            for length in lengths:
                self.where.append((number, first, length))
                first += length
            path = directory / f"shard-{number:05d}.safetensors"
            try:
                with safe_open(path, "pt") as file:
                    self._shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(
                    f"{path} is damaged ({error}): delete it, and its features are computed again"
                ) from None

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: int) -> Float[Tensor, "s taps_h"]:
        return self.get(index, "features")

    def get(self, index: int, name: str) -> Tensor:
        """`features` [s, taps * h]; with extras also `final` [s, h] and `argmax` [s]."""
        shard, first, rows = self.where[index]
        if name not in self._shards[shard]:
            raise UserError(f"{self.directory} was written without {name!r}: set features.extras and build it again")
        return self._shards[shard][name][first : first + rows]


def estimate_gb(tokens: int, layer_ids: Sequence[int], hidden_size: int, config: FeaturesConfig) -> float:
    """Size of a cache of `tokens` tokens, in 10^9 bytes."""
    size = 4 if config.dtype == "float32" else 2
    per_token = len(layer_ids) * hidden_size * size + (hidden_size * size + 4 if config.extras else 0)
    return tokens * per_token / 1e9


def shard_plan(lengths: Sequence[int], shard_tokens: int = SHARD_TOKENS) -> list[list[int]]:
    """Consecutive conversations, grouped into shards of about `shard_tokens` tokens."""
    plan: list[list[int]] = [[]]
    for length in lengths:
        if sum(plan[-1]) + length > shard_tokens and plan[-1]:
            plan.append([])
        plan[-1].append(length)
    return [shard for shard in plan if shard]


@torch.no_grad()
def extract(
    target: Target,
    sequences: Sequence[Int[Tensor, " s"]],
    layer_ids: Sequence[int],
    *,
    extras: bool = False,
    batch_tokens: int = BATCH_TOKENS,
) -> list[dict[str, Tensor]]:
    """Features of every sequence, on the CPU in the target's dtype. Batches hold sequences of similar length.

    Only the target's body runs, unless `extras`.
    """
    out: dict[int, dict[str, Tensor]] = {}
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    while order:
        longest = len(sequences[order[-1]])
        part = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // longest)))]
        ids = pad_sequence([sequences[i] for i in part], batch_first=True)
        tapped = target.run(ids.to(target.device), layer_ids)
        for row, i in enumerate(part):
            n = len(sequences[i])
            out[i] = {"features": tapped.features[row, :n].cpu()}
            if extras:
                final = tapped.final[row, :n]
                out[i] |= {"final": final.cpu(), "argmax": argmax_of(target, final).int().cpu()}
    return [out[i] for i in range(len(sequences))]


def argmax_of(target: Target, final: Float[Tensor, "s h"]) -> Int[Tensor, " s"]:
    """The target's argmax for the token after each position, on its device."""
    return torch.cat([target.logits(rows).argmax(-1) for rows in final.split(LOGITS_ROWS)])


def build_features(
    target: Target,
    dataset: TokenDataset,
    directory: str | Path,
    layer_ids: Sequence[int],
    config: FeaturesConfig,
    *,
    examples: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> FeatureCache:
    """Write (or finish, or just open) the cache of the first `examples` conversations under `directory`.

    The subdirectory is named by a digest of the target's fingerprint, the layer ids, the dtype and the tokens, so a cache
    can never be read with another target. With `share` = (r, n), this process writes every n-th shard from the r-th, and
    n - 1 other processes write the rest; `wait` returns when they have.
    Raises `UserError` when the estimate exceeds `config.max_gb`.
    """
    count = len(dataset) if examples is None else min(examples, len(dataset))
    lengths = dataset.offsets[: count + 1].diff().tolist()
    size = estimate_gb(sum(lengths), layer_ids, int(target.config.hidden_size), config)
    if size > config.max_gb:
        raise UserError(
            f"the feature cache of {sum(lengths):,} tokens would take {size:.2f} GB, over features.max_gb={config.max_gb:g}. "
            "Lower data.max_conversations, raise features.max_gb, or set features.cache=false to run the target online"
        )
    key = digest(
        {
            "target": target.fingerprint(),
            "layers": list(layer_ids),
            "dtype": config.dtype,
            "extras": config.extras,
            "tokens": [_checksum(dataset.ids[: sum(lengths)]), lengths],
        }
    )
    out = Path(directory) / f"features-{key}"
    out.mkdir(parents=True, exist_ok=True)
    log.info("feature cache %s: %d tokens, %.2f GB", out, sum(lengths), size)
    plan, first = shard_plan(lengths), 0
    for number, shard in enumerate(plan):
        path = out / f"shard-{number:05d}.safetensors"
        if number % share[1] == share[0] and not path.exists():
            sequences = [dataset[i].input_ids for i in range(first, first + len(shard))]
            parts = extract(target, sequences, layer_ids, extras=config.extras)
            dtype = getattr(torch, config.dtype)
            tensors = {
                name: torch.cat([p[name].to(dtype) if name in ("features", "final") else p[name] for p in parts])
                for name in parts[0]
            }
            if not all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()):
                mend = "features.dtype=bfloat16" if config.dtype == "float16" else "target.dtype=bfloat16 or float32"
                raise UserError(f"the features of {target.name} are not finite as {config.dtype}: set {mend}")
            with atomic_file(path) as temporary:
                save_tensors(tensors, temporary)
        first += len(shard)
        on_progress(sum(shard))
    atomic_write_text(out / "meta.json", json.dumps({"layer_ids": list(layer_ids), "shards": plan}) + "\n")
    wait()
    for number in range(len(plan)):
        if not (out / f"shard-{number:05d}.safetensors").is_file():
            raise UserError(
                f"{out} has no shard {number}: all processes of a run share SPECAUF_CACHE: put it on a disk that they all see"
            )
    return FeatureCache(out)


def _checksum(ids: Int[Tensor, " tokens"]) -> int:
    """Checksum of tokens and their positions, a part at a time: a corpus may be as large as memory is."""
    total = 0
    for start in range(0, len(ids), 1 << 20):
        part = ids[start : start + (1 << 20)].to(torch.int64)
        total += int((part * torch.arange(start + 1, start + 1 + len(part))).sum())
    return total
