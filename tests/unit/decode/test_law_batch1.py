"""The same law at batch 1, in a file of its own because two thousand separate decodes take long."""

from __future__ import annotations

from tests.conftest import make_target
from tests.unit.decode.test_law import law, p_value, sample

from specauf.config import SamplingConfig
from specauf.decode.propose import DrafterProposer
from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash


def test_two_thousand_samples_at_batch_1_have_the_targets_law() -> None:
    target = make_target(vocab=5, hidden=16, layers=2, seed=2, scale=2.5)  # two layers, for time
    geometry = DFlashConfig.for_target(
        target.config, block_size=3, num_hidden_layers=1, mask_token_id=3, target_layer_ids=(0,)
    )
    drafter = DrafterProposer(DFlash(geometry, seed=1), target)
    sampling = SamplingConfig(temperature=1.0, seed=9)
    counts = sample(target, drafter, 2_000, sampling, batch=1, length=3)
    assert p_value(counts, law(target, sampling, 3)) > 1e-3
