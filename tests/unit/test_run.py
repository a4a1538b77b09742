"""A run as it is opened: where its drafter's weights begin, and that its processes agree."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specauf import provenance
from specauf.config import DataConfig, DrafterConfig, RunConfig, SamplingConfig, TrainConfig, dump
from specauf.data.dataset import Prepared, Prompt
from specauf.data.sources import Ledger
from specauf.drafter.checkpoint import load_drafter, save_drafter
from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash
from specauf.drafter.domino import Domino
from specauf.locks import claim, hold, turn
from specauf.run import data_dir, new_drafter, open_run, require_trainable, set_horizon
from specauf.strict import ConfigError, UserError
from specauf.target import Target
from specauf.train.distributed import Ranks
from tests.conftest import make_dataset

WANTED = DrafterConfig(block_size=4, num_hidden_layers=2, num_taps=2, mask_token_id=59)


def config(**changes: object) -> RunConfig:
    return RunConfig(drafter=dataclasses.replace(WANTED, **changes))  # type: ignore[arg-type]


@pytest.fixture
def checkpoint(target: Target, tmp_path: Path) -> Path:
    drafter = DFlash(new_drafter(config(), target).config, seed=7)
    return save_drafter(drafter.to(torch.bfloat16), tmp_path / "first", {"objective": "auf"})


def test_a_warm_start_is_the_checkpoints_weights_in_float32(target: Target, checkpoint: Path, tmp_path: Path) -> None:
    warm, first = new_drafter(config(init_from=str(checkpoint)), target), load_drafter(checkpoint)
    for (name, ours), theirs in zip(warm.state_dict().items(), first.state_dict().values(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float()), name
    assert not torch.equal(new_drafter(config(), target).fc.weight, warm.fc.weight)
    assert warm.config.extra.keys() == {"init_from"}, "the first run's objective is not this one's"
    origin = load_drafter(save_drafter(warm, tmp_path / "second")).config.extra["init_from"]
    assert origin["path"] == str(checkpoint) and len(origin["weights"]) == 12


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers=2, the recipe needs 1"),
        ({"target_layer_ids": (0, 3)}, r"target_layer_ids=\(1, 3\), the recipe needs \(0, 3\)"),
        ({"mask_token_id": 60}, "mask_token_id=59, the recipe needs 60"),
        ({"intermediate_size": 8}, "intermediate_size=64, the recipe needs 8"),
    ],
)
def test_another_geometry_is_refused_by_the_fields_name(
    target: Target, checkpoint: Path, change: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        new_drafter(config(init_from=str(checkpoint), **change), target)


def test_what_engines_read_but_weights_ignore_may_differ(target: Target, checkpoint: Path) -> None:
    loaded = load_drafter(checkpoint)
    same: DFlashConfig = dataclasses.replace(loaded.config, eos_token_id=[1, 2], initializer_range=0.5)
    loaded.config = same
    save_drafter(loaded, checkpoint)
    assert new_drafter(config(init_from=str(checkpoint)), target)


def test_a_warm_start_may_have_longer_blocks_and_says_of_which_it_came(
    target: Target, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    longer, same = (new_drafter(config(init_from=str(checkpoint), block_size=b), target) for b in (7, 4))
    assert (longer.config.block_size, longer.config.extra["init_from"]["block_size"]) == (7, 4)
    assert "left behind" not in caplog.text, "it had no head of its own"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(longer.parameters(), same.parameters(), strict=True))


class Apart(Ranks):
    """One process of two, of which the other went on from step 3."""

    def gather(self, value: Any) -> list[Any]:
        return [value, 3]


def test_one_process_at_a_time_trains_in_a_directory(tmp_path: Path) -> None:
    held = hold(tmp_path)
    with pytest.raises(UserError, match="another process works there"):
        hold(tmp_path)
    held.close()
    hold(tmp_path).close()


def test_a_file_system_without_locks_trains_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    hold(tmp_path).close()
    for shared in (claim(tmp_path), turn(tmp_path, lambda: None)):  # two processes of a study have to see each other
        with (
            pytest.raises(UserError, match=r"has no locks \(Function not implemented\): put `out` on a local disk"),
            shared,
        ):
            pass
    with claim(tmp_path, optional=True) as mine, turn(tmp_path, lambda: None, optional=True):
        assert mine


def test_processes_that_see_different_checkpoints_stop_before_anything_is_written(
    target: Target, tmp_path: Path
) -> None:
    data = Prepared(make_dataset([(1, [5] * 9, [True] * 9)], {"key": "k", "template_hash": "t"}), [], Ledger(), False)
    alone = dataclasses.replace(config(), out=str(tmp_path / "run"), train=TrainConfig(max_steps=4, batch_size=1))
    with pytest.raises(UserError, match=r"see different checkpoints in .*run: `out` has to be on a disk"):
        open_run(alone, target, data, None, ranks=Apart())
    assert not list((tmp_path / "run").iterdir())
    open_run(alone, target, data, None)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["data"] == "k" and told["ledger"] == Ledger().to_dict(), (
        "what was kept and dropped stands beside the run"
    )


def test_run_json_tells_of_every_session_that_trained(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Prepared(make_dataset([(1, [5] * 9, [True] * 9)], {"key": "k", "template_hash": "t"}), [], Ledger(), False)
    wanted = dataclasses.replace(
        config(), out=str(tmp_path), train=TrainConfig(max_steps=3, batch_size=1, num_anchors=2)
    )

    def session(commit: str, until: int) -> dict[str, Any]:
        monkeypatch.setattr(provenance, "git_state", lambda source: {"commit": commit, "dirty": False})
        trainer = open_run(wanted, target, data, None)

        def stop(row: dict[str, Any]) -> None:
            if row["step"] == until:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            trainer.run(on_step=stop)
        told: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())
        return told

    session("a", 1)
    session("b", 2)
    told = session("c", 3)
    assert (told["git"]["commit"], told["from_step"], told["data"]) == ("c", 2, "k")
    assert [(s["git"]["commit"], s.get("from_step")) for s in told["earlier"]] == [("a", None), ("b", 1)]
    assert session("d", 3) == told, "nothing is left to train"


def test_the_horizon_is_told_with_what_became_of_the_minutes(target: Target, tmp_path: Path) -> None:
    data = Prepared(make_dataset([(1, [5] * 9, [True] * 9)], {"key": "k", "template_hash": "t"}), [], Ledger(), False)
    train = TrainConfig(max_steps=3, minutes=20, batch_size=1, num_anchors=2)
    trainer = open_run(dataclasses.replace(config(), out=str(tmp_path), train=train), target, data, None)
    unused = "train.minutes=20 is not used (it would be with train.max_steps=null)"
    assert set_horizon(trainer) == f"max_steps 3; {unused}"
    trainer.run()
    assert set_horizon(trainer) == "already trained: step 3 of 3"
    trainer.config = dataclasses.replace(trainer.config, train=TrainConfig(minutes=9))
    kept = "frozen when the run began: for another train.minutes choose another `out`"
    assert set_horizon(trainer) == f"already trained: step 3 of 3, {kept}"
    trainer.done = 2
    assert set_horizon(trainer) == f"max_steps 3, {kept}"


def test_a_mask_that_is_a_token_of_the_text_is_refused(target: Target, tmp_path: Path) -> None:
    wanted = dataclasses.replace(config(), out=str(tmp_path / "run"), train=TrainConfig(max_steps=4, batch_size=1))
    for token, refused in ((5, False), (59, True)):
        data = Prepared(make_dataset([(1, [7, token, 7], [False, True, True])]), [], Ledger(), False)
        with (
            pytest.raises(ConfigError, match="59 occurs in the training data") if refused else contextlib.nullcontext()
        ):
            require_trainable(wanted, target, data)


def test_the_conversations_with_the_mask_are_named(target: Target, tmp_path: Path) -> None:
    wanted = dataclasses.replace(config(), out=str(tmp_path / "run"))
    rows = [(i, [59 if i > 1 and i % 2 else 7, 5, 7], [False, True, True]) for i in range(10)]
    data = Prepared(make_dataset(rows, {"conversation_ids": [f"chat_{i}" for i in range(10)]}), [], Ledger(), False)
    told = (
        r"in 4 of 10 conversations \(first: chat_3, chat_5, chat_7\): set .* unused row, or remove them from sharegpt$"
    )
    with pytest.raises(ConfigError, match=told):
        require_trainable(wanted, target, data)


def test_text_that_the_target_cannot_read_is_refused_before_hours_of_training(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = dataclasses.replace(config(), out=str(tmp_path / "run"), train=TrainConfig(max_steps=4, batch_size=1))
    rows = target.embed_weight.shape[0]
    beyond, long = [7, rows, 7], [7, 8] * 9
    for ids, told in (
        (beyond, f"the token {rows}, and tiny's embedding has {rows} rows"),
        (long, "reaches 16 positions here, and this takes 18: lower data.max_length"),
    ):
        data = Prepared(make_dataset([(1, ids, [False] + [True] * (len(ids) - 1))]), [], Ledger(), False)
        monkeypatch.setattr(target, "reach", 16)
        with pytest.raises(UserError, match=told):
            require_trainable(wanted, target, data)


def test_a_run_that_could_not_be_resumed_is_refused_before_features_and_the_settings_named(
    target: Target, tmp_path: Path
) -> None:
    wanted = dataclasses.replace(config(), out=str(tmp_path), train=TrainConfig(max_steps=4, batch_size=1))
    data = Prepared(make_dataset([(1, [7, 5, 7], [False, True, True])]), [], Ledger(), False)
    (tmp_path / "config.yaml").write_text(dump(wanted))
    other = dataclasses.replace(
        wanted, train=TrainConfig(max_steps=9, batch_size=1, lr=0.5, save_every=3, accumulation=2)
    )
    require_trainable(other, target, data, resume=True)  # nothing is trained there yet
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").write_text("{}")
    require_trainable(other, target, data)  # --fresh
    require_trainable(
        dataclasses.replace(other, train=dataclasses.replace(other.train, lr=wanted.train.lr)),
        target,
        data,
        resume=True,
    )
    with pytest.raises(
        UserError, match=r"another recipe \(train\.lr: 0\.0006 then, 0\.5 now\): resume with the same recipe"
    ):
        require_trainable(other, target, data, resume=True)


def test_the_directory_of_the_data_is_no_place_for_the_run(target: Target, tmp_path: Path) -> None:
    wanted = dataclasses.replace(config(), out=str(tmp_path / "x" / ".."), data=DataConfig(path=str(tmp_path)))
    (tmp_path / "x").mkdir()
    data = Prepared(make_dataset([(1, [7, 5, 7], [False, True, True])]), [], Ledger(), False)
    with pytest.raises(ConfigError, match=r"holds the data, whose run\.json this run would replace"):
        require_trainable(wanted, target, data)


def test_replay_that_cannot_be_had_is_refused_before_features(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(max_steps=4, batch_size=1, eval_every=2)
    wanted = dataclasses.replace(config(), out=str(tmp_path / "run"), train=train)
    prompt = Prompt("a", [{"role": "user", "content": "x"}], 3)
    data = Prepared(make_dataset([(1, [7, 5, 7], [False, True, True])]), [prompt], Ledger(), False)
    require_trainable(wanted, target, data)
    drawn = dataclasses.replace(wanted.eval, sampling=SamplingConfig(temperature=1.0, proposal="sampled"))
    with pytest.raises(ConfigError, match=r"train\.eval_every replays, which needs eval\.sampling\.proposal=greedy"):
        require_trainable(dataclasses.replace(wanted, eval=drawn), target, data)
    monkeypatch.setattr(target, "reach", 3 + wanted.eval.max_new_tokens + wanted.drafter.block_size - 1)
    require_trainable(wanted, target, data)
    with pytest.raises(UserError, match="a has a prompt of 4 tokens; leave it out, or lower the new tokens"):
        require_trainable(wanted, target, data._replace(heldout=[prompt._replace(tokens=4)]))
    monkeypatch.setattr("specauf.run.undecodable", lambda target: "it has linear attention")
    with pytest.raises(UserError, match=r"linear attention\. It can be trained for with train\.eval_every=0"):
        require_trainable(wanted, target, data)


def test_prepared_data_are_known_by_where_their_corpus_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for project in ("a", "b"):
        (tmp_path / project / "tasks").mkdir(parents=True)
        (tmp_path / project / "chats.jsonl").write_text("")
        monkeypatch.chdir(tmp_path / project)
        plain = dataclasses.replace(config(), data=DataConfig(path="chats.jsonl"))
        tasks = dataclasses.replace(plain, eval=dataclasses.replace(plain.eval, tasks_dir="tasks"))
        whole = dataclasses.replace(plain, data=DataConfig(path=str(tmp_path / project / "chats.jsonl")))
        assert data_dir(plain) == data_dir(whole)
        found |= {data_dir(plain), data_dir(tasks)}
    assert len(found) == 4


class Told(Ranks):
    """Of two processes, one that hears `heard` of the main one, or as that one remembers what it said."""

    heard: Any = None
    said: list[Any] = []

    def agree(self, value: Any) -> Any:
        self.said.append(value)
        return self.heard


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_main_process_finds_wrong_ends_the_others_without_a_word(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Told, "said", [])
    monkeypatch.setattr(Told, "heard", fails)
    for error in (UserError("mend it"), PermissionError("out"), KeyboardInterrupt()):
        Told.said = []
        with pytest.raises(type(error)) if fails else contextlib.nullcontext(), Told(0, 2).first():
            if fails:
                raise error
        assert Told.said == [fails]
    went_on = []
    with pytest.raises(SystemExit) if fails else contextlib.nullcontext(), Told(1, 2).first():
        went_on.append(1)
    assert bool(went_on) is not fails


HEAD: dict[str, object] = {"kind": "domino", "gru_hidden_dim": 8, "emb_dim": 4}


def test_domino_may_begin_as_a_dflash_drafter_that_its_head_does_not_correct_yet(
    target: Target, checkpoint: Path
) -> None:
    first = load_drafter(checkpoint)
    wanted = config(init_from=str(checkpoint), shift_label=False, **HEAD)
    one, other = (new_drafter(dataclasses.replace(wanted, train=TrainConfig(seed=seed)), target) for seed in (0, 1))
    assert isinstance(one, Domino) and isinstance(other, Domino)
    for name, theirs in first.state_dict().items():
        assert torch.equal(one.state_dict()[name], theirs.float()), name
    assert not torch.equal(one.prefix_gru.weight_ih_l0, other.prefix_gru.weight_ih_l0), (
        "the head is drawn from train.seed"
    )
    z, base = torch.randn(2, 3, first.config.hidden_size), torch.randn(2, 3, first.config.vocab_size)
    _, logits = one.unroll(z, base, torch.randn(2, first.config.hidden_size), target.embed)
    assert torch.equal(logits, base)


def test_dflash_may_begin_as_dominos_body_and_domino_with_its_head(
    target: Target, checkpoint: Path, tmp_path: Path
) -> None:
    domino = new_drafter(config(init_from=str(checkpoint), shift_label=False, **HEAD), target)
    assert isinstance(domino, Domino)
    torch.nn.init.normal_(domino.expansion)
    saved = str(save_drafter(domino, tmp_path / "domino"))
    bare = new_drafter(config(init_from=saved), target)
    assert all(torch.equal(tensor, domino.state_dict()[name]) for name, tensor in bare.state_dict().items())
    whole = new_drafter(config(init_from=saved, shift_label=False, **HEAD), target).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in domino.state_dict().items())


def test_shifted_labels_and_another_head_are_refused(target: Target, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"slot 1 of .*, slot 0 in the recipe.*shift_label=false"):
        new_drafter(config(init_from=str(checkpoint), **HEAD), target)
    domino = save_drafter(new_drafter(config(**HEAD), target), tmp_path / "domino")
    with pytest.raises(ConfigError, match=r"slot 0 of .*, slot 1 in the recipe"):
        new_drafter(config(init_from=str(domino)), target)
    with pytest.raises(ConfigError, match=r"has domino=DominoHead.*the recipe needs DominoHead"):
        new_drafter(config(init_from=str(domino), **HEAD | {"emb_dim": 5}), target)
