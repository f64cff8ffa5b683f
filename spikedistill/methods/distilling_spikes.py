"""In the style of Distilling Spikes: a large spiking network teaches a smaller one by its output spikes.

    S in {0, 1} [T, B, C]: output spikes     c = sum_t S[t]: counts     A_j = (1/w) sum_{i<w} S[j stride + i]: windows
    L_full   = mean_{t,b,k} (S_t - S_s)^2                   whole spike trains
    L_window = mean_{j,b,k} (A_t - A_s)^2                   windows j = 0 .. floor((T - w) / stride)
    L_soft   = tau^2 (1/B) sum_b KL( softmax(c_t / tau) || softmax(c_s / tau) )        softened spike probabilities
    L        = (1 - alpha) CE(c_s, y) + alpha ( scale (full L_full + sliding L_window) + soft L_soft )

Reference: Kushawaha, Kumar, Banerjee, Velmurugan, ICPR 2020, https://arxiv.org/abs/2005.00288.
Evidence: reconstruction: only the abstract could be read; the formulas and all defaults are ours.
L_full and L_window are means over every axis, at most 1, and fall with the number of classes C, so `scale` is C.
w = 1 and stride 1 give L_full, w = T compares rates. L_soft is summed over classes and averaged over the batch.
A train of another T than the student's counts as constant within its own steps: windows cover the same share of time,
and its counts are scaled to the student's T. Whole trains then do not compare, which is an error.
The output layers must spike (`small(head="spiking")`). For other heads signal="potential" takes the time mean of what
they give as c; only L_soft is left, which is the term "kd" of `kd`, beside the label term "ce".
The multi-stage variant is this method twice: the teacher to an intermediate network, that one to the student.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass, Step
from spikedistill.functional import idle, kd_loss, mean_square, wide
from spikedistill.objectives import CE, KD
from spikedistill.spec import Count, NonNegative, Positive, Share, SpecError

Reduction = Literal["mean", "sum"]


def full_loss(student: Tensor, teacher: Tensor) -> Tensor:  # [T, B, C], [T, B, C] -> []
    """Share of entries where two spike trains differ. Raises ValueError where they are not of one length."""
    if len(student) != len(teacher):
        steps = f"the student has {len(student)} time steps, the teacher {len(teacher)}"
        raise ValueError(f"distilling_spikes: {steps}; whole trains need equal ones, use sliding or soft with full=0")
    return mean_square(student, teacher)


def windows(spikes: Tensor, window: int, stride: int, steps: int) -> Tensor:  # [T, B, C] -> [N, B, C]
    """Mean of a train in windows given in units of 1/steps of its duration; steps = T gives the moving average.

    Raises ValueError where the window is longer than `steps`.
    """
    if window > steps:
        raise ValueError(f"distilling_spikes: window={window} is longer than the {steps} time steps of the student")
    how = dict(dtype=wide(spikes).dtype, device=spikes.device)
    start = torch.arange(0, steps - window + 1, stride, **how)[:, None]
    edge = torch.arange(len(spikes) + 1, **how) * steps / len(spikes)
    overlap = (torch.minimum(start + window, edge[1:]) - torch.maximum(start, edge[:-1])).clamp_min(0)
    with torch.autocast(spikes.device.type, enabled=False):  # which would multiply in bfloat16
        return torch.einsum("nt,t...->n...", overlap, wide(spikes)) / window


def default_window(steps: int) -> int:
    """A fifth of the time steps, at least 2 where there are as many."""
    return min(steps, max(2, steps // 5))


def window_loss(
    student: Tensor, teacher: Tensor, window: int | None = None, stride: int = 1, reduction: Reduction = "mean"
) -> Tensor:  # [T, B, C], [T', B, C] -> []
    """Mean square difference of the windows of two trains; with reduction="sum" a window holds its count."""
    w = window or default_window(len(student))
    s, t = (windows(x, w, stride, len(student)) for x in (student, teacher.detach()))
    return (s - t).square().mean() * (w**2 if reduction == "sum" else 1)


def soft_loss(
    student: Tensor, teacher: Tensor, tau: float, per_window: bool = False, window: int | None = None, stride: int = 1
) -> Tensor:  # [T, B, C], [T', B, C] -> []
    """`kd_loss` of the spike counts of all steps, or of those of each window, averaged over the windows."""
    w = window or default_window(len(student)) if per_window else len(student)
    s, t = (w * windows(x, w, stride, len(student)).flatten(0, 1) for x in (student, teacher))
    return kd_loss(s, t, tau)


class Spikes(nn.Module):
    """A loss of the output spikes of student and teacher, times `scale` (None for the number of classes).

    Looks whether the outputs are spikes in evaluation and at the start of training only: a look makes a GPU wait.
    """

    def __init__(self, loss: Callable[..., Tensor], scale: float | None = 1.0, **settings: Any):
        super().__init__()
        self.loss, self.scale, self.settings = loss, scale, settings

    def forward(self, step: Step) -> Tensor:
        s, t = step.student.logits, step.teacher.logits
        for name, z in (("student", s), ("teacher", t)):
            if (step.progress == 0 or not self.training) and not ((z == 0) | (z == 1)).all():
                how = "take a head that spikes, small(head=spiking) or plif_net(vote=1), or set signal=potential"
                raise ValueError(f"distilling_spikes: the outputs of the {name} are not spikes: {how}")
        return (self.scale or s.shape[-1]) * self.loss(s, t, **self.settings)


class Task(nn.Module):
    """Labels on the student's output spikes: cross-entropy with counts as logits, or rates to one-hot labels."""

    def __init__(self, kind: Literal["ce", "mse"] = "ce"):
        super().__init__()
        self.kind = kind

    def forward(self, step: Step) -> Tensor:
        z, y = wide(step.student.logits), step.batch["y"]
        if self.kind == "ce":
            return F.cross_entropy(z.sum(0), y)
        return F.mse_loss(rate(z), (F.one_hot(y, z.shape[-1]) if y.ndim == 1 else y).to(z.dtype))


def distilling_spikes(
    student: nn.Module,
    teacher: nn.Module,
    *,
    alpha: Share = 0.5,  # ours, as all below
    full: NonNegative = 0.0,
    sliding: NonNegative = 0.0,
    soft: NonNegative = 1.0,
    window: Count | None = None,
    stride: Count = 1,
    reduction: Reduction = "mean",
    scale: Positive | None = None,
    tau: Positive = 2.0,
    per_window: bool = False,
    task: Literal["ce", "mse"] = "ce",
    signal: Literal["spikes", "potential"] = "spikes",
) -> Plan:
    """Labels, and the teacher's spike trains, windows of them or their softened counts.

    alpha: share of distillation in the loss, the rest is that of the labels.
    full: weight of whole spike trains.  sliding: weight of windows.  soft: weight of softened spike probabilities.
    window: steps in a window, None for a fifth of them, at least 2.  stride: steps from one window to the next.
    reduction: whether a window holds the mean of its spikes, or their sum.
    scale: factor on `full` and `sliding`, None for the number of classes.
    tau: temperature of the counts.  per_window: soften the counts of each window instead of those of all steps.
    task: labels by cross-entropy with the counts, or by the square error of rates and one-hot labels.
    signal: spikes of the output layer, or the potential of one that does not spike.
    """
    passes = {"student": Pass(student, grad=True), "teacher": Pass(teacher)}
    if signal == "potential" and (full or sliding or per_window or task == "mse"):
        raise ValueError("distilling_spikes: full, sliding, per_window and task='mse' need signal='spikes'")
    if alpha == 1 and not (full or sliding or soft):
        raise SpecError(["distilling_spikes.alpha: 1 takes the labels away, and full, sliding and soft are 0"])
    unused = dict(tau=tau != 2.0 and not soft, per_window=per_window and not soft)
    unused |= dict(scale=bool(scale) and not (full or sliding), reduction=reduction != "mean" and not sliding)
    if not (sliding or (soft and per_window)):
        unused |= dict(window=bool(window), stride=stride != 1)
    why = f"with signal='{signal}', full={full:g}, sliding={sliding:g}, soft={soft:g}, per_window={per_window}"
    idle("distilling_spikes", why, **unused)
    if signal == "potential":
        return Plan(passes, {"ce": (1 - alpha, CE()), "kd": (alpha * soft, KD(tau))})
    softened = Spikes(soft_loss, tau=tau, per_window=per_window, window=window, stride=stride)
    windowed = Spikes(window_loss, scale, window=window, stride=stride, reduction=reduction)
    terms = {
        "spikes_task": (1 - alpha, Task(task)),
        "spikes_full": (alpha * full, Spikes(full_loss, scale)),
        "spikes_window": (alpha * sliding, windowed),
        "spikes_soft": (alpha * soft, softened),
    }
    return Plan(passes, {name: (weight, term) for name, (weight, term) in terms.items() if weight})
