"""A trained student for hardware and for other programs, read back and checked on test samples before it is kept.

Run:    spikedistill export runs/student --to nir
Formats: nir (neuromorphic chips and simulators), onnx (onnxruntime), torch (torch.export, runs without this package).
Batch norms are folded, and nothing that is for training only can be in the file. Exit code 1, and no file, where the
file does not compute what the student does: the message says in which layer and at which time step that begins.
"""

import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from spikedistill import data as data_sets
from spikedistill import models, runs, transforms
from spikedistill.core.step import Batch
from spikedistill.models.foreign import has_foreign_neurons
from spikedistill.neurons import IF, Neuron
from spikedistill.recipes import distill
from spikedistill.spec import SpecError, parse


class Config(BaseModel):
    """Settings of `export`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    run: str = Field(min_length=1)
    """A run folder or student file."""
    to: Literal["nir", "onnx", "torch"]
    """What to write."""
    out: str | None = None
    """The file; by default student.nir, .onnx or .pt2 in the run folder."""
    overwrite: bool = False
    """Replace the file if it is there."""
    trust_code: bool = False
    """Import the file.py that built the student or the data, where one did."""
    data: str | None = None
    """What to check on; by default what the run was trained on."""
    root: str | None = None
    """Folder where the data set's files are."""
    samples: Annotated[int, Field(ge=1)] = 100
    """Test samples to check on."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Time steps for images; by default the student's."""
    dt: Annotated[float, Field(gt=0)] = 1e-4
    """nir: seconds of a time step. snnTorch reads files of 1e-4."""
    if_as_lif: bool = False
    """nir: write IF neurons as LIF without a leak, for programs that misread IF, such as snnTorch, or step it by dt."""
    retrain_for: Literal["nir"] | None = None
    """Fine-tune a copy with NIR's neurons (hard reset, fires above v_th), taught by the student, and export that."""
    epochs: Annotated[int, Field(ge=1)] = 3
    """Of the fine-tuning."""
    retrained: str | None = None
    """Folder of the fine-tuned student; by default the run's name with -nir."""


def run(c: Config) -> dict[str, str]:
    """Write, check, and print what was found. Returns {"file", ...}; raises Mismatch where the check fails."""
    from spikedistill import export
    from spikedistill.export.read_nir import why_not_snntorch
    from spikedistill.export.to_nir import STARTS, starting

    form, student = export.form(c.to), runs.load(c.run, fast=False, trust_code=c.trust_code)
    source = runs.student_file(c.run)
    out = Path(c.out) if c.out else source.with_name(source.stem + form.EXTENSION)
    mistakes = form.needs()
    if out.exists() and not c.overwrite:
        mistakes.append(f"out: '{out}' exists; choose another --out, or --overwrite to lose it")
    if out.suffix == ".safetensors":
        mistakes.append(f"out: '{out}' is the name of a student file; write to {form.EXTENSION}")
    if not out.parent.is_dir():
        mistakes.append(f"out: there is no folder '{out.parent}'")
    if c.retrain_for and c.to != c.retrain_for:
        mistakes.append(f"retrain_for: {c.retrain_for} is for --to {c.retrain_for}, this is --to {c.to}")
    neurons = [m for m in student.modules() if isinstance(m, Neuron)]
    if not neurons:
        why = "its neurons are another library's" if has_foreign_neurons(student) else "it is an ANN"
        mistakes.append(f"run: '{c.run}' has no spiking neurons of this package: {why}")
    if c.to == "nir" and (early := starting(student)):
        mistakes.append(f"run: {some(early)}: {STARTS}")
    if mistakes:
        raise SpecError(mistakes)
    test = data_of(c).test
    if c.steps:
        setattr(student, "steps", c.steps)  # noqa: B010, nn.Module does not declare it
    if c.to == "nir" and (soft := suits_nir(student, batches(test, c.samples))) and not c.retrain_for:
        raise SpecError([soft])
    temporary = out.with_name(f"{out.stem}.part{out.suffix}")  # torch.export wants its own ending
    how: dict[str, Any] = {"dt": c.dt, "if_as_lif": c.if_as_lif} if c.to == "nir" else {}
    try:
        example = next(batches(test, 2))["x"]
        if c.retrain_for:
            form.write(reset(student, v_reset=0.0, strict=True), example, temporary, **how)  # it can be said in NIR
            student = retrain(c, student)
        form.write(student, example, temporary, **how)
        folded = export.fold(student, example)
        read_how = {"steps": getattr(student, "steps", None)} if c.to == "nir" else {}
        for reader, read in form.readers(temporary, **read_how).items():
            found = export.check(student, batches(test, c.samples), read, reader, form.TOLERANCE, folded)
            print("\n".join(found.lines()))
            if found.fault:
                raise export.Mismatch(f"{reader} does not compute what the student does: {found.fault}")
        if c.to == "nir" and (why := why_not_snntorch(temporary)):
            print(f"snnTorch was not asked: {why}")
        if c.to == "nir" and not c.if_as_lif and any(isinstance(m, IF) for m in neurons):
            print("IF adds its whole current at a step, whatever dt (r = 1): give --if-as-lif where dt is integrated.")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"written and checked: {out}")
    return {"file": str(out)}


def settings_of(c: Any) -> dict[str, Any]:
    """The settings that the student was trained with; empty for a lone student file. c: has `run`."""
    folder = runs.student_file(c.run).parent
    return runs.read_json(folder / "config.json") if (folder / "config.json").exists() else {}


def data_of(c: Any) -> data_sets.Data:
    """The data named in the settings, or those that the run was trained on, of recordings the frames that the student
    sees. c: has `run`, `data`, `root` and `trust_code`."""
    before = settings_of(c)
    name = c.data or before.get("data")
    if not name or name.startswith("<"):
        raise SpecError(["data: the run does not name any that can be loaded again; give --data"])
    if name == before.get("data"):
        mine = {"data": None} if c.data else {}
        data_sets.refuse_code(before | mine, c.trust_code, "give --trust-code, or other --data")
    shape = runs.about(c.run).get("shape")
    how = data_sets.settings_of(before) if name == before.get("data") else {}
    if name != before.get("data"):
        if before.get("encode", "direct") != "direct":
            how |= {"encode": before["encode"], "steps": before["steps"]}
        if name.startswith("folder:") and shape and shape[1] == shape[2]:
            how["size"] = shape[1]
    if how.get("pair_classes") != "common":  # then the images are not needed to know the classes
        how["pair"] = None
    how |= {"download": False} | ({"root": c.root} if c.root else {})
    if wrong := data_sets.check(name, **how):
        raise SpecError([f"data: {m}" for m in wrong])
    data = data_sets.load(name, **how, batch_size=50, augment="none")
    if shape and shape != [*data.shape]:
        what = "(channels, height, width)"
        raise SpecError([f"data: '{name}' has samples of {[*data.shape]} {what}, the student takes {shape}"])
    return data_sets.at_frames(data, runs.about(c.run).get("frames"))


def batches(split: Any, samples: int, size: int = 50) -> Iterator[Batch]:
    """The first samples of a split, at most `size` at a time."""
    left = samples
    for batch in split:
        for start in range(0, min(left, len(batch["y"])), size):
            stop = min(start + size, left, len(batch["y"]))
            x = batch["x"][:, start:stop] if batch["x"].ndim == 5 else batch["x"][start:stop]
            yield {"x": x, "y": batch["y"][start:stop]}
        left -= len(batch["y"])
        if left <= 0:
            return


def suits_nir(student: nn.Module, test: Iterator[Batch]) -> str | None:
    """Say what NIR's meaning of a neuron would change; a sentence where the student cannot be written for it."""
    from spikedistill.export.to_nir import touching, unfit

    soft, touch = unfit(student), touching(student)
    samples = [*test] if soft or touch else []
    if touch and not soft:
        share = changed(student, samples, strict=True)
        print(f"The student fires at the threshold, NIR above it: that alone would change {share:.3%} of its spikes.")
        print("The threshold is written as the float below it, which is the same rule: nothing changes.")
    if not soft:
        return None
    share = changed(student, samples, v_reset=0.0, strict=True)
    return (
        f"run: {len(soft)} of its layers reset softly ({some(soft)}) and NIR "
        f"knows hard reset only: {share:.2%} of the spikes would change. --retrain-for nir fine-tunes a copy that fits"
    )


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def changed(student: nn.Module, samples: list[Batch], **how: Any) -> float:
    """Share of spikes, of those the student fires, at sites that differ when its neurons are set to `how`."""
    from spikedistill.export.verify import reference

    other, differ, fired = reset(student, **how), 0.0, 0.0
    for batch in samples:
        a, b = (reference(model, batch["x"])[0].spikes for model in (student, other))
        differ += sum(float((a[name] != b[name]).sum()) for name in a)
        fired += sum(float(s.sum()) for s in a.values())
    return differ / max(fired, 1.0)


def reset(student: nn.Module, **how: Any) -> nn.Module:
    """A copy whose neurons have these settings."""
    other = deepcopy(student)
    for module in other.modules():
        if isinstance(module, Neuron):
            for name, value in how.items():
                setattr(module, name, value)
    return other


def retrain(c: Config, student: nn.Module) -> nn.Module:
    """A copy with NIR's neurons, distilled for a few epochs from the student, kept in a run folder of its own."""
    settings, spec = settings_of(c), runs.about(c.run).get("spec")
    if not spec or not isinstance(spec["settings"].get("neuron"), str):
        raise SpecError(["retrain_for: the student was built by code of yours; build it with hard reset and train it"])
    name, _, keywords = parse(spec["settings"]["neuron"])
    text = ", ".join(f"{k}={v}" for k, v in (keywords | {"v_reset": 0.0, "strict": True}).items())
    copy = models.build(spec["model"], **spec["settings"] | {"neuron": f"{name}({text})"})
    copy = transforms.apply_spec(copy, spec)
    copy.load_state_dict(student.state_dict())
    folder = Path(c.run) if Path(c.run).is_dir() else Path(c.run).parent
    out = c.retrained or str(folder.with_name(folder.resolve().name + f"-{c.retrain_for}"))
    keep = ("valid", "batch", "augment", "optimizer", "select", "weight_decay", "seed", "precision", "steps")
    how = {k: settings[k] for k in ("data", *keep) if settings.get(k) is not None}
    if settings.get("data") and c.data in (None, settings["data"]):
        how |= {k: v for k, v in data_sets.settings_of(settings).items() if v is not None}
    how |= {k: v for k, v in (("data", c.data), ("root", c.root)) if v}
    how["lr"] = settings.get("lr", 0.01) / 5  # it starts trained
    print(f"fine-tuning a copy with hard reset for {c.epochs} epochs, taught by the student, in {out}")
    try:
        result = distill.distill(copy, student, methods="kd", epochs=c.epochs, out=out, **how)
    except SpecError as error:  # in which --out is the copy's folder
        ours, hint = "choose another --out, or --overwrite to lose it", "choose another with --retrained, or delete it"
        raise SpecError([m.replace(ours, hint) for m in error.mistakes]) from None
    print(f"test accuracy of the fine-tuned student {result['test']['accuracy']:.2%}")
    return runs.load(out, fast=False, trust_code=c.trust_code)


if __name__ == "__main__":
    from spikedistill.cli import script

    script(__name__)
