"""Methods side by side: same student, teacher, split, augmentation, epochs and budget, paired seeds.

Run:    spikedistill compare --method "ce; kd; bkd+activity; soft = kd(tau=8)" --teacher runs/teacher --seeds 0,1,2
A row is one method or several that compose. Each run is a process and a folder: the same command goes on where a killed
one was, repeats nothing that is finished, and makes the tables anew. --teacher may be a model of `spikedistill list
models`; it is then trained first. --row.kd.lr 0.02 gives a row its own learning rate; --tune N finds one for every row.

OUT/compare.json, .csv, .md, .tex   the comparison
OUT/runs/ROW-SEED/                  run folders, with ROW-SEED.json, the settings, and ROW-SEED.log beside
OUT/teacher/, OUT/tune/             the teacher and the trials, where they are made here
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from spikedistill import data as data_sets
from spikedistill import models, runs
from spikedistill.core.fit import Stage, fit
from spikedistill.recipes import distill, tuning
from spikedistill.recipes.crew import Crew, Job, claim
from spikedistill.report import comparison, energy, tables
from spikedistill.report.activity import activity
from spikedistill.report.summary import many
from spikedistill.spec import SpecError, near, parse


class Config(distill.Config):
    """Settings of `compare`: those of `distill`, the same for every row, and these."""

    method: list[str] = ["ce", "kd", "bkd"]
    """The rows, separated by semicolons; + or a comma composes, NAME = gives a row a name."""
    seeds: list[Annotated[int, Field(ge=0)]] = [0, 1, 2]
    """A run of every row for each; runs of one seed share initialisation, order and augmentation."""
    baseline: str | None = None
    """The row that the others are compared with; the first, where none is named."""
    row: dict[str, dict[str, Any]] = {}
    """What a row may have of its own: --row.NAME.lr 0.02; also weight_decay, optimizer, schedule, warmup, clip, ema."""
    tune: Annotated[int, Field(ge=0)] = 0
    """Trials for each row, judged on validation, of its learning rate and weights; 0 takes the settings as given."""
    tune_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs of a trial, where not those of the runs."""
    teacher_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs of a teacher that is trained here, where not those of the runs."""
    teacher_lr: Annotated[float, Field(gt=0)] = 5e-3
    """Learning rate of a teacher that is trained here."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the intervals."""
    jobs: Annotated[int, Field(ge=0)] = 1
    """Runs side by side, each a process; 0 runs one after the other in this process."""
    shard: str | None = None
    """i/n: only this share of the runs, to use several machines on one folder."""
    dry_run: bool = False
    """Show the runs and an estimate of the time, and run nothing."""
    mixed: bool = False
    """Accept finished runs that another version of spikedistill or torch has made."""
    out: str = "runs/compare"
    """Folder of the comparison."""
    seed: Literal[0] = Field(0, exclude=True)  # pyrefly: ignore
    overwrite: Literal[False] = Field(False, exclude=True)  # pyrefly: ignore
    test: Literal[True] = Field(True, exclude=True)  # pyrefly: ignore

    @field_validator("method", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return distill.split(value, ";") if isinstance(value, str) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value

    @field_validator("seed", "overwrite", "test", mode="before")
    @classmethod
    def _not_here(cls, value: Any, info: ValidationInfo) -> Any:
        if value != cls.model_fields[str(info.field_name)].default:
            raise ValueError("it is not a setting of compare; seeds are given as --seeds 0,1,2")
        return value


OWN = ("lr", "weight_decay", "optimizer", "schedule", "warmup", "clip", "ema")
COMMON = [name for name in distill.Config.model_fields if name not in ("method", "seed", "out", "overwrite", "test")]
MARKS = ",+"
TUNE_SEED = 1_000_003  # of the trials; no run has it


@dataclass(frozen=True)
class Row:
    """One row of the comparison: methods with their settings, and what it has of its own."""

    name: str
    methods: tuple[str, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def chosen(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, self.settings.get(name, {})) for name in self.methods]

    def of(self, values: Mapping[str, Any]) -> "Row":
        """The row with other values, as `tuning.applied` gives them."""
        own = {k: v for k, v in values.items() if not isinstance(v, dict)}
        inner = {name: given | values.get(name, {}) for name, given in self.chosen}
        return replace(self, own=self.own | own, settings=inner)


# What is asked for, and what is wrong with it


def check(c: Config) -> tuple[list[Row], list[str]]:
    """The rows, and every mistake that can be found without loading anything."""
    rows, mistakes, used = [], [], set()
    sections = dict(c.model_extra or {})
    for text in c.method:
        name, named, body = _named(text)
        try:
            parts = distill.split(body, MARKS)
            names = [parse(part)[0] for part in parts]
        except SpecError as error:
            mistakes += [f"method: {m}" for m in error.mistakes]
            continue
        name = name if named else "+".join(names)
        used |= set(names)
        own = c.row.get(name, {})
        if not re.fullmatch(r"[A-Za-z0-9_+]+", name):
            mistakes.append(f"method: '{name}' will not do as the name of a row: letters, digits, _ and + only")
        if any(row.name == name for row in rows):
            mistakes.append(
                f"method: two rows are called '{name}': name them, as in 'soft = kd(tau=8); hard = kd(tau=1)'"
            )
        if wrong := [k for k in own if k not in OWN]:
            mistakes += [f"row.{name}.{k}: {_same(k)}" for k in wrong]
        given = {m: sections[m] for m in names if m in sections}
        asked = {k: getattr(c, k) for k in COMMON} | {k: v for k, v in own.items() if k in OWN}
        run, problems = distill.read(asked | given | {"method": parts})
        mistakes += [f"row.{name}.{p}" if p.split(":")[0] in own else p for p in problems]
        if run is None:
            continue
        objects = ("teacher",) if _is_trained_here(c.teacher) else ()
        chosen, problems = distill.check(run, objects)
        mistakes += problems
        settings = {m: json.loads(json.dumps(s)) for m, s in chosen}
        rows.append(Row(name, tuple(names), settings, {k: getattr(run, k) for k in own if k in OWN}))
    names = [row.name for row in rows]
    for key in sections.keys() - used:
        valid = [*Config.model_fields, *distill.METHODS]
        why = f"settings for a method that no row uses; the rows are {', '.join(names)}"
        mistakes.append(f"{key}: {why if key in distill.METHODS else 'no such setting; ' + near(key, valid)}")
    mistakes += [f"row.{name}: there is no such row; {near(name, names)}" for name in c.row if name not in names]
    if c.baseline is not None and c.baseline not in names:
        mistakes.append(f"baseline: '{c.baseline}' is no row; {near(c.baseline, names)}")
    if not c.method:
        mistakes.append("method: no row is given")
    if len(set(c.seeds)) < len(c.seeds) or not c.seeds:
        mistakes.append(f"seeds: {','.join(map(str, c.seeds)) or 'none'}: give each seed once, 0,1,2")
    if c.shard is not None and _shard(c) is None:
        mistakes.append(f"shard: '{c.shard}' will not do: it should be i/n, such as 1/4 to 4/4")
    if c.tune:
        mistakes += tuning.need_optuna()
    if c.accelerator == "cuda" and c.jobs > torch.cuda.device_count() * 8:
        mistakes.append(f"jobs: {c.jobs} processes on {torch.cuda.device_count()} GPUs")
    return rows, [*dict.fromkeys(mistakes)]


def _named(text: str) -> tuple[str, bool, str]:
    """'soft = kd(tau=8)' -> 'soft', True, 'kd(tau=8)';  'kd(tau=8)' -> '', False, 'kd(tau=8)'."""
    head, *rest = distill.split(text, "=")
    return (head, True, "=".join(rest)) if rest else ("", False, text)


def _same(key: str) -> str:
    if key in distill.Config.model_fields:
        return f"it is the same for every row of a comparison; a row may have its own {', '.join(OWN)}"
    return f"no such setting; {near(key, OWN)}"


def _shard(c: Config) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)/(\d+)", c.shard or "1/1")
    i, n = map(int, found.groups()) if found else (0, 0)
    return (i, n) if 1 <= i <= n else None


def _is_trained_here(teacher: str | None) -> bool:
    """Whether the teacher is a model of ours without weights."""
    if teacher is None or teacher.startswith("timm:") or ".py:" in teacher or Path(teacher).exists():
        return False
    return not models.check(teacher)


def plans(c: Config, rows: Sequence[Row]) -> tuple[list[Row], dict[str, Any], list[str]]:
    """Build every row's plan on the student: rows as they run, what they read of, and what does not fit together.

    Returns rows ("teacher": None where a row has no use for one), {"data", "student", "teacher"}, and mistakes.
    """
    data = distill.load_data(c)
    shown = distill.seen_by_teacher(data, [name for row in rows for name in row.methods])
    student, teacher = distill.networks(c, data, shown=shown)
    probe = distill.two(data)
    mistakes: list[str] = []
    try:
        distill.fit_both(student, teacher, probe, data, shown)
    except SpecError as error:
        mistakes += error.mistakes
    ready: list[Row] = []
    if mistakes:
        return ready, {}, mistakes
    for row in rows:
        own, _ = distill.networks(c, data, teacher=teacher)
        before = {k: v.clone() for k, v in own.state_dict().items()}
        try:
            if not hasattr(own, "dims"):
                setattr(own, "dims", student.dims)  # noqa: B010, nn.Module does not declare it
            plan = distill.planned(distill_config(c, row, 0, ""), own, teacher)
            distill.rehearse(Stage(data.train, **vars(plan)), probe)
        except (SpecError, ValueError) as error:
            mistakes += [f"row '{row.name}': {m}" for m in getattr(error, "mistakes", [str(error)])]
            continue
        after, note = own.state_dict(), ""
        if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}:
            note = "rewrites the student before training, so it shares no initialisation with the others"
        elif any(not torch.equal(v, after[k]) for k, v in before.items()):
            note = "starts from weights of its own, so it shares no initialisation with the others"
        if not any(p.grad and p.model is own for p in plan.passes.values()):
            mistakes.append(f"row '{row.name}' does not train the student: it cannot share one with the others")
        if not any(p.model is teacher for p in plan.passes.values()):
            row = row.of({"teacher": None})
        ready.append(replace(row, note=note))
    return ready, {"data": data, "student": student, "teacher": teacher}, mistakes


def distill_config(c: Config, row: Row, seed: int, out: str | Path, **more: Any) -> distill.Config:
    """The settings of one run of a row."""
    settings = {k: getattr(c, k) for k in COMMON} | {"progress": False}
    settings |= row.own | {k: v for k, v in row.settings.items() if v}
    settings |= {"method": list(row.methods), "seed": seed, "out": str(out)} | more
    return distill.Config.model_validate(settings)


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


def folder_mistakes(c: Config, jobs: Sequence[Job], origin: Mapping[str, Any]) -> list[str]:
    """What is wrong with the folders that are there: nothing of it is touched."""
    mistakes, now, out = [], runs.machine()["versions"], Path(c.out)
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
            if job.finished:
                comparison.measures(job.name, {0: runs.read_json(job.folder / "result.json")})
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


# Doing it


def compare(
    methods: str | Sequence[str] = ("ce", "kd", "bkd"),
    student: str = "small",
    teacher: str | None = None,
    data: str = "fashion-mini",
    **settings: Any,
) -> dict[str, Any]:
    """Compare methods and return the content of compare.json.

    methods: the rows, as in Config.  student, teacher, data: names, because each run is a process of its own; your own
    module is named "file.py:function".  settings: the flags of `spikedistill compare`.
    Raises SpecError listing every mistake before work starts, and where runs have failed.
    """
    given = {"student": student, "teacher": teacher, "data": data}
    if wrong := [k for k, v in given.items() if v is not None and not isinstance(v, str)]:
        raise SpecError(
            [f"{k}: each run is a process of its own, so it takes a name, or file.py:function" for k in wrong]
        )
    c, mistakes = distill.read(given | {"method": methods} | settings, Config)
    if c is not None:
        mistakes += check(c)[1]
    if mistakes:
        raise SpecError(mistakes)
    return run(c)


def run(c: Config) -> dict[str, Any]:
    """Run what is missing, then write and print the comparison."""
    rows, mistakes = check(c)
    if mistakes:
        raise SpecError(mistakes)
    out, shard = Path(c.out), _shard(c) or (1, 1)
    rows, parts, mistakes = plans(c, rows)
    teacher = None
    if _is_trained_here(c.teacher):
        how: dict[str, Any] = {"student": c.teacher, "teacher": None, "epochs": c.teacher_epochs or c.epochs}
        how |= {"lr": c.teacher_lr} | of_images(c, rows)
        settings = distill_config(c, Row("teacher", ("ce",)), c.seeds[0], out / "teacher", **how).model_dump()
        teacher = Job("teacher", out / "teacher", settings)
        c = c.model_copy(update={"teacher": str(teacher.folder)})
    if mistakes:
        raise SpecError(mistakes)
    origin = {
        "data": fingerprint(parts["data"]),
        "teacher": teacher_print(None if teacher and not teacher.finished else c.teacher),
    }
    tuned = {row.name: _tuned(c, row) for row in rows} if c.tune else {}
    settled = [row.of(found["set"]) if (found := tuned.get(row.name)) else row for row in rows]
    jobs = [job for row in settled for job in _jobs(c, row) if not c.tune or tuned[row.name]]
    mistakes = folder_mistakes(c, [*([teacher] if teacher else []), *jobs], origin)
    if mistakes:
        raise SpecError(mistakes)
    if c.dry_run:
        return dry_run(c, settled, teacher, parts, tuned)

    out.mkdir(parents=True, exist_ok=True)
    runs.write_json(out / "config.json", c.model_dump(exclude={"dry_run", "shard"}))
    crew, failed = Crew(c), []
    with crew:
        if teacher:
            crew.all([teacher], must=True)
        runs.write_json(out / "origin.json", origin | {"teacher": teacher_print(c.teacher)})
        if c.tune:
            tuned = crew.map(lambda row: tune(c, row, crew), rows)
            rows = [row.of(tuned[row.name]["set"]) for row in rows]
        jobs = [job for row in rows for job in _jobs(c, row)]
        failed = crew.all(jobs[shard[0] - 1 :: shard[1]])
    result = summary(c, rows, teacher, tuned, failed)
    if failed:
        raise SpecError([f"{name} failed: {why}" for name, why in failed] + [f"the rest is in '{out}'; run it again"])
    return result


def of_images(c: Config, rows: Sequence[Row]) -> dict[str, Any]:
    """The settings of a teacher that sees the images which the events are paired with; empty where it sees the events.

    Raises SpecError where its classes would not be those of the events.
    """
    if c.pair is None or not any("rgb" in distill.streams(name) for row in rows for name in row.methods):
        return {}
    if c.pair_classes == "common":
        raise SpecError(["teacher: it would learn all classes of the images, not the common ones: give a run folder"])
    of_events = {"frames": None, "pair": None, "pair_root": None, "pair_size": None, "augment": "default"}
    return of_events | {"data": c.pair, "root": c.pair_root, "size": c.pair_size}


def _jobs(c: Config, row: Row) -> list[Job]:
    out = Path(c.out) / "runs"
    names = [(f"{row.name}-{seed}", seed) for seed in c.seeds]
    return [Job(n, out / n, distill_config(c, row, seed, out / n).model_dump()) for n, seed in names]


# Tuning


def _asked(c: Config, row: Row) -> dict[str, Any]:
    start = tuning.defaults(row.chosen, row.own.get("lr", c.lr))
    ranges = {k: list(v) for k, v in tuning.space(start, c.lr).items()}
    return {"trials": c.tune, "epochs": c.tune_epochs or c.epochs, "start": start, "ranges": ranges}


def _tuned(c: Config, row: Row) -> dict[str, Any] | None:
    """What an earlier tuning of just this found."""
    file = Path(c.out) / "tune" / f"{row.name}.json"
    if not file.exists():
        return None
    found = runs.read_json(file)
    return found if found.get("asked") == json.loads(json.dumps(_asked(c, row))) else None


def tune(c: Config, row: Row, crew: Crew) -> dict[str, Any]:
    """Find the settings of a row on validation, once among all processes that share the folder."""
    folder, asked = Path(c.out) / "tune", _asked(c, row)
    folder.mkdir(parents=True, exist_ok=True)

    def measure(number: int, values: dict[str, float]) -> float:
        name = f"{row.name}-{number}"
        more = {"epochs": asked["epochs"], "test": False}
        config = distill_config(c, row.of(tuning.applied(values)), TUNE_SEED, folder / name, **more)
        job = Job(name, folder / name, config.model_dump())
        if why := crew.one(job, must=True):
            raise SpecError([f"trial {name} failed: {why}"])
        valid = runs.read_json(job.folder / "result.json")["valid"]["accuracy"]
        if c.progress:
            print(f"tune {row.name} {number + 1}/{c.tune}  valid {valid:.2%}", file=sys.stderr, flush=True)
        return valid

    while (found := _tuned(c, row)) is None:
        with claim(crew.locks / f"tune-{row.name}-all") as lock:
            if lock is not None:
                ranges = {k: tuple(v) for k, v in asked["ranges"].items()}
                found = tuning.search(asked["start"], ranges, c.tune, measure)
                found |= {"asked": asked, "set": tuning.applied(found["values"])}
                runs.write_json(folder / f"{row.name}.json", found)
        time.sleep(0 if found else 2)
    return found


# What comes out


def summary(
    c: Config, rows: Sequence[Row], teacher: Job | None, tuned: Mapping[str, Any], failed: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Write and print the comparison of what is finished."""
    out, missing = Path(c.out), []
    results: dict[str, dict[int, Any]] = {row.name: {} for row in rows}
    for row in rows:
        for job, seed in zip(_jobs(c, row), c.seeds):
            if job.finished:
                results[row.name][seed] = runs.read_json(job.folder / "result.json")
            else:
                missing.append(job.name)
    results = {name: of for name, of in results.items() if of}
    baseline = c.baseline or rows[0].name
    compared = comparison.rows_of(results, baseline, c.confidence)
    lines = [settings_of(c, row) for row in rows]
    for row in compared:
        row["settings"] = next(line for line in lines if line["name"] == row["name"])
        if row["name"] in tuned:
            row["tuned"] = tuned[row["name"]]
    versions = {
        job.name: runs.read_json(job.folder / "machine.json")["versions"]
        for row in rows
        for job in _jobs(c, row)
        if job.finished
    }
    kinds = {json.dumps(v, sort_keys=True) for v in versions.values()}
    notes = [f"not finished: {', '.join(missing)}"] if missing else []
    notes += [f"made by {len(kinds)} sets of versions: " + "; ".join(sorted(kinds))] if len(kinds) > 1 else []
    notes += [f"{row.name} {row.note}" for row in rows if row.note]
    if strangers := strange(c, rows):
        notes.append(f"not in this comparison, left alone: {', '.join(strangers)}")
    if c.tune:
        notes.append(
            f"{c.tune} trials a row of {c.tune_epochs or c.epochs} epochs chose learning rate and weights on validation"
        )
    title = f"{c.data}, {c.student}, T = {c.steps}, {many(c.epochs, 'epoch')}, {many(len(c.seeds), 'seed')}"
    result = {
        "title": title,
        "baseline": baseline,
        "confidence": c.confidence,
        "seeds": c.seeds,
        "conclusions": comparison.conclusions(results, compared, baseline),
        "notes": notes,
        "rows": compared,
        "teacher": teacher_row(c),
        "references": references(c, rows, results, baseline),
        "jobs": c.jobs,
        "settings": c.model_dump(include={*COMMON}),
        "origin": runs.read_json(out / "origin.json"),
        "machine": runs.machine(),
        "seconds": sum(r["train_seconds"] for of in results.values() for r in of.values()),
        "missing": missing,
    }
    write(result, c)
    return result


def settings_of(c: Config, row: Row) -> dict[str, Any]:
    own = {k: v for k, v in row.own.items() if k != "teacher"}
    return (
        {"name": row.name, "methods": list(row.methods), "lr": c.lr}
        | own
        | {k: v for k, v in row.settings.items() if v}
    )


def teacher_row(c: Config) -> dict[str, Any] | None:
    """What is known of the teacher: accuracy and size, where it is a run folder."""
    if c.teacher is None:
        return None
    file = Path(c.teacher) / "result.json"
    if not file.exists():
        return {"name": c.teacher}
    result = runs.read_json(file)
    return {
        "name": c.teacher,
        "accuracy": result.get("test", {}).get("accuracy"),
        "parameters": result["parameters"]["student"],
        "seconds": result["train_seconds"],
    }


def references(
    c: Config, rows: Sequence[Row], results: Mapping[str, Mapping[int, Any]], baseline: str
) -> list[dict[str, Any]] | None:
    """Energy of the baseline's student, the teacher and the ANN of the student's shape, as `energy.table` has it."""
    measured = next((r["activity"] for r in results.get(baseline, {}).values() if "synapses" in r["activity"]), None)
    if measured is None:
        return None
    teacher = None
    if c.teacher and Path(c.teacher).exists():
        data = distill.load_data(c)
        data = distill.seen_by_teacher(data, [name for row in rows for name in row.methods])
        teacher = activity(runs.load(c.teacher, fast=False), data.valid or data.test, samples=50)
    return energy.table(measured, teacher)


def strange(c: Config, rows: Sequence[Row]) -> list[str]:
    """Run folders that are no part of this comparison."""
    wanted = {job.name for row in rows for job in _jobs(c, row)}
    there = (Path(c.out) / "runs").glob("*/config.json")
    return sorted(p.parent.name for p in there if p.parent.name not in wanted)


def write(result: dict[str, Any], c: Config) -> None:
    """compare.json, .csv, .md and .tex, and the same on the terminal."""
    out = Path(c.out)
    runs.write_json(out / "compare.json", result)
    drawn = comparison.tables(result["rows"], result["title"], result["baseline"], c.confidence)
    words = [*result["conclusions"], *(f"Note: {note}." for note in result["notes"])]
    legend = comparison.legend(result["rows"], c.confidence, c.jobs)
    (out / "compare.md").write_text(
        "\n".join([*map(tables.markdown, drawn), *(f"- {w}" for w in words), "", *legend]) + "\n"
    )
    (out / "compare.tex").write_text("\n".join(map(tables.latex, drawn)))
    (out / "compare.csv").write_text(comparison.csv(result["rows"]))
    for table in drawn:
        tables.show(table)
    print("\n".join([*words, "", *legend, f"{result['seconds']:.0f} s of training. Everything is in {out}"]))


# What it would cost


def dry_run(
    c: Config, rows: Sequence[Row], teacher: Job | None, parts: Mapping[str, Any], tuned: Mapping[str, Any]
) -> dict[str, Any]:
    """Show each run, whether it is finished, and about how long it takes: from finished runs, else from a few steps."""
    i, n = _shard(c) or (1, 1)
    mine = {job.name for job in [job for row in rows for job in _jobs(c, row)][i - 1 :: n]}
    lines, total = [], 0.0
    if teacher:
        seconds = (
            0.0
            if teacher.finished
            else estimate(c, parts, Row("teacher", ("ce",)), parts["teacher"]) * teacher.settings["epochs"]
        )
        lines.append(["teacher", "finished" if teacher.finished else "to do", "", f"{seconds:.0f}"])
        total += seconds
    for row in rows:
        jobs = _jobs(c, row)
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
    wall = total / max(1, c.jobs)
    print(f"about {total:.0f} s of training" + (f", {wall:.0f} s with {c.jobs} side by side" if c.jobs > 1 else ""))
    return {"runs": [dict(zip(("run", "state", "from", "seconds"), line)) for line in lines], "seconds": total}


def estimate(c: Config, parts: Mapping[str, Any], row: Row, student: nn.Module | None) -> float:
    """Seconds an epoch, from a few steps and the validation that follows."""
    data = parts["data"]
    student = student or distill.networks(c, data, teacher=parts["teacher"])[0]
    if not hasattr(student, "dims"):
        setattr(student, "dims", getattr(parts["student"], "dims", {}))  # noqa: B010
    config = distill_config(c, row, 0, "")
    plan = distill.planned(config, student, parts["teacher"])
    batches = list(islice(data.train.epoch(0), 6))
    how = distill.training(config, student, len(batches)) | {"epochs": 1}
    fabric = distill.make_fabric(config.model_copy(update={"devices": 1}))
    fit(Stage(batches[:2], **vars(plan), **how), fabric=fabric, progress=False)
    began = time.perf_counter()
    fit(Stage(batches, **vars(plan), **how), fabric=fabric, progress=False)
    step = (time.perf_counter() - began) / len(batches)
    held_out = len(data.valid) * data.valid.batch_size / data.train.batch_size if data.valid is not None else 0
    return step * (len(data.train) + held_out / 3)
