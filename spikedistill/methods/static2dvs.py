"""Static to event transfer: one network on event clips and static images, which turn into events during training.

    P(p) = p^3                          each static sample is swapped for the event sample of its pair with this chance
    d[t]  = 1 - CKA( V_s[t], V_e[t] )   membrane potentials of both streams, post reset, in one batch
    l[t]  = (1 - lam) CE(z[t], y) + lam mean( (z[t] - phi)^2 )                     TET, for static and event stream
    L_s   = (1/T) sum_t l_s[t]                                                     own head h_s, in training only
    L_e   = (1/T) sum_t (1 - sigmoid(eta_t)) l_e[t]                                the student's own head
    L_da  = (1/T) sum_t sigmoid(eta_t) d[t]
    L     = L_s + L_e + align L_da      no teacher; eta_t is learned from 1; no gradient is stopped

Reference: He, Zhao, Li, Shen, Kong, Zeng, AAAI 2024, https://arxiv.org/abs/2303.13077.
Evidence: code
CE is a mean over the batch. CKA is one number a batch, that of each device where there are several; it does not depend
on the size of a feature, and a batch of one sample gives none (d = 1). While l_e[t] > align d[t], eta_t rises and takes
weight from the labels. A batch has "x", events [T, B, C, H, W], and "source", for each of them a static image of its
class, [B, C', H, W]. Images of other channels than the events enter as V = max over RGB, repeated over channels and T.
Differs from the authors' code: BatchNorm takes its statistics over T and B of a stream at once, not step by step (its
running ones mix both streams in either); with sliding=False the code also leaves L_da out, which is align=0 here.
The static head sees the last map averaged to grid x grid; the authors' VGG-SNN is grid=3, their ResNet grid=1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.schedule import Schedule, power
from spikedistill.core.step import Batch, Pass, Step
from spikedistill.core.taps import TapError, published
from spikedistill.functional import classes_of, linear_cka, replaced, step_losses
from spikedistill.neurons import Neuron
from spikedistill.spec import Count, NonNegative, Positive, Share


def domain_loss(static: Tensor, event: Tensor, weight: Tensor | float = 1.0) -> Tensor:  # 2 x [T, B, ...], [T] -> []
    """L_da of the features of both streams, with sigmoid(eta) as weight of each step."""
    return (weight * (1 - linear_cka(static, event))).mean()


def replace_source(batch: Batch, share: float) -> Batch:
    """The batch with samples of "source" swapped for those of "x", "swapped" [B] says which."""
    source, swapped = replaced(batch["source"], batch["x"], share)
    return batch | {"source": source, "swapped": swapped}


def potential(model: nn.Module, tap: str, who: str) -> str:
    """`tap`, or where it is empty the membrane potentials of the last spiking layer before the classifier."""
    neurons = [name for name, m in model.named_modules() if isinstance(m, Neuron)]
    last = next(reversed(getattr(model, "dims", {})), "")
    inside = [name for name in neurons if name == last or name.startswith(f"{last}.")] or neurons
    if not (tap or inside):
        raise TapError(f"{who}: {type(model).__name__} has no spiking neurons to take potentials from")
    return tap or f"{inside[-1]}.v"


class Weights(nn.Module):
    """eta, one number a time step, from 1: shared by the alignment and the event term. All weights 1 if not learned."""

    def __init__(self, steps: int, learned: bool = True):
        super().__init__()
        self.eta = nn.Parameter(torch.ones(steps)) if learned else None

    def forward(self, steps: int) -> tuple[Tensor | float, Tensor | float]:  # -> [T], [T]
        """Weights of the alignment and of the event term."""
        if self.eta is None:
            return 1.0, 1.0
        if steps != len(self.eta):
            raise ValueError(f"static2dvs: the events have {steps} time steps, the weights {len(self.eta)}: set steps=")
        share = torch.sigmoid(self.eta)
        return share, 1 - share


class Static(nn.Module):
    """L_s through a head of its own; through the student's where `tap` is empty."""

    def __init__(self, tap: str, channels: int, classes: int, lam: float, phi: float, grid: int, per_step: bool):
        super().__init__()
        self.tap, self.lam, self.phi, self.grid, self.per_step = tap, lam, phi, grid, per_step
        self.taps = {"source": [tap]} if tap else {}
        self.head = nn.Linear(channels * grid**2, classes) if tap else None

    def logits(self, step: Step) -> Tensor:  # -> [T, B, C]
        out = step["source"]
        if self.head is None:
            return out.logits
        x = out.taps[self.tap]
        x = F.adaptive_avg_pool2d(x.flatten(0, 1), self.grid).unflatten(0, x.shape[:2])
        return self.head(x.flatten(2))

    def forward(self, step: Step) -> Tensor:
        z, y = self.logits(step), step.batch["y"]
        return step_losses(z, y, self.lam, self.phi).mean() if self.per_step else F.cross_entropy(rate(z), y)


class Event(nn.Module):
    """L_e of the student's logits."""

    def __init__(self, weights: Weights, lam: float, phi: float, per_step: bool):
        super().__init__()
        self.weights, self.lam, self.phi, self.per_step = weights, lam, phi, per_step

    def forward(self, step: Step) -> Tensor:
        z, y = step.student.logits, step.batch["y"]
        if not self.per_step:
            return F.cross_entropy(rate(z), y)
        return (self.weights(len(z))[1] * step_losses(z, y, self.lam, self.phi)).mean()


class Align(nn.Module):
    """L_da between one tap of both streams."""

    def __init__(self, tap: str, weights: Weights):
        super().__init__()
        self.tap, self.weights = tap, weights
        self.taps = {"source": [tap], "student": [tap]}

    def forward(self, step: Step) -> Tensor:
        static, event = step["source"].taps[self.tap], step.student.taps[self.tap]
        return domain_loss(static, event, self.weights(len(event))[0])


def static2dvs(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    align: NonNegative = 0.5,
    exponent: Positive = 3.0,
    sliding: bool = True,
    regularise: bool = True,
    per_step: bool = True,
    lam: Share = 1e-3,
    phi: float = 0.5,
    steps: Count | None = None,
    feature: str = "",
    tap: str = "",
    grid: Count = 1,
    shared_head: bool = False,
    classes: Count | None = None,
) -> Plan:
    """Train on events with the help of static images of the same classes; needs no teacher.

    align: weight of the alignment of the two streams.
    exponent: of the chance that a static sample is replaced, as progress grows.
    sliding: False replaces none in the first half of training and all in the second.
    regularise: learned weights of the time steps; False has 1 everywhere.
    per_step: labels at every step; False compares the time mean, and the weights then serve the alignment only.
    lam: share of the mean-square term of the labels.  phi: what it draws the logits to, the authors' firing threshold.
    steps: time steps of the events, None for those of the student.
    feature: tap to align; empty for the potentials of the last spiking layer, "stage3.0.neuron" takes spikes.
    tap: map under the static head; empty for the last one.  grid: height and width to which that head averages it.
    shared_head: classify static images with the student's own head.
    classes: None for the outputs of the student's last linear layer.
    """
    chance: Schedule = power(exponent) if sliding else lambda p: float(p >= 0.5)
    feature = potential(student, feature, "static2dvs")
    weights = Weights(steps or getattr(student, "steps", 1), regularise)
    at, channels = ("", 0) if shared_head else published(student, tap, "student")
    static = Static(at, channels, classes_of(student, classes, "static2dvs"), lam, phi, grid, per_step)
    return Plan(
        {"student": Pass(student, grad=True), "source": Pass(student, x="source", grad=True)},
        {
            "static2dvs_source": (1.0, static),
            "static2dvs_event": (1.0, Event(weights, lam, phi, per_step)),
            "static2dvs_align": (align, Align(feature, weights)),
        },
        prepare=lambda batch, progress: replace_source(batch, chance(progress)),
    )
