"""Temporal efficient training (TET): the label at every time step.

    L = (1 - lam) (1/T) sum_t CE(z[t], y)  +  lam mean( (z - phi)^2 )      mean over all T, B, C

Reference: Deng, Li, Zhang, Gu, ICLR 2022, https://arxiv.org/abs/2202.11946, eq. 9 to 11.
Evidence: code
The second term keeps single outputs from running away; with lam = 0 it is left out. Prediction stays the time mean.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.plan import Plan, Terms
from spikedistill.core.step import Pass, Step
from spikedistill.functional import wide
from spikedistill.objectives import CE, PerStep
from spikedistill.spec import Share


def tet_loss(z: Tensor, y: Tensor, lam: float = 0.05, phi: float = 1.0) -> Tensor:  # [T, B, C], [B] or [B, C] -> []
    """The loss of the paper as one number."""
    per_step = F.cross_entropy(wide(z).flatten(0, 1), y.expand(len(z), *y.shape).flatten(0, 1))
    return (1 - lam) * per_step + lam * spread(z, phi) if lam else per_step


def spread(z: Tensor, phi: float) -> Tensor:  # [T, B, C] -> []
    """Mean square distance of all logits to phi."""
    return (wide(z) - phi).square().mean()


class Spread(nn.Module):
    """`spread` of the student's logits."""

    def __init__(self, phi: float = 1.0):
        super().__init__()
        self.phi = phi

    def forward(self, step: Step) -> Tensor:
        return spread(step.student.logits, self.phi)


def tet(student: nn.Module, teacher: nn.Module | None = None, *, lam: Share = 0.05, phi: float = 1.0) -> Plan:
    """Train on the labels at every time step.

    lam: share of the mean-square term; the paper has 0.05 on CIFAR, 0.001 on ImageNet and CIFAR10-DVS.
    phi: what the logits are drawn to, the firing threshold in the paper.
    """
    loss: Terms = {"ce_per_step": (1 - lam, PerStep(CE()))}
    if lam:
        loss["spread"] = (lam, Spread(phi))
    return Plan({"student": Pass(student, grad=True)}, loss)
