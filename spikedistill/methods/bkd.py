"""Blurred knowledge distillation (BKDSNN): restore the teacher's feature from a student feature with channels dropped.

    X = A( mean_t F_s[t] )            A: 1x1 convolution, only where the channels differ; pool_before: of mean_{h,w}
    Y = G( M * X )                    M: 0 with probability `blur`, one draw a sample and channel, no rescaling
    L_BKD  = weight (1/B) sum_{b,d,h,w} (Y - F_t)^2          G: conv3x3 - ReLU - conv3x3; teacher vector: mean_{h,w} Y
    w_b    = 1 - exp( -CE(z_s, y) / (CE(z_t, y) + 1e-7) )    no gradient
    L_WSLD = wsld tau^2 (1/B) sum_b w_b H( softmax(z_t / tau), softmax(z_s / tau) )
    L      = CE + L_BKD + L_WSLD      mixed distillation; wsld = 0 or weight = 0 gives one of the two alone

Reference: Xu, You, Guo, Wang, He, ECCV 2024, https://arxiv.org/abs/2407.09083. The logits term is Weighted Soft Label
Distillation, Zhou et al. 2021, https://arxiv.org/abs/2102.00650; the feature term builds on https://arxiv.org/abs/2205.01529.
Evidence: code
The squared error is summed over a sample and averaged over the batch, so the weight depends on the feature's size n:
as a weight on the mean square it is weight * n. The authors' 7e-5 is 1.8 for 512x7x7 (SEW-ResNet-18), 7.0 for
2048x7x7 (SEW-ResNet-50); 2e-3 (Spikingformer on CIFAR) is 0.77 for a vector of 384. `reduction="mean"` takes this.
The teacher's vector is theirs for a ViT: what its classification head is given. Which token that is their files do not
show; here it is what the model itself takes, the class token in vit_*_patch16_224. `pool_before` is their feature term
alone for ResNets, where G is a dense layer on one pixel; with logits, and by default here, they restore the map.
Differs from the authors' code: the mask is drawn in training mode only; the teacher never gets a gradient; a teacher
map of another height and width is refused, or interpolated with resize=True; their rescaling of the teacher by the
ratio of maxima (use_clip, off in every script) is left out; the student's feature is masked and restored on CIFAR10-DVS
too, where they swap the two; a spiking teacher runs as many steps as its frames have (theirs 16, their student 4).
A and G exist in training only.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan, Terms
from spikedistill.core.step import Pass, Step
from spikedistill.core.taps import published
from spikedistill.functional import idle, soft_cross_entropy, wide
from spikedistill.objectives import CE
from spikedistill.spec import Count, NonNegative, Positive, Share

Reduction = Literal["sum_per_sample", "mean"]


def blur(x: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:  # [B, D, H, W] -> same
    """Drop whole channels of single samples with probability `ratio`; what is left keeps its value."""
    draw = torch.rand(*x.shape[:2], 1, 1, device=x.device, generator=generator)
    return x * (draw >= ratio).to(x.dtype)


def bkd_loss(restored: Tensor, teacher: Tensor, reduction: Reduction = "sum_per_sample") -> Tensor:
    """Squared error of a restored map [B, D, H, W] with a teacher map, or of its spatial mean with a vector [B, D].

    Raises ValueError, naming both shapes, where they do not fit.
    """
    restored = restored.mean((-2, -1)) if teacher.ndim == 2 else restored
    if restored.shape != teacher.shape:
        shapes = f"student feature {list(restored.shape)} and teacher feature {list(teacher.shape)}"
        how = "choose other taps, or resize=True to interpolate the teacher's"
        how = how if teacher.ndim == 4 else "choose a teacher tap that is a map [B, D, H, W] or a vector [B, D]"
        raise ValueError(f"bkd: {shapes} do not fit: {how}")
    # channels last, as they are in memory: the gradient of mse_loss always is as the axes are
    y, target = (wide(x.movedim(1, -1)) for x in (restored, teacher.detach()))
    return F.mse_loss(y, target) if reduction == "mean" else F.mse_loss(y, target, reduction="sum") / len(y)


def wsld_loss(student: Tensor, teacher: Tensor, y: Tensor, tau: float = 2.0) -> Tensor:
    """Soft cross-entropy weighted by how much worse than the teacher the student is. [B, C], [B, C], [B] or [B, C]."""
    teacher = teacher.detach()
    ratio = soft_cross_entropy(student.detach(), y) / (soft_cross_entropy(teacher, y) + 1e-7)
    weight = 1 - torch.exp(-ratio)
    return tau**2 * (weight * soft_cross_entropy(wide(student) / tau, F.softmax(wide(teacher) / tau, -1))).mean()


class BKD(nn.Module):
    """The feature term between two taps, with the adapter A and the restoration block G.

    dims: channels of student and teacher tap.  hidden: channels inside G (the paper: those of the teacher).
    pool_before: average both maps over space first.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        dims: tuple[int, int],
        ratio: float = 0.15,
        reduction: Reduction = "sum_per_sample",
        hidden: int | None = None,
        resize: bool = False,
        pool_before: bool = False,
    ):
        super().__init__()
        self.s, self.t, self.ratio, self.reduction = student, teacher, ratio, reduction
        self.resize, self.pool_before = resize, pool_before
        self.taps = {"student": [student], "teacher": [teacher]}
        d, hidden = dims[1], hidden or dims[1]
        self.align = nn.Conv2d(dims[0], d, 1) if dims[0] != d else nn.Identity()
        self.restore = nn.Sequential(nn.Conv2d(d, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, d, 3, padding=1))

    def forward(self, step: Step) -> Tensor:
        x = rate(step.student.taps[self.s])
        target = rate(step.teacher.taps[self.t])
        if x.ndim != 4:
            raise ValueError(f"bkd: the student's '{self.s}' is {list(x.shape)}: choose a map [B, D, H, W]")
        if self.pool_before:
            x, target = (f.mean((-2, -1), keepdim=True) if f.ndim == 4 else f for f in (x, target))
        x = self.align(x)
        x = self.restore(blur(x, self.ratio) if self.training else x)
        if self.resize and target.ndim == 4 and target.shape[-2:] != x.shape[-2:]:
            target = F.interpolate(wide(target), x.shape[-2:], mode="bilinear")
        return bkd_loss(x, target, self.reduction)


class WSLD(nn.Module):
    """`wsld_loss` of time-mean logits."""

    def __init__(self, tau: float = 2.0):
        super().__init__()
        self.tau = tau

    def forward(self, step: Step) -> Tensor:
        return wsld_loss(rate(step.student.logits), rate(step.teacher.logits), step.batch["y"], self.tau)


def bkd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    tap: str = "",
    teacher_tap: str = "",
    blur: Share = 0.15,
    weight: NonNegative = 7e-5,
    wsld: NonNegative = 1.0,
    tau: Positive = 2.0,
    reduction: Reduction = "sum_per_sample",
    hidden: Count | None = None,
    resize: bool = False,
    pool_before: bool = False,
) -> Plan:
    """Labels, the blurred feature before the classifier, and weighted soft labels.

    tap, teacher_tap: features to compare; empty for the last map of each model, of a ViT the vector into its head.
    blur: share of channels dropped, 0.15 in the code, up to 0.6 in its ablations.
    weight: of the feature term; depends on `reduction` and the feature's size, see above.
    wsld: weight of the logits term, 0 leaves it out.  tau: its temperature.
    reduction: sum_per_sample as the authors have it, or mean over all elements.
    hidden: channels inside the restoration block, None for those of the teacher.
    resize: interpolate a teacher map of another height and width.
    pool_before: average both maps over space before, not after, the restoration; G on one pixel is a dense layer.
    """
    loss: Terms = {"ce": (1.0, CE())}
    if weight:
        idle("bkd", "with pool_before", resize=pool_before and resize)
        tap, channels = published(student, tap, "student")
        teacher_tap, teacher_channels = published(teacher, teacher_tap, "teacher", vector=True)
        dims = channels, teacher_channels
        loss["bkd"] = (weight, BKD(tap, teacher_tap, dims, blur, reduction, hidden, resize, pool_before))
    else:
        where = dict(tap=bool(tap), teacher_tap=bool(teacher_tap), resize=resize, pool_before=pool_before)
        shape = dict(blur=blur != 0.15, reduction=reduction != "sum_per_sample", hidden=hidden is not None)
        idle("bkd", "with weight=0", **where, **shape)
    if wsld:
        loss["wsld"] = (wsld, WSLD(tau))
    else:
        idle("bkd", "with wsld=0", tau=tau != 2.0)
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
