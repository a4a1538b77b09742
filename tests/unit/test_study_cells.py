"""What makes a cell, or a recording, another one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specauf.bench.tasks import BenchPrompt
from specauf.config import RunConfig
from specauf.strict import ConfigError
from specauf.study import recipe
from specauf.study.cells import check_same_data, finished
from specauf.study.recordings import _made_of, chosen


def test_a_cell_of_other_data_or_another_target_is_refused(tmp_path: Path) -> None:
    cell = recipe.Cell("auf", 0, RunConfig(out=str(tmp_path)))
    check_same_data(cell, "d", "t")  # nothing is there yet
    (tmp_path / "run.json").write_text(json.dumps({"data": "d", "target": "t"}))
    check_same_data(cell, "d", "t")
    with pytest.raises(ConfigError, match=r"another state of the data \(d then, e now\)"):
        check_same_data(cell, "e", "t")
    with pytest.raises(ConfigError, match=r"another state of the target \(t then, u now\)"):
        check_same_data(cell, "d", "u")
    (tmp_path / "run.json").write_text("{}")
    check_same_data(cell, "e", "u")  # of a version that did not say


@pytest.mark.parametrize(("step", "horizon", "done"), [(3, 4, False), (4, 4, True), (4, None, False)])
def test_a_cell_is_finished_at_its_horizon(tmp_path: Path, step: int, horizon: int | None, done: bool) -> None:
    assert not finished(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps({"step": step, "max_steps": horizon}))
    assert finished(tmp_path) == done


def test_conversations_are_chosen_whole_and_in_their_order() -> None:
    clusters = [0, 0, 2, 3, 3, 3, 7]
    assert [chosen(clusters, n) for n in (1, 2, 3)] == [[0, 1], [0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert chosen(clusters, None) == chosen(clusters, 9) == list(range(7))


def test_a_recording_is_of_its_target_prompts_sampling_and_thinking(tmp_path: Path) -> None:
    def study(**base: Any) -> recipe.Study:
        content = {
            "title": "t",
            "out": str(tmp_path),
            "base": {"train": {"max_steps": 1}, **base},
            "methods": {"auf": {"label": "a"}},
            "parts": {"a": {"title": "a", "methods": ["auf"], "baseline": "auf"}},
        }
        return recipe.study_of(content, "test")

    def target(fingerprint: str = "f", eos: int = 2) -> Any:
        return SimpleNamespace(fingerprint=lambda: fingerprint, eos_ids=lambda: frozenset({1, eos}))

    prompt = BenchPrompt("x/0", [{"role": "user", "content": "hi"}])
    wanted = recipe.Recording(0.0, None, 10, 4)
    one = _made_of(study(), target(), [prompt], wanted)
    assert one == _made_of(study(), target(), [prompt], dataclasses.replace(wanted, max_new_tokens=5, prompts=2))
    others = [
        _made_of(study(), target("g"), [prompt], wanted),
        _made_of(study(), target(eos=3), [prompt], wanted),
        _made_of(study(), target(), [prompt._replace(later=("and",))], wanted),
        _made_of(study(), target(), [prompt._replace(messages=[{"role": "user", "content": "ho"}])], wanted),
        _made_of(study(), target(), [prompt], dataclasses.replace(wanted, temperature=1.0)),
        _made_of(study(eval={"sampling": {"top_k": 5}}), target(), [prompt], wanted),
        _made_of(study(eval={"sampling": {"seed": 1}}), target(), [prompt], wanted),
        _made_of(study(data={"enable_thinking": True}), target(), [prompt], wanted),
    ]
    assert len({one, *others}) == 1 + len(others)
