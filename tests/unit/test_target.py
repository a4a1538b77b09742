"""The target lends views, taps what Hugging Face calls hidden_states[l + 1], and can be told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
)

from specauf.config import TargetConfig
from specauf.strict import ConfigError, UserError
from specauf.target import Target, load_tokenizer
from specauf.train.distributed import _forget_groups
from tests.conftest import make_target


def test_taps_are_hidden_states_l_plus_1(target: Target) -> None:
    ids = torch.randint(0, 58, (2, 9))
    want = target.model(ids, output_hidden_states=True)
    got = target.run(ids, (1, 4))
    torch.testing.assert_close(got.features, torch.cat([want.hidden_states[2], want.hidden_states[5]], -1))
    torch.testing.assert_close(target.logits(got.final), want.logits)


def test_padding_on_the_right_changes_no_feature(target: Target) -> None:
    ids = torch.randint(0, 58, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 5).long()], 1)
    torch.testing.assert_close(target.run(padded, (1, 3)).features[:, :9], target.run(ids, (1, 3)).features)


def test_embedding_and_head_are_views_and_frozen(target: Target) -> None:
    assert target.embed_weight.data_ptr() == target.model.get_input_embeddings().weight.data_ptr()
    assert target.head_weight.data_ptr() == target.embed_weight.data_ptr()
    assert not any(p.requires_grad for p in target.model.parameters())


def test_fingerprint_tells_targets_apart_and_is_stable() -> None:
    one, two, other = make_target(seed=0), make_target(seed=0), make_target(seed=0)
    assert one.fingerprint() == one.fingerprint() == two.fingerprint()
    other.model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint() != make_target(seed=1).fingerprint()


def test_a_model_that_scales_its_logits_is_refused() -> None:
    target = make_target()
    target.embed_weight.data[0] = 0  # as transformers leaves a pad token's row
    target.require_own_logits()
    forward = target.model.forward

    def scaled(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.logits = out.logits / 8
        return out

    target.model.forward = scaled
    with pytest.raises(UserError, match="a scale, perhaps"):
        target.require_own_logits()


SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}


def test_a_soft_cap_is_one_under_any_name() -> None:
    """Low logits are hardly capped: what `require_own_logits` would let pass is not the model's distribution."""
    torch.manual_seed(0)
    blocks = {"block_types": ["recurrent", "attention"], "lru_width": 32, "num_key_value_heads": 1}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SHAPE, **blocks, num_hidden_layers=4)).eval()
    model.lm_head.weight.data.normal_(0, 0.5)
    target, ids = Target(model, None, "capped"), torch.randint(1, 61, (1, 9))
    assert target.softcap == model.config.logits_soft_cap == 30
    torch.testing.assert_close(target.logits(target.run(ids).final), model(ids).logits)
    del model.config.tie_word_embeddings  # as Inkling's has none
    assert Target(model, None, "untold").num_layers == 4


@pytest.mark.parametrize("both_ways", [False, True])
def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path: Path, tokenizer: Any, both_ways: bool) -> None:
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_key_value_heads": 2}
    config = Gemma3TextConfig(**shape, use_bidirectional_attention=both_ways)  # as an embedding model's says
    model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():  # so that attention matters
        parameter.data.mul_(3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if not both_ways:
        assert Target.load(TargetConfig(path=str(tmp_path))).num_layers == 2
        return
    with pytest.raises(UserError, match="in Gemma3ForCausalLM a token sees later ones"):
        Target.load(TargetConfig(path=str(tmp_path)))


def test_layers_that_put_out_several_states_cannot_be_tapped() -> None:
    """A tap would have them where the batch is expected, and a row's features would be another row's."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3nTextConfig(
        **SHAPE, num_hidden_layers=4, num_key_value_heads=2, num_kv_shared_layers=0, layer_types=kinds, laurel_rank=8,
        vocab_size_per_layer_input=61, hidden_size_per_layer_input=8, activation_sparsity_pattern=None, pad_token_id=0,
    )  # fmt: skip
    target = Target(Gemma3nForCausalLM(config), None, "many")
    assert target.run(torch.arange(6)[None]).final.shape == (1, 6, 32)
    with pytest.raises(UserError, match="many: layers of Gemma3nTextModel put out more than a state per token"):
        target.run(torch.arange(6)[None], (1,))


def test_a_body_under_another_name_and_layers_that_put_out_lists_are_tapped() -> None:
    """Llama 4's class names a prefix that its body does not have; the first GPT's layers return lists."""
    narrow = {"num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size_mlp": 48, "num_local_experts": 2}
    old = OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    ids = torch.randint(0, 58, (2, 9))
    for model in (Llama4ForCausalLM(Llama4TextConfig(**SHAPE | narrow, pad_token_id=0)), OpenAIGPTLMHeadModel(old)):
        target = Target(model, None, "elsewhere")
        want, got = model(ids, output_hidden_states=True), target.run(ids, (0, 2))
        torch.testing.assert_close(got.features, torch.cat([want.hidden_states[1], want.hidden_states[3]], -1))
        torch.testing.assert_close(target.logits(got.final), want.logits)


def test_a_computed_table_of_positions_ends_too() -> None:
    config = GPTJConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=24, bos_token_id=60)
    target = Target(GPTJForCausalLM(config), None, "computed")
    target.run(torch.ones(1, 24, dtype=torch.long))
    with pytest.raises(UserError, match="computed reaches 24 positions here, and this takes 25"):
        target.run(torch.ones(1, 25, dtype=torch.long))


def test_text_ends_where_a_cache_would_change_what_is_forgotten() -> None:
    torch.manual_seed(0)
    config = DogeConfig(**SHAPE, num_hidden_layers=3, num_key_value_heads=2, keep_window_size=10, pad_token_id=0)
    model = DogeForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    ids, beyond = torch.randint(1, 61, (1, 10)), torch.randint(1, 61, (1, 20))

    target = Target(model, None, "forgetful")

    def both(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last state after all at once, and after the others are in the cache."""
        cache = DynamicCache()
        target.run(ids[:, :-1], cache=cache)
        return target.run(ids, cache=DynamicCache()).final[:, -1], target.run(ids[:, -1:], cache=cache).final[:, -1]

    assert torch.allclose(*both(ids), atol=1e-3) and not torch.allclose(*both(beyond), atol=1e-2)
    assert target.reach == 10


def test_a_cache_has_the_name_that_the_model_knows() -> None:
    """Newer models would take the old one among their further arguments, and decode without a cache."""
    seen: list[object] = []

    class Renamed(LlamaModel):
        def forward(self, input_ids: torch.Tensor, cache: object = None, **further: object) -> object:
            seen.append(cache)
            return super().forward(input_ids, **further)

    model, cache = make_target().model, DynamicCache()
    model.model.__class__ = Renamed
    Target(model, None, "renamed").run(torch.ones(1, 3, dtype=torch.long), cache=cache)
    assert seen == [cache]


def test_the_last_layer_is_refused(target: Target) -> None:
    with pytest.raises(ConfigError, match="last"):
        target.run(torch.zeros(1, 3).long(), (1, 5))


def test_a_path_that_is_no_model_is_a_clear_error(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="no such directory"):
        Target.load(TargetConfig(path=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="cannot load"):
        Target.load(TargetConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"target\.device: 'gpu' cannot be used here"):
        Target.load(TargetConfig(path=str(tmp_path), device="gpu"))


def test_a_half_downloaded_or_a_multimodal_model_is_a_clear_error(tmp_path: Path) -> None:
    target = make_target()
    target.model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot load"):
        Target.load(TargetConfig(path=str(tmp_path)))
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"as a causal LM: Unrecognized configuration class .*T5Config.*ForCausalLM\.$"):
        Target.load(TargetConfig(path=str(tmp_path)))
    model = make_target().model
    model.config = PretrainedConfig()
    with pytest.raises(UserError, match="is no plain causal LM"):
        Target(model, None, "many")


def test_a_model_with_tensors_missing_is_refused(tmp_path: Path) -> None:
    make_target().model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.3.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 of the model's tensors .*{gone}"):
        Target.load(TargetConfig(path=str(tmp_path)))


@pytest.mark.parametrize("key", ["hidden_size", "dtype"])
def test_a_configuration_of_wrong_types_is_a_clear_error(tmp_path: Path, key: str) -> None:
    make_target().model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "float99"}))
    with pytest.raises(UserError, match="cannot load"):
        Target.load(TargetConfig(path=str(tmp_path)))


def test_a_head_of_another_width_is_refused() -> None:
    config = OPTConfig(
        **{"vocab_size": 61, "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2},
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    with pytest.raises(UserError, match="16, 16 and 32 wide"):
        Target(OPTForCausalLM(config), None, "narrow")


def test_a_tokenizer_may_have_several_named_templates(make_tokenizer: Any) -> None:
    target, tokenizer = make_target(), make_tokenizer()
    target.tokenizer = tokenizer
    one = target.fingerprint()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "<|tool|>"}
    again = make_target()
    again.tokenizer = tokenizer
    assert again.fingerprint() != one
    assert "<|tool|>" in again._templates()


def test_the_fingerprint_does_not_depend_on_a_call_of_the_tokenizer(make_tokenizer: Any) -> None:
    found = []
    for call in (False, True):
        target, tokenizer = make_target(), make_tokenizer()
        tokenizer.backend_tokenizer.enable_truncation(5)
        if call:
            tokenizer("a b c d e f g h")
            assert tokenizer.backend_tokenizer.truncation is None, "the call resets it, or this shows nothing"
        target.tokenizer = tokenizer
        found.append(target.fingerprint())
    assert found[0] == found[1]


def test_mask_is_a_row_of_the_embedding_that_text_never_uses(
    make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is given, the tokenizer's own, the first beyond the tokenizer, or a special token that nothing uses."""
    tokenizer = make_tokenizer()
    rows = len(tokenizer)

    def target(vocab: int) -> Target:
        made = make_target(vocab=vocab)
        made.tokenizer, made.model.config.eos_token_id = tokenizer, tokenizer.eos_token_id
        made.model.generation_config.eos_token_id = tokenizer.eos_token_id
        return made

    assert (target(rows + 8).mask_token_id(3), target(rows + 8).mask_token_id()) == (3, rows)
    with pytest.raises(ConfigError, match=f"{rows + 8} is not a row of the embedding"):
        target(rows + 8).mask_token_id(rows + 8)
    with pytest.raises(ConfigError, match="no unused embedding row"):
        target(rows).mask_token_id()  # both special tokens are the template's
    with pytest.raises(ConfigError, match="must be given"):
        make_target().mask_token_id()
    with monkeypatch.context() as patch:  # ids with a gap: their number is one of them
        patch.setattr(type(tokenizer), "get_vocab", lambda _: {"a": 0, "b": rows + 1})
        assert target(rows + 8).mask_token_id() == rows + 2
    tokenizer.add_tokens(["<|spare|>", "<|other|>"], special_tokens=True)
    assert target(rows + 2).mask_token_id() == rows + 1
    tokenizer.chat_template += "<|other|>"
    assert target(rows + 2).mask_token_id() == rows
    tokenizer.mask_token = "<|im_start|>"
    assert target(rows + 8).mask_token_id() == tokenizer.mask_token_id < rows


def test_spread_layers_have_one_root_and_the_rest_stays_whole(tmp_path: Path) -> None:
    """Layers that are roots of their own would each be gathered only when the layer before them is done."""
    target, ids = make_target(), torch.arange(12)[None]
    before = target.run(ids, (1, 3))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        target.shard()
        after = target.run(ids, (1, 3))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not any(layer._get_fsdp_state()._is_root for layer in target.layers)  # type: ignore[operator]
        assert type(target.embed_weight) is type(target.body.norm.weight) is torch.nn.Parameter  # type: ignore[union-attr]
        assert target.layers[0].get_parameter("mlp.up_proj.weight").device_mesh is not None  # type: ignore[attr-defined]
    finally:
        distributed.destroy_process_group()
        _forget_groups()


def test_a_target_that_does_not_fit_is_told_apart_from_a_step_that_does_not(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_target(vocab=len(tokenizer) + 8).model
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def full(self: torch.nn.Module, device: str) -> torch.nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model), "to", full)
    with pytest.raises(UserError, match=r"does not fit on cpu \(CUDA out of memory\): set a target.dtype of 16 bits"):
        Target.load(TargetConfig(path=str(tmp_path)))


def test_a_target_to_shard_never_stands_whole_on_its_device(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`meta` stands for a GPU: what goes there is seen, and nothing runs."""
    model = make_target(vocab=len(tokenizer) + 8).model
    model.lm_head.weight, model.config.tie_word_embeddings = torch.nn.Parameter(model.lm_head.weight.clone()), False
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    seen, checked = [], []

    def shard(part: torch.nn.Module, *, mesh: str, **_: object) -> None:
        seen.append([layer.get_parameter("mlp.up_proj.weight").is_meta for layer in target.layers])
        part.to(mesh)

    monkeypatch.setattr("specauf.target.fully_shard", shard)
    monkeypatch.setattr("specauf.target.init_device_mesh", lambda kind, sizes: kind)
    monkeypatch.setattr("specauf.target.get_world_size", lambda: 8)
    for check in ("require_own_logits", "require_causal"):
        monkeypatch.setattr(Target, check, lambda self, check=check: checked.append(check))
    target = Target.load(TargetConfig(path=str(tmp_path), device="meta"), to_shard=True)
    outside = (target.embed_weight, target.head_weight, target.final_norm.weight, *target.body.rotary_emb.buffers())  # type: ignore[union-attr]
    assert target.device.type == "meta" and all(t.is_meta for t in outside) and not checked
    target.fingerprint = lambda: ""  # type: ignore[method-assign]  # meta has no numbers
    target.shard()
    count = target.num_layers
    assert seen == [[True] * i + [False] * (count - i) for i in range(count + 1)]
    assert checked == ["require_own_logits", "require_causal"]


def test_text_beyond_what_the_target_was_made_for_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Plain rotary positions go on; the text may be poor there."""
    small = make_target()
    assert small.reach is None and small.config.max_position_embeddings == 512
    small.require_reach(512, "")
    assert not caplog.records
    small.require_reach(600, "")
    small.require_reach(700, "")
    assert [r.getMessage() for r in caplog.records] == [
        "tiny was made for 512 positions, and this takes up to 600: beyond those its text may be poor"
    ]


def test_offline_looks_for_a_target_on_disk_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[object] = []

    def looks(path: str, **options: object) -> None:
        asked.append(options["local_files_only"])
        raise OSError("not here")

    for kind in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", looks)
    for offline, told in (("1", "SPECAUF_OFFLINE forbids fetching it: unset it once"), ("0", "not here")):
        monkeypatch.setenv("SPECAUF_OFFLINE", offline)
        for load in (load_tokenizer, Target.load):
            with pytest.raises(UserError, match=told):
                load(TargetConfig(path="nope/none"))
    assert asked == [True, True, False, False]


def test_a_tokenizer_is_not_mistral_common_s_which_has_neither_template_nor_offsets(
    tmp_path: Path, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers prefers it where it is installed, as it is beside vLLM, and the target has a tekken.json."""
    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(tmp_path)
    load, asked = AutoTokenizer.from_pretrained, []
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda path, **options: asked.append(options) or load(path, **options)
    )
    assert load_tokenizer(TargetConfig(path=str(tmp_path))).is_fast
    assert asked[0]["mistral_format"] is False
