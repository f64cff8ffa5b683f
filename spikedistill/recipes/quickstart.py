"""Teacher, ReLU twin and three students on real images: what does distillation give?

Run:    spikedistill run quickstart
Trains an ANN teacher, then the same small spiking student by cross-entropy, logits distillation and BKD at equal
budget, and the student's own ReLU twin, which shows how much of the gap between ANN and SNN each method closes.
"""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from spikedistill import models
from spikedistill.recipes import distill
from spikedistill.report.summary import accuracy, cost, many, over, points, publish, row
from spikedistill.spec import SpecError


class Config(BaseModel):
    """Settings of the quickstart."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    data: str = "fashion-mini"
    """What to train on."""
    root: str | None = None
    """Folder where the data set's files are."""
    augment: str = "flip"
    """Augmentation of training images, the same for every run."""
    widths: str = "(16, 64, 128)"
    """Channels of the student's stages."""
    teacher: str = "small(widths=(32, 64, 128), depth=2, neuron=relu)"
    """The teacher's architecture."""
    steps: Annotated[int, Field(ge=1)] = 4
    """Time steps T of the student."""
    epochs: Annotated[int, Field(ge=1)] = 8
    """Epochs of every run."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Images in a batch."""
    seeds: list[Annotated[int, Field(ge=0)]] = [0]
    """One complete set of runs for each; the teacher is trained once, with the first."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto: bf16-mixed where the processor has it."""
    out: str = "runs/quickstart"
    """Folder of the runs; finished ones in it are not repeated."""
    progress: bool = True
    """Show progress."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value


def check(c: Config) -> tuple[None, list[str]]:
    """The mistakes that can be found without loading anything."""
    mistakes = distill.repeated("seeds", c.seeds)
    mistakes += [f"teacher: {m}" for m in models.check(c.teacher)]
    mistakes += [f"widths: {m}" for m in models.check(f"small(widths={c.widths})")]
    trial, wrong = distill.read({"data": c.data, "root": c.root, "augment": c.augment, "method": ["ce"]})
    return None, [*mistakes, *wrong, *(distill.check(trial)[1] if trial else [])]


def run(c: Config) -> list[dict[str, Any]]:
    """Train everything and print the table. Returns its rows."""
    if mistakes := check(c)[1]:
        raise SpecError(mistakes)
    out = Path(c.out)
    names = ("data", "root", "augment", "steps", "epochs", "batch", "precision", "progress")
    common: dict[str, Any] = {name: getattr(c, name) for name in names}

    def one(name: str, seed: int, **settings: Any) -> dict[str, Any]:
        folder = str(out / (name if name == "teacher" else f"{name}-{seed}"))
        return distill.distill(seed=seed, out=folder, **common | settings)

    teacher = one("teacher", c.seeds[0], student=c.teacher, methods="ce", lr=TEACHER_LR)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ("twin", *METHODS)}
    for seed in c.seeds:
        twin = f"small(widths={c.widths}, neuron=relu)"
        results["twin"].append(one("twin", seed, student=twin, methods="ce", lr=TWIN_LR))
        for name, settings in METHODS.items():
            how = dict(student=f"small(widths={c.widths})", teacher=str(out / "teacher")) | settings
            results[name].append(one(name, seed, **how))
    rows = [row("ANN teacher", [teacher]), row("ReLU twin", results["twin"])]
    rows += [row(TITLES[name], results[name]) for name in METHODS]
    floor, roof = rows[2]["accuracy"], rows[1]["accuracy"]
    for r in rows[2:]:
        r["difference"] = over(r, rows[2]) if r is not rows[2] else None
        r["gap_closed"] = (r["accuracy"] - floor) / (roof - floor) if roof - floor > SMALLEST_GAP else None
    seconds = sum(r["train_seconds"] for r in chain([teacher], *results.values()))
    title = f"{c.data}, T = {c.steps}, {c.epochs} epochs, {many(len(c.seeds), 'seed')}"
    about = {"title": title, "config": c.model_dump(), "seconds": seconds, "legend": LEGEND}
    report = publish(out, "quickstart", about, rows, COLUMNS)
    print(LEGEND)
    print(f"{seconds:.0f} s of training. Table, figure and runs: {out}")
    print(f"report: {report}")
    return rows


SMALLEST_GAP = 0.005  # a share of less than half a point would be a share of noise
# learning rates, weights and what bkd restores were chosen on validation: tools/tune_quickstart.py
TEACHER_LR = 5e-3
TWIN_LR = 4e-2
METHODS: dict[str, dict[str, Any]] = {
    "ce": dict(methods="ce", lr=4e-2, teacher=None),
    "kd": dict(methods="kd(tau=2.0, weight=0.7, ce=0.3)", lr=6e-2),
    "bkd": dict(methods="bkd(weight=5.0, reduction=mean, hidden=32, wsld=0)", lr=4e-2),
}
TITLES = {"ce": "SNN, ce", "kd": "SNN, kd", "bkd": "SNN, bkd"}


LEGEND = """\
test %: accuracy, mean ± standard deviation over seeds. The twin is the student with ReLU for spikes.
over ce: points, paired by seed, mean ± half the 95 % interval (t); a single seed has none and proves nothing.
gap: share of the way from ce to the twin; none where they are less than half a point apart.
rate: spikes per neuron and step. M adds, M muls: million operations an image. CPU s: processor seconds of training."""

COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("model", lambda r: r["name"]),
    ("test %", accuracy),
    ("over ce", lambda r: points(r.get("difference"))),
    ("gap", lambda r: f"{r['gap_closed']:.0%}" if r.get("gap_closed") is not None else ""),
    ("rate", lambda r: f"{r['rate']:.3f}" if r["rate"] is not None else ""),
    ("M adds", lambda r: f"{r['ac'] / 1e6:.2f}"),
    ("M muls", lambda r: f"{r['mac'] / 1e6:.2f}"),
    ("params", lambda r: f"{r['parameters'] / 1e3:.0f} k"),
    ("CPU s", cost),
]


if __name__ == "__main__":
    from spikedistill.cli import script

    script(__name__)
