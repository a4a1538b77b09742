"""The settings of `specauf rollout`, and its directory as training data: recognised without torch, checked, read."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from specauf.config import DataConfig, SamplingConfig, digest
from specauf.files import at_home
from specauf.strict import UserError, require

if TYPE_CHECKING:
    from specauf.data.dataset import Prepared, TokenDataset
    from specauf.target import Target

log = logging.getLogger(__name__)

SETTINGS = "rollout.json"
"""Written first: what the rollouts in a directory are made from, finished or not."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the target answers training prompts. Not part of a recipe, which names the resulting directory instead."""

    turns: int | Literal["all"] = "all"
    """Number of assistant turns of a conversation to answer; later turns are left out."""
    samples: int = 1
    """Independent answers to every conversation."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_new_tokens: int = 256
    """Tokens per answer. An answer cut here, or by data.max_length, ends its conversation."""
    max_tokens: int | None = None
    """Start no further conversation once this many tokens have been generated."""
    batch_size: int = 32
    """Conversations that are answered together."""

    def __post_init__(self) -> None:
        require(self.turns == "all" or self.turns >= 1, f"rollout: turns is 'all' or at least 1, got {self.turns}")
        for name, least in (("samples", 1), ("max_new_tokens", 2), ("max_tokens", 1), ("batch_size", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"rollout: {name} must be at least {least}, got {value}")
        require(
            self.samples == 1 or self.sampling.temperature > 0,
            f"rollout: {self.samples} samples at temperature 0 would be the same text: give a temperature",
        )


def rollout_meta(path: str) -> dict[str, Any] | None:
    """`meta.json` of the rollout directory `path`, or None when `path` is something else. Reads nothing more.

    `meta["rollout"]` says how they were made: `target` (fingerprint), `sampling`, `samples`, `turns`, `source` (key of
    the prepared corpus), `tokens` (generated), ... Raises `UserError` when the rollouts are not finished.
    """
    directory = at_home(path)
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        meta = {}
    if isinstance(meta, dict) and isinstance(meta.get("rollout"), dict):
        return meta
    if (directory / SETTINGS).is_file():
        raise UserError(f"{directory}: these rollouts are not finished; run the same `specauf rollout` command again")
    return None


def open_rollouts(config: DataConfig, target: Target) -> Prepared:
    """The rollouts in `config.path`: `max_conversations` conversations, with all their samples.

    Split and seed were settled when the rollouts were made.

    Raises `UserError` when they do not fit the target's tokenizer and template or the recipe's data section.
    """
    from specauf.data.chat import template_hash, tokenizer_hash
    from specauf.data.dataset import HELDOUT, Prepared, TokenDataset, read_heldout
    from specauf.data.sources import Ledger

    directory = at_home(config.path)
    dataset, tokenizer = TokenDataset.load(directory), target.require_tokenizer()
    meta = dataset.meta
    for what, hashed in (("tokenizer", tokenizer_hash), ("chat template", template_hash)):
        if meta[f"{what.split()[-1]}_hash"] != hashed(tokenizer):
            raise UserError(
                f"data.path: {directory} was made with another {what} than {target.name}'s: "
                "make rollouts of this target, or train with theirs"
            )
    if meta["enable_thinking"] != config.enable_thinking:
        raise UserError(f"{directory} was made with data.enable_thinking={meta['enable_thinking']}: set it to that")
    if meta["max_length"] > config.max_length:
        raise UserError(f"{directory} was made with data.max_length={meta['max_length']}: set at least that")
    if meta["rollout"]["target"] != target.fingerprint():
        log.warning(
            "%s: the rollouts were made by another target than %s, or in another dtype (the fingerprints differ)",
            *(directory, target.name),
        )
    if config.max_conversations is not None:
        dataset = _first(dataset, config.max_conversations)
    try:
        heldout = read_heldout(directory)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{directory / HELDOUT} cannot be read ({error}): make the rollouts again") from None
    return Prepared(dataset, heldout, Ledger(**dataset.meta["ledger"]), reused=True)


def _first(dataset: TokenDataset, conversations: int) -> TokenDataset:
    from specauf.data.dataset import TokenDataset

    meta, ledger = dataset.meta, dict(dataset.meta["ledger"])
    samples = [len(list(group)) for _, group in groupby(dataset.conversations)]
    if conversations >= len(samples):
        return dataset
    n = sum(samples[:conversations])
    end, over = int(dataset.offsets[n]), len(samples) - conversations
    ledger["dropped"] = {**ledger["dropped"], "over the limit": ledger["dropped"].get("over the limit", 0) + over}
    ledger["kept"] -= over
    rows: dict[str, Any] = {
        name: meta[name][:n] for name in ("conversation_ids", "conversation_numbers") if name in meta
    }
    meta = {**meta, **rows, "key": digest([meta["key"], n]), "ledger": ledger}
    return TokenDataset(dataset.ids[:end], dataset.mask[:end], dataset.offsets[: n + 1], dataset.uid[:n], meta)
