"""What a trained student answers, how sure it is, and after how many time steps.

Run:    spikedistill predict runs/student --data fashion-mini --confidence 0.9
        spikedistill predict runs/student --files a.png b.png --out answers.csv
Data sets are answered for their test samples, with the accuracy; files are brought to the size the student was trained
on. --confidence stops each sample as soon as the student is that sure; --stream feeds one time step after another.
"""

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from spikedistill import runs
from spikedistill.core.taps import infer
from spikedistill.data.encode import spikes
from spikedistill.data.folders import Pictures
from spikedistill.inference import Stream, stepwise, whole
from spikedistill.models.foreign import has_foreign_neurons
from spikedistill.recipes import export
from spikedistill.spec import SpecError
from spikedistill.transforms.tt_snn import needs_all_steps


class Config(BaseModel):
    """Settings of `predict`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    run: str = Field(min_length=1)
    """A run folder or student file."""
    data: str | None = None
    """Answer for the test samples of this data set; by default of the one the run was trained on."""
    root: str | None = None
    """Folder where the data set's files are."""
    files: list[str] = []
    """Image files to answer for, in place of a data set."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Time steps, up to those that the student was trained with, which are the default."""
    confidence: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop each sample once the student is this sure of its answer."""
    stream: bool = False
    """Feed one time step after another, as an event camera would."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Samples at a time."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto: bf16-mixed where the processor multiplies bfloat16 itself, which is twice as fast, else 32-true."""
    trust_code: bool = False
    """Import the file.py that built the student or the data, where one did."""
    out: str | None = None
    """Write the answers to this .csv or .json file."""
    overwrite: bool = False
    """Replace the file if it is there."""


def run(c: Config) -> dict[str, Any]:
    """Answer, print and write. Returns {"answers": [{"sample", "label", "confidence", "steps", ...}], ...}."""
    bf16 = {"auto": None, "32-true": False, "bf16-mixed": True}[c.precision]
    model, about = runs.load(c.run, bf16=bf16, trust_code=c.trust_code), runs.about(c.run)
    out = Path(c.out) if c.out else None
    mistakes = []
    if out and out.suffix not in (".csv", ".json"):
        mistakes.append(f"out: '{out}' should end in .csv or .json")
    if out and out.exists() and not c.overwrite:
        mistakes.append(f"out: '{out}' exists; choose another --out, or --overwrite to lose it")
    if out and not out.parent.is_dir():
        mistakes.append(f"out: there is no folder '{out.parent}'")
    if c.files and c.data:
        mistakes.append("files: give files or data, not both")
    mistakes += [f"files: there is no file '{name}'" for name in c.files if not Path(name).is_file()]
    if c.files and not about.get("shape"):
        mistakes.append("files: the student file does not say which size it was trained on; give a folder as --data")
    frames = about.get("frames")
    trained: Any = len(frames) if isinstance(frames, list) else getattr(model, "steps", None)
    mistakes += beyond(c, trained)
    if c.steps and has_foreign_neurons(model):
        mistakes.append("steps: the neurons of this student are another library's: it takes those it was built with")
    if c.steps and c.steps != trained and needs_all_steps(model):
        mistakes.append(f"steps: layers of this student change after half of its {trained} steps: it takes all")
    if c.files and about.get("shape") and about["shape"][0] not in (1, 3):
        mistakes.append(f"files: the student takes samples of {about['shape'][0]} channels, which no image file has")
    if mistakes:
        raise SpecError(mistakes)
    data = None if c.files else export.data_of(c)
    classes = list(about.get("classes") or (data.classes if data else []))
    if data is not None and list(data.classes) != classes:
        raise SpecError([f"data: its classes {list(data.classes)[:5]} are not those of the student, {classes[:5]}"])
    stream = Stream(model) if c.stream or c.confidence is not None else None
    answers: list[dict[str, Any]] = []
    began = time.perf_counter()
    for names, x, y in pictures(c, about) if data is None else samples_of(c, data.test):
        if x.ndim == 5 and c.steps:
            if c.steps > len(x):
                raise SpecError([f"steps: {c.steps} will not do: the samples have {len(x)} frames"])
            x = x[: c.steps]
        if x.ndim == 4 and trained is None:  # a student of yours that has no `steps`: its logits tell
            trained = len(infer(model, x[:1]).logits)
            if wrong := beyond(c, trained):
                raise SpecError(wrong)
        steps = len(x) if x.ndim == 5 else c.steps or trained
        found = stepwise(stream, x, steps, c.confidence) if stream else whole(model, x, c.steps)
        if c.steps and x.ndim == 4 and not stream and (took := int(found.steps[0])) != c.steps:
            raise SpecError([f"steps: {c.steps} will not do: the student takes {took}, whatever it is asked"])
        for i, name in enumerate(names):
            label = int(found.label[i])
            answer = {"sample": name, "label": classes[label] if label < len(classes) else label}
            answer |= {"confidence": round(float(found.confidence[i]), 6), "steps": int(found.steps[i])}
            if y is not None:
                answer |= {"truth": classes[int(y[i])], "right": label == int(y[i])}
            answers.append(answer)
    seconds = time.perf_counter() - began
    if not answers:
        raise SpecError(["data: there is nothing to answer for"])
    summary: dict[str, Any] = {"samples": len(answers), "mean_steps": sum(a["steps"] for a in answers) / len(answers)}
    if data is not None:
        summary["accuracy"] = sum(a["right"] for a in answers) / len(answers)
    if c.files:
        for a in answers:
            print(f"{a['sample']}: {a['label']}  {a['confidence']:.1%}  after {a['steps']} steps")
    print(
        f"{summary['samples']:,} samples in {seconds:.1f} s, {summary['mean_steps']:.2f} time steps on average", end=""
    )
    print(f", accuracy {summary['accuracy']:.2%}" if "accuracy" in summary else "")
    if out:
        write(out, answers, summary)
        print(f"answers: {out}")
    return summary | {"answers": answers}


def beyond(c: Config, trained: int | None) -> list[str]:
    """The mistake of asking for more time steps than a student was trained with, if that is known."""
    if not c.steps or trained is None or c.steps <= trained:
        return []
    return [f"steps: {c.steps} will not do: the student was trained with {trained}, give 1 to {trained}"]


def samples_of(c: Config, split: Any) -> Iterator[tuple[list[Any], Tensor, Tensor]]:
    """Number, input and label of the samples of a split, in batches."""
    done = 0
    for batch in export.batches(split, c.samples or split.samples, c.batch):
        yield [*range(done, done + len(batch["y"]))], batch["x"], batch["y"]
        done += len(batch["y"])


def pictures(c: Config, about: dict[str, Any]) -> Iterator[tuple[list[Any], Tensor, None]]:
    """Name and input of image files, as `folder:` data sets read them, encoded as the student was trained on."""
    files = c.files[: c.samples]
    channels, high, wide = about["shape"]
    before = export.settings_of(c)
    kind, draws = before.get("encode", "direct"), torch.Generator().manual_seed(0)
    images = Pictures([Path(f) for f in files], [0] * len(files), (channels, high, wide))
    for start in range(0, len(files), c.batch):
        rows = range(start, min(start + c.batch, len(files)))
        x = torch.stack([images[i][0] for i in rows]).float() / 255
        yield [files[i] for i in rows], x if kind == "direct" else spikes(x, before["steps"], kind, draws), None


def write(out: Path, answers: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    if out.suffix == ".json":
        return runs.write_json(out, summary | {"answers": answers})
    # names of files that are not UTF-8 are written as they are
    with out.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.DictWriter(file, [*answers[0]])
        table.writeheader()
        table.writerows(answers)


if __name__ == "__main__":
    from spikedistill.cli import script

    script(__name__)
