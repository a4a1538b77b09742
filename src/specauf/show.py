"""`specauf generate`: one answer as it is decoded, and what it cost beside plain decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from specauf.bench.runner import departure, near_tie
from specauf.bench.tasks import describe_task
from specauf.config import LONGEST, EvalConfig, SamplingConfig
from specauf.console import Terminal
from specauf.data.chat import Rendered, colour, template_hash
from specauf.data.dataset import TokenDataset, read_split
from specauf.decode.generate import generate, warm_tokens
from specauf.decode.propose import DrafterProposer, LookupFirst, PromptLookup, Proposer
from specauf.decode.select import Selection
from specauf.drafter.checkpoint import histories
from specauf.drafter.dflash import DFlash
from specauf.strict import counted, require
from specauf.target import Target


def show_conversation(terminal: Terminal, tokenizer: Any, data: TokenDataset, number: int) -> None:
    """Print a conversation as it is trained on, with the supervised tokens coloured."""
    example = data[number]
    terminal.rich.rule(Text(f"conversation {data.meta['conversation_ids'][number]}"))
    terminal.rich.print(colour(tokenizer, Rendered(example.input_ids.tolist(), example.loss_mask.tolist())))


def require_options(drafter: DFlash | None, block_size: int, candidate_pool: int, lookup_first: int) -> None:
    """Raise `ConfigError` when options of `specauf generate` do not go together. `block_size` is prompt lookup's."""
    without = drafter is None and bool(lookup_first or candidate_pool)
    require(not without, "--lookup-first and --candidate-pool need a drafter; prompt-lookup is not one")
    unused = drafter is not None and bool(block_size) and not lookup_first
    require(not unused, "--block-size is prompt lookup's, alone or first: a drafter has its own")


def proposer_of(
    drafter: DFlash | None, target: Target, block_size: int, candidate_pool: int, lookup_first: int
) -> Proposer:
    """A drafter, prompt lookup, or both: what options that go together ask for."""
    if drafter is None:
        return PromptLookup(block_size or 8)
    alone = DrafterProposer(drafter.to(target.embed_weight), target, candidate_pool)
    return LookupFirst(alone, lookup_first, block_size or None) if lookup_first else alone


def show(
    terminal: Terminal,
    target: Target,
    proposer: Proposer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    max_new_tokens: int,
    selection: Selection | None,
) -> bool:
    """Stream the answer, then print tau and speed. Returns False when a greedy answer differs from plain decoding's at a token
    that is no near tie. Raises `ConfigError` when there is no room for a round."""
    require(
        max_new_tokens >= 2,
        "--max-new-tokens must be at least 2: the first token comes from the prefill, not from a round",
    )
    require(max_new_tokens <= LONGEST, f"--max-new-tokens must be at most {LONGEST}, got {max_new_tokens}")
    options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": max_new_tokens}
    stream, few = Stream(target, terminal), {**options, "max_new_tokens": warm_tokens(target, max_new_tokens)}
    for warm in (proposer, None):  # kernels are compiled, and caches filled, before either is timed
        generate(target, warm, [list(prompt)], selection=selection if warm else None, **few)
    (out,) = generate(target, proposer, [list(prompt)], selection=selection, on_commit=stream.commit, **options)
    terminal.rich.print()
    (plain,) = generate(target, None, [list(prompt)], record_margins=True, **options)
    rounds = max(1, len(out.rounds))
    tau = 1 + sum(r.accepted for r in out.rounds) / rounds
    how = "sampled proposal" if sampling.proposal == "sampled" else selection  # such tau are not comparable
    terminal.say(
        f"\ntau{f' ({how})' if how else ''} {tau:.3f} over {counted(len(out.rounds), 'rounds')}, "
        f"{counted(len(out.tokens), 'tokens')}, {out.verified / rounds:.1f} nodes verified per round"
    )
    terminal.say(
        f"{len(out.tokens) / out.seconds:.1f} tokens/s; plain decoding {len(plain.tokens) / plain.seconds:.1f} tokens/s"
    )
    if sampling.temperature > 0:
        return True
    at = departure(out.tokens, plain)
    if at is None:
        terminal.say("the text is the target's own, token for token")
        return True
    tie = plain.margins[at] <= near_tie(target)
    verdict = "is the target's own but for rounding" if tie else "is NOT the target's own"
    terminal.say(f"the text {verdict}: it leaves plain decoding's at token {at}, top-2 margin {plain.margins[at]:.2e}")
    return tie


class Stream:
    """Prints tokens as they are committed; decodes the whole text each time, since tokens may split characters."""

    def __init__(self, target: Target, terminal: Terminal) -> None:
        self.target, self.terminal = target, terminal
        self.tokens: list[int] = []
        self.shown = 0

    def commit(self, row: int, tokens: list[int], drafted: list[bool]) -> None:
        tokenizer = self.target.require_tokenizer()
        for token, was_draft in zip(tokens, drafted, strict=True):
            self.tokens.append(token)
            text = str(tokenizer.decode(self.tokens))
            if not text.endswith("\ufffd"):
                self.terminal.rich.print(Text(text[self.shown :], style="green" if was_draft else ""), end="")
                self.shown = len(text)


def mismatches(target: Target, trained: Mapping[str, Any], enable_thinking: bool | None = None) -> list[str]:
    """Warnings about what differs here from the drafter's training, as `trained`, its checkpoint's record, has it.

    `enable_thinking` None is not compared.
    """
    found = []
    if trained.get("template_hash") not in (None, template_hash(target.require_tokenizer())):
        found.append("this drafter was trained under another chat template than this target's")
    if enable_thinking is not None and trained.get("enable_thinking") not in (None, enable_thinking):
        found.append(f"this drafter was trained with enable_thinking={trained['enable_thinking']}")
    if trained.get("target_fingerprint") not in (None, target.fingerprint()):
        then, now = trained.get("target_dtype"), str(target.embed_weight.dtype).removeprefix("torch.")
        perhaps = "" if then in (None, now) else f", or for this one in {then}"
        found.append(f"this drafter was trained for another target{perhaps} (the fingerprints differ)")
    return found


def exposed(trained: Mapping[str, Any], config: EvalConfig, data_dir: Path | None = None) -> list[str]:
    """A warning that names the tasks whose prompts may be in the drafter's training data, or in that of the drafters it was
    made from, as its checkpoint records them. `data_dir` holds the held-out conversations, which no training saw
    unless it held out others."""
    labels = {task: describe_task(task, tasks_dir=config.tasks_dir).label for task in config.tasks}
    heldout = labels.pop("heldout", None)
    split = read_split(data_dir) if heldout and data_dir else None
    seen: set[str] = set()
    for past in histories(trained):
        data = past.get("data") or {}
        seen |= set() if data.get("kept_out") is None else set(labels.values()) - set(data["kept_out"])
        if heldout and None not in (split, data.get("split")) and data["split"] != split:
            seen.add(labels.setdefault("heldout", heldout))
    told = ", ".join(label for label in labels.values() if label in seen)
    return [f"the prompts of {told} were not kept out of its training data"] if told else []
