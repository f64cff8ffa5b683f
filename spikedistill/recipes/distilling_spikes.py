"""In the style of Distilling Spikes: a large SNN teaches a smaller one, directly and through an assistant.

Run:    spikedistill run distilling_spikes                        --stages 0,2 leaves direct distillation out
Trains a spiking teacher, then the same small student on the labels alone (0 stages of distillation), taught by the
teacher (1), and taught by a network of middle size that the teacher has taught (2), all students with equal settings.
Kushawaha, Kumar, Banerjee, Velmurugan, ICPR 2020, https://arxiv.org/abs/2005.00288: of which only the abstract could be
read, so this is its idea and not its settings. `spikedistill show distilling_spikes` of the method has the losses.
"""

import re
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from spikedistill import models, runs
from spikedistill.core.fit import Stage
from spikedistill.core.taps import infer
from spikedistill.recipes import distill
from spikedistill.report.summary import accuracy, cost, many, over, points, publish, row
from spikedistill.spec import SpecError, parse


class Config(BaseModel):
    """Settings of the chain."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    data: str = "fashion-mini"
    """What to train on: fashion-mini, mnist, cifar10, or another set of images."""
    root: str | None = None
    """Folder where the data set's files are."""
    download: bool = False
    """Let torchvision fetch a set that is not in root."""
    augment: str = "flip"
    """Augmentation of training images, the same for every run; "none" for digits."""
    encode: Literal["direct", "bernoulli", "poisson"] = "direct"
    """How images become spikes; rate codes are drawn once for teacher and student."""
    stages: list[Annotated[int, Field(ge=0, le=2)]] = [0, 1, 2]
    """Students by stages of distillation: 0 labels alone, 1 from the teacher, 2 through the assistant."""
    teacher: str = "small(widths=(16, 64, 128), head=spiking)"
    """The teacher's architecture; its output layer must spike."""
    assistant: str = "small(widths=(12, 32, 64), head=spiking)"
    """The assistant's."""
    student: str = "small(widths=(8, 16, 32), head=spiking)"
    """The student's."""
    method: str = "distilling_spikes(alpha=0.5, tau=6.0)"
    """Losses of both stages: soft, sliding and full are weights; signal=potential is for heads that do not spike."""
    steps: Annotated[int, Field(ge=1)] = 6
    """Time steps T of every network."""
    epochs: Annotated[int, Field(ge=1)] = 8
    """Epochs of every run."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Images in a batch."""
    lr: Annotated[float, Field(gt=0)] = 0.04
    """Highest learning rate of assistants and students."""
    teacher_lr: Annotated[float, Field(gt=0)] = 0.02
    """That of the teacher."""
    seeds: list[Annotated[int, Field(ge=0)]] = [0, 1, 2]
    """Assistants and students of each; the teacher is trained once, with the first."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto: bf16-mixed where the processor or GPU has it."""
    out: str = "runs/distilling_spikes"
    """Folder of the runs; finished ones in it are not repeated."""
    progress: bool = True
    """Show progress."""

    @field_validator("seeds", "stages", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value


NAMES = {0: "no KD", 1: "direct", 2: "via assistant"}


def check(c: Config) -> tuple[None, list[str]]:
    """The mistakes that can be found without loading anything."""
    mistakes = distill.repeated("stages", c.stages) + distill.repeated("seeds", c.seeds)
    wanted = (("student", c.student), ("assistant", c.assistant), ("teacher", c.teacher))
    for name, text in wanted:
        mistakes += [f"{name}: {m}" for m in models.check(text)]
    if re.split(r"[(,+]", c.method)[0].strip() != "distilling_spikes":
        mistakes.append(f"method: '{c.method}' will not do: write distilling_spikes(KEY=VALUE, ...)")
    trial, wrong = distill.read(common(c) | {"method": c.method, "student": "small", "teacher": "small"})
    mistakes += wrong + (distill.check(trial, ("student", "teacher"))[1] if trial else [])
    return None, [*dict.fromkeys(mistakes)] or together(c)


def together(c: Config) -> list[str]:
    """What is wrong with the method's settings as a whole and for so many time steps: not to be found after hours."""
    if chosen(c).get("task") == "mse":
        why = "the rows without KD learn labels by cross-entropy, so 'over no KD' would mix two changes"
        return [f"method: task=mse will not do here: {why}"]
    batch = {"x": torch.zeros(2, 1, 8, 8), "y": torch.arange(2)}
    with torch.random.fork_rng(devices=[]):
        student, teacher = (models.build("small(widths=(2, 2), head=spiking)", steps=c.steps) for _ in range(2))
        try:
            trial = distill.Config.model_validate(common(c) | {"method": c.method})
            distill.rehearse(Stage([], **vars(distill.planned(trial, student, teacher))), batch)
        except SpecError as error:
            return [f"method: {m}" for m in error.mistakes]
    return []


def chosen(c: Config) -> dict[str, Any]:
    """The settings that the method is given."""
    return parse(distill.split(c.method)[0])[2]


def common(c: Config) -> dict[str, Any]:
    """What every run has."""
    names = ("data", "root", "download", "augment", "encode", "steps", "epochs", "batch", "precision", "progress")
    return {name: getattr(c, name) for name in names}


def run(c: Config) -> list[dict[str, Any]]:
    """Train everything and print the table. Returns its rows."""
    if mistakes := check(c)[1]:
        raise SpecError(mistakes)
    spiking = chosen(c).get("signal", "spikes") == "spikes"
    data = distill.load_data(distill.Config.model_validate(common(c)))
    if spiking:
        heads_spike(c, data)
    out, alone = Path(c.out), "ce(counts=True)" if spiking else "ce"

    def one(name: str, seed: int, student: str, teacher: str | None, lr: float = c.lr) -> dict[str, Any]:
        how: dict[str, Any] = common(c) | dict(student=student, teacher=teacher, lr=lr, seed=seed, out=str(out / name))
        return distill.distill(methods=alone if teacher is None else c.method, **how)

    teacher = one("teacher", c.seeds[0], c.teacher, None, c.teacher_lr)
    students: dict[int, list[dict[str, Any]]] = {stages: [] for stages in c.stages}
    assistants = []
    for seed in c.seeds:
        for stages in c.stages:
            by = {0: None, 1: str(out / "teacher"), 2: str(out / f"assistant-{seed}")}[stages]
            if stages == 2:
                assistants.append(one(f"assistant-{seed}", seed, c.assistant, str(out / "teacher")))
            students[stages].append(one(f"stages{stages}-{seed}", seed, c.student, by))
    rows = [row("teacher", [teacher])] + ([row("assistant", assistants)] if assistants else [])
    rows += [row(NAMES[stages], results) | {"stages": stages} for stages, results in students.items()]
    compare(rows)
    silent = silence(str(out / "teacher"), data) if spiking else None
    seconds = sum(r["train_seconds"] for r in (teacher, *assistants, *chain.from_iterable(students.values())))
    title = f"{c.data}, {c.encode} encoding, T = {c.steps}, {c.epochs} epochs, {many(len(c.seeds), 'seed')}"
    legend = LEGEND
    if silent is not None:
        legend += f"\nThe teacher's output layer is silent for {silent:.1%} of validation: there it teaches nothing."
    about = {"title": title, "config": c.model_dump(), "seconds": seconds, "teacher_silent": silent, "legend": legend}
    report = publish(out, "distilling_spikes", about, rows, COLUMNS, NAMES[0])
    print(legend)
    print(f"{seconds:.0f} s of training. Table, figure and runs: {out}")
    print(f"report: {report}")
    return rows


def heads_spike(c: Config, data: Any) -> None:
    """Raise SpecError for each network whose output layer gives something else than spikes, before any is trained."""
    x, mistakes = distill.two(data)["x"], []
    for name in ("student", *(["assistant"] if 2 in c.stages else []), "teacher"):
        how = distill.Config.model_validate(common(c) | {"student": getattr(c, name)})
        model, _ = distill.networks(how, data)
        distill.fits(name, model, x, data.classes)
        logits = infer(model, x).logits
        if not ((logits == 0) | (logits == 1)).all():
            hint = "head=spiking (plif_net: vote=1), or --method 'distilling_spikes(signal=potential)'"
            mistakes.append(f"{name}: the outputs of '{getattr(c, name)}' are not spikes: {hint}")
    if mistakes:
        raise SpecError(mistakes)


def silence(folder: str, data: Any) -> float:
    """Share of validation samples for which no output neuron of a network ever spikes."""
    model = runs.load(folder, fast=False, trust_code=True)
    counts = torch.cat([infer(model, batch["x"]).logits.sum((0, 2)) for batch in data.valid])
    return float((counts == 0).float().mean())


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each student's row its differences, paired by seed, to those of fewer stages."""
    of = {r["stages"]: r for r in rows if "stages" in r}
    for key, base in (("over_none", 0), ("over_direct", 1)):
        for stages, r in of.items():
            if base in of and stages > base:
                r[key] = over(r, of[base])


LEGEND = """\
test %: accuracy, mean ± standard deviation over seeds. rate: spikes per neuron and step. M adds: million additions.
over none, over direct: points over no KD and over direct, paired by seed, mean ± half the 95 % interval (t); a single
seed has none and proves nothing. CPU s: processor seconds of training; those of an assistant come on top of its
student's."""

COLUMNS: list[tuple[str, Any]] = [
    ("model", lambda r: r["name"]),
    ("test %", accuracy),
    ("over none", lambda r: points(r.get("over_none"))),
    ("over direct", lambda r: points(r.get("over_direct"))),
    ("rate", lambda r: f"{r['rate']:.3f}" if r["rate"] is not None else ""),
    ("M adds", lambda r: f"{r['ac'] / 1e6:.2f}"),
    ("params", lambda r: f"{r['parameters'] / 1e3:.1f} k"),
    ("CPU s", cost),
]


if __name__ == "__main__":
    from spikedistill.cli import script

    script(__name__)
