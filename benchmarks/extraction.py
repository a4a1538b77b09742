"""Feature extraction against the Hugging Face body's own forward, on the same batches, alternating in one run.

    python benchmarks/extraction.py [--rounds 5]

Prints both rates in tokens per second (medians) and their ratio; above 0.9 is what the design asks for. The target is the
embedded default, the text its own corpus.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from specauf import assets
from specauf.config import DataConfig, TargetConfig
from specauf.data.dataset import prepare
from specauf.drafter.config import spread_layer_ids
from specauf.target import Target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    target = Target.load(TargetConfig())
    assert target.tokenizer is not None
    where = assets.cache_dir() / "prepared" / "benchmark"
    data = prepare(DataConfig(max_conversations=100), target.tokenizer, where, source=assets.sharegpt()).train
    full = [data[i].input_ids for i in range(len(data)) if len(data[i].input_ids) == 384]
    batches = [torch.stack(full[i : i + 4]) for i in range(0, 12, 4)]
    ids = spread_layer_ids(target.num_layers, 5)
    ways = {
        "tapped": lambda batch: target.run(batch, ids).features,
        "body": lambda batch: target.body(input_ids=batch, use_cache=False).last_hidden_state,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for batch in batches:
                for name, way in ways.items():
                    began = time.perf_counter()
                    way(batch)
                    if turn:  # the first turn warms up
                        seconds[name].append(time.perf_counter() - began)
    rate = {name: batches[0].numel() / statistics.median(s) for name, s in seconds.items()}
    print(f"tapped features: {rate['tapped']:.0f} tokens/s; body alone: {rate['body']:.0f} tokens/s")
    print(f"ratio {rate['tapped'] / rate['body']:.3f} (torch {torch.__version__}, {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
