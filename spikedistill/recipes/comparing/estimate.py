"""What a comparison would cost: its runs, which of them are finished, and about how long the others take."""

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from spikedistill import runs
from spikedistill.core.fit import Stage, fit
from spikedistill.recipes import distill
from spikedistill.recipes.comparing.crew import Job, threads
from spikedistill.recipes.comparing.rows import Row, config_of, jobs_of, planned, shard_of
from spikedistill.report import tables


def dry_run(
    c: Any, rows: Sequence[Row], teacher: Job | None, parts: Mapping[str, Any], tuned: Mapping[str, Any]
) -> dict[str, Any]:
    """Show each run, whether it is finished, and about how long it takes: from finished runs, else from a few steps."""
    i, n = shard_of(c) or (1, 1)
    mine = {job.name for job in [job for row in rows for job in jobs_of(c, row)][i - 1 :: n]}
    lines, total, first = [], 0.0, 0.0
    if teacher:
        shown = distill.seen_by_teacher(parts["data"], [name for row in rows for name in row.methods])
        how = (c, {**parts, "data": shown}, Row("teacher", ("ce",)), parts["teacher"])
        seconds = 0.0 if teacher.finished else estimate(*how) * teacher.settings["epochs"]
        lines.append(["teacher", "finished" if teacher.finished else "to do", "", f"{seconds:.0f}"])
        total = first = seconds
    for row in rows:
        jobs = jobs_of(c, row)
        known = [runs.read_json(job.folder / "result.json") for job in jobs if job.finished]
        todo = [job for job in jobs if not job.finished and job.name in mine]
        epoch = sum(r["train_seconds"] / r["epochs"] for r in known) / len(known) if known else None
        if epoch is None and (todo or (c.tune and not tuned.get(row.name))):
            epoch = estimate(c, parts, row, None)
        if c.tune and not tuned.get(row.name):
            seconds = (epoch or 0) * c.tune * (c.tune_epochs or c.epochs)
            lines.append([f"tune {row.name}", f"{c.tune} trials", "", f"{seconds:.0f}"])
            total += seconds
        for job in jobs:
            if job.finished:
                state, seconds = "finished", 0.0
            elif job.name not in mine:
                state, seconds = "another shard's", 0.0
            else:
                left = c.epochs - job.epochs_done
                state = f"goes on after epoch {job.epochs_done}" if job.epochs_done else "to do"
                seconds = (epoch or 0) * left
            lines.append([job.name, state, "finished runs" if known else "a few steps", f"{seconds:.0f}"])
            total += seconds
    tables.show(tables.Table(["run", "state", "estimated from", "s"], lines, f"{c.out}: nothing is run"))
    wall = first + (total - first) / max(1, c.jobs)  # the others wait for the teacher
    print(f"about {total:.0f} s of training" + (f", {wall:.0f} s with {c.jobs} side by side" if c.jobs > 1 else ""))
    return {"runs": [dict(zip(("run", "state", "from", "seconds"), line)) for line in lines], "seconds": total}


def estimate(c: Any, parts: Mapping[str, Any], row: Row, student: nn.Module | None) -> float:
    """Seconds an epoch, from a few steps, with the threads of a run, and the validation that follows."""
    data, config = parts["data"], config_of(c, row, 0, "")
    student, plan = planned(c, row, parts, student)
    batches = list(islice(data.train.epoch(0), 6))
    how = distill.training(config, student, len(batches)) | {"epochs": 1}
    fabric = distill.make_fabric(config.model_copy(update={"devices": 1}))
    before = torch.get_num_threads()
    torch.set_num_threads(threads(c))
    try:
        fit(Stage(batches[:2], **vars(plan), **how), fabric=fabric, progress=False)
        began = time.perf_counter()
        fit(Stage(batches, **vars(plan), **how), fabric=fabric, progress=False)
        step = (time.perf_counter() - began) / len(batches)
    finally:
        torch.set_num_threads(before)
    held_out = len(data.valid) * data.valid.batch_size / data.train.batch_size if data.valid is not None else 0
    return step * (len(data.train) + held_out / 3)
