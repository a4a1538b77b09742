"""Domino's head against loops in float64, its rollout against recomputing everything, and its checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_geometry
from torch import Tensor

from specauf.drafter.checkpoint import build_drafter, load_drafter, save_drafter
from specauf.drafter.config import DFlashConfig, DominoHead
from specauf.drafter.dflash import DFlash
from specauf.drafter.domino import Corrected, Domino, pool_mask
from specauf.strict import ConfigError, UserError
from specauf.target import Target

MODES = [(shift, pure) for shift in (True, False) for pure in (0, 1, 2)]


def make_domino(target: Target, shift: bool = True, pure: int = 1, block_size: int = 5, seed: int = 0) -> Domino:
    geometry = make_geometry(target, block_size)
    drafter = build_drafter(dataclasses.replace(geometry, domino=DominoHead(7, 6, pure, shift)), seed)
    assert isinstance(drafter, Domino)
    return drafter


def gru(drafter: Domino, embeds: list[Tensor]) -> Tensor:
    """The state after the last of `embeds`, gate by gate."""
    w, u = drafter.prefix_gru.weight_ih_l0, drafter.prefix_gru.weight_hh_l0
    h = torch.zeros(u.shape[1], dtype=w.dtype)
    for x in embeds:
        (r, z, n), (hr, hz, hn) = (w @ x).chunk(3), (u @ h).chunk(3)
        r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        h = (1 - z) * torch.tanh(n + r * hn) + z * h
    return h


def final_logits(drafter: Domino, z: list[Tensor], weight: Tensor, embed: Tensor, said: list[int]) -> list[Tensor]:
    """Of every prediction of one block; `said[i]` is the token before prediction i, the anchor's first."""
    first, second = drafter.embed_proj[0].weight, drafter.embed_proj[2].weight
    out = []
    for i, row in enumerate(z):
        logits = weight @ row
        if i >= drafter.pure:
            x = first @ torch.cat([row, gru(drafter, [embed[t] for t in said[: i + 1]])])
            logits = logits + second @ (x * torch.sigmoid(x))
        out.append(logits)
    return out


class Rows:
    """Hidden states that are all there."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def rows(self, todo: Tensor) -> Tensor:
        return self.z[todo]


@pytest.mark.parametrize(("shift", "pure"), MODES)
def test_teacher_forced_rows_are_the_references(target: Target, shift: bool, pure: int) -> None:
    drafter = make_domino(target, shift, pure).double()
    embed = target.embed_weight.double()
    g = torch.Generator().manual_seed(1)
    n, k = 3, drafter.config.num_trained
    z = torch.randn(1, n, k, 32, generator=g, dtype=torch.float64)
    said = torch.randint(0, 61, (1, n, k), generator=g)
    rows = Corrected(drafter, Rows(z), embed[said]).rows(torch.ones(1, n, k, dtype=torch.bool)).view(1, n, k, -1)
    found = rows[..., :32] @ embed.T + rows[..., 32:] @ drafter.expansion.T
    for j in range(n):
        want = final_logits(drafter, list(z[0, j]), embed, embed, said[0, j].tolist())
        torch.testing.assert_close(found[0, j], torch.stack(want))


@pytest.mark.parametrize(("shift", "pure"), MODES)
def test_the_rollout_is_the_head_recomputed_for_every_token(target: Target, shift: bool, pure: int) -> None:
    drafter = make_domino(target, shift, pure).double()
    drafter.expansion.data.mul_(200)  # or the correction would change nothing
    embed = target.embed_weight.double()
    g = torch.Generator().manual_seed(2)
    z = torch.randn(3, 4, 32, generator=g, dtype=torch.float64)
    anchor = torch.randint(0, 61, (3,), generator=g)
    tokens, logits = drafter.unroll(z, z @ embed.T, embed[anchor], lambda t: embed[t])
    for b in range(3):
        said = [int(anchor[b])]
        for i in range(4):
            want = final_logits(drafter, list(z[b, : i + 1]), embed, embed, said)[-1]
            torch.testing.assert_close(logits[b, i], want)
            said.append(int(want.argmax()))
        assert tokens[b].tolist() == said[1:]
    assert (tokens != (z @ embed.T).argmax(-1)).any()
    chosen, logits = drafter.unroll(z, z @ embed.T, embed[anchor], lambda t: embed[t], lambda i, now: now.argmin(-1))
    assert torch.equal(chosen, logits.argmin(-1)), "what it goes on from is what was chosen"
    for b in range(3):
        said = [int(anchor[b]), *chosen[b, :3].tolist()]
        torch.testing.assert_close(logits[b], torch.stack(final_logits(drafter, list(z[b]), embed, embed, said)))


def test_the_recurrence_stays_in_the_weights_dtype_under_autocast(target: Target) -> None:
    """CUDA's autocast would make it float16, that of some CPUs bfloat16; others leave it alone, so autocast is asked."""
    drafter, on = make_domino(target), []
    drafter.prefix_gru.register_forward_pre_hook(lambda *_: on.append(torch.is_autocast_enabled("cpu")))
    embeds = torch.randn(2, 3, 4, drafter.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        state = drafter.prefix(embeds)
    assert state.dtype == torch.float32 and torch.equal(state, drafter.prefix(embeds)) and not any(on)


def test_the_targets_embeddings_may_be_in_16_bits_and_codes_are_in_the_precision_of_the_pass(target: Target) -> None:
    drafter, everything = make_domino(target), torch.ones(2, 3, 5, dtype=torch.bool)
    said, codes = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16(), []
    z = said.float()
    with torch.autocast("cpu", torch.bfloat16):
        later = Corrected(drafter, Rows(z), said)
    drafter.embed_proj[0].register_forward_hook(lambda _, __, code: codes.append(code.dtype))
    assert Corrected(drafter, Rows(z), said).rows(everything).dtype == later.rows(everything).dtype == torch.float32
    assert codes == [torch.float32, torch.bfloat16]
    embed = target.embed_weight
    wide, narrow = (drafter.unroll(z[0], z[0] @ embed.T, a, lambda _, a=a: a) for a in (z[0, :, 0], said[0, :, 0]))
    assert torch.equal(wide[1], narrow[1])


def test_shifting_moves_the_slots_and_nothing_else(target: Target) -> None:
    drafters = [make_domino(target, shift) for shift in (True, False)]
    assert [d.config.num_predictions for d in drafters] == [4, 4]
    assert [d.config.num_trained for d in drafters] == [5, 4]
    context = drafters[0].context(torch.randn(1, 12, drafters[0].fc.in_features), torch.arange(12)[None])
    embeds, anchors = torch.randn(1, 2, 5, 32), torch.tensor([[4, 9]])
    whole = drafters[0](embeds, anchors, context)
    assert torch.equal(drafters[0].predictions(whole), whole[:, :, :4])
    assert torch.equal(drafters[1].predictions(whole), whole[:, :, 1:])
    for drafter, first in zip(drafters, (0, 1), strict=True):
        pending = drafter.pending(embeds, anchors, context)
        everything = torch.ones(1, 2, drafter.config.num_trained, dtype=torch.bool)
        torch.testing.assert_close(pending.rows(everything), whole[:, :, first:].flatten(0, 2))
        some = everything.clone()
        some[0, 0, 1:] = some[0, 1, 0] = False
        torch.testing.assert_close(pending.rows(some), whole[:, :, first:][some])


def test_the_body_starts_as_the_dflash_drafter_of_the_same_seed(target: Target) -> None:
    domino, plain = make_domino(target, seed=3).state_dict(), DFlash(make_geometry(target), 3).state_dict()
    assert all(torch.equal(domino[name], value) for name, value in plain.items())
    assert set(domino) - set(plain) == {
        "prefix_gru.weight_ih_l0",
        "prefix_gru.weight_hh_l0",
        "embed_proj.0.weight",
        "embed_proj.2.weight",
    }


def test_the_head_begins_as_its_seed_says_and_nothing_else(target: Target) -> None:
    torch.manual_seed(5)
    one = make_domino(target, seed=3).state_dict()
    torch.manual_seed(6)
    two, other = make_domino(target, seed=3).state_dict(), make_domino(target, seed=4).state_dict()
    for name in set(one) - set(DFlash(make_geometry(target)).state_dict()):
        assert torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name]), name
        if "gru" in name:  # as torch's GRU begins
            assert all(0.9 < (sign * one[name]).max() * 7**0.5 <= 1 for sign in (1, -1))
        else:
            assert one[name].std() == pytest.approx(0.02, rel=0.1)


def test_a_pool_closes_the_other_tokens_to_what_is_corrected_alone(target: Target) -> None:
    drafter = make_domino(target, pure=2)
    drafter.expansion.data.mul_(200)
    z = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(3))
    base = z @ target.embed_weight.T
    tokens, logits = drafter.unroll(z, base, target.embed(torch.arange(4)), target.embed, pool=3)
    keep = pool_mask(base, 3)
    assert keep is not None and keep.sum(-1).tolist() == [3] * 4
    assert logits[:, :2].isfinite().all() and torch.equal(logits[:, 2:] == -torch.inf, ~keep[:, None].expand(-1, 2, -1))
    assert torch.equal(tokens, logits.argmax(-1))


def test_a_pool_holds_the_tokens_that_some_slot_prefers() -> None:
    base = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 0.0]])
    assert pool_mask(base, 2).tolist() == [True, True, False, False]  # type: ignore[union-attr]
    assert pool_mask(base, 1).tolist() == [True, False, False, False]  # type: ignore[union-attr]
    assert pool_mask(base, 0) is None and pool_mask(base, 4) is None


def test_round_trip_keeps_every_tensor_of_the_head(target: Target, tmp_path: Path) -> None:
    drafter = make_domino(target, shift=False, pure=2)
    save_drafter(drafter, tmp_path)
    again = load_drafter(tmp_path)
    assert isinstance(again, Domino) and again.config == drafter.config and again.pure == 2
    for (name, a), (other, b) in zip(drafter.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["architectures"] == ["DFlashDraftModel"]  # what SGLang loads
    assert said["dflash_config"]["projector_type"] == "domino"


@pytest.mark.parametrize("name", ["embed_proj.0.weight", "embed_proj.2.weight", "prefix_gru.weight_hh_l0"])
def test_a_lost_or_stray_tensor_of_the_head_is_an_error(target: Target, tmp_path: Path, name: str) -> None:
    save_drafter(make_domino(target), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"missing tensors {name}"):
        load_drafter(tmp_path)
    plain = DFlash(make_geometry(target))
    save_drafter(plain, tmp_path)
    save_file({**plain.state_dict(), name: tensors[name]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"unexpected tensors {name}"):
        load_drafter(tmp_path)


def test_tensors_under_specforges_old_prefix_are_read(target: Target, tmp_path: Path) -> None:
    drafter = make_domino(target)
    save_drafter(drafter, tmp_path)
    old = {
        ("logit_head." if name.startswith(("prefix_gru", "embed_proj")) else "") + name: tensor.clone()
        for name, tensor in drafter.state_dict().items()
    }
    save_file(old, tmp_path / "model.safetensors")
    assert torch.equal(load_drafter(tmp_path).state_dict()["embed_proj.2.weight"], drafter.expansion)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gru_hidden_dim": None}, "'gru_hidden_dim' is missing"),
        ({"emb_dim": None}, "'emb_dim' is missing"),
        ({"shift_label": None}, "'shift_label' is missing"),
        ({"pure_draft_prefix_len": None}, "'pure_draft_prefix_len' is missing"),
        ({"shift_label": 1}, "shift_label must be true or false"),
        ({"emb_dim": 0}, "emb_dim must be a whole number"),
        ({"projector_type": "markov"}, "projector_type 'markov' is not supported"),
        ({"projector_type": None}, "'projector_type' is missing"),
    ],
)
def test_a_wrong_or_missing_field_is_an_error_that_names_it(
    target: Target, change: dict[str, object], message: str
) -> None:
    said = make_domino(target).config.to_json()
    for name, value in change.items():
        if value is None:
            del said["dflash_config"][name]
        else:
            said["dflash_config"][name] = value
    with pytest.raises(ConfigError, match=message):
        DFlashConfig.from_json(said)


def test_sizes_repeated_at_the_top_level_must_agree(target: Target) -> None:
    said = make_domino(target).config.to_json()
    assert DFlashConfig.from_json({**said, "emb_dim": 6, "architectures": ["DominoDraftModel"]}).domino is not None
    with pytest.raises(ConfigError, match="emb_dim is 6 in dflash_config and 8 at the top level"):
        DFlashConfig.from_json({**said, "emb_dim": 8})
    del said["dflash_config"]["projector_type"]
    with pytest.raises(ConfigError, match="'projector_type' is missing"):
        DFlashConfig.from_json({**said, "architectures": ["DominoDraftModel"]})
