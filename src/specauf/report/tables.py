"""Rows and sentences from a results dict; no file is read or written here.

- A table is a list of rows of strings, its header first; a missing number is a dash, an empty column is left out.
- Sentences are made from the numbers: better or worse only where the paired interval excludes zero.
- Every string of the data goes through `clean`, and through `escape` before it enters Markdown.
"""

from __future__ import annotations

import re
from typing import Any

from specauf.report.words import (
    EXPERIMENT,
    NO_LOOP,
    NONE,
    THIN,
    average,
    clean,
    count,
    duration,
    fixed,
    large,
    real,
    series,
    share,
    signed,
    span,
    subscript,
)

Results = dict[str, Any]
Rows = list[list[str]]


def method_label(results: Results, name: str) -> str:
    found: dict[str, Any] = next((m for m in results["methods"] if m["name"] == name), {})
    return clean(found.get("label") or name)


def task_label(results: Results, task: str) -> str:
    return clean(results["evaluation"].get(task, {}).get("label") or task)


def survival(scores: dict[str, Any]) -> list[float]:
    """S_1, S_2, ... of one method on one task, from `survival` or else from `alpha`; stops at the first missing one."""
    kept: list[float] = []
    values, running = scores.get("survival") or [], 1.0
    for value in values or scores.get("alpha") or []:
        number = real(value)
        if number is None:
            break
        running = number if values else running * number
        kept.append(running)
    return kept


def thin_slots(scores: dict[str, Any]) -> set[int]:
    """Slots k, from 1, whose alpha rests on fewer than `THIN` rounds that reach them, by an estimate.

    Survival weighs prompts and tasks alike, so where a few prompts have most rounds the estimate is off.
    """
    rounds, reached, alphas = real(scores.get("rounds")), [1.0, *survival(scores)], scores.get("alpha") or []
    reached += [0.0] * len(alphas)  # survival stops at the first missing one
    return {k for k in range(1, len(alphas) + 1) if rounds is not None and rounds * reached[k - 1] < THIN}


def mean_alpha(results: Results, name: str, k: int) -> float | None:
    """alpha_k over all tasks: S_k averaged over tasks, over S_(k-1) likewise; None unless every task has both."""
    curves = [[1.0, *survival(task["methods"].get(name, {}))] for task in results["evaluation"].values()]
    if not curves or min(map(len, curves)) <= k or not (before := sum(c[k - 1] for c in curves)):
        return None
    return sum(c[k] for c in curves) / before


def tau_cell(scores: dict[str, Any]) -> str:
    interval = span(scores.get("interval"))
    return fixed(scores.get("tau")) + (f" [{fixed(interval[0])}, {fixed(interval[1])}]" if interval else "")


def dense(rows: Rows) -> Rows:
    """Without the columns (the first apart) that hold nothing but dashes."""
    keep = [i for i in range(len(rows[0])) if i == 0 or any(row[i] not in (NONE, "") for row in rows[1:])]
    return [[row[i] for i in keep] for row in rows]


def summary_rows(results: Results) -> Rows:
    """The main table: per method tau, averaged and with its interval on each task, alpha_1..4 over all tasks, the cost."""
    tasks, found = list(results["evaluation"]), results["evaluation"].values()
    heads = [h for label in ("average", *(task_label(results, t) for t in tasks)) for h in (f"τ {label}", "no loop")]
    rows = [["method", *heads, *(f"α{subscript(k)}" for k in range(1, 5)), "s/step", "tokens seen"]]
    for method in results["methods"]:
        name = method["name"]
        averages = [fixed(average(found, name, key)) for key in ("tau", "tau_before_loop")]
        row = [method_label(results, name), *averages]
        for scores in (results["evaluation"][task]["methods"].get(name, {}) for task in tasks):
            row += [tau_cell(scores), fixed(scores.get("tau_before_loop"))]
        row += [fixed(mean_alpha(results, name, k), 2) for k in range(1, 5)]
        rows.append([*row, fixed(method.get("seconds_per_step"), 2), large(method.get("tokens_seen"))])
    return dense(rows)


def task_rows(results: Results, task: str) -> Rows:
    """Everything measured on one task, a row per method."""
    measured = results["evaluation"][task]["methods"]
    slots = max((len(scores.get("alpha") or []) for scores in measured.values()), default=0)
    rows = [["method", "τ", "τ, no loop", "engine τ", "rounds", "cut", *(f"α{subscript(k + 1)}" for k in range(slots))]]
    for name in (m["name"] for m in results["methods"] if m["name"] in measured):
        scores = measured[name]
        alphas = [*(scores.get("alpha") or []), *[None] * slots][:slots]
        row = [method_label(results, name), tau_cell(scores), fixed(scores.get("tau_before_loop"))]
        row.append(fixed(scores.get("engine_tau")))
        rows.append([*row, count(scores.get("rounds")), share(scores.get("cut_share")), *(fixed(a) for a in alphas)])
    return dense(rows)


def task_note(results: Results, task: str) -> str:
    """Prompts, repeated share and note of one task, as sentences."""
    facts, parts = results["evaluation"][task], []
    asked = real(facts.get("prompts"))
    if asked is not None:
        met = [n for scores in facts["methods"].values() if (n := real(scores.get("prompts"))) is not None]
        none = asked - max(met, default=asked)
        without = f", {count(none)} of them without a round: the answer is one token" if none > 0 else ""
        parts.append(f"{count(asked)} prompt{'s' if asked != 1 else ''}{without}.")
    if repeated := real(facts.get("repeated_share")):
        parts.append(f"{share(repeated)} of the recorded text is repetition, which favours prompt lookup.")
    return " ".join([*parts, clean(facts.get("note") or "")]).strip()


def method_rows(results: Results) -> Rows:
    """What each method cost and saw."""
    rows = [["method", "steps", "s/step", "training", "tokens seen", "blocks seen", "head rows/block", "note"]]
    for m in results["methods"]:
        row = [method_label(results, m["name"]), count(m.get("steps")), fixed(m.get("seconds_per_step"), 2)]
        row += [duration(m.get("train_seconds")), large(m.get("tokens_seen")), large(m.get("blocks_seen"))]
        rows.append([*row, fixed(m.get("head_rows_per_block"), 2), clean(m.get("note") or "")])
    return dense(rows)


def ledger_rows(results: Results) -> Rows:
    """Records in = kept + each reason to drop; a line says so when the numbers do not add up."""
    ledger = results.get("ledger") or {}
    dropped, changed = ledger.get("dropped") or {}, ledger.get("changed") or {}
    rows = [["records", "count"]]
    rows += [[name, count(ledger[key])] for key, name in (("records_in", "read"), ("kept", "kept")) if key in ledger]
    rows += [[f"dropped: {clean(reason)}", count(n)] for reason, n in dropped.items()]
    if "records_in" in ledger and "kept" in ledger:
        known = [real(n) or 0 for n in (ledger["kept"], *dropped.values())]
        missing = (real(ledger["records_in"]) or 0) - sum(known)
        rows += [["unaccounted for", count(missing)]] if missing else []
    return rows + [[f"kept, but changed: {clean(reason)}", count(n)] for reason, n in changed.items()]


def check_rows(results: Results) -> Rows:
    rows = [["check", "value", "outcome"]]
    for check in results.get("checks") or []:
        passed = check.get("passed")
        outcome = "passed" if passed is True else "FAILED" if passed is False else "for information"
        rows.append([clean(check.get("name", "")), clean(check.get("value", "")), outcome])
    return rows


def speedup_rows(results: Results) -> Rows:
    rows = [["what", "ratio", "note"]]
    for item in results.get("speedups") or []:
        number = real(item.get("ratio"))
        ratio = NONE if number is None else f"{number:.2f} ×" if number < 10 else f"{number:.0f} ×"
        rows.append([clean(item.get("name", "")), ratio, clean(item.get("note") or "")])
    return dense(rows)


def selection_rows(results: Results) -> Rows:
    """Self-selection, decoded live and so apart from the table of replayed methods."""
    rows = [["method", "task", "τ", "gain", "nodes/round", "rounds"]]
    for item in results.get("selection") or []:
        bounds = span(item.get("gain_interval"))
        gain = signed(item.get("gain")) + (f" [{signed(bounds[0])}, {signed(bounds[1])}]" if bounds else "")
        label = f"{method_label(results, item['name'])}, {clean(item['how'])}"
        row = [label, task_label(results, item["task"]), tau_cell(item), gain]
        rows.append([*row, fixed(item.get("nodes"), 1), count(item.get("rounds"))])
    return dense(rows)


def flat(value: object) -> str:
    """A leaf as it is, a dict as `key value · key value`, a list with commas; underscores of keys become spaces."""
    if isinstance(value, dict):
        names = {key: "" if key == "name" else f"{clean(key).replace('_', ' ')} " for key in value}
        return " · ".join(f"{names[key]}{flat(leaf)}" for key, leaf in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(flat, value))
    return NONE if value is None else clean(value)


def verdict(comparison: dict[str, Any]) -> str:
    """`better`, `worse`, `undecided` (the interval includes zero) or `unknown` (there is no usable interval)."""
    interval, difference = span(comparison.get("interval")), real(comparison.get("difference"))
    if interval is None:
        return "unknown"
    if interval[0] > 0 and (difference is None or difference > 0):
        return "better"
    return "worse" if interval[1] < 0 and (difference is None or difference < 0) else "undecided"


def comparison_sentences(results: Results) -> list[str]:
    """One sentence per comparison, which claims no more than its interval says."""
    sentences = []
    for c in results.get("comparisons") or []:
        a, b = _side(results, c, "a"), _side(results, c, "b")
        where = f"{_at(c)}on {task_label(results, c['task'])}, " if _at(c) else f"On {task_label(results, c['task'])}, "
        interval, ratio, outcome = span(c.get("interval")), _ratio(c), verdict(c)
        bounds = f"95 % interval {signed(interval[0])} to {signed(interval[1])}" if interval else ""
        numbers = f"τ differs by {signed(c.get('difference'))}"
        if outcome == "unknown":
            sentences.append(f"{where}{a} and {b}: {numbers}; there is no interval, so nothing is claimed.")
        elif outcome == "undecided":
            sentences.append(f"{where}{a} against {b} is undecided: {numbers}, {bounds}.")
        else:
            times = (
                f"; {ratio:.2f} times as many draft tokens accepted a round (τ − 1) by point estimate" if ratio else ""
            )
            sentences.append(f"{where}{a} is {outcome} than {b}: {numbers}, {bounds}{times}.")
    return sentences


def compared(results: Results) -> str:
    """What the table of methods means; equal time and equal steps are explained only where they were compared."""
    controlled = any("equal" in str(c.get("condition")) for c in results.get("comparisons") or [])
    return EXPERIMENT * controlled + NO_LOOP


def headline(results: Results) -> list[str]:
    """The findings in one sentence per pair and condition, then the tau that prompt lookup reaches without parameters."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for c in results.get("comparisons") or []:
        groups.setdefault((c["a"], c["b"], _at(c)), []).append(c)
    sentences = [_finding(results, at, members) for (_, _, at), members in groups.items()]
    nothing = ["No paired comparison is recorded here; the table gives what was measured."]
    return [*(sentences or nothing), *_lookups(results)]


def _finding(results: Results, at: str, members: list[dict[str, Any]]) -> str:
    a, b, clauses = _side(results, members[0], "a"), _side(results, members[0], "b"), []
    for outcome in ("better", "worse", "undecided", "unknown"):
        chosen = [c for c in members if verdict(c) == outcome]
        where = series([task_label(results, c["task"]) for c in chosen])
        ratios = [r for c in chosen if (r := _ratio(c))]
        if chosen and outcome in ("better", "worse"):
            told = outcome == "better" and len(ratios) == len(chosen)
            times = (
                f" ({series([f'{r:.2f}' for r in ratios])} times its accepted length, by point estimate)"
                if told
                else ""
            )
            clauses.append(f"{a} is {outcome} than {b} on {where}{times}")
        elif chosen:
            why = "is undecided" if outcome == "undecided" else "has no interval, so nothing is claimed"
            clauses.append(f"the difference between {a} and {b} on {where} {why}")
    text = "; ".join(clauses)
    return f"{at}{text if at or not text.startswith('the difference') else 'T' + text[1:]}."  # labels as they are spelt


def _lookups(results: Results) -> list[str]:
    tasks, methods = results["evaluation"], results["methods"]
    taus = {(m["name"], t): real(e["methods"].get(m["name"], {}).get("tau")) for m in methods for t, e in tasks.items()}
    lookups, sentences = [m["name"] for m in methods if m.get("kind") == "lookup"], []
    rivals_of = {m["name"] for m in methods if m.get("kind") not in ("lookup", "both")}  # drafters by themselves
    for name in lookups:
        met = [t for t in tasks if taus[name, t] is not None]
        best = [max((v for (n, u), v in taus.items() if u == t and n in rivals_of and v), default=None) for t in met]
        rivals = f" (best drafter: {series([fixed(v) for v in best])})" if all(best) else ""
        reached = series([f"{fixed(taus[name, t])} on {task_label(results, t)}" for t in met])
        if met:
            sentences.append(f"Without parameters, {method_label(results, name)} reaches τ {reached}{rivals}.")
    return sentences


def _side(results: Results, comparison: dict[str, Any], side: str) -> str:
    """The label of `a` or `b`. If there is a condition, that of the objective before the `@`: the condition says the rest."""
    name = comparison[side]
    base = name.partition("@")[0]
    known = bool(comparison.get("condition")) and any(m["name"] == base for m in results["methods"])
    return method_label(results, base if known else name)


def _ratio(comparison: dict[str, Any]) -> float | None:
    ratio = real(comparison.get("ratio"))
    return ratio if ratio and ratio > 0 else None


def _at(comparison: dict[str, Any]) -> str:
    condition = clean(comparison.get("condition") or "")
    if condition.startswith("before"):
        return f"B{condition[1:]}, "
    return f"At {condition}, " if condition else ""


def live_line(sample: dict[str, Any]) -> str:
    """tau, rounds and speeds of one live sample."""
    parts = [
        f"τ {fixed(sample.get('tau'))}",
        f"{count(sample.get('rounds'))} round{'s' if sample.get('rounds') != 1 else ''}",
    ]
    if real(sample.get("tokens_per_second")) is not None:
        plain = real(sample.get("plain_tokens_per_second"))
        beside = f" beside {fixed(plain, 1)} for plain decoding" if plain is not None else ""
        parts.append(f"{fixed(sample['tokens_per_second'], 1)} tokens/s{beside}")
    return " · ".join(part for part in parts if not part.startswith(NONE) and not part.endswith(NONE))


def plain_table(rows: Rows) -> str:
    """Aligned columns for a terminal: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows]
    lines.insert(1, ["─" * w for w in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def meta(results: Results) -> list[str]:
    """What stands under the title: date, target, data, machine."""
    facts = results.get("provenance") or {}
    machine = facts.get("machine") or {}
    parts: list[str | None] = [
        re.sub(r"^(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d).*", r"\1 \2", clean(results.get("created") or ""))
    ]
    parts += [(facts.get(key) or {}).get("name") for key in ("target", "data")]
    parts += [machine.get("cpu"), f"{machine['cores']} cores" if machine.get("cores") else None]
    return [clean(part) for part in parts if part]


def provenance_rows(results: Results) -> Rows:
    """Command, provenance and settings, a row each."""
    facts = {
        "command": results.get("command"),
        **(results.get("provenance") or {}),
        "settings": results.get("settings"),
    }
    rows = [[clean(key).replace("_", " "), flat(value)] for key, value in facts.items() if value not in (None, {}, [])]
    return [["key", "value"], *rows]
