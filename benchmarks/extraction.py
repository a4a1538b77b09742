"""Feature extraction against the Hugging Face body's own forward, and in bfloat16 against float32.

    python -m benchmarks.extraction

All run alternately on the same batches: three of 4 x 384 tokens, target and text from the embedded default.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.common import Row, alternate, main
from specauf import assets
from specauf.config import DataConfig, TargetConfig
from specauf.data.dataset import prepare
from specauf.drafter.config import spread_layer_ids
from specauf.target import Target


@torch.no_grad()
def rows() -> Iterator[Row]:
    target, narrow = Target.load(TargetConfig()), Target.load(TargetConfig(dtype="bfloat16"))
    assert target.tokenizer is not None
    where = assets.cache_dir() / "prepared" / "benchmark"
    data = prepare(DataConfig(max_conversations=100), target.tokenizer, where, source=assets.sharegpt()).train
    full = [data[i].input_ids for i in range(len(data)) if len(data[i].input_ids) == 384]
    batches = [torch.stack(full[i : i + 4]) for i in range(0, 12, 4)]
    ids = spread_layer_ids(target.num_layers, 5)
    ways = {
        "tapped": lambda: [target.run(batch, ids).features for batch in batches],
        "bfloat16": lambda: [narrow.run(batch, ids).features for batch in batches],
        "body": lambda: [target.body(input_ids=batch, use_cache=False).last_hidden_state for batch in batches],
    }
    seconds = alternate(ways, rounds=5)
    tokens = sum(batch.numel() for batch in batches)
    rate = {name: f"{tokens / taken:.0f}" for name, taken in seconds.items()}
    note = f"{rate['tapped']} tokens/s against {rate['body']}"
    at = "SmolLM2-135M, 4 x 384 tokens, 5 taps"
    yield Row(
        "feature extraction: rate",
        "the Hugging Face body's forward",
        at,
        seconds["body"] / seconds["tapped"],
        0.95,
        note=note,
    )
    note, gain = f"{rate['bfloat16']} tokens/s against {rate['tapped']}", seconds["tapped"] / seconds["bfloat16"]
    yield Row("feature extraction, target in bfloat16", "in float32", at, gain, note=note)


if __name__ == "__main__":
    main(rows)
