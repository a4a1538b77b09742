"""Training: exact resume, shared starts, logging, calibration that leaves no trace, and accumulation that adds up."""

from __future__ import annotations

import copy
import itertools
import json
import re
import signal
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_dataset, make_geometry
from torch.utils._python_dispatch import TorchDispatchMode

from specauf.config import EMBEDDED, OBJECTIVES, FeaturesConfig, RunConfig
from specauf.data.dataset import TokenDataset
from specauf.data.features import build_features
from specauf.drafter.checkpoint import build_drafter
from specauf.drafter.config import DominoHead
from specauf.drafter.domino import Domino
from specauf.files import Journal
from specauf.objective.registry import RULES
from specauf.run import draft_vocabulary
from specauf.strict import ConfigError, UserError, from_dict
from specauf.target import Target
from specauf.train import checkpoint, loop
from specauf.train.batches import Batches
from specauf.train.calibration import calibrate
from specauf.train.loop import Trainer, learning_rate
from specauf.train.objectives import objectives_of, stored_extras


@pytest.fixture(scope="module")
def dataset() -> TokenDataset:
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(11):
        n = int(torch.randint(12, 30, (), generator=g))
        ids = torch.randint(0, 58, (n,), generator=g).tolist()
        rows.append((1000 + i, ids, [j > 3 and j % 9 != 8 for j in range(n)]))
    return make_dataset(rows, {"template_hash": "abc"})


def make(target: Target, dataset: TokenDataset, out: Path | None = None, features=None, **train: object) -> Trainer:  # type: ignore[no-untyped-def]
    objective, kind = train.pop("objective", "auf"), train.pop("kind", "dflash")
    if isinstance(objective, str):
        objective = {"name": objective}
    options = {"max_steps": 9, "batch_size": 2, "num_anchors": 4, "lr": 1e-2, "save_every": 100, **train}
    config = from_dict(
        RunConfig,
        {
            "drafter": {"block_size": 5, "kind": kind},
            "features": {"cache": features is not None, "extras": True},
            "objective": objective,
            "train": options,
        },
    )
    batches = Batches(dataset, features, config.train, stored_extras(config))
    geometry = replace(make_geometry(target), domino=DominoHead(16, 16) if kind == "domino" else None)
    return Trainer(config, build_drafter(geometry), target, batches, out)


@pytest.mark.parametrize(
    ("stop", "accumulation"),
    [(1, 1), (5, 1), (7, 1), (2, 2), (3, 2)],
    ids=["first step", "epoch's end", "mid-epoch", "before a step that ends an epoch midway", "after it"],
)  # 11 // 2 = 5 micro-batches an epoch
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    target: Target, dataset: TokenDataset, tmp_path: Path, stop: int, accumulation: int
) -> None:
    whole = make(target, dataset, tmp_path / "whole", accumulation=accumulation)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole.run()

    def interrupt(row: dict) -> None:  # type: ignore[type-arg]
        if row["step"] == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(target, dataset, tmp_path / "cut", accumulation=accumulation).run(on_step=interrupt)
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')  # where a kill cut it short
    again = make(target, dataset, tmp_path / "cut", accumulation=accumulation)
    assert checkpoint.resume(again, tmp_path / "cut") and again.done == stop
    again.run()
    for name, tensor in whole.drafter.state_dict().items():
        assert torch.equal(tensor, again.drafter.state_dict()[name]), name
    logs = [[json.loads(x) for x in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in ("whole", "cut")]
    timing = ("seconds", "data_seconds", "elapsed", "tokens_per_second")
    strip = [[{k: v for k, v in row.items() if k not in timing} for row in rows] for rows in logs]
    assert strip[0] == strip[1] and [row["step"] for row in logs[1]] == list(range(1, 10))


def test_objectives_share_initial_weights_anchors_and_order(target: Target, dataset: TokenDataset) -> None:
    one, other = make(target, dataset, objective="auf"), make(target, dataset, objective="decay")
    assert all(torch.equal(a, b) for a, b in zip(one.drafter.parameters(), other.drafter.parameters(), strict=True))
    for i in range(12):
        a, b = one.batches[i], other.batches[i]
        assert torch.equal(a.input_ids, b.input_ids) and a.epoch == b.epoch
        assert all(torch.equal(x, y) for x, y in zip(one.blocks_of(a), other.blocks_of(b), strict=True))


def test_an_epoch_visits_every_conversation_once(target: Target, dataset: TokenDataset) -> None:
    batches = make(target, dataset).batches
    for epoch in range(3):
        seen = [i for part in batches.order(epoch) for i in part]
        assert len(seen) == 10 and len(set(seen)) == 10
    assert batches.order(0) != batches.order(1)


def test_every_epoch_and_seed_leaves_out_another_conversation(target: Target, dataset: TokenDataset) -> None:
    """Eleven in batches of two: a shuffle of the batches alone would leave out the same one for good."""

    def left_out(seed: int, epoch: int) -> int:
        (found,) = set(range(11)).difference(*make(target, dataset, seed=seed).batches.order(epoch))
        return found

    one, other = ([left_out(seed, epoch) for epoch in range(6)] for seed in (0, 1))
    assert len(set(one)) > 1 and len(set(other)) > 1 and one != other
    assert one == [left_out(0, epoch) for epoch in range(6)], "a function of seed and epoch"


def test_batches_are_of_like_lengths_in_no_order_and_padded_with_nothing(target: Target, dataset: TokenDataset) -> None:
    batches = make(target, dataset).batches
    lengths, ascending = [len(dataset[i].input_ids) for i in range(11)], 0
    for index in range(2 * batches.per_epoch):
        chosen = batches.order(index // batches.per_epoch)[index % batches.per_epoch]
        batch = batches[index]
        assert batch.input_ids.shape == batch.loss_mask.shape == (2, max(lengths[i] for i in chosen))
        for row, i in enumerate(chosen):
            example, n = dataset[i], lengths[i]
            assert int(batch.uid[row]) == example.uid
            assert torch.equal(batch.input_ids[row, :n], example.input_ids)
            assert torch.equal(batch.loss_mask[row, :n], example.loss_mask)
            assert not batch.loss_mask[row, n:].any() and not batch.input_ids[row, n:].any()
    for epoch in range(4):
        spans = [sorted(lengths[i] for i in part) for part in batches.order(epoch)]
        for one, other in itertools.pairwise(sorted(spans)):  # all of an epoch lies in one window here
            assert one[-1] <= other[0], "little of a batch is padding"
        ascending += spans == sorted(spans)
    assert ascending < 4, "the short ones do not always come first"


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({"name": "decay"}, [("decay", 4.0, {})]),
        ({"name": "decay", "gamma": 2.5}, [("decay", 2.5, {})]),
        ({"name": "l2r-focal", "gamma": 3.0, "options": {"focal": 1}}, [("l2r-focal", 3.0, {"focal": 1})]),
        ({"name": "l2r-focal"}, [("l2r-focal", 10.0, {"focal": 2.4})]),
    ],
)
def test_an_objective_has_the_decay_and_the_options_of_its_recipe(section: dict[str, Any], wanted: Any) -> None:
    config = from_dict(RunConfig, {"drafter": {"block_size": 8}, "objective": {**section, "reduction": "block"}})
    found = [b.objective for b in objectives_of(config)]
    assert [(o.name, o.gamma, o.options) for o in found] == wanted and found[0].reduction == "block"


def test_branches_share_their_options_unless_each_has_its_own() -> None:
    def found(**section: Any) -> list[tuple[str, dict[str, Any], str]]:
        config = from_dict(RunConfig, {"drafter": {"kind": "domino"}, "objective": section})
        return [(b.objective.name, dict(b.objective.options), b.support) for b in objectives_of(config)]

    three = {"name": "griffin-exclusive", "options": {"k": 3}}
    two = {"final": "griffin-exclusive", "final_options": {"k": 2}}
    assert found(**three) == [("griffin-exclusive", {"k": 3}, "base"), ("griffin-exclusive", {"k": 3}, "final")]
    assert [options["k"] for _, options, _ in found(**three, **two, support="base")] == [3, 2]
    assert found(**three, **two, support="base")[1][2] == "base"


@pytest.mark.parametrize("objective", ["auf", "l2r-focal-separate", "lk-lambda", "sampled-auf"])
def test_accumulated_micro_batches_equal_one_large_batch(target: Target, dataset: TokenDataset, objective: str) -> None:
    """(num, den) add up over micro-batches: the same four conversations in one batch or in two give the same step.

    The separately normalised focal term has a gradient buffer of its own when there are two.
    """
    large = make(target, dataset, batch_size=4, objective=objective)
    small = make(target, dataset, batch_size=2, accumulation=2, objective=objective)
    chosen = large.batches.order(0)[0]
    small.batches._epoch = (0, [chosen[:2], chosen[2:]] + [[0, 1]] * 3)
    rows = [large.step(), small.step()]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "objective", [{"name": "auf"}, {"name": "auf", "labels": "target"}, {"name": "pard2"}, {"name": "lk-alpha"}]
)
def test_cached_features_train_the_same_drafter_as_online(
    target: Target, dataset: TokenDataset, tmp_path: Path, objective: dict[str, str]
) -> None:
    config = FeaturesConfig(cache=True, dtype="float32", extras=True)
    cache = build_features(target, dataset, tmp_path, make_geometry(target).target_layer_ids, config)
    online = make(target, dataset, objective=objective)
    cached = make(target, dataset, features=cache, objective=objective)
    for _ in range(3):
        assert online.step()["loss"] == pytest.approx(cached.step()["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_bfloat16_products_give_nearly_the_same_step(target: Target, dataset: TokenDataset, kind: str) -> None:
    """Mixed precision on any device: products in bfloat16, weights and moments in float32, the gradient's direction kept."""

    def step(precision: str) -> tuple[float, torch.Tensor, Trainer]:
        trainer = make(target, dataset, kind=kind, precision=precision, clip=1e9)
        gradient = list[torch.Tensor]()
        trainer.optimizer.register_step_pre_hook(
            lambda o, *_: gradient.extend(
                p.grad.flatten() for g in o.param_groups for p in g["params"] if p.grad is not None
            )
        )
        return trainer.step()["loss"], torch.cat(gradient), trainer

    loss, gradient, _ = step("float32")
    auto, same, _ = step("auto")
    assert auto == loss and torch.equal(same, gradient), "auto is float32 on a CPU"
    mixed, near, trainer = step("bfloat16")
    assert mixed != loss and mixed == pytest.approx(loss, rel=0.02)
    assert not torch.equal(near, gradient) and torch.cosine_similarity(near, gradient, 0) > 0.99
    moments = [v for state in trainer.optimizer.state.values() for v in state.values()]
    assert {t.dtype for t in (*trainer.drafter.parameters(), *moments)} == {torch.float32}


@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_weights_are_cast_once_a_pass_however_many_stages_it_has(
    target: Target, dataset: TokenDataset, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every copy is kept for the backward pass: 0.4 GB a stage for the last layer of a drafter for Qwen3-8B."""
    monkeypatch.setattr(loop, "plan_cuts", lambda survival, *_: [*range(1, len(survival) + 1)])
    lenient = {"name": "griffin-exclusive", "options": {"k": 50}}  # so that blocks live to be read in every stage
    trainer = make(target, dataset, precision="bfloat16", kind=kind, objective=lenient)
    trainer.step()  # survival is known, and stages are planned, after it
    weights = {p.data_ptr() for p in trainer.drafter.parameters()}
    casts: Counter[int] = Counter()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if op is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                casts[args[0].data_ptr()] += 1
            return op(*args, **(kwargs or {}))

    with Casts():
        assert len(trainer.step()["cuts"]) > 3
    # W2 is read by the loss too, which is outside autocast.
    w2 = trainer.drafter.expansion.data_ptr() if isinstance(trainer.drafter, Domino) else None
    assert len(casts) > 10 and all(count == 1 for weight, count in casts.items() if weight != w2)


def test_every_step_logs_what_a_reader_needs(target: Target, dataset: TokenDataset) -> None:
    row = make(target, dataset, objective="auf").step()
    for name in ("loss", "r_active", "r_active_B", "a_support", "simulated_tau", "tokens_per_second", "head_rows"):
        assert row[name] >= 0
    assert row["common_accuracy"] >= 0, "measured on a sample where the wavefront leaves slots unread"
    assert row["head_rows"] < 4
    assert 0 < row["covered"] < 1, "the first token of an answer is no label"
    full = make(target, dataset, objective="decay").step()
    assert full["r_active"] > row["r_active"]
    assert len(row["credit"]) == len(full["credit"]) == 4 and row["credit"][0] == 1, (
        "a kept block's first slot is valid"
    )
    assert sum(row["credit"]) == pytest.approx(4 * row["r_active"]), "AUF's credit is 0 or 1"
    assert full["credit"] == sorted(full["credit"], reverse=True)


@pytest.mark.parametrize("name", [*sorted({*OBJECTIVES} - {"streak"}), "auf-decay", "dpace-decay"])
def test_every_objective_trains_and_is_remembered(
    target: Target, dataset: TokenDataset, tmp_path: Path, name: str
) -> None:
    trainer = make(target, dataset, tmp_path, objective={"name": name, "reduction": "sequence"}, max_steps=2)
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(row["reduction"] == "sequence" and row["labels"] == "data" for row in rows)
    if name != "griffin-inclusive":  # a young drafter is in its dead zone: no label is among its three best
        assert all(row["grad_norm"] > 0 for row in rows)
    extra = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["specauf"]
    assert extra["objective"] == name and extra["options"] == trainer.branches[0].objective.options
    assert extra["gamma"] == trainer.branches[0].objective.gamma


def test_target_labels_are_what_the_target_says(target: Target, dataset: TokenDataset) -> None:
    """Until it departs from the data: the block's last valid slot is where it does."""
    trainer = make(target, dataset, objective={"name": "auf", "labels": "target"})
    batch = trainer.batch(0)
    blocks = trainer.blocks_of(batch)
    assert blocks.valid.any()
    for row, n, k in blocks.valid.nonzero().tolist():
        at = int(blocks.anchors[row, n]) + k  # the position before the label
        said = target.logits(target.run(batch.input_ids[row, : at + 1][None]).final[0, -1]).argmax()
        assert blocks.labels[row, n, k] == said
        so_far = batch.input_ids[row, at - k + 1 : at + 1]
        assert torch.equal(so_far, blocks.labels[row, n, :k]), "an earlier slot departed from the data"


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"objective": {"name": "streak"}}, "specauf rollout"),
        ({"objective": {"name": "pard2"}, "features": {"cache": True}}, "features.extras=true"),
        ({"objective": {"name": "auf", "labels": "target"}, "features": {"cache": True}}, "features.extras=true"),
        ({"objective": {"name": "dpace", "options": {"alpha": 2}}}, "alpha must be in"),
        ({"objective": {"name": "dpace", "options": {"alfa": 0.5}}}, "no option 'alfa'; it takes"),
        ({"objective": {"name": "griffin-exclusive", "options": {"k": 0}}}, "k must be at least 1"),
        ({"objective": {"name": "mine", "plugin": "no_such_module"}}, "cannot import 'no_such_module'"),
        (
            {
                "drafter": {"kind": "domino"},
                "objective": {
                    "name": "soft-auf",
                    "options": {"temperature": 0.5},
                    "final": "dpace",
                    "support": "base",
                    "final_options": {"temperature": 2.0},
                },
            },
            "two objectives read one branch at different temperatures",
        ),
        ({"objective": {"name": "soft-afu", "plugin": "json"}}, "did you mean 'soft-auf'"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_before_anything_is_loaded(section: dict, told: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError, match=re.escape(told)):
        objectives_of(from_dict(RunConfig, section))


def test_calibration_leaves_no_trace(target: Target, dataset: TokenDataset) -> None:
    calibrated, plain = make(target, dataset), make(target, dataset)
    assert all(seconds > 0 for seconds in calibrate([calibrated, make(target, dataset, objective="decay")], 2, 1))
    assert calibrated.done == 0 and not calibrated.survival
    assert calibrated.step()["loss"] == plain.step()["loss"]
    assert calibrated.step()["loss"] == plain.step()["loss"]


def test_calibration_takes_trained_weights_where_they_fit(
    target: Target, dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = make(target, dataset)
    trained.run()
    end = {k: v.clone() for k, v in trained.drafter.state_dict().items()}
    trainers = [make(target, dataset), trained, make(target, dataset, kind="domino")]
    before = [{k: v.clone() for k, v in t.drafter.state_dict().items()} for t in trainers]
    began: list[bool] = []

    def step(trainer: Trainer) -> dict[str, float]:
        began.append(all(torch.equal(v, end.get(k, v)) for k, v in trainer.drafter.state_dict().items()))
        with torch.no_grad():
            trainer.drafter.fc.weight += 1
        return {"seconds": 1.0}

    monkeypatch.setattr(Trainer, "step", step)
    calibrate(trainers, 1, 0, weights=end)
    assert began == [True, True, False], "a Domino drafter has weights of its own"
    for trainer, kept in zip(trainers, before, strict=True):
        assert all(torch.equal(v, kept[k]) for k, v in trainer.drafter.state_dict().items())
    assert trained.done == 9


def test_schedule_warms_up_then_falls_to_zero() -> None:
    rates = [learning_rate(i, 100, 1.0, 0.04) for i in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and max(rates) == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 1e-3


def test_a_run_without_a_horizon_is_refused(target: Target, dataset: TokenDataset) -> None:
    with pytest.raises(ConfigError, match="horizon"):
        make(target, dataset, max_steps=None).step()


def test_a_gradient_that_is_not_finite_changes_no_weight(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    trainer = make(target, dataset, tmp_path, max_steps=3, save_every=1)
    trainer.step()
    checkpoint.save(trainer, tmp_path)
    before = copy.deepcopy(trainer.drafter.state_dict())
    trainer.drafter.fc.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(UserError, match=r"step 2: the gradient's norm is nan\. The last checkpoint stands"):
        trainer.run()
    for name, value in trainer.drafter.state_dict().items():
        assert torch.equal(value, before[name])
    assert checkpoint.resume(again := make(target, dataset, tmp_path, max_steps=3, save_every=1), tmp_path)
    assert again.done == 1


def test_resuming_with_another_objective_is_refused(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    make(target, dataset, tmp_path, max_steps=1).run()
    with pytest.raises(UserError, match="trained with another objective: "):
        checkpoint.resume(make(target, dataset, tmp_path, objective="decay"), tmp_path)


def test_what_changes_no_weight_may_change_on_the_way(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    make(target, dataset, tmp_path, max_steps=1).run()
    smaller = {"name": "auf", "logits_rows": 8}
    changed = make(
        target, dataset, tmp_path, objective=smaller, max_steps=1, common_every=5, eval_every=2, save_every=3
    )
    assert checkpoint.resume(changed, tmp_path) and changed.done == 1


def test_lines_of_the_log_that_are_not_its_own_stop_no_resume(
    target: Target, dataset: TokenDataset, tmp_path: Path
) -> None:
    make(target, dataset, tmp_path, max_steps=1).run()
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b'{"note": "mine"}\n{"step": 1, bad}\n3\n\xff\xe9\n')
    assert checkpoint.resume(make(target, dataset, tmp_path, max_steps=1), tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1]


def test_a_long_log_is_cut_back_without_being_held(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    make(target, dataset, tmp_path, max_steps=1).run()
    log, late = tmp_path / "log.jsonl", b'{"step": 2, "loss": 3.0}\n'
    kept = log.read_bytes() * 2000
    log.write_bytes(kept + late)
    again = make(target, dataset, tmp_path, max_steps=1)
    tracemalloc.start()
    checkpoint.resume(again, tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert log.read_bytes() == kept
    assert most < len(kept) / 2


def test_a_checkpoint_is_written_once_a_step_and_never_by_a_run_that_takes_none(
    target: Target, dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, save = list[int](), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda trainer, out: (saved.append(trainer.done), save(trainer, out)))
    make(target, dataset, tmp_path, max_steps=4, save_every=2).run()
    again = make(target, dataset, tmp_path, max_steps=4, save_every=2)
    assert checkpoint.resume(again, tmp_path)
    again.run()
    assert saved == [2, 4]


def test_a_local_targets_path_is_found_from_anywhere(
    target: Target, dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = copy.copy(target)
    here.name = "models"
    monkeypatch.chdir(tmp_path)
    assert checkpoint.provenance_of(make(here, dataset))["target"] == "models", "of the hub, as far as one can tell"
    (tmp_path / "models").mkdir()
    assert checkpoint.provenance_of(make(here, dataset))["target"] == str(tmp_path / "models")
    here.name = EMBEDDED
    (tmp_path / EMBEDDED).mkdir()
    assert checkpoint.provenance_of(make(here, dataset))["target"] == EMBEDDED, "which no directory hides"


def test_what_is_no_checkpoint_is_neither_resumed_nor_replaced(
    target: Target, dataset: TokenDataset, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert not checkpoint.resume(make(target, dataset, tmp_path, max_steps=1), tmp_path)
    (tmp_path / "checkpoint" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match=r"checkpoint has no state\.json to resume from"):
        checkpoint.resume(make(target, dataset, tmp_path, max_steps=1), tmp_path)


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named(target: Target, dataset: TokenDataset, tmp_path: Path, name: str) -> None:
    make(target, dataset, tmp_path, max_steps=1).run()
    path = tmp_path / "checkpoint" / name
    whole = path.read_bytes()
    for damaged in (whole[:40], whole.replace(b'"step"', b'"stop"')):
        path.write_bytes(damaged)
        if damaged != whole:
            with pytest.raises(UserError, match=r"checkpoint is damaged .* restore its files, or train with --fresh"):
                checkpoint.resume(make(target, dataset, tmp_path, max_steps=1), tmp_path)


def test_resuming_on_another_target_or_to_another_horizon_is_refused(
    target: Target, dataset: TokenDataset, tmp_path: Path
) -> None:
    make(target, dataset, tmp_path, max_steps=1).run()
    with pytest.raises(UserError, match="ends at step 1, not 2"):
        checkpoint.resume(make(target, dataset, tmp_path, max_steps=2), tmp_path)
    changed = copy.copy(target)
    changed.__dict__["_fingerprint"] = "another"
    with pytest.raises(UserError, match="trained with another target: "):
        checkpoint.resume(make(changed, dataset, tmp_path, max_steps=1), tmp_path)


def test_resuming_on_other_features_is_refused(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    cache = build_features(target, dataset, tmp_path, make_geometry(target).target_layer_ids, FeaturesConfig())
    make(target, dataset, tmp_path, max_steps=1).run()
    with pytest.raises(UserError, match="trained with another features: "):
        checkpoint.resume(make(target, dataset, tmp_path, cache, max_steps=1), tmp_path)


def test_a_checkpoint_that_finds_the_disk_full_does_not_end_the_training(
    target: Target, dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    trainer, save, left = make(target, dataset, tmp_path, max_steps=3, save_every=1), checkpoint.save, [28, 5]

    def failing(trainer: Trainer, out: Path) -> None:
        if left:
            raise OSError(left.pop(0), "No room")
        save(trainer, out)

    monkeypatch.setattr(checkpoint, "save", failing)
    with pytest.raises(OSError, match="No room"):  # the second is no full disk
        trainer.run()
    assert trainer.done == 2 and "step 1 is not saved: No room" in caplog.text
    trainer.run()
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 3


def test_too_few_conversations_is_a_clear_error(target: Target, dataset: TokenDataset) -> None:
    with pytest.raises(UserError, match="fewer than"):
        make(target, dataset, batch_size=12)


def test_checkpoints_say_how_they_were_trained(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    make(target, dataset, tmp_path, max_steps=1).run()
    extra = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["specauf"]
    assert (
        extra["objective"] == "auf"
        and extra["reduction"] == "global"
        and extra["labels"] == "data"
        and extra["template_hash"] == "abc"
    )
    assert extra["enable_thinking"] is False and extra["target_fingerprint"] == target.fingerprint()
    assert (extra["steps"], extra["max_steps"], extra["epochs"]) == (1, 1, 0.2), "one of an epoch's five batches"


@pytest.fixture
def foreground() -> Iterator[None]:
    """As on a terminal: a shell starts what runs in its background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_run_after_a_whole_step(
    target: Target, dataset: TokenDataset, tmp_path: Path, sent: signal.Signals
) -> None:
    before = signal.getsignal(sent)
    trainer = make(target, dataset, tmp_path, max_steps=4)
    take = trainer.step

    def interrupted() -> dict[str, Any]:
        if trainer.done == 1:
            signal.raise_signal(sent)
        return take()

    trainer.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run(evaluate=lambda drafter: {"replay_tau": 1.0})
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    again = make(target, dataset, tmp_path, max_steps=4)
    assert checkpoint.resume(again, tmp_path) and again.done == 2
    assert signal.getsignal(sent) is before


@pytest.mark.usefixtures("foreground")
def test_a_second_ctrl_c_saves_nothing(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    trainer = make(target, dataset, tmp_path, max_steps=4)

    def twice() -> dict[str, Any]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one is not waited for")

    trainer.step = twice  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not (tmp_path / "checkpoint").exists()


def test_the_log_of_a_run_that_left_no_checkpoint_begins_anew(
    target: Target, dataset: TokenDataset, tmp_path: Path
) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    make(target, dataset, tmp_path, max_steps=2).run()
    assert (tmp_path / "log.jsonl.before").read_text() == '{"step": 1}\n{"st'
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    make(target, dataset, tmp_path, max_steps=1).run()
    assert (tmp_path / "log.jsonl.before").read_text() == '{"step": 1}\n{"st', "what was set aside first stays"


PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from specauf.objective import register

@dataclass(frozen=True)
class Options:
    k: int = 3

@register("mine-too")
def mine_too(slots):
    return torch.ones_like(slots.valid, dtype=torch.float32)
"""


def test_a_plugin_is_the_one_that_was_imported_whatever_becomes_of_its_file(
    target: Target, dataset: TokenDataset, tmp_path: Path
) -> None:
    file, objective = tmp_path / "mine.py", {"name": "mine-too", "plugin": str(tmp_path / "mine.py")}
    file.write_text(PLUGIN)
    trainer = make(target, dataset, tmp_path, objective=objective)
    trainer.step()
    file.write_text(PLUGIN.replace("torch.ones_like", "2 * torch.ones_like"))
    checkpoint.save(trainer, tmp_path)
    del RULES["mine-too"]  # as another process would begin
    edited = make(target, dataset, tmp_path, objective=objective)
    with pytest.raises(UserError, match="another objective"):
        checkpoint.resume(edited, tmp_path)
    file.write_text(PLUGIN)
    del RULES["mine-too"]
    assert checkpoint.resume(make(target, dataset, tmp_path, objective=objective), tmp_path)
    del RULES["mine-too"]


def test_a_step_whose_labels_are_all_outside_a_draft_vocabulary_changes_nothing_and_goes_on(
    target: Target, dataset: TokenDataset
) -> None:
    config = make(target, dataset, batch_size=1, num_anchors=1, max_steps=60).config
    drafter = build_drafter(make_geometry(target, layers=1, draft_vocab_size=40))
    draft_vocabulary(drafter, target, dataset)
    trainer = Trainer(config, drafter, target, Batches(dataset, None, config.train))
    rows = [trainer.step() for _ in range(60)]
    assert any(row["grad_norm"] == 0 for row in rows) and any(row["grad_norm"] > 0 for row in rows)


def test_a_full_disk_ends_neither_the_log_nor_the_training(
    target: Target, dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Journal.write, 0

    def full(self: Journal, line: str) -> None:
        nonlocal calls
        calls += 1
        file = self._file
        if calls in (2, 3):
            self._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
        write(self, line)
        self._file = file

    monkeypatch.setattr(Journal, "write", full)
    make(target, dataset, tmp_path, max_steps=5).run()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5] and calls == 5


def test_two_branches_add_up_over_micro_batches_under_the_share_of_each(target: Target, dataset: TokenDataset) -> None:
    mixed = {"variant": "f-auf-d", "lambda_base_start": 0.3}
    large = make(target, dataset, kind="domino", objective=mixed, batch_size=4)
    small = make(target, dataset, kind="domino", objective=mixed, batch_size=2, accumulation=2)
    chosen = large.batches.order(0)[0]
    small.batches._epoch = (0, [chosen[:2], chosen[2:]] + [[0, 1]] * 3)
    one, other = large.step(), small.step()
    for key in ("loss", "base_loss", "final_loss", "lambda_base"):
        assert one[key] == pytest.approx(other[key], rel=1e-5), key
    assert one["lambda_base"] == 0.3, "the first step has the whole share"
    assert one["loss"] == pytest.approx(0.3 * one["base_loss"] + 0.7 * one["final_loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_branch_that_is_out_costs_no_backward_pass(
    target: Target, dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = {
        "variant": "f-auf-d",
        "lambda_base_decay_ratio": 0.0,
    }  # lambda is 1 at the first step: the final branch is out
    mixed = make(target, dataset, kind="domino", objective=out, batch_size=4)
    apart = make(target, dataset, kind="domino", objective=out, batch_size=2, accumulation=2)
    chosen = mixed.batches.order(0)[0]
    apart.batches._epoch = (0, [chosen[:2], chosen[2:]] + [[0, 1]] * 3)
    passes, backward = 0, torch.Tensor.backward

    def counted(self: torch.Tensor, *given: Any, **options: Any) -> None:
        nonlocal passes
        passes += 1
        backward(self, *given, **options)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    rows = [mixed.step(), apart.step()]
    assert passes == 1 + 2
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)
    assert len(apart.optimizer.state) == len(list(apart.drafter.parameters()))


def test_figures_of_a_shifted_drafter_are_of_the_predictions_that_are_served(
    target: Target, dataset: TokenDataset
) -> None:
    """Its last slot is trained and in the loss. Decoding never uses it, so no figure of the log counts it."""
    trainer = make(target, dataset, kind="domino", objective={"variant": "decay-only"})
    valid = trainer.blocks_of(trainer.batch(0)).valid
    assert valid.shape[-1] == trainer.drafter.config.num_trained == 5

    def active(slots: int) -> float:
        return float(valid[..., :slots].sum() / (slots * valid[..., :slots].any(-1).sum()))

    row = trainer.step()
    assert active(4) != active(5) and row["r_active"] == row["base_r_active"] == pytest.approx(active(4))
    assert row["simulated_tau"] <= 5 and len(row["credit"]) == 4 and len(row["first_error"]) == 5


def test_a_step_is_adamws_on_the_clipped_gradient(target: Target, dataset: TokenDataset) -> None:
    """By hand: at the first step both moments, corrected, are the gradient's own."""
    trainer = make(target, dataset, lr=1e-2, clip=0.1, weight_decay=0.3, warmup=0.0)
    before = [p.detach().clone() for p in trainer.drafter.parameters()]
    row = trainer.step()
    grads = [p.grad for p in trainer.drafter.parameters()]
    assert row["clipped"] and row["grad_norm"] > 0.1 and row["lr"] == 1e-2
    assert float(torch.cat([g.flatten() for g in grads]).norm()) == pytest.approx(0.1, rel=1e-4)  # type: ignore[union-attr]
    for now, was, grad in zip(trainer.drafter.parameters(), before, grads, strict=True):
        want = was * (1 - 1e-2 * 0.3) - 1e-2 * grad / (grad.abs() + 1e-8)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(now.detach(), want, rtol=1e-4, atol=1e-5)
    later = trainer.step()
    assert later["lr"] < 1e-2 and trainer.optimizer.param_groups[0]["lr"] == later["lr"]
    free = make(target, dataset, lr=1e-2, clip=1e6, warmup=0.0).step()
    assert not free["clipped"] and free["grad_norm"] == row["grad_norm"]
