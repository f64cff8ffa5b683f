"""Full-range distillation (temporal-wise logits): labels, teacher and the ensemble of all steps teach every step.

    L_TWCE = (1/T) sum_t CE( z[t], y )
    L_TWKL = (1/T) sum_t tau^2 KL( softmax(z_t / tau) || softmax(z[t] / tau) )      z_t: the teacher, its time mean
    L_TWSD = (1/T) sum_t tau^2 KL( softmax(e / tau) || softmax(z[t] / tau) )
    e      = mean_t z[t]                          the paper
           = mean of the z[t] that are right      the authors' code; where no step of a sample is, 0: a uniform target
    L      = L_TWCE + alpha L_TWKL + beta L_TWSD

Reference: Yu, Zhao, Liu, Yang, Wang, Li, Wang, ICML 2025, https://arxiv.org/abs/2501.15925, temporal-wise losses.
Evidence: code
KL is summed over classes and averaged over steps and batch; neither z_t nor e gets a gradient (through the mean of all
steps none would flow in any case). With alpha = beta = 0 this is TET's cross-entropy. Without the self term the loss of
the mean of the first T' steps is at most T / T' times that of all T, which is why one training serves every T' <= T.
The paper has tau = 3 for CIFAR and CIFAR10-DVS and 1 for ImageNet.
Differs from the authors' code: alpha and beta are the README's, the scripts have 0 without flags; the number of right
steps is clamped at 1 where they add 1e-8; of events a teacher sees every frame and its logits are averaged, where
theirs sees the mean frame once. `fallback="skip"` is that of a later work of the group,
https://arxiv.org/abs/2510.06254: samples without a right step leave the self term, which is then a mean over the rest.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan, Terms
from spikedistill.core.step import Pass, Step
from spikedistill.functional import kd_per_step
from spikedistill.objectives import CE, KDPerStep, PerStep
from spikedistill.spec import NonNegative, Positive

Preset = Literal["paper", "official_code"]
Fallback = Literal["uniform", "skip"]


def ensemble_of_right(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [T, B, C], [B] or [B, C] -> [B, C], [B]
    """The mean of the steps that are right, 0 where none is, and whether any is."""
    right = z.argmax(-1) == (y if y.ndim == 1 else y.argmax(-1))  # [T, B]
    total = (right[..., None] * z).sum(0)
    return total / right.sum(0).clamp_min(1)[:, None], right.any(0)


def twsd_loss(z: Tensor, y: Tensor, tau: float, preset: Preset = "paper", fallback: Fallback = "uniform") -> Tensor:
    """Every step learns from the ensemble. [T, B, C], [B] or [B, C] -> []"""
    if preset == "paper":
        return kd_per_step(z, rate(z), tau)
    target, some = ensemble_of_right(z, y)
    if fallback == "uniform":
        return kd_per_step(z, target, tau)
    # a sample that is its own target adds nothing to value or gradient
    kept = torch.where(some[:, None], target, z)
    return kd_per_step(z, kept, tau) * len(some) / some.sum().clamp_min(1)


class TWSD(nn.Module):
    """`twsd_loss` of the student's logits."""

    def __init__(self, tau: float = 3.0, preset: Preset = "paper", fallback: Fallback = "uniform"):
        super().__init__()
        self.tau, self.preset, self.fallback = tau, preset, fallback

    def forward(self, step: Step) -> Tensor:
        return twsd_loss(step.student.logits, step.batch["y"], self.tau, self.preset, self.fallback)


def full_range_kd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    alpha: NonNegative = 0.2,
    beta: NonNegative = 0.5,
    tau: Positive = 3.0,
    preset: Preset = "paper",
    fallback: Fallback = "uniform",
) -> Plan:
    """Labels, the teacher and the student's own ensemble, at every time step.

    alpha: weight of the teacher's term.  beta: weight of the self term.
    tau: temperature of both; 1 for ImageNet in the paper.
    preset: paper takes all steps as the ensemble, official_code those that are right.
    fallback: for a sample without a right step, a uniform target or skip it; only with official_code.
    """
    loss: Terms = {"ce_per_step": (1.0, PerStep(CE()))}
    loss |= {"twkl": (alpha, KDPerStep(tau))} if alpha else {}
    loss |= {"twsd": (beta, TWSD(tau, preset, fallback))} if beta else {}
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
