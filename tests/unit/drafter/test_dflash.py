"""The drafter against a per-block reference, its leak-freedom, and its checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_geometry

from specauf.drafter.checkpoint import load_drafter, save_drafter
from specauf.drafter.config import DFlashConfig, spread_layer_ids
from specauf.drafter.dflash import DFlash, RMSNorm, rotate
from specauf.strict import ConfigError, UserError
from specauf.target import Target


def outputs(drafter: DFlash, target: Target, features: torch.Tensor, anchor: int) -> torch.Tensor:
    positions = torch.arange(features.shape[1])[None]
    embeds = target.embed(torch.tensor([[[3] + [59] * (drafter.config.block_size - 1)]]))
    return drafter(embeds, torch.tensor([[anchor]]), drafter.context(features, positions))


def test_the_anchors_own_feature_is_invisible_and_the_one_before_is_not(target: Target) -> None:
    drafter = DFlash(make_geometry(target))
    features = torch.randn(1, 12, drafter.fc.in_features)
    base = outputs(drafter, target, features, 6)
    for position in range(12):
        poked = features.clone()
        poked[0, position] += 1
        same = torch.equal(outputs(drafter, target, poked, 6), base)
        assert same == (position >= 6), position


def normed(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def turned(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """One head's vector: its first half against its second, as complex numbers."""
    half = len(x) // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:half], x[half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([z.real, z.imag])


def block_by_hand(drafter: DFlash, embeds: torch.Tensor, features: torch.Tensor, anchor: int) -> torch.Tensor:
    """One block of one sequence, slot by slot and head by head, from the weights by their names."""
    c, w = drafter.config, drafter.state_dict()
    eps, heads, group = c.rms_norm_eps, c.num_attention_heads, c.num_attention_heads // c.num_key_value_heads
    context = [normed(w["fc.weight"] @ f, w["hidden_norm.weight"], eps) for f in features[:anchor]]
    slots = list(embeds)
    for number in range(c.num_hidden_layers):
        at = f"layers.{number}."

        def project(side: str, x: torch.Tensor, head: int, at: str = at) -> torch.Tensor:
            return (w[f"{at}self_attn.{side}_proj.weight"] @ x).view(-1, c.head_dim)[head]

        def place(side: str, x: torch.Tensor, head: int, position: int, at: str = at) -> torch.Tensor:
            gain = w[f"{at}self_attn.{side}_norm.weight"]
            return turned(normed(project(side, x, head), gain, eps), position, c.rope_theta)

        rows = [normed(x, w[f"{at}input_layernorm.weight"], eps) for x in slots]
        seen = [*enumerate(context), *enumerate(rows, anchor)]
        after = []
        for i, x in enumerate(slots):
            found = []
            for head in range(heads):
                query = place("q", rows[i], head, anchor + i)
                scores = [query @ place("k", x, head // group, p) / c.head_dim**0.5 for p, x in seen]
                values = torch.stack([project("v", x, head // group) for _, x in seen])
                found.append(torch.stack(scores).softmax(0) @ values)
            x = x + w[f"{at}self_attn.o_proj.weight"] @ torch.cat(found)
            y = normed(x, w[f"{at}post_attention_layernorm.weight"], eps)
            gate, up = (w[f"{at}mlp.{side}_proj.weight"] @ y for side in ("gate", "up"))
            after.append(x + w[f"{at}mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up))
        slots = after
    return torch.stack([normed(x, w["norm.weight"], eps) for x in slots])


@pytest.mark.parametrize("anchor", [0, 1, 6, 9])
def test_a_block_is_the_one_worked_out_by_hand(target: Target, anchor: int) -> None:
    """Weights large enough for attention to choose, gains apart from one, a norm's eps that shows, a base that turns."""
    g = torch.Generator().manual_seed(anchor)
    geometry = dataclasses.replace(make_geometry(target), rms_norm_eps=0.03, rope_theta=30.0, initializer_range=0.15)
    drafter = DFlash(geometry, seed=1).double()
    for parameter in drafter.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5, generator=g)
    features = torch.randn(1, 9, drafter.fc.in_features, generator=g, dtype=torch.float64)
    embeds = torch.randn(1, 1, 5, 32, generator=g, dtype=torch.float64)
    found = drafter(embeds, torch.tensor([[anchor]]), drafter.context(features, torch.arange(9)[None]))
    want = block_by_hand(drafter, embeds[0, 0], features[0], anchor)
    torch.testing.assert_close(found[0, 0], want, rtol=1e-4, atol=1e-5)  # the norms work in float32


def test_norms_and_rotations_are_worked_out_in_float32_whatever_comes_in() -> None:
    x = 300 * torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0)).half()  # squares beyond float16
    norm = RMSNorm(16, eps=1e-6).half()
    torch.testing.assert_close(norm(x), norm.float()(x.float()).half())
    far = torch.arange(1000, 1050).expand(2, -1)  # no number of bfloat16 lies between 1000 and 1004
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    torch.testing.assert_close(rotate(unit.bfloat16(), far, 1e4).float(), rotate(unit, far, 1e4), rtol=0.02, atol=0.02)


def test_a_norm_in_float32_is_one_call_and_in_16_bits_rounds_before_its_gain() -> None:
    norm = RMSNorm(64, eps=1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    plain = torch.nn.functional.rms_norm(x, (64,), None, 1e-6)
    assert torch.equal(norm(x), plain * norm.weight)
    narrow = x.bfloat16()
    rounded = torch.nn.functional.rms_norm(narrow.float(), (64,), None, 1e-6).bfloat16()
    assert torch.equal(norm(narrow), rounded * norm.weight)


def test_blocks_of_a_sequence_do_not_see_each_other(target: Target) -> None:
    drafter = DFlash(make_geometry(target))
    context = drafter.context(torch.randn(1, 12, drafter.fc.in_features), torch.arange(12)[None])
    embeds = torch.randn(1, 3, drafter.config.block_size, 32)
    anchors = torch.tensor([[4, 5, 9]])
    together = drafter(embeds, anchors, context)
    for j in range(3):
        torch.testing.assert_close(
            drafter(embeds[:, j : j + 1], anchors[:, j : j + 1], context), together[:, j : j + 1]
        )


def test_same_seed_same_weights(target: Target) -> None:
    geometry = make_geometry(target)
    one, two, other = (
        DFlash(geometry, 3).state_dict(),
        DFlash(geometry, 3).state_dict(),
        DFlash(geometry, 4).state_dict(),
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])
    for tensor in one.values():  # a norm begins as none
        assert (
            tensor.std() == pytest.approx(geometry.initializer_range, rel=0.1)
            if tensor.ndim == 2
            else (tensor == 1).all()
        )


def test_layer_ids_match_published_checkpoints() -> None:
    assert spread_layer_ids(36, 5) == (1, 9, 17, 25, 33)  # the paper's Qwen3-8B
    assert spread_layer_ids(28, 5) == (1, 7, 13, 19, 25)
    assert spread_layer_ids(24, 5) == (1, 6, 11, 16, 21)
    assert spread_layer_ids(36, 1) == (18,)
    assert spread_layer_ids(30, 5) == (1, 8, 14, 20, 27), "7.5 and 20.5 go to the even neighbour, as Python rounds"
    with pytest.raises(ConfigError, match=r"5 taps do not fit .* set drafter\.num_taps"):
        spread_layer_ids(6, 5)


def test_checkpoint_round_trip_keeps_every_tensor_and_field(target: Target, tmp_path: Path) -> None:
    drafter = DFlash(make_geometry(target), seed=5)
    save_drafter(drafter, tmp_path, {"objective": "auf"})
    again = load_drafter(tmp_path)
    assert again.config.extra == {"objective": "auf"}
    assert DFlashConfig.from_json(again.config.to_json()) == again.config
    for (name, a), (other, c) in zip(drafter.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, c)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "layers.0.self_attn.q_proj.weight" in names and "fc.weight" in names
    assert not any("embed_tokens" in n or "lm_head" in n or n.startswith("model.") for n in names)


DATA, MADE_FROM = {"path": "x", "conversations": 3, "max_length": 9}, {"path": "x", "weights": "0"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "only the default rotary embedding"),
        ({"input_embedding_scale": 50.6}, "input_embedding_scale=50.6 is not supported"),
        ({"dflash_config": {"causal": True}}, "causal=True is not supported"),
        ({"dflash_config": {"shift_label": True}}, "shift_label=True is not supported"),
        ({"dflash_config": {"sample_from_anchor": True}}, "sample_from_anchor=True is not supported"),
        ({"output_multiplier": 0.5}, "output_multiplier=0.5 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "only the default rotary embedding"),
        ({"dflash_config": {"block_size": 7}}, "block_size is 7 in dflash_config and 5 at the top level"),
        ({"block_size": 5.5}, "block_size is 5.5, which is no such number"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"dflash_config": {"target_layer_ids": 3}}, "target_layer_ids is 3, which is no list of layers"),
        ({"speculators_model_type": "dflash"}, "in speculators' layout"),
        ({"rope_parameters": "default"}, "rope_parameters and rope_scaling are mappings"),
        ({"layer_types": 3}, "architectures and layer_types are lists"),
        ({"architectures": 3}, "architectures and layer_types are lists"),
        ({"architectures": [["DFlashDraftModel"]]}, "architectures and layer_types are lists of names"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": ["default"]}}, "only the default rotary embedding"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, which is no such number"),
        ({"initializer_range": -1}, "initializer_range is -1, which is no such number"),
        ({"intermediate_size": 10**30}, "intermediate_size is 10+, which is no such number"),
        ({"specauf": {"data": [1]}}, "specauf.data is a mapping"),
        ({"specauf": {"target": 3}}, "specauf.target is 3, which says nothing"),
        ({"specauf": {"data": {"path": "x", "conversations": 3}}}, "specauf.data.max_length is None"),
        ({"specauf": {"data": {**DATA, "kept_out": [1]}}}, "kept_out is .1., which is no list of names"),
        ({"specauf": {"data": {**DATA, "rollouts": {"samples": 1}}}}, "rollouts.temperature is None"),
        ({"specauf": {"init_from": "x"}}, "specauf.init_from or averaged_with is a mapping"),
        ({"specauf": {"init_from": {"path": "x"}}}, "averaged_with.weights is None"),
        ({"specauf": {"averaged_with": [{**MADE_FROM, "trained": {"data": 3}}]}}, "specauf.data is a mapping, got 3"),
    ],
)
def test_a_configuration_that_would_run_wrong_is_refused(target: Target, change: dict[str, Any], told: str) -> None:
    shipped = make_geometry(target).to_json()
    nested = {**shipped.get("dflash_config", {}), **change.pop("dflash_config", {})}
    with pytest.raises(ConfigError, match=told):
        DFlashConfig.from_json({**shipped, **change, "dflash_config": nested})


def test_a_field_that_is_null_counts_as_absent(target: Target) -> None:
    shipped = make_geometry(target).to_json()
    nested = shipped["dflash_config"]
    empty = {
        "mask_token_id": None,
        "initializer_range": None,
        "rope_parameters": {**shipped["rope_parameters"], "partial_rotary_factor": None},
    }
    assert DFlashConfig.from_json({**shipped, **empty}).mask_token_id == nested["mask_token_id"]


def test_missing_and_unexpected_tensors_are_errors_that_name_them(target: Target, tmp_path: Path) -> None:
    save_drafter(DFlash(make_geometry(target)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing tensors norm\.weight"):
        load_drafter(tmp_path)
    save_file({**tensors, "lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected tensors lm_head\.weight"):
        load_drafter(tmp_path)
    for other in (torch.int64, torch.complex64):  # the first was a traceback, the second was taken
        save_file({**tensors, "norm.weight": tensors["norm.weight"].to(other)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"mistyped tensors norm\.weight"):
            load_drafter(tmp_path)


def test_what_no_machine_could_build_or_parse_is_refused_at_once(target: Target, tmp_path: Path) -> None:
    config = json.loads((save_drafter(DFlash(make_geometry(target)), tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**4}))
    with pytest.raises(UserError, match="tensors, too few for 10000 layers"):
        load_drafter(tmp_path)
    (tmp_path / "config.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match="is not a drafter checkpoint: maximum recursion"):
        load_drafter(tmp_path)


def test_a_checkpoint_that_is_elsewhere_or_cannot_be_read_is_said(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_drafter(DFlash(make_geometry(target)), tmp_path / "checkpoint")
    with pytest.raises(UserError, match=f"config.json is missing: give {path}"):
        load_drafter(tmp_path)

    def unreadable(*given: Any, **options: Any) -> None:
        raise FileNotFoundError("No such file or directory")  # safetensors' own, without a number

    monkeypatch.setattr("specauf.drafter.checkpoint.load_file", unreadable)
    with pytest.raises(UserError, match="checkpoint cannot be read"):
        load_drafter(path)


@pytest.mark.parametrize(
    "name", ["target_layer_ids", "mask_token_id", "block_size", "num_target_layers", "hidden_size"]
)
def test_a_missing_field_is_an_error_that_names_it(target: Target, tmp_path: Path, name: str) -> None:
    save_drafter(DFlash(make_geometry(target)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop(name, None)
    config["dflash_config"].pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=name):
        load_drafter(tmp_path)


@pytest.mark.parametrize(
    "change", [{"dflash_config": None}, {"specauf": None}, {"hidden_size": "576"}, {"num_attention_heads": 0}, None]
)
def test_a_configuration_of_something_else_is_refused(target: Target, change: dict[str, Any] | None) -> None:
    data: Any = make_geometry(target).to_json() | change if change is not None else [1]
    with pytest.raises(ConfigError, match=r"config\.json"):
        DFlashConfig.from_json(data)


def test_the_rotary_base_is_that_of_full_attention(target: Target) -> None:
    config = copy.deepcopy(target.config)
    full, near = ({"rope_type": "default", "rope_theta": theta} for theta in (5e5, 1e4))
    config.rope_parameters = {"full_attention": full, "sliding_attention": near}
    assert (
        DFlashConfig.for_target(config, block_size=4, num_hidden_layers=1, mask_token_id=1, num_taps=2).rope_theta
        == 5e5
    )


def test_the_last_layer_cannot_be_tapped(target: Target) -> None:
    with pytest.raises(ConfigError, match="target_layer_ids"):
        DFlashConfig.for_target(
            target.config, block_size=4, num_hidden_layers=1, mask_token_id=3, target_layer_ids=(1, 5)
        )


@pytest.mark.parametrize("ids", [(3, 1), (1, 1, 3)])
def test_taps_out_of_order_are_refused_as_engines_would_sort_them(target: Target, ids: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="ascending"):
        DFlashConfig.for_target(target.config, block_size=4, num_hidden_layers=1, mask_token_id=3, target_layer_ids=ids)


def test_rows_that_are_asked_for_later_are_computed_in_the_precision_of_the_pass(target: Target) -> None:
    drafter, anchors = DFlash(make_geometry(target)), torch.tensor([[6]])
    features, positions = torch.randn(1, 12, drafter.fc.in_features), torch.arange(12)[None]
    everything = torch.ones(1, 1, drafter.config.num_predictions, dtype=torch.bool)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            embeds = target.embed(torch.tensor([[[3] + [59] * (drafter.config.block_size - 1)]]))
            pending = drafter.pending(embeds, anchors, drafter.context(features, positions))
        seen: list[torch.dtype] = []
        hook = pending.layer.mlp.down_proj.register_forward_hook(lambda _, __, out, to=seen: to.append(out.dtype))
        pending.rows(everything)
        hook.remove()
        assert seen == [dtype]


def test_pending_rows_are_the_whole_forwards_rows_with_the_same_gradients(target: Target) -> None:
    """Whatever slots are asked for, in whatever stages: the last layer's query side for them alone."""
    g = torch.Generator().manual_seed(5)
    drafter = DFlash(make_geometry(target, layers=2)).double()
    b, n, slots, h = 3, 4, 5, target.config.hidden_size
    anchors = torch.tensor([[2, 5, 9, 0], [1, 1, 0, 0], [3, 8, 11, 12]])
    features = torch.randn(b, 14, drafter.fc.in_features, generator=g).double()
    embeds = torch.randn(b, n, slots, h, generator=g).double()
    context = drafter.context(features, torch.arange(14).expand(b, -1))
    whole = drafter(embeds, anchors, context)[:, :, 1:]
    stages = [torch.rand(b, n, slots - 1, generator=g) < share for share in (0.9, 0.3, 0.05, 0.0)]
    stages.append(torch.zeros(b, n, slots - 1).bool())
    stages[-1][1, 2, 1] = True
    wanted = sum((whole[todo] ** 2).sum() for todo in stages)
    want = torch.autograd.grad(wanted, list(drafter.parameters()), retain_graph=True)
    pending = drafter.pending(embeds, anchors, context)
    asked: list[torch.Size] = []
    pending.layer.self_attn.q_proj.register_forward_hook(lambda _, given, __: asked.append(given[0].shape[:2]))
    rows = [pending.rows(todo) for todo in stages]
    assert asked[-1] == (b, 1), "one slot of one block, and its row's place in the other sequences"
    for todo, found in zip(stages, rows, strict=True):
        torch.testing.assert_close(found, whole[todo], rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(sum((r**2).sum() for r in rows), list(drafter.parameters()))
    for a, w in zip(got, want, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-5)  # the norms work in float32
