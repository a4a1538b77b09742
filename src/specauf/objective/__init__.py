"""Training objectives for block drafters, as pure functions of tensors. Needs torch and nothing else.

Read in this order: `blocks` (what a slot predicts), `credit` (how much each slot counts), `wavefront` (which slots go
through the LM head), `loss` (one reducer for every objective), `metrics` (what is logged).
"""

from specauf.objective.blocks import Blocks, block_inputs, build_blocks, counter_hash, sample_anchors
from specauf.objective.credit import CREDITS, accept_until_fail, position_decay
from specauf.objective.loss import LossTerms, Objective, block_loss
from specauf.objective.metrics import block_metrics, leading_run
from specauf.objective.wavefront import Readout, read_head

__all__ = [
    "CREDITS",
    "Blocks",
    "LossTerms",
    "Objective",
    "Readout",
    "accept_until_fail",
    "block_inputs",
    "block_loss",
    "block_metrics",
    "build_blocks",
    "counter_hash",
    "leading_run",
    "position_decay",
    "read_head",
    "sample_anchors",
]
