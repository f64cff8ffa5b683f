"""CKDSNN: where both networks look (SAMD), and logits smoothed by noise (NLD).

    A_te = ReLU( sum_d omega_d F_d )        class activation map of the class c that the teacher predicts, [B, H, W]
           omega = W[c]                     plain CAM, for a linear layer W on the spatial mean of F
           omega_d = mean_hw dz_t[c]/dF_d   Grad-CAM, for any other teacher, which costs one more pass of it
    A_st = sum_t sum_c S[t, c]              the student's spikes counted over time and channels
    P(A) = softmax over pixels of N(A) / T_map             N: minus the minimum, then over the maximum + 1e-3
    L_SAMD = T_map^2 mean_b KL( P(A_te) || P(A_st) )
    L_NLD  = tau^2 mean_b KL( softmax(z_t / tau) || softmax((s + noise xi) / tau) )        s = mean_t z_s[t]
             xi ~ N( mean_c s, std_c(s)^2 ) for each class, in training only
    L      = CE( s, y ) + beta L_SAMD + gamma L_NLD

Reference: Liu, Xia, Zhou, Xu, Guo, AAAI 2026, https://arxiv.org/abs/2511.06902, SAMD and NLD.
Evidence: code
KL is summed over pixels or classes and averaged over the batch; no gradient to the teacher or through the mean and std
of the noise. As N is in [0, 1], L_SAMD / T_map^2 is at most 0.124 at T_map = 2: a weak term, which a smaller T_map or a
larger beta makes count. On the spatial mean both maps are the same up to a factor, which N removes.
`preset="official_code"`: SAMD without T_map^2, minimum and maximum of the whole batch; NLD of the mixture
(1 - noise) softmax(s / tau) + noise softmax(n / tau), n = mean + draw std^2 (the variance), gradients through both.
Differs from the paper: N of each sample and the noise's statistics without gradient are ours; log-softmax for + 1e-10.
The authors' students end in ReLU instead of a spiking neuron, so that their SAMD counts no spikes, and their teacher
stays in training mode; here the student stays as it is and the teacher is frozen.
"""

from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan, Terms
from spikedistill.core.step import Pass, Step
from spikedistill.core.taps import call, eval_mode, published, time_first
from spikedistill.functional import kd_loss, matched, wide
from spikedistill.objectives import CE
from spikedistill.spec import NonNegative, Positive, Share

Preset = Literal["paper", "official_code"]


def grid(x: Tensor) -> Tensor:  # [T, B, C, H, W], or tokens [T, B, N, C] of a square image -> [T, B, C, H, W]
    """Raises ValueError for anything that is no map."""
    side = isqrt(x.shape[2])
    if x.ndim == 4 and side**2 == x.shape[2]:
        return x.mT.unflatten(-1, (side, side))
    if x.ndim != 5:
        raise ValueError(f"ckdsnn: a tap of shape {list(x.shape)} is no map: choose one with height and width")
    return x


def activation_map(feature: Tensor, omega: Tensor) -> Tensor:  # [B, D, H, W], [B, D] -> [B, H, W]
    """Class activation map of channel weights."""
    return (wide(omega)[..., None, None] * wide(feature)).sum(1).relu()


def grad_cam(teacher: nn.Module, x: Tensor, tap: str) -> Tensor:  # input -> [B, H, W]
    """The map of the predicted class, by one more pass of the teacher and a gradient through what follows the tap."""
    seen: list[Tensor] = []

    def cut(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[-1]

    with torch.enable_grad(), eval_mode(teacher), teacher.get_submodule(tap).register_forward_hook(cut):
        logits = call(teacher, x).logits
        seen += torch.autograd.grad(rate(logits).amax(-1).sum(), seen)
    steps, batch, _ = logits.shape
    feature, slope = (grid(time_first(a.detach(), steps, batch, tap)) for a in seen)
    return activation_map(rate(feature), wide(slope).sum(0).mean((-2, -1)))


def looks(a: Tensor, temperature: float, whole_batch: bool = False) -> Tensor:  # [B, H, W] -> [B, H W]
    """log P(A): where a map is large, as a distribution over its pixels."""
    a, axis = wide(a).flatten(1), (0, 1) if whole_batch else (1,)
    a = a - a.amin(axis, keepdim=True)
    return F.log_softmax(a / (a.amax(axis, keepdim=True) + 1e-3) / temperature, -1)


def samd_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0, preset: Preset = "paper") -> Tensor:
    """KL of two maps as distributions, [B, H, W] twice -> []"""
    log_s, log_t = (looks(a, temperature, preset == "official_code") for a in (student, teacher.detach()))
    kappa = temperature**2 if preset == "paper" else 1.0
    return kappa * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def nld_loss(s: Tensor, v: Tensor, draw: Tensor, tau: float, noise: float, preset: Preset = "paper") -> Tensor:
    """KL with noisy student logits; draw: standard normal numbers. [B, C], [B, C], [B, C] -> []"""
    if preset == "paper":
        xi = s.mean(-1, keepdim=True) + draw * s.std(-1, keepdim=True)
        return kd_loss(s + noise * xi.detach(), v, tau)
    n = s.mean(-1, keepdim=True) + draw * s.var(-1, keepdim=True)
    log_share = s.new_tensor([1 - noise, noise]).log()
    mixed = torch.logaddexp(log_share[0] + F.log_softmax(s / tau, -1), log_share[1] + F.log_softmax(n / tau, -1))
    return kd_loss(tau * mixed, v, tau)


class SAMD(nn.Module):
    """`samd_loss` of spike counts with the teacher's map. Its keyword arguments are those of the function.

    spikes: refuse a student's tap that holds none, in evaluation and at the start of training: a look makes a GPU wait.
    """

    def __init__(self, student: str, tap: str, teacher: nn.Module, resize: bool = False, spikes: bool = False, **how):
        super().__init__()
        self.s, self.t, self.resize, self.spikes, self.how = student, tap, resize, spikes, how
        self.taps = {"student": [student], "teacher": [tap]}
        self.frozen = teacher, next((m for m in reversed([*teacher.modules()]) if isinstance(m, nn.Linear)), None)
        self.plain: bool | None = None  # whether plain CAM will do, known after the first look

    def forward(self, step: Step) -> Tensor:
        student = wide(grid(step.student.taps[self.s]))
        if self.spikes and (step.progress == 0 or not self.training) and not (student == student.floor().relu()).all():
            raise ValueError(f"ckdsnn: '{self.s}' of the student holds no spikes: name the map to be summed, tap=")
        student = student.sum((0, 2))
        target = matched(self.target(step)[:, None], student[:, None], self.resize, "ckdsnn")[:, 0]
        return samd_loss(student, target, **self.how)

    def target(self, step: Step) -> Tensor:  # -> [B, H, W]
        """The teacher's map: plain CAM where its logits are those of its last linear layer on the mean of the tap."""
        teacher, linear = self.frozen  # in a tuple, so that they are not part of this module
        feature, logits = rate(grid(step.teacher.taps[self.t])), rate(step.teacher.logits)
        if self.plain is None:
            own = linear(feature.mean((-2, -1))) if linear and linear.in_features == feature.shape[1] else feature
            near = own.shape == logits.shape and (own - logits).abs().max() <= 0.05 * logits.abs().max() + 1e-3
            self.plain = bool(near)
        if not self.plain or not linear:
            return grad_cam(teacher, step.batch["x"], self.t)
        return activation_map(feature, linear.weight[logits.argmax(-1)])


class NLD(nn.Module):
    """`nld_loss` of time-mean logits; without noise in evaluation mode."""

    def __init__(self, tau: float = 2.0, noise: float = 0.1, preset: Preset = "paper"):
        super().__init__()
        self.tau, self.noise, self.preset = tau, noise, preset

    def forward(self, step: Step) -> Tensor:
        s, v = rate(step.student.logits), rate(step.teacher.logits)
        if not self.training:
            return kd_loss(s, v, self.tau)
        return nld_loss(s, v, torch.randn_like(s), self.tau, self.noise, self.preset)


def ckdsnn(
    student: nn.Module,
    teacher: nn.Module,
    *,
    tap: str = "",
    teacher_tap: str = "",
    beta: NonNegative = 1.0,
    gamma: NonNegative = 1.0,
    map_temperature: Positive = 2.0,
    tau: Positive = 2.0,
    noise: Share = 0.1,
    resize: bool = False,
    preset: Preset = "paper",
) -> Plan:
    """Labels, the teacher's class activation map, and its logits compared with noisy ones.

    tap, teacher_tap: maps to compare; empty for the last of each model, which has to hold spikes of the student. One
    that is named is summed, whatever it holds.
    beta: weight of the map term.  gamma: weight of the logits term.
    map_temperature: of the softmax over pixels.  tau: temperature of the logits.
    noise: size of the noise in the logits, or its share of the mixture with official_code.
    resize: interpolate a teacher map of another height and width.
    preset: official_code for the authors' code, see above.
    """
    spikes = not tap
    tap, _ = published(student, tap, "student")
    teacher_tap, _ = published(teacher, teacher_tap, "teacher")
    loss: Terms = {"ce": (1.0, CE())}
    if beta:
        how = dict(temperature=map_temperature, preset=preset)
        loss["samd"] = (beta, SAMD(tap, teacher_tap, teacher, resize, spikes, **how))
    if gamma:
        loss["nld"] = (gamma, NLD(tau, noise, preset))
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
