"""`specauf export --layout speculators` beside speculators' own converter of the same drafter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from speculators import SpeculatorModel
from speculators.convert.entrypoints import convert_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from specauf.drafter.checkpoint import build_drafter, load_drafter, save_drafter
from specauf.drafter.config import DFlashConfig
from specauf.export import export


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4))
    path = tmp_path_factory.mktemp("verifier")
    model.save_pretrained(path)
    return path


def test_ours_is_what_their_converter_makes(verifier: Path, tmp_path: Path) -> None:
    target = Qwen3Config.from_pretrained(verifier)
    geometry = DFlashConfig.for_target(target, block_size=5, num_hidden_layers=2, mask_token_id=59, num_taps=3)
    save_drafter(build_drafter(geometry, seed=3), tmp_path / "drafter")
    convert_model(str(tmp_path / "drafter"), str(verifier), "dflash", str(tmp_path / "theirs"))
    export(tmp_path / "drafter", tmp_path / "ours", layout="speculators", dtype="float32", base_model=str(verifier))

    ours, theirs = (SpeculatorModel.from_pretrained(str(tmp_path / name)) for name in ("ours", "theirs"))
    said = [model.config.to_dict() for model in (ours, theirs)]
    for config in said:
        config.pop("_name_or_path")
        config.pop("auto_map", None)  # their module beside the weights, which nothing that loads ours needs
        config["speculators_config"]["verifier"].pop("architectures")  # ours names the target alone
        for own in (config, config["transformer_layer_config"]):
            own.pop("specauf", None)
    assert said[0] == said[1]
    drafter = load_drafter(tmp_path / "drafter").state_dict()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    assert drafter.keys() <= ours.state_dict().keys()
