"""Optimisers by name, and those that are methods: their own update rule, for `Stage.optim` and any loop of yours.

make("sgd(momentum=0.8)", lr=0.1, ...)      parameter groups -> optimiser, as `Stage.optim` wants it
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from spikedistill.optim.stds import SGDSTDS, STDS, Curve, sparsity  # 2022 Chen et al., ICML, STDS
from spikedistill.spec import NonNegative, Share, SpecError, bind, near, parse
from spikedistill.transforms import in_factors

Make = Callable[[list[dict[str, Any]]], Optimizer]


def adamw(lr: float, weight_decay: float, updates: int, student: nn.Module, *, beta1: Share = 0.9) -> Make:
    """AdamW.  beta1: decay of its mean of gradients."""
    return partial(AdamW, lr=lr, weight_decay=weight_decay, betas=(beta1, 0.999), fused=True)


def sgd(lr: float, weight_decay: float, updates: int, student: nn.Module, *, momentum: Share = 0.9) -> Make:
    """Stochastic gradient descent.  momentum: its momentum."""
    return partial(SGD, lr=lr, weight_decay=weight_decay, momentum=momentum)


def stds(
    lr: float,
    weight_decay: float,
    updates: int,
    student: nn.Module,
    *,
    threshold: NonNegative = 1.0,
    curve: Curve = "sine",
    straight_through: bool = True,
) -> Make:
    """STDS on Adam; prunes the student's weights. As in the paper, without weight decay.

    threshold: D at the end.  curve: sine, linear or constant.  straight_through: silent synapses keep a gradient.
    """
    how = dict(updates=updates, threshold=threshold, curve=curve, straight_through=straight_through)
    return partial(STDS, lr=lr, prune=[p for p in student.parameters() if p.ndim > 1], **how)


def sgd_stds(
    lr: float,
    weight_decay: float,
    updates: int,
    student: nn.Module,
    *,
    threshold: NonNegative = 0.1,
    curve: Curve = "sine",
    straight_through: bool = True,
    momentum: Share = 0.9,
) -> Make:
    """STDS on SGD, likewise.  threshold, curve, straight_through: as in stds.  momentum: of SGD."""
    how = dict(updates=updates, threshold=threshold, curve=curve, straight_through=straight_through, momentum=momentum)
    return partial(SGDSTDS, lr=lr, prune=[p for p in student.parameters() if p.ndim > 1], **how)


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "stds": stds, "sgd_stds": sgd_stds}


FACTORS = "would prune the factors of kernels, and their products have no zeros: leave out"


def check(text: str, select: str = "last", ema: float | None = None, beside: Sequence[str] = ()) -> list[str]:
    """The mistakes in the text of an optimiser, and where it does not suit the rest.

    select, ema: what is kept: which epoch, or an average.  beside: transforms and methods as text.
    """
    try:
        name, positional, keywords = parse(text)
    except SpecError as error:
        return error.mistakes
    if name not in OPTIMIZERS:
        return [f"'{name}' is unknown; {near(name, OPTIMIZERS)}"]
    mistakes = [f"{text}: give settings by name, {name}(key=value)"] if positional else []
    if "stds" in name and select == "best":
        mistakes.append(f"{name} prunes until the last update: it needs --select last, an earlier epoch is not pruned")
    if "stds" in name and ema:
        mistakes.append(f"{name} prunes the weights, of which an average is not pruned: leave out --ema")
    rewrites = [other for other in beside if other.split("(")[0].strip() in ("tt_snn", "factorise", "joint_a_snn")]
    mistakes += [f"{name} {FACTORS} {other}" for other in rewrites if "stds" in name]
    return mistakes + bind(OPTIMIZERS[name], keywords, name, skip=4)[1]


def make(text: str, *, lr: float, weight_decay: float, updates: int, student: nn.Module) -> Make:
    """What a text names: parameter groups -> optimiser.

    updates: of the whole training.  student: whose weights are pruned, where it prunes.
    Raises SpecError with every mistake, or where the student's zeros would be lost.
    """
    if mistakes := check(text):
        raise SpecError(mistakes)
    name, _, keywords = parse(text)
    if "stds" in name and in_factors(student):
        raise SpecError([f"optimizer: {name} {FACTORS} tt_snn, factorise or joint_a_snn"])
    return OPTIMIZERS[name](lr, weight_decay, updates, student, **bind(OPTIMIZERS[name], keywords, name, skip=4)[0])


__all__ = ["OPTIMIZERS", "SGDSTDS", "STDS", "check", "make", "sparsity"]
