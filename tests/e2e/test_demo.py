"""The demo from data to page on a tiny world: its plan is made in two halves, kept, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import specauf.demo
from specauf.console import Terminal
from specauf.demo import demo_recipe, run_demo
from specauf.report import page
from specauf.strict import UserError
from specauf.train.calibration import calibrate


@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_the_demo_trains_decay_then_auf_for_the_same_time(
    world: Path, own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    base = demo_recipe(
        [
            *(f"out={tmp_path}/demo", f"target.path={world}/target", f"data.path={world}/chat.jsonl"),
            *("data.max_length=64", "data.heldout=0.2", f"drafter.kind={kind}", "drafter.block_size=4"),
            *("drafter.num_hidden_layers=1", "drafter.num_taps=2", "train.num_anchors=8"),
            *(
                "eval.tasks=[birds, heldout]",
                f"eval.tasks_dir={world}/tasks",
                "eval.prompts=3",
                "eval.max_new_tokens=12",
            ),
        ]
    )
    calls = []

    def calibration(trainers, steps, weights=None):  # type: ignore[no-untyped-def]
        calls.append([t.done for t in trainers])
        calibrate(trainers, 1, 0, weights)
        return [1.0] if len(trainers) == 1 else [2.0, 3.0]

    monkeypatch.setattr(specauf.demo, "calibrate", calibration)
    train, asked = specauf.demo._train, []

    def interrupted(run, name, *rest):  # type: ignore[no-untyped-def]
        asked.append(name)
        if asked == ["decay", "auf"]:
            raise KeyboardInterrupt
        train(run, name, *rest)

    def killed(*rest):  # type: ignore[no-untyped-def]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(specauf.demo, "feature_cache", killed)
        run_demo(base, 2.0, Terminal(silent=True))
    measured = json.loads((tmp_path / "demo" / "plan.json").read_text())
    assert measured["examples"] > 0 and measured["steps"] == {}, "the rate is measured once, and kept before it is used"
    monkeypatch.setattr(specauf.demo, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(base, 2.0, Terminal(silent=True))
    index = run_demo(base, 2.0, Terminal(silent=True))
    plan = json.loads((tmp_path / "demo" / "plan.json").read_text())
    assert all(plan[key] == measured[key] for key in ("examples", "tokens_per_second"))
    other = json.dumps(plan | {"examples": 10**6})
    for text, told in (
        (other, "a plan for 1000000 conversations"),
        ("{", "damaged"),
        ('{"a": 1}', "no plan of a demo"),
    ):
        (tmp_path / "demo" / "plan.json").write_text(text)
        with pytest.raises(UserError, match=rf"plan\.json is {told}"):
            run_demo(base, 2.0, Terminal(silent=True))
    assert plan["steps"] == {"decay": 27, "auf": round(27 * 3 / 2)}, (
        "0.45 of two minutes, in halves, at a second a step"
    )
    assert plan["seconds_per_step"] == {"decay": 1.0, "auf": 2.0, "decay, trained": 3.0}
    assert calls == [[0], [0, 27]], "AUF's share is found when decay is trained, once"
    results = page.read(index.parent)
    assert all(check["passed"] for check in results["checks"])
    methods = {m["name"]: m for m in results["methods"]}
    assert (
        methods["decay"]["steps"] == 27 and methods["auf"]["steps"] == 40 and methods["auf@decay-steps"]["steps"] == 27
    )
