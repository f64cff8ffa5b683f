"""LaSNN: a trained ANN teaches a spiking network at several depths, by maps of where its features are large.

    Q_j     = sum_c |A_j[c, h, w]|^power          A_s = mean_t F_s[t], A_t = F_t; flattened over h, w
    Q^_j    = Q_j / max( |Q_j|_2, 1e-12 )
    L_layer = sum_j (1/B) sum_b mean_{h,w} ( Q^_j,s - Q^_j,t )^2                  no gradient to the teacher
    L       = CE( mean_t z[t], y ) + weight L_layer + soft tau^2 KL( softmax(z_t / tau) || softmax(mean_t z[t] / tau) )
    "mse"     sum_j (1/B) sum_{b,c,h,w} ( A_j(mean_t F_s[t]) - F_t )^2 in place of L_layer      A: conv1x1, or nothing

Reference: Hong, Shen, Qi, Wang 2023, https://arxiv.org/abs/2304.09101 (the abstract). The maps are those of Zagoruyko
and Komodakis, https://arxiv.org/abs/1612.03928, sec. 3.1. "mse" is what the code of https://arxiv.org/abs/2407.09083
runs under this paper's name; its convolutions are not trained, these are.
Evidence: partly
Read: layer-wise teaching, by attention maps, across architectures, in three stages (teacher, conversion, distillation).
The power, the norm, the layers, the coefficients and the soft labels are the usual ones or ours.
A map is divided by its length, so the scale of a feature, the number of its channels, and a sum in place of the mean
over time change nothing. "attention" is a mean over h, w and the batch and a sum over layers; a weight on the sum over
h, w is weight / (H W). "mse" is a sum over a sample and a mean over the batch, so its weight depends on the size n of a
feature: weight * n is that on the mean square. KL is summed over classes and averaged over the batch.
Differs from the paper: the student starts as it is given; converting an ANN into it first is left to the caller.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass, Step
from spikedistill.functional import idle, matched, paired, wide
from spikedistill.objectives import CE, KD
from spikedistill.spec import Count, NonNegative, Positive


def attention_map(x: Tensor, power: int = 2) -> Tensor:  # [B, C, H, W] -> [B, H W]
    """Where a feature is large: energy of each position over the channels, of length 1 (0 where all is silent)."""
    return F.normalize(wide(x).abs().pow(power).sum(1).flatten(1), dim=1, eps=1e-12)


def attention_loss(student: Tensor, teacher: Tensor, power: int = 2) -> Tensor:  # [B, C_s, H, W], [B, C_t, H, W] -> []
    """Mean square difference of two attention maps."""
    return (attention_map(student, power) - attention_map(teacher.detach(), power)).square().mean()


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:  # [B, C, H, W], [B, C, H, W] -> []
    """Sum over a sample, mean over the batch."""
    return (wide(student) - wide(teacher.detach())).square().sum() / len(student)


class Attention(nn.Module):
    """`attention_loss` of pairs of taps, summed over pairs. resize: interpolate a teacher map of another size."""

    def __init__(self, taps: Sequence[str], teacher_taps: Sequence[str], power: int = 2, resize: bool = False):
        super().__init__()
        self.taps = {"student": [*taps], "teacher": [*teacher_taps]}
        self.power, self.resize = power, resize

    def forward(self, step: Step) -> Tensor:
        losses = []
        for s, t in zip(*self.taps.values()):
            x = rate(step.student.taps[s])
            losses.append(attention_loss(x, matched(rate(step.teacher.taps[t]), x, self.resize, "lasnn"), self.power))
        return torch.stack(losses).sum()


class Stages(nn.Module):
    """`squared_error` of pairs of taps, summed over pairs. dims: channels of student and teacher, for each pair."""

    def __init__(
        self,
        taps: Sequence[str],
        teacher_taps: Sequence[str],
        dims: Sequence[tuple[int, int]],
        resize: bool = False,
    ):
        super().__init__()
        self.taps, self.resize = {"student": [*taps], "teacher": [*teacher_taps]}, resize
        self.adapt = nn.ModuleList(nn.Conv2d(s, t, kernel_size=1) if s != t else nn.Identity() for s, t in dims)

    def forward(self, step: Step) -> Tensor:
        losses = []
        for s, t, adapt in zip(*self.taps.values(), self.adapt):
            x = adapt(rate(step.student.taps[s]))
            losses.append(squared_error(x, matched(rate(step.teacher.taps[t]), x, self.resize, "lasnn")))
        return torch.stack(losses).sum()


def lasnn(
    student: nn.Module,
    teacher: nn.Module,
    *,
    variant: Literal["attention", "mse"] = "attention",
    taps: Sequence[str] = (),
    teacher_taps: Sequence[str] = (),
    weight: NonNegative | None = None,
    power: Count = 2,
    soft: NonNegative = 0.0,  # ours
    tau: Positive = 4.0,  # ours
    resize: bool = False,
) -> Plan:
    """Labels, and where the teacher's features are large at every stage.

    variant: attention compares maps, mse whole features.
    taps, teacher_taps: layers to compare, pair by pair; empty for those of one name, or all in order.
    weight: of all layers, None for 1000 (attention, that of the ANN method) or 7e-5 (mse). Over a few
    epochs 1000 outweighs the labels: 100 did better in a short trial of ours.
    power: of the activations that a map sums.
    soft: weight of the teacher's softened outputs, 0 leaves them out.  tau: their temperature.
    resize: interpolate a teacher map of another height and width.
    """
    idle("lasnn", f"with variant='{variant}'", power=variant == "mse" and power != 2)
    ours, theirs, dims = paired(student, teacher, taps, teacher_taps, "lasnn")
    loss: dict = {"ce": (1.0, CE())}
    if weight is None:
        weight = 1000.0 if variant == "attention" else 7e-5
    if weight and variant == "attention":
        loss["lasnn"] = (weight, Attention(ours, theirs, power, resize))
    elif weight:
        loss["lasnn"] = (weight, Stages(ours, theirs, dims, resize))
    if soft:
        loss["kd"] = (soft, KD(tau))
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
