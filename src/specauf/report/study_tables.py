"""A study's tables: the paper's grids of emitted lengths as plain data, and lists of rows for everything else.

A `Grid` is a table with groups of columns and blocks of rows, which the page and the Markdown each write in their own way.
Which number is best, which is missing and what is printed small is decided here, once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from specauf.report import study_index as index
from specauf.report import tables
from specauf.report.study_index import MACRO
from specauf.report.study_words import (
    ABSENT,
    BEFORE_LOOP,
    BOLD,
    FLOOR,
    NO_FLOOR,
    ONE_SEED,
    chance,
    percent_list,
)
from specauf.report.tables import Results, Rows, dense, flat, tau_cell
from specauf.report.words import NONE, clean, count, duration, fixed, large, real, share, signed, span, subscript

BEST, BEST_DRAFTER, MISSING = "best", "drafter", "missing"
SLOTS = 6
"""Slots that the paper plots alpha of; deeper ones rest on few rounds."""
FIELDS = {"tau": "Emitted length τ", "tau_before_loop": "Emitted length τ before the text loops"}


@dataclass(frozen=True)
class Cell:
    """One number: what is printed, what is printed small below it, and `best`, `drafter`, `missing` or nothing."""

    text: str
    small: tuple[str, ...] = ()
    mark: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    label: str
    small: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Block:
    """The rows of one temperature."""

    label: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Grid:
    """`groups` are (title, columns under it); `heads` the columns' own titles; `notes` stand below."""

    caption: str
    groups: tuple[tuple[str, int], ...]
    heads: tuple[str, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]


def grids(results: Results, part: dict[str, Any]) -> list[Grid]:
    """A part's tables of emitted lengths: of tau, run or not, and of every other field that was measured."""
    scores = index.scores(results, part)
    known = [field for field in FIELDS if field == "tau" or any(real(s.get(field)) is not None for s in scores)]
    return [emitted(results, part, field) for field in known]


def emitted(results: Results, part: dict[str, Any], field: str = "tau") -> Grid:
    """The paper's table of emitted lengths: a block of rows per temperature, benchmarks under families, their average last.

    `field` is "tau" or "tau_before_loop"; the second has no intervals. Every method of the part has a row.
    """
    groups, columns = index.families(results), [*index.tasks(results), MACRO]
    blocks = []
    for temperature in index.temperatures(results, part):
        found = []
        for name in index.rows(results, part):
            cells = tuple(_cell(results, part, temperature, name, task, field) for task in columns)
            found.append(Row(name, index.label(results, name), _seeds(results, part, temperature, name), cells))
        blocks.append(Block(f"T = {clean(temperature)}", _marked(results, found)))
    number = index.table_of(results, part)
    like = f", laid out as Table {number} of the paper" if number else ""
    return Grid(
        caption=f"{FIELDS[field]}{like}",
        groups=(*((family, len(names)) for family, names in groups), ("OVERALL", 1)),
        heads=(*(index.task_label(results, task) for task in columns[:-1]), "Avg."),
        blocks=tuple(blocks),
        notes=_notes(results, part, field, blocks),
    )


def _cell(results: Results, part: dict[str, Any], temperature: str, name: str, task: str, field: str) -> Cell:
    found = index.score(results, part, temperature, name, task)
    if real(found.get(field)) is None:
        return Cell(ABSENT, mark=MISSING)
    small: list[str] = []
    if field == "tau":
        bounds = span(found.get("interval"))
        small += [f"{fixed(bounds[0])} – {fixed(bounds[1])}"] if bounds else []
        floor = index.noise_floor(results, part, temperature, name, task) if _single(results, name, found) else None
        small += [f"seed ± {fixed(floor)}"] if floor is not None else []
    return Cell(fixed(found[field]), tuple(small))


def _single(results: Results, name: str, score: dict[str, Any]) -> bool:
    return len(score.get("seeds") or []) == 1 and not index.is_lookup(results, name)


def _seeds(results: Results, part: dict[str, Any], temperature: str, name: str) -> str:
    """What to print below a method when not every seed of the part has been measured."""
    wanted = part.get("seeds") or []
    if index.is_lookup(results, name):
        return ""
    places = [index.score(results, part, temperature, name, t) for t in [*index.tasks(results), MACRO]]
    counts = {len(score["seeds"]) for score in places if score.get("seeds")}
    least = min(counts, default=len(wanted))
    return f"{least} of {len(wanted)} seeds" if least < len(wanted) else ""


def _marked(results: Results, rows: list[Row]) -> tuple[Row, ...]:
    """Rows with the best cell of each column marked, and cells that print the same. Where prompt lookup is best, the best
    drafter's cell is marked too."""

    def best(column: int, chosen: list[Row]) -> str | None:
        texts = [row.cells[column].text for row in chosen if row.cells[column].mark != MISSING]
        return max(texts, key=lambda text: float(text.replace("−", "-")), default=None)

    drafting = [row for row in rows if not index.is_lookup(results, row.name)]
    width = len(rows[0].cells) if rows else 0
    first, second = [best(i, rows) for i in range(width)], [best(i, drafting) for i in range(width)]
    marked = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row.cells):
            kind = BEST if cell.text == first[i] else BEST_DRAFTER if row in drafting and cell.text == second[i] else ""
            cells.append(cell if cell.mark else replace(cell, mark=kind))
        marked.append(replace(row, cells=tuple(cells)))
    return tuple(marked)


def _notes(results: Results, part: dict[str, Any], field: str, blocks: list[Block]) -> tuple[str, ...]:
    """What one must know to read the table. The writer fills in `{mark}`: underlined, or italic."""
    if field == "tau_before_loop":
        return (BEFORE_LOOP,)
    cells = [cell for block in blocks for row in block.rows for cell in row.cells]
    notes = [BOLD]
    if any(_single(results, s["method"], s) for s in index.scores(results, part)):
        quoted = any(small.startswith("seed ±") for cell in cells for small in cell.small)
        notes.append(ONE_SEED.format(floor=FLOOR if quoted else NO_FLOOR))
    return tuple(notes)


def detail_rows(results: Results, part: dict[str, Any]) -> Rows:
    """What was measured besides tau, over all benchmarks: a row per method and temperature."""
    places = [(name, t) for t in index.temperatures(results, part) for name in index.rows(results, part)]
    scores = [index.score(results, part, temperature, name, MACRO) for name, temperature in places]
    slots = min(max((len(found.get("alpha") or []) for found in scores), default=0), SLOTS)
    rows = [["method", "T", "τ", "before a loop", "engine τ", "rounds", "prompts", "cut"]]
    rows[0] += [f"α{subscript(k + 1)}" for k in range(slots)]
    for (name, temperature), found in zip(places, scores, strict=True):
        tau = tau_cell(found) if real(found.get("tau")) is not None else ABSENT
        row = [index.label(results, name), clean(temperature), tau, fixed(found.get("tau_before_loop"))]
        row += [fixed(found.get("engine_tau")), count(found.get("rounds")), count(found.get("prompts"))]
        alphas, thin = [*(found.get("alpha") or []), *[None] * slots][:slots], tables.thin_slots(found)
        shown = [f"({fixed(a)})" if a is not None and k in thin else fixed(a) for k, a in enumerate(alphas, start=1)]
        rows.append([*row, share(found.get("cut_share")), *shown])
    return dense(rows)


def comparison_rows(results: Results, part: dict[str, Any]) -> Rows:
    """Every comparison of a part, the average first. A method not yet compared with the baseline has a row too."""
    rows = [["a against b", "T", "task", "difference", "ratio of A", "p", "p, Holm", "verdict", "before a loop"]]
    compared = {_place(c): c for c in index.comparisons(results, part)}
    later = {_place(c): c for c in index.comparisons(results, part, before_loop=True)}
    places = [*compared, *(place for place in later if place not in compared)]
    asked = {(temperature, name) for temperature, task, *names in places if task == MACRO for name in names}
    baseline, heats = part.get("baseline"), index.temperatures(results, part)
    for name in index.drafters(results, part) if baseline else []:
        places += [(t, MACRO, name, str(baseline)) for t in heats if name != baseline and (t, name) not in asked]
    tasks = [MACRO, *index.tasks(results)]
    for place in sorted(places, key=lambda p: (_at(heats, p[0]), _at(tasks, p[1]))):
        c, ratio = compared.get(place, {}), real(compared.get(place, {}).get("ratio"))
        temperature, task, a, b = place
        row = [f"{index.label(results, a)} against {index.label(results, b)}", clean(temperature)]
        row += [index.task_label(results, task), _difference(c), f"{ratio:.2f} ×" if ratio is not None else NONE]
        row += [chance(c.get("p")), chance(c.get("p_holm")), _verdict(c) if c else ABSENT]
        rows.append([*row, _before(later.get(place, {}))])
    return dense(rows)


def _place(c: dict[str, Any]) -> tuple[str, str, str, str]:
    return c["temperature"], c["task"], c["a"], c["b"]


def _at(order: list[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _difference(c: dict[str, Any]) -> str:
    bounds = span(c.get("interval"))
    return signed(c.get("difference")) + (f" [{signed(bounds[0])} to {signed(bounds[1])}]" if bounds else "")


def _verdict(c: dict[str, Any]) -> str:
    """`better`; of single runs that do not decide, `undecided (seed ± 0.065; these runs: better)`."""
    verdict, said = clean(c.get("verdict") or "no verdict"), clean(index.standing(c) or "no verdict")
    floor = real(c.get("noise_floor"))
    noise = [] if floor is None else [f"seed ± {fixed(floor)}"]
    noise += [f"these runs: {verdict}"] if said != verdict else []
    return f"{said} ({'; '.join(noise)})" if noise else said


def _before(c: dict[str, Any]) -> str:
    """`+0.041, better [+0.010 to +0.070]`."""
    value, bracket, bounds = _difference(c).partition(" [")
    told = f", {clean(index.standing(c))}" if index.standing(c) else ""
    return f"{value}{told}{bracket}{bounds}" if value != NONE else NONE


def budget_rows(results: Results) -> Rows:
    """What every cell cost and saw: a row per training run, those that have not run included."""
    rows = [["method", "seed", "state", "steps", "epochs", "tokens", "blocks", "s/step", "training", "clipped"]]
    rows[0] += ["head rows/block"]
    for m in results["methods"]:
        name = index.label(results, m["name"])
        for cell in m.get("cells") or []:
            steps, full = count(cell.get("steps")), count(cell.get("max_steps"))
            done = steps if NONE in (steps, full) or steps == full else f"{steps} of {full}"
            row = [name, clean(cell.get("seed", NONE)), state(cell), done, fixed(cell.get("epochs"), 2)]
            row += [
                large(cell.get("tokens_seen")),
                large(cell.get("blocks_seen")),
                fixed(cell.get("seconds_per_step"), 2),
            ]
            row += [duration(cell.get("train_seconds")), share(cell.get("clipped_share"))]
            rows.append([*row, fixed(cell.get("head_rows_per_block"), 2)])
        if not m.get("cells"):
            nothing = "no training" if index.is_lookup(results, m["name"]) else ABSENT
            rows.append([name, NONE, nothing, *[NONE] * 8])
    return dense(rows)


def state(cell: dict[str, Any]) -> str:
    """`done`, `training`, or that it has not run."""
    told = cell.get("state")
    return ABSENT if told in (None, "missing") else clean(told)


def method_rows(results: Results) -> Rows:
    """What each method is."""
    rows = [["method", "kind", "B", "objective", "learning rate", "note"]]
    for m in results["methods"]:
        kind = {"dflash": "DFlash", "domino": "Domino", "lookup": "no drafter"}.get(m.get("kind") or "", m.get("kind"))
        objective = flat({k: v for k, v in (m.get("objective") or {}).items() if v not in (None, {}, [])})
        rate = real(m.get("lr"))
        row = [index.label(results, m["name"]), clean(kind or NONE), count(m.get("block_size")), objective or NONE]
        rows.append([*row, NONE if rate is None else f"{rate:g}", clean(m.get("note") or "")])
    return dense(rows)


def task_rows(results: Results) -> Rows:
    """Where the prompts come from, and how much of the target's text repeats."""
    rows = [["benchmark", "family", "prompts", "conversations", "source", "licence", "repeated text", "note"]]
    for name, facts in (results.get("tasks") or {}).items():
        row = [index.task_label(results, name), clean(facts.get("family") or NONE), count(facts.get("prompts"))]
        row += [count(facts.get("clusters")), clean(facts.get("source") or NONE), clean(facts.get("licence") or NONE)]
        repeated = percent_list(facts.get("repeated_share") or {}) or NONE
        rows.append([*row, repeated, clean(facts.get("note") or "")])
    return dense(rows)


def recipe_rows(results: Results) -> Rows:
    """The recipe, a row for each section of the base run, each method and each part; provenance holds it whole."""
    recipe = (results.get("provenance") or {}).get("config")
    rows = [["key", "value"]]
    for key, held in recipe.items() if isinstance(recipe, dict) else ():
        if isinstance(held, dict) and any(isinstance(leaf, dict) for leaf in held.values()):
            rows += [[clean(f"{key}: {name}"), flat(leaf)] for name, leaf in held.items()]
        else:
            rows.append([clean(key), flat(held)])
    return rows


def provenance_rows(results: Results) -> Rows:
    """Command, provenance and settings without the recipe, which has rows of its own."""
    box = {k: v for k, v in (results.get("provenance") or {}).items() if k != "config"}
    return tables.provenance_rows({**results, "provenance": box})
