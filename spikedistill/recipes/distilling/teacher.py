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
from spikedistill import models, runs
from spikedistill.cache import Cache
from spikedistill.core.plan import Prepare
from spikedistill.core.step import Batch, Pass
from spikedistill.methods import METHODS
from spikedistill.spec import SpecError

PAIRED = ("source", "rgb")  # what `data.Pairs` adds to a batch


@cache
def streams(method: str) -> frozenset[str]:
    """Those of PAIRED that a method's passes read, by its default settings."""
    with torch.random.fork_rng(devices=[]):
        try:
            plan = METHODS[method](models.build("small"), models.build("small(neuron=relu)"))
        except (SpecError, ValueError):  # it wants a teacher of its own
            return frozenset()
    return frozenset(p.x for p in plan.passes.values()).intersection(PAIRED)


def seen_by_teacher(data: Any, methods: Iterable[str]) -> Any:
    """The data that a teacher of these methods sees: the images of paired data where one of them shows it those."""
    images = data_sets.images_of(data)
    return images if images is not None and any("rgb" in streams(m) for m in methods) else data


def needs_teacher(method: str) -> bool:
    """Whether a builder has no default for its teacher."""
    return [*signature(METHODS[method]).parameters.values()][1].default is Parameter.empty


def check_teacher(teacher: str | None, methods: Sequence[str]) -> list[str]:
    if teacher is None:
        needy = [m for m in methods if needs_teacher(m)]
        return [f"{', '.join(needy)} needs one: a run folder, timm:NAME, hf:NAME or file.py:function"] if needy else []
    if Path(teacher).exists() and ".py:" not in teacher:
        try:
            runs.about(teacher)
        except SpecError as error:
            return error.mistakes
        return []
    wrong = models.check(teacher)
    if wrong and "is unknown" in wrong[0]:
        return [f"'{teacher}' is no run folder and no model: give a run folder, timm:NAME, hf:NAME or file.py:function"]
    if not wrong and not teacher.startswith(("timm:", "hf:")) and ".py:" not in teacher:
        hint = "train it first with --method ce, and give its run folder"
        return [f"'{teacher}' is a model without weights: {hint}"]
    return wrong


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
