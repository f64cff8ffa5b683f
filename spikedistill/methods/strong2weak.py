"""Strong2Weak: the most confident time step teaches the least confident one, or the reverse, without a teacher.

    con[t] = mean_b max_c softmax(z[t, b])_c                       over the whole batch, temperature 1
    ts, tw = argmax con, argmin con                                one pair of steps a batch
    KL_tau(a || b) = mean_b KL( softmax(a / tau) || softmax(b / tau) )
    L_S2W  = KL_tau( z[ts] || z[tw] )       L_W2S = KL_tau( z[tw] || z[ts] )       variant "plain"
    L      = CE( mean_t z[t], y ) + s2w L_S2W + w2s L_W2S          both positive: simultaneous
    cascade            steps by falling con: mean over neighbours, each teaches the next (W2S: by rising con)
    ensemble_teacher   the mean of the other steps' logits teaches tw (W2S: ts)
    ensemble_student   ts (W2S: tw) teaches the mean of the other steps' logits

Reference: Ding, Zuo, Jing, Yang, He, Xie, NeurIPS 2025, https://arxiv.org/abs/2510.07924, sec. 4 and its algorithms.
Evidence: paper text
KL is summed over classes and averaged over the batch. The paper's tau (its alpha) is 2 and its weight (its lambda) 1;
QKFormer wants 0.01. Whether tau^2 belongs to the KL is not stated and its pseudo-code has none: none here, or
`scale_tau2=True`, where the weight w acts as w tau^2 does without. With one step the loss is 0, and with "plain" also
where ts = tw.
Differs from the paper: the teaching step gets no gradient, as elsewhere in distillation; its pseudo-code stops none
(`detach_teacher=False`). The default is the cascade, on events its best; `variant="plain"` is its basic form. With
several processes con is averaged over them, so that all choose the same steps.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.plan import Plan, Terms
from spikedistill.core.step import Pass, Step
from spikedistill.objectives import CE
from spikedistill.spec import NonNegative, Positive

Variant = Literal["plain", "cascade", "ensemble_teacher", "ensemble_student"]
Direction = Literal["s2w", "w2s"]


def confidence(z: Tensor) -> Tensor:  # [T, B, C] -> [T]
    """The mean probability of the class that each step prefers, over the batch and, in training, all processes."""
    con = F.softmax(z.detach(), -1).amax(-1).mean(1)
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        dist.all_reduce(con)
        con = con / dist.get_world_size()
    return con


def pairs(z: Tensor, con: Tensor, direction: Direction, variant: Variant) -> tuple[Tensor, Tensor]:
    """Who teaches whom: [T, B, C], [T] -> teachers and students, both [N, B, C]. Needs T > 1."""
    strong, weak = con.argmax(0, keepdim=True), con.argmin(0, keepdim=True)
    source, target = (strong, weak) if direction == "s2w" else (weak, strong)
    if variant == "cascade":
        ranked = z[con.argsort(descending=direction == "s2w")]
        return ranked[:-1], ranked[1:]
    if variant == "ensemble_teacher":
        return (z.sum(0) - z[target]) / (len(z) - 1), z[target]
    if variant == "ensemble_student":
        return z[source], (z.sum(0) - z[source]) / (len(z) - 1)
    return z[source], z[target]


def strong2weak_loss(
    z: Tensor,
    tau: float = 2.0,
    direction: Direction = "s2w",
    variant: Variant = "plain",
    detach_teacher: bool = True,
    scale_tau2: bool = False,
) -> Tensor:  # [T, B, C] -> []
    """KL from the teaching to the taught steps, mean over pairs and batch; 0 for a single step."""
    if len(z) == 1:
        return 0.0 * z.sum()
    teachers, students = pairs(z, confidence(z), direction, variant)
    teachers = teachers.detach() if detach_teacher else teachers
    log_t, log_s = (F.log_softmax(x.flatten(0, 1) / tau, -1) for x in (teachers, students))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * (tau**2 if scale_tau2 else 1.0)


class Strong2Weak(nn.Module):
    """`strong2weak_loss` of the student's logits."""

    def __init__(
        self,
        tau: float = 2.0,
        direction: Direction = "s2w",
        variant: Variant = "plain",
        detach_teacher: bool = True,
        scale_tau2: bool = False,
    ):
        super().__init__()
        self.tau, self.direction, self.variant = tau, direction, variant
        self.detach_teacher, self.scale_tau2 = detach_teacher, scale_tau2

    def forward(self, step: Step) -> Tensor:
        how = (self.tau, self.direction, self.variant, self.detach_teacher, self.scale_tau2)
        return strong2weak_loss(step.student.logits, *how)


def strong2weak(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    s2w: NonNegative = 1.0,
    w2s: NonNegative = 0.0,
    tau: Positive = 2.0,
    variant: Variant = "cascade",  # ours
    detach_teacher: bool = True,  # ours
    scale_tau2: bool = False,
) -> Plan:
    """Labels, and what confident and unconfident time steps learn from each other.

    s2w: weight of strong teaches weak.  w2s: weight of weak teaches strong.
    tau: temperature.
    variant: plain for the two extreme steps, cascade for neighbours by confidence, or the mean of the other steps as
    teacher or student of the extreme one.
    detach_teacher: no gradient to the teaching step.  scale_tau2: multiply the KL by the square of the temperature.
    """
    loss: Terms = {"ce": (1.0, CE())}
    directions: tuple[tuple[Direction, float], ...] = (("s2w", s2w), ("w2s", w2s))
    for direction, weight in directions:
        if weight:
            loss[direction] = (weight, Strong2Weak(tau, direction, variant, detach_teacher, scale_tau2))
    return Plan({"student": Pass(student, grad=True)}, loss)
