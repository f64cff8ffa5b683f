"""The teacher of a run: whether a method needs one, what it sees, how often it is asked, and from where it answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikedistill import data as data_sets
from spikedistill import models, own, runs
from spikedistill.cache import Cache
from spikedistill.core.evaluate import evaluate
from spikedistill.core.plan import Prepare
from spikedistill.core.step import Batch, Pass
from spikedistill.methods import builder
from spikedistill.spec import SpecError

TEACHERS = "a run folder, timm:NAME(pretrained=True), hf:NAME(pretrained=True) or file.py:function"
PAIRED = ("source", "rgb")  # what `data.Pairs` adds to a batch


@cache
def streams(method: str) -> frozenset[str]:
    """Those of PAIRED that a method's passes read, by its default settings."""
    with torch.random.fork_rng(devices=[]):
        try:
            plan = builder(method)(models.build("small"), models.build("small(neuron=relu)"))
        except Exception as error:  # it wants a teacher of its own, or is one of yours for other models
            if not (own.is_own(method) or isinstance(error, ValueError)):
                raise
            return frozenset()
    return frozenset(p.x for p in plan.passes.values()).intersection(PAIRED)


def seen_by_teacher(data: Any, methods: Iterable[str]) -> Any:
    """The data that a teacher of these methods sees: the images of paired data where one of them shows it those."""
    images = data_sets.images_of(data)
    return images if images is not None and any("rgb" in streams(m) for m in methods) else data


def needs_teacher(method: str) -> bool:
    """Whether a builder has no default for its teacher."""
    return [*signature(builder(method)).parameters.values()][1].default is Parameter.empty


def check_teacher(teacher: str | None, methods: Sequence[str]) -> list[str]:
    if teacher is None:
        needy = [m for m in methods if needs_teacher(m)]
        return [f"{', '.join(needy)} needs one: {TEACHERS}"] if needy else []
    if Path(teacher).exists() and ".py:" not in teacher:
        try:
            runs.about(teacher)
        except SpecError as error:
            return error.mistakes
        return []
    wrong = models.check(teacher)
    if wrong and "is unknown" in wrong[0]:
        return [f"'{teacher}' is no run folder and no model: give {TEACHERS}"]
    if not wrong and models.weightless(teacher):
        hint = "train it first, as --student with --method ce, and give its run folder"
        if teacher.startswith(("timm:", "hf:")):
            hint = f"write {teacher.partition('(')[0]}(pretrained=True), or {hint}"
        return [f"'{teacher}' is a model without trained weights: {hint}"]
    return wrong


def accuracy(teacher: nn.Module | None, shown: Any, fabric: Any) -> float | None:
    """Of the teacher on the validation part of what it sees; None where there is no teacher or no such part."""
    if teacher is None or shown.valid is None:
        return None
    return evaluate(teacher.to(fabric.device), shown.valid, fabric=fabric)["accuracy"]


def told(accuracy: float, classes: int) -> str:
    """The accuracy in words, and what is likely wrong where it is hardly more than chance."""
    hint = "which is hardly more than chance: does it want another normalisation, or other classes?"
    return f"teacher: {accuracy:.2%} on validation" + (f", {hint}" if accuracy < 1.5 / classes else "")


class Calls:
    """Counts how often a teacher is asked, itself or through a cache: methods skip it in phases, or ask it twice."""

    def __init__(self, teacher: nn.Module | None):
        self.batches = self.calls = 0
        if teacher is not None:
            teacher.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.calls += 1

    def counting(self, prepare: Prepare) -> Prepare:
        """`prepare`, counting the batches."""

        def counted(batch: Batch, progress: float) -> Batch:
            self.batches += 1
            return prepare(batch, progress)

        return counted

    def report(self, cache: Cache | None) -> float | None:
        """Calls a batch of training, over what this process trained; None where it trained nothing."""
        asked = self.calls + (cache.calls - cache.ran if cache else 0)
        return asked / self.batches if self.batches else None


def cached(passes: Mapping[str, Pass], teacher: nn.Module | None, cache: Cache | None) -> dict[str, Pass]:
    """The passes, those of a teacher that stays as it is with a cache."""
    frozen = teacher is not None and not any(p.grad for p in passes.values() if p.model is teacher)
    return {k: replace(p, cache=cache) if frozen and p.model is teacher else p for k, p in passes.items()}
