"""AUF in SpecForge 0.2.0: DFlash training whose loss ends at the drafter's first wrong argmax, as a strategy of its own.

    torchrun --nproc-per-node 1 examples/specforge_auf.py run.yaml

`run.yaml` is a SpecForge run configuration with `training.strategy: auf-dflash`, everything else as for `dflash`.
SpecForge's command line knows built-in strategies only, hence this entry. docs/integrations.md says what is overridden.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from specforge.algorithms.builtin import builtin_algorithm_registry
from specforge.algorithms.common.dflash_family_data import build_offline_reader
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
from specforge.algorithms.common.providers import make_registration
from specforge.algorithms.dflash.providers import algorithm_providers, algorithm_spec
from specforge.algorithms.model_providers import _build_dflash_family_model
from specforge.algorithms.registry import AlgorithmRegistration
from specforge.application import build_application_run
from specforge.config import Config, load_config
from specforge.distributed import destroy_distributed, init_distributed
from specforge.training.strategies.base import DFlashTrainStrategy
from torch import Tensor, manual_seed
from torch.nn import functional as F

from specauf.objective import Slots, auf, position_decay

STRATEGY = "auf-dflash"


class AUFDFlashModel(OnlineDFlashModel):
    """DFlash's training model with another credit. `loss_decay_gamma` decays inside the support."""

    credit = staticmethod(auf)

    def _dflash_objective_chunk_terms(
        self, hidden: Tensor, target_ids: Tensor, weight_mask: Tensor
    ) -> tuple[Tensor, ...]:
        # Slot 0 holds the anchor's own token: it predicts nothing, and a miss there must not end the block.
        labels, mask = target_ids[..., 1:], weight_mask[..., 1:]
        logits = self.lm_head(hidden[..., 1:, :])
        ce = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)
        valid, hit = mask > 0.5, logits.argmax(-1) == labels
        weight = mask * self.credit(Slots(valid=valid, hit=hit)).to(mask)
        if (self.loss_decay_gamma or 0) > 0:
            weight = weight * position_decay(labels.shape[-1], self.loss_decay_gamma).to(weight)
        return (ce * weight).sum(), weight.sum(), (hit & valid).sum().float(), mask.sum()


class AUFStrategy(DFlashTrainStrategy):
    """The training step is DFlash's. Checkpoints carry the name, and resuming compares it with the run's."""

    name = STRATEGY


def build_model(config: Config, draft: Any, draft_config: Any, target_config: Any, tokenizer: Any) -> Any:
    if config.training.loss_type != "dflash":
        raise ValueError(f"strategy {STRATEGY} sets the loss: leave training.loss_type out")
    return _build_dflash_family_model(config, draft, tokenizer, lambda common: AUFDFlashModel(**common))


def registration() -> AlgorithmRegistration:
    """DFlash's registration with another name, training model and step; data, capture and draft stay as they are."""
    dflash = algorithm_providers()
    providers = replace(
        dflash,
        algorithm_name=STRATEGY,
        step=replace(dflash.step, build=lambda model, **_: AUFStrategy(model)),
        model=replace(dflash.model, build_training_model=build_model),
        offline=tuple(replace(p, build_reader=partial(build_offline_reader, STRATEGY)) for p in dflash.offline),
    )
    return make_registration(replace(algorithm_spec(), name=STRATEGY), providers)


def main(path: str) -> None:
    config = load_config(path)
    os.environ["FSDP_SHARDING"] = config.training.fsdp_sharding  # where SpecForge's trainer looks for it
    manual_seed(config.training.seed)
    init_distributed(timeout=config.training.dist_timeout)
    try:
        build_application_run(config, registry=builtin_algorithm_registry().with_registration(registration())).run()
    finally:
        destroy_distributed()


if __name__ == "__main__":
    main(sys.argv[1])
