"""Every objective read literally: loops over blocks and slots in float64, as slow and obvious as they come.

A block is (logits [k, v], labels, valid, target logits [k, v], uniforms). `credits` gives c per slot as plain floats,
`row_loss` the loss per slot as differentiable scalars; `total` reduces.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specauf.objective import Blocks

NEG = -1


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = F.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def argmax(z: Tensor) -> int:
    return min(i for i in range(len(z)) if z[i] == z.max())


def top_k(z: Tensor, y: int, k: int) -> bool:
    order = sorted(range(len(z)), key=lambda i: (-float(z[i]), i))
    return y in order[:k]


def of_label(p: Tensor, y: int) -> float:
    """-1 is a label that is not in the vocabulary."""
    return float(p[y]) if y >= 0 else 0.0


def credits(
    name: str, block: dict[str, Any], gamma: float | None, o: dict[str, Any]
) -> list[list[tuple[float, float]]]:
    """[(scale, c)] of every slot, one entry a part; invalid slots are handled by the caller."""
    z, y, valid = block["logits"].detach(), block["labels"], block["valid"]
    n, decayed = len(y), name.endswith("-decay")
    name = name.removesuffix("-decay") if name != "decay" else name
    live = [i for i in range(n) if valid[i]]
    w = [1.0 if gamma is None else math.exp(-i / gamma) for i in range(n)]
    wrong = [i for i in live if argmax(z[i]) != y[i]]
    j = wrong[0] if wrong else None
    p = [of_label((z[i] / o.get("temperature", 1.0)).softmax(0), y[i]) for i in range(n)]
    a = o.get("alpha", 0.5 if name.startswith("dpace") else 0.0)
    smooth = [(1 - a) * x + a for x in p]

    def product(values: list[float], upto: int) -> float:  # over valid slots before `upto`
        return math.prod(values[i] for i in live if i < upto)

    def future(values: list[float], i: int) -> float:
        return 1 + sum(math.prod(values[m] for m in live if i < m <= k) for k in live if k > i)

    end = next((i for i in live if product(smooth, i + 1) < o.get("eps", 0.0)), n)
    live = [i for i in live if i <= end]  # what is behind the cut exists for nobody
    out: list[list[tuple[float, float]]] = []
    for i in range(n):
        top = o.get("k", 3)
        if name == "uniform" or name == "streak":
            c = 1.0
        elif name == "decay" or name.startswith("lk-"):
            c = w[i]
        elif name == "first-k":
            c = float(i < o.get("k", 1))
        elif name == "auf":
            c = float(j is None or i <= j)
        elif name == "soft-auf":
            c = product(smooth, i)
        elif name == "sampled-auf":
            c = float(all(block["uniform"][m] < p[m] for m in live if m < i))
        elif name == "first-error":
            c = float(i == j)
        elif name == "griffin-exclusive":
            c = float(all(top_k(z[m], y[m], top) for m in live if m < i))
        elif name == "griffin-inclusive":
            c = float(all(top_k(z[m], y[m], top) for m in live if m <= i))
        elif name == "griffin-windowed":
            c = float(all(top_k(z[m], y[m], top) for m in live if i - o.get("window", 2) <= m < i))
        elif name == "l2r-focal":
            c = w[i] + o.get("focal", 2.4) * (i == j)
        elif name == "l2r-focal-separate":
            out.append([(1.0, w[i]), (o.get("focal", 0.3), float(i == j))])
            continue
        elif name in ("dpace", "streak-credit"):
            c = product(smooth, i + 1) * future(smooth, i)
        elif name == "dpace-cumulative":
            c = product(smooth, i + 1)
        elif name == "dpace-continuation":
            c = future(smooth, i)
        elif name == "pard2":
            c = product([of_label(block["target"][m].softmax(0), y[m]) for m in range(n)], i)
        else:
            raise KeyError(name)
        c = c if i <= end else 0.0
        out.append([(1.0, c * w[i] if decayed else c)])
    return out


def row_loss(name: str, block: dict[str, Any], i: int, o: dict[str, Any], lam: float | None = None) -> Tensor:
    z, y = block["logits"], block["labels"]
    ce = F.cross_entropy(z[i], torch.tensor(y[i]))
    if name == "streak":
        chance = [z[m].softmax(0)[y[m]] if y[m] >= 0 else z.new_zeros(()) for m in range(len(y))]
        return -math.prod((chance[m] for m in range(i + 1) if block["valid"][m]), start=z.new_ones(()))
    if name not in ("pard2", "lk-alpha", "lk-lambda"):
        return ce
    p, q = block["target"][i].softmax(0), z[i].softmax(0)
    kl = (p * (p.log() - q.log())).sum()
    overlap = torch.minimum(p, q).sum()
    if name == "pard2":
        return o.get("ce_weight", 0.1) * ce + o.get("kd_weight", 1.0) * kl
    if name == "lk-alpha":
        return -overlap.log()
    lam = math.exp(-o.get("eta", 3.0) * float(overlap.detach())) if lam is None else lam
    return lam * kl + (1 - lam) * (1 - overlap)


def loss(
    name: str,
    hidden: Tensor,
    blocks: Blocks,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gamma: float | None,
    reduction: str,
    options: dict[str, Any],
    target_hidden: Tensor,
    uniform: Tensor,
    softcap: float | None = None,
    rows_of: list[int] | None = None,
) -> Tensor:
    """Equation 1 with its reduction, every part with its own denominator. `rows_of` as in `block_loss`."""
    b, n, k, _ = hidden.shape
    labels = blocks.labels if rows_of is None else torch.tensor(rows_of)[blocks.labels]
    parts: dict[int, dict[str, Any]] = {}
    for s in range(b):
        for m in range(n):
            block = {
                "logits": head(hidden[s, m], weight, bias, softcap),
                "labels": labels[s, m].tolist(),
                "valid": blocks.valid[s, m].tolist(),
                "target": head(target_hidden[s, m], weight, bias, softcap),
                "uniform": uniform[s, m].tolist(),
            }
            found = credits(name, block, gamma, options)
            for part in range(len(found[0])):
                into = parts.setdefault(part, {"num": hidden.new_zeros(()), "den": 0.0, "ratios": [], "scale": 1.0})
                rows = [
                    (found[i][part][1], row_loss(name.removesuffix("-decay"), block, i, options))
                    for i in range(k)
                    if block["valid"][i] and block["labels"][i] >= 0
                ]
                into["scale"] = found[0][part][0]
                num = sum((c * value for c, value in rows), hidden.new_zeros(()))
                den = sum(c for c, _ in rows)
                into["num"], into["den"] = into["num"] + num, into["den"] + den
                if den > 0:
                    into["ratios"].append(num / den)
    total = hidden.new_zeros(())
    for into in parts.values():
        if reduction == "global":
            value = into["num"] / into["den"] if into["den"] > 0 else into["num"]
        elif reduction == "block":
            value = sum(into["ratios"], hidden.new_zeros(())) / max(1, len(into["ratios"]))
        else:
            value = into["num"] / b
        total = total + into["scale"] * value
    return total
