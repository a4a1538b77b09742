"""Self-selection: the tree by hand, the closed form against simulation, and T=0 output that is plain decoding's own."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Bool, Float
from tests.conftest import make_geometry

from specauf.config import SamplingConfig
from specauf.decode.generate import Generation, generate
from specauf.decode.propose import DrafterProposer, PromptLookup
from specauf.decode.replay import record
from specauf.decode.select import Selection, build_tree, choose, sample_candidates
from specauf.drafter.dflash import DFlash
from specauf.objective.blocks import counter_uniform
from specauf.strict import ConfigError, UserError
from specauf.target import Target

LIMIT, BLOCK = 24, 5
NEVER: frozenset[int] = frozenset()


class Oracle(DrafterProposer):
    """A drafter that hesitates, as a hash of the position says, between the known text and another token."""

    def __init__(self, target: Target, known: list[Generation]) -> None:
        super().__init__(DFlash(make_geometry(target, block_size=BLOCK)), target)
        self.known = [g.prompt + g.tokens for g in known]

    def logits(self, ids: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        place = anchors[:, None] + torch.arange(1, self.block_size)
        v = self.target.config.vocab_size
        z = counter_uniform(0, 7, place[..., None], torch.arange(v))
        for row, anchor in enumerate(anchors.tolist()):
            prefix = ids[row, : anchor + 1].tolist()
            text = next(t for t in self.known if t[: anchor + 1] == prefix)  # StopIteration: this is not the text
            for j, token in enumerate(text[anchor + 1 : anchor + self.block_size]):
                for stream, choice in enumerate((token, (token + 1) % v)):
                    z[row, j, choice] += 5 + float(counter_uniform(0, stream, place[row, j], place[row, j]))
        return z.float()


def known(target: Target, prompts: list[list[int]], sampling: SamplingConfig | None = None) -> list[Generation]:
    return generate(target, None, prompts, sampling=sampling, max_new_tokens=LIMIT + BLOCK, eos_ids=NEVER)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_text_is_plain_decodings_at_any_batch(
    target: Target, prompts: list[list[int]], count: int, penalty: float
) -> None:
    sampling = SamplingConfig(repetition_penalty=penalty)
    texts = known(target, prompts, sampling)
    how, selection = Oracle(target, texts), Selection(count, 1.0)
    eos = frozenset({texts[0].tokens[12], texts[4].tokens[0]})  # some end early, one at once

    def run(prompts: list[list[int]], selection: Selection | None, uid: int = 0) -> list[Generation]:
        uids = range(uid, uid + len(prompts))
        options = {"sampling": sampling, "max_new_tokens": LIMIT, "eos_ids": eos, "uids": uids, "record_margins": True}
        return generate(target, how, prompts, selection=selection, **options)  # type: ignore[arg-type]

    plain = generate(target, None, prompts, sampling=sampling, max_new_tokens=LIMIT, eos_ids=eos, record_margins=True)
    chains, chosen = run(prompts, None), run(prompts, selection)
    assert [g.tokens for g in chosen] == [g.tokens for g in plain] == [g.tokens for g in chains]
    assert any(g.ended for g in chosen) and not all(g.ended for g in chosen)
    for g, p in zip(chosen, plain, strict=True):
        assert g.margins == pytest.approx(p.margins, abs=1e-3), "the tree's logits are not the chain's"
    for i in (0, 3, 4):
        (alone,) = run([prompts[i]], selection, i)
        assert (alone.tokens, alone.rounds, alone.verified) == (chosen[i].tokens, chosen[i].rounds, chosen[i].verified)
    if count == 1:
        assert [(g.rounds, g.verified) for g in chosen] == [(g.rounds, g.verified) for g in chains]
        assert all(g.verified == BLOCK * len(g.rounds) for g in chains)
    else:
        assert sum(len(g.rounds) for g in chosen) < sum(len(g.rounds) for g in chains), "a choice that never helps"
        assert all(len(g.rounds) * BLOCK <= g.verified <= len(g.rounds) * (1 + count * (BLOCK - 1)) for g in chosen)
    assert all(g.verified == len(g.rounds) == len(g.tokens) - 1 for g in plain)


def test_a_round_accepts_at_least_what_its_greedy_chain_would(target: Target, prompts: list[list[int]]) -> None:
    texts = known(target, prompts)
    how, gained = Oracle(target, texts), 0
    for g, text in zip(
        generate(target, how, prompts, selection=Selection(4), max_new_tokens=LIMIT, eos_ids=NEVER), texts, strict=True
    ):
        for r in g.rounds:
            anchor = torch.tensor([len(text.prompt) + r.start])
            draft = how.propose(torch.tensor([text.prompt + text.tokens]), anchor)[0]
            right = draft == torch.tensor(text.tokens[r.start + 1 : r.start + BLOCK])
            greedy = int(right.int().cumprod(0).sum())
            assert r.accepted >= greedy
            gained += r.accepted - greedy
    assert gained > 0


def test_the_drafter_observes_the_accepted_path(target: Target, prompts: list[list[int]]) -> None:
    texts = known(target, prompts[:1])
    how = Oracle(target, texts)
    (g,) = generate(target, how, prompts[:1], selection=Selection(8), max_new_tokens=LIMIT, eos_ids=NEVER)
    last = len(g.prompt) + g.rounds[-1].start
    ids, positions = torch.tensor([g.prompt + g.tokens])[:, : last + 1], torch.arange(last + 1)[None]
    fresh = how.drafter.context(target.run(ids, how.layer_ids).features, positions)
    for kept, want in zip(how._context, fresh, strict=True):
        torch.testing.assert_close(kept.key[:, :, : last + 1], want.key, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kept.value[:, :, : last + 1], want.value, atol=1e-4, rtol=1e-4)


def test_candidates_share_their_prefixes() -> None:
    anchors = torch.tensor([[9], [7]])
    candidates = torch.tensor([[[1, 2, 3], [1, 2, 4], [5, 2, 3]], [[1, 1, 1]] * 3])
    tree = build_tree(anchors, candidates)
    assert tree.size == [8, 4]
    assert tree.tokens.tolist() == [[9, 1, 2, 3, 4, 5, 2, 3], [7, 1, 1, 1, 7, 7, 7, 7]]
    assert tree.parent.tolist()[0] == [0, 0, 1, 2, 2, 0, 5, 6]
    assert tree.depth.tolist() == [[0, 1, 2, 3, 3, 1, 2, 3], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert tree.path[0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 5, 6, 7]]
    assert tree.path[1].tolist() == [[0, 1, 2, 3]] * 3
    sees = tree.sees(torch.tensor([[True, False], [True, True]]))
    assert sees.shape == (2, 1, 8, 10) and sees[:, 0, :, :2].all(1).tolist() == [[True, False], [True, True]]
    seen = [set(row.nonzero().squeeze(1).tolist()) for row in sees[0, 0, :, 2:]]
    assert seen == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 4}, {0, 5}, {0, 5, 6}, {0, 5, 6, 7}]
    assert not sees[1, 0, :4, 6:].any(), "padding is seen"


def test_the_choice_is_the_best_score_and_the_first_of_equals() -> None:
    candidates = torch.tensor([[[1, 2], [1, 3], [0, 2], [1, 3]]])
    tree = build_tree(torch.tensor([[0]]), candidates)
    chance = {0: [0.3, 0.4, 0.2, 0.1], 1: [0.25, 0.25, 0.2, 0.3], 4: [0.0, 0.0, 0.9, 0.1]}
    logits = torch.zeros(1, tree.size[0], 4)
    for node, p in chance.items():
        logits[0, node] = torch.tensor(p).log()

    def chosen(sampling: SamplingConfig) -> int:
        return int(choose(tree, candidates, logits, torch.zeros(1, 8).long(), torch.tensor([2]), sampling))

    # at T=1: 0.4 * 1.2, 0.4 * 1.3, 0.3 * 1.9, again 0.4 * 1.3
    assert chosen(SamplingConfig(temperature=1.0)) == 2
    assert chosen(SamplingConfig()) == 1  # accepted lengths 1, 2, 0, 2
    logits[0, 4] = torch.tensor([0.0, 0.0, 0.7, 0.3]).log()  # now 0.3 * 1.7: a likely second token is not enough
    assert chosen(SamplingConfig(temperature=1.0)) == 1
    logits[0, 1] = 0.0
    assert chosen(SamplingConfig()) == 0, "accepted lengths 1, 1, 0, 1"


def test_the_penalty_reads_each_candidates_own_path() -> None:
    candidates = torch.tensor([[[1, 1], [2, 1]]])
    tree = build_tree(torch.tensor([[0]]), candidates)
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0], *[[0.0, 2.0, 2.0, 0.0]] * 4])[None]  # a tie without the penalty
    ids, anchors = torch.zeros(1, 8).long(), torch.tensor([0])
    assert int(choose(tree, candidates, logits, ids, anchors, SamplingConfig(temperature=1.0))) == 0
    penalised = SamplingConfig(temperature=1.0, repetition_penalty=2.0)
    assert int(choose(tree, candidates, logits, ids, anchors, penalised)) == 1, (
        "1 has been said in the first, not in 2 1"
    )


def expected_best_of(
    chance: Float[Tensor, "... k"], candidates: int, hits: Bool[Tensor, "... k"] | None = None
) -> Float[Tensor, ...]:
    """E[max A] of that many blocks whose slots are drawn independently: sum_m 1 - (1 - P_m)^K, from logits alone.

    `chance` is the marginal probability of the right token of each slot at T_s, P_m its cumulative product. With `hits`
    (is the argmax right?), one of the candidates is the greedy chain.
    """
    drawn = candidates if hits is None else candidates - 1
    missed = (1 - chance.cumprod(-1)) ** drawn
    if hits is not None:
        missed = missed * (1 - hits.to(missed.dtype).cumprod(-1))
    return (1 - missed).sum(-1)


def test_candidates_are_of_their_seed_prompt_and_position() -> None:
    logits = torch.zeros(1, 6, 50)

    def drawn(seed: int, uid: int, anchor: int) -> list[list[int]]:
        found = sample_candidates(logits, Selection(3, 1.5), seed, torch.tensor([uid]), torch.tensor([anchor]))
        return found[0, 1:].tolist()  # type: ignore[no-any-return]

    one = drawn(0, 0, 7)
    assert one == drawn(0, 0, 7) and one[0] != one[1]
    assert all(one != drawn(*other) for other in ((1, 0, 7), (0, 1, 7), (0, 0, 17)))
    assert [row[1:] for row in one] == [row[:-1] for row in drawn(0, 0, 8)], "a position's numbers are its own"


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_closed_form_is_the_mean_of_the_best_of_k(count: int, greedy: bool) -> None:
    rows, k, v = 20_000, 4, 6
    logits = 2 * torch.randn(1, k, v, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    right = torch.tensor([logits[0, 0].argmax(), logits[0, 1].argmax(), *logits[0, 2:].topk(2).indices[:, 1]])
    drawn = Selection(count + 1 - greedy, 1.5)  # without the greedy chain one more, and it is thrown away
    candidates = sample_candidates(logits.expand(rows, -1, -1), drawn, 0, torch.arange(rows), torch.zeros(rows).long())
    best = (candidates[:, 1 - greedy :] == right).int().cumprod(-1).sum(-1).amax(1).double()
    chance = (logits / 1.5).softmax(-1)[0, torch.arange(k), right]
    want = float(expected_best_of(chance, count, logits[0].argmax(-1) == right if greedy else None))
    assert abs(float(best.mean()) - want) <= 4 * float(best.std()) / rows**0.5
    assert float(best.mean()) >= 2 if greedy else want > 0


def test_what_cannot_be_proposed_is_refused(target: Target, prompts: list[list[int]]) -> None:
    drafter, drawn = DrafterProposer(DFlash(make_geometry(target)), target), SamplingConfig(1.0, proposal="sampled")
    with pytest.raises(UserError, match="self-selection draws from a drafter's probabilities"):
        generate(target, PromptLookup(4), prompts, selection=Selection())
    with pytest.raises(UserError, match="self-selection draws from a drafter's probabilities"):
        generate(target, None, prompts, selection=Selection())
    with pytest.raises(UserError, match="proposal 'sampled' draws from a drafter's probabilities"):
        generate(target, PromptLookup(4), prompts, sampling=drawn)
    with pytest.raises(UserError, match="cannot be had with the proposal 'sampled'"):
        generate(target, drafter, prompts, sampling=drawn, selection=Selection())
    with pytest.raises(UserError, match="replay measures deterministic proposals alone"):
        record(target, [("a", prompts[0])], limit=4, block_size=5, sampling=drawn)
    with pytest.raises(ConfigError, match="needs temperature > 0"):
        SamplingConfig(proposal="sampled")
    for wrong in ((0, 1.5), (2, 0.0), (1, 0.7)):
        with pytest.raises(ConfigError, match="candidates"):
            Selection.of(*wrong)
    assert Selection.of(1, 1.5) is None and Selection.of(2, 0.7) == Selection(2, 0.7)
    assert len(generate(target, None, prompts[:1], sampling=drawn, max_new_tokens=4, eos_ids=NEVER)[0].tokens) == 4
