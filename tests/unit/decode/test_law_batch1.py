"""The same law at batch 1, in a file of its own because ten thousand separate decodes take a while."""

from __future__ import annotations

from tests.unit.decode.test_law import law, p_value, proposer, sample, tiny  # noqa: F401

from specauf.config import SamplingConfig


def test_ten_thousand_samples_at_batch_1_have_the_targets_law(tiny) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    sampling = SamplingConfig(temperature=1.0, seed=9)
    assert p_value(sample(tiny, proposer(tiny), 10_000, sampling, batch=1, length=3), law(tiny, sampling, 3)) > 1e-3
