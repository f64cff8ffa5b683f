"""The folder of a comparison: what its data and teacher are, and what is wrong with the runs that are there."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from spikedistill import data as data_sets
from spikedistill import runs
from spikedistill.recipes import distill
from spikedistill.recipes.comparing.crew import Job
from spikedistill.recipes.comparing.rows import Row, jobs_of
from spikedistill.report import comparison
from spikedistill.spec import SpecError


def fingerprint(data: Any) -> str:
    """What the data are, in 16 letters: of tensors every value, of files their names and sizes; and the split."""
    digest = hashlib.sha256()
    images = data_sets.images_of(data)
    train = [data.train] if images is None else [data.train.events.train, images.train]
    for split in (*train, data.valid, data.test):
        if split is None:
            continue
        digest.update(split.index.numpy().tobytes())
        if isinstance(split, data_sets.Tensors):
            digest.update(split.labels.cpu().numpy().tobytes())
            images = torch.as_tensor(split.images[:: max(1, len(split.images) // 4096)])
            digest.update(images.cpu().contiguous().numpy().tobytes())
        else:
            for path, label in getattr(split.dataset, "samples", []):
                digest.update(f"{Path(path).name} {Path(path).stat().st_size} {label}\n".encode())
    return digest.hexdigest()[:16]


def teacher_print(teacher: str | None) -> str | None:
    """What the teacher's weights are, in 16 letters; its name, where the weights are not a file of ours."""
    if teacher is None or not Path(teacher).exists():
        return teacher
    return hashlib.sha256(runs.student_file(teacher).read_bytes()).hexdigest()[:16]


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
            there = sorted(p.name for p in job.folder.iterdir() if p.name in runs.FILES) if job.folder.is_dir() else []
            if there:
                mistakes.append(f"out: {where} holds {', '.join(there)} but no config.json: move it away")
            continue
        try:
            before = distill.Config().model_dump() | runs.read_json(job.folder / "config.json")
            made = runs.read_json(job.folder / "machine.json")["versions"]
            checkpoint = job.folder / "checkpoint.pt"
            if job.finished:
                comparison.measures(job.name, {0: runs.read_json(job.folder / "result.json")})
            elif checkpoint.exists() and not is_zipfile(checkpoint):
                mistakes.append(f"out: '{checkpoint}' is damaged: delete it, and the run begins again")
        except (SpecError, KeyError, TypeError, AttributeError) as error:
            mistakes.append(
                f"out: {where} is damaged ({str(error) or type(error).__name__}): delete it to run it again"
            )
            continue
        if changes := runs.differences(before, json.loads(json.dumps(job.settings))):
            mistakes.append(
                f"out: {where} holds a run with other settings ({changes}): choose another --out, or delete it"
            )
        others = [f"{k} {made.get(k)} there, {now[k]} now" for k in ("spikedistill", "torch") if made.get(k) != now[k]]
        if others and not c.mixed:
            mistakes.append(f"out: {where} was made by other versions ({'; '.join(others)}): --mixed accepts it")
    known = out / "origin.json"
    if known.exists():
        before = runs.read_json(known)
        for key, value in origin.items():
            if before.get(key) is not None and value is not None and before[key] != value:
                mistakes.append(
                    f"{key}: these are not the ones that the runs in '{out}' were made with: choose another --out"
                )
    return mistakes


def strange(c: Any, rows: Sequence[Row]) -> list[str]:
    """Run folders that are no part of this comparison."""
    wanted = {job.name for row in rows for job in jobs_of(c, row)}
    there = (Path(c.out) / "runs").glob("*/config.json")
    return sorted(p.parent.name for p in there if p.parent.name not in wanted)
