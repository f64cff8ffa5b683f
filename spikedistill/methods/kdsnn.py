"""KDSNN: one trained ANN teaches a spiking network by its outputs or by its features.

    response   L = (1 - alpha) CE(z, y) + alpha tau^2 KL( softmax(z_t / tau) || softmax(z / tau) )    z = mean_t z_s[t]
    feature    L = CE(z, y) + weight sum_l 2^(l - L) (1/B) sum_{b,c,h,w} d( A_l(mean_t F_s[t]), max(F_t, m_c) )
               d(s, t) = 0 where s <= t <= 0, else (s - t)^2         A: conv1x1 - BN         l = 1 .. L groups
               m_c = E[x | x < 0] of x ~ N(mean_c, std_c^2)          the margin, fixed, from the teacher's norm
    mse        L = CE(z, y) + weight sum_l mean_{b,c,h,w} ( A_l(mean_t F_s[t]) - F_t )^2
    pooled     L = CE(z, y) + weight (1/B) sum_{b,c} ( A(mean_{t,h,w} F_s[t]) - mean_{h,w} F_t )^2   the last group only

Reference: Xu, Li, Shen, Liu, Tang, Pan, CVPR 2023, https://arxiv.org/abs/2304.05627, the response and feature variants,
never both at once. The feature term is Heo et al. 2019, https://arxiv.org/abs/1904.01866, sec. 3. "pooled" is what the
code of https://arxiv.org/abs/2407.09083 calls by this paper's name; its A is a 1x1 convolution where channels differ.
Evidence: partly
Read: the two variants, the time mean, T = 4, a frozen teacher. No code was published; the formulas are those of the
works it builds on and the coefficients theirs or ours. "mse" is ours.
"feature" and "pooled" are sums over a sample and means over the batch, so their weights depend on the size n of a
feature: weight * n is that on its mean square. "feature" usually has 1e-3 for images of 32x32 and 1e-4 for 224x224.
"mse" is a mean over all elements, summed over groups. KL is summed over classes and averaged over the batch;
cross-entropy to the softened outputs would have the same gradient.
Differs from the paper: features before the last ReLU of a group, and so margins, need `norms`; without it the teacher's
stages are compared after their ReLU, where a margin changes nothing. In a residual block the ReLU is that of a sum: the
margin is the norm's, and the block's child `shortcut` is added to the feature.
"""

from collections.abc import Callable, Sequence
from math import pi, sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass, Step
from spikedistill.core.taps import published
from spikedistill.functional import idle, matched, mean_square, paired, shortcut, wide
from spikedistill.objectives import CE, KD
from spikedistill.spec import NonNegative, Positive, Share, SpecError


def margin(norm: nn.Module | None, name: str) -> Tensor:  # -> [C]
    """The mean of the negative outputs of each channel of a batch norm, taken as Gaussian. Never above 0."""
    if not isinstance(norm, nn.BatchNorm2d) or not norm.affine:
        raise SpecError([f"kdsnn.norms: '{name}' is no BatchNorm2d of the teacher with weight and bias"])
    mean, std = norm.bias.double(), norm.weight.double().abs().clamp_min(1e-6)
    ratio = sqrt(2 / pi) / torch.special.erfcx(mean / std / sqrt(2))  # density at 0 over the share below 0
    return (mean - std * ratio).float().detach()


def partial_distance(s: Tensor, t: Tensor) -> Tensor:  # [B, C, H, W], [B, C, H, W] -> []
    """Squared error, but none where the student is at or below a teacher that is not positive. Sum over a sample."""
    s, t = wide(s), wide(t.detach())
    return torch.where((s <= t) & (t <= 0), 0.0, (s - t).square()).sum() / len(s)


class MarginReLU(nn.Module):
    """max(x, m) with one m a channel. x: [B, C, H, W]."""

    def __init__(self, margin: Tensor):
        super().__init__()
        self.register_buffer("margin", margin.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.margin)


class Features(nn.Module):
    """A distance between pairs of taps, summed over pairs; each pair weighs `decay` times the next.

    dims: channels of student and teacher, a pair of taps each.  transforms: of the teacher's features, one a pair.
    shortcuts: for each teacher tap, one that is added to it, or none ("").
    """

    def __init__(
        self,
        taps: Sequence[str],
        teacher_taps: Sequence[str],
        dims: Sequence[tuple[int, int]],
        transforms: Sequence[nn.Module] = (),
        distance: Callable[[Tensor, Tensor], Tensor] = partial_distance,
        decay: float = 0.5,
        resize: bool = False,
        shortcuts: Sequence[str] = (),
    ):
        super().__init__()
        self.pairs = [*zip(taps, teacher_taps, shortcuts or [""] * len(taps))]
        self.taps = {"student": [*taps], "teacher": [*teacher_taps, *filter(None, shortcuts)]}
        self.distance, self.decay, self.resize = distance, decay, resize
        self.adapt = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s, t, kernel_size=1, bias=False), nn.BatchNorm2d(t)) for s, t in dims
        )
        self.transforms = nn.ModuleList(transforms or (nn.Identity() for _ in dims))

    def forward(self, step: Step) -> Tensor:
        terms = []
        seen = step.teacher.taps
        for (s, t, added), adapt, transform in zip(self.pairs, self.adapt, self.transforms):
            x = adapt(rate(step.student.taps[s]))
            target = rate(seen[t] + seen[added] if added else seen[t])
            target = matched(transform(target), x, self.resize, "kdsnn")
            terms.append(self.distance(x, target))
        return torch.stack([d * self.decay**i for i, d in enumerate(reversed(terms))]).sum()


def pooled(x: Tensor) -> Tensor:  # [T, B, C, H, W] or [T, B, C] -> [B, C]
    """Mean over time and space. Raises ValueError for anything else."""
    if x.ndim not in (3, 5):
        raise ValueError(f"kdsnn: a tap of shape {list(x.shape)} is neither a map nor a vector: choose another")
    x = wide(rate(x))
    return x.mean((-2, -1)) if x.ndim == 4 else x


class Pooled(nn.Module):
    """Squared error of two taps, `pooled`, sum over channels, mean over the batch."""

    def __init__(self, tap: str, teacher_tap: str, dims: tuple[int, int]):
        super().__init__()
        self.s, self.t, self.taps = tap, teacher_tap, {"student": [tap], "teacher": [teacher_tap]}
        self.adapt = nn.Linear(*dims) if dims[0] != dims[1] else nn.Identity()

    def forward(self, step: Step) -> Tensor:
        s, t = (pooled(x) for x in (step.student.taps[self.s], step.teacher.taps[self.t]))
        return (wide(self.adapt(s)) - t.detach()).square().sum(-1).mean()


def kdsnn(
    student: nn.Module,
    teacher: nn.Module,
    *,
    variant: Literal["response", "feature", "mse", "pooled"] = "feature",
    taps: Sequence[str] = (),
    teacher_taps: Sequence[str] = (),
    norms: Sequence[str] = (),
    weight: NonNegative | None = None,
    alpha: Share = 0.5,  # ours
    tau: Positive = 4.0,  # ours
    resize: bool = False,
) -> Plan:
    """Labels, and the teacher's outputs or its features.

    variant: response, feature, mse or pooled, as above.
    taps, teacher_taps: groups to compare, pair by pair; empty for those of one name, or all in order.
    norms: of "feature", the teacher's batch norms before the last ReLU of each group, in place of teacher_taps; of a
    residual block, the one before its sum.
    weight: of the features, None for 1e-3 (feature), 1 (mse, ours), 7e-5 (pooled).
    alpha: share of the response, the labels get the rest.  tau: temperature of the response.
    resize: interpolate a teacher map of another height and width.
    """
    passes, why = {"student": Pass(student, grad=True), "teacher": Pass(teacher)}, f"with variant='{variant}'"
    if variant == "response":
        where = dict(taps=bool(taps), teacher_taps=bool(teacher_taps), norms=bool(norms))
        idle("kdsnn", why, **where, weight=weight is not None, resize=resize)
        return Plan(passes, {"ce": (1 - alpha, CE()), "kd": (alpha, KD(tau))})
    idle("kdsnn", why, alpha=alpha != 0.5, tau=tau != 4.0, norms=bool(norms) and variant != "feature")
    transforms, shortcuts = [], []
    if norms:
        idle("kdsnn", "beside norms", teacher_taps=bool(teacher_taps))
        found = dict(teacher.named_modules())
        transforms = [MarginReLU(margin(found.get(name), name)) for name in norms]
        shortcuts = [shortcut(teacher, name, "kdsnn") for name in norms]
        teacher_taps, taps = norms, taps or [*getattr(student, "dims", {})]
        if len(taps) != len(norms):
            raise SpecError([f"kdsnn: {len(taps)} taps of the student and {len(norms)} norms, they go in pairs"])
        dims = [(published(student, s, "student")[1], m.margin.numel()) for s, m in zip(taps, transforms)]
    else:
        last = (taps[-1:] or [""], teacher_taps[-1:] or [""]) if variant == "pooled" else (taps, teacher_taps)
        taps, teacher_taps, dims = paired(student, teacher, *last, "kdsnn")
    if variant == "pooled":
        term: nn.Module = Pooled(taps[0], teacher_taps[0], dims[0])
    else:
        distance, decay = (mean_square, 1.0) if variant == "mse" else (partial_distance, 0.5)
        term = Features(taps, teacher_taps, dims, transforms, distance, decay, resize, shortcuts)
    weight = {"feature": 1e-3, "mse": 1.0, "pooled": 7e-5}[variant] if weight is None else weight
    return Plan(passes, {"ce": (1.0, CE()), **({"kdsnn": (weight, term)} if weight else {})})
