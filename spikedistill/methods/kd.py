"""Knowledge distillation on logits.

    L = ce CE(mean_t z_s[t], y)  +  weight tau^2 KL( softmax(z_t / tau) || softmax(mean_t z_s[t] / tau) )

Reference: Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531, sec. 2.
Evidence: code
Differs from the paper: student (and spiking teacher) logits are averaged over time first; `per_step` compares every
time step instead and averages the losses, which is never smaller (Jensen). `counts` has sums in place of all means over
time: rates in [0, 1] have a softmax near uniform. KL is summed over classes and averaged over the batch; code that uses
torch's default "mean" divides by the number C of classes as well: its weight w is w / C here.
"""

from torch import nn

from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass
from spikedistill.objectives import CE, KD, KDPerStep
from spikedistill.spec import NonNegative, Positive, SpecError


def kd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    tau: Positive = 4.0,
    weight: NonNegative = 1.0,
    ce: NonNegative = 1.0,
    per_step: bool = False,
    counts: bool = False,
) -> Plan:
    """Labels, and the softened outputs of the teacher.

    tau: temperature.  weight: of the distillation term.  ce: weight of the labels; ce=0.1, weight=0.9 is the usual mix.
    per_step: compare the teacher with every time step instead of with the time mean.
    counts: take sums over time in both terms, which is what heads that spike need; a teacher's too, so that one whose
    head does not spike should have no time.
    """
    if per_step and counts:
        raise SpecError(["kd.counts: single steps have no counts: leave out per_step"])
    soft = KDPerStep(tau) if per_step else KD(tau, counts=counts)
    return Plan(
        {"student": Pass(student, grad=True), "teacher": Pass(teacher)},
        {"ce": (ce, CE(counts=counts)), "kd": (weight, soft)},
    )
