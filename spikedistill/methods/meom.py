"""Many eyes, one mind (MEOM), in the style of: every step has its own masked view of the teacher, and follows the next.

    m[t]    = mask of step t on the teacher's feature f, 1 with probability rho, drawn once    v = h(f): the teacher
    v~[t]   = h( f * m[t] )                        h: what follows f; no rescaling by 1 / rho
    v^[t]   = (1 - lam) v + lam v~[t]
    L_TMPD  = (1/T) sum_t tau^2 mean_b KL( softmax(v^[t] / tau) || softmax(z[t] / tau) )
    zbar[t] = mean of z[1] .. z[t]
    L_TPD   = 1/(T-1) sum_{t<T} mean_b H( softmax(zbar[t+1] / tau'), softmax(zbar[t] / tau') )        0 for T = 1
    L       = (1/T) sum_t CE( z[t], y ) + tmpd L_TMPD + tpd L_TPD            H(p, q) = -sum_c p_c log q_c

Reference: Sun, Duan, Huang, Gong, Kuhlmann, ICLR 2026, https://openreview.net/forum?id=NbdEDRRsCI, TMPD and TPD.
Evidence: reconstruction
Known from reading notes and reviews: the three terms and their weights 1, 0.5, 0.3, fixed random masks for each step,
cross-entropy to the later running mean. Ours: rho, lam, tau, tau' = tau, tau^2 in the KL but none in TPD, no gradient
to the target of TPD, masks on single elements of the last map. KL and H are summed over classes and averaged over
steps and batch; H does not vanish where the steps agree, it is then the entropy. lam = 0 is `full_range_kd` without its
self term. The masks are a function of `seed`, the step and the shape of f, so equal in every process and after loading.
The teacher runs once up to f and T + 1 times from there, in every step: these views are not cached.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan, Terms
from spikedistill.core.step import Pass, Step
from spikedistill.core.taps import call, eval_mode, published, time_first
from spikedistill.functional import kd_per_step, soft_cross_entropy
from spikedistill.objectives import CE, PerStep
from spikedistill.spec import NonNegative, Positive, Share

Level = Literal["element", "channel"]
Resample = Literal["never", "batch"]


def mask_shape(shape: tuple[int, ...], level: Level) -> tuple[int, ...]:
    """Of a map (D, H, W), tokens (N, D) or a vector (D,) as they are, or one number a channel."""
    if level == "element" or len(shape) == 1:
        return shape
    return (shape[0], 1, 1) if len(shape) == 3 else (1, shape[1])


@lru_cache(16)
def fixed_masks(steps: int, shape: tuple[int, ...], rho: float, seed: int) -> Tensor:  # -> [T, *shape] of bool
    """The same masks for the same arguments; those of fewer steps are the first of more."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(shape, generator=generator) < rho for _ in range(steps)])


def views(teacher: nn.Module, x: Tensor, tap: str, masks: Callable[[Tensor], Tensor]) -> Tensor:
    """The teacher's logits, as it is and with its tap masked: input -> [1 + N, B, C].

    masks: feature of one sample -> masks [N, ...] that broadcast with it.
    """
    batch = x.shape[1] if x.ndim == 5 else len(x)

    def mask(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        untimed = out.ndim < 5 and len(out) == batch  # all there is to go by where nobody says T
        steps = len(x) if x.ndim == 5 else getattr(teacher, "steps", 1 if untimed else len(out))
        axis = 1 if time_first(out, steps, batch, tap) is out else 0  # of the batch: [T, B, ...] or [B, ...]
        if out.shape[axis] != batch:
            raise ValueError(f"meom: the teacher's '{tap}' is {list(out.shape)}, which has no axis for {batch} samples")
        m = masks(out.select(axis, 0)[0] if axis else out[0])
        m = m.to(out).unsqueeze(1)  # [N, 1, ...]
        masked = out.unsqueeze(axis) * m
        return torch.cat([out.unsqueeze(axis), masked], axis).flatten(axis, axis + 1)

    with torch.no_grad(), eval_mode(teacher), teacher.get_submodule(tap).register_forward_hook(mask):
        return rate(call(teacher, x).logits).unflatten(0, (-1, batch))


def tmpd_loss(z: Tensor, seen: Tensor, lam: float, tau: float) -> Tensor:  # [T, B, C], [1 + T, B, C] -> []
    """KL of every step with its own mixture of the plain and the masked teacher."""
    return kd_per_step(z, (1 - lam) * seen[0] + lam * seen[1:], tau)


def tpd_loss(z: Tensor, tau: float) -> Tensor:  # [T, B, C] -> []
    """Cross-entropy of every running mean with the next; 0 for a single step."""
    if len(z) == 1:
        return 0.0 * z.sum()
    count = torch.arange(1, len(z) + 1, device=z.device)[:, None, None]
    means = z.cumsum(0) / count / tau
    target = means[1:].detach().softmax(-1)
    return soft_cross_entropy(means[:-1].flatten(0, 1), target.flatten(0, 1)).mean()


class TMPD(nn.Module):
    """`tmpd_loss` with masks on a tap of the teacher, which it runs itself on batch["x"]."""

    def __init__(
        self,
        teacher: nn.Module,
        tap: str,
        rho: float = 0.9,
        lam: float = 0.5,
        tau: float = 3.0,
        level: Level = "element",
        resample: Resample = "never",
        seed: int = 0,
    ):
        super().__init__()
        self.frozen, self.tap = (teacher,), tap  # in a tuple, so that it is not part of this module
        self.rho, self.lam, self.tau, self.level, self.resample, self.seed = rho, lam, tau, level, resample, seed

    def forward(self, step: Step) -> Tensor:
        z = step.student.logits

        def masks(feature: Tensor) -> Tensor:
            shape = mask_shape(tuple(feature.shape), self.level)
            if self.resample == "batch" and self.training:
                return torch.rand(len(z), *shape, device=z.device) < self.rho
            return fixed_masks(len(z), shape, self.rho, self.seed)

        return tmpd_loss(z, views(self.frozen[0], step.batch["x"], self.tap, masks), self.lam, self.tau)


class TPD(nn.Module):
    """`tpd_loss` of the student's logits."""

    def __init__(self, tau: float = 3.0):
        super().__init__()
        self.tau = tau

    def forward(self, step: Step) -> Tensor:
        return tpd_loss(step.student.logits, self.tau)


def meom(
    student: nn.Module,
    teacher: nn.Module,
    *,
    teacher_tap: str = "",
    tmpd: NonNegative = 0.5,
    tpd: NonNegative = 0.3,
    rho: Share = 0.9,  # ours
    lam: Share = 0.5,  # ours
    tau: Positive = 3.0,  # ours
    tpd_tau: Positive | None = None,  # ours
    level: Level = "element",  # ours
    resample: Resample = "never",
    seed: int = 0,
) -> Plan:
    """Labels at every step, masked views of the teacher, and each running mean towards the next.

    teacher_tap: feature to mask; empty for the teacher's last map.
    tmpd: weight of the teacher's term.  tpd: weight of the term between running means.
    rho: share of the feature that is kept.  lam: share of the masked teacher in the target.
    tau: temperature of the teacher's term.  tpd_tau: of the other, None for the same.
    level: mask elements of the feature or whole channels.
    resample: draw the masks once, or for every batch.  seed: of the masks that are drawn once.
    """
    tap, _ = published(teacher, teacher_tap, "teacher")
    loss: Terms = {"ce_per_step": (1.0, PerStep(CE()))}
    loss |= {"tmpd": (tmpd, TMPD(teacher, tap, rho, lam, tau, level, resample, seed))} if tmpd else {}
    loss |= {"tpd": (tpd, TPD(tpd_tau or tau))} if tpd else {}
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
