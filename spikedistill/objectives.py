"""The objectives that methods build on. Each reads passes by name and returns a scalar, a mean over the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.schedule import Schedule, at
from spikedistill.core.step import Objective, Step
from spikedistill.functional import kd_loss


class CE(nn.Module):
    """Cross-entropy of the time-mean logits with batch["y"]: labels [B] or distributions [B, C]."""

    def __init__(self, student: str = "student", label_smoothing: float = 0.0):
        super().__init__()
        self.s, self.label_smoothing = student, label_smoothing

    def forward(self, step: Step) -> Tensor:
        return F.cross_entropy(rate(step[self.s].logits), step.batch["y"], label_smoothing=self.label_smoothing)


class KD(nn.Module):
    """`kd_loss` of time-mean logits. tau: temperature, a number or a schedule."""

    def __init__(self, tau: float | Schedule = 4.0, student: str = "student", teacher: str = "teacher"):
        super().__init__()
        self.tau, self.s, self.t = tau, student, teacher

    def forward(self, step: Step) -> Tensor:
        return kd_loss(rate(step[self.s].logits), rate(step[self.t].logits), at(self.tau, step.progress))


class PerStep(nn.Module):
    """An objective at every time step of the student alone, averaged over the steps.

    At step t every pass shows only its step t (those with T = 1 show all they have), because T = 1 is just another T.
    """

    def __init__(self, inner: Objective, student: str = "student"):
        super().__init__()
        self.inner, self.s = inner, student
        self.taps = getattr(inner, "taps", {})

    def forward(self, step: Step) -> Tensor:
        steps = len(step[self.s].logits)
        return torch.stack([self.inner(step.at(slice(t, t + 1))) for t in range(steps)]).mean()
