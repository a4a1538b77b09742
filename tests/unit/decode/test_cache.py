"""The cache with room to grow holds what transformers' own holds, and does not move it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from specauf.decode.cache import ROOM, RoomyLayer, roomy_cache

CONFIG = LlamaConfig(num_hidden_layers=2)
ROUND = st.tuples(st.integers(1, 40), st.integers(0, 40), st.permutations(range(4)), st.sampled_from((4, 4, 3, 1)))
"""New columns, how many of them are dropped, an order of the rows, and how many of them stay (of those that are there)."""


@given(st.lists(ROUND, min_size=1, max_size=12), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_it_holds_what_a_cache_that_concatenates_holds(
    rounds: list[tuple[int, int, list[int], int]], seed: int
) -> None:
    ours, plain = roomy_cache(CONFIG), DynamicCache(config=CONFIG)
    generator, batch = torch.Generator().manual_seed(seed), 4
    for new, dropped, order, most in rounds:
        for layer in range(2):
            states = torch.randn(2, batch, 3, new, 5, generator=generator)
            for mine, theirs in zip(ours.update(*states, layer), plain.update(*states, layer), strict=True):
                assert torch.equal(mine, theirs)
        kept = torch.tensor([row for row in order if row < batch][:most])
        for cache in (ours, plain):
            if dropped and new > 1:
                cache.crop(-min(dropped, new - 1))  # a round keeps one at the least
            cache.batch_select_indices(kept)
        batch = len(kept)
        assert ours.get_seq_length() == plain.get_seq_length()
        for (key, value, *_), (their_key, their_value, *_) in zip(ours, plain, strict=True):
            assert torch.equal(key, their_key)
            assert torch.equal(value, their_value)


def test_a_round_writes_its_columns_and_moves_no_other() -> None:
    layer = RoomyLayer()
    for columns in (4, 3):  # the prefill is kept as it is, room is made with the first round
        layer.update(torch.zeros(2, 1, columns, 3), torch.zeros(2, 1, columns, 3))
    where = layer.keys.data_ptr(), layer.values.data_ptr()
    for step in range(1, 12):
        columns = torch.full((2, 1, 8, 3), float(step))
        layer.update(columns, -columns)
        layer.crop(-3)
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == where
    assert layer.keys.shape[-2] == 7 + 11 * 5 <= 7 + ROOM
    assert layer.keys[0, 0, 7::5, 0].tolist() == list(range(1, 12))
    layer.update(torch.zeros(2, 1, ROOM, 3), torch.zeros(2, 1, ROOM, 3))
    assert layer.keys.data_ptr() != where[0]


def test_layers_with_a_window_stay_as_they_are() -> None:
    cache = roomy_cache(MistralConfig(num_hidden_layers=2, sliding_window=16))
    assert all(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers)
    assert all(type(layer) is RoomyLayer for layer in roomy_cache(CONFIG).layers)
