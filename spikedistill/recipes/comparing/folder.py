"""The folder of a comparison, and what is wrong with the runs that are there."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikedistill import runs
from spikedistill.origin import changed
from spikedistill.recipes import distill
from spikedistill.recipes.comparing.crew import Job
from spikedistill.recipes.comparing.rows import COMMON, Row, jobs_of
from spikedistill.report import comparison
from spikedistill.spec import SpecError


def folder_mistakes(c: Any, jobs: Sequence[Job], origin: Mapping[str, Any]) -> list[str]:
    """What is wrong with the folders that are there: nothing of it is touched."""
    mistakes, now, out = [], runs.machine()["versions"], Path(c.out)
    there = next(p for p in (out, *out.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return [f"out: cannot write to '{out}': '{there}' is {'read-only' if there.is_dir() else 'a file'}"]
    if mine := [name for name in ("result.json", "student.safetensors", "checkpoint.pt") if (out / name).exists()]:
        return [f"out: '{out}' is the folder of a run (it holds {', '.join(mine)}): choose another --out"]
    for job in jobs:
        where = f"'{job.folder}'"
        if not (job.folder / "config.json").exists():
            if job.folder.is_dir() and (found := runs.strangers(job.folder)):
                mistakes.append(f"out: {where} holds {', '.join(found)} but no config.json: move it away")
            continue
        try:
            other = job.other
            made = runs.read_json(job.folder / "machine.json")["versions"]
            if job.finished:
                result = runs.read_json(job.folder / "result.json")
                comparison.measures(
                    job.name, {0: result if job.settings["test"] else result | {"test": result["valid"]}}
                )
            else:
                mistakes += runs.damaged(job.folder)
        except (SpecError, KeyError, TypeError, AttributeError) as error:
            mistakes.append(
                f"out: {where} is damaged ({str(error) or type(error).__name__}): delete it to run it again"
            )
            continue
        if other:
            mistakes.append(f"out: {other}")
        made_of = {"data": origin["data"]} if job.name != "teacher" else {}
        made_of |= {"teacher": origin["teacher"]} if job.settings["teacher"] else {}
        for what in changed(job.folder, made_of):
            kind = {"data": "other data", "teacher": "another teacher"}[what]
            mistakes.append(f"out: {where} was made with {kind}: choose another --out, or delete it")
        hint = "--mixed accepts it" if job.finished else "delete it to begin it again"
        if not (c.mixed and job.finished):
            files = changed(job.folder, {"code": origin["code"]})
            mistakes += [f"out: {where} was made with another {file}: {hint}" for file in files]
        others = [f"{k} {made.get(k)} there, {now[k]} now" for k in ("spikedistill", "torch") if made.get(k) != now[k]]
        if others and not (c.mixed and job.finished):
            mistakes.append(f"out: {where} was made by other versions ({'; '.join(others)}): {hint}")
    others = "these are not the ones that the runs in"
    mistakes += [
        f"{key}: {others} '{out}' were made with: choose another --out" for key in changed(out, {**origin, "code": {}})
    ]
    if (out / "config.json").exists():
        before = distill.Config().model_dump() | runs.read_json(out / "config.json")
        now_all = json.loads(json.dumps(c.model_dump()))
        common = [k for k in (*COMMON, "tune", "tune_epochs", "teacher_lr") if k != "teacher" and k in before]
        if changes := runs.differences({k: before[k] for k in common}, {k: now_all[k] for k in common}, out):
            mistakes.append(f"out: '{out}' holds a comparison with other settings ({changes}): choose another --out")
    return mistakes


def strange(c: Any, rows: Sequence[Row]) -> list[str]:
    """Run folders that are no part of this comparison."""
    wanted = {job.name for row in rows for job in jobs_of(c, row)}
    there = (Path(c.out) / "runs").glob("*/config.json")
    return sorted(p.parent.name for p in there if p.parent.name not in wanted)
