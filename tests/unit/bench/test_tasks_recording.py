"""A recorded conversation is what the target would see and say, whatever is cut, batched, killed or replayed with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import CHATML, make_geometry, make_talker, make_target

from specauf.bench import compare
from specauf.bench.runner import Recorded, comparison, measure, recorded
from specauf.bench.tasks import BenchPrompt, load_task, render_prompts
from specauf.config import EvalConfig, SamplingConfig
from specauf.data.chat import TemplateRefused, prompt_ids
from specauf.decode import replay as replaying
from specauf.decode.generate import generate
from specauf.decode.propose import DrafterProposer, LookupFirst, PromptLookup
from specauf.decode.replay import Dialogue, Trajectory, record, replay, trajectory_features
from specauf.decode.select import Selection
from specauf.drafter.checkpoint import build_drafter
from specauf.drafter.dflash import DFlash
from specauf.files import json_text
from specauf.strict import UserError
from specauf.target import Target

LIMIT, BLOCK = 8, 4
TURNS = (("the quick fox?", "and the dog"), ("question",), ("why lazy", "0123", "brown café"), ("user 17", "x\n  y"))
PLAN = EvalConfig(max_new_tokens=LIMIT, batch_size=2)


@pytest.fixture(scope="module")
def talker(make_tokenizer: Any) -> Target:
    return make_talker(make_tokenizer(), layers=4, seed=2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> list[BenchPrompt]:
    directory = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"id": f"own/{i}", "turns": turns}) for i, turns in enumerate(TURNS)]
    (directory / "own.jsonl").write_text("\n".join(lines))
    return load_task("own", tasks_dir=str(directory))


@pytest.fixture
def dialogues(talker: Target, bench: list[BenchPrompt]) -> list[Dialogue]:
    return render_prompts(talker, bench, enable_thinking=False)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of prompts whenever the recording decodes."""
    told: list[int] = []

    def counted(target: Target, proposer: Any, prompts: Any, **options: Any) -> Any:
        told.append(len(prompts))
        return generate(target, proposer, prompts, **options)

    monkeypatch.setattr(replaying, "generate", counted)
    return told


def say(target: Target, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache, up to EOS."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[len(prompt) :][-1:] != [target.tokenizer.eos_token_id]:  # type: ignore[union-attr]
        ids.append(int(target.logits(target.run(torch.tensor([ids])).final[0, -1]).argmax()))
    return ids[len(prompt) :]


def test_every_turn_is_the_targets_own_conversation_token_for_token(
    talker: Target, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    def ids(text: str) -> list[int]:
        return list(talker.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[misc]

    end = talker.tokenizer.eos_token_id  # type: ignore[union-attr]
    want, ends = [], set()
    for number, turns in enumerate(TURNS):
        prompt = ids(f"<|im_start|>user\n{turns[0]}<|im_end|>\n<|im_start|>assistant\n")
        for turn in range(len(turns)):
            tokens = say(talker, prompt, LIMIT + BLOCK - 1)
            name = f"own/{number}#{turn + 1}" if len(turns) > 1 else f"own/{number}"
            want.append((name, prompt, tokens, tokens[-1] == end))
            if turn + 1 < len(turns):
                answer = tokens[:LIMIT]
                ends.add("whole" if end in answer else "cut before its end" if end in tokens else "cut")
                answer = answer if end in answer else [*answer, end]
                said = f"\n<|im_start|>user\n{turns[turn + 1]}<|im_end|>\n<|im_start|>assistant\n"
                prompt = prompt + answer + ids(said)
    assert ends == {"whole", "cut before its end", "cut"}, "all must occur for this to prove anything"
    found = recorded(talker, "own", dialogues, PLAN, BLOCK, tmp_path)
    assert [(t.id, t.prompt, t.tokens, t.ended) for t in found.trajectories] == want
    assert found.clusters == [0, 0, 1, 2, 2, 2, 3, 3]


def test_a_template_that_changes_what_it_rendered_is_rendered_anew(
    talker: Target, make_tokenizer: Callable[..., Any], bench: list[BenchPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\nuser ' }}")
    assert thinking != CHATML
    tokenizer = make_tokenizer(thinking)
    monkeypatch.setattr(talker, "tokenizer", tokenizer)
    dialogues = render_prompts(talker, bench[:1], enable_thinking=False)
    first, second = record(talker, dialogues, limit=LIMIT, block_size=BLOCK, sampling=SamplingConfig())
    answer = [t for t in first.tokens[:LIMIT] if t != tokenizer.eos_token_id]
    turns = [*bench[0].messages, {"role": "assistant", "content": tokenizer.decode(answer)}]
    turns.append({"role": "user", "content": TURNS[0][1]})
    assert second.prompt == prompt_ids(tokenizer, turns, False)

    refusing = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    monkeypatch.setattr(talker, "tokenizer", make_tokenizer(refusing))
    with pytest.raises(UserError, match=r"own/0: the chat template refuses turn 2: one turn only"):
        record(talker, dialogues, limit=LIMIT, block_size=BLOCK, sampling=SamplingConfig())


def test_samples_do_not_depend_on_the_batch(talker: Target, dialogues: list[Dialogue]) -> None:
    def sampled(size: int) -> list[Any]:
        return record(talker, dialogues, limit=LIMIT, block_size=BLOCK, sampling=SamplingConfig(1.0), batch_size=size)

    assert sampled(1) == sampled(3)
    assert sampled(3) != record(talker, dialogues, limit=LIMIT, block_size=BLOCK, sampling=SamplingConfig(1.0, seed=1))


def test_every_answer_is_drawn_with_numbers_of_its_own(
    talker: Target, dialogues: list[Dialogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A position is passed twice: by what is recorded beyond the limit, and by the next turn."""
    drawn: list[list[int]] = []

    def told(target: Target, proposer: Any, prompts: Any, *, uids: list[int], **options: Any) -> Any:
        drawn.append(uids)
        return generate(target, proposer, prompts, uids=uids, **options)

    monkeypatch.setattr(replaying, "generate", told)
    record(talker, dialogues, limit=LIMIT, block_size=BLOCK, sampling=SamplingConfig(1.0), batch_size=len(TURNS))
    assert sorted(drawn[0]) == list(range(len(TURNS)))
    everything = [uid for batch in drawn for uid in batch]
    assert len(set(everything)) == len(everything) == sum(map(len, TURNS))


def test_a_killed_recording_goes_on_at_the_first_missing_batch(
    talker: Target, dialogues: list[Dialogue], tmp_path: Path, answered: list[int]
) -> None:
    whole = recorded(talker, "own", dialogues, PLAN, BLOCK, tmp_path / "whole").trajectories
    everything = sum(answered)
    assert everything == sum(map(len, TURNS))

    def kill(count: int) -> None:
        raise KeyboardInterrupt

    answered.clear()
    with pytest.raises(KeyboardInterrupt):
        recorded(talker, "own", dialogues, PLAN, BLOCK, tmp_path / "killed", kill)
    before, progress = sum(answered), list[int]()
    assert 0 < before < everything
    answered.clear()
    other = dataclasses.replace(PLAN, batch_size=3)  # the parts say whose they are: another batch size may go on
    again = recorded(talker, "own", dialogues, other, BLOCK, tmp_path / "killed", progress.append).trajectories
    assert again == whole and sum(answered) == everything - before and progress == [2, 2]
    answered.clear()
    assert recorded(talker, "own", dialogues, PLAN, BLOCK, tmp_path / "killed").trajectories == whole and not answered
    assert [p.name for p in (tmp_path / "killed").iterdir()] == [p.name for p in (tmp_path / "whole").iterdir()]


def test_a_damaged_part_is_recorded_again(talker: Target, dialogues: list[Dialogue], tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit": LIMIT, "block_size": BLOCK, "sampling": SamplingConfig(), "parts": tmp_path}
    whole = record(talker, dialogues, batch_size=2, **options)
    damaged = sorted(tmp_path.iterdir())[0] / "trajectories.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert record(talker, dialogues, batch_size=2, **options) == whole


def test_what_a_recording_is_keyed_by(
    talker: Target,
    dialogues: list[Dialogue],
    tmp_path: Path,
    answered: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fresh(prompts: Any, config: EvalConfig = PLAN, block: int = BLOCK) -> bool:
        answered.clear()
        recorded(talker, "own", prompts, config, block, tmp_path)
        return bool(answered)

    for name, content in (("3", "[]"), ("4", '{"target": "x"}')):  # of somebody else
        (tmp_path / f"trajectories-{name}").mkdir()
        (tmp_path / f"trajectories-{name}" / "meta.json").write_text(content)
    alone = [dialogues[1]]
    assert fresh(alone) and not fresh([alone[0][:2]]), "a single answer is keyed by its id and prompt alone"
    assert fresh(dialogues[:1]) and fresh([dialogues[0]._replace(later=("else",))])
    assert not fresh(alone, block=BLOCK - 1), "a longer recording serves a smaller block"
    assert fresh(alone, block=BLOCK + 1) and fresh(alone, dataclasses.replace(PLAN, max_new_tokens=LIMIT + 1))
    assert fresh(alone, dataclasses.replace(PLAN, sampling=SamplingConfig(1.0)))
    eos = talker.eos_ids() | {7}
    monkeypatch.setattr(talker, "eos_ids", lambda: eos)
    assert fresh(alone), "what ends an answer may be changed beside the weights"
    monkeypatch.setattr(talker, "fingerprint", lambda: "another")
    assert fresh(alone) and not fresh(alone), "another target says something else"


def test_a_prompt_that_the_template_refuses_is_named(talker: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> list[int]:
        raise TemplateRefused("System role not supported")

    monkeypatch.setattr("specauf.bench.tasks.prompt_ids", refuse)
    with pytest.raises(UserError, match=r"own/3: the chat template of .* refuses it: System role not supported"):
        render_prompts(talker, [BenchPrompt("own/3", [{"role": "user", "content": "x"}])], False)


def test_a_template_that_leaves_out_the_text_measures_nothing(talker: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talker.tokenizer, "chat_template", "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(UserError, match="leaves out the text of messages"):
        render_prompts(talker, [], False)


def test_a_smaller_block_makes_the_same_rounds_over_a_larger_recording(
    target: Target, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """EOS within the larger margin and beyond the smaller one included."""
    limit, small, large = 16, 4, 9
    plain = generate(target, None, prompts, max_new_tokens=limit + large - 1, eos_ids=frozenset())
    eos = frozenset({plain[0].tokens[9], plain[1].tokens[limit + small + 1], plain[2].tokens[limit + 1]})
    monkeypatch.setattr(target, "eos_ids", lambda: eos)
    numbered = [(str(i), p) for i, p in enumerate(prompts)]
    options: dict[str, Any] = {"limit": limit, "sampling": SamplingConfig()}
    short, long = (record(target, numbered, block_size=size, **options) for size in (small, large))
    late = [t for t, s in zip(long, short, strict=True) if t.ended and not s.ended]
    assert late and any(t.ended for t in short) and not all(t.ended for t in long)
    drafter = DrafterProposer(DFlash(make_geometry(target, block_size=small)), target)
    for proposer in (drafter, PromptLookup(small)):
        rounds = [
            replay(proposer, made, trajectory_features(target, made, drafter.layer_ids), limit)
            for made in (short, long)
        ]
        live = generate(target, proposer, prompts, max_new_tokens=limit)
        assert rounds[0] == rounds[1] == [g.rounds for g in live]


def loops(clusters: list[int]) -> dict[str, Recorded]:
    """A text that begins anew after eight tokens, its sixteenth the first of a loop, and one that never repeats itself."""
    texts = [[*range(1, 9), *range(1, 9), *range(1, 6)], [*range(20, 41)]]  # three beyond the limit
    made = [Trajectory(str(i), [50], text, False) for i, text in enumerate(texts)]
    return {"own": Recorded("own", made, 18, clusters)}


def test_a_measurement_is_of_what_lies_within_the_limit(target: Target) -> None:
    """Worked by hand: nothing is copied before the ninth token, and a whole block from then on."""
    found, rounds = measure(target, {"lookup": PromptLookup(4), "short": PromptLookup(2)}, tasks := loops([0, 1]))
    assert [[(r.start, r.accepted) for r in row if r.accepted] for row in rounds["own"]["lookup"]] == [
        [(8, 3), (12, 3), (16, 3)],
        [],
    ]
    assert found["own"]["repeated_share"] == pytest.approx(3 / 22) and found["own"]["prompts"] == 2
    lookup, short = found["own"]["methods"]["lookup"], found["own"]["methods"]["short"]
    assert lookup["survival"] == pytest.approx([3 / 22] * 3) and short["survival"] == pytest.approx([5 / 26])
    assert lookup["engine_tau"] == 36 / (11 + 17) and short["engine_tau"] == 36 / (13 + 17)
    assert lookup["tau_before_loop"] == pytest.approx(1 + 6 / 10 / 2)
    assert short["tau_before_loop"] == pytest.approx(1 + 4 / 12 / 2)
    for condition, told in (("", ""), ("blocks of four", "blocks of four and ")):
        whole, early = comparison(tasks, rounds, "lookup", "short", condition)
        assert (whole["task"], whole["a"], whole["b"]) == ("own", "lookup", "short")
        assert (whole["condition"], early["condition"]) == (condition, f"{told}before the text loops")
        assert whole["difference"] == pytest.approx((9 / 11 - 5 / 13) / 2)
        assert early["difference"] == pytest.approx((6 / 10 - 4 / 12) / 2)
        assert whole["ratio"] == pytest.approx((9 / 11) / (5 / 13)) and early["ratio"] == pytest.approx(1.8)


def test_two_answers_of_one_conversation_give_no_interval(target: Target) -> None:
    for clusters, known in (([0, 1], True), ([4, 4], False)):
        proposers = {"lookup": PromptLookup(4), "short": PromptLookup(2)}
        found, rounds = measure(target, proposers, tasks := loops(clusters))
        intervals = [row["interval"] for row in comparison(tasks, rounds, "lookup", "short")]
        for method in found["own"]["methods"].values():
            intervals += [method["interval"], method["interval_before_loop"]]
        assert all((low == low and high == high) == known for low, high in intervals)


def test_a_measurement_does_not_depend_on_how_many_features_are_held(
    target: Target, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = DrafterProposer(DFlash(make_geometry(target, block_size=4)), target)
    proposers = {"behind": LookupFirst(drafter, 2), "drafter": drafter, "lookup": PromptLookup(4)}  # in either order
    tasks = {"own": recorded(target, "own", [(str(i), p) for i, p in enumerate(prompts)], PLAN, 4, tmp_path)}
    whole = measure(target, proposers, tasks)
    monkeypatch.setattr("specauf.bench.runner.CHUNK", 1)
    asked: list[int] = []
    monkeypatch.setattr(
        "specauf.bench.runner.trajectory_features",
        lambda *a, original=trajectory_features: asked.append(len(a[1])) or original(*a),
    )
    assert measure(target, proposers, tasks) == whole
    assert asked == [1] * len(prompts) and not tasks["own"]._features
    tasks["own"].keep_features = True
    assert measure(target, proposers, tasks) == measure(target, proposers, tasks) == whole
    assert asked == [1] * 2 * len(prompts), "kept for the second of them"


def test_what_a_drafter_accepts_is_not_taken_for_another_behind_a_lookup(
    prompts: list[list[int]], tmp_path: Path
) -> None:
    """Target and drafters say four tokens alone, so that a drafter is right now and then."""
    target = make_target()
    target.head_bias = torch.where(torch.arange(61) % 16 == 7, 0.0, -1e4)
    geometry = dataclasses.replace(make_geometry(target, block_size=4), initializer_range=0.3)
    one, two = (DrafterProposer(build_drafter(geometry, seed=seed), target) for seed in (1, 2))
    proposers = {"one": one, "two": two, "behind one": LookupFirst(one, 6), "behind two": LookupFirst(two, 6)}
    task = recorded(target, "own", [(str(i), p) for i, p in enumerate(prompts)], PLAN, 4, tmp_path)
    told: list[str] = []
    found = measure(target, proposers, {"own": task}, lambda n, name: told.append(name * n))[1]["own"]
    assert sorted(told) == sorted([*proposers] * len(prompts))
    features = trajectory_features(target, task.trajectories, one.layer_ids)
    assert found == {name: replay(p, task.trajectories, features, task.limit) for name, p in proposers.items()}
    assert found["behind one"] != found["behind two"], "the case shows nothing"


def test_results_of_something_else_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, found = tmp_path / "results.json", results()
    compare._keep_others(path, found)
    for old in (found, found | {"created": "later"}):
        path.write_text(json_text(old))
        compare._keep_others(path, found)
        assert path.exists() and not caplog.messages
    for key, value in (
        ("methods", [{"name": "a", "weights": "cd"}]),
        ("settings", {"prompts": 9}),
        ("evaluation", {"birds": {}, "heldout": {}}),
        ("provenance", {}),
    ):
        path.write_text(json_text(found | {key: value}))
        compare._keep_others(path, found)
        assert json.loads((tmp_path / "results.json.before").read_text())[key] == value and not path.exists()
    assert len(caplog.messages) == 4 and "it is now results.json.before" in caplog.text


def results() -> dict[str, Any]:
    return {
        "methods": [{"name": "a", "weights": "ab"}, {"name": "prompt-lookup"}],
        "settings": {"prompts": 3, "temperature": 0.0},
        "evaluation": {"birds": {"tau": 1.2}},
        "provenance": {"target": {"name": "tiny", "fingerprint": "ef"}},
    }


def test_a_loop_of_links_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert compare._name(tmp_path / "loop") == "loop"


def test_an_evaluation_names_the_commit_at_which_it_begins(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python has read the code by then; a commit made during the hour that follows is not what was measured."""
    told = list[str]()

    def record_nothing(*given: Any) -> None:
        told.append("recorded")
        raise KeyboardInterrupt

    monkeypatch.setattr(compare.provenance, "for_report", lambda: told.append("commit"))
    monkeypatch.setattr(compare, "record_tasks", record_nothing)
    drafters = {"one": DFlash(make_geometry(target))}
    with pytest.raises(KeyboardInterrupt):
        compare.evaluate(target, drafters, PLAN, tmp_path, None, 0, None)  # type: ignore[arg-type]
    assert told == ["commit", "recorded"]


class Silent:
    def progress(self, label: str, total: float) -> AbstractContextManager[Callable[..., None]]:
        return nullcontext(lambda amount, note="": None)


def test_two_tasks_of_one_label_are_checked_apart(talker: Target, tmp_path: Path) -> None:
    """A manifest may call two files the same; the answers to one are not those to the other."""
    for name, turns in (("one", TURNS), ("two", TURNS[::-1])):
        lines = [json.dumps({"id": f"{name}/{i}", "turns": t}) for i, t in enumerate(turns)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    about = [{"name": name, "source": "us", "licence": "MIT", "label": "Own"} for name in ("one", "two")]
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    config = dataclasses.replace(PLAN, tasks=("one", "two"), tasks_dir=str(tmp_path))
    drafters = {"drafter": DFlash(make_geometry(talker, block_size=BLOCK, taps=1))}
    found, passed = compare.evaluate(talker, drafters, config, tmp_path / "out", None, 1, Silent())
    assert passed, [check["value"] for check in found["checks"]]
    assert len(found["checks"]) == 2 * 2 * 2  # tasks, methods, batch sizes


def test_what_cannot_be_measured_is_refused_before_anything_is_recorded(
    talker: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words in (("short", 1), ("long", 200)):
        line = json.dumps({"id": f"{name}/0", "turns": ["fox " * words]})
        (tmp_path / f"{name}.jsonl").write_text(line)
    monkeypatch.setattr(talker, "reach", 128)
    monkeypatch.setattr(compare, "recorded", lambda *given: pytest.fail("recorded"))
    drafters = {"drafter": DFlash(make_geometry(talker, block_size=BLOCK, taps=1))}
    config = dataclasses.replace(PLAN, tasks=("short", "long"), tasks_dir=str(tmp_path))
    with pytest.raises(UserError, match="long/0 has a prompt of"):
        compare.evaluate(talker, drafters, config, tmp_path / "out", None, 0, Silent())
    config = dataclasses.replace(config, tasks=("short",))
    monkeypatch.setattr(talker.model.config, "layer_types", ["sliding_attention"] * talker.num_layers, raising=False)
    monkeypatch.setattr(talker.model.config, "sliding_window", 200, raising=False)
    with pytest.raises(UserError, match="self-selection needs a target with full attention"):
        compare.evaluate(talker, drafters, config, tmp_path / "out", None, 0, Silent(), Selection(3))
