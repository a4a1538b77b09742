from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from specauf import config
from specauf.config import (
    DataConfig,
    DrafterConfig,
    EvalConfig,
    ObjectiveConfig,
    RunConfig,
    SamplingConfig,
    TargetConfig,
    TrainConfig,
    digest,
    dump,
    load,
    override,
)
from specauf.strict import ConfigError, UserError, from_dict, read_yaml, to_dict


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_key_of_a_recipe_has_its_meaning_below_it() -> None:
    tree = ast.parse(Path(inspect.getfile(RunConfig)).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    sections = {node.name for node in classes}
    silent = [
        f"{node.name}.{ast.unparse(field.target)}"
        for node in classes
        for field, below in pairwise([*node.body, ast.Pass()])
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) not in sections
        if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant))
    ]
    assert len(sections) == 10 and not silent


def test_an_output_directory_may_be_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert override(RunConfig(), ["out=~/runs/x"]).out == "/home/me/runs/x"
    with pytest.raises(UserError, match="the home directory is not known"):
        override(RunConfig(), ["out=~nosuch/x"])


@pytest.mark.parametrize("text", ["runs #3", "2026-11-29", "12", "no", "0x_", "null"])
def test_an_override_takes_text_as_it_is(text: str) -> None:
    assert override(RunConfig(), [f"out={text}"]).out == override(RunConfig(), [f"out='{text}'"]).out == text
    assert override(RunConfig(), [f"drafter.init_from={text}"]).drafter.init_from == (text if text != "null" else None)


@pytest.mark.parametrize("start", ["runs/a/checkpoint", "runs/b/../a/checkpoint.before"])
def test_a_run_does_not_begin_with_what_it_writes_over(start: str) -> None:
    with pytest.raises(ConfigError, match=r"init_from: .* is what this run writes over"):
        override(RunConfig(), ["out=runs/a", f"drafter.init_from={start}"])
    assert override(RunConfig(), ["out=runs/ab", f"drafter.init_from={start}"]).drafter.init_from == start


runs = st.builds(
    RunConfig,
    out=st.text(st.characters(codec="utf-8", exclude_characters="~"), min_size=1, max_size=8),
    target=st.builds(TargetConfig, dtype=st.sampled_from(["float32", "bfloat16", "float16"])),
    data=st.builds(DataConfig, heldout=st.floats(0, 0.99), max_conversations=st.none() | st.integers(1, 10**6)),
    drafter=st.builds(
        DrafterConfig,
        block_size=st.integers(2, 64),
        target_layer_ids=st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=5).map(tuple),
    ),
    objective=st.builds(ObjectiveConfig, name=st.sampled_from(config.OBJECTIVES))
    | st.builds(
        ObjectiveConfig,
        name=st.sampled_from([*config.OWN_DECAY, "auf-decay"]),
        gamma=st.none() | st.floats(1e-9, 1e9),
        labels=st.sampled_from(["data", "target"]),
        options=st.dictionaries(
            st.sampled_from(["eta", "per"]), st.floats(0, 9) | st.sampled_from(["slot"]), max_size=2
        ),
    ),
    train=st.builds(TrainConfig, lr=st.floats(1e-12, 1.0), minutes=st.none() | st.floats(1e-3, 1e6)),
    eval=st.builds(
        EvalConfig,
        tasks=st.lists(st.sampled_from(["humaneval", "heldout", "no", "1"]), min_size=1, max_size=3).map(tuple),
        sampling=st.builds(SamplingConfig, temperature=st.floats(0, 10), top_p=st.floats(0.01, 1)),
    ),
)


@given(runs)
def test_a_configuration_survives_yaml(run: RunConfig) -> None:
    assert from_dict(RunConfig, yaml.safe_load(dump(run))) == run


@given(runs, runs)
def test_digests_agree_exactly_when_configurations_do(one: RunConfig, other: RunConfig) -> None:
    assert (digest(one) == digest(other)) == (one == other)


def test_a_digest_is_twelve_hex_digits_and_that_of_the_plain_mapping() -> None:
    value = digest(RunConfig())
    assert len(value) == 12 and int(value, 16) >= 0
    assert digest(to_dict(RunConfig())) == value


def test_a_digest_ignores_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_dump_writes_every_field() -> None:
    def names(kind: type[Any]) -> dict[str, Any]:
        values = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
        return {k: names(type(v)) if dataclasses.is_dataclass(v) else None for k, v in values.items()}

    def keys(tree: Any) -> dict[str, Any]:
        return {k: keys(v) if isinstance(v, dict) and v else None for k, v in tree.items()}

    assert keys(yaml.safe_load(dump(RunConfig()))) == names(RunConfig)


def test_an_empty_recipe_is_the_default(tmp_path: Path) -> None:
    assert load(write(tmp_path / "r.yaml", "")) == RunConfig()


def test_sections_left_out_or_empty_keep_their_defaults(tmp_path: Path) -> None:
    run = load(write(tmp_path / "r.yaml", "drafter: {block_size: 16}\ntrain:\n"))
    assert run == RunConfig(drafter=DrafterConfig(block_size=16))


def test_what_is_merged_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("out: x\ndrafter: {<<: {block_size: 4, num_taps: 2}, block_size: 8}\n")
    found = load(path)
    assert (found.drafter.block_size, found.drafter.num_taps) == (8, 2)
    path.write_text("x: {inner: &b {<<: {p: 1}, p: 2}}\nc: {<<: *b, q: 3}\n")
    assert read_yaml(path, "", "")["c"] == {"p": 2, "q": 3}
    path.write_text("a: &a {lr: 1}\nb: &b {lr: 2}\nc: {<<: [*a, *b]}\n")
    assert read_yaml(path, "", "")["c"] == {"lr": 1}, "the earlier one wins"
    path.write_text("x: {inner: {p: 1, p: 2}}\n")
    with pytest.raises(ConfigError, match="the key 'p' is given twice"):
        read_yaml(path, "", "")


def test_an_override_wins_over_the_recipe_and_leaves_the_rest(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "train: {lr: 1e-3, seed: 5}\n")
    run = load(recipe, ["train.lr=6e-4", "eval.sampling.temperature=1", "drafter.target_layer_ids=[1, 5]", "out=x"])
    assert (run.train.lr, run.train.seed, run.out) == (6e-4, 5, "x")
    assert (run.eval.sampling.temperature, run.drafter.target_layer_ids) == (1.0, (1, 5))


def test_an_override_sets_an_option_of_the_objective() -> None:
    run = override(RunConfig(), ["objective.name=dpace", "objective.options.alpha=0.3"])
    assert run.objective.options == {"alpha": 0.3}
    both = ["drafter.kind=domino", "objective.final=first-k", "objective.final_options={k: 3}"]
    assert override(RunConfig(), both).objective.final_options == {"k": 3}


def test_the_last_of_two_overrides_wins() -> None:
    assert override(RunConfig(), ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_an_override_can_unset_what_may_be_unset() -> None:
    run = RunConfig(train=TrainConfig(max_steps=5))
    assert override(run, ["train.max_steps=null"]).train.max_steps is None


def test_no_override_is_no_change() -> None:
    run = RunConfig(train=TrainConfig(seed=9))
    assert override(run, []) == run


@pytest.mark.parametrize("text", ["6e-4", "0.0006", "6.0e-4", "'6e-4'"])
def test_yaml_1_1_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path / "r.yaml", f"train: {{lr: {text}}}")).train.lr == 6e-4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {lrr: 1}", ["r.yaml.train", "'lrr'", "'lr'"]),
        ("trian: {}", ["r.yaml", "'trian'", "'train'"]),
        ("eval: {sampling: {topp: 1}}", ["r.yaml.eval.sampling", "'topp'", "'top_p'"]),
        ("objective: {name: aff}", ["r.yaml.objective", "'aff'", "'auf'", "griffin-exclusive", "<name>-decay"]),
        ("objective: {name: auf, gamma: 3}", ["r.yaml.objective", "takes no gamma", "'auf-decay'"]),
        ("objective: {name: lk-alpha-decay}", ["r.yaml.objective", "has a position decay already"]),
        ("objective: {labels: targets}", ["r.yaml.objective", "'target'"]),
        ("objective: {options: [1]}", ["r.yaml.objective.options", "expected a mapping"]),
        ("target: {dtype: bf16}", ["r.yaml.target.dtype", "'bf16'", "'bfloat16'"]),
        ("drafter: {target_layer_ids: [1, x]}", ["r.yaml.drafter.target_layer_ids[1]", "expected int", "'x'"]),
        ("drafter: {target_layer_ids: 3}", ["r.yaml.drafter.target_layer_ids", "expected a list", "write [3]"]),
        ("drafter: {shift_label: false}", ["drafter.shift_label", "set drafter.kind=domino"]),
        ("drafter: {kind: domino, block_size: 2}", ["pure_draft_prefix_len leaves", "no prediction"]),
        ("drafter: {kind: domino, pure_draft_prefix_len: 7}", ["pure_draft_prefix_len leaves", "no prediction"]),
        ("objective: {lambda_base_start: 0.5}", ["objective.lambda_base_start", "set drafter.kind=domino"]),
        ("objective: {variant: b-auf, support: base}", ["leave out objective.support"]),
        ("objective: {final_options: {k: 1}}", ["objective.final_options needs objective.final"]),
        ("train: [1]", ["r.yaml.train", "expected a mapping"]),
        ("[1, 2]", ["r.yaml", "expected a mapping"]),
        ("a: [", ["r.yaml", "not YAML"]),
        ("out: 2026-02-30", ["r.yaml", "not YAML", "day is out of range"]),
        ("[" * 5000, ["r.yaml", "not YAML", "nested too deeply"]),
        ("out: ''", ["out is empty"]),
        ("eval: {tasks: []}", ["eval.tasks is empty: write [heldout]"]),
    ],
)
def test_a_mistake_is_located_and_the_nearest_valid_name_given(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "r.yaml", text))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "train: {seed: 1.5}",
        "train: {seed: true}",
        "train: {seed: '1'}",
        "train: {seed: null}",
        "train: {lr: true}",
        "train: {lr: fast}",
        "out: 3",
        "features: {cache: 1}",
        "features: {cache: 'yes'}",
        "target: {trust_remote_code: null}",
        "eval: {tasks: humaneval}",
    ],
)
def test_a_value_of_another_type_is_refused_and_not_cast(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        load(write(tmp_path / "r.yaml", text))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "max_length", 15),
        ("data", "heldout", 1.0),
        ("data", "heldout", -0.1),
        ("data", "max_conversations", 0),
        ("drafter", "block_size", 1),
        ("drafter", "num_hidden_layers", 0),
        ("drafter", "num_taps", 0),
        ("objective", "name", "nll"),
        ("objective", "reduction", "token"),
        ("objective", "gamma", 0.0),
        ("objective", "gamma", float("nan")),
        ("objective", "logits_rows", 0),
        ("train", "batch_size", 0),
        ("train", "accumulation", 0),
        ("train", "num_anchors", 0),
        ("train", "save_every", 0),
        ("train", "common_every", 0),
        ("train", "eval_every", -1),
        ("train", "max_steps", 0),
        ("train", "minutes", 0.0),
        ("train", "lr", 0.0),
        ("train", "lr", float("nan")),
        ("train", "warmup", 1.0),
        ("eval", "prompts", 0),
        ("eval", "max_new_tokens", 0),
        ("eval", "max_new_tokens", 99999999999),
        ("eval", "batch_size", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(section: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key if key != "name" else "objective"):
        from_dict(RunConfig, {section: {key: value}})


@pytest.mark.parametrize(
    "values",
    [
        *({"temperature": -1}, {"temperature": math.inf}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}),
        *({"repetition_penalty": math.inf}, {"seed": -(2**63) - 1}, {"seed": 2**63}),
    ],
)
def test_sampling_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        SamplingConfig(**values)


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("train.lr", "section.key=value"),
        ("trian.lr=1", "'train'"),
        ("train.lr.x=1", "'train.lr'"),
        ("train.lrr=1", "'lr'"),
        ("train.lr=[", "'train.lr=['"),
        ("train.lr=2026-02-30", "day is out of range"),
        ("train.lr=0x_", "'train.lr=0x_'"),
        ("train.lr=" + "[" * 5000, "nested too deeply"),
        ("train={lr: 1}", "'train' is a section"),
    ],
)
def test_a_wrong_override_says_what_is_wrong_with_it(item: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(RunConfig(), [item])
    assert part in str(caught.value)


def test_a_missing_recipe_is_a_user_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "gamma", "block_size", "expected"),
    [
        ("l2r-focal", 3.0, 8, 3.0),
        ("decay", None, 8, 4.0),
        ("decay", None, 16, 7.0),
        ("decay", None, 10, 5.0),
        ("auf-decay", 0.5, 16, 0.5),
    ],
)
def test_decay_follows_the_objective_then_gamma_then_the_block_size(
    name: str, gamma: float | None, block_size: int, expected: float
) -> None:
    assert ObjectiveConfig(name=name, gamma=gamma).decay_for(block_size) == expected


@given(st.integers(2, 256))
def test_every_block_size_has_a_decay(block_size: int) -> None:
    gamma = ObjectiveConfig(name="decay").decay_for(block_size)
    assert gamma is not None and 1.0 <= gamma <= block_size


def test_no_torch_is_imported() -> None:
    code = "import sys, specauf.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
