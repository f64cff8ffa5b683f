"""TKS: the time steps that are right teach all the others, without a teacher.

    c[t,b] = 1 where argmax_k z[t,b] is the label, else 0
    S[b]   = sum_t c[t,b] z[t,b]                    q[b] = softmax( S[b] / tau ), a target, without gradient
    L_TKS  = tau^2 (1/T) sum_t (1/B) sum_b - sum_k q[b,k] log softmax( z[t,b] )_k
    L      = w CE( mean_t z[t], y ) + (1 - w) L_TKS           w = 1 - alpha p, p: progress in [0, 1]

Reference: Dong, Zhao, Zeng, IEEE Transactions on Artificial Intelligence 5(7), 2024, https://arxiv.org/abs/2304.06540.
Evidence: code
L_TKS is a mean over time and batch and a sum over classes, so no weight depends on their number. As in the authors'
code: S is a sum, so the mean of n right steps has temperature tau / n; the student's side is not softened, although
tau^2 is there; a sample that no step gets right has S = 0 and so a uniform q, mild only while w is near 1.
At the end that uniform q weighs alpha tau^2 = 6.3 against 0.3 of the label. A training of a few epochs ends with many
such samples: on_all_wrong="one_hot" or a smaller alpha did better there in a short trial of ours.
`target`, `soften_student` and `on_all_wrong` give the alternatives. Soft labels count as their largest class.
Differs from the authors' code: the target gets no gradient (detach_target=False gives theirs), and w moves with every
update, where theirs keeps it over an epoch. Which of the two the paper's equations mean was not checked.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.plan import Plan
from spikedistill.core.schedule import linear
from spikedistill.core.step import Pass, Step
from spikedistill.objectives import CE
from spikedistill.spec import Positive, Share

Target = Literal["sum", "mean"]
AllWrong = Literal["uniform", "one_hot", "skip"]


def right_steps(z: Tensor, y: Tensor) -> Tensor:  # [T, B, C], [B] -> [T, B, 1]
    """1 where a step classifies its sample correctly, else 0."""
    return (z.argmax(-1) == y).unsqueeze(-1).to(z.dtype)


def tks_loss(
    z: Tensor,
    y: Tensor,
    tau: float = 3.0,
    target: Target = "sum",
    on_all_wrong: AllWrong = "uniform",
    soften_student: bool = False,
    detach_target: bool = True,
) -> Tensor:  # [T, B, C], [B] or [B, C] -> []
    """tau^2 cross-entropy of every step with what the right steps say together."""
    y = y if y.ndim == 1 else y.argmax(-1)
    right = right_steps(z, y)
    count = right.sum(0)  # [B, 1]
    shared = (right * z).sum(0)
    if target == "mean":
        shared = shared / count.clamp_min(1)
    q = F.softmax((shared.detach() if detach_target else shared) / tau, -1)
    if on_all_wrong == "one_hot":
        q = torch.where(count > 0, q, F.one_hot(y, z.shape[-1]).to(q.dtype))
    elif on_all_wrong == "skip":
        q = q * (count > 0)
    return tau**2 * -(q * F.log_softmax(z / tau if soften_student else z, -1)).sum(-1).mean()


class TKS(nn.Module):
    """`tks_loss` of the student. Its keyword arguments are those of the function."""

    def __init__(self, **how):
        super().__init__()
        self.how = how

    def forward(self, step: Step) -> Tensor:
        return tks_loss(step.student.logits, step.batch["y"], **self.how)


def tks(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    tau: Positive = 3.0,
    alpha: Share = 0.7,
    static: bool = False,
    target: Target = "sum",
    on_all_wrong: AllWrong = "uniform",
    soften_student: bool = False,
    detach_target: bool = True,
) -> Plan:
    """Labels, and what the time steps that are right say together, for each step.

    tau: temperature of the target.
    alpha: share of the target at the end of training, from 0 at its start; the labels get the rest.
    static: alpha is the share of the labels instead, throughout; then on_all_wrong='one_hot' is advised.
    target: sum of the right steps, or their mean.
    on_all_wrong: uniform, one_hot or skip, the target of a sample that no step gets right.
    soften_student: divide the student's logits by tau as well.
    detach_target: no gradient through the target, False as in the authors' code.
    """
    how = dict(tau=tau, target=target, on_all_wrong=on_all_wrong)
    term = TKS(**how, soften_student=soften_student, detach_target=detach_target)
    labels, shared = (alpha, 1 - alpha) if static else (linear(1.0, 1 - alpha), linear(0.0, alpha))
    return Plan({"student": Pass(student, grad=True)}, {"ce": (labels, CE()), "tks": (shared, term)})
