"""The objectives that methods build on. Each reads passes by name and returns a scalar, a mean over the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.schedule import Schedule, at
from spikedistill.core.step import Objective, Step
from spikedistill.core.taps import published
from spikedistill.functional import classes_of, idle, kd_loss, kd_per_step, linear_cka, step_losses, wide


def over_time(z: Tensor, counts: bool) -> Tensor:  # [T, B, C] -> [B, C]
    """The mean over time, or the sum, which is the number of spikes of outputs that are spikes."""
    return wide(z).sum(0) if counts else rate(z)


class CE(nn.Module):
    """Cross-entropy of the time-mean logits with batch["y"]: labels [B] or distributions [B, C].

    counts: of their sum over time instead, for heads that spike: rates in [0, 1] could not tell classes apart.
    """

    def __init__(self, student: str = "student", label_smoothing: float = 0.0, counts: bool = False):
        super().__init__()
        self.s, self.label_smoothing, self.counts = student, label_smoothing, counts

    def forward(self, step: Step) -> Tensor:
        z = over_time(step[self.s].logits, self.counts)
        return F.cross_entropy(z, step.batch["y"], label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        usual = {"student": "student", "label_smoothing": 0.0, "counts": False}
        values = zip(usual.items(), (self.s, self.label_smoothing, self.counts))
        return ", ".join(f"{name}={value}" for (name, default), value in values if value != default)


class KD(nn.Module):
    """`kd_loss` of time-mean logits. tau: temperature, a number or a schedule.  counts: of sums over time, as in CE."""

    def __init__(
        self, tau: float | Schedule = 4.0, student: str = "student", teacher: str = "teacher", counts: bool = False
    ):
        super().__init__()
        self.tau, self.s, self.t, self.counts = tau, student, teacher, counts

    def forward(self, step: Step) -> Tensor:
        z, target = (over_time(step[name].logits, self.counts) for name in (self.s, self.t))
        return kd_loss(z, target, at(self.tau, step.progress))

    def extra_repr(self) -> str:
        tau = f"tau={self.tau if isinstance(self.tau, int | float) else 'a schedule'}"
        return f"{tau}, counts=True" if self.counts else tau


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


def static_head(student: nn.Module, shared: bool, tap: str, grid: int, classes: int | None, who: str) -> Head | None:
    """A head of pass "source"; None where that uses the student's. SpecError for settings of one that is not there."""
    if shared:
        idle(who, "with shared_head", tap=bool(tap), grid=grid != 1, classes=classes is not None)
        return None
    tap, channels = published(student, tap, "student")
    return Head(tap, channels, classes_of(student, classes, who), grid, "source")


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
    """One tap of two passes drawn together: (1/T) sum_t sigmoid(eta_t) (1 - CKA(V[t], V'[t])). Both get gradients.

    pool: average the tap, [T, B, C, H, W], over space before. Raises ValueError for one of another shape.
    """

    def __init__(
        self, tap: str, weights: StepWeights, pool: bool = False, passes: tuple[str, str] = ("source", "student")
    ):
        super().__init__()
        self.tap, self.weights, self.pool, self.passes = tap, weights, pool, passes
        self.taps = {name: [tap] for name in passes}

    def forward(self, step: Step) -> Tensor:
        one, other = (step[name].taps[self.tap] for name in self.passes)
        if self.pool:
            if one.ndim != 5:
                raise ValueError(f"pool: '{self.tap}' has shape {list(one.shape)}, no height and width to average over")
            one, other = (wide(x).mean((-2, -1)) for x in (one, other))
        return (self.weights(len(other))[0] * (1 - linear_cka(one, other))).mean()
