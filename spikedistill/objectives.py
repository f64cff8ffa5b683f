"""The objectives that methods build on. Each reads passes by name and returns a scalar, a mean over the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.schedule import Schedule, at
from spikedistill.core.step import Objective, Step
from spikedistill.functional import kd_loss, kd_per_step, linear_cka, step_losses, wide


class CE(nn.Module):
    """Cross-entropy of the time-mean logits with batch["y"]: labels [B] or distributions [B, C].

    counts: of their sum over time instead, for heads that spike: rates in [0, 1] could not tell classes apart.
    """

    def __init__(self, student: str = "student", label_smoothing: float = 0.0, counts: bool = False):
        super().__init__()
        self.s, self.label_smoothing, self.counts = student, label_smoothing, counts

    def forward(self, step: Step) -> Tensor:
        z = step[self.s].logits
        z = wide(z).sum(0) if self.counts else rate(z)
        return F.cross_entropy(z, step.batch["y"], label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        usual = {"student": "student", "label_smoothing": 0.0, "counts": False}
        values = zip(usual.items(), (self.s, self.label_smoothing, self.counts))
        return ", ".join(f"{name}={value}" for (name, default), value in values if value != default)


class KD(nn.Module):
    """`kd_loss` of time-mean logits. tau: temperature, a number or a schedule."""

    def __init__(self, tau: float | Schedule = 4.0, student: str = "student", teacher: str = "teacher"):
        super().__init__()
        self.tau, self.s, self.t = tau, student, teacher

    def forward(self, step: Step) -> Tensor:
        return kd_loss(rate(step[self.s].logits), rate(step[self.t].logits), at(self.tau, step.progress))

    def extra_repr(self) -> str:
        return f"tau={self.tau if isinstance(self.tau, int | float) else 'a schedule'}"


class KDPerStep(nn.Module):
    """`kd_per_step` from the time-mean teacher: what `PerStep(KD(tau))` is where the teacher has T = 1."""

    def __init__(self, tau: float):
        super().__init__()
        self.tau = tau

    def forward(self, step: Step) -> Tensor:
        return kd_per_step(step.student.logits, rate(step.teacher.logits), self.tau)

    def extra_repr(self) -> str:
        return f"tau={self.tau}"


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


class Head(nn.Module):
    """A classifier for training only: a map averaged to grid x grid and a linear layer, at every time step."""

    def __init__(self, tap: str, channels: int, classes: int, grid: int = 1, student: str = "student"):
        super().__init__()
        self.tap, self.grid, self.s = tap, grid, student
        self.taps = {student: [tap]}
        self.linear = nn.Linear(channels * grid**2, classes)

    def forward(self, step: Step) -> Tensor:  # -> [T, B, classes]
        x = step[self.s].taps[self.tap]
        x = F.adaptive_avg_pool2d(x.flatten(0, 1), self.grid).unflatten(0, x.shape[:2])
        return wide(self.linear(x.flatten(2)))


class StepWeights(nn.Module):
    """Shares sigmoid(eta_t) of the alignment and 1 - sigmoid(eta_t) of the labels at each time step, eta from 1.

    He et al. 2024, arXiv:2303.13077. Both are 1 everywhere where they are not learned.
    """

    def __init__(self, steps: int, learned: bool = True):
        super().__init__()
        self.eta = nn.Parameter(torch.ones(steps)) if learned else None

    def forward(self, steps: int) -> tuple[Tensor | float, Tensor | float]:  # -> [T], [T]
        if self.eta is None:
            return 1.0, 1.0
        if steps != len(self.eta):
            raise ValueError(f"the input has {steps} time steps, the weights of the steps {len(self.eta)}: set steps=")
        share = torch.sigmoid(self.eta)
        return share, 1 - share


class StepLabels(nn.Module):
    """Labels at every time step of a pass, (1/T) sum_t w_t `step_losses`[t]; through a head where it has one.

    weights: w = 1 - sigmoid(eta), 1 where there are none.  per_step: False is cross-entropy of the time mean, no w.
    """

    def __init__(
        self,
        student: str,
        lam: float,
        phi: float,
        per_step: bool = True,
        head: Head | None = None,
        weights: StepWeights | None = None,
    ):
        super().__init__()
        self.s, self.lam, self.phi, self.per_step, self.head, self.weights = student, lam, phi, per_step, head, weights
        self.taps = {} if head is None else head.taps

    def forward(self, step: Step) -> Tensor:
        z, y = step[self.s].logits if self.head is None else self.head(step), step.batch["y"]
        if not self.per_step:
            return F.cross_entropy(rate(z), y)
        weight = 1.0 if self.weights is None else self.weights(len(z))[1]
        return (weight * step_losses(z, y, self.lam, self.phi)).mean()


class Alignment(nn.Module):
    """One tap of two passes drawn together: (1/T) sum_t sigmoid(eta_t) (1 - CKA(V[t], V'[t])). Both get gradients."""

    def __init__(self, tap: str, weights: StepWeights, passes: tuple[str, str] = ("source", "student")):
        super().__init__()
        self.tap, self.weights, self.passes = tap, weights, passes
        self.taps = {name: [tap] for name in passes}

    def forward(self, step: Step) -> Tensor:
        one, other = (step[name].taps[self.tap] for name in self.passes)
        return (self.weights(len(other))[0] * (1 - linear_cka(one, other))).mean()
