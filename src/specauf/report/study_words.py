"""The fixed texts of a study's report: captions, notes, terms, and how its special numbers are written."""

from __future__ import annotations

from specauf.report.words import GLOSSARY, NONE, THIN, real

ABSENT = "not run yet"
VERDICTS = {
    "reproduced": "Reproduced here", "not reproduced": "Not reproduced here", "undecided": "Undecided", "not run": "Not run",
}  # fmt: skip
"""A claim's verdict -> its wording on the page, in the order in which verdicts are counted."""
OUTCOMES = ("better", "equivalent", "worse", "undecided")

PROSE = (
    "note", "value", "outcome", "task", "verdict", "T", "state", "objective", "kind", "family", "source", "licence",
)  # fmt: skip
"""Columns of words, aligned left."""

BOLD = (
    "The best of each column and temperature is bold, and so is what equals it to three decimals. Where prompt lookup leads, "
    "the best drafter is {mark}."
)
BEFORE_LOOP = (
    "The same rounds, counted only until the text first repeats eight tokens: a loop flatters every method that copies, "
    "prompt lookup most."
)
COMPARED = (
    "Differences of τ, a minus b, paired by prompt and seed. Equivalent, asked first: the 90 % interval lies within "
    "±{margin}, a margin set before the run. Better and worse: the 95 % interval excludes zero and, where p is corrected, "
    "the Holm-adjusted p is below 0.05. Undecided: everything else. With one or two seeds, runs show a difference between "
    "their methods only beyond the noise floor (“seed ±”), and never that the methods are equivalent; brackets hold what the "
    "interval says of these runs alone. The last column is the same comparison before the text loops."
)
ONE_SEED = "Where a method has one seed, its intervals are over prompts alone. {floor}"
FLOOR = (
    "“Seed ±” is the noise floor: how far two runs that differ in nothing but the seed may lie apart, from the part that has "
    "several. A smaller difference means nothing."
)
NO_FLOOR = "How far apart two seeds of one method lie is not known yet, so small differences mean nothing."
BUDGETS = (
    "A cell is one training run, a method with a seed; parts share cells. Clipped is the share of steps whose gradient was "
    "clipped to the norm's bound; head rows are the slots per block put through the vocabulary projection."
)
MEASURED = (
    "τ, with and without loops, and acceptance are averages over the benchmarks, each prompt weighing the same within a "
    "benchmark and each benchmark the same; engine τ and the cut share pool a benchmark's rounds; rounds and prompts are sums. "
    f"α in brackets rests on fewer than about {THIN} rounds."
)

SUPPORT_LABEL, ACTIVE_LABEL = "Support accuracy, a_support", "Active ratio, r_active"
COMMON_LABEL = "Common-token accuracy"

CAPTIONS = {
    "support": "{figure}The path of training in (r_active, a_support), from the open mark to the full one. A fixed support "
    "can only move up; a growing one moves up and to the right. {lines}",
    "training": "{figure}Training, step by step: accuracy on the slots that carry loss, accuracy on all valid slots, the share "
    "of a block that carries loss, and {tau}. {lines}",
    "alpha": "{figure}Conditional acceptance α_k at T = {temperature}, prompts equal within a benchmark and benchmarks equal: "
    "of the rounds whose first k − 1 draft tokens were accepted, the share whose k-th was accepted too. Small pale marks rest "
    f"on fewer than about {THIN} rounds.",
    "bars": "Tokens emitted per verify round at T = {temperature}. Bars begin at τ = 1, where no draft token is ever accepted, "
    "so that their length is the accepted length; lines are 95 % intervals, dots single seeds. The axis is the drafters': "
    "prompt lookup may go beyond it, with an arrow.",
    "credit": "Mean credit of each slot over the last tenth of training, all seeds. Shades are relative to the row's largest "
    "credit, since a loss divides by their sum; numbers are the credits themselves.",
    "reach": "Mean credit of each slot over training: how deep into a block the loss reaches, from the first steps on the left "
    "to the last on the right.",
}  # fmt: skip
SEVERAL = "Faint lines are seeds as logged, solid ones running means over them."
SINGLE = "One seed a method: faint as logged, solid its running mean."
TAU_REPLAY = "τ by replay of the drafter as it was, on held-out conversations and not on the benchmarks"
TAU_SIMULATED = "simulated τ, on the training batches"
TAU_MIXED = (
    "simulated τ, not drawn here, since with labels from the data and from the target it counts different things"
)

TERMS = (
    *(row for row in GLOSSARY if row[0] not in ("95 % interval", "self-selection, K, T_s")),
    ("credit c_k", "What slot k's cross entropy is multiplied by. It is detached: no gradient flows through it."),
    ("cell, seed", "One training run. The seed decides initial weights, anchors and data order; all methods share them."),
    ("95 % interval", "A bootstrap over training seeds, where there are several, and over prompts within each benchmark; the "
     "two turns of a conversation are drawn together."),
    ("p, Holm", "The two-sided p of no difference, and the same corrected for how many benchmarks were asked at once. "
     "With three seeds that decide, errors at the corrected level may be up to four times as frequent (docs/statistics.md)."),
    ("better, worse, equivalent, undecided", "The rule stands above each table of comparisons. Undecided is no statement of "
     "equality: it says that these data cannot tell."),
    ("noise floor", "The 95 % half-width of the difference of two single-seed runs of one method, from its seeds' spread."),
)  # fmt: skip


def chance(value: object) -> str:
    """A p-value: three decimals, or `< 0.001`."""
    number = real(value)
    return NONE if number is None else "< 0.001" if number < 0.001 else f"{number:.3f}"


def percent_list(shares: dict[str, object]) -> str:
    """`12.0 % at T = 0, 1.0 % at T = 1`."""
    told = [(key, real(value)) for key, value in shares.items()]
    return ", ".join(f"{100 * value:.1f} % at T = {key}" for key, value in told if value is not None)
