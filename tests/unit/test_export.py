"""What an exported drafter is, says, and refuses to be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from specauf.drafter.checkpoint import build_drafter, fingerprint, load_drafter, save_drafter
from specauf.drafter.config import DominoHead
from specauf.drafter.vocabulary import keep_tokens
from specauf.export import export
from specauf.strict import ConfigError, UserError
from specauf.target import Target
from tests.conftest import make_geometry

TRAINED = {"objective": "auf", "reduction": "global", "labels": "data", "steps": 30, "max_steps": 30, "target": "a/b"}


@pytest.fixture
def checkpoint(target: Target, tmp_path: Path) -> Path:
    drafter = build_drafter(make_geometry(target), seed=1)
    return save_drafter(drafter, tmp_path / "drafter", {**TRAINED, "target_fingerprint": "0123456789ab"})


def test_the_layout_of_engines_in_bfloat16_with_commands_that_name_both_models(
    checkpoint: Path, tmp_path: Path
) -> None:
    vllm, sglang, own = export(checkpoint, tmp_path / "out", license="apache-2.0")
    found, was = load_file(tmp_path / "out" / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert found.keys() == was.keys()
    assert all(torch.equal(found[name], was[name].to(torch.bfloat16)) for name in was)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_drafter(tmp_path / "out").config.extra["objective"] == "auf"
    assert vllm.startswith("vllm serve a/b --speculative-config '{")
    assert json.loads(vllm.split("'")[1])["num_speculative_tokens"] == 4, "the anchor is not proposed"
    assert sglang.endswith(f"--speculative-algorithm DFLASH --speculative-draft-model-path {tmp_path}/out")
    assert own.startswith(f"specauf generate {tmp_path}/out ")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "a/b" and head["license"] == "apache-2.0"
    assert "auf, reduction global, labels data" in card and "30 of 30" in card and vllm in card
    export(checkpoint, tmp_path / "out", dtype="float32", base_model="other/name")
    assert "other/name" in (tmp_path / "out" / "README.md").read_text(), "an export may be written again"
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044, "for others to read"


def test_a_card_says_what_is_known_and_its_head_is_yaml_whatever_is_given(
    checkpoint: Path, target: Target, tmp_path: Path
) -> None:
    def card(of: Path, **options: Any) -> tuple[dict[str, Any], str]:
        export(of, tmp_path / "out", **options)
        _, head, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
        return yaml.safe_load(head), text

    head, _ = card(checkpoint, license="my: license", base_model="a b:c")
    assert (head["license"], head["base_model"]) == ("my: license", "a b:c")
    head, text = card(checkpoint, base_model=str(tmp_path / "private" / "mine"))
    assert "base_model" not in head and "# DFlash drafter for mine\n" in text
    assert "trained with specauf" in text and "Figures are" not in text, "nothing was measured"
    foreign = save_drafter(
        build_drafter(make_geometry(target)), tmp_path / "foreign"
    )  # z-lab's say nothing of training
    _, text = card(foreign)
    for absent in ("trained with specauf", "not recorded of", "None", "0.0 M"):
        assert absent not in text
    assert "--target.path TARGET" in text
    origin = {"path": "runs/a", "weights": "0123456789ab", "trained": {**TRAINED, "variant": "b-auf"}}
    branches = {"objective": "decay", "final": {"objective": "dpace"}, "variant": None, "init_from": origin}
    _, text = card(save_drafter(build_drafter(make_geometry(target)), tmp_path / "two", {**TRAINED, **branches}))
    assert "| objective | decay and dpace, reduction" in text and "30 steps of b-auf |" in text


def test_what_does_not_read_back_is_not_shipped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(drafter: torch.nn.Module, directory: Path) -> None:
        save_drafter(drafter, directory)  # type: ignore[arg-type]
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")

    monkeypatch.setattr("specauf.export.save_drafter", damaged)
    with pytest.raises(UserError, match="does not read back as it was written"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_speculators_counts_taps_from_the_embedding_and_names_its_target(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "out", layout="speculators") == [f"vllm serve {tmp_path}/out"]
    config, ours = (json.loads((where / "config.json").read_text()) for where in (tmp_path / "out", checkpoint))
    assert config["aux_hidden_state_layer_ids"] == [i + 1 for i in ours["dflash_config"]["target_layer_ids"]]
    assert config["speculators_config"]["verifier"]["name_or_path"] == "a/b"
    assert config["mask_token_id"] == ours["dflash_config"]["mask_token_id"] and config["block_size"] == 5
    (proposal,) = config["speculators_config"]["proposal_methods"]
    assert proposal["speculative_tokens"] == 4 and config["dtype"] == "bfloat16"
    assert config["draft_vocab_size"] == config["transformer_layer_config"]["vocab_size"] == ours["vocab_size"]


def test_a_drafter_with_its_own_vocabulary_is_for_no_engine(target: Target, tmp_path: Path) -> None:
    drafter = build_drafter(make_geometry(target, draft_vocab_size=16), seed=1)
    keep_tokens(drafter, torch.arange(16))
    save_drafter(drafter, tmp_path / "drafter", TRAINED)
    with pytest.raises(UserError, match=r"16 of the 61 tokens .* no engine reads"):
        export(tmp_path / "drafter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_studys_results_are_no_table_for_a_card(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"kind": "study", "title": "t", "methods": [], "parts": []}')
    with pytest.raises(UserError, match="was not written by `specauf eval`"):
        export(checkpoint, tmp_path / "out", results=[tmp_path / "results.json"])


def results(target: str, drafter: float = 1.2, weights: str = "") -> dict[str, Any]:
    one = {"interval": [drafter - 0.1, drafter + 0.1], "tau_before_loop": 1.1}
    methods = {"mine": {"tau": drafter, **one}, "prompt-lookup": {"tau": 1.5, **one}}
    return {
        "title": "t",
        "methods": [
            {"name": "mine", "label": "mine", "kind": "drafter", **({"weights": weights} if weights else {})},
            {"name": "prompt-lookup", "label": "prompt lookup", "kind": "lookup"},
        ],
        "evaluation": {"birds": {"label": "Birds", "prompts": 3, "methods": methods}},
        "settings": {"temperature": 0.0},
        "provenance": {
            "commit": "abcdef0123",
            "version": "9",
            "created": "2026",
            "target": {"fingerprint": target},
        },
    }


@pytest.mark.parametrize(("tau", "told"), [(1.2, "no drafter here is above it"), (1.6, "higher mean on 1 of 1 tasks")])
def test_the_card_has_the_competitors_figures_beside_the_drafters(
    checkpoint: Path, tmp_path: Path, tau: float, told: str
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results("0123456789ab", tau)))
    export(checkpoint, tmp_path / "out", results=[tmp_path / "results.json"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| Birds (3) | {tau:.3f} [{tau - 0.1:.3f}, {tau + 0.1:.3f}] | 1.100 | 1.500" in card and told in card


def test_the_card_averages_tasks_method_by_method_and_counts_those_that_are_won(
    checkpoint: Path, tmp_path: Path
) -> None:
    """A tie is no win, and what lookup first with the drafter reaches is told apart from the drafter alone."""
    found = results("0123456789ab", 1.4)
    found["methods"].append({"name": "both", "label": "both", "kind": "both", "of": "mine"})
    birds = found["evaluation"]["birds"]
    birds["methods"]["both"] = {"tau": 1.8, "interval": [1.7, 1.9], "tau_before_loop": 1.3}
    taken = {"mine": (1.7, 1.5), "prompt-lookup": (1.6, 1.2), "both": (1.6, 1.1)}
    cells = {name: {"tau": tau, "interval": [1, 2], "tau_before_loop": early} for name, (tau, early) in taken.items()}
    found["evaluation"]["dogs"] = {"label": "Dogs", "prompts": 5, "methods": cells}
    (tmp_path / "results.json").write_text(json.dumps(found))
    export(checkpoint, tmp_path / "out", results=[tmp_path / "results.json"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| average | 1.550 | 1.300 | 1.550 | 1.150 | 1.700 | 1.200 |" in card
    assert "a drafter has the higher mean on 1 of 2 tasks, and lookup first with the drafter elsewhere on 1." in card


def test_a_card_is_made_from_whatever_a_report_is(checkpoint: Path, tmp_path: Path) -> None:
    """Results without labels, settings or numbers, as somebody may have cut or written them."""
    found = results("0123456789ab")
    del found["methods"][0]["label"]
    found |= {"settings": None, "provenance": None}
    found["evaluation"]["birds"] = {"methods": {"mine": {"tau": None}, "prompt-lookup": {}}}
    (tmp_path / "results.json").write_text(json.dumps(found))
    export(checkpoint, tmp_path / "out", results=[tmp_path / "results.json"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| birds (–) | – | – | – | – |" in card and "no drafter here is above it" in card


def test_results_are_of_this_drafter_in_whatever_dtype_it_was_measured(checkpoint: Path, tmp_path: Path) -> None:
    shipped, path = tmp_path / "shipped", tmp_path / "results.json"
    export(checkpoint, shipped)
    (weights,) = {fingerprint(load_drafter(at)) for at in (checkpoint, shipped)}
    path.write_text(json.dumps(results("0123456789ab", weights=weights)))
    export(checkpoint, shipped, results=[path, path])
    assert (shipped / "README.md").read_text().count("| Birds (3) |") == 2
    both = results("0123456789ab", weights=weights)
    others = [
        {"name": "other", "kind": "drafter", "weights": "x"},
        {"name": "other, behind", "kind": "both", "of": "other"},
    ]
    both["methods"] += [{**other, "label": "ANOTHER"} for other in others]
    both["evaluation"]["birds"]["methods"] |= {other["name"]: {"tau": 9.0} for other in others}
    path.write_text(json.dumps(both))
    export(checkpoint, shipped, results=[path])
    card = (shipped / "README.md").read_text()
    assert "ANOTHER" not in card and "no drafter here is above it" in card, "another drafter's figures are not its own"
    path.write_text(json.dumps(results("0123456789ab", weights="ba9876543210")))
    with pytest.raises(UserError, match=rf"measured other weights \(ba9876543210\) than this drafter's \({weights}\)"):
        export(checkpoint, shipped, results=[path])


def test_the_card_tells_what_a_drafter_was_trained_on_and_from(target: Target, tmp_path: Path) -> None:
    corpus = {"path": "sharegpt", "conversations": 2200, "max_length": 384, "kept_out": ["GSM8K"], "rollouts": None}
    answers = {**corpus, "path": "runs/own", "kept_out": None, "rollouts": {"samples": 1, "temperature": 0.0}}
    before = {"path": "runs/first", "weights": "ba9876543210"}
    before["trained"] = {"steps": 7, "objective": "auf", "init_layers": [0, 1], "data": corpus}  # type: ignore[assignment]
    drafter = build_drafter(make_geometry(target))
    save_drafter(drafter, tmp_path / "drafter", {**TRAINED, "epochs": 1.5, "data": answers, "init_from": before})
    export(tmp_path / "drafter", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for row in (
        "| steps | 30 of 30, 1.5 epochs |",
        "| trained on | 2,200 conversations of runs/own, to 384 tokens: the target's own answers at T=0 |",
        "| went on from | runs/first, model.safetensors ba9876543210, 7 steps of auf |",
        "| trained on (before) | 2,200 conversations of sharegpt, to 384 tokens |",
        "| prompts kept out of it (before) | GSM8K |",
        "| began as target layers (before) | 0, 1 |",
    ):
        assert row in card
    answers["rollouts"] = {"samples": 1, "temperature": 0.0, "target": "0123456789ab"}
    for trained_for, whose in (
        ("0123456789ab", "the target's own answers at T=0"),
        ("ba9876543210", "answers of another target or precision (0123456789ab) at T=0"),
    ):
        save_drafter(drafter, tmp_path / "drafter", {**TRAINED, "target_fingerprint": trained_for, "data": answers})
        export(tmp_path / "drafter", tmp_path / "out")
        assert f"tokens: {whose} |" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_has_no_paths_to_the_data_of_this_machine(target: Target, tmp_path: Path) -> None:
    data = {"path": "/home/a/chats.jsonl", "conversations": 3, "max_length": 64, "kept_out": [], "rollouts": None}
    other = {"path": "/home/a/second", "weights": "1", "trained": {"data": data}}
    told = {**TRAINED, "data": data, "init_from": {"path": "~/runs/first", "weights": "0"}, "averaged_with": [other]}
    save_drafter(build_drafter(make_geometry(target)), tmp_path / "drafter", told)
    export(tmp_path / "drafter", tmp_path / "out")
    for name in ("README.md", "config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "/home" not in text and "~/" not in text
        assert "chats.jsonl" in text


def test_what_cannot_be_exported_is_said_and_nothing_is_written(
    target: Target, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results("ba9876543210")))
    with pytest.raises(UserError, match="measured on another target"):
        export(checkpoint, tmp_path / "out", results=[tmp_path / "results.json"])
    with pytest.raises(ConfigError, match="did you mean 'zlab'"):
        export(checkpoint, tmp_path / "out", layout="z-lab")
    head = dataclasses.replace(make_geometry(target), domino=DominoHead(8, 4))
    domino = save_drafter(build_drafter(head), tmp_path / "domino")
    with pytest.raises(UserError, match="no Domino drafters"):
        export(domino, tmp_path / "out", layout="speculators", base_model="a/b")
    assert export(domino, tmp_path / "kept", dtype="float32") == []
    assert "No engine serves this drafter" in (tmp_path / "kept" / "README.md").read_text()
    (sglang,) = export(domino, tmp_path / "served")
    two = dataclasses.replace(make_geometry(target), domino=DominoHead(8, 4, pure_draft_prefix_len=2))
    assert export(save_drafter(build_drafter(two), tmp_path / "two"), tmp_path / "unserved") == []
    assert "--model-path TARGET" in sglang and sglang.endswith("--speculative-domino-candidate-pool-size 0")
    with pytest.raises(UserError, match="names its target"):
        export(
            save_drafter(build_drafter(make_geometry(target)), tmp_path / "bare"),
            tmp_path / "out",
            layout="speculators",
        )
    with pytest.raises(UserError, match=r"holds state.json, which an export would delete"):
        (checkpoint / "state.json").write_text("{}")
        export(checkpoint, checkpoint)
    (checkpoint / "state.json").unlink()
    (tmp_path / "link").symlink_to(checkpoint)
    for given in ({"checkpoint": checkpoint}, {"checkpoint": domino, "average_with": [checkpoint]}):
        with pytest.raises(UserError, match="is a drafter to export, which the export would replace"):
            export(out=tmp_path / "link", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
