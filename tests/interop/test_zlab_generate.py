"""Greedy generation, round for round, against code nobody here wrote: `dflash_generate` of PyPI `dflash` 0.1.0."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from dflash.model import DFlashDraftModel, dflash_generate
from reference import TINY_VOCAB, TOLERANCE, drafter_config, note, our_hidden, reload_theirs, their_hidden
from torch.nn import functional as F

from specauf.bench.tasks import load_task, render_prompts
from specauf.config import SamplingConfig
from specauf.decode.generate import Generation, generate
from specauf.decode.propose import DrafterProposer
from specauf.decode.replay import Trajectory, record, replay, trajectory_features
from specauf.drafter.checkpoint import load_drafter
from specauf.drafter.dflash import DFlash
from specauf.target import Target

LIMIT = 48
"""New tokens per prompt. The reference gets a block more, since it drafts shorter blocks just before its limit."""


class Told(NamedTuple):
    tokens: list[int]
    produced: list[int]
    """Per round: accepted draft tokens, and the one after them unless EOS came first."""


class Scene(NamedTuple):
    target: Target
    drafter: DFlash
    theirs: DFlashDraftModel
    prompts: list[list[int]]
    varied: bool
    """Is A known to vary? Not with a drafter from outside."""
    told: dict[tuple[tuple[int, ...], frozenset[int]], Told]
    """What the reference said, by prompt and EOS ids: it is asked once."""


def memorise(
    drafter: DFlash, target: Target, texts: Sequence[Trajectory], lr: float, until: float, most: int = 400
) -> int:
    """Fit the drafter to the texts by plain cross entropy, only until half right, so that A varies; returns the steps.

    The head is cut down to the tokens of the texts and a few random others, redrawn each step, for speed. Written without
    the package's objectives: what decoding accepts should not hang on them.
    """
    config, generator = drafter.config, torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=lr, weight_decay=0.0)
    tokens = [torch.tensor(text.ids)[None] for text in texts]
    features = [target.run(ids, config.target_layer_ids).features for ids in tokens]
    wanted, smooth = torch.cat(tokens, 1).unique(), 10.0
    for step in range(most):
        i = step % len(texts)
        ids, first = tokens[i], len(texts[i].prompt)
        last = ids.shape[1] - config.block_size + 1  # blocks that lie inside the text
        anchors = first + torch.randperm(last - first, generator=generator)[None, :24]
        place = anchors[..., None] + torch.arange(config.block_size)
        inputs = torch.full_like(place, config.mask_token_id)
        inputs[..., 0] = ids[0, anchors]
        context = drafter.context(features[i], torch.arange(ids.shape[1])[None])
        hidden = drafter(target.embed(inputs), anchors, context)[:, :, 1:]
        rows = torch.cat([wanted, torch.randint(config.vocab_size, (1024,), generator=generator)]).unique()
        logits = hidden @ target.head_weight[rows].T
        loss = F.cross_entropy(logits.flatten(0, 2), torch.searchsorted(rows, ids[0, place[..., 1:]]).flatten())
        smooth += (loss.item() - smooth) / len(texts)
        if smooth < until:
            return step
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimiser.step()
    raise AssertionError(f"the drafter did not learn: loss {smooth:.2f} after {most} steps")


def fitted(target: Target, prompts: list[list[int]], *, lr: float) -> DFlash:
    """A drafter that half knows the target's own text after the prompts, so that A varies."""
    drafter = DFlash(drafter_config(target, intermediate_size=256))
    numbered = [(str(i), prompt) for i, prompt in enumerate(prompts)]
    texts = record(target, numbered, limit=LIMIT, block_size=drafter.config.block_size, sampling=SamplingConfig())
    texts = [text for text in texts if len(text.tokens) > 2 * drafter.config.block_size]
    steps = memorise(drafter, target, texts, lr, until=1.0)
    note(f"{target.name}: drafter fitted to {len(texts)} texts in {steps} steps")
    return drafter.eval()


@pytest.fixture(scope="module")
def scene(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Target, drafter in both implementations, prompts.

    The embedded target takes the demo's HumanEval prompts, and the drafter in SPECAUF_INTEROP_DRAFTER if that is set.
    """
    trained = os.environ.get("SPECAUF_INTEROP_DRAFTER") if target.tokenizer else None
    if target.tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(2, TINY_VOCAB - 1, (n,), generator=generator).tolist() for n in (1, 2, 5, 9, 17, 30)]
        drafter = fitted(target, prompts, lr=5e-3)
    else:
        prompts = [d.prompt for d in render_prompts(target, load_task("humaneval")[:4], enable_thinking=False)]
        drafter = load_drafter(trained) if trained else fitted(target, prompts, lr=2e-3)
    theirs = reload_theirs(drafter, tmp_path_factory.mktemp("drafter"))
    return Scene(target, drafter, theirs, prompts, not trained, {})


def reference(scene: Scene, prompt: list[int], eos: frozenset[int] | None = None) -> Told:
    """The reference's tokens and rounds, up to the last round that starts within our limit."""
    eos = scene.target.eos_ids() if eos is None else eos
    if (key := (tuple(prompt), eos)) in scene.told:
        return scene.told[key]
    out = dflash_generate(
        scene.theirs,
        scene.target.model,
        torch.tensor([prompt]),
        max_new_tokens=LIMIT + 2 * scene.drafter.config.block_size,
        stop_token_ids=sorted(eos),
        return_stats=True,
    )
    committed, produced = 1, []
    for length in out.acceptance_lengths:
        if committed >= LIMIT:
            break
        produced.append(length)
        committed += length
    scene.told[key] = Told(out.output_ids[0, len(prompt) :].tolist()[:LIMIT], produced)
    return scene.told[key]


def told(generation: Generation) -> Told:
    return Told(generation.tokens, [r.accepted + (not r.cut) for r in generation.rounds])


def test_live_rounds_and_tokens_are_the_references(scene: Scene) -> None:
    proposer, lengths = DrafterProposer(scene.drafter, scene.target), []
    for prompt in scene.prompts:
        wanted = reference(scene, prompt)
        assert told(generate(scene.target, proposer, [prompt], max_new_tokens=LIMIT)[0]) == wanted
        lengths += wanted.produced
    note(
        f"{scene.target.name}: {len(lengths)} rounds equal, lengths {[lengths.count(i) for i in range(1, 9)]} from 1 to 8"
    )
    assert not scene.varied or len(set(lengths)) >= 3, (
        f"acceptance hardly varies, so equal rounds prove little: {lengths}"
    )


def test_hidden_states_and_logits_agree_on_the_generated_text(scene: Scene) -> None:
    target, errors = scene.target, []
    for prompt in scene.prompts:
        ids = torch.tensor([prompt + reference(scene, prompt).tokens])
        features = target.run(ids, scene.drafter.config.target_layer_ids).features
        anchors = torch.arange(len(prompt), ids.shape[1], 7)[None]
        ours = our_hidden(scene.drafter, target, ids, features, anchors)
        theirs = their_hidden(scene.drafter, scene.theirs, target, ids, features, anchors)
        logits = scene.theirs.compute_logits(theirs, target.model.get_output_embeddings())
        errors.append([(ours - theirs).abs().max().item(), (target.logits(ours) - logits).abs().max().item()])
    hidden_error, logit_error = (max(column) for column in zip(*errors, strict=True))
    note(f"{target.name}, on generated text: |dhidden| {hidden_error:.1e}, |dlogit| {logit_error:.1e}")
    assert hidden_error < TOLERANCE and logit_error < TOLERANCE


def test_batched_rounds_and_tokens_are_the_references(scene: Scene) -> None:
    """Prompts of unequal length, which end at different rounds, decoded together."""
    together = generate(scene.target, DrafterProposer(scene.drafter, scene.target), scene.prompts, max_new_tokens=LIMIT)
    for prompt, generation in zip(scene.prompts, together, strict=True):
        assert told(generation) == reference(scene, prompt)


def test_replayed_rounds_are_the_references(scene: Scene) -> None:
    prompts = [(str(i), prompt) for i, prompt in enumerate(scene.prompts)]
    block_size = scene.drafter.config.block_size
    trajectories = record(scene.target, prompts, limit=LIMIT, block_size=block_size, sampling=SamplingConfig())
    features = trajectory_features(scene.target, trajectories, scene.drafter.config.target_layer_ids)
    rounds = replay(DrafterProposer(scene.drafter, scene.target), trajectories, features, LIMIT)
    for prompt, row in zip(scene.prompts, rounds, strict=True):
        assert [r.accepted + (not r.cut) for r in row] == reference(scene, prompt).produced


def test_an_eos_inside_a_draft_ends_both_alike(scene: Scene) -> None:
    """EOS ids are chosen from the text, so that generation stops at a token that a draft got right, and elsewhere."""
    proposer, cuts = DrafterProposer(scene.drafter, scene.target), []
    few = 6 if scene.target.tokenizer is None else 2  # a minute, not three, on the embedded target
    for prompt in scene.prompts[:few]:
        free = generate(scene.target, proposer, [prompt], max_new_tokens=LIMIT, eos_ids=frozenset())[0]
        accepted = [place for place, drafted in enumerate(free.drafted) if drafted]
        for place in {0, 1, *accepted[:few]}:
            eos = frozenset({free.tokens[place]})
            ours = generate(scene.target, proposer, [prompt], max_new_tokens=LIMIT, eos_ids=eos)[0]
            assert told(ours) == reference(scene, prompt, eos)
            cuts += [r.cut for r in ours.rounds[-1:]]
    assert not scene.varied or any(cuts), "none of the chosen EOS ids fell inside a draft"
