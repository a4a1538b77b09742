"""The drafter's `config.json`, in the spelling of shipped DFlash checkpoints: read strictly, never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from specauf.strict import ConfigError

NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "attention_sink_bias": False,
    "attention_value_scale": 1,
    "causal": False,
    "hidden_act": "silu",
    "input_embedding_scale": 1,
    "is_causal": False,
    "output_multiplier": 1,
    "partial_rotary_factor": 1,
    "sample_from_anchor": False,
    "use_sliding_window": False,
    "use_swa": False,
}
"""Fields of other drafters' configurations, at the only value that the drafters here compute."""


def spread_layer_ids(num_target_layers: int, num_taps: int) -> tuple[int, ...]:
    """Evenly spaced target layers, round(1 + i(L-4)/(n-1)) with Python's rounding; L // 2 for a single tap.

    Layer id l is the output of decoder layer l, which Hugging Face calls `hidden_states[l + 1]`.
    """
    if num_taps == 1:
        return (num_target_layers // 2,)
    if num_target_layers - 3 < num_taps:
        raise ConfigError(
            f"{num_taps} taps do not fit between layers 1 and {num_target_layers - 3} of the target: set drafter.num_taps"
        )
    return tuple(round(1 + i * (num_target_layers - 4) / (num_taps - 1)) for i in range(num_taps))


@dataclass(frozen=True)
class DominoHead:
    """The causal correction that makes a DFlash drafter a Domino one (`projector_type: domino`)."""

    gru_hidden_dim: int
    emb_dim: int
    pure_draft_prefix_len: int = 1
    """How many of the first predictions stay the base branch's own; SGLang serves only 1."""
    shift_label: bool = True
    """Slot k predicts the token at anchor + k + 1, as in shipped checkpoints, rather than at anchor + k."""

    def __post_init__(self) -> None:
        for name, low in (("gru_hidden_dim", 1), ("emb_dim", 1), ("pure_draft_prefix_len", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} must be a whole number >= {low}, got {value!r}")
        if not isinstance(self.shift_label, bool):
            raise ConfigError(f"shift_label must be true or false, got {self.shift_label!r}")


@dataclass(frozen=True)
class DFlashConfig:
    """Geometry of a DFlash drafter, with a Domino head or without. `block_size` counts the anchor slot."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    domino: DominoHead | None = None
    draft_vocab_size: int | None = None
    """Tokens in the drafter's vocabulary, when they are fewer than the target's; see `vocabulary.py` for which."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Provenance kept under the key `specauf`: objective, reduction, template hash, thinking flag, ..."""

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ConfigError(f"block_size counts the anchor and must be at least 2, got {self.block_size}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ConfigError(
                f"mask_token_id {self.mask_token_id} is not a row of the embedding ({self.vocab_size} rows)"
            )
        bad = [i for i in self.target_layer_ids if not 0 <= i < self.num_target_layers - 1]
        if bad or not self.target_layer_ids:
            # The last layer's entry in hidden_states is taken after the final norm, and converters drop it.
            raise ConfigError(
                f"target_layer_ids {list(self.target_layer_ids)}: need ids from 0 to {self.num_target_layers - 2}"
            )
        if list(self.target_layer_ids) != sorted(set(self.target_layer_ids)):
            # Engines collect the taps in the order of the layers: in another, `fc` would read other columns than in training.
            raise ConfigError(
                f"target_layer_ids {list(self.target_layer_ids)}: name each layer once, in ascending order"
            )
        if self.draft_vocab_size is not None and self.domino:
            raise ConfigError("draft_vocab_size is not supported for a Domino drafter, whose correction is full-width")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd, and rotary embeddings turn pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError("num_attention_heads must be a multiple of num_key_value_heads")

    @property
    def num_predictions(self) -> int:
        """Tokens proposed per round, N_serve = B - 1 for every drafter."""
        return self.block_size - 1

    @property
    def num_trained(self) -> int:
        """Predictions supervised in a block, N_train: all B slots of a shifted Domino, whose last is never served."""
        return self.block_size - self.first_slot

    @property
    def first_slot(self) -> int:
        """The slot that predicts the token after the anchor: 0 under `shift_label`, else 1."""
        return int(not (self.domino and self.domino.shift_label))

    @classmethod
    def for_target(
        cls,
        target: Any,
        *,
        block_size: int,
        num_hidden_layers: int,
        mask_token_id: int,
        target_layer_ids: Sequence[int] | None = None,
        num_taps: int = 5,
        intermediate_size: int | None = None,
        domino: DominoHead | None = None,
        draft_vocab_size: int | None = None,
    ) -> DFlashConfig:
        """A drafter that fits a Hugging Face target config: the same widths, heads and rotary base, fewer layers."""
        needed = ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings"]
        for name in [*needed, *(() if intermediate_size else ("intermediate_size",))]:
            if getattr(target, name, None) is None:
                hint = ": give drafter.intermediate_size" if name == "intermediate_size" else ""
                raise ConfigError(f"the target's configuration ({type(target).__name__}) has no {name}{hint}")
        heads = target.num_attention_heads
        ids = target_layer_ids or spread_layer_ids(target.num_hidden_layers, num_taps)
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=intermediate_size or target.intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=_of_all_layers(target, "num_key_value_heads") or heads,
            head_dim=_of_all_layers(target, "head_dim") or target.hidden_size // heads,
            vocab_size=target.vocab_size,
            num_target_layers=target.num_hidden_layers,
            target_layer_ids=tuple(ids),
            mask_token_id=mask_token_id,
            block_size=block_size,
            rms_norm_eps=getattr(target, "rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(target),
            max_position_embeddings=target.max_position_embeddings,
            bos_token_id=target.bos_token_id,
            eos_token_id=target.eos_token_id,
            domino=domino,
            draft_vocab_size=_reduced(draft_vocab_size, target.vocab_size, "drafter"),
        )

    def to_json(self) -> dict[str, Any]:
        """The z-lab layout: a flat Qwen3 config with `block_size`, `num_target_layers` and a nested `dflash_config`.

        A Domino drafter has the same `architectures`, which is what SGLang loads. Its `projector_type` and the sizes of its
        head are in the nested part, where SpecForge keeps them.
        """
        head = {"projector_type": "domino", **asdict(self.domino)} if self.domino else {}
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            "dflash_config": {
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.target_layer_ids),
                **head,
            },
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            **({"draft_vocab_size": self.draft_vocab_size} if self.draft_vocab_size else {}),
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,  # older readers look here, newer ones in rope_parameters
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": self.num_hidden_layers,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "dtype": "float32",
            "specauf": dict(self.extra),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "config.json") -> DFlashConfig:
        """Read a shipped checkpoint's configuration. A missing or unsupported field is an error that names it."""
        parts = (data, *(data.get(key, {}) for key in ("dflash_config", "specauf") if isinstance(data, Mapping)))
        if not all(isinstance(part, Mapping) for part in parts):
            raise ConfigError(f"{where} is not a drafter's configuration: it, dflash_config and specauf are mappings")
        for names in (data.get(key) or [] for key in ("architectures", "layer_types")):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"{where}: architectures and layer_types are lists of names")
        _require_history(data.get("specauf", {}), where)
        if "speculators_model_type" in data:
            raise ConfigError(f"{where} is in speculators' layout, which is written here and not read: give z-lab's")
        nested = data.get("dflash_config", {})

        def get(name: str) -> Any:
            value = nested.get(name, data.get(name))
            if value is None:
                raise ConfigError(f"{where}: the field {name!r} is missing; it is never guessed")
            if data.get(name) not in (None, value):
                raise ConfigError(f"{where}: {name} is {value!r} in dflash_config and {data[name]!r} at the top level")
            return value

        domino = _domino_head(data, where)
        known = ["DFlashDraftModel", "DominoDraftModel"] if domino else ["DFlashDraftModel"]
        if not set(known) & set(data.get("architectures") or []):
            raise ConfigError(f"{where}: architectures is {data.get('architectures')}, expected one of {known}")
        _require_plain(data, NEUTRAL if domino else {**NEUTRAL, "shift_label": False}, where)
        theta = _shipped_theta(data, where)
        plain_fields = (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "vocab_size", "num_target_layers", "mask_token_id", "block_size", "rms_norm_eps"),
            "max_position_embeddings",
        )
        numbers = {name: get(name) for name in plain_fields}
        spread = data.get("initializer_range")
        numbers["initializer_range"] = 0.02 if spread is None else spread
        for name, value in {**numbers, "rope_theta": theta}.items():
            real = name in ("rms_norm_eps", "rope_theta", "initializer_range")
            usable = isinstance(value, (int, float) if real else int) and not isinstance(value, bool)
            if (
                not usable
                or not 0 <= value < (math.inf if real else 1 << 30)
                or (value == 0 and name not in ("mask_token_id", "initializer_range"))
            ):
                raise ConfigError(f"{where}: {name} is {value!r}, which is no such number")
        ids = get("target_layer_ids")
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) for i in ids):
            raise ConfigError(f"{where}: target_layer_ids is {ids!r}, which is no list of layers")
        return cls(
            **numbers,
            target_layer_ids=tuple(ids),
            rope_theta=float(theta),
            bos_token_id=data.get("bos_token_id"),
            eos_token_id=data.get("eos_token_id"),
            domino=domino,
            draft_vocab_size=_reduced(data.get("draft_vocab_size"), get("vocab_size"), where),
            extra=data.get("specauf", {}),
        )


def _require_plain(data: Mapping[str, Any], neutral: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` when a shipped configuration asks for what the drafters here do not compute."""
    for name, plain in neutral.items():
        for section in (data, data.get("dflash_config", {})):
            if section.get(name, plain) not in (plain, None):
                raise ConfigError(f"{where}: {name}={section[name]!r} is not supported, only {plain!r}")
    if any(kind != "full_attention" for kind in data.get("layer_types") or ()):
        raise ConfigError(f"{where}: only full_attention layers are supported, got {data['layer_types']}")


def _shipped_theta(data: Mapping[str, Any], where: str) -> Any:
    """The rotary base of a shipped configuration, in either place."""
    rope = data.get("rope_parameters") or {}
    scaling = data.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or not isinstance(scaling, Mapping):
        raise ConfigError(f"{where}: rope_parameters and rope_scaling are mappings, got {rope!r} and {scaling!r}")
    kinds = [kind.get("rope_type", kind.get("type", "default")) for kind in (rope, scaling)]
    if kinds != ["default"] * 2 or rope.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(f"{where}: only the default rotary embedding is supported")
    theta = rope.get("rope_theta", data.get("rope_theta"))
    if theta is None:
        raise ConfigError(f"{where}: the field 'rope_theta' is missing; it is never guessed")
    return theta


def _require_history(told: Any, where: str) -> None:
    """Raise `ConfigError` when a checkpoint's record of its training, or of what it was made from, has another shape."""

    def demand(part: Any, name: str, needed: Sequence[str] = (), **kinds: Any) -> None:
        if not isinstance(part, Mapping):
            raise ConfigError(f"{where}: {name} is a mapping, got {part!r}")
        for key, kind in kinds.items():
            if (key in part or key in needed) and not isinstance(part.get(key), kind):
                raise ConfigError(f"{where}: {name}.{key} is {part.get(key)!r}, which says nothing about its training")

    demand(told, "specauf", target=str | None, epochs=int | float)
    data, numbers = told.get("data") or {}, dict.fromkeys(("conversations", "max_length"), int)
    needed = ("path", *numbers) if data else ()
    demand(data, "specauf.data", needed, path=str, supervised_tokens=int, kept_out=list | None, **numbers)
    if not all(isinstance(label, str) for label in data.get("kept_out") or ()):
        raise ConfigError(f"{where}: specauf.data.kept_out is {data['kept_out']!r}, which is no list of names")
    rollouts = data.get("rollouts") or {}
    demand(rollouts, "specauf.data.rollouts", ("temperature",) if rollouts else (), temperature=int | float)
    others = told.get("averaged_with") or []
    given = [told.get("init_from"), *(others if isinstance(others, list) else [others])]
    for source in filter(None, given):
        demand(source, "specauf.init_from or averaged_with", ("path", "weights"), path=str, weights=str)
        _require_history(source.get("trained") or {}, where)


def _of_all_layers(target: Any, name: str) -> Any:
    """A field of the target's configuration, None where it has none. Raises `ConfigError` when its layers differ in it."""
    try:
        return getattr(target, name, None)
    except RuntimeError as error:  # transformers' own, of Gemma 4
        raise ConfigError(
            f"the target's layers differ in {name}, and a drafter takes one from all of them: {error}"
        ) from None


def _rope_theta(target: Any) -> float:
    """The rotary base. If each kind of layer has its own, that of full attention, the kind that drafters have."""
    rope = getattr(target, "rope_parameters", None) or {}
    own = rope.get("full_attention") or rope
    return float(own.get("rope_theta") or getattr(target, "rope_theta", None) or 1e4)


def _reduced(size: Any, vocab_size: int, where: str) -> int | None:
    """The draft vocabulary's size, checked; None when it is as large as the target's, as in speculators."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= vocab_size):
        raise ConfigError(
            f"{where}: draft_vocab_size must be from 2 to {vocab_size}, the size of the target's vocabulary, got {size!r}"
        )
    return None if size == vocab_size else size


def _domino_head(data: Mapping[str, Any], where: str) -> DominoHead | None:
    """The head that `dflash_config` describes; sizes repeated at the top level must agree."""
    nested = data.get("dflash_config", {})
    kind = nested.get("projector_type")
    if kind is None:
        if "DominoDraftModel" in (data.get("architectures") or []) or "gru_hidden_dim" in nested:
            raise ConfigError(f"{where}: the field 'projector_type' is missing from dflash_config of a Domino drafter")
        return None
    if kind != "domino":
        raise ConfigError(f"{where}: projector_type {kind!r} is not supported, only 'domino' or none (plain DFlash)")
    found = {}
    for name in (f.name for f in fields(DominoHead)):
        if name not in nested:
            raise ConfigError(f"{where}: the field {name!r} is missing from dflash_config; it is never guessed")
        if data.get(name, nested[name]) != nested[name]:
            raise ConfigError(
                f"{where}: {name} is {nested[name]!r} in dflash_config and {data[name]!r} at the top level"
            )
        found[name] = nested[name]
    try:
        return DominoHead(**found)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
