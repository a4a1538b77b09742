"""The run configuration: typed, strict, YAML in and out. Imports no torch, so `--help` is instant.

A key that does not exist is an error that names the file, the key and its nearest neighbour; a value out of range is
refused before anything is loaded. Every field is written back by `dump`, so a run's `config.yaml` is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from specauf.files import at_home
from specauf.strict import UserError, at_least, choose, from_dict, read_yaml, require, set_value, to_dict

EMBEDDED = "smollm2-135m"
"""The name of the embedded target."""
LOOKUP = "prompt-lookup"
"""The name of prompt lookup among the methods of every table."""
OBJECTIVES = (
    *("uniform", "decay", "first-k", "auf", "soft-auf", "sampled-auf", "first-error"),
    *("griffin-exclusive", "griffin-inclusive", "griffin-windowed", "l2r-focal", "l2r-focal-separate"),
    *("dpace", "dpace-cumulative", "dpace-continuation", "streak-credit", "streak", "pard2", "lk-alpha", "lk-lambda"),
)
"""The names in `objective.registry.RULES`, kept here too so that a recipe is checked without importing torch."""
OWN_DECAY = ("decay", "l2r-focal", "l2r-focal-separate", "lk-alpha", "lk-lambda")
"""Objectives with a position decay of their own. Any other takes one as `<name>-decay`."""
VARIANTS = ("decay-only", "b-auf", "b-auf-d", "s-auf", "s-auf-d", "f-auf", "f-auf-d")
"""The names in `objective.branches.VARIANTS`."""
LONGEST = 2**20
"""New tokens of one answer; room for them is made beforehand."""
REDUCTIONS = ("global", "block", "sequence")
DEFAULT_GAMMA = {4: 2.0, 8: 4.0, 10: 5.0, 16: 7.0}
"""Decay length by block size B, from the DFlash paper for 16, 10 and 8. The values at 4 and at other sizes (0.45 B)
follow their trend."""


@dataclass(frozen=True)
class TargetConfig:
    path: str = EMBEDDED
    """A directory or hub id of a Hugging Face causal LM, or `smollm2-135m`, the embedded default."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the target's weights. On a CPU, bfloat16 is faster if the processor can multiply in it (AVX512-BF16 or
    AMX; see `lscpu`), and several times slower if not."""
    device: str = "auto"
    """`auto` is cuda if there is a GPU, else cpu."""
    trust_remote_code: bool = False
    """Run the code that comes with a hub model."""


@dataclass(frozen=True)
class TargetOf:
    """The target that a drafter is run with: the one it was trained for, unless another is named."""

    path: str | None = None
    """A directory or hub id, as in a recipe. When not given, the target that the checkpoint names."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The training run's when not given."""
    device: str = "auto"
    """As in a recipe."""
    trust_remote_code: bool = False
    """Run the code that comes with a hub model."""

    def of(self, trained: Mapping[str, Any]) -> TargetConfig:
        """The target to load; `trained` is a checkpoint's record of its training. Raises `UserError` when neither names one."""
        path = self.path or trained.get("target")
        if path is None:
            raise UserError("the checkpoint does not say which target it is for: give --target.path")
        dtype = self.dtype or trained.get("target_dtype", TargetConfig.dtype)
        return TargetConfig(path, dtype, self.device, self.trust_remote_code)


@dataclass(frozen=True)
class DataConfig:
    path: str = "sharegpt"
    """A JSON, JSONL or parquet file of ShareGPT or OpenAI messages, or a directory of such files; `sharegpt`, the embedded
    default; or the output directory of `specauf rollout`, whose split, order and seed are already settled."""
    max_length: int = 384
    """Keep at most this many tokens of a conversation, from its beginning."""
    max_conversations: int | None = None
    """Keep at most this many training conversations; the others are counted in the ledger as `over the limit`."""
    heldout: float = 0.02
    """Share of conversations to hold out; parts of one chat, and those with equal first user turns, stay together."""
    seed: int = 0
    """Decides which groups are held out and the order in which conversations are taken."""
    enable_thinking: bool = False
    """Passed to the chat template, and stored with every checkpoint."""

    def __post_init__(self) -> None:
        at_least(self, "data", max_length=16, max_conversations=1)
        require(0 <= self.heldout < 1, f"data.heldout is a share in [0, 1), got {self.heldout}")


@dataclass(frozen=True)
class FeaturesConfig:
    cache: bool = False
    """Store the target's features on disk once, instead of running the target in every step."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the stored features."""
    max_gb: float = 4.0
    """Refuse to write a cache larger than this."""
    extras: bool = False
    """Also store the final normed hidden state and the target's argmax."""

    def __post_init__(self) -> None:
        require(self.max_gb > 0, f"features.max_gb must be > 0, got {self.max_gb}")


@dataclass(frozen=True)
class DrafterConfig:
    block_size: int = 8
    """Slots of a block, the anchor included, so `block_size - 1` predictions."""
    num_hidden_layers: int = 2
    """Layers of the drafter."""
    num_taps: int = 5
    """Number of evenly spaced target layers to tap when `target_layer_ids` is not given."""
    target_layer_ids: tuple[int, ...] | None = None
    """Target layers whose outputs the drafter reads, counted from 0, ascending; the last layer is not allowed."""
    mask_token_id: int | None = None
    """An embedding row that text never uses, the input of the slots to predict; found when not given."""
    intermediate_size: int | None = None
    """Width of the MLP; the target's own when not given."""
    kind: Literal["dflash", "domino"] = "dflash"
    """`domino` adds a causal head with two branches to the same body; the next four fields apply to it alone."""
    gru_hidden_dim: int | None = None
    """Width of the head's GRU; when not given, a quarter of the target's width, but at least 256."""
    emb_dim: int | None = None
    """Rank of the head's correction to the logits; when not given, a sixteenth of the target's width, but at least 128."""
    pure_draft_prefix_len: int = 1
    """Number of first predictions that are left uncorrected. SGLang serves only 1."""
    shift_label: bool = True
    """Slot k predicts the token at anchor + k + 1, as in shipped checkpoints."""
    draft_vocab_size: int | None = None
    """Size of a reduced draft vocabulary, the most frequent labels of the data; the target's whole when not given."""
    init_from: str | None = None
    """A drafter's directory to take the initial weights from. Its geometry must match (a head: see docs/domino.md)."""
    init_layers: tuple[int, ...] | None = None
    """Target layers to copy into the drafter's layers, one for each, instead of random initial weights."""

    def __post_init__(self) -> None:
        require(self.block_size >= 2, f"drafter.block_size counts the anchor and must be >= 2, got {self.block_size}")
        at_least(self, "drafter", num_hidden_layers=1, num_taps=1, intermediate_size=1, gru_hidden_dim=1, emb_dim=1)
        at_least(self, "drafter", pure_draft_prefix_len=0, draft_vocab_size=2)
        idle = self.kind == "domino" and self.pure_draft_prefix_len >= self.block_size - 1
        require(not idle, "drafter.pure_draft_prefix_len leaves Domino's head no prediction to correct: lower it")
        require(self.target_layer_ids != (), "drafter.target_layer_ids is empty; leave it out for evenly spaced taps")
        require(
            self.init_layers is None or len(self.init_layers) == self.num_hidden_layers,
            f"drafter.init_layers: one target layer for each of the {self.num_hidden_layers} draft layers, "
            f"got {self.init_layers}",
        )
        require(
            self.init_layers is None or self.init_from is None,
            "drafter.init_layers and drafter.init_from both set the initial weights: leave one out",
        )
        require(
            self.draft_vocab_size is None or self.kind == "dflash",
            "drafter.draft_vocab_size is for drafter.kind=dflash: a Domino drafter's correction is full-width",
        )


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "auf"
    """A row of docs/objectives.md, or `<row>-decay` for the row times the position decay."""
    gamma: float | None = None
    """Decay length in slots, for rows with a position decay. When not given, the row's, or by block size: 4 at 8, 7 at 16."""
    reduction: str = "global"
    """What the loss is a mean over: `global` (every slot of the step), `block` or `sequence`. See docs/objectives.md."""
    labels: str = "data"
    """`data`, or `target`: the target's argmax, up to the first slot where it departs from the data."""
    options: dict[str, Any] = field(default_factory=dict)
    """This objective's options, among alpha, temperature, eps, k, window, focal, eta, per, ce_weight and kd_weight."""
    variant: str | None = None
    """Domino: a row of the paper's Table 3, e.g. `b-auf-d`. It stands for `name`, `options` and the next three fields."""
    final: str | None = None
    """Domino: the objective of the final branch, if it differs from the base branch's, which is `name`."""
    final_options: dict[str, Any] = field(default_factory=dict)
    """Domino: the options of `final`."""
    support: Literal["base", "final"] = "final"
    """Domino: the branch whose predictions determine the final branch's support."""
    lambda_base_start: float = 1.0
    """Domino: the base branch's share of the loss at the first step. It falls linearly to 0."""
    lambda_base_decay_ratio: float = 1.0
    """Domino: the share of the steps over which it falls. At 0.5, the second half trains the final branch alone."""
    plugin: str | None = None
    """A module or .py file to import first, which registers further objectives."""
    logits_rows: int = 256
    """At most this many rows of logits exist at once, however large the batch is."""

    def __post_init__(self) -> None:
        base = self.name.removesuffix("-decay") if self.name != "decay" else self.name
        if self.plugin is None:
            choose(base, (*OBJECTIVES, "<name>-decay"), "objective")
            twice = base != self.name and base in OWN_DECAY
            require(not twice, f"objective {base!r} has a position decay already: set gamma")
            alone = self.variant is None and self.final is None
            takes = self.gamma is None or base in OWN_DECAY or base != self.name
            require(takes or not alone, f"objective {self.name!r} takes no gamma; {self.name + '-decay'!r} does")
        choose(self.reduction, REDUCTIONS, "reduction")
        choose(self.labels, ("data", "target"), "labels")
        require(self.gamma is None or self.gamma > 0, f"objective.gamma must be > 0, got {self.gamma}")
        if self.variant is not None:
            choose(self.variant, VARIANTS, "variant")
            said = {name: getattr(self, name) for name in ("final", "options", "final_options")}
            said |= {"name": self.name != "auf", "support": self.support != "final"}
            given = [name for name, value in said.items() if value]
            require(
                not given,
                f"objective.variant sets the objective of both branches: leave out objective.{', objective.'.join(given)}",
            )
        require(
            self.final is not None or not self.final_options,
            "objective.final_options needs objective.final: without it, objective.options are both branches'",
        )
        for name in ("lambda_base_start", "lambda_base_decay_ratio"):
            require(0 <= getattr(self, name) <= 1, f"objective.{name} is a share in [0, 1], got {getattr(self, name)}")
        at_least(self, "objective", logits_rows=1)

    def decay_for(self, block_size: int) -> float:
        """The decay length at `block_size`, for a row that has none of its own."""
        return self.gamma if self.gamma is not None else DEFAULT_GAMMA.get(block_size, max(1.0, 0.45 * block_size))


@dataclass(frozen=True)
class TrainConfig:
    max_steps: int | None = None
    """Optimizer steps, the horizon of the learning-rate schedule; from `minutes` when not given."""
    minutes: float | None = None
    """A wall-clock budget for the optimizer steps, turned into `max_steps` by a calibration and then frozen."""
    batch_size: int = 4
    """Conversations per micro-batch and rank."""
    accumulation: int = 1
    """Micro-batches per optimizer step and rank."""
    num_anchors: int = 32
    """Blocks per conversation."""
    lr: float = 6e-4
    """Highest learning rate of AdamW."""
    warmup: float = 0.04
    """Share of the steps with linear warm-up. After it, the learning rate follows a cosine to zero."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it."""
    weight_decay: float = 0.0
    """AdamW's, for every weight."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the drafter's matrix products; weights, moments and loss are float32. `auto` is bfloat16 on CUDA, else float32."""
    seed: int = 0
    """Decides the initial weights, the order of the batches, the anchors, and what an objective draws."""
    save_every: int = 200
    """Write a checkpoint every this many steps, and at the end."""
    eval_every: int = 0
    """Log tau by replay on held-out prompts every this many steps; 0 is never."""
    common_every: int = 10
    """Log common-token accuracy on a sample of blocks every this many steps."""
    shard_target: bool = False
    """Under torchrun: shard the target's layers over the processes (FSDP2) instead of keeping a copy in each.
    Each process still loads the whole target first."""

    def __post_init__(self) -> None:
        at_least(self, "train", batch_size=1, accumulation=1, num_anchors=1, save_every=1, common_every=1, max_steps=1)
        at_least(self, "train", weight_decay=0, seed=0, eval_every=0)
        require(self.minutes is None or self.minutes > 0, f"train.minutes must be > 0, got {self.minutes}")
        for name in ("lr", "clip"):
            require(getattr(self, name) > 0, f"train.{name} must be > 0, got {getattr(self, name)}")
        require(self.seed < 2**63, f"train.seed must be below 2^63, got {self.seed}")
        require(0 <= self.warmup < 1, f"train.warmup is a share in [0, 1), got {self.warmup}")


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 0.0
    """0 decodes greedily; above it, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together reach this probability; 1 is off."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred before become less probable; 1 is off."""
    seed: int = 0
    """Of the draws."""
    proposal: Literal["greedy", "sampled"] = "greedy"
    """How the drafter proposes a token: `greedy` is its argmax, `sampled` a draw from softmax(logits / temperature).
    Their tau are not comparable."""

    def __post_init__(self) -> None:
        require(0 <= self.temperature < math.inf, f"temperature must be >= 0 and finite, got {self.temperature}")
        require(
            self.temperature > 0 or self.proposal == "greedy",
            "proposal 'sampled' draws from the drafter at the sampling temperature, so it needs temperature > 0",
        )
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(self.top_k >= 0, f"top_k must be >= 0 (0 is off), got {self.top_k}")
        require(
            0 < self.repetition_penalty < math.inf, f"repetition_penalty must be > 0, got {self.repetition_penalty}"
        )
        require(-(2**63) <= self.seed < 2**63, f"sampling.seed must be between -2^63 and 2^63, got {self.seed}")


@dataclass(frozen=True)
class EvalConfig:
    tasks: tuple[str, ...] = ("humaneval", "heldout")
    """Prompt sets of docs/benchmarks.md. A recipe's are kept out of its training data."""
    tasks_dir: str | None = None
    """A directory of `<task>.jsonl` files of {"id", "turns"} records, to use instead of the built-in sources."""
    prompts: int = 16
    """Prompts per task; a conversation of several turns is one."""
    max_new_tokens: int = 128
    """Tokens of an answer at most."""
    batch_size: int = 16
    """Prompts that are decoded together."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.tasks), "eval.tasks is empty: write [heldout] to keep no task's prompts out of the training data"
        )
        at_least(self, "eval", prompts=1, max_new_tokens=2, batch_size=1)  # the first token is in no round
        require(self.max_new_tokens <= LONGEST, f"eval.max_new_tokens must be <= {LONGEST}, got {self.max_new_tokens}")


DOMINO = {
    "drafter": ("gru_hidden_dim", "emb_dim", "pure_draft_prefix_len", "shift_label"),
    "objective": ("variant", "final", "final_options", "support", "lambda_base_start", "lambda_base_decay_ratio"),
}
"""Fields that have no effect on a DFlash drafter and so may not be set for one."""


@dataclass(frozen=True)
class RunConfig:
    out: str = "runs/default"
    """Directory of the run."""
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.out.startswith("~"):  # as in `--set out=~/x`, which no shell expands
            object.__setattr__(self, "out", str(at_home(self.out)))
        require(self.out != "", "out is empty: name a directory")
        if (start := self.drafter.init_from) is not None:
            written = [os.path.realpath(Path(self.out) / name) for name in ("checkpoint", "checkpoint.before")]
            own = os.path.realpath(at_home(start)) in written
            require(not own, f"drafter.init_from: {start} is what this run writes over: choose another `out`")
        require(
            not (self.train.shard_target and self.features.cache),
            "train.shard_target is for a target that runs in every step; with features.cache it does not: set one of them",
        )
        for section, names in DOMINO.items():
            chosen = getattr(self, section)
            for name in names if self.drafter.kind == "dflash" else ():
                require(
                    getattr(chosen, name) == getattr(type(chosen)(), name),
                    f"{section}.{name} is for a drafter with two branches: set drafter.kind=domino",
                )


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `section.key=value` overrides. Raises `ConfigError` naming the file or the override."""
    data = read_yaml(Path(path), "no such recipe", "Recipes that ship with specauf are in recipes/*.yaml")
    return override(from_dict(RunConfig, {} if data is None else data, str(path)), overrides)


def override(config: RunConfig, overrides: typing.Sequence[str]) -> RunConfig:
    """`config` with `section.key=value` strings applied, values read as YAML except for text. Errors name the override.

    The result is checked once, after all of them are applied, so their order matters only where two set the same key.
    """
    data = to_dict(config)
    for item in overrides:
        set_value(RunConfig, data, item)
    return from_dict(RunConfig, data, f"override {', '.join(map(repr, overrides))}") if overrides else config


def dump(config: Any) -> str:
    """YAML of every field, in declaration order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def digest(config: Any) -> str:
    """Twelve hex digits of the configuration's content."""
    text = json.dumps(to_dict(config) if is_dataclass(config) else config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
