"""Formulas that two or more methods use: pure functions of tensors, means over the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32, so that sums of bf16 features are exact enough."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kd_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:  # [B, C], [B, C] -> []
    """tau^2 KL(softmax(t / tau) || softmax(s / tau)), mean over the batch; the teacher gets no gradient.

    Hinton, Vinyals, Dean 2015, arXiv:1503.02531, sec. 2.
    """
    log_s = F.log_softmax(student / tau, -1)
    log_t = F.log_softmax(teacher.detach() / tau, -1)
    return tau**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:  # [B, C], [B] or [B, C] -> [B]
    """-sum_k y_k log softmax(z)_k for each sample. Labels [B] and their one-hot rows [B, C] give the same value."""
    return F.cross_entropy(logits, target, reduction="none")
