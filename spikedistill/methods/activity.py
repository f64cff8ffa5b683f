"""Activity reduction: distillation, and penalties on spikes and on logits, for fewer spikes at the same accuracy.

    L       = (1 - alpha) CE(z, y) + alpha L_KD + act L_act + logits L_logit          z = mean_t z[t]
    L_KD    = tau^2 KL( softmax(z_t / tau) || softmax(z / tau) ), or mean_{b,k} (z - z_t)^2
    L_act   = sum_l w_l mean_{b,n} r_l^p              r_l[b,n] = max( mean_t s_l[t,b,n] - floor, 0 ), s in {0, 1}
              on every spike instead of the rate: sum_l w_l mean_{t,b,n} s_l^p
              w_l = N_l / sum_j N_j, or N_l T so that p = 1 counts spikes per sample; l: the student's neurons
    L_logit = mean_{b,k} |z|^p, or mean_{t,b,k} |z[t]|^p

Reference: Louis, Miramond, Pegatoquet, Girard, ICANN 2024, https://arxiv.org/abs/2406.18350.
Evidence: partly
Read: the three terms, the network, and that the penalty on logits is L2 with a coefficient written "001". The losses
have no published code: the kind, tau and alpha of the distillation, act, and all reductions are ours.
Every term is a mean over the batch. KL is summed over classes; L_logit is a mean over classes too, so a weight w on
their sum is w C here. With w_l = N_l / sum_j N_j and p = 1, L_act is the network's spike rate and depends on no size;
a weight w on spikes per sample is w T sum_j N_j of it. On spikes, p = 1 and 2 have one value and two gradients: 1 for
every neuron, or 2 s, which is none for the silent ones. A penalty on every step is one on the variance over time too:
mean_t z[t]^2 = z^2 + var_t. Distillation bounds the logits already, so start `logits` ten times smaller with it.
Neurons whose output is the logits are left out of L_act; those of a readout that is averaged afterwards are in it.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass, Step
from spikedistill.functional import wide
from spikedistill.neurons import Neuron
from spikedistill.objectives import CE, KD
from spikedistill.spec import NonNegative, Positive, Share, SpecError

Power = Literal[1, 2]
Per = Literal["rate", "spikes"]


def activity_loss(
    layers: list[Tensor], p: Power = 1, on: Literal["rate", "spike"] = "rate", per: Per = "rate", floor: float = 0.0
) -> Tensor:  # [T, B, ...] each -> []
    """What the layers fire: 0 for silence, 1 (or the number of neurons and steps) where all fire always."""
    sizes = [s[0, 0].numel() for s in layers]
    total = torch.zeros((), device=layers[0].device)
    for s, size in zip(layers, sizes):
        x = wide(s) if on == "spike" else (rate(wide(s)) - floor).clamp_min(0)
        weight = size / sum(sizes) if per == "rate" else size * len(s)
        total = total + weight * (x.square() if p == 2 else x).mean()
    return total


def logits_loss(z: Tensor, p: Power = 2, on: Literal["mean", "step"] = "mean") -> Tensor:  # [T, B, C] -> []
    """How large the outputs are."""
    x = wide(rate(z) if on == "mean" else z)
    return (x.square() if p == 2 else x.abs()).mean()


class Activity(nn.Module):
    """`activity_loss` of the taps given, which are neurons. Its other arguments are those of the function."""

    def __init__(self, taps: list[str], **how):
        super().__init__()
        self.taps, self.how = {"student": taps}, how

    def forward(self, step: Step) -> Tensor:
        taps = (step.student.taps[tap] for tap in self.taps["student"])
        layers = [s for s in taps if s is not step.student.logits]
        if not layers:
            raise SpecError(["activity.act: the student's only spiking neurons are its outputs: set act=0"])
        return activity_loss(layers, **self.how)


class Logits(nn.Module):
    """`logits_loss` of the student."""

    def __init__(self, p: Power = 2, on: Literal["mean", "step"] = "mean"):
        super().__init__()
        self.p, self.on = p, on

    def forward(self, step: Step) -> Tensor:
        return logits_loss(step.student.logits, self.p, self.on)


class MSE(nn.Module):
    """Mean square difference of the time-mean logits; the teacher gets no gradient."""

    def forward(self, step: Step) -> Tensor:
        return (wide(rate(step.student.logits)) - wide(rate(step.teacher.logits).detach())).square().mean()


def activity(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    kd: Literal["none", "kl", "mse"] = "kl",
    alpha: Share = 0.5,  # ours
    tau: Positive = 4.0,  # ours
    act: NonNegative = 1e-2,  # ours
    act_p: Power = 1,  # ours
    act_on: Literal["rate", "spike"] = "rate",
    act_per: Per = "rate",
    floor: Share = 0.0,
    logits: NonNegative = 1e-2,
    logits_p: Power = 2,
    logits_on: Literal["mean", "step"] = "mean",
) -> Plan:
    """Labels, the teacher if there is one, few spikes and small logits.

    kd: kl or mse with the teacher's outputs, or none; without a teacher it is left out.
    alpha: share of the distillation, the labels get the rest.  tau: temperature of kl.
    act: weight of the spikes, 0 leaves them out.  act_p: power of a rate or spike.
    act_on: the rate of each neuron, or every spike.
    act_per: rate for a share in [0, 1], spikes for spikes per sample.
    floor: rate below which a neuron costs nothing, against layers that die.
    logits: weight of the logits, 0 leaves them out.  logits_p: power of a logit.
    logits_on: their time mean, or every step.
    """
    if floor and act_on == "spike":
        raise SpecError(["activity.floor: it is of rates, so it goes with act_on='rate'"])
    passes = {"student": Pass(student, grad=True)}
    loss: dict = {"ce": (1.0, CE())}
    if teacher is not None and kd != "none":
        passes["teacher"] = Pass(teacher)
        loss["ce"] = (1 - alpha, CE())
        loss |= {"kd": (alpha, KD(tau))} if kd == "kl" else {"kd_mse": (alpha, MSE())}
    if act:
        neurons = [name for name, module in student.named_modules() if isinstance(module, Neuron)]
        if not neurons:
            raise SpecError([f"activity.act: the student ({type(student).__name__}) has no spiking neuron"])
        loss["activity"] = (act, Activity(neurons, p=act_p, on=act_on, per=act_per, floor=floor))
    if logits:
        loss["logits"] = (logits, Logits(logits_p, logits_on))
    return Plan(passes, loss)
