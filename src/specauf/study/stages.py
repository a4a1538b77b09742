"""`specauf study`: train, record, measure, report. Each stage resumes where it was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specauf.console import Console
from specauf.files import atomic_write_text, json_text
from specauf.strict import UserError
from specauf.study.cells import check_same_data, check_unchanged
from specauf.study.measuring import check_live_all, measure_all
from specauf.study.recipe import Study, known_parts
from specauf.study.recordings import check_tasks, record_all
from specauf.study.results import collect
from specauf.study.training import Corpus, check_source, train_cells
from specauf.target import Target

STAGES = ("train", "record", "measure", "report")


def run_study(
    study: Study, stages: Sequence[str], parts: Sequence[str], target: Target, console: Console
) -> Path | None:
    """Run the named stages (all when none is named) of the named parts. Returns the report's page if it was written.

    Raises `UserError` after the last stage when the training of a cell failed: the others have gone all the way.
    """
    primary, keys = next(iter(study.parts)), known_parts(study, parts)
    wanted = [stage for stage in STAGES if stage in stages or not stages]
    console.say(f"{study.title}: {study.out}; target {target.name}, fingerprint {target.fingerprint()}")
    for cell in study.cells():  # of every part: the report shows them all under the recipe's names
        check_unchanged(cell)
        check_source(study, cell)
    corpus, recordings = Corpus(study, target, console), study.recordings(keys)
    failed, written = list[str](), None
    if {"train", "record"} & set(wanted):
        corpus.prepared(study.base)  # the task of held-out prompts comes from it
        check_tasks(study, target, recordings)
    if {"train", "measure"} & set(wanted):  # no cell may have been trained on what is measured
        for cell in study.cells(keys):
            if (cell.out / "run.json").is_file():
                check_same_data(cell, corpus.prepared(cell.config).train.meta["key"], target.fingerprint())
    if "train" in wanted:
        cells = study.cells(keys)
        left, failed = train_cells(study, target, corpus, cells, console)
        for cell in study.cells():  # a cell that another was made from may just have been retrained
            check_source(study, cell)
        done = len(cells) - len(left)
        console.say(f"{done} of {len(cells)} cells are trained" + (f"; left: {', '.join(left)}" if left else ""))
    if "record" in wanted:
        left = record_all(study, target, recordings, console)
        console.say("the target is recorded" + _left("recordings", left))
    if "measure" in wanted:
        left, unrecorded = measure_all(study, target, keys, recordings, console)
        if primary in keys:
            left += check_live_all(study, target, primary, console)
        console.say("finished cells are measured" + _left("measurements", left))
        if unrecorded:
            console.say(f"not recorded yet, so not measured: {', '.join(unrecorded)}")
    if "report" in wanted:
        found = collect(study, target, corpus.prepared(study.base))
        atomic_write_text(study.out / "results.json", json_text(found))
        from specauf.report import page  # here, since it loads matplotlib

        written = page.write(found, study.out / "report")
    if failed:
        raise UserError(f"the training of {', '.join(failed)} failed, as said above; the same command tries it again")
    return written


def _left(what: str, names: Sequence[str]) -> str:
    return f"; another process has these {what}: {', '.join(names)}" if names else ""
