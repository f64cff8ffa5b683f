"""TSER: the label and the teacher at every time step, and a reward for the student's uncertainty.

    L_TSCE = (1/T) sum_t CE(z[t], y)
    L_TSKL = tau^2 (1/T) sum_t KL( Q || P[t] )      Q = softmax(z_t / tau)   P[t] = softmax(z[t] / tau)
    L_ER   = (1/T) sum_t H( P[t] )                  H(P) = - sum_k P_k log P_k
    L      = (1 - alpha) L_TSCE + alpha L_TSKL - gamma L_ER

Reference: Yu, Yu, Zhang, Zhao, Yang, Wang, Zhang, Xu, CVPR 2025, https://arxiv.org/abs/2503.03144.
Evidence: partly
The formulas are those of two independent implementations, since the authors' code could not be read; alpha, tau and
gamma (the paper's lambda) are ours. KL and H are sums over classes, and everything is a mean over time and batch, so
the weights depend on neither; code that uses torch's default "mean" divides KL by the number of classes C as well, its
kd_weight w is w / C here. The entropy is the student's and is taken away, so a teacher that is sure and wrong is copied
less. L can be negative, but never below -gamma log C. The entropy is softened by tau unless told otherwise, the label
term is not. A spiking teacher is averaged over time first.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass, Step
from spikedistill.objectives import CE, KDPerStep, PerStep
from spikedistill.spec import NonNegative, Positive, Share


def entropy(z: Tensor, tau: float) -> Tensor:  # [T, B, C] -> []
    """Mean entropy of the softened outputs, in nats."""
    log_p = F.log_softmax(z / tau, -1)
    return -(log_p.exp() * log_p).sum(-1).mean()


class Entropy(nn.Module):
    """`entropy` of the student."""

    def __init__(self, tau: float = 3.0):
        super().__init__()
        self.tau = tau

    def forward(self, step: Step) -> Tensor:
        return entropy(step.student.logits, self.tau)


def tser(
    student: nn.Module,
    teacher: nn.Module,
    *,
    tau: Positive = 3.0,  # ours
    alpha: Share = 0.5,  # ours
    gamma: NonNegative = 0.1,  # ours
    ce_weight: NonNegative | None = None,
    kd_weight: NonNegative | None = None,
    entropy_tau: Positive | None = None,
) -> Plan:
    """Labels and teacher at every time step, less the student's entropy.

    tau: temperature; the paper found 2 to 6 alike.  alpha: share of the teacher, the labels get the rest.
    gamma: weight of the entropy, 0 leaves it out; large values make all outputs alike.
    ce_weight: of the labels, None for 1 - alpha.  kd_weight: of the teacher, None for alpha.
    entropy_tau: temperature of the entropy, None for tau.
    """
    loss: dict = {
        "ce_per_step": (1 - alpha if ce_weight is None else ce_weight, PerStep(CE())),
        "tser": (alpha if kd_weight is None else kd_weight, KDPerStep(tau)),
    }
    if gamma:
        loss["entropy"] = (-gamma, Entropy(entropy_tau or tau))
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
