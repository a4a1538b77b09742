"""A study of two methods and two seeds on a tiny target: trained once, measured once, killed and gone on with."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specauf.cli import main
from specauf.config import TargetConfig, digest, override
from specauf.data.dataset import Prepared
from specauf.locks import claim
from specauf.report import study_index
from specauf.run import new_drafter
from specauf.strict import ConfigError, UserError
from specauf.study import measuring, recipe, recordings
from specauf.study.cells import finished, identity
from specauf.study.results import collect
from specauf.study.stages import run_study
from specauf.study.training import Corpus
from specauf.target import Target
from specauf.train.batches import Batches
from specauf.train.loop import Trainer
from tests.conftest import write_world


class Quiet:
    """A console that remembers what was said, and can be told to interrupt."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stop_at: tuple[str, int] | None = None

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0) -> Iterator[Callable[[float, str], None]]:
        self.said.append(label)
        calls = 0

        def advance(amount: float, note: str = "") -> None:
            nonlocal calls
            calls += 1
            if self.stop_at and label.startswith(self.stop_at[0]) and calls > self.stop_at[1]:
                raise KeyboardInterrupt

        yield advance


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Any) -> Path:
    """A target directory, a corpus and two tasks, one of them with two turns."""
    tasks = {"birds": 1, "pairs": 2}
    return write_world(tmp_path_factory.mktemp("world"), make_tokenizer(), conversations=24, words=10, tasks=tasks)


@pytest.fixture(autouse=True)
def own_cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECAUF_CACHE", str(world / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tiny(world: Path) -> Target:
    return Target.load(TargetConfig(path=str(world / "target")))


def content(world: Path, out: Path) -> dict[str, Any]:
    """A recipe as YAML reads it."""
    return {
        "title": "tiny",
        "out": str(out),
        "base": {
            "target": {"path": f"{world}/target"},
            "data": {"path": f"{world}/chat.jsonl", "max_length": 64, "heldout": 0.1},
            "features": {"cache": True},
            "drafter": {"block_size": 4, "num_hidden_layers": 1, "num_taps": 2},
            "train": {"max_steps": 4, "batch_size": 4, "num_anchors": 4, "save_every": 2},
            "eval": {"tasks": ["birds", "pairs"], "tasks_dir": f"{world}/tasks", "prompts": 2, "max_new_tokens": 8},
        },
        "methods": {
            "decay": {"label": "Decay", "set": ["objective.name=decay"]},
            "auf": {"label": "AUF", "set": ["objective.name=auf", "features.cache=false"]},
            "wide": {"label": "B=6", "set": ["objective.name=auf", "drafter.block_size=6"]},
        },
        "parts": {
            "a": {
                "title": "first",
                "methods": ["decay", "auf"],
                "baseline": "decay",
                "seeds": [0, 1],
                "temperatures": [0.0, 1.0],
                "max_new_tokens": 10,
            },
            "b": {"title": "second", "methods": ["auf", "wide"], "baseline": "auf", "prompts": 2, "max_new_tokens": 10},
        },
        "live": {"prompts": 1, "tokens": 8},
    }


@pytest.fixture
def study(world: Path, tmp_path: Path) -> recipe.Study:
    return recipe.study_of(content(world, tmp_path / "study"), "test")


def test_cells_come_part_by_part_and_seed_by_seed(study: recipe.Study) -> None:
    assert [c.name for c in study.cells()] == ["decay-s0", "auf-s0", "decay-s1", "auf-s1", "wide-s0"]
    assert [c.name for c in study.cells(["b"])] == ["auf-s0", "wide-s0"]
    assert study.recordings() == [recipe.Recording(0.0, None, 10, 6), recipe.Recording(1.0, None, 10, 6)]
    assert study.recordings(["b"]) == study.recordings()[:1], "what is recorded does not depend on the parts asked for"
    assert [study.lookup(b) for b in study.block_sizes("b")] == ["prompt-lookup", "prompt-lookup-b6"]


def test_methods_of_a_seed_share_weights_anchors_and_order(study: recipe.Study, tiny: Target) -> None:
    corpus = Corpus(study, tiny, Quiet())

    def trainer(method: str, seed: int) -> Trainer:
        config = study.config(method, seed)
        batches = Batches(corpus.prepared(config).train, corpus.features(config), config.train)
        return Trainer(config, new_drafter(config, tiny), tiny, batches)

    decay, auf, wide, other = trainer("decay", 1), trainer("auf", 1), trainer("wide", 1), trainer("auf", 0)
    for name, weights in decay.drafter.state_dict().items():
        assert torch.equal(weights, auf.drafter.state_dict()[name]), name
    assert not torch.equal(decay.drafter.fc.weight, other.drafter.fc.weight)
    for index in range(2 * decay.batches.per_epoch):
        batches = [t.batch(index) for t in (decay, auf, wide, other)]
        assert torch.equal(batches[0].input_ids, batches[1].input_ids)
        assert torch.equal(batches[0].uid, batches[2].uid), "another block size shares the conversations"
        first, second = (t.blocks_of(b) for t, b in zip((decay, auf), batches, strict=False))
        assert torch.equal(first.anchors, second.anchors) and torch.equal(first.keep, second.keep)
    assert [decay.batches.order(e) for e in (0, 1)] != [other.batches.order(e) for e in (0, 1)]


def test_training_is_killed_goes_on_and_is_not_repeated(study: recipe.Study, tiny: Target) -> None:
    console = Quiet()
    console.stop_at = ("training auf-s0", 2)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, ["train"], [], tiny, console)
    assert finished(study.cell_dir("decay", 0)) and not finished(study.cell_dir("auf", 0))
    weights = study.cell_dir("decay", 0) / "checkpoint" / "model.safetensors"
    before = weights.stat().st_mtime_ns

    console = Quiet()
    with claim(study.cell_dir("wide", 0)) as mine:  # as another process would have it
        assert mine
        run_study(study, ["train"], [], tiny, console)
    assert weights.stat().st_mtime_ns == before
    assert not any("training decay-s0" in line for line in console.said)
    assert console.said[-1] == "4 of 5 cells are trained; left: wide-s0"
    steps = [json.loads(line)["step"] for line in (study.cell_dir("auf", 0) / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    run_study(study, ["train"], ["b"], tiny, console)
    assert console.said[-1] == "2 of 2 cells are trained"


def test_a_cell_whose_training_fails_takes_no_other_with_it(study: recipe.Study, tiny: Target, world: Path) -> None:
    data = content(world, study.out)
    data["methods"]["decay"]["set"] += ["train.lr=1e30"]
    data["parts"]["b"]["methods"] += ["decay"]
    study, console = recipe.study_of(data, "test"), Quiet()
    with pytest.raises(UserError, match="the training of decay-s0 failed"):
        run_study(study, ["train", "record", "measure"], ["b"], tiny, console)
    assert sum(line.startswith("decay-s0 failed: step 2: the gradient's norm is nan") for line in console.said) == 1
    assert "2 of 3 cells are trained; left: decay-s0" in console.said
    assert console.said[-1] == "finished cells are measured" and (study.out / "measured" / "wide-s0").is_dir()


def test_a_drafter_that_fits_no_target_is_refused_by_its_method_before_any_is_trained(
    study: recipe.Study, tiny: Target, world: Path
) -> None:
    data = content(world, study.out)
    data["methods"]["wide"]["set"] += ["drafter.num_taps=50"]
    with pytest.raises(ConfigError, match=r"methods\.wide: 50 taps do not fit"):
        run_study(recipe.study_of(data, "test"), ["train"], ["b"], tiny, Quiet())
    assert not (study.out / "cells").exists()


def written(results: dict[str, Any], directory: Path) -> Path:
    """In place of the page, whose figures take longer than the study: it would have been drawn."""
    study_index.check(results)
    return directory / "index.html"


@pytest.fixture(scope="module")
def whole(world: Path, tiny: Target, tmp_path_factory: pytest.TempPathFactory) -> tuple[recipe.Study, dict[str, Any]]:
    """A study that ran all its stages, and its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECAUF_CACHE", str(world / "cache"))
        patch.setattr("specauf.report.page.write", written)
        study = recipe.study_of(content(world, tmp_path_factory.mktemp("whole")), "test")
        index = run_study(study, [], [], tiny, Quiet())
    assert index == study.out / "report" / "index.html"
    return study, json.loads((study.out / "results.json").read_text())


def test_every_number_is_there(whole: tuple[recipe.Study, dict[str, Any]]) -> None:
    _, results = whole
    assert results["kind"] == "study" and not any(part["missing"] for part in results["parts"])
    methods = {m["name"]: m for m in results["methods"]}
    assert list(methods) == ["decay", "auf", "wide", "prompt-lookup", "prompt-lookup-b6"]
    assert [c["state"] for c in methods["auf"]["cells"]] == ["done", "done"] and methods["wide"]["block_size"] == 6
    assert results["tasks"]["pairs"]["prompts"] == 6 and results["tasks"]["pairs"]["clusters"] == 3
    assert len(results["training"]["auf"]["1"]) == 4
    scores = {(s["part"], s["temperature"], s["method"], s["task"]): s for s in results["scores"]}
    assert len(scores) == 2 * 3 * 3 + 4 * 3
    for (part, t, name, task), score in scores.items():
        assert score["tau"] == pytest.approx(1 + sum(score["survival"])), (part, t, name, task)
        assert len(score["survival"]) == methods[name]["block_size"] - 1
        assert score["seeds"] == ([] if name.startswith("prompt-lookup") else [0, 1] if part == "a" else [0])
    assert scores["a", "1", "auf", "pairs"]["prompts"] == 6 and scores["b", "0", "auf", "pairs"]["prompts"] == 4
    both = [scores["a", "0", "auf", task]["tau"] for task in ("birds", "pairs")]
    assert scores["a", "0", "auf", "macro"]["tau"] == pytest.approx(sum(both) / 2)
    seeds = scores["a", "0", "auf", "macro"]["seed_taus"]
    assert sum(seeds.values()) / 2 == pytest.approx(scores["a", "0", "auf", "macro"]["tau"])


def test_comparisons_are_paired_corrected_and_have_a_noise_floor(whole: tuple[recipe.Study, dict[str, Any]]) -> None:
    rows = whole[1]["comparisons"]
    assert len(rows) == 2 * 2 * (2 * 3) + 3 * (2 * 3)
    for row in rows:
        assert (row["p_holm"] is None) == (row["task"] == "macro")
        assert row["p_holm"] is None or row["p_holm"] >= row["p"]
        assert row["seeds"] == (2 if row["part"] == "a" else 1)
        assert row["noise_floor"] is not None, "fewer than three seeds are shown nothing without one"
        scores = {
            s["method"]: s for s in whole[1]["scores"] if all(s[k] == row[k] for k in ("part", "temperature", "task"))
        }
        difference = scores[row["a"]]["tau"] - scores[row["b"]]["tau"]
        assert row["before_loop"] or row["difference"] == pytest.approx(difference)
    assert all(check["passed"] for check in whole[1]["checks"]) and len(whole[1]["checks"]) == 2 * 3
    assert whole[1]["unchecked"] == []


def test_a_finished_study_computes_nothing_again(whole: tuple[recipe.Study, dict[str, Any]], tiny: Target) -> None:
    study, _ = whole
    console = Quiet()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (("measuring", "replay"), ("measuring", "check_live"), ("recordings", "recorded")):
            patch.setattr(f"specauf.study.{module}.{name}", None)
        run_study(study, ["train", "record", "measure"], [], tiny, console)
    assert [line for line in console.said if not line.startswith("tiny")] == [
        "5 of 5 cells are trained",
        "the target is recorded",
        "finished cells are measured",
    ]


def test_measuring_is_killed_and_goes_on(
    whole: tuple[recipe.Study, dict[str, Any]], tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, results = whole
    shutil.rmtree(study.out / "measured")
    monkeypatch.setattr("specauf.study.measuring.CHUNK", 2)
    monkeypatch.setattr("specauf.study.measuring.AT_ONCE", 3)
    console = Quiet()
    console.stop_at = ("replaying 7 drafters on pairs, T=0", 9)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, ["measure"], [], tiny, console)
    console, times, groups = Quiet(), [], []
    original, group = measuring.replay, measuring._replay
    monkeypatch.setattr(measuring, "replay", lambda *a: times.append(len(a[1])) or original(*a))
    monkeypatch.setattr(measuring, "_replay", lambda *a: groups.append({s for s, _ in a[3]}) or group(*a))
    run_study(study, ["measure"], [], tiny, console)
    total = (4 + 1) * 9 * 2 + (2 * 6) * 1
    assert 0 < sum(times) < total
    assert max(len(drafters) for drafters in groups) == 3, "no more are on the device at once"
    assert collect(study, tiny, Corpus(study, tiny, console).prepared(study.base))["scores"] == results["scores"]


def test_another_recipes_recording_is_not_measured_as_this_ones(
    whole: tuple[recipe.Study, dict[str, Any]], world: Path, tiny: Target
) -> None:
    tasks = content(world, whole[0].out)
    tasks["base"]["eval"]["sampling"] = {"top_k": 5}
    other = recipe.study_of(tasks, "test")
    shutil.rmtree(other.out / "measured" / "wide-s0")
    console = Quiet()
    run_study(other, ["measure"], ["b"], tiny, console)
    assert console.said[-1] == "not recorded yet, so not measured: birds at T=0, pairs at T=0"
    run_study(whole[0], ["measure"], ["b"], tiny, console)
    assert console.said[-1] == "finished cells are measured"


@pytest.mark.parametrize(
    ("part", "more"),
    [
        ("b", {"max_new_tokens": 14}),
        ("c", {"methods": ["decay", "wider"], "baseline": "decay", "max_new_tokens": 10}),
    ],
)
def test_a_recording_that_is_too_short_or_narrow_is_not_measured_as_if_it_were_not(
    whole: tuple[recipe.Study, dict[str, Any]],
    world: Path,
    tiny: Target,
    part: str,
    more: dict[str, Any],
) -> None:
    changed = content(world, whole[0].out)
    changed["methods"]["wider"] = {"label": "B=9", "set": ["drafter.block_size=9", "train.max_steps=1"]}
    changed["parts"].setdefault(part, {"title": "wider"}).update(more)
    study, console = recipe.study_of(changed, "test"), Quiet()
    run_study(study, ["measure"], [part], tiny, console)
    assert console.said[-1] == "not recorded yet, so not measured: birds at T=0, pairs at T=0"
    found = collect(study, tiny, Corpus(study, tiny, console).prepared(study.base))
    assert found["tasks"]["pairs"]["prompts"] == 6
    missing = {p["key"]: p["missing"] for p in found["parts"]}
    assert missing["a"] == [] and missing[part], "what the recording is enough for stays"
    assert not any(row["part"] == part for row in found["scores"])


def test_a_recording_of_other_tokens_is_not_measured_by_its_name(
    whole: tuple[recipe.Study, dict[str, Any]], tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, wanted = whole[0], whole[0].recordings()[0]
    about = recordings.describe(study, "birds", wanted, tiny)
    assert about and recordings.open_recorded(study, tiny, "birds", recipe.Recording(**about["recording"]))
    template = tiny.tokenizer.chat_template  # type: ignore[union-attr]
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "27 Nov 2026" + template)
    with pytest.raises(UserError, match="the recording of birds changed while it was measured"):
        recordings.open_recorded(study, tiny, "birds", recipe.Recording(**about["recording"]))


def test_a_report_is_not_of_another_sampling_than_it_says(
    whole: tuple[recipe.Study, dict[str, Any]], world: Path, tiny: Target
) -> None:
    changed = content(world, whole[0].out)
    changed["base"]["eval"]["sampling"] = {"repetition_penalty": 1.3}
    study = recipe.study_of(changed, "test")
    found = collect(study, tiny, Corpus(study, tiny, Quiet()).prepared(study.base))
    assert found["scores"] == found["checks"] == [] and found["unchecked"], "what was not decoded live is named"


def test_the_benchmarks_count_the_prompts_that_are_used_of_a_larger_recording(
    whole: tuple[recipe.Study, dict[str, Any]], world: Path, tiny: Target
) -> None:
    fewer = content(world, whole[0].out)
    fewer["parts"]["a"]["prompts"] = 2
    study = recipe.study_of(fewer, "test")
    found = collect(study, tiny, Corpus(study, tiny, Quiet()).prepared(study.base))
    assert found["scores"] and (found["tasks"]["pairs"]["prompts"], found["tasks"]["pairs"]["clusters"]) == (4, 2)


def test_a_live_sample_is_no_larger_than_its_part(world: Path, tmp_path: Path) -> None:
    data = content(world, tmp_path / "study")
    data["parts"]["a"]["prompts"], data["live"]["prompts"] = 2, 3
    study = recipe.study_of(data, "test")
    assert study.live_recording().prompts == 2
    assert study.recordings()[0].covers(study.live_recording(), 2)


def test_what_cannot_be_recorded_is_said_before_anything_is_trained(world: Path, tiny: Target, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(world / "tasks", tasks)
    (tasks / "one.jsonl").write_text(json.dumps({"id": "one/1", "turns": ["the quick fox?"]}) + "\n")
    lonely, far = content(world, tmp_path / "lonely"), content(world, tmp_path / "far")
    lonely["base"]["eval"] |= {"tasks": ["birds", "one"], "tasks_dir": str(tasks)}
    far["parts"]["a"]["max_new_tokens"] = 600
    with pytest.raises(UserError, match="one has 1 conversation, and an interval needs two or more"):
        run_study(recipe.study_of(lonely, "test"), [], [], tiny, Quiet())
    near = Target(tiny.model, tiny.tokenizer, tiny.name)
    near.reach = 512
    with pytest.raises(UserError, match=r"reaches 512 positions.*birds/0 has a prompt of \d+ tokens"):
        run_study(recipe.study_of(far, "test"), [], [], near, Quiet())
    assert not list(tmp_path.glob("*/cells/*"))


def test_what_has_not_run_is_named(world: Path, tiny: Target, tmp_path: Path) -> None:
    study = recipe.study_of(content(world, tmp_path / "study"), "test")
    console = Quiet()
    run_study(study, ["train", "measure"], ["b"], tiny, console)
    assert console.said[-1] == "not recorded yet, so not measured: birds at T=0, pairs at T=0"
    results = collect(study, tiny, Corpus(study, tiny, console).prepared(study.base))
    assert results["scores"] == results["comparisons"] == []
    assert results["parts"][0]["missing"] == ["decay-s0", "decay-s1", "auf-s0", "auf-s1"]
    states = {m["name"]: [c["state"] for c in m["cells"]] for m in results["methods"]}
    assert states["decay"] == ["missing", "missing"] and states["auf"] == ["done", "missing"]
    assert {claim["verdict"] for claim in results["claims"]} == {"not run"}


def test_a_changed_recipe_is_refused_by_the_keys(study: recipe.Study, tiny: Target, world: Path) -> None:
    run_study(study, ["train"], ["b"], tiny, Quiet())
    changed = content(world, study.out)
    changed["methods"]["auf"]["set"] += ["train.lr=1e-3"]
    changed["base"]["eval"]["prompts"] = 1  # no weight depends on it
    with pytest.raises(
        ConfigError, match=r"auf-s0 was trained from another recipe \(train.lr: 0.0006 then, 0.001 now\)"
    ):
        run_study(recipe.study_of(changed, "test"), ["train"], ["b"], tiny, Quiet())
    with pytest.raises(ConfigError, match="auf-s0 was trained from another recipe"):  # nor reported under these names
        run_study(recipe.study_of(changed, "test"), ["report"], ["a"], tiny, Quiet())


def test_what_changes_no_weight_may_change_and_other_data_may_not(
    study: recipe.Study, tiny: Target, world: Path
) -> None:
    run_study(study, ["train"], ["b"], tiny, Quiet())
    elsewhere = content(world, study.out)
    elsewhere["base"] |= {
        "target": {"path": f"{world}/target", "device": "cpu"},
        "features": {"cache": True, "max_gb": 1},
    }
    run_study(recipe.study_of(elsewhere, "test"), ["report"], ["b"], tiny, Quiet())
    elsewhere["base"]["eval"]["tasks"] = [
        "birds"
    ]  # then the prompts of `pairs` are not kept out of what is trained next
    with pytest.raises(ConfigError, match=r"auf-s0 was trained on another state of the data"):
        run_study(recipe.study_of(elsewhere, "test"), ["train"], ["a"], tiny, Quiet())


def test_a_horizon_that_was_begun_is_kept(
    world: Path, tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(world, tmp_path / "study")
    data["methods"]["time"] = {"label": "time", "set": ["objective.name=auf"], "minutes_as": "decay"}
    data["parts"] = {"c": {"title": "c", "methods": ["time"], "baseline": "time"}}
    study, console = recipe.study_of(data, "test"), Quiet()
    monkeypatch.setattr("specauf.study.training.calibrate", lambda trainers, steps, weights: (1.0, 1.5))
    console.stop_at = ("training time-s0", 4)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, ["train"], [], tiny, console)
    (study.out / "calibration.json").unlink()
    monkeypatch.setattr("specauf.study.training.calibrate", lambda trainers, steps, weights: (1.0, 9.0))
    run_study(study, ["train"], [], tiny, console := Quiet())
    assert "training time-s0, 6 steps" in console.said and console.said[-1] == "2 of 2 cells are trained"


def test_the_target_is_recorded_while_another_process_writes_features(study: recipe.Study, tiny: Target) -> None:
    with claim(study.out / "features") as mine:
        assert mine
        run_study(study, ["record"], ["b"], tiny, console := Quiet())
    assert console.said[-1] == "the target is recorded"


def test_auf_is_compared_with_decay_whichever_is_the_baseline(world: Path, tiny: Target, tmp_path: Path) -> None:
    data = content(world, tmp_path / "study")
    data["parts"] = {"a": {"title": "a", "methods": ["auf", "decay"], "baseline": "auf", "max_new_tokens": 10}}
    data["live"] = {"prompts": 0}
    study, console = recipe.study_of(data, "test"), Quiet()
    run_study(study, [], [], tiny, console)
    results = collect(study, tiny, Corpus(study, tiny, console).prepared(study.base))
    assert {("decay", "auf"), ("auf", "decay")} <= {(row["a"], row["b"]) for row in results["comparisons"]}
    assert results["claims"][0]["claim"].startswith("AUF > decay") and results["claims"][0]["verdict"] != "not run"


def test_no_cell_reads_rollouts_of_the_prompts_that_all_are_measured_by(study: recipe.Study, tiny: Target) -> None:
    corpus = Corpus(study, tiny, Quiet())
    base = corpus.prepared(study.base)
    assert base.train.meta["kept_out"] == ["birds", "pairs"]
    config = dataclasses.replace(study.base, data=dataclasses.replace(study.base.data, path="rollouts"))

    def rollouts(kept_out: list[str] | None, prompts: str = "others") -> Prepared:
        meta = base.train.meta | {"rollout": {}, "kept_out": kept_out, "excluded_prompts": prompts}
        return base._replace(train=dataclasses.replace(base.train, meta=meta))

    corpus._require_kept_out(rollouts(["birds", "pairs", "more"]), config)
    corpus._require_kept_out(rollouts(None, base.train.meta["excluded_prompts"]), config)  # made before it was noted
    with pytest.raises(UserError, match="the prompts of pairs were not kept out of rollouts"):
        corpus._require_kept_out(rollouts(["birds"]), config)
    other = rollouts(["birds", "pairs"])
    other.train.meta["split"] = {"seed": 6, "heldout": 0.0}
    corpus._require_kept_out(other, config)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=10))
    with pytest.raises(UserError, match=r"rollouts holds out other conversations .* than the study"):
        corpus._require_kept_out(other, config)


def test_the_time_of_a_method_is_found_once_whatever_changes_no_weight(study: recipe.Study) -> None:
    def of(*overrides: str) -> str:
        return digest(identity(override(study.config("auf", 0), overrides)))

    assert of() == of("train.save_every=1", "train.eval_every=2", "objective.logits_rows=8", "eval.prompts=1")
    assert of() != of("train.lr=0.1")


def test_a_method_starts_from_another_and_has_its_time(world: Path, tiny: Target, tmp_path: Path) -> None:
    data = content(world, tmp_path / "study")
    data["methods"]["on"] = {"label": "on", "set": ["objective.name=auf", "train.lr=1e-5"], "start_from": "auf"}
    data["methods"]["time"] = {"label": "time", "set": ["objective.name=auf"], "minutes_as": "decay"}
    data["methods"]["later"] = {"label": "later", "set": ["objective.name=streak", "data.path=rollouts"]}
    data["parts"] = {"c": {"title": "c", "methods": ["on", "time", "later"], "baseline": "on"}}
    study = recipe.study_of(data, "test")
    assert [c.name for c in study.cells()] == ["auf-s0", "on-s0", "decay-s0", "time-s0", "later-s0"]
    console = Quiet()
    run_study(study, ["train"], [], tiny, console)
    assert "later-s0 waits: data.path: no such data file: rollouts" in console.said
    assert console.said[-1] == "4 of 5 cells are trained; left: later-s0"
    later = collect(study, tiny, Corpus(study, tiny, console).prepared(study.base))["methods"][-2]
    assert later["name"] == "later" and later["objective"]["name"] == "streak"
    origin = json.loads((study.cell_dir("on", 0) / "checkpoint" / "config.json").read_text())["specauf"]["init_from"]
    assert origin["path"] == str(study.cell_dir("auf", 0) / "checkpoint")
    plan = json.loads((study.out / "calibration.json").read_text())["time"]
    assert plan["as"] == "decay" and plan["steps_of_other"] == 4
    assert plan["max_steps"] == max(1, round(4 * plan["seconds_per_step_of_other"] / plan["seconds_per_step"]))
    state = json.loads((study.cell_dir("time", 0) / "checkpoint" / "state.json").read_text())
    assert state["step"] == state["max_steps"] == plan["max_steps"]

    for name, dependent in (("auf", "on"), ("decay", "time")):  # trained anew under a cell that was made from it
        kept = (study.cell_dir(name, 0) / "checkpoint" / "model.safetensors").read_bytes()
        (study.cell_dir(name, 0) / "checkpoint" / "model.safetensors").write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ConfigError, match=f"{dependent}-s0 was made from an earlier training of {name}-s0"):
            run_study(study, ["train"], [], tiny, Quiet())
        (study.cell_dir(name, 0) / "checkpoint" / "model.safetensors").write_bytes(kept)
    shutil.rmtree(study.cell_dir("auf", 0))  # in the same command, too
    other = content(world, study.out) | {
        "methods": {**data["methods"], "auf": {"label": "AUF", "set": ["train.lr=1e-2"]}}
    }
    with pytest.raises(ConfigError, match="on-s0 was made from an earlier training of auf-s0"):
        run_study(recipe.study_of(other | {"parts": data["parts"]}, "test"), ["train"], [], tiny, Quiet())
    shutil.rmtree(study.cell_dir("on", 0))
    shutil.rmtree(study.cell_dir("auf", 0))
    run_study(study, ["train"], [], tiny, Quiet())
    shutil.move(study.out, tmp_path / "moved")  # a study is where its recipe says
    run_study(recipe.study_of(data | {"out": str(tmp_path / "moved")}, "test"), ["train"], [], tiny, console)
    assert console.said[-1] == "4 of 5 cells are trained; left: later-s0"


def test_a_drafter_that_cells_began_with_is_not_replaced_unseen(world: Path, tiny: Target, tmp_path: Path) -> None:
    """Otherwise the next cells would begin elsewhere, and be compared as if they had not."""
    data = content(world, tmp_path / "study")
    data["parts"] = {"c": {"title": "c", "methods": ["decay"], "baseline": "decay"}}
    run_study(recipe.study_of(data, "test"), ["train"], [], tiny, Quiet())
    start = shutil.copytree(tmp_path / "study" / "cells" / "decay-s0" / "checkpoint", tmp_path / "start")
    data["out"], data["base"]["drafter"]["init_from"] = str(tmp_path / "on"), str(start)
    run_study(recipe.study_of(data, "test"), ["train"], [], tiny, Quiet())
    weights = start / "model.safetensors"
    weights.write_bytes((kept := weights.read_bytes())[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"decay-s0 began with other weights than .*start holds now: put those back"):
        run_study(recipe.study_of(data, "test"), ["train"], [], tiny, Quiet())
    shutil.rmtree(start)  # it is needed no more
    run_study(recipe.study_of(data, "test"), ["train"], [], tiny, Quiet())


@pytest.mark.parametrize("name", ["cells/auf-s0/checkpoint/state.json", "measured/auf-s0/birds-t0-n10.json"])
def test_a_damaged_file_is_named(
    whole: tuple[recipe.Study, dict[str, Any]], tiny: Target, tmp_path: Path, name: str
) -> None:
    study = dataclasses.replace(whole[0], out=shutil.copytree(whole[0].out, tmp_path / "study"))
    path = study.out / name
    assert path.is_file(), sorted(p.name for p in path.parent.iterdir())
    path.write_text('{"records": ')
    with pytest.raises(UserError, match=rf"{path.name} is damaged \(.*\): delete "):
        run_study(study, ["train", "measure"], [], tiny, Quiet())


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from specauf.locks import claim\n"
        "with claim(pathlib.Path(sys.argv[1])) as mine:\n"
        "    print(mine, flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    with claim(tmp_path) as mine:
        assert not mine
    holder.kill()
    holder.wait()
    with claim(tmp_path) as mine:
        assert mine


def test_a_domino_drafter_is_a_method_like_any_other(world: Path, tiny: Target, tmp_path: Path) -> None:
    data = content(world, tmp_path / "study")
    domino = ["drafter.kind=domino", "drafter.gru_hidden_dim=8", "drafter.emb_dim=8", "objective.variant=b-auf-d"]
    data["methods"]["b-auf-d"] = {"label": "B-AUF+D", "set": domino}
    data["parts"] = {
        "b": {"title": "b", "methods": ["b-auf-d"], "baseline": "b-auf-d", "prompts": 2, "max_new_tokens": 8}
    }
    data["base"]["eval"]["tasks"] = ["birds"]
    study = recipe.study_of(data, "test")
    run_study(study, ["train", "record", "measure"], [], tiny, Quiet())
    results = collect(study, tiny, Corpus(study, tiny, Quiet()).prepared(study.base))
    method = results["methods"][0]
    assert (
        method["kind"] == "domino"
        and method["objective"]["name"] == "b-auf-d"
        and method["cells"][0]["state"] == "done"
    )
    assert {s["method"] for s in results["scores"]} == {"b-auf-d", "prompt-lookup"}
    assert all(check["passed"] for check in results["checks"]), results["checks"]


def test_the_command_says_what_is_wrong_and_what_is_done(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content(world, tmp_path / "study")))
    assert main(["study", str(path), "--stage", "train", "--parts", "b", "--set", "base.train.max_steps=2"]) == 0
    assert "2 of 2 cells are trained" in capsys.readouterr().out
    assert main(["study", str(path), "--parts", "z"]) == 2
    assert "unknown part 'z'" in capsys.readouterr().err
    assert main(["study", str(path), "--stage", "train", "--parts", "b"]) == 2
    assert "train.max_steps: 2 then, 4 now" in capsys.readouterr().err


def changed(world: Path, path: str, value: Any) -> dict[str, Any]:
    data = content(world, Path("out"))
    *parents, last = path.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("part", {}, "r.yaml: unknown key 'part'; did you mean 'parts'"),
        ("title", None, "r.yaml: title is missing"),
        ("base.out", "x", "base.out is not allowed"),
        ("base.trian", {}, "r.yaml: base: unknown key 'trian'; did you mean 'train'"),
        ("methods", None, "r.yaml: methods is missing"),
        ("methods.Auf", {"label": "x"}, "methods: 'Auf' cannot be a name"),
        ("methods.auf.label", None, "methods.auf: label is missing"),
        ("methods.auf.sets", [], "methods.auf: unknown key 'sets'; did you mean 'set'"),
        ("methods.auf.set", ["objective.nam=auf"], "methods.auf: override .*unknown key 'nam'; did you mean 'name'"),
        ("methods.auf.set", ["objective.name=afu"], "methods.auf: .*unknown objective 'afu'; did you mean 'auf'"),
        ("methods.auf.set", ["target.path=x"], "methods.auf: `set` changes target, which all methods share"),
        ("methods.auf.set", ["train.seed=3"], "methods.auf: `set` changes train.seed"),
        ("methods.auf.set", ["objective.name=decay"], "methods.auf is the same run as methods.decay"),
        ("methods.auf.start_from", "decya", "unknown method 'decya'; did you mean 'decay'"),
        ("methods.auf.start_from", "auf", "start_from leads back to itself"),
        ("methods.prompt-lookup", {"label": "x"}, "prompt-lookup is in every part already"),
        ("methods.prompt-lookup-b6", {"label": "x"}, "prompt-lookup is in every part already"),
        ("parts.a.methods", ["decay", "afu"], "parts.a.methods: unknown method 'afu'; did you mean 'auf'"),
        ("parts.a.baseline", "wide", "parts.a: the baseline 'wide' is not one of its methods"),
        ("parts.a.seeds", [0, 0], "parts.a: seeds names something twice"),
        ("parts.a.seeds", [], "parts.a: seeds is empty"),
        ("parts.a.prompts", 0, "parts.a: prompts must be at least 2"),
        (
            "base.eval.sampling",
            {"proposal": "sampled", "temperature": 1.0},
            "base.eval.sampling.proposal: a study replays",
        ),
        ("base.train.max_steps", None, "train.max_steps is not set"),
        ("live.tokens", 1, "live: .*tokens >= 2"),
        ("parts.a.temperatures", [1.0], "parts.a is decoded live at temperature 0"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_told_by_its_key(world: Path, path: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipe.study_of(changed(world, path, value), "r.yaml")


def test_overrides_reach_into_the_recipe(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content(world, tmp_path)))
    study = recipe.load(path, ["base.train.max_steps=7", "parts.a.seeds=[3]", "base.features.max_gb=2"])
    assert study.config("auf", 3).train.max_steps == 7 and study.parts["a"].seeds == (3,)
    for changed, told in (
        ("base.train.max_step=7", "unknown key 'max_step'; did you mean 'max_steps'"),
        ("parts.x.seeds=[3]", "unknown part 'x'"),
        ("out=", "out is missing"),
        ("bas.train.lr=1", "unknown section 'bas'; did you mean 'base'"),
        ("parts=3", "'parts' is a section"),
        ("title", "write it as section.key=value"),
    ):
        with pytest.raises(ConfigError, match=told):
            recipe.load(path, [changed])
    assert recipe.load(path, ["out=2026-11-29"]).out == Path("2026-11-29")
    path.write_text("parts: {1: {}}")
    with pytest.raises(ConfigError, match="unknown part 'a'"):
        recipe.load(path, ["parts.a.prompts=3"])
    with pytest.raises(ConfigError, match="no such study"):
        recipe.load(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="unknown part 'z'"):
        recipe.known_parts(study, ["z"])
