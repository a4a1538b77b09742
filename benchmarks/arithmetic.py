"""What a training step costs on paper: multiply-adds and bytes, nothing measured.

    python -m benchmarks.arithmetic

Counts matrix products, at two FLOPs per multiply-add; norms, softmax and the optimizer are left out. The backward of a
product is two products of its size, or one where its input needs no gradient (`fc`) or its weight has none (the frozen head).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.objective import alpha_of
from specauf.objective.wavefront import LAUNCH_ROWS, LAUNCH_ROWS_GPU, plan_cuts


@dataclass(frozen=True)
class Step:
    name: str
    hidden: int
    intermediate: int
    q: int
    """Query heads times head size."""
    kv: int
    vocab: int
    layers: int
    taps: int
    block: int
    anchors: int
    tokens: int
    sequences: int = 1
    target_parameters: float = 0.0
    """Parameters of the target's body, for its forward pass."""
    launch: float = LAUNCH_ROWS

    def rows(self, tau: float | None) -> float:
        """Head rows per block; `tau` None is the full block."""
        n = self.block - 1
        if tau is None:
            return float(n)
        survival = [alpha_of(tau, n) ** k for k in range(1, n + 1)]
        alive, total, start = [1.0, *survival], 0.0, 0
        for stop in plan_cuts(survival, self.sequences * self.anchors, self.launch):
            total, start = total + (stop - start) * alive[start], stop
        return total

    def flops(self, tau: float | None, last_layer: bool = True) -> dict[str, float]:
        """FLOPs of forward and backward by part. `last_layer`: compute its query side for the head's rows alone."""
        blocks, rows = self.sequences * self.anchors, self.rows(tau)
        context = self.sequences * self.tokens * 2 * self.hidden
        key_value = self.layers * context * 2 * self.kv
        seen = 2 * 2 * self.q * (self.tokens / 2 + self.block)  # scores and values, half the context on average
        query_side = 2 * (2 * self.hidden * self.q + 3 * self.hidden * self.intermediate) + seen
        own = 2 * self.hidden * 2 * self.kv
        slots = (self.layers - 1) * self.block + (rows if last_layer else self.block)
        return {
            "context": 2 * context * self.taps * self.hidden + 3 * key_value,
            "blocks": 3 * blocks * (slots * query_side + self.layers * self.block * own),
            "head": 2 * blocks * rows * 2 * self.hidden * self.vocab,
        }

    def logits_gb(self, tau: float | None) -> float:
        """Size of one pass's logits in float32, in 10^9 bytes, if all were kept."""
        return self.sequences * self.anchors * self.rows(tau) * self.vocab * 4 / 1e9

    def parameters(self) -> float:
        layer = 2 * self.hidden * (self.q + self.kv) + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.taps * self.hidden**2

    def memory_gb(self, tau: float | None) -> dict[str, float]:
        """What a step on CUDA holds at the end of its forward pass, in 10^9 bytes, counted by hand from the layers' code.

        The drafter: weights, gradients and two moments in float32, and autocast's copy in bfloat16. The target in bfloat16.
        What the backward pass needs of the blocks and of the context. Left out: what comes and goes (a gradient or two as
        wide as the MLP, a few rows of logits, other processes' buffers) and what the allocator cannot use.
        """
        key_value = 10 * self.kv  # keys: before their norm, after it, rotated; values
        side = 8 * self.hidden + key_value  # a slot's keys and values: the residual stream, and its norm cast twice
        query = 10 * self.hidden + 12 * self.q + 8 * self.intermediate
        slots, rows = self.block * self.layers, (self.layers - 1) * self.block + self.rows(tau)
        blocks = self.sequences * self.anchors * (slots * side + rows * query)
        own = 2 * self.taps * self.hidden + 6 * self.hidden + self.layers * (4 * self.hidden + key_value)
        return {
            "drafter": 18 * self.parameters(),
            "target": 2 * (self.target_parameters + 2 * self.hidden * self.vocab),
            "blocks": blocks,
            "context": self.sequences * self.tokens * own,
        }

    def target_flops(self) -> float:
        return 2 * self.target_parameters * self.sequences * self.tokens


SMOLLM2 = {"hidden": 576, "intermediate": 1536, "q": 576, "kv": 192, "vocab": 49152, "taps": 5}
QWEN3_8B = {"hidden": 4096, "intermediate": 12288, "q": 4096, "kv": 1024, "vocab": 151936, "taps": 5}
STEPS = [
    *(
        Step(f"SmolLM2, B={b}, {n} layers", **SMOLLM2, layers=n, block=b, anchors=32, tokens=384, sequences=4)
        for b in (8, 16)
        for n in (2, 5)
    ),
    Step(
        *("Qwen3-8B, B=16, 5 layers",),
        **QWEN3_8B,
        layers=5,
        block=16,
        anchors=512,
        tokens=3072,
        target_parameters=36 * 192_946_432,
        launch=LAUNCH_ROWS_GPU,
    ),
]


def main() -> None:
    print(
        "| step | tau | head rows | full block, TFLOP: context + blocks + head | AUF | ratio | ratio, last layer in full |"
    )
    print("|---|---|---|---|---|---|---|")
    for step in STEPS:
        for tau in (1.2, 2.6, 4.0):
            full, whole, auf, plain = (
                step.flops(None),
                step.flops(None, last_layer=False),
                step.flops(tau),
                step.flops(tau, last_layer=False),
            )
            told = [" + ".join(f"{v / 1e12:.3g}" for v in f.values()) for f in (full, auf)]
            ratio, before = sum(full.values()) / sum(auf.values()), sum(whole.values()) / sum(plain.values())
            print(
                f"| {step.name} | {tau} | {step.rows(tau):.2f} | {told[0]} | {told[1]} | {ratio:.2f} | {before:.2f} |"
            )
    big = STEPS[-1]
    print(f"\n{big.name}: the target's forward {big.target_flops() / 1e12:.0f} TFLOP a sequence;")
    print(
        f"logits {big.logits_gb(None):.2f} GB in full, {big.logits_gb(2.6):.2f} GB for AUF's rows at tau 2.6, were they kept."
    )
    print("\n| sequences a micro-batch | head rows | memory, GB: drafter + target + blocks + context | sum |")
    print("|---|---|---|---|")
    for sequences in (1, 2, 4):
        for tau in (None, 4.0):
            parts = {k: v / 1e9 for k, v in replace(big, sequences=sequences).memory_gb(tau).items()}
            told = " + ".join(f"{v:.1f}" for v in parts.values())
            print(f"| {sequences} | {'all' if tau is None else f'tau {tau:g}'} | {told} | {sum(parts.values()):.0f} |")


if __name__ == "__main__":
    main()
