"""Train, measure and export masked block drafters for speculative decoding.

Exit codes: 0 done, 1 a check failed, 2 an error that the message says how to fix, 130 interrupted.
`specauf --version` prints the version.
"""

# tyro shows the text above. The verbs only parse, call one function and print; nothing is decided in this file.
from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro

from specauf import __version__, arguments
from specauf import config as configuration
from specauf.config import EMBEDDED, LOOKUP, EvalConfig, SamplingConfig, TargetConfig, TargetOf
from specauf.console import Terminal, exit_code, print_results, quiet_transformers, reported
from specauf.data.rollouts import RolloutConfig, rollout_meta
from specauf.data.sources import Ledger
from specauf.strict import ConfigError, require

if TYPE_CHECKING:
    from specauf.target import Target
    from specauf.train.distributed import Ranks

Recipe = Annotated[Path, tyro.conf.Positional]
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="SECTION.KEY=VALUE ...")]


@dataclass(frozen=True)
class Prepare:
    """Read a corpus, print what was kept and dropped and why, and store its tokens."""

    recipe: Recipe
    """A recipe, e.g. recipes/smollm2_cpu.yaml."""
    show: int = 0
    """Print this many conversations, with the supervised tokens coloured."""
    set: Overrides = ()
    """Override fields of the recipe."""

    def run(self, terminal: Terminal) -> int:
        from specauf.run import data_dir, prepare_corpus, prepare_data, told_heldout
        from specauf.show import show_conversation
        from specauf.target import load_tokenizer

        require(self.show >= 0, f"--show must be at least 0, got {self.show}")
        config = configuration.load(self.recipe, self.set)
        quiet_transformers()
        tokenizer, made = load_tokenizer(config.target), rollout_meta(config.data.path)
        terminal.say(f"data: reading {config.data.path} ...")
        prepared = prepare_data(config, _target(config.target)) if made else prepare_corpus(config, tokenizer)
        terminal.say("\n".join(prepared.ledger.lines()))
        terminal.say(f"{int(prepared.train.mask.sum()):,} of {len(prepared.train.ids):,} tokens supervised")
        terminal.say(f"held out: {told_heldout(prepared)}")
        terminal.say(f"{'reused' if prepared.reused else 'written to'} {data_dir(config)}")
        for i in range(min(self.show, len(prepared.train))):
            show_conversation(terminal, tokenizer, prepared.train, i)
        return 0


@dataclass(frozen=True)
class Rollout:
    """Have the target answer the training prompts; train on its answers with data.path=OUT. Resumable."""

    recipe: Recipe
    """The recipe whose target, corpus and data section to use, e.g. recipes/smollm2_cpu.yaml."""
    out: Path
    """A new directory, e.g. runs/rollouts. The same command again resumes in it, and at the same time shares the work."""
    plan: Annotated[RolloutConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RolloutConfig)
    drafter: Path | None = None
    """A drafter directory to speed up decoding with. The answers still follow the target's distribution."""
    server: str = ""
    """Address of a vLLM server of the target, e.g. http://127.0.0.1:8000, which then decodes in its place."""
    set: Overrides = ()
    """Override fields of the recipe."""

    def run(self, terminal: Terminal) -> int:
        from specauf.decode.server import Server
        from specauf.run import corpus_path, make_rollouts, rollout_prompts

        config = configuration.load(self.recipe, self.set)
        corpus_path(config)  # rollouts of rollouts are refused before anything is loaded
        server = Server(self.server) if self.server else None
        target = _target(config.target)
        source = rollout_prompts(config, target)
        by_tokens = self.plan.max_tokens is not None
        total = self.plan.max_tokens or len(source.train[: config.data.max_conversations]) * self.plan.samples
        with terminal.progress("tokens" if by_tokens else "samples", total) as advance:

            def told(samples: int, tokens: int, seconds: float) -> None:
                advance(tokens if by_tokens else samples, f"{tokens / seconds:.0f} tokens/s" if seconds else "reused")

            made = make_rollouts(config, target, source, self.plan, self.out, self.drafter, told, server)
        terminal.say("\n".join(Ledger(**made.meta["ledger"]).lines()))
        terminal.say(f"{len(made):,} sequences, {made.meta['rollout']['tokens']:,} generated tokens")
        terminal.say(f"{self.out}: train on it with --set data.path={self.out}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a drafter from a recipe. Run the same command again to resume after an interruption."""

    recipe: Recipe
    """A recipe, e.g. recipes/smollm2_cpu.yaml."""
    set: Overrides = ()
    """Override fields of the recipe."""
    fresh: bool = False
    """Start over even if there is a checkpoint. It is set aside as `checkpoint.before`."""

    def run(self, terminal: Terminal) -> int:
        from specauf.train.distributed import ranks_of_run

        with ranks_of_run() as ranks:
            return self._run(terminal if ranks.main else Terminal(silent=True), ranks)

    def _run(self, terminal: Terminal, ranks: Ranks) -> int:
        from specauf import run
        from specauf.locks import hold
        from specauf.train.objectives import objectives_of

        with ranks.first():  # errors are reported, downloads and data made, once
            config = configuration.load(self.recipe, self.set)
            if config.train.max_steps is None and config.train.minutes is None:
                raise ConfigError("set train.max_steps or train.minutes: the learning-rate schedule needs a horizon")
            objectives_of(config)  # an impossible objective is refused before anything is loaded
            ranks.require_own_device(config.target.device)
            sharded = config.train.shard_target and ranks.world > 1
            target = _target(config.target, to_shard=sharded)
            terminal.say(f"data: reading {config.data.path} ...")
            prepared = run.prepare_data(config, target)
            run.require_trainable(config, target, prepared, resume=not self.fresh)
            lock = hold(Path(config.out)) if ranks.main else None
        terminal.say("data: prepared before" if prepared.reused else "\n".join(prepared.ledger.lines()))
        with terminal.progress("features", float(len(prepared.train.ids)) if config.features.cache else 0) as advance:
            features = run.feature_cache(config, target, prepared, on_progress=advance, ranks=ranks)
        trainer = run.open_run(config, target, prepared, features, resume=not self.fresh, ranks=ranks)
        if sharded:
            target.shard()  # not before the drafter has its copies of the target's layers
        terminal.say(run.set_horizon(trainer))
        measures = config.train.eval_every and (ranks.main or sharded)  # a sharded target needs every rank
        evaluate = run.heldout_evaluator(config, target, alone=not sharded) if measures else None
        what = f"training {config.objective.variant or config.objective.name}"
        with terminal.progress(what, trainer.max_steps or 0, trainer.done) as advance:
            trainer.run(on_step=lambda row: advance(1, run.step_note(row)), evaluate=evaluate)
        del lock  # held until here
        terminal.say(f"drafter: {Path(config.out) / 'checkpoint'}; log: {Path(config.out) / 'log.jsonl'}")
        return 0


@dataclass(frozen=True)
class Eval:
    """Measure drafters: record the target once, replay every drafter over it, compare them prompt by prompt."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Drafter directories; the others are compared with the first."""
    target: TargetOf = field(default_factory=TargetOf)
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(tasks=("humaneval",)))
    live: int = 0
    """Also decode live (T=0): this many prompts per task at batch 1, then all in batches of eval.batch_size.
    Tokens must equal plain decoding's, and rounds replay's."""
    data_dir: Path | None = None
    """Directory of prepared data for the task `heldout`, as `specauf prepare` prints it."""
    out: Path = Path("runs/eval")
    """Output directory, for results.json and the recordings."""
    candidates: int = 1
    """K > 1: also decode every drafter live with self-selection (see `specauf generate`), in separate rows."""
    candidate_temperature: float = 1.5
    """Temperature at which the other K - 1 blocks are drawn."""
    candidate_pool: int = 0
    """N > 0: also measure Domino drafters with SGLang's approximation, in separate rows.
    It corrects only N candidate tokens."""
    lookup_first: int = 0
    """N > 0: also measure every drafter behind prompt lookup, in separate rows.
    Where the last N tokens occurred before, prompt lookup proposes instead of the drafter."""
    lookup_block: int = 0
    """Block size of prompt lookup; 0 is the drafters'."""
    server: str = ""
    """Address of an idle vLLM server that was started with this drafter, e.g. http://127.0.0.1:8000.
    It is asked every prompt; its text must be the target's, and its rounds replay's."""

    def run(self, terminal: Terminal) -> int:
        from specauf.bench.compare import evaluate, open_checkpoints
        from specauf.decode.select import Selection
        from specauf.decode.server import Server
        from specauf.show import exposed, mismatches

        selection = Selection.of(self.candidates, self.candidate_temperature)
        server, drafters = Server(self.server) if self.server else None, open_checkpoints(self.checkpoints)
        target = _target(self.target.of(next(iter(drafters.values())).config.extra))
        for name, trained in ((name, drafter.config.extra) for name, drafter in drafters.items()):
            for warning in mismatches(target, trained) + exposed(trained, self.eval, self.data_dir):
                terminal.say(f"warning: {name}: {warning}")
        results, passed = evaluate(
            *(target, drafters, self.eval, self.out, self.data_dir, self.live, terminal, selection),
            *(self.candidate_pool, self.lookup_first, self.lookup_block, server),
        )
        print_results(terminal, results)
        terminal.say(f"\nwritten to {self.out / 'results.json'}")
        return 0 if passed else 1


@dataclass(frozen=True)
class Generate:
    """Stream text with accepted draft tokens coloured; print tau, rounds and tokens per second beside plain decoding."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A drafter directory, or `prompt-lookup`."""
    prompt: Annotated[str, tyro.conf.Positional]
    """What the user says; `-` reads it from stdin."""
    target: TargetOf = field(default_factory=TargetOf)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_new_tokens: int = 128
    """Tokens of the answer at most."""
    block_size: int = 0
    """Block size of prompt lookup; 0 is the drafter's, and 8 without one."""
    enable_thinking: bool = False
    """Passed to the chat template, as in training."""
    candidates: int = 1
    """K > 1 is self-selection: the target reads the drafter's greedy block and K - 1 drawn ones, and chooses one."""
    candidate_temperature: float = 1.5
    """Temperature at which the K - 1 blocks are drawn."""
    candidate_pool: int = 0
    """N > 0: a Domino drafter corrects only N candidate tokens, as SGLang does by default with N = 2048."""
    lookup_first: int = 0
    """N > 0: prompt lookup proposes, in blocks of `block_size`, where the last N tokens occurred before; else the drafter."""

    def run(self, terminal: Terminal) -> int:
        from specauf.bench.tasks import BenchPrompt, render_prompts
        from specauf.decode.select import Selection
        from specauf.drafter.checkpoint import load_drafter
        from specauf.show import mismatches, proposer_of, require_options, show

        selection = Selection.of(self.candidates, self.candidate_temperature)
        drafter = None if str(self.checkpoint) == LOOKUP else load_drafter(self.checkpoint)
        options = (self.block_size, self.candidate_pool, self.lookup_first)
        require_options(drafter, *options)
        target = _target(self.target.of(drafter.config.extra if drafter else {"target": EMBEDDED}))
        proposer = proposer_of(drafter, target, *options)
        for warning in mismatches(target, drafter.config.extra, self.enable_thinking) if drafter else ():
            terminal.say(f"warning: {warning}")
        said = sys.stdin.read().removesuffix("\n") if self.prompt == "-" else self.prompt
        asked = BenchPrompt("the prompt", [{"role": "user", "content": said}])
        ids = render_prompts(target, [asked], self.enable_thinking)[0].prompt
        return 0 if show(terminal, target, proposer, ids, self.sampling, self.max_new_tokens, selection) else 1


@dataclass(frozen=True)
class Report:
    """Write the page, Markdown and figures again from a results.json."""

    results: Annotated[Path, tyro.conf.Positional]
    """A results.json, or the directory that holds it."""
    out: Path | None = None
    """Output directory; the results' own when not given."""

    def run(self, terminal: Terminal) -> int:
        from specauf.report import page

        where = self.results if self.results.is_dir() else self.results.parent
        terminal.say(str(page.write(page.read(self.results), self.out or where)))
        return 0


@dataclass(frozen=True)
class Export:
    """Write a drafter for others to load: weights in bfloat16, a model card, and the commands that serve it."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A drafter directory, e.g. runs/a/checkpoint."""
    out: Annotated[Path, tyro.conf.Positional]
    """Output directory, new or holding an earlier export."""
    average_with: tuple[Path, ...] = ()
    """Drafter directories that went on from the same checkpoint: the mean of all their weights is written."""
    layout: Literal["zlab", "speculators"] = "zlab"
    """`zlab` is loaded by z-lab's dflash, vLLM and SGLang; a `speculators` checkpoint names its target itself."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the weights that are written."""
    base_model: str | None = None
    """The target's public name, e.g. Qwen/Qwen3-8B; the training run's target when not given."""
    results: tuple[Path, ...] = ()
    """results.json files of `specauf eval` to show on the model card."""
    license: str | None = None
    """License to state on the model card, e.g. apache-2.0."""

    def run(self, terminal: Terminal) -> int:
        from specauf.export import NOT_SERVED, export

        options = {k: v for k, v in vars(self).items() if k not in ("checkpoint", "out")}
        terminal.say("\n".join(export(self.checkpoint, self.out, **options) or [NOT_SERVED]))
        return 0


@dataclass(frozen=True)
class Demo:
    """Train a decay and an AUF drafter on the embedded default, measure both and prompt lookup, and write a page."""

    minutes: float = 13.0
    """Budget after installing, turned once into conversations and steps; measuring (up to 7 minutes) does not shrink."""
    drafter: Literal["dflash", "domino"] = "dflash"
    """Kind of both drafters, as drafter.kind in a recipe."""
    block_size: int = 8
    """Slots of a block, the anchor included."""
    out: Path | None = None
    """Output directory; runs/demo-... when not given."""
    set: Overrides = ()
    """Override fields of the demo's recipe."""

    def run(self, terminal: Terminal) -> int:
        from specauf import assets
        from specauf.demo import demo_recipe, run_demo
        from specauf.report import page

        require(2 <= self.minutes < float("inf"), f"--minutes must be at least 2, got {self.minutes:g}")
        out = self.out or Path("runs") / f"demo-{self.drafter}-b{self.block_size}-{self.minutes:g}min"
        kind = [f"drafter.block_size={self.block_size}", f"drafter.kind={self.drafter}"]
        base = demo_recipe([f"out={out}", *kind, *self.set])
        quiet_transformers()
        terminal.say("assets: the target (93 MB to download once), the corpus (27 MB), the prompts")
        assets.smollm2(), assets.sharegpt(), assets.human_eval()
        index = run_demo(base, self.minutes, terminal)
        results = page.read(index.parent)
        print_results(terminal, results)
        terminal.say(f"\nthe page: {index}")
        return exit_code(results)


@dataclass(frozen=True)
class Study:
    """Train a matrix of methods and seeds, measure all of them on the same recordings, and write the report. Resumable."""

    recipe: Recipe
    """A study's recipe, e.g. recipes/study_smollm2.yaml."""
    set: Overrides = ()
    """Override fields of the recipe, e.g. base.train.max_steps=50 parts.c.prompts=16."""
    stage: tuple[Literal["train", "record", "measure", "report"], ...] = ()
    """Run only these stages; all four when not given. Two processes may run one study at once and share its cells."""
    parts: tuple[str, ...] = ()
    """Run only these of the recipe's parts."""

    def run(self, terminal: Terminal) -> int:
        from specauf.report import page
        from specauf.study import recipe

        study = recipe.load(self.recipe, self.set)
        recipe.known_parts(study, self.parts)
        from specauf.study.stages import run_study

        index = run_study(study, self.stage, self.parts, _target(study.base.target), terminal)
        if index is None:
            return 0
        terminal.say(f"the page: {index}")
        return exit_code(page.read(index.parent))


@dataclass(frozen=True)
class Doctor:
    """Report what this machine has, what would fail, and how to fix it."""

    def run(self, terminal: Terminal) -> int:
        from specauf.doctor import examine

        checks = examine()
        for check in checks:
            mend = f"\n      {check.mend}" if check.status != "ok" and check.mend else ""
            terminal.say(f"{check.status:5} {check.name}: {check.detail}{mend}")
        return 1 if any(c.status == "fail" for c in checks) else 0


def _target(config: TargetConfig, to_shard: bool = False) -> Target:
    from specauf.target import Target

    quiet_transformers()
    return Target.load(config, to_shard)


def _verbs() -> Any:
    """The union of the verbs, each a subcommand with its own --help; no option hides in a nested subcommand."""
    verbs = (Prepare, Rollout, Train, Eval, Generate, Export, Report, Demo, Study, Doctor)
    return Union[tuple(Annotated[v, tyro.conf.subcommand(v.__name__.lower())] for v in verbs)]  # noqa: UP007


def main(typed: list[str] | None = None) -> int:
    """Entry point of the `specauf` command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what fails in the end is said
    warnings.filterwarnings("ignore", category=FutureWarning)
    given = sys.argv[1:] if typed is None else typed
    if given == ["--version"]:
        print(f"specauf {__version__}")
        return 0
    return reported(lambda: arguments.parse(_verbs(), given, __doc__).run(Terminal()), given)


if __name__ == "__main__":
    sys.exit(main())
