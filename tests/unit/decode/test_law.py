"""Exactness at T=1: the joint law of several tokens across round boundaries is the target's, tested by chi-square.

Every sequence's probability is computed from the target in float64. The same tests fail when the residual is broken.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from scipy import stats
from tests.conftest import make_geometry, make_target

from specauf.config import SamplingConfig
from specauf.decode import verify
from specauf.decode.generate import generate
from specauf.decode.propose import DrafterProposer, LookupFirst, PromptLookup, Proposer
from specauf.decode.replay import record, replay, trajectory_features
from specauf.decode.select import Selection
from specauf.drafter.checkpoint import build_drafter
from specauf.drafter.config import DominoHead
from specauf.drafter.dflash import DFlash
from specauf.drafter.domino import Domino
from specauf.target import Target

PROMPT = [1, 3, 0]
TOKENS = 4  # the prefill's token, then a round of up to three with the bonus, then the next round
SEEDS = {"drafter": 0, "lookup": 1, "domino": 2, "pooled domino": 9, "lookup first": 4}


@pytest.fixture(scope="module")
def tiny() -> Target:
    return make_target(vocab=5, hidden=16, layers=3, seed=2, scale=2.5)


def proposer(tiny: Target, kind: str = "drafter") -> Proposer:
    if kind == "lookup":
        return PromptLookup(3)
    geometry = make_geometry(tiny, block_size=3, layers=1, taps=1)
    if kind in ("drafter", "lookup first"):
        plain = DrafterProposer(DFlash(geometry, seed=1), tiny)
        return plain if kind == "drafter" else LookupFirst(plain, 1, 4)
    drafter = build_drafter(dataclasses.replace(geometry, domino=DominoHead(8, 4)), seed=1)
    assert isinstance(drafter, Domino)
    drafter.expansion.data.mul_(500)  # so that what is proposed depends on the tokens before it
    return DrafterProposer(drafter, tiny, candidate_pool=2 if kind == "pooled domino" else 0)


def law(tiny: Target, sampling: SamplingConfig, length: int = TOKENS) -> torch.Tensor:
    """Probability of each of v^length continuations, in float64, by a slow reading of what the options mean."""
    v = tiny.config.vocab_size
    sequences = torch.tensor(list(itertools.product(range(v), repeat=length)))
    ids = torch.cat([torch.tensor(PROMPT).expand(len(sequences), -1), sequences], 1)
    logits = tiny.logits(tiny.run(ids[:, :-1]).final).double()[:, len(PROMPT) - 1 :]
    chance = torch.ones(len(sequences), dtype=torch.float64)
    for row in range(len(sequences)):
        for t in range(length):
            z = logits[row, t].clone()
            for token in set(ids[row, : len(PROMPT) + t].tolist()):
                factor = sampling.repetition_penalty
                z[token] = z[token] / factor if z[token] > 0 else z[token] * factor
            p = (z / sampling.temperature).softmax(0)
            order = p.argsort(descending=True).tolist()
            kept = order[: sampling.top_k or v]
            p = torch.tensor([float(p[i]) if i in kept else 0.0 for i in range(v)], dtype=torch.float64)
            p /= p.sum()
            nucleus, mass = [], 0.0
            for i in order:
                if mass >= sampling.top_p:
                    break
                nucleus.append(i)
                mass += float(p[i])
            p = torch.tensor([float(p[i]) if i in nucleus else 0.0 for i in range(v)], dtype=torch.float64)
            chance[row] *= p[sequences[row, t]] / p.sum()
    assert math.isclose(float(chance.sum()), 1, rel_tol=1e-6)
    return chance


def sample(
    tiny: Target,
    how: Proposer | None,
    count: int,
    sampling: SamplingConfig,
    batch: int,
    length: int = TOKENS,
    selection: Selection | None = None,
) -> torch.Tensor:
    """How often each continuation came out."""
    v = tiny.config.vocab_size
    counts = torch.zeros(v**length)
    powers = torch.tensor([v ** (length - 1 - t) for t in range(length)])
    for start in range(0, count, batch):
        uids = range(start, min(count, start + batch))
        out = generate(
            tiny,
            how,
            [PROMPT] * len(uids),
            sampling=sampling,
            selection=selection,
            max_new_tokens=length,
            uids=uids,
            eos_ids=frozenset(),
        )
        tokens = torch.tensor([g.tokens for g in out])
        counts += torch.bincount((tokens * powers).sum(1), minlength=len(counts))
    return counts


def p_value(counts: torch.Tensor, chance: torch.Tensor) -> float:
    """Chi-square with rare cells pooled; anything of probability zero that was drawn is a failure outright."""
    expected = chance * counts.sum()
    if counts[chance == 0].sum() > 0:
        return 0.0
    common = expected >= 5
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    if wanted[-1] < 5:  # too thin to be a cell of its own
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    scale = sum(observed) / sum(wanted)  # 1 but for rounding, which chisquare refuses
    return float(stats.chisquare(observed, [scale * w for w in wanted]).pvalue)


@pytest.mark.parametrize("kind", SEEDS)
def test_forty_thousand_batched_samples_have_the_targets_law(tiny: Target, kind: str) -> None:
    sampling = SamplingConfig(temperature=1.0, seed=SEEDS[kind])
    counts = sample(tiny, proposer(tiny, kind), 40_000, sampling, batch=5000)
    assert p_value(counts, law(tiny, sampling)) > 1e-3


def test_the_test_fails_when_the_residual_is_broken(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "residual", lambda ending, draft, accepted: ending)
    sampling = SamplingConfig(temperature=1.0, seed=0)
    assert p_value(sample(tiny, proposer(tiny), 10_000, sampling, batch=5000), law(tiny, sampling)) < 1e-6


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=0.7, seed=3),
        SamplingConfig(temperature=1.0, top_k=3, seed=4),
        SamplingConfig(temperature=1.3, top_p=0.7, seed=5),
        SamplingConfig(temperature=1.0, repetition_penalty=1.5, seed=6),
    ],
    ids=["temperature", "top-k", "top-p", "penalty"],
)
def test_warped_sampling_has_the_warped_targets_law_live_and_recorded(tiny: Target, sampling: SamplingConfig) -> None:
    chance = law(tiny, sampling)
    assert p_value(sample(tiny, proposer(tiny), 10_000, sampling, batch=5000), chance) > 1e-3
    assert p_value(sample(tiny, None, 10_000, sampling, batch=5000), chance) > 1e-3


@pytest.mark.parametrize("kind", ["drafter", "domino"])
def test_replay_over_sampled_trajectories_has_live_decodings_acceptance(tiny: Target, kind: str) -> None:
    sampling, count = SamplingConfig(temperature=1.0, seed=7), 1500
    how = proposer(tiny, kind)
    prompts = [(str(i), PROMPT) for i in range(count)]
    tiny_eos = record(tiny, prompts, limit=8, block_size=3, sampling=sampling, batch_size=count)
    features = trajectory_features(tiny, tiny_eos, how.layer_ids, batch_size=count)
    replayed = replay(how, tiny_eos, features, 8)  # type: ignore[arg-type]
    live = generate(tiny, how, [PROMPT] * count, sampling=SamplingConfig(temperature=1.0, seed=8), max_new_tokens=8)
    means = [
        torch.tensor([sum(r.accepted for r in row) / max(1, len(row)) for row in rounds])
        for rounds in (replayed, [g.rounds for g in live])
    ]
    error = sum(float(m.var()) / count for m in means) ** 0.5
    assert float(means[1].mean()) > 0.1, "nothing is ever accepted: the test would prove nothing"
    assert abs(float(means[0].mean() - means[1].mean())) < 4 * error
