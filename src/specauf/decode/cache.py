"""The target's key-value cache, with room to grow: a round writes its columns, where concatenation copies all earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from specauf.strict import UserError
from specauf.target import Target

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

ROOM = 64
"""Columns to spare when memory is taken. It is taken anew when they are used up, or when rows have left the batch."""
SHARING: Any = getattr(cache_utils, "DummyLayer", type(None))
"""The place of a layer that reads the keys and values of an earlier one. Transformers 5.0 may have none."""


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


class Columns:
    """A batch's cache, and which of its columns hold each row's committed tokens: `held` [b, s]. The rest is masked for good.

    Raises `UserError` as `narrowest_window` does.
    """

    def __init__(self, target: Target, whole: bool = False) -> None:
        self.target, self.cache = target, roomy_cache(target.config)
        self.window = narrowest_window(self.cache, target.name, whole)

    def fill(self, lengths: Int[Tensor, " b"]) -> None:
        """The prompts, of these lengths, were read. Their padding, on the right, is the first of the holes."""
        first = int(lengths.max())
        if self.cache.get_seq_length() != first:
            raise UserError(
                f"{self.target.name} puts no keys and values into the cache, so it would forget what it has read"
            )
        self.held = torch.arange(first, device=lengths.device) < lengths[:, None]

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.held = self.held[rows]
        self.cache.batch_select_indices(rows)

    def require_room(self, n: int) -> None:
        """Raise `UserError` when `n` more columns fill a window."""
        if self.window is not None and self.held.shape[1] + n >= self.window:
            raise UserError(
                f"{self.target.name} has layers that see the last {self.window} tokens alone, and specauf decodes exactly only "
                "within those: shorten the prompts, or lower the new tokens or the batch size (whose rows wait for each other)"
            )

    def commit(self, n: int, gained: Int[Tensor, " b"], path: Int[Tensor, "b m"] | None, used: int) -> None:
        """Of the newest `n` columns, keep what the luckiest row gained, the first ones or those along `path`.

        `used` is the number of columns that the fullest row holds then.
        """
        most = int(gained.max())
        if path is not None:
            keep_path(self.cache, n, path[:, :most])
        if most < n:  # `crop(0)` is never called: until mid 2026 it kept none
            self.cache.crop(most - n)
        held = torch.cat([self.held, torch.arange(most, device=gained.device) < gained[:, None]], 1)
        self.held = without_holes(self.cache, held, used)


def keep_path(cache: DynamicCache, n: int, path: Int[Tensor, "b m"]) -> None:
    """Move each row's `path` to the front of the newest `n` columns, in its order."""
    for layer in cache.layers:
        if isinstance(layer, SHARING):
            continue
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        for states in (layer.keys, layer.values):
            new = states[:, :, -n:]
            index = path[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            new[:, :, : path.shape[1]] = new.gather(2, index)  # gathered whole before it is written


def without_holes(cache: DynamicCache, columns: Bool[Tensor, "b s"], used: int) -> Bool[Tensor, "b kept"]:
    """`columns`, the cache's columns that hold a row's tokens, once those are moved to the front and most holes dropped.

    `used` is their number in the fullest row. Nothing is moved while few are holes. Order does not matter to attention:
    keys know their positions.
    """
    if columns.shape[1] <= used + used // 2 + ROOM:
        return columns
    order = (~columns).int().argsort(stable=True)[:, :used]
    for layer in cache.layers:
        if isinstance(layer, SHARING):
            continue
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        layer.keys, layer.values = (t.take_along_dim(order[:, None, :, None], 2) for t in (layer.keys, layer.values))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = used
    return columns.gather(1, order)


def narrowest_window(cache: DynamicCache, name: str, whole: bool = False) -> int | None:
    """The narrowest window of the target's layers, in tokens; None when every layer sees everything.

    Raises `UserError` unless every layer can drop its newest columns, as a rejected draft requires: a layer with a window
    can until the window is full, one with a state cannot. With `whole`, also unless every layer keeps all of its columns.
    """
    kinds = {type(layer) for layer in cache.layers} - {SHARING}
    if kinds - {RoomyLayer, DynamicSlidingWindowLayer}:
        raise UserError(
            f"{name} has layers with linear or sparse attention, which specauf cannot decode: it takes back drafts"
        )
    if whole and kinds - {RoomyLayer}:
        raise UserError("self-selection needs a target with full attention in every layer")
    return min(
        (layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)), default=None
    )
