"""HTA-KL, in the style of, experimental: forward and reverse KL weighted by where the student is further off.

    p = softmax(z_t / tau), q = softmax(s / tau)        s = mean_t z_s[t], or every z_s[t] (time="per_step")
    head   the fewest classes of largest p that reach delta together, the one that crosses it included; tail: the rest
    w      = g_head / (g_head + g_tail),  g = sum of |p - q| over the classes of each      for every sample; no gradient
    FKL    = sum_c p_c log( p_c / q_c ),  RKL = sum_c q_c log( q_c / p_c )
    L_HTA  = tau^2 mean_b [ w FKL + (1 - w) RKL ]
    L      = CE( mean_t z_s[t], y ) + weight L_HTA

Reference: Zhang, Zhu, Yu, Wang 2025, https://arxiv.org/abs/2504.20445, abstract; the construction is that of adaptive
KL, Wu et al. 2024, https://arxiv.org/abs/2404.02657.
Evidence: reconstruction
Experimental: this is our definition until somebody has compared it with the paper, of which only the abstract could be
read. Certain: a mask by cumulative probability, adaptive weights, both KL. Ours: the crossing class in the head
(without it the head of a sure teacher is empty and the loss silently RKL), the weights and delta (those of adaptive
KL), tau, the weight, the time mean, both KL over all classes; `scope="region"` has FKL on the head and RKL on the
tail, either of which may be negative. Sums over classes, means over the batch and, with per_step, the steps. The
teacher gets no gradient.
What to know: a head of a single class, as sure teachers have, gives w <= 0.5: the mix is even or leans to the reverse
KL. A larger tau or delta widens the head; delta > 1 takes all classes: the loss is then plain distillation.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan, Terms
from spikedistill.core.step import Pass, Step
from spikedistill.functional import wide
from spikedistill.objectives import CE
from spikedistill.spec import NonNegative, Positive

Scope = Literal["all", "region"]
Time = Literal["mean", "per_step"]


def head_of(p: Tensor, delta: float) -> Tensor:  # [B, C] -> [B, C] of bool
    """The classes that make up the first `delta` of each distribution, in the order of the classes."""
    falling, order = p.sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(-1) - falling
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before < delta)


def hta_kl_loss(
    student: Tensor,
    teacher: Tensor,
    tau: float = 2.0,
    delta: float = 0.5,
    scope: Scope = "all",
    weight_grad: bool = False,
) -> Tensor:  # [B, C], [B, C] -> []
    """tau^2 times the mixture of both KL, mean over the batch."""
    log_p, log_q = F.log_softmax(wide(teacher.detach()) / tau, -1), F.log_softmax(wide(student) / tau, -1)
    p, q = log_p.exp(), log_q.exp()
    head = head_of(p, delta)
    gap = (p - q).abs()
    w = (gap * head).sum(-1) / (gap.sum(-1) + 1e-12)
    w = w if weight_grad else w.detach()
    forward, reverse = p * (log_p - log_q), q * (log_q - log_p)
    if scope == "region":
        forward, reverse = forward * head, reverse * ~head
    return tau**2 * (w * forward.sum(-1) + (1 - w) * reverse.sum(-1)).mean()


class HTAKL(nn.Module):
    """`hta_kl_loss` of the time-mean logits, or averaged over the steps, with the time-mean teacher."""

    def __init__(
        self,
        tau: float = 2.0,
        delta: float = 0.5,
        time: Time = "mean",
        scope: Scope = "all",
        weight_grad: bool = False,
    ):
        super().__init__()
        self.tau, self.delta, self.time, self.scope, self.weight_grad = tau, delta, time, scope, weight_grad

    def forward(self, step: Step) -> Tensor:
        s, v = step.student.logits, rate(step.teacher.logits)
        s = s.mean(0, keepdim=True) if self.time == "mean" else s
        v = v.expand_as(s).flatten(0, 1)
        return hta_kl_loss(s.flatten(0, 1), v, self.tau, self.delta, self.scope, self.weight_grad)


def hta_kl(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: NonNegative = 1.0,  # ours
    tau: Positive = 2.0,  # ours
    delta: Positive = 0.5,  # ours
    time: Time = "mean",  # ours
    scope: Scope = "all",  # ours
    weight_grad: bool = False,  # ours
) -> Plan:
    """Labels, and both KL, weighted by the student's error on the teacher's head and tail classes.

    weight: of the distillation term.  tau: temperature.
    delta: probability that the head classes hold together; above 1 for all classes.
    time: compare the mean of the steps, or per_step every step.
    scope: both KL over all classes, or by region the forward one on the head and the reverse one on the tail.
    weight_grad: let the gradient through the weights of the two.
    """
    loss: Terms = {"ce": (1.0, CE())}
    if weight:
        loss["hta_kl"] = (weight, HTAKL(tau, delta, time, scope, weight_grad))
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
