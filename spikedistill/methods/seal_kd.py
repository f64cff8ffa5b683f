"""SeAl-KD: errors are aligned class by class before the teacher's KL, and steps learn from surer, similar steps.

    KL_tau(a || b) = tau^2 mean_b KL( softmax(a / tau) || softmax(b / tau) )
    L_CE  = (1/T) sum_t CE( z[t], y )
    ELA   for k = argmax z[t]:   k = y:   z' = z[t],                v' = z_t
                                 k != y:  z'[k] = z[t][y],          v'[k] = v'[y] = min( z_t[k], z_t[y] )
    L_ELA = (1/T) sum_t KL_tau( v'[t] || z'[t] )                    z_t: the teacher's logits, their time mean
    STA   c[t] = 1 - H( softmax(z[t]) ) / log C                     confidence, 0 .. 1
          W[i, j] = softmax over j != i of c[j] cos( z[i], z[j] ) / temperature
          g[i] = sum_j W[i, j] z[j]                                 for each sample; no gradient
    L_STA = (1/T) sum_i KL_tau( g[i] || z[i] )                      0 for T = 1
    L     = L_CE + alpha L_ELA + beta L_STA

Reference: Sun, Duan, Huang, Zhang, Smith, Gong, Kuhlmann 2026, https://arxiv.org/abs/2605.14252, ELA and STA.
Evidence: code
KL is summed over classes and averaged over steps and batch. alpha and beta are the README's for all data sets; tau is 3
throughout.
What to know: at a wrong step the copied logit passes its gradient to the true class, twice, and the wrongly preferred
one gets none. Where the teacher is sure, "min" lowers both classes to its smaller value, so L_ELA alone may push the
true class down; cross-entropy outweighs that at alpha = 0.6. With T = 2 there is one other step, so STA makes the two
steps swap targets. The cosine depends on the offset of logits, unlike the rest: `center` removes it.
Differs from the authors' code: no 1e-8 in the entropy; of events a teacher sees every frame and its logits are
averaged, where theirs sees the mean frame once. Ours: `teacher_mode` other than min, `temperature`, `center`.
"""

from math import log
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan, Terms
from spikedistill.core.step import Pass, Step
from spikedistill.functional import kd_per_step, wide
from spikedistill.objectives import CE, PerStep
from spikedistill.spec import NonNegative, Positive

TeacherMode = Literal["min", "keep", "mean"]


def align(z: Tensor, v: Tensor, y: Tensor, teacher_mode: TeacherMode = "min") -> tuple[Tensor, Tensor]:
    """z' and v' of ELA: [T, B, C], [B, C], [B] or [B, C] -> [T, B, C] twice. Where a step is right nothing changes."""
    k = z.argmax(-1, keepdim=True)  # [T, B, 1]
    y = (y if y.ndim == 1 else y.argmax(-1))[:, None].expand_as(k)
    z = z.scatter(-1, k, z.gather(-1, y))
    v = v.expand_as(z)
    if teacher_mode == "keep":
        return z, v
    a, b = v.gather(-1, k), v.gather(-1, y)
    level = torch.minimum(a, b) if teacher_mode == "min" else (a + b) / 2
    return z, v.scatter(-1, k, level).scatter(-1, y, level)


def ela_loss(z: Tensor, v: Tensor, y: Tensor, tau: float = 3.0, teacher_mode: TeacherMode = "min") -> Tensor:
    """KL at every step after `align`. [T, B, C], [B, C], [B] or [B, C] -> []"""
    return kd_per_step(*align(z, v, y, teacher_mode), tau)


def step_weights(z: Tensor, temperature: float = 1.0, center: bool = False) -> Tensor:  # [T, B, C] -> [T, T, B]
    """How much step i learns from step j: [i, j, b], rows of sum 1 with 0 on the diagonal. Needs T > 1."""
    z = wide(z.detach())
    confidence = 1 - torch.special.entr(F.softmax(z, -1)).sum(-1) / log(z.shape[-1])
    unit = F.normalize(z - z.mean(-1, keepdim=True) if center else z, dim=-1)
    cosine = (unit[:, None] * unit).sum(-1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)[..., None]
    return (confidence * cosine / temperature).masked_fill(itself, -torch.inf).softmax(1)


def sta_loss(z: Tensor, tau: float = 3.0, temperature: float = 1.0, center: bool = False) -> Tensor:  # [T, B, C] -> []
    """Every step learns from the others, by `step_weights`; 0 for a single step."""
    if len(z) == 1:
        return 0.0 * z.sum()
    weights = step_weights(z, temperature, center)
    return kd_per_step(z, (weights[..., None] * z).sum(1), tau)


class ELA(nn.Module):
    """`ela_loss` of the student's logits with the time-mean teacher."""

    def __init__(self, tau: float = 3.0, teacher_mode: TeacherMode = "min"):
        super().__init__()
        self.tau, self.teacher_mode = tau, teacher_mode

    def forward(self, step: Step) -> Tensor:
        teacher = rate(step.teacher.logits)
        return ela_loss(step.student.logits, teacher, step.batch["y"], self.tau, self.teacher_mode)


class STA(nn.Module):
    """`sta_loss` of the student's logits."""

    def __init__(self, tau: float = 3.0, temperature: float = 1.0, center: bool = False):
        super().__init__()
        self.tau, self.temperature, self.center = tau, temperature, center

    def forward(self, step: Step) -> Tensor:
        return sta_loss(step.student.logits, self.tau, self.temperature, self.center)


def seal_kd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    alpha: NonNegative = 0.6,
    beta: NonNegative = 0.15,
    tau: Positive = 3.0,
    teacher_mode: TeacherMode = "min",
    temperature: Positive = 1.0,
    center: bool = False,
) -> Plan:
    """Labels at every step, the teacher with errors aligned (ELA), and the other steps (STA).

    alpha: weight of ELA.  beta: weight of STA.  tau: temperature of both KL.
    teacher_mode: what ELA makes of the teacher's logits of the two confused classes, the smaller, their mean, or keep.
    temperature: of STA's weights over steps; 1 gives nearly even ones.
    center: subtract the class mean before the cosine of STA.
    """
    loss: Terms = {"ce_per_step": (1.0, PerStep(CE()))}
    loss |= {"ela": (alpha, ELA(tau, teacher_mode))} if alpha else {}
    loss |= {"sta": (beta, STA(tau, temperature, center))} if beta else {}
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
