"""A device that is not there: tensors with real numbers that say they are on another one, and an error where two meet.

A machine without a GPU hides every tensor that was made on the wrong device. Here such tensors claim to be on `meta`, the
only other device that a CPU build of torch can make them on and go back through. They hold a tensor of the CPU, which
computes; what is on no device in particular (a number) may be mixed in, as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")
aten = torch.ops.aten
Module = TypeVar("Module", bound=nn.Module)
COPIES = (aten.copy_.default, aten._to_copy.default)


class There(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        how: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        out = Tensor._make_wrapper_subclass(cls, held.shape, device=THERE, **how)  # type: ignore[attr-defined]
        out.held = held
        return out  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """For calls without a tensor, such as `torch.arange(..., device=...)`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _held(x: Any) -> Any:
    return x.held if isinstance(x, There) else x


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = any(isinstance(t, There) for t in tensors)
    strangers = [t for t in tensors if t.ndim and not isinstance(t, There)] if there and func not in COPIES else []
    if func is aten.index.Tensor and isinstance(args[0], There):
        strangers = []  # a GPU's tensor may be indexed by the CPU's
    if strangers:
        raise RuntimeError(f"{func} mixes devices: {[tuple(t.shape) for t in strangers]} are on the CPU")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == THERE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    given = {id(_held(t)): t for t in tensors}  # what is changed in place is returned as it was given
    return tree_map(lambda x: given.get(id(x), There(x) if there else x) if isinstance(x, Tensor) else x, out)


def move(module: Module) -> Module:
    """The module with its parameters and buffers there; shared ones stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, moved.setdefault(id(p), nn.Parameter(There(p.data), p.requires_grad)))
        for name, b in part.named_buffers(recurse=False):
            setattr(part, name, There(b))
    return module


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it is open, `device=THERE` makes such tensors. What torch does below its dispatcher is done by hand."""
    make, new, listed, autocast = torch.tensor, Tensor.new_tensor, Tensor.tolist, torch.autocast

    def tensor(data: Any, *, device: Any = None, **how: Any) -> Tensor:
        there = device is not None and torch.device(device).type == THERE.type
        return There(make(data, **how)) if there else make(data, device=device, **how)

    def new_tensor(self: Tensor, data: Any, **how: Any) -> Tensor:
        return There(make(data, **{"dtype": self.dtype, **how})) if isinstance(self, There) else new(self, data, **how)

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        if isinstance(data, Tensor):
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        return tensor(data, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(Tensor, "new_tensor", new_tensor)
    monkeypatch.setattr(Tensor, "tolist", lambda self: listed(_held(self).detach()))
    monkeypatch.setattr(nn.GRU, "forward", _gru)
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: contextlib.nullcontext() if kind == "meta" else autocast(kind, *a, **k)
    )
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
    with _Mode():
        yield


def _gru(self: nn.GRU, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A layer of it in plain operations: torch's transposes in place, which a wrapper does not see."""
    h = x.new_zeros(len(x), self.hidden_size) if state is None else state[0]
    out = []
    for now in x.unbind(1):
        r, z, n = (now @ self.weight_ih_l0.T).chunk(3, -1)
        hr, hz, hn = (h @ self.weight_hh_l0.T).chunk(3, -1)
        keep = (z + hz).sigmoid()
        h = (1 - keep) * (n + (r + hr).sigmoid() * hn).tanh() + keep * h
        out.append(h)
    return torch.stack(out, 1), h[None]
