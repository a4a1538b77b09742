"""Alignment: what each slot predicts, and that randomness is a function of counters alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specauf.objective import block_inputs, build_blocks, counter_hash, sample_anchors


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
    for i in range(b):
        for j in range(anchors.shape[1]):
            a = int(anchors[i, j])
            assert inputs[i, j].tolist() == [int(ids[i, a])] + [99] * (block_size - 1)
            if keep[i, j]:
                assert mask[i, a] and mask[i, a + 1] and blocks.valid[i, j, 0]
            for k in range(1, block_size):
                inside = bool(keep[i, j]) and a + k < s and bool(mask[i, a + k])
                assert bool(blocks.valid[i, j, k - 1]) == inside
                assert int(blocks.labels[i, j, k - 1]) == (int(ids[i, a + k]) if inside else 0)


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


def test_every_candidate_is_equally_likely() -> None:
    mask = torch.ones(1, 12).bool()
    counts = torch.zeros(12)
    for epoch in range(2000):
        anchors, keep = sample_anchors(mask, torch.tensor([7]), 3, seed=0, epoch=epoch)
        counts[anchors[keep]] += 1
    assert counts[11] == 0  # the last position has no successor
    expected = 2000 * 3 / 11
    assert ((counts[:11] - expected).abs() < 5 * expected**0.5).all()


def test_counter_hash_is_stable_and_well_spread() -> None:
    values = counter_hash(1, 2, torch.arange(100_000))
    assert values.min() >= 0 and len(values.unique()) == 100_000
    assert abs(float((values.double() / 2**63).mean()) - 0.5) < 0.01
    assert counter_hash(1, 2, 3).item() == counter_hash(1, 2, torch.tensor([3]))[0].item()
    assert counter_hash(1, 2, 3).item() != counter_hash(1, 3, 2).item()
