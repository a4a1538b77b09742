"""Training objectives for block drafters, as pure functions of tensors. Needs torch and nothing else.

Every objective is one weighted loss, L = sum m c l / sum m c (paper, equation 1): m says which slots are valid, c is the
credit of a slot and l its loss. Read the modules in this order:

- `blocks`: anchors, slots, labels and the validity m
- `credit`: the credit c of every method, from position decay to Accept-Until-Fail (AUF)
- `registry`: every objective by name, Table 1 of the paper and more
- `wavefront`: which slots go through the LM head, and the gradient of each
- `loss`: one reducer for all objectives
- `branches`: Domino's two-branch loss (section 5.2 and Table 3)
- `metrics`: the training diagnostics of section 4
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
from specauf.objective.branches import VARIANTS, Branch, TwoBranchTerms, lambda_base, two_branch_loss
from specauf.objective.credit import Slots, auf, exclusive_prefix, gate, position_decay
from specauf.objective.loss import LossTerms, Objective, block_loss
from specauf.objective.metrics import block_metrics, leading_run
from specauf.objective.registry import RULES, Rows, Rule, register
from specauf.objective.wavefront import Head, Readout, read_head

__all__ = [
    "RULES",
    "VARIANTS",
    "Blocks",
    "Branch",
    "Head",
    "LossTerms",
    "Objective",
    "Readout",
    "Rows",
    "Rule",
    "Slots",
    "TwoBranchTerms",
    "auf",
    "before_labels",
    "block_inputs",
    "block_loss",
    "block_metrics",
    "build_blocks",
    "counter_hash",
    "exclusive_prefix",
    "gate",
    "lambda_base",
    "leading_run",
    "position_decay",
    "read_head",
    "register",
    "sample_anchors",
    "slot_uniform",
    "two_branch_loss",
]
