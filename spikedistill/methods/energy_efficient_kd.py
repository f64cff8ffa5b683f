"""Energy-efficient distillation with two temperatures, in the style of Lee et al.: a cooler student needs fewer spikes.

    L_KD  = c KL( softmax(z_t / tau_teacher) || softmax(o / tau_student) )      o = mean_t z[t], no gradient to z_t
            c = tau_teacher tau_student ("product"), tau_student^2, or tau_student
    L_spk = (1/B) sum_b r_b, or r_b^2         r: spikes / (T sum_l N_l), the share of neurons and steps that fire
    L     = (1 - alpha) CE(o / ce_temperature, y) + alpha L_KD + spikes L_spk

Reference: Lee, Park, Kim, Doh, Yoon 2021, https://arxiv.org/abs/2106.07172.
Evidence: reconstruction
Only the abstract could be read: unlike temperatures for teacher and student keep the gain of distillation and cut the
spikes. All values, c and L_spk are ours. Why it can work: L_KD is 0 at o = (tau_student / tau_teacher) z_t + constant,
so tau_student < tau_teacher asks for smaller outputs. Where the readout does not spike, its weights alone can give
these, so measure the spikes. The labels pull outputs up again: keep alpha at 0.5 or more, or soften them as well.
KL is summed over classes and averaged over the batch; its gradient is c / tau_student (softmax(o / tau_student) -
softmax(z_t / tau_teacher)) / B, so its size is tau_teacher, tau_student or 1 for the three c. Equal temperatures and
"product" are plain distillation. L_spk is in [0, 1] and depends on no size; a weight w on spikes per sample is
w T sum_l N_l here.
"""

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass, Step
from spikedistill.functional import idle, wide
from spikedistill.neurons import Neuron
from spikedistill.objectives import CE
from spikedistill.spec import NonNegative, Positive, Share, SpecError

Scale = Literal["product", "student_squared", "student"]


def two_temperature_loss(
    student: Tensor, teacher: Tensor, tau_student: float, tau_teacher: float, scale: Scale = "product"
) -> Tensor:  # [B, C], [B, C] -> []
    """c KL of softened teacher and student, each by its own temperature; the teacher gets no gradient."""
    c = {"product": tau_teacher * tau_student, "student_squared": tau_student**2, "student": tau_student}[scale]
    log_s = F.log_softmax(wide(student) / tau_student, -1)
    log_t = F.log_softmax(wide(teacher.detach()) / tau_teacher, -1)
    return c * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def spike_rate(layers: list[Tensor], squared: bool = False) -> Tensor:  # [T, B, ...] each -> []
    """Share of neurons and steps that fire, of each sample, or its square, averaged over the batch."""
    total = torch.stack([wide(s).transpose(0, 1).flatten(1).sum(1) for s in layers]).sum(0)
    share = total / sum(s[:, 0].numel() for s in layers)
    return (share.square() if squared else share).mean()


class TwoTemperatures(nn.Module):
    """`two_temperature_loss` of time-mean logits."""

    def __init__(self, tau_student: float = 2.0, tau_teacher: float = 8.0, scale: Scale = "product"):
        super().__init__()
        self.tau_student, self.tau_teacher, self.scale = tau_student, tau_teacher, scale

    def forward(self, step: Step) -> Tensor:
        s, t = rate(step.student.logits), rate(step.teacher.logits)
        return two_temperature_loss(s, t, self.tau_student, self.tau_teacher, self.scale)


class Spikes(nn.Module):
    """`spike_rate` of the taps given, which are neurons."""

    def __init__(self, taps: list[str], squared: bool = False):
        super().__init__()
        self.taps, self.squared = {"student": taps}, squared

    def forward(self, step: Step) -> Tensor:
        return spike_rate([step.student.taps[tap] for tap in self.taps["student"]], self.squared)


class SoftenedCE(nn.Module):
    """Cross-entropy of the time-mean logits divided by a temperature."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, step: Step) -> Tensor:
        return F.cross_entropy(rate(step.student.logits) / self.temperature, step.batch["y"])


def energy_efficient_kd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    tau_teacher: Positive = 8.0,  # ours
    tau_student: Positive = 2.0,  # ours
    alpha: Share = 0.5,  # ours
    scale: Scale = "product",  # ours
    ce_temperature: Positive = 1.0,
    spikes: NonNegative = 0.0,  # ours
    squared: bool = False,
) -> Plan:
    """Labels, the teacher's outputs at two temperatures, and if wanted fewer spikes.

    tau_teacher, tau_student: temperatures; the smaller tau_student / tau_teacher, the smaller the student's outputs.
    alpha: share of the teacher, the labels get the rest.
    scale: product, student_squared or student, the factor of the KL.
    ce_temperature: divides the student's logits in the label term.
    spikes: weight of the share of neurons that fire, 0 leaves it out.  squared: penalise its square.
    """
    idle("energy_efficient_kd", "with spikes=0", squared=squared and not spikes)
    if tau_student > tau_teacher:
        text = "energy_efficient_kd: tau_student > tau_teacher asks for larger outputs, not fewer spikes"
        warnings.warn(text, stacklevel=2)
    labels = ("ce", CE()) if ce_temperature == 1 else ("ce_softened", SoftenedCE(ce_temperature))
    two = TwoTemperatures(tau_student, tau_teacher, scale)
    loss: dict = {labels[0]: (1 - alpha, labels[1]), "energy_efficient_kd": (alpha, two)}
    if spikes:
        neurons = [name for name, module in student.named_modules() if isinstance(module, Neuron)]
        if not neurons:
            raise SpecError(
                [f"energy_efficient_kd.spikes: the student ({type(student).__name__}) has no spiking neuron"]
            )
        loss["spikes"] = (spikes, Spikes(neurons, squared))
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
