"""Temporal-spatial self-distillation (TSSD): a longer run of the network and its own output teach it; no teacher.

    o(t), t <= T_s      logits of the run that will be used; o'(t), t <= T_t, of a longer run of the same weights
    w(t), t <= T_s      logits of a weak classifier on an intermediate map, in training only
    L_t  = tau^2 (1/B) sum_b KL( softmax(mean_{t <= T_t} o'(t) / tau) || softmax(mean_{t <= T_s} o(t) / tau) )
    L_s  = tau^2 (1/T_s) sum_t (1/B) sum_b KL( softmax(o(t) / tau) || softmax(w(t) / tau) )
    L    = CE( mean_{t <= T_s} o(t), y ) + alpha L_t + beta L_s           no gradient to o' and, in L_s, to o

Reference: Zuo, Ding, Jing, Yang, Yu 2024, https://arxiv.org/abs/2406.07862.
Evidence: partly: abstract and summaries; the divergence, T_t, all weights, tau and the weak classifier are ours.
KL is summed over classes and averaged over the batch (and steps, and weak classifiers); tau^2 can be left out.
The longer run is a pass of its own in evaluation mode, without a graph: its steps neither enter the batch statistics of
the first T_s nor move the running ones, and validation is on T_s steps as in use. In evaluation mode both agree on T_s.
Frames [N, B, ...] of events: the student sees all, or the first T_s where `steps` says so, the longer run T_t, from the
start again where N is less.
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.step import Batch, Objective, Pass, Step
from spikedistill.core.taps import published
from spikedistill.functional import classes_of, kd_loss, wide
from spikedistill.neurons import Neuron
from spikedistill.objectives import CE, Head
from spikedistill.spec import Count, NonNegative, Positive, SpecError


def temporal_loss(short: Tensor, long: Tensor, tau: float = 2.0) -> Tensor:  # [T_s, B, C], [T_t, B, C] -> []
    """L_t: `kd_loss` of the means over time."""
    return kd_loss(rate(short), rate(long), tau)


def spatial_loss(weak: Tensor, final: Tensor, tau: float = 2.0, target: str = "step") -> Tensor:  # 2 x [T, B, C] -> []
    """L_s: `kd_loss` of every step with the final logits of that step, or with their mean over time."""
    final = rate(final).expand_as(weak) if target == "mean" else final
    return torch.stack([kd_loss(w, o, tau) for w, o in zip(weak, final, strict=True)]).mean()


def lengthened(batch: Batch, short: int | None = None, long: int | None = None) -> Batch:
    """The batch with the first `short` frames as "x" and `long` of them, from the start again at the end, as "long".

    None for all frames, and for twice as many as "x" has. Raises ValueError where "long" would be the shorter one.
    """
    x = batch["x"]
    if x.ndim == 4:
        return batch | {"long": x}
    seen = x[:short]
    long = long or 2 * len(seen)
    if long < len(seen):
        raise ValueError(f"tssd.long: {long} will not do: it should be at least the {len(seen)} frames of the student")
    return batch | {"x": seen, "long": x[torch.arange(long, device=x.device) % len(x)]}


class WeakConv(Head):
    """A weak classifier with a layer of its own: 3x3 convolution of stride 2, norm, neuron, average, linear."""

    def __init__(self, tap: str, channels: int, classes: int, neuron: nn.Module):
        super().__init__(tap, channels, classes)
        self.conv = nn.Conv2d(channels, channels, 3, 2, 1, bias=False)
        self.norm, self.neuron = nn.BatchNorm2d(channels), neuron

    def forward(self, step: Step) -> Tensor:
        x = step[self.s].taps[self.tap]
        x = self.neuron(self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))
        return wide(self.linear(x.mean((-2, -1))))


class Temporal(nn.Module):
    """`temporal_loss` of the student's run and of the longer one."""

    def __init__(self, tau: float = 2.0):
        super().__init__()
        self.tau = tau

    def forward(self, step: Step) -> Tensor:
        return temporal_loss(step.student.logits, step["long"].logits, self.tau)


class Spatial(nn.Module):
    """`spatial_loss` of the weak classifiers, averaged over them."""

    def __init__(self, heads: Sequence[Head], tau: float = 2.0, target: str = "step"):
        super().__init__()
        self.heads, self.tau, self.target = nn.ModuleList(heads), tau, target
        self.taps = {"student": [tap for head in heads for tap in head.taps["student"]]}

    def forward(self, step: Step) -> Tensor:
        final = step.student.logits
        return torch.stack([spatial_loss(head(step), final, self.tau, self.target) for head in self.heads]).mean()


class WeakLabels(nn.Module):
    """Cross-entropy of the weak classifiers' time means, averaged over them."""

    def __init__(self, heads: Sequence[Head]):
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.taps = {"student": [tap for head in heads for tap in head.taps["student"]]}

    def forward(self, step: Step) -> Tensor:
        y = step.batch["y"]
        return torch.stack([nn.functional.cross_entropy(rate(head(step)), y) for head in self.heads]).mean()


def tssd(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    alpha: NonNegative = 1.0,  # ours, as all below
    beta: NonNegative = 1.0,
    tau: Positive = 2.0,
    scale_tau2: bool = True,
    steps: Count | None = None,
    long: Count | None = None,
    taps: Sequence[str] = (),
    weak: Literal["pooled", "conv"] = "pooled",
    weak_ce: NonNegative = 0.0,
    target: Literal["step", "mean"] = "step",
    classes: Count | None = None,
) -> Plan:
    """Labels, a longer run of the student, and weak classifiers inside it that follow its output; needs no teacher.

    alpha: weight of the longer run.  beta: weight of the weak classifiers.  tau: temperature of both.
    scale_tau2: multiply both by tau^2, which keeps their gradients independent of tau.
    steps: T_s, None for the student's own, which all frames of a recording have to be.  long: T_t, None for twice T_s.
    taps: maps with a weak classifier; empty for the one at half depth.
    weak: classify the average of the map, or that of one more convolution with norm and neuron.
    weak_ce: weight of the labels for the weak classifiers.
    target: what a weak classifier follows at each step: the output of that step, or the mean over steps.
    classes: None for the outputs of the student's last linear layer.
    """
    short: int | None = steps or getattr(student, "steps", None)
    long = long or (2 * short if short else None)
    if short and long and long < short:
        raise SpecError([f"tssd.long: {long} will not do: it should be at least the {short} steps of the student"])

    def prepare(batch: Batch, progress: float) -> Batch:
        if short is None and batch["x"].ndim == 4:
            raise SpecError([f"tssd.steps: {type(student).__name__} does not say how many an image takes: set it"])
        if steps is None and short and batch["x"].ndim == 5 and len(batch["x"]) != short:
            frames = f"samples have {len(batch['x'])} frames, the student {short} steps"
            raise SpecError([f"tssd.steps: {frames}: say how many it is to see, and `long` with it"])
        return lengthened(batch, steps, long)

    names = [*getattr(student, "dims", {})]
    chosen = [published(student, tap, "student") for tap in taps or names[(len(names) - 1) // 2 :][:1] or [""]]
    outputs, neuron = classes_of(student, classes, "tssd"), [m for m in student.modules() if isinstance(m, Neuron)]
    if weak == "conv" and not neuron:
        raise SpecError([f"tssd.weak: {type(student).__name__} has no spiking neuron for the weak classifier to copy"])
    scale = 1.0 if scale_tau2 else tau**-2
    passes = {"student": Pass(student, steps=steps, grad=True)}
    loss: dict[str, tuple[float, Objective]] = {"ce": (1.0, CE())}
    if alpha:
        passes["long"] = Pass(student, x="long", steps=long)
        loss["tssd_time"] = (alpha * scale, Temporal(tau))
    if beta or weak_ce:
        made = [(tap, c, outputs) for tap, c in chosen]
        heads = [Head(*m) if weak == "pooled" else WeakConv(*m, copy.deepcopy(neuron[0])) for m in made]
        loss["tssd_space"] = (beta * scale, Spatial(heads, tau, target))
        loss["tssd_weak"] = (weak_ce, WeakLabels(heads))
    return Plan(passes, {k: v for k, v in loss.items() if v[0]}, prepare)
