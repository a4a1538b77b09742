"""The cache with room to grow holds what transformers' own holds, and does not move it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from specauf.decode import cache
from specauf.decode.cache import ROOM, SHARING, RoomyLayer, keep_path, roomy_cache, without_holes
from specauf.decode.generate import generate, undecodable
from specauf.decode.propose import PromptLookup
from specauf.target import Target

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
        for held in (ours, plain):
            if dropped and new > 1:
                held.crop(-min(dropped, new - 1))  # a round keeps one at the least
            held.batch_select_indices(kept)
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


def test_layers_that_share_the_cache_of_earlier_ones_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma4 = pytest.importorskip("transformers.models.gemma4")
    monkeypatch.setattr(cache, "ROOM", 1)  # so that holes are moved
    torch.manual_seed(0)
    config = gemma4.Gemma4TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=61,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    )  # fmt: skip
    target = Target(gemma4.Gemma4ForCausalLM(config), None, "sharing")
    for parameter in target.model.parameters():
        parameter.data.mul_(3)
    assert any(isinstance(layer, SHARING) for layer in roomy_cache(config).layers) and undecodable(target) is None
    prompts = [[5, 9, 2], [7] * 12, [3]]
    made = generate(target, PromptLookup(6), prompts, max_new_tokens=40, eos_ids=frozenset())
    for prompt, found in zip(prompts, made, strict=True):
        said = target.logits(target.run(torch.tensor([prompt + found.tokens])).final[0]).argmax(-1)
        assert found.tokens == said[len(prompt) - 1 : -1].tolist()
    held = roomy_cache(config)
    target.run(torch.arange(24)[None], cache=held)
    assert without_holes(held, torch.arange(24)[None] % 3 == 0, 8).shape == (1, 8)
    assert [None if layer.keys is None else layer.keys.shape[2] for layer in held.layers] == [8, 8, 8, None, None]


def test_the_cache_keeps_the_path_of_each_row() -> None:
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    columns = torch.arange(2 * 6.0).view(2, 1, 6, 1)
    for layer in range(2):
        cache.update(columns + layer, -columns, layer)
    keep_path(cache, 4, torch.tensor([[0, 2], [0, 3]]))
    cache.crop(-2)
    for layer in range(2):
        assert (cache.layers[layer].keys - layer).flatten(1).tolist() == [[0, 1, 2, 4], [6, 7, 8, 11]]
        assert cache.layers[layer].values.flatten(1).tolist() == [[0, -1, -2, -4], [-6, -7, -8, -11]]
