"""The rows of a comparison: read from text, built and tried on the student, turned into the settings of runs."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikedistill import models, runs
from spikedistill.core.fit import Stage
from spikedistill.core.plan import Plan
from spikedistill.neurons import Neuron
from spikedistill.own import is_own
from spikedistill.recipes import distill
from spikedistill.recipes.comparing import tuning
from spikedistill.recipes.comparing.crew import Job, mistakes_of
from spikedistill.spec import SpecError, near, parse

OWN = ("lr", "weight_decay", "optimizer", "schedule", "warmup", "clip", "ema", "precision", "transform")
COMMON = [name for name in distill.Config.model_fields if name not in ("method", "seed", "out", "overwrite", "test")]
MARKS = ",+"


@dataclass(frozen=True)
class Row:
    """One row of the comparison: methods with their settings, and what it has of its own."""

    name: str
    methods: tuple[str, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    rewritten: str = ""
    """What rewrites its student before training; empty where nothing does."""
    note: str = ""

    @property
    def chosen(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, self.settings.get(name, {})) for name in self.methods]

    def of(self, values: Mapping[str, Any]) -> "Row":
        """The row with other values, as `tuning.applied` gives them."""
        own = {k: v for k, v in values.items() if not isinstance(v, dict)}
        inner = {name: given | values.get(name, {}) for name, given in self.chosen}
        return replace(self, own=self.own | own, settings=inner)


def check(c: Any) -> tuple[list[Row], list[str]]:
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
        name = name if named else "+".join(n.rpartition(":")[2] for n in names)
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
        chosen: list[tuple[str, dict[str, Any]]] = []
        if run is not None:
            chosen, wrong = distill.check(run, ("teacher",) if is_trained_here(c.teacher) else ())
            problems += wrong
        mistakes += [f"row.{name}.{p}" if p.split(":")[0] in own else p for p in problems]
        if run is None:
            continue
        settings = {m: json.loads(json.dumps(s)) for m, s in chosen}
        rows.append(Row(name, tuple(names), settings, {k: getattr(run, k) for k in own if k in OWN}))
    names = [row.name for row in rows]
    for key in sections.keys() - used:
        valid = [*type(c).model_fields, *distill.METHODS]
        why = f"settings for a method that no row uses; the rows are {', '.join(names)}"
        mistakes.append(f"{key}: {why if key in distill.METHODS else 'no such setting; ' + near(key, valid)}")
    mistakes += [f"row.{name}: there is no such row; {near(name, names)}" for name in c.row if name not in names]
    if c.baseline is not None and c.baseline not in names:
        mistakes.append(f"baseline: '{c.baseline}' is no row; {near(c.baseline, names)}")
    if not c.method:
        mistakes.append("method: no row is given")
    if len(set(c.seeds)) < len(c.seeds) or not c.seeds:
        mistakes.append(f"seeds: {','.join(map(str, c.seeds)) or 'none'}: give each seed once, 0,1,2")
    if c.shard is not None and shard_of(c) is None:
        mistakes.append(f"shard: '{c.shard}' will not do: it should be i/n, such as 1/4 to 4/4")
    if c.tune:
        mistakes += tuning.need_optuna()
    if c.accelerator == "cuda" and c.jobs > torch.cuda.device_count() * 8:
        mistakes.append(f"jobs: {c.jobs} processes on {torch.cuda.device_count()} GPUs")
    return rows, [*dict.fromkeys(mistakes + mistakes_of(c))]


def _named(text: str) -> tuple[str, bool, str]:
    """'soft = kd(tau=8)' -> 'soft', True, 'kd(tau=8)';  'kd(tau=8)' -> '', False, 'kd(tau=8)'."""
    head, *rest = distill.split(text, "=")
    return (head, True, "=".join(rest)) if rest else ("", False, text)


def _same(key: str) -> str:
    if key in distill.Config.model_fields:
        return f"it is the same for every row of a comparison; a row may have its own {', '.join(OWN)}"
    return f"no such setting; {near(key, OWN)}"


def shard_of(c: Any) -> tuple[int, int] | None:
    """--shard 2/4 -> 2, 4; None where it cannot be read."""
    found = re.fullmatch(r"(\d+)/(\d+)", c.shard or "1/1")
    i, n = map(int, found.groups()) if found else (0, 0)
    return (i, n) if 1 <= i <= n else None


def is_trained_here(teacher: str | None) -> bool:
    """Whether the teacher is a model without trained weights."""
    return not (teacher is None or Path(teacher).exists() or models.check(teacher)) and models.weightless(teacher)


def plans(c: Any, rows: Sequence[Row]) -> tuple[list[Row], dict[str, Any], list[str]]:
    """Build every row's plan on the student: rows as they run, what they read of, and what does not fit together.

    Returns rows ("teacher": None where a row has no use for one), {"data", "student", "teacher"}, and mistakes.
    """
    data = distill.load_data(c)
    if data.valid is None:
        return [], {}, ["data: they have no validation part, on which every choice is made"]
    shown = distill.seen_by_teacher(data, [name for row in rows for name in row.methods])
    student, teacher = distill.networks(c, data, shown=shown)
    parts, probe, mistakes = {"data": data, "student": student, "teacher": teacher}, distill.two(data), []
    try:
        distill.fit_both(student, teacher, probe, data, shown)
    except SpecError as error:
        return [], {}, error.mistakes
    ready: list[Row] = []
    for row in rows:
        try:
            own, plan = planned(c, row, parts)
            distill.rehearse(Stage(data.train, **vars(plan)), probe)
        except (SpecError, ValueError) as error:
            mistakes += [f"row '{row.name}': {m}" for m in getattr(error, "mistakes", [str(error)])]
            continue
        if not any(p.grad and p.model is own for p in plan.passes.values()):
            mistakes.append(f"row '{row.name}' does not train the student: it cannot share one with the others")
        if spikes(student) and not spikes(own):
            mistakes.append(
                f"row '{row.name}' makes a network without spiking neurons of the student: it cannot be compared"
            )
        # a method of somebody's may wrap the teacher, or read it only once
        if not any(map(is_own, row.methods)) and not any(p.model is teacher for p in plan.passes.values()):
            row = row.of({"teacher": None})
        ready.append(told(row, student, own))
    return ready, parts, mistakes


def planned(c: Any, row: Row, parts: Mapping[str, Any], student: nn.Module | None = None) -> tuple[nn.Module, Plan]:
    """A row's student, or the given one, and its plan. Raises SpecError where they do not fit."""
    config = config_of(c, row, 0, "")
    student = student or distill.networks(config, parts["data"], teacher=parts["teacher"])[0]
    if not hasattr(student, "dims"):
        setattr(student, "dims", getattr(parts["student"], "dims", {}))  # noqa: B010, nn.Module does not declare it
    return student, distill.planned(config, student, parts["teacher"])


def spikes(model: nn.Module) -> bool:
    return any(isinstance(m, Neuron) for m in model.modules())


def told(row: Row, student: nn.Module, own: nn.Module) -> Row:
    """The row with what there is to say of its student, as its plan has left it, beside that of the others."""
    plain, ready = student.state_dict(), own.state_dict()
    if {k: v.shape for k, v in plain.items()} != {k: v.shape for k, v in ready.items()}:
        by = ", ".join(row.own.get("transform", ())) or "+".join(row.methods)
        return replace(row, rewritten=by)
    if any(not torch.equal(v, ready[k]) for k, v in plain.items()):
        return replace(row, note="starts from weights of its own, so it shares no initialisation with the others")
    return row


def config_of(c: Any, row: Row, seed: int, out: str | Path, **more: Any) -> distill.Config:
    """The settings of one run of a row."""
    settings = {k: getattr(c, k) for k in COMMON} | {"progress": False}
    settings |= row.own | {k: v for k, v in row.settings.items() if v}
    settings |= {"method": list(row.methods), "seed": seed, "out": str(out)} | more
    return distill.Config.model_validate(settings)


def jobs_of(c: Any, row: Row) -> list[Job]:
    """A run a seed."""
    out = Path(c.out) / "runs"
    names = [(f"{row.name}-{seed}", seed) for seed in c.seeds]
    return [Job(n, out / n, config_of(c, row, seed, out / n).model_dump()) for n, seed in names]


def teacher_job(c: Any, rows: Sequence[Row]) -> Job | None:
    """The run that makes the teacher, where it is a model without weights."""
    if not is_trained_here(c.teacher) or all(row.own.get("teacher", "") is None for row in rows):
        return None
    out = Path(c.out) / "teacher"
    how: dict[str, Any] = {"student": c.teacher, "teacher": None, "epochs": c.teacher_epochs or c.epochs}
    how |= {"lr": c.teacher_lr, "transform": []} | of_images(c, rows)
    how |= {"optimizer": "adamw"} if "stds" in c.optimizer else {}  # which prunes
    seed = c.seeds[0]
    if (out / "config.json").exists():  # the one that is there serves seeds that begin otherwise, too
        seed = runs.read_json(out / "config.json").get("seed", seed)
    return Job("teacher", out, config_of(c, Row("teacher", ("ce",)), seed, out, **how).model_dump())


def of_images(c: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """The settings of a teacher that sees the images which the events are paired with; empty where it sees the events.

    Raises SpecError where its classes would not be those of the events.
    """
    if c.pair is None or not any("rgb" in distill.streams(name) for row in rows for name in row.methods):
        return {}
    if c.pair_classes == "common":
        raise SpecError(["teacher: it would learn all classes of the images, not the common ones: give a run folder"])
    of_events = dict.fromkeys(("frames", "pair", "pair_root", "pair_size")) | {"augment": "default", "train_share": 1.0}
    return of_events | {"data": c.pair, "root": c.pair_root, "size": c.pair_size}
