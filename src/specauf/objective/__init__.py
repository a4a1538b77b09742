"""Training objectives for block drafters, as pure functions of tensors. Needs torch and nothing else.

Read in this order: `blocks` (what a slot predicts), `credit` (how much each slot counts), `registry` (every objective in
one table), `wavefront` (which slots go through the LM head), `loss` (one reducer for all), `metrics` (what is logged).
"""

from specauf.objective.blocks import (
    Blocks,
    before_labels,
    block_inputs,
    build_blocks,
    counter_hash,
    sample_anchors,
    slot_uniform,
)
from specauf.objective.credit import Slots, auf, gate, position_decay
from specauf.objective.loss import LossTerms, Objective, block_loss
from specauf.objective.metrics import block_metrics, leading_run
from specauf.objective.registry import RULES, Rows, Rule, register
from specauf.objective.wavefront import Readout, read_head

__all__ = [
    "RULES",
    "Blocks",
    "LossTerms",
    "Objective",
    "Readout",
    "Rows",
    "Rule",
    "Slots",
    "auf",
    "before_labels",
    "block_inputs",
    "block_loss",
    "block_metrics",
    "build_blocks",
    "counter_hash",
    "gate",
    "leading_run",
    "position_decay",
    "read_head",
    "register",
    "sample_anchors",
    "slot_uniform",
]
