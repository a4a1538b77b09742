"""A trained drafter for others to load: weights in the dtype that engines run, a model card, how to serve it.

There are two layouts. `zlab` is that of the training checkpoint; z-lab's dflash, vLLM and SGLang load it beside a separately
named target. `speculators` names its target itself, so vLLM serves the directory alone. Its tensors and their names are the
same; its configuration is nested, and its tapped layers are counted from the embedding, so their ids are one higher.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from specauf import assets, files
from specauf.config import EMBEDDED, LOOKUP
from specauf.drafter.average import average_weights
from specauf.drafter.checkpoint import fingerprint, load_drafter, save_drafter
from specauf.drafter.config import DFlashConfig
from specauf.report.tables import method_label, task_label, tau_cell
from specauf.report.words import average, count, escape, fixed, real
from specauf.strict import UserError, choose

LAYOUTS = ("zlab", "speculators")
DTYPES = ("bfloat16", "float16", "float32")
WRITTEN = {"config.json", "model.safetensors", "README.md"}
NOT_OF_A_LAYER = ("architectures", "block_size", "num_target_layers", "dflash_config", "draft_vocab_size", "specauf")
"""Keys of our config.json that speculators keeps elsewhere, or not at all."""
NOT_SERVED = "No engine serves this drafter: SGLang takes Domino's with `pure_draft_prefix_len` 1, in bfloat16."
TESTED_WITH = "0.9.0"
"""The release of speculators whose format this is."""


def export(
    checkpoint: Path,
    out: Path,
    *,
    average_with: Sequence[Path] = (),
    layout: str = "zlab",
    dtype: str = "bfloat16",
    base_model: str | None = None,
    results: Sequence[Path] = (),
    license: str | None = None,
) -> list[str]:
    """Write `out` anew, whole or not at all. Returns the commands that serve it, none when no engine does.

    With `average_with`, the weights are the mean of those of all these checkpoints (see `drafter/average.py`).
    `base_model` is the target's public name, a hub id; when not given, the target that the checkpoint was trained with. The
    card has a table for each of `results`, results.json files of `specauf eval`. Raises `UserError` for what a layout cannot
    hold, for results of another drafter or target, and when `out` has files that an export does not write.
    """
    choose(layout, LAYOUTS, "layout")
    choose(dtype, DTYPES, "dtype")
    if out.is_dir() and (others := sorted({p.name for p in out.iterdir()} - WRITTEN)):
        raise UserError(f"{out} holds {others[0]}, which an export would delete: give a directory of its own")
    if os.path.realpath(out) in map(os.path.realpath, (checkpoint, *average_with)):
        raise UserError(f"{out} is a drafter to export, which the export would replace: give another directory")
    drafter = average_weights([checkpoint, *average_with]) if average_with else load_drafter(checkpoint)
    weights = fingerprint(drafter)
    drafter = drafter.to(getattr(torch, dtype))
    config = drafter.config = dataclasses.replace(drafter.config, extra=_portable(drafter.config.extra))
    base = base_model or _known_as(config.extra.get("target"))
    if layout == "speculators" and config.domino:
        raise UserError("speculators has no Domino drafters: export this one with layout zlab, which SGLang loads")
    if config.draft_vocab_size:
        raise UserError(
            f"this drafter knows {config.draft_vocab_size} of the {config.vocab_size} tokens and has no head of its own, which "
            "no engine reads: use its checkpoint with specauf, or train one without drafter.draft_vocab_size"
        )
    if layout == "speculators" and base is None:
        raise UserError("a speculators checkpoint names its target: give base_model, a hub id or a directory")
    commands = serving(config, out, layout, base or "TARGET", dtype)
    found = [_results_of(path, config, weights) for path in results]
    with files.atomic_dir(out) as directory:
        save_drafter(drafter, directory)
        read = load_drafter(directory).state_dict()  # what is shipped is what was trained, by the reader's own code
        if changed := [
            n
            for n, t in drafter.state_dict().items()
            if not torch.allclose(read[n].to(t.dtype), t, 0, 0, equal_nan=True)
        ]:
            raise UserError(f"{out}: {changed[0]} does not read back as it was written: is the disk all right?")
        if layout == "speculators":
            path = directory / "config.json"
            path.write_text(json.dumps(nested(json.loads(path.read_text()), base or ""), indent=2) + "\n")
        parameters = sum(p.numel() for p in drafter.parameters())
        (directory / "README.md").write_text(
            card(config, parameters, dtype, base, commands, found, license), encoding="utf-8"
        )
    return commands


def _results_of(path: Path, config: DFlashConfig, weights: str) -> dict[str, Any]:
    from specauf.report import page  # it loads matplotlib, which an export does not need

    found, target = page.read(path), config.extra.get("target_fingerprint")
    if "evaluation" not in found:
        raise UserError(f"{path} was not written by `specauf eval`, whose figures are what a model card shows")
    measured = ((found.get("provenance") or {}).get("target") or {}).get("fingerprint")
    if target and measured and target != measured:
        raise UserError(
            f"{path} was measured on another target or in another dtype ({measured}) than the drafter was made for ({target})"
        )
    drafters = {m["name"]: m["weights"] for m in found["methods"] if "weights" in m}
    if not drafters and sum(m.get("kind") == "drafter" for m in found["methods"]) > 1:
        raise UserError(
            f"{path} does not say which of its figures are this drafter's: measure it again with `specauf eval`"
        )
    if drafters and weights not in drafters.values():
        known = ", ".join(sorted(drafters.values()))
        raise UserError(f"{path} measured other weights ({known}) than this drafter's ({weights})")
    others = {name for name, theirs in drafters.items() if theirs != weights}
    return found | {"methods": [m for m in found["methods"] if not {m["name"], m.get("of")} & others]}


def nested(config: dict[str, Any], base: str) -> dict[str, Any]:
    """Our config.json as speculators nests it, for the target `base`."""
    layer = {key: value for key, value in config.items() if key not in NOT_OF_A_LAYER}
    size = config["block_size"]
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": TESTED_WITH,
        "block_size": size,
        "draft_vocab_size": config["vocab_size"],
        "aux_hidden_state_layer_ids": [i + 1 for i in config["dflash_config"]["target_layer_ids"]],
        "mask_token_id": config["dflash_config"]["mask_token_id"],
        "sample_from_anchor": False,
        "dtype": config["dtype"],
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": size - 1}],
            "verifier": {"name_or_path": base, "architectures": []},
        },
        "specauf": config["specauf"],
    }


def serving(config: DFlashConfig, out: Path, layout: str, base: str, dtype: str) -> list[str]:
    """Command lines of the engines that load the layout."""
    where, target = shlex.quote(str(out)), shlex.quote(base)
    if layout == "speculators":
        return [f"vllm serve {where}"]
    plan = {"method": "dflash", "model": str(out), "num_speculative_tokens": config.block_size - 1}
    vllm = f"vllm serve {target} --speculative-config {shlex.quote(json.dumps(plan))}"
    sglang = f"python -m sglang.launch_server --model-path {target} --speculative-algorithm DFLASH"
    sglang += f" --speculative-draft-model-path {where}"
    if config.domino:  # vLLM has no Domino; SGLang corrects 2048 candidates unless told otherwise
        served = config.domino.pure_draft_prefix_len == 1 and dtype == "bfloat16"
        return [f"{sglang} --dtype bfloat16 --speculative-domino-candidate-pool-size 0"] * served
    named = "" if config.extra.get("target") else f" --target.path {target}"
    return [vllm, sglang, f'specauf generate {where} "Write a haiku about rain."{named}']


def card(
    config: DFlashConfig,
    parameters: int,
    dtype: str,
    base: str | None,
    commands: list[str],
    results: Sequence[dict[str, Any]],
    license: str | None,
) -> str:
    """The model card: what the drafter is, how it was trained, what was measured, how it is run."""
    told, kind = config.extra, "Domino" if config.domino else "DFlash"
    # A hub takes ids alone as a base model, and the path of a directory here is nobody's business there.
    local = base is not None and Path(base).is_absolute()
    tags = ["speculative-decoding", kind.lower()]
    head = {"library_name": "specauf", "base_model": None if local else base, "license": license, "tags": tags}
    objective = _objective(told)
    epochs = f", {told['epochs']:g} epochs" if "epochs" in told else ""
    size = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else str(parameters)
    rows = {
        "parameters": f"{size}, {dtype}; embedding and LM head are the target's",
        "layers": config.num_hidden_layers,
        "block size": f"{config.block_size}, the anchor included: {config.num_predictions} proposed tokens a round",
        "target layers read": ", ".join(map(str, config.target_layer_ids)),
        "mask token": config.mask_token_id,
        "objective": objective
        and f"{objective}, reduction {told.get('reduction')}, labels {told.get('labels', 'data')}",
        "steps": "steps" in told and f"{told['steps']} of {told.get('max_steps', '?')}{epochs}",
        **_history(told),
        "target": f"{_display(told.get('target'))}, fingerprint {told.get('target_fingerprint', 'not recorded')}",
        "chat template": "template_hash" in told
        and f"{told['template_hash']}, enable_thinking {told.get('enable_thinking', False)}",
    }
    given = "Figures are of the target above; acceptance" if results else "Acceptance"
    lines = [
        f"# {kind} drafter for {Path(base).name if base and local else base or 'its target'}",
        f"A masked block drafter for speculative decoding{', trained with specauf' * bool(objective)}: it proposes a block of "
        "tokens at once, the target keeps the prefix it agrees with. The text is the target's own.",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value),
        *(["## Measured"] if results else []),
        *(text for found in results for text in _measured(found)),
        "## Use",
        "```sh\n" + "\n".join(commands) + "\n```" if commands else NOT_SERVED,
        f"{given} is highest under its target's chat template and thinking flag. docs/serving.md of specauf says what each "
        "engine was seen to do.",
    ]
    known = {key: value for key, value in head.items() if value}
    front = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return f"---\n{front}---\n\n" + "\n\n".join(lines) + "\n"


def _objective(told: Mapping[str, Any]) -> str:
    """What a drafter was trained with: one objective, Domino's variant, or its base and final branches' objectives."""
    names = (told.get("objective"), told.get("final", {}).get("objective"))
    return told.get("variant") or " and ".join(dict.fromkeys(filter(None, names)))


def _history(told: Mapping[str, Any], before: int = 0) -> dict[str, str]:
    """Where the weights began and what they were trained on, as far as a checkpoint remembers, `before` drafters earlier."""
    when = ("", " (before)")[before] if before < 2 else f" ({before} before)"
    rows, data = dict[str, str](), told.get("data")
    if data:
        rows["trained on"] = _trained_on(told, data)
        if data.get("kept_out") is not None:
            rows["prompts kept out of it"] = ", ".join(data["kept_out"]) or "none"
    for number, other in enumerate(told.get("averaged_with", ()), 1):
        trained = other.get("trained") or {}
        answers = f", trained on {_trained_on(trained, trained['data'])}" if trained.get("data") else ""
        rows[f"averaged with{f' ({number})' if number > 1 else ''}"] = f"{_made(other)}{answers}"
    if "init_layers" in told:
        rows["began as target layers"] = ", ".join(map(str, told["init_layers"]))
    rows = {f"{key}{when}": value for key, value in rows.items()}
    if origin := told.get("init_from"):
        size = f" in blocks of {origin['block_size']}" if "block_size" in origin else ""
        rows[f"went on from{when}"] = f"{_made(origin)}{size}"
        rows |= _history(origin.get("trained") or {}, before + 1)
    return rows


def _trained_on(told: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    said = f"{data['conversations']:,} conversations of {data['path']}, to {data['max_length']} tokens"
    if "supervised_tokens" in data:
        said += f", {data['supervised_tokens']:,} of them supervised"
    if rollouts := data.get("rollouts"):
        own = rollouts.get("target") in (None, told.get("target_fingerprint"))
        whose = "the target's own answers" if own else f"answers of another target or precision ({rollouts['target']})"
        said += f": {whose} at T={rollouts['temperature']:g}"
    return said


def _made(origin: Mapping[str, Any]) -> str:
    """The weights that a drafter was made from, and their training as far as it is known."""
    trained = origin.get("trained")
    steps = f", {trained.get('steps', '?')} steps of {_objective(trained) or '?'}" if trained else ""
    return f"{origin['path']}, model.safetensors {origin['weights']}{steps}"


def _measured(results: dict[str, Any]) -> list[str]:
    """One of the card's tables of tau, which includes prompt lookup, and a sentence that compares the two."""
    labels = {m["name"]: escape(method_label(results, m["name"])) for m in results["methods"]}
    kinds = {m["name"]: m.get("kind") for m in results["methods"]}
    evaluation = results["evaluation"]
    tasks = list(evaluation.values())
    names = [n for n in labels if any(n in task["methods"] for task in tasks)]
    rows = ["| τ | " + " | ".join(f"{labels[n]} | before the text loops" for n in names) + " |"]
    rows.append("|---|" + "---:|---:|" * len(names))
    ahead = {"drafter": 0, "both": 0}
    for key, task in evaluation.items():
        cells: list[str] = []
        for name in names:
            found = task["methods"].get(name, {})
            cells += [tau_cell(found), fixed(found.get("tau_before_loop"))]
        rows.append(
            f"| {escape(task_label(results, key))} ({count(task.get('prompts'))}) | " + " | ".join(cells) + " |"
        )
        taus = {name: real(found.get("tau")) or 0.0 for name, found in task["methods"].items()}
        for kind in ahead:
            best = max((tau for name, tau in taus.items() if kinds.get(name) == kind), default=0)
            ahead[kind] += best > taus.get(LOOKUP, 0)
    means = [fixed(average(tasks, name, key)) for name in names for key in ("tau", "tau_before_loop")]
    if len(tasks) > 1:
        rows.append("| average | " + " | ".join(means) + " |")
    settings, made = results.get("settings") or {}, results.get("provenance") or {}
    said = escape(", ".join(f"{key} {value}" for key, value in settings.items()))
    alone = f"a drafter has the higher mean on {ahead['drafter']} of {len(tasks)} tasks"
    verdict = alone if ahead["drafter"] else "no drafter here is above it"
    if "both" in kinds.values():
        verdict += f", and lookup first with the drafter elsewhere on {ahead['both']}"
    return [
        "\n".join(rows),
        f"Tokens per round, 95 % intervals over prompts ({said}; specauf {made.get('version')}, commit "
        f"{str(made.get('commit'))[:7]}, {str(made.get('created'))[:10]}). Prompt lookup copies from the context and needs "
        f"no weights: over all rounds {verdict}.",
    ]


def _display(target: str | None) -> str:
    """A target's name; for the embedded default also how its weights were rounded."""
    return assets.SMOLLM2_NAME if target == EMBEDDED else target or "not recorded"


def _portable(told: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's record of its history, with every path of this machine cut to its last part.

    The target's path stays whole, since `generate` and `eval` look for it there; `base_model` names it for others.
    """

    def named(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: named(k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [named(key, v) for v in value]
        here = key == "path" and isinstance(value, str) and value.startswith(("/", "~", "."))
        return Path(value).name if here else value

    return {key: named(key, value) for key, value in told.items()}


def _known_as(target: str | None) -> str | None:
    """A target's public name; for the embedded default, that of the model whose weights it rounds."""
    return assets.SMOLLM2_HUB if target == EMBEDDED else target
