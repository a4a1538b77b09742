"""The checkpoint layout and the forward pass, against code nobody here wrote: PyPI `dflash` 0.1.0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dflash.model import build_target_layer_ids, extract_context_feature
from reference import TOLERANCE, drafter_config, note, our_hidden, reload_theirs, shake, their_hidden
from torch import Tensor

from specauf.drafter.checkpoint import load_drafter
from specauf.drafter.config import spread_layer_ids
from specauf.drafter.dflash import DFlash
from specauf.target import Target

SHAPES = [(4, 1, 1), (8, 2, 3), (16, 3, 5)]
"""Block size, drafter layers, taps."""


def scene(target: Target, drafter: DFlash, length: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens [2, s], random features [2, s, taps*h] and anchors [2, 5], neighbouring and extreme ones included."""
    generator = torch.Generator().manual_seed(3)
    width = len(drafter.config.target_layer_ids) * drafter.config.hidden_size
    tokens = torch.randint(2, drafter.config.vocab_size - 1, (2, length), generator=generator)
    features = torch.randn(2, length, width, generator=generator) * 3
    return tokens, features, torch.tensor([[0, 1, 33, 34, length - 1], [2, 9, 40, 41, 62]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_agrees_on_random_features(target: Target, shape: tuple[int, int, int], tmp_path: Path) -> None:
    block_size, layers, taps = shape
    drafter = shake(DFlash(drafter_config(target, block_size=block_size, layers=layers, num_taps=taps)))
    theirs = reload_theirs(drafter, tmp_path)
    tokens, features, anchors = scene(target, drafter)
    ours = our_hidden(drafter, target, tokens, features, anchors)
    reference = their_hidden(drafter, theirs, target, tokens, features, anchors)
    logits = theirs.compute_logits(reference, target.model.get_output_embeddings())
    hidden_error = (ours - reference).abs().max().item()
    logit_error = (target.logits(ours) - logits).abs().max().item()
    note(f"{target.name}, B={block_size}, {layers} layers: |dhidden| {hidden_error:.1e}, |dlogit| {logit_error:.1e}")
    assert hidden_error < TOLERANCE and logit_error < TOLERANCE
    assert ours.abs().mean() > 0.1, "a drafter that says nothing would agree with anything"


def test_forward_agrees_on_the_targets_own_features(target: Target, tmp_path: Path) -> None:
    """Layer id l means hidden_states[l + 1] to both, in the order of the ids."""
    drafter = shake(DFlash(drafter_config(target)))
    theirs = reload_theirs(drafter, tmp_path)
    tokens, _, anchors = scene(target, drafter)
    features = target.run(tokens, drafter.config.target_layer_ids).features
    with torch.no_grad():
        states = target.model(tokens, output_hidden_states=True).hidden_states
    theirs_features = extract_context_feature(states, theirs.target_layer_ids)
    torch.testing.assert_close(features, theirs_features, atol=TOLERANCE, rtol=1e-5)
    ours = our_hidden(drafter, target, tokens, features, anchors)
    reference = their_hidden(drafter, theirs, target, tokens, theirs_features, anchors)
    assert (ours - reference).abs().max() < TOLERANCE
    assert (target.logits(ours) - target.model.get_output_embeddings()(reference)).abs().max() < TOLERANCE


def test_the_comparison_notices_a_context_that_is_one_off(target: Target, tmp_path: Path) -> None:
    """Our features are changed at one position: blocks anchored after it must part from the reference, no other may."""
    drafter = shake(DFlash(drafter_config(target)))
    theirs = reload_theirs(drafter, tmp_path)
    tokens, features, anchors = scene(target, drafter)
    reference = their_hidden(drafter, theirs, target, tokens, features, anchors)
    changed = features.clone()
    changed[1, 40] += 1.0  # sequence 1 has anchors at 2, 9, 40, 41 and 62
    error = (our_hidden(drafter, target, tokens, changed, anchors) - reference).abs().amax((-1, -2))
    assert (error[1] > 10 * TOLERANCE).tolist() == [False, False, False, True, True]
    assert error[0].max() < TOLERANCE and error[1, :3].max() < TOLERANCE


def test_a_checkpoint_written_by_the_reference_loads_here(target: Target, tmp_path: Path) -> None:
    drafter = shake(DFlash(drafter_config(target)))
    theirs = reload_theirs(drafter, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_drafter(tmp_path / "theirs")
    assert {**vars(back.config), "extra": {}} == {**vars(drafter.config), "extra": {}}
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in drafter.state_dict().items())


def test_names_and_bits_survive_the_round_trip(target: Target, tmp_path: Path) -> None:
    drafter = shake(DFlash(drafter_config(target)))
    theirs = reload_theirs(drafter, tmp_path)
    state = theirs.state_dict()
    assert state.keys() == drafter.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in drafter.state_dict().items())
    config = drafter.config
    assert (theirs.block_size, theirs.mask_token_id) == (config.block_size, config.mask_token_id)
    assert tuple(theirs.target_layer_ids) == config.target_layer_ids


@pytest.mark.parametrize("layers", [4, 8, 12, 24, 28, 30, 32, 36, 40, 64])
def test_default_layer_ids_are_the_references(layers: int) -> None:
    for taps in range(1, min(8, layers - 3) + 1):
        if layers - 3 >= taps:
            assert spread_layer_ids(layers, taps) == tuple(build_target_layer_ids(layers, taps)), (layers, taps)
