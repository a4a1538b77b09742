"""Runs specauf's commands on a device that is not there: `python -m tests.e2e.pretended_gpu COMMANDS.json`.

The device is called `gpu`. Its tensors hold CPU tensors and report `gpu:0`. An operation that mixes both devices is an error,
as on CUDA, and so is an index that lies on the other one, which CUDA takes but waits for. Needs a torch that takes a backend
written in Python (2.10).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME, CPU = "gpu", torch.device("cpu")
BETWEEN = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
"""What may see both devices."""


class GpuModule(registration._DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None:
        pass


registration._setup_privateuseone_for_python_backend(NAME, backend_module=GpuModule())
GPU = torch.device(NAME, 0)


class OnGpu(Tensor):
    """A tensor that reports `gpu:0` and whose values are `held`, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        how = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": GPU}
        self: OnGpu = Tensor._make_wrapper_subclass(cls, held.shape, **how)  # type: ignore[attr-defined]
        self.held = held
        return self

    # These never reach the dispatcher.
    def tolist(self) -> Any:
        return self.held.tolist()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=GPU)

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Gpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = func.name()
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [t for t in tensors if isinstance(t, OnGpu)]
    others = [tuple(t.shape) for t in tensors if not isinstance(t, OnGpu) and t.ndim]
    if ours and others and not name.startswith(BETWEEN):
        raise RuntimeError(f"{name} takes tensors on {NAME} and, of shapes {others}, on the CPU")
    if name == "aten::transpose_":  # an RNN's last step; what it turns is the wrapper's own shape too
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
    asked = kwargs.get("device")
    here = bool(ours) if asked is None else asked.type == NAME
    if name.startswith("aten::copy_"):
        here = isinstance(args[0], OnGpu)
    args, kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, dict(kwargs)))
    if asked is not None:
        kwargs = {**kwargs, "device": CPU}
    out = KERNELS.get(name, func)(*args, **kwargs)
    known = {id(t.held): t for t in ours}  # an operation in place returns what it was given
    return tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else OnGpu(t), out) if here else out


def gru_cell(x: Tensor, h: Tensor, state: Tensor, *biases: None) -> tuple[Tensor, Tensor]:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return n + z * (state - n), torch.cat([r, z, n, state, hn], -1)


def gru_cell_backward(grad: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
    assert not has_bias  # as Domino's
    r, z, n, state, hn = workspace.chunk(5, -1)
    dn, dz = grad * (1 - z) * (1 - n * n), grad * (state - n) * z * (1 - z)
    dr = dn * hn * r * (1 - r)
    return torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1), grad * z, None, None


# A CPU has no fused cell, and every device that is not one is asked for it.
KERNELS = {"aten::_thnn_fused_gru_cell": gru_cell, "aten::_thnn_fused_gru_cell_backward": gru_cell_backward}


def empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return OnGpu(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: Tensor, target: OnGpu, non_blocking: bool = False) -> Tensor:
    target.held.copy_(source)
    return target


def to(module: torch.nn.Module, *where: Any, plain: Any = torch.nn.Module.to, **more: Any) -> torch.nn.Module:
    """`Module.to`, which otherwise unties weights when their type changes."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        moved: torch.nn.Module = plain(module, *where, **more)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return moved


if __name__ == "__main__":
    torch.nn.Module.to = to  # type: ignore[assignment,method-assign]
    library = torch.library.Library("aten", "IMPL")  # `torch.tensor` goes past the mode
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    from specauf.cli import main

    with Gpu():
        for command in json.loads(Path(sys.argv[1]).read_text()):
            print(">>", *command, flush=True)
            if main(command):
                sys.exit(1)
