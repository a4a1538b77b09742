"""Tasks are what their source says: wording, order, number, licence; a mistake in a file names its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specauf.bench import tasks
from specauf.bench.tasks import HUB, TASKS, describe_task, load_task, task_texts
from specauf.strict import ConfigError, UserError

SHARED = Path(__file__).parents[3].parent / "shared" / "benchmarks"
REASON = "\nPlease reason step by step, and put your final answer within \\boxed{}."
ROWS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "gsm8k": ({"question": "2 + {2}?", "answer": "#### 4"}, "gsm8k/0", [f"2 + {{2}}?{REASON}"]),
    "math500": ({"problem": "$x$", "answer": "1", "unique_id": "test/a/1.json"}, "test/a/1.json", [f"$x${REASON}"]),
    "mbpp": ({"task_id": 11, "prompt": "Write f.", "test_list": ["assert f()"]}, "mbpp/11", ["Write f."]),
    "mtbench": ({"question_id": 81, "prompt": ["Write.", "Rewrite."]}, "mtbench/81", ["Write.", "Rewrite."]),
    "alpaca": ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "alpaca/0", ["Add.\n\nInput:\n1, 2"]),
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return path


def asked(prompt: tasks.BenchPrompt) -> list[str]:
    return [*(m["content"] for m in prompt.messages), *prompt.later]


def test_the_table_is_complete() -> None:
    assert {name: task.count for name, task in TASKS.items() if name != "heldout"} == {
        "gsm8k": 200,
        "math500": 200,
        "humaneval": 164,
        "mbpp": 200,
        "mtbench": 80,
        "alpaca": 200,
    }
    assert {task.family for task in TASKS.values()} == {"MATH", "CODE", "CHAT"}
    assert all(task.label and task.source and task.licence and task.format for task in TASKS.values())
    assert HUB.keys() == TASKS.keys() - {"humaneval", "heldout"} == ROWS.keys()
    for name, source in HUB.items():
        assert TASKS[name].source.startswith(source.repo) and len(source.revision) == 40


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_hub_becomes_a_prompt_in_the_fields_wording(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, identity, turns = ROWS[name]
    monkeypatch.setattr(tasks, "download", lambda name, source: write(tmp_path / Path(source.path).name, [row]))
    (prompt,) = load_task(name)
    assert (prompt.id, asked(prompt)) == (identity, turns)
    monkeypatch.setattr(tasks, "download", lambda name, source: write(tmp_path / "other.jsonl", [{"x": 1}]))
    with pytest.raises(UserError, match=f"rows of {HUB[name].repo}"):
        load_task(name)


def test_parquet_is_read_and_the_table_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"instruction": f"do {i}", "input": ""} for i in range(230)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    monkeypatch.setattr(tasks, "download", lambda name, source: tmp_path / "train.parquet")
    assert [asked(p) for p in load_task("alpaca")] == [[f"do {i}"] for i in range(200)]


def test_a_file_called_heldout_is_not_the_corpus_own(tmp_path: Path) -> None:
    write(tmp_path / "heldout.jsonl", [{"id": "a", "turns": ["What is two plus two?"]}])
    with pytest.raises(UserError, match="'heldout' needs prepared data"):
        load_task("heldout", tasks_dir=str(tmp_path))


def test_a_hub_out_of_reach_points_to_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> str:
        asked.update(options)
        raise ConnectionError("no route\nand a traceback")

    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    for offline, told in (("0", "no route"), ("1", "it is not on disk, and SPECAUF_OFFLINE forbids .*")):
        monkeypatch.setenv("SPECAUF_OFFLINE", offline)
        with pytest.raises(UserError, match=rf"openai/gsm8k: {told}\)\. .* eval\.tasks_dir .* gsm8k\.jsonl"):
            load_task("gsm8k")
    assert asked == {"repo_type": "dataset", "revision": HUB["gsm8k"].revision, "local_files_only": True}


def test_a_directory_goes_first_and_its_manifest_says_what_the_files_are(tmp_path: Path) -> None:
    for name, count in {"alpaca": 210, "mtbench": 81, "gsm8k": 2, "own": 300}.items():
        write(tmp_path / f"{name}.jsonl", [{"id": f"{name}/{i}", "turns": ["a", "b"]} for i in range(count)])
    here = str(tmp_path)
    found = {name: load_task(name, tasks_dir=here) for name in ("alpaca", "mtbench", "own")}
    assert {name: len(prompts) for name, prompts in found.items()} == {"alpaca": 200, "mtbench": 80, "own": 300}
    assert found["mtbench"][0] == ("mtbench/0", [{"role": "user", "content": "a"}], ("b",))

    unknown = describe_task("alpaca", tasks_dir=here)
    assert (unknown.label, unknown.family, unknown.source) == ("alpaca", "CHAT", "the file alpaca.jsonl")
    assert unknown.licence == "not stated" and describe_task("own", tasks_dir=here).family == "OTHER"
    manifest = [
        {"name": "alpaca", "source": "tatsu-lab/alpaca_farm", "commit": "30717ddae735365d", "licence": "CC-BY-NC-4.0"},
        {"name": "gsm8k", "source": "openai/grade-school-math", "commit": None, "licence": "MIT", "note": "first 2"},
        {"name": "own", "label": "Own", "family": "MATH", "source": "me", "licence": "mine"},
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    alpaca, gsm8k, own = (describe_task(name, tasks_dir=here) for name in ("alpaca", "gsm8k", "own"))
    assert (alpaca.label, alpaca.licence) == ("AlpacaFarm eval", "CC-BY-NC-4.0")
    assert alpaca.source == "tatsu-lab/alpaca_farm@30717ddae735"
    assert (gsm8k.label, gsm8k.source, gsm8k.note) == ("GSM8K", "openai/grade-school-math", "first 2")
    assert (own.label, own.family, own.count) == ("Own", "MATH", None)
    assert describe_task("mbpp", tasks_dir=here) == TASKS["mbpp"]


def test_a_manifest_that_is_none_is_named(tmp_path: Path) -> None:
    write(tmp_path / "own.jsonl", [{"id": "1", "turns": ["a"]}])
    for text in ("{", '[{"source": "x"}]', "[3]", "[" * 10**5):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: expected a list"):
            describe_task("own", tasks_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": "x", "turns": ["a"', "delimiter"),
        ('{"id": "x"}', "no 'turns'"),
        ('{"id": 7, "turns": ["a"]}', "id is not a text"),
        ('{"id": "x", "turns": []}', "turns is not a list of texts"),
        ('{"id": "x", "turns": "a"}', "turns is not a list of texts"),
        ('{"id": "x", "turns": ["a", " "]}', "turns is not a list of texts"),
        ('{"id": "1", "turns": ["a"]}', "'1' was there before"),
        ("[1]", "list indices"),
        ("[" * 10**5, "recursion"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    good = '{"id": "1", "turns": ["one \u2028 line"]}'
    (tmp_path / "own.jsonl").write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"own\.jsonl, line 3: .*{told}"):
        load_task("own", tasks_dir=str(tmp_path))


def test_a_directory_or_a_task_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"own\.jsonl holds no prompts"):
        load_task("own", tasks_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"eval\.tasks_dir: no such directory"):
        load_task("own", tasks_dir=str(tmp_path / "nowhere"))
    for of in (load_task, describe_task):
        with pytest.raises(ConfigError, match=r"unknown task 'gsm9k'; did you mean 'gsm8k'\? .*\bown\b"):
            of("gsm9k", tasks_dir=str(tmp_path))


def test_damaged_held_out_prompts_are_named(tmp_path: Path) -> None:
    for text in ('[{"id": "1"', '[{"id": "1"}]', "[3]"):
        (tmp_path / "heldout.json").write_text(text)
        with pytest.raises(UserError, match=r"heldout\.json is damaged"):
            load_task("heldout", data_dir=tmp_path)


def test_every_turn_is_kept_out_of_the_training_data(tmp_path: Path) -> None:
    records = [
        {"id": "1", "turns": ["first", "do\n```python\nx = 1\n```", "third"]},
        {"id": "2", "turns": [f"2 + 2?{REASON}"]},
    ]
    write(tmp_path / "own.jsonl", records)
    texts = task_texts(["own", "heldout"], str(tmp_path))
    code = "do\n```python\nx = 1\n```"
    assert sorted(texts) == sorted(["first", code, "third", f"2 + 2?{REASON}", "2 + 2?\n", "x = 1\n"])


@pytest.mark.skipif(
    not SHARED.is_dir(),
    reason="compares with copies of the six benchmarks, which are not shipped with this repository",
)
def test_the_six_benchmarks_of_a_directory_are_worded_as_the_hub_is_read() -> None:
    here, six = str(SHARED), [name for name in TASKS if name != "heldout"]
    found = {name: load_task(name, tasks_dir=here) for name in six}
    assert {name: len(prompts) for name, prompts in found.items()} == {name: TASKS[name].count for name in six}
    assert {len(p.later) for p in found["mtbench"]} == {1}
    assert describe_task("alpaca", tasks_dir=here).label == "AlpacaFarm eval"
    assert all(describe_task(name, tasks_dir=here).licence != "not stated" for name in six)
    for name, column in {"gsm8k": "question", "math500": "problem"}.items():
        for line in (SHARED / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert HUB[name].turns({column: record["question"]}) == record["turns"]
