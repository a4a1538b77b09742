"""Alignment: what each slot predicts, and that randomness is a function of counters alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specauf.objective import block_inputs, build_blocks, counter_hash, sample_anchors, slot_uniform
from specauf.objective.blocks import counter_uniform, covered, prefix_tokens


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), block_size=st.integers(2, 6))
def test_labels_and_validity_equal_a_loop(seed: int, block_size: int) -> None:
    g = torch.Generator().manual_seed(seed)
    b, s = 2, 17
    ids = torch.randint(1, 50, (b, s), generator=g)
    mask = torch.rand(b, s, generator=g) < 0.7
    anchors, keep = sample_anchors(mask, torch.tensor([5, 9]), 6, seed=seed, epoch=0)
    blocks = build_blocks(ids, mask, anchors, keep, block_size)
    inputs = block_inputs(ids, anchors, block_size, 99)
    before = prefix_tokens(ids, anchors, block_size - 1)
    for i in range(b):
        for j in range(anchors.shape[1]):
            a = int(anchors[i, j])
            assert inputs[i, j].tolist() == [int(ids[i, a])] + [99] * (block_size - 1)
            assert before[i, j].tolist() == [int(ids[i, min(a + k, s - 1)]) for k in range(block_size - 1)]
            if keep[i, j]:
                assert mask[i, a] and mask[i, a + 1] and blocks.valid[i, j, 0]
            for k in range(1, block_size):
                inside = bool(keep[i, j]) and a + k < s and bool(mask[i, a + k])
                assert bool(blocks.valid[i, j, k - 1]) == inside
                assert int(blocks.labels[i, j, k - 1]) == (int(ids[i, a + k]) if inside else 0)
    labelled = {(i, int(anchors[i, j]) + k + 1) for i, j, k in blocks.valid.nonzero().tolist()}
    assert covered(blocks, s) == len(labelled) and all(mask[place] for place in labelled)


def test_anchors_do_not_depend_on_batch_layout_or_padding() -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 40, generator=g) < 0.8
    uid = torch.tensor([11, 22, 33])
    together, kept = sample_anchors(mask, uid, 8, seed=4, epoch=2)
    for i in (2, 0, 1):
        wider = torch.nn.functional.pad(mask[i : i + 1], (0, 13))
        alone, kept_alone = sample_anchors(wider, uid[i : i + 1], 8, seed=4, epoch=2)
        assert alone[kept_alone].tolist() == together[i][kept[i]].tolist()
    other, _ = sample_anchors(mask, uid, 8, seed=4, epoch=3)
    assert not torch.equal(other, together)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), block_size=st.integers(2, 6))
def test_the_targets_labels_end_where_the_target_departs_from_the_data(seed: int, block_size: int) -> None:
    """Also where it does so at a token that nobody supervised: what follows was not said by the target either."""
    g = torch.Generator().manual_seed(seed)
    b, s = 2, 17
    ids = torch.randint(1, 50, (b, s), generator=g)
    mask = torch.rand(b, s, generator=g) < 0.6
    said = torch.where(torch.rand(b, s, generator=g) < 0.7, ids.roll(-1, 1), 50)
    anchors, keep = sample_anchors(mask, torch.tensor([5, 9]), 6, seed=seed, epoch=0)
    blocks = build_blocks(ids, mask, anchors, keep, block_size, said)
    for i in range(b):
        for j in range(anchors.shape[1]):
            a, so_far = int(anchors[i, j]), bool(keep[i, j])
            for k in range(1, block_size):
                valid = so_far and a + k < s and bool(mask[i, a + k])
                assert bool(blocks.valid[i, j, k - 1]) == valid
                assert int(blocks.labels[i, j, k - 1]) == (int(said[i, a + k - 1]) if valid else 0)
                so_far = so_far and a + k < s and said[i, a + k - 1] == ids[i, a + k]


@pytest.mark.parametrize(("uid", "seed", "epoch"), [(8, 4, 2), (7, 5, 2), (7, 4, 3)])
def test_anchors_are_of_a_conversation_a_seed_and_an_epoch(uid: int, seed: int, epoch: int) -> None:
    mask = torch.ones(1, 40).bool()
    first, again = (sample_anchors(mask, torch.tensor([7]), 8, seed=4, epoch=2)[0] for _ in range(2))
    other, _ = sample_anchors(mask, torch.tensor([uid]), 8, seed=seed, epoch=epoch)
    assert torch.equal(first, again) and len(set(first[0].tolist()) & set(other[0].tolist())) < 6


def test_a_draw_is_of_its_conversation_anchor_slot_seed_and_epoch() -> None:
    """One number for each of them, whatever stands beside it in the batch."""
    uid, anchors = torch.tensor([3, 4]), torch.tensor([[0, 5, 9], [5, 9, 30]])
    drawn = torch.stack([slot_uniform(uid, anchors, 6, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)])
    assert drawn.shape == (4, 2, 3, 5) and drawn.dtype == torch.float64
    assert len(drawn.unique()) == drawn.numel() and drawn.min() >= 0 and drawn.max() < 1
    alone = slot_uniform(uid[1:], anchors[1:, 1:2], 4, seed=0, epoch=1)
    assert torch.equal(alone, drawn[1, 1:, 1:2, :3])


def test_every_candidate_is_equally_likely() -> None:
    mask = torch.ones(1, 12).bool()
    counts = torch.zeros(12)
    for epoch in range(2000):
        anchors, keep = sample_anchors(mask, torch.tensor([7]), 3, seed=0, epoch=epoch)
        counts[anchors[keep]] += 1
    assert counts[11] == 0  # the last position has no successor
    expected = 2000 * 3 / 11
    assert ((counts[:11] - expected).abs() < 5 * expected**0.5).all()


def test_there_are_as_many_anchors_as_the_widest_sequence_has_and_at_least_one() -> None:
    mask = torch.tensor([[True] * 5, [False, True, True, False, False]])
    for supervised, number, want in ((mask, 99, [4, 1]), (mask, 3, [3, 1]), (mask & False, 99, [0, 0])):
        anchors, keep = sample_anchors(supervised, torch.tensor([3, 4]), number, seed=0, epoch=0)
        assert anchors.shape == keep.shape == (2, max(1, *want)) and keep.sum(1).tolist() == want
        assert not anchors[~keep].any(), "padding stands at 0"


def splitmix(*parts: int) -> int:
    """`counter_hash` in integers without a sign (Steele, Lea and Flood 2014)."""
    state = 0
    for part in parts:
        x = ((state ^ part) + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        state = x ^ (x >> 31)
    return state % 2**63


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
def test_the_hash_is_splitmix_and_its_uniform_the_upper_bits(parts: list[int]) -> None:
    """Another hash would give every run of the same seed other anchors, draws and data order."""
    assert counter_hash(*parts).item() == splitmix(*parts)
    assert counter_uniform(*parts).item() == splitmix(*parts) // 2**10 / 2**53


def test_counter_hash_is_stable_and_well_spread() -> None:
    values = counter_hash(1, 2, torch.arange(100_000))
    assert values.min() >= 0 and len(values.unique()) == 100_000
    assert abs(float((values.double() / 2**63).mean()) - 0.5) < 0.01
    assert counter_hash(1, 2, 3).item() == counter_hash(1, 2, torch.tensor([3]))[0].item()
    assert counter_hash(1, 2, 3).item() != counter_hash(1, 3, 2).item()
