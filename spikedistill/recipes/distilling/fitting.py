"""Does it fit together: models and data are tried on two samples, so that what is wrong is said before training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spikedistill import data as data_sets
from spikedistill import models
from spikedistill.core.fit import Passes, Stage, Trainee
from spikedistill.core.plan import MergeError, Prepare
from spikedistill.core.step import Batch, Step
from spikedistill.core.taps import call, eval_mode
from spikedistill.spec import SpecError


def two(data: Any) -> dict[str, torch.Tensor]:
    """A batch of two samples, with all that a batch of training has."""
    batches = data.train if data.valid is None or data_sets.images_of(data) is not None else data.valid
    return {k: v[:, :2] if v.ndim == 5 else v[:2] for k, v in next(iter(batches)).items()}


def fit_both(student: nn.Module, teacher: nn.Module | None, probe: Batch, data: Any, shown: Any) -> None:
    """`fits` for the student on its stream and the teacher on its own."""
    fits("student", student, probe["x"], data.classes)
    if teacher is not None:
        fits("teacher", teacher, probe["x" if shown is data else "rgb"], data.classes)


def fits(name: str, model: nn.Module, x: torch.Tensor, classes: Sequence[str]) -> None:
    """Raise SpecError unless a model takes these images and gives a logit a class; publish `dims` where it has none."""
    kind, shape = type(model).__name__, list(x.shape[1:])
    device = next((p.device for p in model.parameters()), x.device)
    try:
        with eval_mode(model), torch.no_grad():
            if not hasattr(model, "dims"):
                setattr(model, "dims", models.measure_dims(model, x.to(device)))  # noqa: B010, nn.Module does not declare it
            logits = call(model, x.to(device)).logits
    except (RuntimeError, ValueError, TypeError) as error:
        raise SpecError([f"{name}: {kind} cannot take images of {shape} (channels, height, width): {error}"]) from None
    if logits.shape[-1] != len(classes):
        got = f"{logits.shape[-1]} classes (logits {list(logits.shape)})"
        hint = ": train it on them first, as --student with --method ce, and give its run folder"
        raise SpecError([f"{name}: {kind} gives {got}, the data have {len(classes)}{hint * (name == 'teacher')}"])


def rehearse(stage: Stage, batch: dict[str, torch.Tensor]) -> None:
    """Compute every term once on two images, in evaluation mode: what does not fit is found before training."""
    try:
        trainee = Trainee(stage)
    except ValueError as error:
        raise SpecError([f"method: {error}"]) from None
    student = stage.passes["student"]
    own = getattr(student.model, "steps", student.steps)
    if batch["x"].ndim == 4 and student.steps not in (None, own):
        why = f"it trains with {student.steps} time steps a student that is measured and used with {own}"
        raise SpecError([f"method: {why}: give --steps {student.steps}"])
    with eval_mode(trainee), torch.no_grad():
        try:
            batch = trainee.prepare(batch, 0.5)
        except ValueError as error:
            raise SpecError([f"{'method' if isinstance(error, MergeError) else 'data'}: {error}"]) from None
        try:
            step = Step(batch, Passes(trainee, batch), 0.5)
        except (RuntimeError, ValueError, TypeError) as error:
            raise SpecError([f"method: a model that it trains does not run as it asks: {error}"]) from None
        for name, (_, objective) in trainee.loss.items():
            try:
                objective(step)
            except Exception as error:
                if isinstance(error, (RuntimeError, ValueError, TypeError)):
                    raise SpecError([f"term '{name}': {error}"]) from None
                if type(objective).__module__.startswith("spikedistill."):  # a mistake of ours, to be seen whole
                    raise
                raise SpecError([f"term '{name}': {type(error).__name__}: {error}"]) from error


def frames_left(data: Any, prepare: Prepare, probe: Batch) -> list[int] | None:
    """Numbers of the frames of a recording that a method leaves the student; None where it leaves all.

    They are read from a recording whose every frame holds its own number. Raises SpecError where what is left is fewer
    frames, but none of those: then nobody could evaluate the student later on what it was trained on.
    """
    if data.steps is None:
        return None
    every = torch.arange(data.steps, dtype=torch.float32)
    x = every.view(-1, 1, 1, 1, 1).expand(data.steps, *probe["x"].shape[1:])
    left = prepare(probe | {"x": x}, 1.0)["x"].flatten(1)
    numbers = left[:, 0]
    if not (left == numbers[:, None]).all() or not torch.isin(numbers, every).all():
        if len(left) == data.steps:
            return None  # it changes what frames hold, which is of training alone
        raise SpecError([f"method: it makes {len(left)} frames of {data.steps}, which are none of them"])
    return None if torch.equal(numbers, every) else [int(i) for i in numbers]
