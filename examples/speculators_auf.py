"""AUF in speculators 0.9.0: a DFlash drafter whose loss ends at its first wrong argmax, as a speculator type of its own.

    torchrun --nproc-per-node 1 examples/speculators_auf.py --speculator-type auf-dflash --loss-fn ce \
        --dflash-decay-gamma inf --num-layers 5 --block-size 16 ...

The rest are the options of `speculators train`. docs/integrations.md says what is overridden.
"""

from __future__ import annotations

from typing import Any

from speculators.losses import LossConfig
from speculators.model import SpeculatorModel
from speculators.models.dflash.core import DFlashDraftModel
from speculators.models.dflash.metrics import compute_metrics
from speculators.models.utils import conditional_torch_compile
from torch import Tensor

from specauf.objective import Slots, auf


@SpeculatorModel.register("auf-dflash")
class AUFDFlashDraftModel(DFlashDraftModel):
    """DFlash with another credit. A finite gamma decays inside the support; infinity is AUF alone."""

    credit = staticmethod(auf)

    @conditional_torch_compile
    def forward(
        self,
        *args: Tensor,
        loss_config: LossConfig,
        gamma: float = 4.0,
        per_position_loss_weight: str = "fixed-exp-decay",
        dpace_alpha: float | None = None,  # the trainer passes it to every DFlash
        **kwargs: Any,
    ) -> tuple[None, Tensor, dict[str, Tensor]]:
        if per_position_loss_weight != "fixed-exp-decay":
            raise ValueError("AUF takes D-PACE's place: pass --per-position-loss-weight fixed-exp-decay")
        _, logits, targets, mask, _ = self._backbone_forward(*args, **kwargs)
        # The mask is zero on the anchor's slot unless the drafter predicts there, so that AUF passes it over.
        valid, hit = mask.view(-1, self.block_size) > 0, logits.argmax(-1) == targets.argmax(-1)
        credit = self.credit(Slots(valid=valid, hit=hit.view_as(valid))).view_as(mask)
        loss, metrics = compute_metrics(
            logits,
            targets,
            mask,
            self.block_size,
            gamma=gamma,
            loss_config={name: (credited(term, credit), factor) for name, (term, factor) in loss_config.items()},
            sample_from_anchor=self.config.sample_from_anchor,
        )
        return None, loss, metrics


def credited(term: Any, credit: Tensor) -> Any:
    """A loss of one slot each, weighted; the reduction that follows is speculators' own."""
    return lambda logits, targets: term(logits, targets) * credit


def auf_over_support(slots: Slots) -> Tensor:
    """AUF divided by its support; speculators itself divides by all valid slots, whatever their credit."""
    credit = auf(slots)
    return credit * slots.valid.sum() / (credit * slots.valid).sum().clamp(min=1)


if __name__ == "__main__":
    from speculators.train.cli import main
    from speculators.train.config import TrainConfig

    main(TrainConfig.resolve())
