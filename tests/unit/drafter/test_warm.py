"""A drafter that begins as copies of the target's layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.conftest import make_geometry, make_target
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    HunYuanDenseV1Config,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
)

from specauf.config import DrafterConfig, RunConfig
from specauf.drafter.dflash import Layer
from specauf.run import new_drafter
from specauf.strict import ConfigError
from specauf.target import Target

WANTED = DrafterConfig(block_size=4, num_hidden_layers=2, num_taps=2, mask_token_id=59, init_layers=(1, 4))
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def config(**changes: object) -> RunConfig:
    return RunConfig(drafter=dataclasses.replace(WANTED, **changes))  # type: ignore[arg-type]


def qwen3() -> Target:
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, rope_theta=1e4))
    for parameter in model.parameters():  # gains of one would hide that they were not copied
        parameter.data.add_(torch.rand_like(parameter) * 0.1)
    return Target(model, None, "tiny-qwen3")


def test_where_the_target_normalises_queries_and_keys_a_copy_writes_its_very_cache() -> None:
    target = qwen3()
    drafter, ids = new_drafter(config(), target), torch.randint(0, 58, (2, 9))
    out = target.model(ids, output_hidden_states=True, use_cache=True)
    positions = torch.arange(9).expand(2, -1)
    for own, number in zip(drafter.layers, (1, 4), strict=True):
        assert isinstance(own, Layer)
        written, before = out.past_key_values.layers[number], out.hidden_states[number]
        found = own.self_attn.context(own.input_layernorm(before), positions)
        torch.testing.assert_close(found.key, written.keys)
        torch.testing.assert_close(found.value, written.values)
        torch.testing.assert_close(own.mlp(before), target.layers[number].mlp(before))
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            gain, theirs = (layer.get_submodule(name).weight for layer in (own, target.layers[number]))
            torch.testing.assert_close(gain, theirs)
    torch.testing.assert_close(drafter.norm(before), target.final_norm(before))
    last = target.layers[4].get_submodule("input_layernorm").weight
    torch.testing.assert_close(drafter.hidden_norm.weight, last, msg="context enters as the last copied layer reads it")
    assert drafter.config.extra == {"init_layers": [1, 4]}


def test_context_begins_as_the_last_tap(target: Target) -> None:
    drafter = new_drafter(config(num_taps=3, init_layers=(0, 5)), target)
    square = drafter.fc.weight[:, -32:]
    assert square.diagonal().mean() > 0.9 and 0 < (square - torch.eye(32)).abs().max() < 0.02
    assert 0 < drafter.fc.weight[:, :-32].abs().max() < 0.02, "the other taps begin small, not dead"


def test_without_norms_of_queries_and_keys_their_scale_is_the_targets() -> None:
    target = make_target(scale=2.0)  # at the usual 3.0 it is 1, and so is its square
    drafter, layer = new_drafter(config(), target), target.layers[4]
    x = layer.input_layernorm(torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)))
    for side in ("q", "k"):
        gain = drafter.get_parameter(f"layers.1.self_attn.{side}_norm.weight")
        assert (gain == gain[0]).all()
        scale = layer.get_submodule(f"self_attn.{side}_proj")(x).square().mean().sqrt()
        torch.testing.assert_close(gain[0], scale, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_mlp_is_one_in_the_targets_precision_too(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    target = qwen3()
    target.model.to(dtype)
    new_drafter(config(), Target(target.model, None, "tiny-qwen3"))
    assert "activation" not in caplog.text


def test_a_gain_that_is_stored_less_one_is_read_as_it_works(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(4)
    model = GemmaForCausalLM(GemmaConfig(**SHAPE, pad_token_id=None, bos_token_id=None, eos_token_id=60))
    model.model.norm.weight.data.uniform_(-0.5, 0.5)
    drafter = new_drafter(config(), Target(model, None, "tiny-gemma"))
    assert "layer 1 of the target has another activation: its MLP is no copy" in caplog.text
    torch.testing.assert_close(drafter.norm.weight, 1 + model.model.norm.weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"init_layers": (1, 6)}, "layers 0 to 5, not 6"),
        ({"intermediate_size": 8}, r"layer 1 of the target has \(64, 32\) for mlp.gate_proj.weight, .* \(8, 32\)"),
    ],
)
def test_what_cannot_be_copied_is_said(target: Target, change: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        new_drafter(config(**change), target)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Qwen2Config, "has self_attn.q_proj.bias, the drafter none"),
        (HunYuanDenseV1Config, "has self_attn.key_layernorm.weight, the drafter none"),
        (StableLmConfig, "LayerNorm of the target is no RMSNorm"),
        (CohereConfig, "CohereLayerNorm of the target is no RMSNorm"),
        (Phi3Config, "layer 1 of the target has none for self_attn.q_proj.weight, the drafter needs"),
        (Olmo2Config, "layer 1 of the target has post_feedforward_layernorm.weight, its norms stand elsewhere"),
        (Gemma2Config, "has pre_feedforward_layernorm.weight, its norms stand elsewhere"),
    ],
)
def test_layers_of_another_make_are_refused(kind: type, told: str) -> None:
    model = AutoModelForCausalLM.from_config(kind(**SHAPE, pad_token_id=None, bos_token_id=None, eos_token_id=60))
    for parameter in model.parameters():
        parameter.data.add_(0.01)  # a bias of zero shows nothing
    with pytest.raises(ConfigError, match=told):
        new_drafter(config(), Target(model, None, "tiny"))


def test_a_target_without_a_width_asks_for_it() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=61, n_positions=64))
    with pytest.raises(ConfigError, match=r"\(GPT2Config\) has no intermediate_size: give drafter.intermediate_size"):
        make_geometry(Target(model, None, "tiny-gpt2"))


@pytest.mark.parametrize("change", [{"init_layers": (1,)}, {"init_from": "somewhere"}])
def test_contradictions_are_refused_before_a_model_loads(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="init_layers"):
        config(**change)
