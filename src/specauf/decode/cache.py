"""The target's key-value cache, with room to grow: a round writes its columns, where concatenation copies all earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

ROOM = 64
"""Columns to spare when memory is taken. It is taken anew when they are used up, or when rows have left the batch."""


class RoomyLayer(DynamicLayer):
    """Keys and values are the first columns of larger tensors. What `crop` drops is overwritten by the next columns."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._with(0, self.keys, key_states), self._with(1, self.values, value_states)
        return self.keys, self.values

    def _with(
        self, which: int, old: Float[Tensor, "b heads s d"], new: Float[Tensor, "b heads n d"]
    ) -> Float[Tensor, "b heads s_n d"]:
        held, before, after = self._held[which], old.shape[-2], old.shape[-2] + new.shape[-2]
        kept = held is not None and held.shape[0] == old.shape[0] and held.data_ptr() == old.data_ptr()
        if held is None or not kept or held.shape[-2] < after:
            held = self._held[which] = new.new_empty(*new.shape[:-2], after + ROOM, new.shape[-1])
            held[..., :before, :] = old
        held[..., before:after, :] = new
        return held[..., :after, :]


def roomy_cache(config: Any) -> DynamicCache:
    """A `DynamicCache` for a target's configuration, its layers with full attention replaced by `RoomyLayer`s."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
