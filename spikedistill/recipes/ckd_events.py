"""Images teach a network of events: static2dvs and CKD beside the same SNN on events alone, and the picture of it.

Run:    spikedistill run ckd_events
        spikedistill run ckd_events --data n-caltech101 --root CALTECH --steps 10 --student vggsnn
            --teacher ann_resnet18 --pair folder:101_ObjectCategories --pair-size 64 --pair-classes common
Trains an ANN on images, then one spiking student on events of the same classes: by per-step labels alone, with images
beside the events (static2dvs), and with the ANN too (CKD). All see the same events in as many updates. With images the
student runs twice in an update, so a control without them is given twice the epochs.
He et al. 2024, https://arxiv.org/abs/2303.13077; Ye et al. 2025, https://arxiv.org/abs/2507.09269.
"""

import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from spikedistill import data as data_sets
from spikedistill import models
from spikedistill.functional import replace_source
from spikedistill.recipes import distill
from spikedistill.report import streams
from spikedistill.report.summary import accuracy, cost, many, over, points, publish, row
from spikedistill.spec import SpecError


class Config(BaseModel):
    """Settings of the comparison."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    data: str = "fashion-events"
    """Events to work on: fashion-events, n-caltech101, cifar10-dvs, ..."""
    root: str | None = None
    """Folder where the files of the events are."""
    size: Annotated[int, Field(ge=4)] | None = None
    """Height and width of the frames, where not the usual ones."""
    pair: str | None = None
    """Images of the same classes; of fashion-events these are fashion-mini."""
    pair_root: str | None = None
    """Folder where the files of the images are."""
    pair_size: Annotated[int, Field(ge=4)] | None = None
    """Height and width that images of a folder are brought to."""
    pair_classes: Literal["all", "common"] = "all"
    """common drops classes that only the events or only the images have."""
    augment: str = "default"
    """Augmentation of the events."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training events that is used, where they are to be few; the images are all used."""
    teacher_augment: str = "flip|shift(2)"
    """Augmentation of the images that the teacher is trained on; the student's are as they are."""
    teacher: str = "small(widths=(32, 64, 128), depth=2, neuron=relu)"
    """The ANN's architecture."""
    student: str = "small(widths=(8, 32, 64))"
    """The student's architecture."""
    static2dvs: str = "static2dvs(regularise=no)"
    """This row's method with its settings. In few updates the step weights that it learns take all from the labels."""
    ckd: str = "ckd(regularise=no)"
    """This row's method with its settings, "ckd(tau=4, weight=0.5)"."""
    control: bool = True
    """Also train on events alone for twice the epochs: about what the two passes of the others cost."""
    steps: Annotated[int, Field(ge=1)] = 6
    """Frames of a sample."""
    epochs: Annotated[int, Field(ge=1)] = 6
    """Epochs of every run but the control."""
    batch: Annotated[int, Field(ge=4)] = 64
    """Samples in a batch."""
    lr: Annotated[float, Field(gt=0)] = 0.04
    """Highest learning rate of the students."""
    teacher_lr: Annotated[float, Field(gt=0)] = 5e-3
    """That of the teacher."""
    teacher_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs of the teacher, where not those of the students."""
    seeds: list[Annotated[int, Field(ge=0)]] = [0, 1, 2]
    """Students of each; the teacher is trained once, with the first."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto: bf16-mixed where the processor or GPU has it."""
    out: str = "runs/ckd_events"
    """Folder of the runs; finished ones in it are not repeated."""
    progress: bool = True
    """Show progress."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value


ALONE, LONGER = "events alone", "events alone, twice"
LABELS = "tet(lam=0.001, phi=0.5)"  # the label term of static2dvs and ckd, for the student that has no images
PAIRS = {"fashion-events": "fashion-mini"}  # images that are known to be of the same classes


def methods(c: Config) -> dict[str, str]:
    """Row -> method."""
    control = {LONGER: LABELS} if c.control else {}
    return {ALONE: LABELS} | control | {"static2dvs": c.static2dvs, "ckd": c.ckd}


def check(c: Config) -> tuple[None, list[str]]:
    """The mistakes that can be found without loading anything."""
    mistakes = distill.repeated("seeds", c.seeds)
    if not paired(c)["pair"]:
        hint = "--pair folder:PATH, and --pair-classes common where they have some classes more"
        mistakes.append(f"pair: which images are of the classes of {c.data}? {hint}")
    mistakes += [f"teacher: {m}" for m in models.check(c.teacher)]
    try:
        data_sets.parse(c.teacher_augment)
    except ValueError as error:
        mistakes.append(f"teacher_augment: {error}")
    for name in ("static2dvs", "ckd"):
        if re.split(r"[(,+]", getattr(c, name))[0].strip() != name:
            mistakes.append(f"{name}: '{getattr(c, name)}' will not do: write {name}(KEY=VALUE, ...)")
    trial, wrong = distill.read(events(c) | paired(c) | {"student": c.student, "method": [c.static2dvs, c.ckd]})
    mistakes += wrong + (distill.check(trial, ("teacher",))[1] if trial else [])
    return None, [*dict.fromkeys(mistakes)]


def events(c: Config) -> dict[str, Any]:
    """What every run on events has."""
    names = (
        "data",
        "root",
        "size",
        "augment",
        "train_share",
        "steps",
        "epochs",
        "batch",
        "lr",
        "precision",
        "progress",
    )
    return {name: getattr(c, name) for name in names}


def paired(c: Config) -> dict[str, Any]:
    """The images that the events are paired with."""
    names = ("pair_root", "pair_size", "pair_classes")
    return {name: getattr(c, name) for name in names} | {"pair": c.pair or PAIRS.get(c.data)}


def run(c: Config) -> list[dict[str, Any]]:
    """Train everything, print the table, draw the streams. Returns the rows."""
    if mistakes := check(c)[1]:
        raise SpecError(mistakes)
    out = Path(c.out)
    data = distill.load_data(distill.Config.model_validate(events(c) | paired(c)))
    teacher = teacher_of(c, data, out / "teacher")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in methods(c)}
    for seed in c.seeds:
        for name, method in methods(c).items():
            how = events(c) | {"student": c.student, "methods": method, "seed": seed}
            if name not in (ALONE, LONGER) or c.pair_classes == "common":  # which is what drops classes
                how |= paired(c)
            how["teacher"] = str(out / "teacher") if name == "ckd" else None
            how["epochs"] = c.epochs * (1 + (name == LONGER))
            folder = {ALONE: "alone", LONGER: "longer"}.get(name, name)
            results[name].append(distill.distill(out=str(out / f"{folder}-{seed}"), **how))
    rows = [row("ANN on images", [teacher]), *(row(name, of) for name, of in results.items())]
    for r in rows[2:]:
        r["difference"] = over(r, rows[1])
    picture(data, out / "streams.svg")
    report = write(c, rows, sum(r["train_seconds"] for r in (teacher, *chain.from_iterable(results.values()))))
    print(f"Table, figures and runs: {out}; what the networks read: {out / 'streams.svg'}")
    print(f"report: {report}")
    return rows


def teacher_of(c: Config, data: Any, out: Path) -> dict[str, Any]:
    """The teacher's run. Where classes are dropped its data have no name, but all that they depend on is recorded."""
    settings = {name: getattr(c, name) for name in ("batch", "precision", "progress")}
    settings["epochs"] = c.teacher_epochs or c.epochs
    settings |= {"student": c.teacher, "lr": c.teacher_lr, "seed": c.seeds[0], "augment": c.teacher_augment}
    settings |= {"method": "ce", "out": str(out)}
    if c.pair_classes == "all":
        settings |= {"data": paired(c)["pair"], "root": c.pair_root, "size": c.pair_size}
        return distill.run(distill.Config.model_validate(settings))
    shown = data_sets.images_of(data)
    assert shown is not None
    train = replace(shown.train, augment=data_sets.parse(c.teacher_augment))
    config = distill.Config.model_validate(settings | paired(c) | {"data": "<Data>"})
    return distill.run(config, data=replace(shown, train=train))


def picture(data: Any, path: Path) -> None:
    """Images, hybrid stream and events of three training samples, one of which is replaced by its events."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = replace_source(next(iter(data.train)), 0.5)
    swapped = batch["swapped"]
    rows = torch.cat([(~swapped).nonzero()[:2, 0], swapped.nonzero()[:1, 0]])
    batch = {name: x[:, rows] if x.ndim == 5 else x[rows] for name, x in batch.items()}
    streams.picture(batch, path, classes=data.classes, title="When half of the images are replaced by events")


def write(c: Config, rows: list[dict[str, Any]], seconds: float) -> Path:
    """The table, on the terminal and in files, the figure of it and the report, whose path is returned."""
    title = f"{c.data}, {c.student}, T = {c.steps}, {c.epochs} epochs, {many(len(c.seeds), 'seed')}"
    about = {"title": title, "config": c.model_dump(), "seconds": seconds, "legend": LEGEND}
    about["pictures"] = {"streams.svg": ("Images and events", SEEN)}
    report = publish(Path(c.out), "ckd_events", about, rows, COLUMNS, ALONE)
    print(LEGEND)
    print(f"{seconds:.0f} s of training.")
    return report


SEEN = """\
Three training samples: the image that the ANN sees, and over time the hybrid stream above the events. As training goes
on, more and more of its images are replaced by events, as in the last sample; here with a chance of one half."""


LEGEND = """\
test %: accuracy, mean ± standard deviation over seeds; the ANN's on images, all others' on events.
over alone: points over events alone, paired by seed, mean ± half the 95 % interval (t); a single seed has none and
proves nothing. twice: of the epochs, since images cost a second pass of the student. rate: spikes per neuron and step.
M adds: million additions. CPU s: processor seconds of training."""

COLUMNS: list[tuple[str, Any]] = [
    ("model", lambda r: r["name"]),
    ("test %", accuracy),
    ("over alone", lambda r: points(r.get("difference"))),
    ("rate", lambda r: f"{r['rate']:.3f}" if r["rate"] is not None else ""),
    ("M adds", lambda r: f"{r['ac'] / 1e6:.2f}"),
    ("params", lambda r: f"{r['parameters'] / 1e3:.0f} k"),
    ("CPU s", cost),
]


if __name__ == "__main__":
    from spikedistill.cli import script

    script(__name__)
