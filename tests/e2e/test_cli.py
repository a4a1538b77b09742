"""The verbs on a tiny target with a real tokenizer: what a user types, what is written, how mistakes are answered."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from tests.conftest import make_geometry
from tests.fake_server import Fake

from specauf import __version__, cli
from specauf.arguments import LISTS
from specauf.cli import main
from specauf.config import TargetConfig
from specauf.data.dataset import TokenDataset
from specauf.decode.propose import DrafterProposer
from specauf.drafter.checkpoint import load_drafter, save_drafter
from specauf.drafter.dflash import DFlash
from specauf.target import Target

pytestmark = pytest.mark.usefixtures("own_cache")


def test_prepare_train_eval_generate_and_report(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(world / "recipe.yaml")
    assert main(["prepare", recipe, "--show", "1"]) == 0
    told = capsys.readouterr().out
    assert "records in" in told and "supervised" in told
    assert re.search(r"^held out: \d+ conversations?, \d+ prompts?, ", told, re.MULTILINE)

    assert main(["train", recipe]) == 0
    rows = [json.loads(line) for line in (world / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 7))
    assert rows[2]["replay_tau"] >= 1 and "replay_tau" not in rows[1]
    told = (Path(__file__).parents[2] / "docs" / "log.md").read_text()
    assert not [key for row in rows for key in row if f"`{key}`" not in told]
    for name in ("config.yaml", "run.json", "checkpoint/model.safetensors", "checkpoint/state.json"):
        assert (world / "run" / name).is_file(), name
    capsys.readouterr()
    assert main(["train", recipe]) == 0, "a finished run is finished, not an error"
    told = capsys.readouterr().out
    assert "already trained: step 6 of 6" in told and "done in" not in told

    prepared = next((world / "cache" / "prepared").iterdir())
    command = ["eval", str(world / "run" / "checkpoint"), "--live", "2"]  # its own target
    command += ["--eval.tasks", "birds", "heldout", "--eval.tasks-dir", str(world / "tasks"), "--eval.prompts", "3"]
    command += ["--eval.max-new-tokens", "12", "--data-dir", str(prepared), "--out", str(world / "eval")]
    command += ["--lookup-first", "2", "--lookup-block", "6"]
    capsys.readouterr()
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"written to {world}/eval/results.json" in told
    assert "prompt lookup" in told and "ok: run, birds, batch 1" in told and "FAILED" not in told
    assert "ok: run, lookup first, birds, batch 1" in told
    speedups = [row for row in told.splitlines() if row.startswith("replay of prompt-lookup, birds")]
    assert [row.partition("faster ")[2] for row in speedups] == ["(same prompts)"] * 2, "it has no features to compute"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specauf.bench.compare.check_live", lambda *given, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*command[:-5], str(world / "eval-cut"), *command[-4:]])
    assert json.loads((world / "eval-cut" / "results.json").read_text())["evaluation"], "replay is kept whatever comes"
    kept, behind = json.loads((world / "eval" / "results.json").read_text()), "run, lookup first"
    compared = {(c["a"], c["b"]) for c in kept["comparisons"]}
    assert compared == {(behind, "run"), ("run", "prompt-lookup"), (behind, "prompt-lookup")}
    assert kept["command"].startswith("specauf") and kept["settings"]["lookup first where so many tokens repeat"] == 2

    ship = ["export", str(world / "run" / "checkpoint"), str(world / "shipped"), "--results", str(world / "eval")]
    assert main([*ship, "--base-model", "hub/target"]) == 0
    assert "vllm serve hub/target --speculative-config" in capsys.readouterr().out
    card = (world / "shipped" / "README.md").read_text()
    assert "| prompt lookup | before the text loops |" in card and "Held-out chat" in card
    assert main(["generate", str(world / "shipped"), "the cat"]) == 0, "bfloat16 weights run in the target's dtype"

    assert main(["report", str(world / "eval" / "results.json"), "--out", str(world / "page")]) == 0
    assert main(["report", str(world / "eval")]) == 0 and (world / "eval" / "index.html").is_file()
    assert (world / "page" / "index.html").is_file() and (world / "page" / "report.md").is_file()

    capsys.readouterr()
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("the cat\n"))
        for prompt in ("the cat", "-"):
            assert main(["generate", str(world / "run" / "checkpoint"), prompt]) == 0
            told.append(capsys.readouterr().out)
            assert "the text is the target's own, token for token" in told[-1]
    assert told[0].split("\ntau")[0] == told[1].split("\ntau")[0]


def test_training_measures_the_drafter_in_the_targets_dtype(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it will be served; what is trained stays in float32."""
    seen: list[torch.dtype] = []

    def noted(drafter: DFlash, target: Target) -> DrafterProposer:
        seen.append(drafter.fc.weight.dtype)
        return DrafterProposer(drafter, target)

    monkeypatch.setattr("specauf.run.DrafterProposer", noted)
    sets = ["target.dtype=bfloat16", f"out={world}/half", "train.max_steps=2", "train.eval_every=1"]
    assert main(["train", str(world / "recipe.yaml"), "--set", *sets]) == 0
    assert seen == [torch.bfloat16] * 2
    assert load_drafter(world / "half" / "checkpoint").fc.weight.dtype == torch.float32


def test_training_is_called_by_the_variant_that_a_recipe_names(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["drafter.kind=domino", "objective.variant=decay-only", "train.max_steps=1", "train.eval_every=0"]
    assert main(["train", str(world / "recipe.yaml"), "--set", f"out={world}/named", *sets]) == 0
    assert "training decay-only: done" in capsys.readouterr().out


def test_starting_over_twice_keeps_the_log_of_the_checkpoint_that_was_set_aside(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = world / "anew"
    command = ["train", str(world / "recipe.yaml"), "--set", f"out={out}", "train.eval_every=0", "train.max_steps=2"]
    assert main(command) == 0
    log, weights = (out / "log.jsonl").read_bytes(), (out / "checkpoint" / "model.safetensors").read_bytes()

    def killed(*given: object, **options: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("specauf.train.checkpoint.save", killed)
        with pytest.raises(ZeroDivisionError):
            main([*command, "--fresh"])
    assert main([*command, "--fresh"]) == 0
    assert (out / "log.jsonl.before").read_bytes() == log
    assert (out / "checkpoint.before" / "model.safetensors").read_bytes() == weights


def test_the_python_of_the_serving_page_decodes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny target and drafter in place of the page's."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    where = TargetConfig(path=str(world / "target"), device="cpu")
    save_drafter(DFlash(make_geometry(Target.load(where))), tmp_path)
    for theirs, ours in (("TargetConfig()", repr(where)), ("drafters/smollm2-135m-auf", str(tmp_path))):
        assert code.count(theirs) == 1
        code = code.replace(theirs, ours)
    exec(compile(code, "serving.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) >= 1


def test_a_server_is_held_against_replay_and_answers_in_the_targets_place(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    target = Target.load(TargetConfig(path=str(world / "target"), device="cpu"))
    drafter = DFlash(make_geometry(target, block_size=4))
    fake = Fake(target, DrafterProposer(drafter, target))
    request.addfinalizer(fake.http.shutdown)
    ask = ["eval", str(save_drafter(drafter, tmp_path / "drafter")), "--target.path", str(world / "target")]
    ask += ["--eval.tasks", "birds", "--eval.tasks-dir", str(world / "tasks"), "--eval.max-new-tokens", "12"]
    ask += ["--out", str(tmp_path / "eval"), "--server", fake.url]
    assert main(ask) == 0 and "ok: drafter, birds, served by vLLM" in capsys.readouterr().out
    fake.surplus = 1
    assert main(ask) == 1 and "FAILED: drafter, birds, served by vLLM" in capsys.readouterr().out
    roll = ["rollout", str(world / "recipe.yaml"), "--max-new-tokens", "8", "--max-tokens", "40"]
    asked = [*roll, "--server", fake.url]
    assert main([*asked, "--out", str(tmp_path / "own")]) == 0
    assert main([*roll, "--out", str(tmp_path / "plain")]) == 0
    theirs, ours = (TokenDataset.load(tmp_path / name) for name in ("own", "plain"))
    assert theirs.ids.equal(ours.ids) and theirs.meta["rollout"]["server"] == "vLLM, m"
    assert main([*asked, "--out", str(tmp_path / "both"), "--drafter", str(tmp_path / "drafter")]) == 2
    fake.wrong = 1
    assert main([*asked, "--out", str(tmp_path / "wrong")]) == 2 and "does not serve" in capsys.readouterr().err


def test_self_selection_and_the_drawn_proposal_are_told_apart(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--target.path", str(world / "target")]
    target = Target.load(TargetConfig(path=where[1], device="cpu"))
    drafter = str(save_drafter(DFlash(make_geometry(target, block_size=4)), world / "untrained"))

    measure = ["eval", drafter, *where, "--eval.tasks", "birds", "--eval.tasks-dir", str(world / "tasks")]
    measure += ["--eval.max-new-tokens", "12", "--out", str(world / "chosen"), "--candidates", "3"]
    assert main(measure) == 0
    told = capsys.readouterr().out
    assert "self-selection, decoded live" in told and "untrained, self-selection, K=3, T_s=1.5" in told
    assert "ok: untrained, birds, self-selection, K=3, T_s=1.5: live tokens are plain decoding's" in told
    (row,) = json.loads((world / "chosen" / "results.json").read_text())["selection"]
    assert row["tau"] >= 1 and 4 < row["nodes"] <= 10
    assert main(["report", str(world / "chosen" / "results.json")]) == 0
    assert "K=3, T_s=1.5" in (world / "chosen" / "index.html").read_text()
    assert main([*measure, "--eval.sampling.temperature", "1", "--eval.sampling.proposal", "sampled"]) == 2
    assert "replay measures deterministic proposals alone" in capsys.readouterr().err

    assert main(["generate", drafter, "the cat"]) == 2
    assert "does not say which target it is for: give --target.path" in capsys.readouterr().err
    say = ["generate", drafter, "the cat", *where, "--max-new-tokens", "12"]
    assert main([*say, "--candidates", "3"]) == 0
    told = capsys.readouterr().out
    assert "tau (self-selection, K=3, T_s=1.5) " in told and "nodes verified per round" in told
    assert "the text is the target's own, token for token" in told
    assert main([*say, "--sampling.temperature", "1", "--sampling.proposal", "sampled"]) == 0
    assert "tau (sampled proposal) " in capsys.readouterr().out
    assert main(["generate", "prompt-lookup", "the cat", *where, "--candidates", "2"]) == 2
    assert main([*say, "--lookup-first", "2", "--candidates", "2"]) == 2
    assert main([*say, "--lookup-first", "2"]) == 0
    told = capsys.readouterr().err
    assert "there is no drafter here" in told and "lookup first has none for what it copies" in told
    shutil.copytree(world / "untrained", world / "prompt-lookup")
    for arguments, told in (
        ([*measure, "--live", "-1"], "--live must be at least 0, got -1"),
        (
            [*measure[:1], str(world / "prompt-lookup"), *measure[2:]],
            "the name prompt-lookup is reserved for prompt lookup",
        ),
        (["generate", str(world / "prompt-lookup"), "hi", *where, "--max-new-tokens", "1"], "must be at least 2"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2 and told in capsys.readouterr().err


def test_rollouts_are_training_data_and_a_drafter_goes_on_from_another(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = str(world / "recipe.yaml"), world / "rollouts"
    command = ["rollout", recipe, "--out", str(out), "--turns", "1", "--samples", "2", "--temperature", "1.0"]
    command += ["--max-new-tokens", "10", "--max-tokens", "200"]
    assert main([*command, "--batch-size", "8"]) == 0
    assert "generated tokens" in capsys.readouterr().out
    assert main([*command, "--batch-size", "8"]) == 0, "finished rollouts are finished, not an error"
    assert main([*command, "--batch-size", "9"]) == 2
    assert "begun with batch_size 8, now 9" in capsys.readouterr().err

    changes = [f"data.path={out}", "train.max_steps=2", "train.eval_every=2"]
    assert main(["prepare", recipe, "--set", *changes]) == 0
    assert str(out) in capsys.readouterr().out
    assert main(["train", recipe, "--set", f"out={world}/first", *changes]) == 0
    rows = [json.loads(line) for line in (world / "first" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[1]["replay_tau"] >= 1, "held-out prompts are still there"

    warm = [f"out={world}/second", f"drafter.init_from={world}/first/checkpoint", *changes]
    assert main(["train", recipe, "--set", *warm]) == 0
    told = json.loads((world / "second" / "checkpoint" / "config.json").read_text())["specauf"]
    assert told["init_from"]["path"] == f"{world}/first/checkpoint" and told["data"]["path"] == str(out)
    assert told["init_from"]["trained"]["steps"] == 2 and told["data"]["rollouts"]["temperature"] == 1.0
    assert told["data"]["rollouts"]["target"] == told["target_fingerprint"]
    assert main(["train", recipe, "--set", *warm]) == 0, "a warm run resumes like any other"
    capsys.readouterr()
    assert main(["train", recipe, "--set", *warm, "drafter.intermediate_size=8"]) == 2
    assert "the recipe needs 8" in capsys.readouterr().err
    greedy = ["rollout", recipe, "--max-new-tokens", "10", "--max-tokens", "100", "--out"]
    assert main([*greedy, f"{world}/plain"]) == main(
        [*greedy, f"{world}/fast", "--drafter", f"{world}/first/checkpoint"]
    )
    assert (world / "plain" / "rollouts.jsonl").read_text() == (world / "fast" / "rollouts.jsonl").read_text()
    capsys.readouterr()
    assert main(["rollout", recipe, "--out", str(world / "again"), "--set", changes[0]]) == 2
    assert "rollouts already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "nowhere.yaml"], "no such recipe: nowhere.yaml"),
        (["train", "{recipe}", "--set", "objective.name=aff"], "did you mean 'auf'?"),
        (["train", "{recipe}", "--set", "train.lr=-1"], "train.lr must be > 0"),
        (["train", "{recipe}", "--set", "train.lrr=1"], "did you mean 'lr'?"),
        (["train", "{recipe}", "--set", "train.max_steps=null"], "set train.max_steps or train.minutes"),
        (
            ["train", "{recipe}", "--set", "data.heldout=0", "train.eval_every=2"],
            "there are none (0 conversations",
        ),
        (["prepare", "{recipe}", "--set", "data.path=/no/such.json"], "no such data file: /no/such.json"),
        (["prepare", "{recipe}", "--set", "data.path=/dev/null"], "/dev/null is not a regular file"),
        (["prepare", "{recipe}", "--show", "-5"], "--show must be at least 0, got -5"),
        (["train", "{recipe}", "--set", "out=/proc/nope/x"], "/proc/nope/x: no directory can be made there"),
        (["generate", "prompt-lookup", "hi", "--target.path", "~nosuch/x"], "the home directory is not known"),
        (["eval", "--eval.tasks", "mbpp", "x"], "give at least one drafter directory, before the options"),
        (
            ["prepare", "{recipe}", "--set", "data.path=/proc/self/task"],
            "is a directory, and holds neither rollouts nor",
        ),
        (["prepare", "{recipe}", "--set", "target.path=./nothing"], "no such directory: ./nothing"),
        (["rollout", "{recipe}", "--out", "x", "--samples", "2"], "2 samples at temperature 0"),
        (["rollout", "{recipe}", "--out", "x", "--temperature", "-1"], "temperature must be >= 0"),
        (["rollout", "{recipe}", "--out", "x", "--temperature", "1", "--proposal", "sampled"], "and none is given"),
        (["generate", "x", "hi", "--candidate-temperature", "1"], "give --candidates 2 or more with it"),
        (["generate", "prompt-lookup", "hi", "--lookup-first", "2"], "need a drafter; prompt-lookup is not one"),
        (["eval", "x", "--candidates", "0"], "candidates must be at least 1, got 0"),
        (["generate", "x", "hi", "--sampling.proposal", "sampled"], "proposal 'sampled'"),
        (["eval", "/no/such/drafter"], "is not a drafter checkpoint: config.json is missing"),
        (["report", "/no/such.json"], "/no/such.json"),
        (["train", "{recipe}", "--set", "out={recipe}"], "recipe.yaml: File exists"),
        (["demo", "--set", "train.max_steps=5"], "the demo turns its own --minutes into train.max_steps"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main([a.replace("{recipe}", str(world / "recipe.yaml")) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and "Traceback" not in captured.err


def test_a_prompt_that_the_chat_template_refuses_is_one_line_on_stderr(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "target" / "chat_template.jinja").write_text("{% for tool in tools %}{{ tool }}{% endfor %}")
    assert main(["generate", "prompt-lookup", "hi", "--target.path", str(world / "target")]) == 2
    told = capsys.readouterr().err
    assert "the prompt: the chat template of" in told and "refuses it: 'NoneType' object is not iterable" in told


def test_every_option_with_several_values_may_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("specauf.export.export", lambda *paths, **options: seen.update(options))
    assert (
        main(["export", "a", "b", "--results", "c", "--average-with", "d", "--results", "e", "--average-with", "f"])
        == 0
    )
    assert (seen["results"], seen["average_with"]) == ((Path("c"), Path("e")), (Path("d"), Path("f")))
    lists = {
        n for verb in get_args(cli._verbs()) for n, kind in options_of(get_args(verb)[0]) if get_origin(kind) is tuple
    }
    assert lists == {*LISTS, "--checkpoints"}, "positional, the last"


def options_of(kind: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(kind).items():
        yield prefix + name.replace("_", "-"), hint
        if is_dataclass(hint):
            yield from options_of(hint, f"{prefix}{name}.")


@pytest.mark.parametrize("verb", [get_args(verb)[0].__name__.lower() for verb in get_args(cli._verbs())])
def test_every_verb_explains_itself_and_all_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: specauf {verb}" in told
    bare = re.findall(r"^ +(-\S+)(?: \S+){0,3}\s+\((?:default|required)", told, re.M)
    assert not bare, "a text stands two spaces or a line further than the option"


def test_the_version_is_told_and_the_package_is_the_command() -> None:
    for command in ([sys.executable, "-m", "specauf"], [sys.executable, "-m", "specauf.cli"]):
        assert subprocess.check_output([*command, "--version"], text=True) == f"specauf {__version__}\n"


def test_every_recipe_that_ships_can_be_read() -> None:
    from specauf.config import load
    from specauf.study import recipe as study

    recipes = list((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        study.load(recipe) if recipe.stem.startswith("study_") else load(recipe)
