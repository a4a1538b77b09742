"""T=0: speculative output is the target's own greedy output, and replay makes the rounds that live decoding makes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import make_geometry, make_target
from tests.unit.objective.test_wavefront import Largest
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from specauf.bench import runner
from specauf.bench.runner import check_live
from specauf.config import SamplingConfig
from specauf.decode import cache
from specauf.decode.cache import without_holes
from specauf.decode.generate import Round, generate, undecodable
from specauf.decode.propose import DrafterProposer, LookupFirst, PromptLookup, Proposer
from specauf.decode.replay import (
    Trajectory,
    acceptances,
    load_trajectories,
    record,
    replay,
    save_trajectories,
    trajectory_features,
    walk,
)
from specauf.decode.select import Selection
from specauf.decode.verify import ACCEPT, CANDIDATE, PROPOSE, RESAMPLE
from specauf.drafter.checkpoint import build_drafter
from specauf.drafter.config import DominoHead
from specauf.drafter.dflash import DFlash
from specauf.drafter.domino import Domino
from specauf.strict import UserError
from specauf.target import Target


def proposers(target: Target) -> dict[str, Proposer]:
    drafter, small = (DrafterProposer(DFlash(make_geometry(target, block_size=b)), target) for b in (5, 3))
    both = {"lookup first": LookupFirst(drafter, 2, 4), "wide lookup first": LookupFirst(small, 1, 5)}
    return {"drafter": drafter, "lookup": PromptLookup(5), **both}


KINDS = ["drafter", "lookup", "lookup first", "wide lookup first"]


def reference(target: Target, prompt: list[int], limit: int, penalty: float, eos: frozenset[int]) -> list[int]:
    """Greedy decoding without a cache."""
    ids = list(prompt)
    for _ in range(limit):
        z = target.logits(target.run(torch.tensor([ids])).final[0, -1])
        for token in set(ids):
            z[token] = z[token] / penalty if z[token] > 0 else z[token] * penalty
        ids.append(int(z.argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_output_is_the_targets_own_at_any_batch(
    target: Target, prompts: list[list[int]], kind: str, penalty: float
) -> None:
    sampling = SamplingConfig(repetition_penalty=penalty)
    want = [reference(target, p, 30, penalty, target.eos_ids()) for p in prompts]
    how = proposers(target)[kind]
    together = generate(target, how, prompts, sampling=sampling, max_new_tokens=30)
    assert [g.tokens for g in together] == want
    assert [g.tokens for g in generate(target, None, prompts, sampling=sampling, max_new_tokens=30)] == want
    for prompt, batched in zip(prompts, together, strict=True):
        (alone,) = generate(target, how, [prompt], sampling=sampling, max_new_tokens=30)
        assert alone.tokens == batched.tokens and alone.rounds == batched.rounds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_replay_makes_the_live_rounds_with_several_eos_ids(
    target: Target, prompts: list[list[int]], kind: str, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingConfig(repetition_penalty=penalty)
    plain = generate(target, None, prompts, sampling=sampling, max_new_tokens=24)
    eos = frozenset({plain[0].tokens[9], plain[1].tokens[15], plain[2].tokens[0]})  # end some early, one at once
    monkeypatch.setattr(target, "eos_ids", lambda: eos)
    how = proposers(target)[kind]
    live = generate(target, how, prompts, sampling=sampling, max_new_tokens=24)
    want = [reference(target, p, 24, penalty, eos) for p in prompts]
    assert [g.tokens for g in live] == want
    assert any(g.ended for g in live) and not all(g.ended for g in live)
    recorded = record(
        target, [(str(i), p) for i, p in enumerate(prompts)], limit=24, block_size=5, sampling=sampling, batch_size=3
    )
    features = trajectory_features(target, recorded, how.layer_ids) if how.layer_ids else None
    assert replay(how, recorded, features, 24) == [g.rounds for g in live]  # type: ignore[arg-type]


@pytest.mark.parametrize("head", [None, DominoHead(8, 4)])
def test_a_drafter_that_is_sometimes_right_makes_the_rounds_of_replay(
    prompts: list[list[int]], head: DominoHead | None
) -> None:
    """Target and drafter say four tokens alone, so that rows accept now and then, each its own number."""
    target = make_target()
    target.head_bias = torch.where(torch.arange(61) % 16 == 7, 0.0, -1e4)
    drafter = build_drafter(dataclasses.replace(make_geometry(target), domino=head, initializer_range=0.3), seed=1)
    how, numbered = DrafterProposer(drafter, target), [(str(i), p) for i, p in enumerate(prompts)]
    live = [g.rounds for g in generate(target, how, prompts, max_new_tokens=24)]
    assert len({r.accepted for rounds in live for r in rounds}) > 2, "the case shows nothing"
    recorded = record(target, numbered, limit=24, block_size=5, sampling=SamplingConfig())
    assert replay(how, recorded, trajectory_features(target, recorded, how.layer_ids), 24) == live


def test_a_chain_is_not_copied_along_its_own_path(target: Target, prompts: list[list[int]]) -> None:
    with Largest("gather") as seen:
        generate(target, proposers(target)["drafter"], prompts, max_new_tokens=12)
    assert seen.numel == len(prompts) * 32, "a row's last hidden state, of the prefill"


def test_rounds_account_for_every_token(target: Target, prompts: list[list[int]]) -> None:
    told: list[tuple[list[int], list[bool]]] = [([], []) for _ in prompts]

    def listen(row: int, tokens: list[int], drafted: list[bool]) -> None:
        told[row][0].extend(tokens)
        told[row][1].extend(drafted)

    made = generate(target, PromptLookup(5), prompts, max_new_tokens=30, eos_ids=frozenset(), on_commit=listen)
    assert told == [(g.tokens, g.drafted) for g in made]
    for generation in made:
        starts = [r.start for r in generation.rounds]
        assert starts == [0, *(r.start + r.accepted + 1 for r in generation.rounds[:-1])]
        assert sum(generation.drafted) <= sum(r.accepted for r in generation.rounds)
        assert len(generation.tokens) == len(generation.drafted) == 30


def test_walk_counts_a_round_cut_by_eos_and_never_starts_one_at_it() -> None:
    trajectory = Trajectory("x", [1], [5, 6, 7, 8, 2], ended=True)
    assert walk([1, 0, 2, 1], trajectory) == [Round(0, 1), Round(2, 2, cut=True)]
    assert walk([0, 2, 2, 0], trajectory) == [Round(0, 0), Round(1, 2)]  # the token after the draft was EOS: not cut


@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize("kind", ["drafter", "domino", "pooled domino"])
def test_what_is_accepted_is_what_a_text_has_of_the_draft(kind: str, chunk: int) -> None:
    """A text that is made of drafts: so many tokens of each, then another one. No target would have to say it."""
    target = make_target()
    target.head_bias, target.softcap = 0.1 * torch.arange(61.0).sin(), 0.5  # of the base logits alone
    head = DominoHead(8, 4) if "domino" in kind else None
    geometry = dataclasses.replace(make_geometry(target), domino=head, initializer_range=0.3)  # says this and that
    drafter = build_drafter(geometry, seed=1)
    how = DrafterProposer(drafter, target, candidate_pool=3 if kind == "pooled domino" else 0)
    rng = random.Random(0)
    text, rounds, said = [4, 8, 15, 16, 23], list[Round](), set[int]()
    for _ in range(12):
        ids = torch.tensor([text])
        how.start(1, len(text))
        how.observe(target.run(ids, how.layer_ids).features, torch.arange(len(text))[None])
        draft = how.propose(ids, torch.tensor([len(text) - 1]))[0].tolist()
        rounds.append(Round(len(text) - 5, rng.randint(0, 4)))
        said |= set(draft)
        text += draft[: rounds[-1].accepted]
        text.append(next(t for t in rng.sample(range(58), 2) if t != (*draft, -1)[rounds[-1].accepted]))
    assert len(said) > 9, "the case shows nothing"
    made, limit = Trajectory("x", text[:4], text[4:], False), rounds[-1].start + 2
    (features,) = trajectory_features(target, [made], how.layer_ids)
    assert walk(acceptances(how, made, features, limit, chunk=chunk).tolist(), made) == rounds


@pytest.mark.parametrize("pool", [61, 100])
def test_a_pool_that_holds_the_whole_vocabulary_is_none(target: Target, pool: int) -> None:
    drafter = build_drafter(dataclasses.replace(make_geometry(target), domino=DominoHead(8, 4)), seed=1)
    assert DrafterProposer(drafter, target, candidate_pool=pool).candidate_pool == 0
    assert DrafterProposer(drafter, target, candidate_pool=60).candidate_pool == 60


def test_nothing_is_accepted_beyond_the_end_of_a_recording() -> None:
    """Prompt lookup and a drafter that go on saying the last token, which ended the text."""
    target = make_target()
    made = Trajectory("x", [1, 1, 1, 1], [1, 1, 1], ended=True)
    assert acceptances(PromptLookup(6), made, None, 9).tolist() == [2, 1]
    target.head_weight, target.head_bias = target.head_weight * 0, (torch.arange(61) == 1).float()
    drafter = DrafterProposer(DFlash(make_geometry(target)), target)
    (features,) = trajectory_features(target, [made], drafter.layer_ids)
    assert acceptances(drafter, made, features, 9).tolist() == [2, 1]


def test_an_answer_is_ended_by_an_eos_within_the_limit_alone(target: Target, prompts: list[list[int]]) -> None:
    """The target says EOS next to the last, last and first beyond the limit, which a whole draft may have reached."""
    (plain,) = generate(target, None, [prompts[0]], max_new_tokens=20, eos_ids=frozenset())
    text, at = plain.tokens, next(i for i in range(3, 9) if plain.tokens[i] not in plain.tokens[:i])

    class Known(PromptLookup):
        def propose(self, ids: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
            done = int(anchors[0]) + 1 - len(prompts[0])
            return torch.tensor([(text + [0] * 9)[done : done + self.block_size - 1]])

    for limit, ended in ((at + 2, True), (at + 1, True), (at, False)):
        (made,) = generate(target, Known(9), [prompts[0]], max_new_tokens=limit, eos_ids=frozenset({text[at]}))
        assert made.tokens == text[: min(limit, at + 1)] and made.ended == ended
        assert made.rounds == [Round(0, at, cut=True)], "what the draft says after it is not accepted"


def test_a_proposer_of_another_may_say_its_tokens_in_32_bits(target: Target, prompts: list[list[int]]) -> None:
    class Narrow(PromptLookup):
        def propose(self, ids: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
            return super().propose(ids, anchors).int()

    wide, narrow = (generate(target, how, prompts, max_new_tokens=9) for how in (PromptLookup(4), Narrow(4)))
    assert [(g.tokens, g.rounds) for g in wide] == [(g.tokens, g.rounds) for g in narrow]


def test_margins_are_those_of_every_token(target: Target, prompts: list[list[int]]) -> None:
    narrow = SamplingConfig(top_k=1, top_p=0.1)  # of draws alone, and at T=0 there are none
    for how, sampling in ((None, None), (PromptLookup(4), None), (None, narrow)):
        given = {"sampling": sampling, "max_new_tokens": 15, "record_margins": True}
        (made,) = generate(target, how, [prompts[3]], eos_ids=frozenset(), **given)  # type: ignore[arg-type]
        logits = target.logits(target.run(torch.tensor([made.prompt + made.tokens])).final[0])
        top = logits[len(made.prompt) - 1 : -1].topk(2).values
        torch.testing.assert_close(torch.tensor(made.margins), top[:, 0] - top[:, 1], rtol=1e-4, atol=1e-4)
    level = make_target()
    level.head_weight = torch.zeros_like(level.head_weight)
    (made,) = generate(level, None, [prompts[3]], max_new_tokens=2, eos_ids=frozenset(), record_margins=True)
    assert [f"{m:.2e}" for m in made.margins] == ["0.00e+00"] * 2, "a tie's margin has no sign"


@pytest.mark.parametrize("kind", ["drafter", "domino", "shorter domino", "lookup", "lookup first", "behind lookup"])
def test_a_round_that_differs_is_told_with_the_margin_of_the_slot_that_decides_it(
    target: Target, prompts: list[list[int]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry, how = make_geometry(target), PromptLookup(5)
    if kind != "lookup":
        head = DominoHead(8, 4) if "domino" in kind else None
        drafter = build_drafter(dataclasses.replace(geometry, domino=head), seed=1)
        if isinstance(drafter, Domino):
            drafter.expansion.data.mul_(500)
        how = DrafterProposer(drafter, target)
        how = LookupFirst(how, 1) if kind in ("lookup first", "behind lookup") else how
    made = record(
        target, [(str(i), p) for i, p in enumerate(prompts[:2])], limit=20, block_size=5, sampling=SamplingConfig()
    )
    live = generate(target, how, [prompts[1]], max_new_tokens=20)[0].rounds

    def telling(r: Round) -> bool:
        """One that can be longer; of Domino's corrected slots; behind a lookup copied, or not, as the kind says."""
        text = made[1].ids[: len(prompts[1]) + r.start + 1]
        meant = not isinstance(how, LookupFirst) or how.asks_drafter(text) == (kind == "behind lookup")
        return r.accepted < 4 and meant and ("domino" not in kind or r.accepted > 0)

    number = next(i for i, r in enumerate(live) if telling(r))
    more = -1 if kind == "shorter domino" else 1  # than live, as replay has it

    def lucky(*given: Any) -> list[list[Round]]:
        rounds = replay(*given)
        rounds[1][number] = dataclasses.replace(rounds[1][number], accepted=live[number].accepted + more)
        return rounds

    monkeypatch.setattr(runner, "replay", lucky)
    margin, asked = math.inf, how.drafter if isinstance(how, LookupFirst) and kind == "behind lookup" else how
    if isinstance(asked, DrafterProposer):
        ids, at = torch.tensor([made[1].ids]), len(prompts[1]) + live[number].start
        asked.start(1, ids.shape[1])
        asked.observe(target.run(ids, asked.layer_ids).features, torch.arange(ids.shape[1])[None])
        top = asked._chosen(ids, torch.tensor([at]), None)[1][0, live[number].accepted + min(more, 0)].topk(2).values
        margin = float(top[0] - top[1])
    told = f"1: live and replayed round {number} differ, at token {live[number].start}, top-2 margin"
    (problem,) = check_live(target, how, made, 20).problems
    assert problem.startswith(told) and float(problem.split()[-1]) == pytest.approx(margin, rel=0.01)
    monkeypatch.setitem(runner.NEAR_TIE, torch.float32, 1.01 * margin if margin < math.inf else 1e9)
    found = check_live(target, how, made, 20)
    assert (len(found.problems), len(found.near_ties)) == ((1, 0) if math.isinf(margin) else (0, 1))


def test_texts_part_at_the_first_difference_or_where_one_ends() -> None:
    assert [runner.parting(a, [1, 2]) for a in ([1, 2, 3], [1, 2], [1], [1, 3], [3, 2])] == [1, 1, 1, 1, 0]


def test_a_near_tie_is_two_steps_of_a_logit_between_16_and_32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert runner.NEAR_TIE[dtype] == 2 * 16 * torch.finfo(dtype).eps
        low = SimpleNamespace(embed_weight=torch.zeros(1, dtype=dtype))
        assert runner.near_tie(low) == runner.NEAR_TIE[dtype]  # type: ignore[arg-type]


def test_trajectories_survive_the_disk(tmp_path: Path) -> None:
    made = [Trajectory("a/1", [1, 2], [3, 4, 5], False), Trajectory("b", [9], [2], True)]
    save_trajectories(tmp_path / "t", made, {"limit": 3})
    again, meta = load_trajectories(tmp_path / "t")
    assert again == made and meta["limit"] == 3
    (tmp_path / "t" / "trajectories.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="no recorded trajectories"):
        load_trajectories(tmp_path / "t")


def test_an_empty_prompt_is_refused(target: Target) -> None:
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(target, None, [[1], []])


def test_limits_and_uids_are_one_a_prompt(target: Target, prompts: list[list[int]]) -> None:
    """A single uid would have served every prompt: all of them draw the same random numbers."""
    for wrong in ({"uids": [5]}, {"max_new_tokens": [3, 3]}):
        with pytest.raises(ValueError, match="shorter"):
            generate(target, None, prompts[:3], **wrong)  # type: ignore[arg-type]
    assert generate(target, None, []) == []


def windowed(window: int) -> Target:
    torch.manual_seed(0)
    geometry = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=61, num_key_value_heads=2, sliding_window=window, eos_token_id=60, **geometry)
    return Target(MistralForCausalLM(config), None, "windowed")


def test_layers_with_a_window_are_decoded_until_it_is_full(prompts: list[list[int]]) -> None:
    target = windowed(40)
    for prompt in prompts[:3]:
        (made,) = generate(target, PromptLookup(3), [prompt], max_new_tokens=20)
        assert made.tokens == reference(target, prompt, 20, 1.0, target.eos_ids())
    decoded = []
    for limit in range(33, 40):
        with contextlib.suppress(UserError):  # as far as it goes, and no wrong token before it is refused
            (made,) = generate(target, PromptLookup(3), [prompts[0]], max_new_tokens=limit, eos_ids=frozenset())
            assert made.tokens == reference(target, prompts[0], limit, 1.0, frozenset())
            decoded.append(limit)
    assert 0 < len(decoded) < 7
    with pytest.raises(UserError, match="windowed has layers that see the last 40 tokens alone"):
        generate(target, None, [prompts[0]], max_new_tokens=60, eos_ids=frozenset())
    with pytest.raises(UserError, match=r"this takes 4[0-9]: long has a prompt of .* tokens"):  # before any is recorded
        record(target, [("a", [1]), ("long", prompts[0])], limit=35, block_size=4, sampling=SamplingConfig())


def test_learned_positions_are_used_to_the_last_and_no_further() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=32, eos_token_id=60, bos_token_id=60)
    target = Target(GPT2LMHeadModel(config), None, "learned")
    prompt = list(range(20))
    (plain,) = generate(target, None, [prompt], max_new_tokens=12, eos_ids=frozenset())
    (made,) = generate(target, PromptLookup(8), [prompt], max_new_tokens=12, eos_ids=frozenset())
    assert target.reach == 32 and made.tokens == plain.tokens and len(plain.tokens) == 12
    with pytest.raises(UserError, match="learned reaches 32 positions here, and this takes 33: shorten the prompts"):
        generate(target, None, [prompt], max_new_tokens=13)
    with pytest.raises(UserError, match="takes 33: a has a prompt of 20 tokens"):  # before any is recorded
        record(target, [("a", prompt)], limit=10, block_size=4, sampling=SamplingConfig())
    with pytest.raises(UserError, match=r"takes 33: shorten the text, or lower data\.max_length"):
        target.run(torch.zeros(1, 33, dtype=torch.long))


def test_every_prompt_has_a_limit_of_its_own() -> None:
    target = make_target()
    prompts, limits = [[1, 2, 3], [4, 5, 6, 7, 8], [9]], [7, 2, 12]
    made = generate(target, PromptLookup(4), prompts, max_new_tokens=limits, eos_ids=frozenset())
    for prompt, limit, found in zip(prompts, limits, made, strict=True):
        (alone,) = generate(target, PromptLookup(4), [prompt], max_new_tokens=limit, eos_ids=frozenset())
        assert (found.tokens, found.rounds) == (alone.tokens, alone.rounds) and len(found.tokens) == limit
    target.reach = 13  # of each with its own limit, not of the longest with the largest
    generate(target, None, prompts, max_new_tokens=limits, eos_ids=frozenset())


def test_rotations_that_turn_with_the_length_are_used_as_far_as_they_stay() -> None:
    geometry = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    config = Phi3Config(
        **geometry, vocab_size=61, max_position_embeddings=64, original_max_position_embeddings=24, pad_token_id=0,
        rope_parameters=rope,
    )  # fmt: skip
    target = Target(Phi3ForCausalLM(config), None, "turning")
    assert target.reach == 24
    generate(target, PromptLookup(8), [[1] * 10, [2] * 4], max_new_tokens=14, eos_ids=frozenset())
    with pytest.raises(UserError, match="turning reaches 24 positions here"):
        generate(target, None, [[1] * 10, [2] * 4], max_new_tokens=15)


def test_attention_to_the_last_columns_is_refused() -> None:
    config = GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=61, max_position_embeddings=64, window_size=4,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    with pytest.raises(UserError, match="attends to the last columns of its cache"):
        generate(Target(GPTNeoForCausalLM(config), None, "local"), None, [[1, 2]])


def test_alibi_over_columns_is_refused() -> None:
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=61, max_seq_len=64)
    with pytest.raises(UserError, match="attends to the last columns of its cache"):
        generate(Target(MptForCausalLM(config), None, "mpt"), None, [[1, 2]])


def test_self_selection_over_alibi_is_refused(target: Target) -> None:
    config = BloomConfig(hidden_size=32, n_head=4, n_layer=6, vocab_size=61)
    bloom = Target(BloomForCausalLM(config), None, "bloom")
    proposer = DrafterProposer(build_drafter(make_geometry(target), seed=0), target)
    with pytest.raises(UserError, match="ALiBi"):
        generate(bloom, proposer, [[1, 2]], selection=Selection(3, 1.0))


def test_what_cannot_be_decoded_is_known_beforehand(target: Target) -> None:
    assert undecodable(target) is None
    mpt = Target(MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=61)), None, "mpt")
    assert "last columns of its cache" in (undecodable(mpt) or "")


def test_a_target_that_fills_no_cache_is_refused() -> None:
    config = RwkvConfig(vocab_size=61, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=64)
    with pytest.raises(UserError, match="puts no keys and values into the cache"):
        generate(Target(RwkvForCausalLM(config), None, "rwkv"), None, [[1, 2, 3]], max_new_tokens=4)


def test_a_listener_costs_no_decoding_time(target: Target) -> None:
    def slow(row: int, tokens: list[int], drafted: list[bool]) -> None:
        time.sleep(0.2)

    (made,) = generate(target, None, [[1, 2]], max_new_tokens=4, eos_ids=frozenset(), on_commit=slow)
    assert made.seconds < 0.8


def test_the_host_reads_from_the_device_a_few_times_a_round_whatever_the_batch(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = torch.Tensor.tolist, 0

    def counted(tensor: torch.Tensor) -> Any:
        nonlocal reads
        reads += 1
        return read(tensor)

    def reads_a_round(proposer: Proposer | None, rows: int) -> float:
        nonlocal reads
        reads = 0
        made = generate(target, proposer, [[1, 2, 3]] * rows, max_new_tokens=20, eos_ids=frozenset())
        return reads / (1 + len(made[0].rounds))  # the prefill is one too

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    assert reads_a_round(None, 1) <= 3
    assert reads_a_round(PromptLookup(5), 8) == reads_a_round(PromptLookup(5), 1) <= 5


def test_layers_that_cannot_forget_a_draft_are_refused(
    target: Target, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = type("Cache", (), {"layers": [object()]})()
    monkeypatch.setattr("specauf.decode.cache.roomy_cache", lambda config: cache)
    with pytest.raises(UserError, match="tiny has layers with linear or sparse attention"):
        generate(target, None, prompts[:1])


def test_prompt_lookup_copies_what_followed_the_latest_longest_match() -> None:
    lookup = PromptLookup(4)
    lookup.start(1, 20)

    def draft(tokens: list[int]) -> list[int]:
        return lookup.propose(torch.tensor([tokens]), torch.tensor([len(tokens) - 1]))[0].tolist()

    text = [1, 2, 3, 9, 2, 3, 8, 1, 2, 3]
    assert draft(text[:6]) == [9, 2, 3]  # the bigram 2 3 was followed by 9 2 3
    assert draft(text) == [9, 2, 3]  # the trigram 1 2 3 beats the later bigram 2 3
    lookup.start(1, 20)
    assert draft([4, 5, 6]) == [6, 6, 6]  # nothing to copy
    lookup.start(1, 20)
    assert draft([7, 1, 2, 1, 2, 1, 2]) == [1, 2, 1]  # a loop shorter than the block goes on
    lookup.start(1, 20)
    assert draft([7, 1, 2, 1, 2, 1, 2, 7]) == [1, 2, 1]  # one token, as long as nothing longer matches
    lookup.start(1, 20)
    text = [9, 1, 2, 3, 5, 8, 1, 2, 3, 6, 9, 1, 2, 3]
    assert draft(text) == [6, 9, 1]  # of three tokens the latest: that four matched further back is not looked at


def test_rows_of_different_lengths_are_drafted_as_each_would_be_alone(target: Target) -> None:
    drafter = build_drafter(dataclasses.replace(make_geometry(target), initializer_range=0.3), seed=1)
    how, ids = DrafterProposer(drafter, target), torch.arange(36).view(3, 12) ** 2 % 58
    anchors, features = torch.tensor([4, 11, 7]), target.run(ids, how.layer_ids).features

    def logits(rows: slice, width: int) -> torch.Tensor:
        how.start(len(ids[rows]), 12)
        how.observe(features[rows, :width], torch.arange(width).expand(len(ids[rows]), -1))
        return how.logits(ids[rows], anchors[rows])

    alone = torch.cat([logits(slice(i, i + 1), int(anchors[i])) for i in range(3)])
    torch.testing.assert_close(logits(slice(None), 12), alone, rtol=1e-4, atol=1e-4)
    how.select(torch.tensor([2, 0]))
    torch.testing.assert_close(how.logits(ids[[2, 0]], anchors[[2, 0]]), alone[[2, 0]], rtol=1e-4, atol=1e-4)


def test_lookup_first_may_ask_for_more_tokens_than_lookup_looks_at_by_itself(target: Target) -> None:
    drafter = DrafterProposer(DFlash(make_geometry(target, block_size=3)), target)
    both = LookupFirst(drafter, 4)
    assert not both.asks_drafter([5, 1, 2, 3, 7, 5, 1, 2, 3])
    assert both.asks_drafter([4, 1, 2, 3, 7, 5, 1, 2, 3]), "three are not four"
    assert LookupFirst(drafter, 1).lookup.along([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], [9]) == [([9, 2], 3)], "and no fewer"
    assert LookupFirst(drafter, 1).asks_drafter([4, 1, 2]) and not LookupFirst(drafter, 1).asks_drafter([4, 1, 4])


def test_lookup_first_copies_where_enough_tokens_match_and_asks_the_drafter_elsewhere(target: Target) -> None:
    geometry = dataclasses.replace(make_geometry(target, block_size=3), initializer_range=0.3)  # says this and that
    drafter = DrafterProposer(build_drafter(geometry, seed=1), target)
    ids = torch.tensor([[1, 2, 3, 9, 1, 2], [1, 2, 3, 9, 5, 2], [4, 4, 6, 7, 8, 9]])
    anchors, features = torch.full((3,), 5), target.run(ids, drafter.layer_ids).features
    both = LookupFirst(drafter, 2, 5)
    drafter.start(3, 6)
    unread = drafter.propose(ids, anchors).tolist()
    drafter.observe(features, torch.arange(6).expand(3, -1))
    filler, own = both.filler, drafter.propose(ids, anchors).tolist()
    assert own != unread and filler not in own[1] + own[2], "the case shows nothing"
    both.start(3, 6)
    both.observe(features, torch.arange(6).expand(3, -1))
    drafts = both.propose(ids, anchors).tolist()
    assert drafts == [[3, 9, 1, 2], [*own[1], filler, filler], [*own[2], filler, filler]]
    both.select(torch.tensor([2, 0]))
    assert both.propose(ids[[2, 0]], anchors[:2]).tolist() == [drafts[2], drafts[0]]
    assert [both.asks_drafter(row) for row in ids.tolist()] == [False, True, True]
    with pytest.raises(UserError, match="ngram 0"):
        LookupFirst(drafter, 0)


def test_a_drafter_of_another_target_is_refused(target: Target) -> None:
    other = make_target(hidden=48)
    with pytest.raises(UserError, match="hidden_size 48; that of tiny is 32"):
        DrafterProposer(DFlash(make_geometry(other)), target)
    deep = DFlash(dataclasses.replace(make_geometry(target), target_layer_ids=(1, 4)))
    with pytest.raises(UserError, match="reads layer 4 of its target; tiny has 5"):
        DrafterProposer(deep, make_target(layers=5))
    with pytest.raises(UserError, match="block size of at least 2"):
        PromptLookup(1)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 64), (2, 2)])
def test_a_live_check_compares_with_the_recording_under_its_sampling(
    target: Target, prompts: list[list[int]], batch_size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CHUNK", chunk)
    sampling = SamplingConfig(repetition_penalty=1.5)
    numbered = [(str(i), p) for i, p in enumerate(prompts[:3])]
    made = record(target, numbered, limit=12, block_size=5, sampling=sampling)
    drafter = DrafterProposer(DFlash(make_geometry(target)), target)
    right = check_live(target, drafter, made, 12, sampling=sampling, batch_size=batch_size)
    assert not right.problems and not right.near_ties
    assert min(right.live_seconds, right.replay_seconds, right.prefill_seconds) > 0
    wrong = check_live(target, drafter, made, 12)
    assert any("the recording and plain decoding part at token" in told for told in wrong.problems)
    again = check_live(target, drafter, made, 12, sampling=sampling, batch_size=batch_size, plain=right.plain)
    assert again.plain == right.plain and not again.problems
    elsewhere = check_live(target, drafter, made, 12, sampling=sampling, batch_size=batch_size, plain=wrong.plain)
    assert elsewhere.problems, "the given plain decodings are what is compared"


def test_a_live_check_looks_no_further_than_the_limit(target: Target, prompts: list[list[int]]) -> None:
    lookup = PromptLookup(5)

    def last(prompt: list[int], limit: int) -> Round:
        (made,) = generate(target, lookup, [prompt], max_new_tokens=limit, eos_ids=frozenset())
        return made.rounds[-1]

    # A round that the limit cuts: its last draft tokens are accepted beyond it.
    prompt, limit = next((p, n) for p in prompts for n in range(8, 40) if last(p, n).start + last(p, n).accepted >= n)
    (made,) = record(target, [("a", prompt)], limit=limit, block_size=5, sampling=SamplingConfig())
    for at, problems in ((limit - 1, 1), (limit, 0)):
        other = dataclasses.replace(made, tokens=[t + (i == at) for i, t in enumerate(made.tokens)])
        assert len(check_live(target, lookup, [other], limit).problems) == problems, at


@pytest.mark.parametrize("kind", [*KINDS[1:], "windowed"])
def test_the_cache_does_not_fill_with_holes(
    target: Target, prompts: list[list[int]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows accept differently, and each round keeps the luckiest row's columns."""
    target, how = (windowed(400), PromptLookup(5)) if kind == "windowed" else (target, proposers(target)[kind])
    widths = list[tuple[int, int, int]]()

    def spy(held: Any, columns: Any, used: int) -> Any:
        left = without_holes(held, columns, used)
        assert left.shape[1] == held.get_seq_length() and torch.equal(left.sum(1), columns.sum(1))
        widths.append((columns.shape[1], left.shape[1], used))
        return left

    monkeypatch.setattr(cache, "ROOM", 1)
    monkeypatch.setattr(cache, "without_holes", spy)
    loop = [[5, 6, 5, 6, 5, 6], *prompts]
    made = generate(target, how, loop, max_new_tokens=40, eos_ids=frozenset())
    assert [g.tokens for g in made] == [reference(target, p, 40, 1.0, frozenset()) for p in loop]
    assert any(after < before for before, after, _ in widths)
    assert all(after <= used * 3 // 2 + 1 for _, after, used in widths)


def test_whole_numbers_are_numbers(target: Target) -> None:
    sampling = SamplingConfig(temperature=2, repetition_penalty=2)
    assert generate(target, None, [[1, 2]], sampling=sampling, max_new_tokens=3, eos_ids=frozenset())[0].tokens


def test_no_stream_of_draws_is_an_epoch() -> None:
    assert max(ACCEPT, RESAMPLE, PROPOSE, CANDIDATE) < 0


@pytest.mark.parametrize("meta", ["[]", "{}", '{"ids": 5}', '{"ids": ["a", "b"]}', "[" * 10**5])
def test_a_recording_whose_parts_do_not_fit_is_one_to_make_again(tmp_path: Path, meta: str) -> None:
    save_trajectories(tmp_path / "kept", [Trajectory("a", [1], [2, 3], True)], {})
    (tmp_path / "kept" / "meta.json").write_text(meta)
    with pytest.raises(UserError, match=r"holds no recorded trajectories .* records them again"):
        load_trajectories(tmp_path / "kept")
