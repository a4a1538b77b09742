"""Where a causal LM of transformers keeps its parts, and what its configuration says of its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from specauf.strict import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What Gemma, RecurrentGemma and xLSTM call it."""


def softcap_of(config: Any) -> float | None:
    """The soft cap of the logits, if there is one."""
    return next(filter(None, (getattr(config, name, None) for name in SOFTCAPS)), None)


def body_of(model: PreTrainedModel, name: str) -> nn.Module:
    """What lies below the LM head. Llama 4's is `model`, though its class names another prefix, that of the whole."""
    for found in (model.base_model, getattr(model, "model", None)):
        if isinstance(found, nn.Module) and found is not model:
            return found
    raise UserError(f"{name}: {type(model).__name__} keeps its body where specauf does not find it")


def reach_of(config: Any, body: nn.Module, embedding: nn.Module) -> int | None:
    """The number of positions that text may take, or None.

    A table of positions, learned or computed, ends somewhere. And some rotary scalings turn every position once the text is
    long: what was cached before then belongs to another model than what follows.
    """
    most: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = [
        kind.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", most)
        for kind in (rope, *rope.values())  # one for all layers, or one for each kind of layer
        if isinstance(kind, dict) and kind.get("rope_type", kind.get("type")) in ("longrope", "dynamic")
    ]
    tables = [m.num_embeddings for m in body.modules() if isinstance(m, nn.Embedding) and m is not embedding]
    tables += [t.shape[0] for name, t in body.named_buffers() if "pos" in name.rpartition(".")[2]]  # GPT-J's
    found.append(getattr(config, "keep_window_size", None))  # Doge forgets beyond it, and other tokens with a cache
    found += [most for rows in tables if most is not None and most <= rows <= most + 8]  # OPT's has two rows more
    return min((int(limit) for limit in found if limit is not None), default=None)


def decoder_layers(model: PreTrainedModel, body: nn.Module) -> nn.ModuleList:
    """The body's ModuleList with `num_hidden_layers` entries: its decoder layers, in every causal LM of the library."""
    wanted = getattr(model.config, "num_hidden_layers", None)
    if wanted is None:
        raise UserError(
            f"{type(model).__name__} is no plain causal LM: its configuration has no num_hidden_layers of its own"
        )
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise UserError(f"no list of {wanted} decoder layers found in {type(model).__name__}")
