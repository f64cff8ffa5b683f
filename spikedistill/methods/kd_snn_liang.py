"""SuperSNN, in the style of Knowledge Distill for SNNs: which samples look alike, the same in student and teacher.

    U_s = mean_t F_s[t], U_t = F_t     one row a sample; both maps averaged over space where their sizes differ
    G = U U^T                          [B, B] similarities within the batch
    G^_i = G_i / |G_i|                 normalise="row"; "vector": rows of U of length 1 instead, so G^ holds cosines
    L_rel = (1/B^2) sum_ij (G^_s - G^_t)^2                  no gradient to the teacher; mean over the taps
    L     = CE( mean_t z[t], y ) + weight L_rel

Reference: Liang, Chao, Li, Zhao, IJCNN 2024, https://openreview.net/forum?id=kKLnXRCd20, of which no equation could be
read. L_rel with "row" is similarity-preserving distillation, Tung, Mori 2019, https://arxiv.org/abs/1907.09682, sec. 3.
Evidence: reconstruction
Known from the abstract and the reviews of an earlier submission (SuperSNN): similarity matrices on one scale, the time
mean, average pooling, labels beside. Ours: which tap, the normalisation, the weight, pooling to 1x1, `time="flatten"`.
The mean is over B^2 pairs. With "row" the rows have length 1, so 0 <= L_rel <= 4/B falls as 1/B: for the same pull, a
batch of twice the size takes twice the weight. With "vector" the weight does not depend on B; it never depends on the
size of the features. Pairs are those of one device. A silent sample has a row of zeros and gets no gradient.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan, Terms
from spikedistill.core.step import Pass, Step
from spikedistill.core.taps import published
from spikedistill.functional import wide
from spikedistill.objectives import CE
from spikedistill.spec import NonNegative, SpecError

Normalise = Literal["row", "vector"]
Time = Literal["mean", "flatten"]


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:  # [B, N] -> same
    """Rows of length 1. A row of zeros stays, and gets no gradient where division by eps would give a huge one."""
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > eps, x / norm.clamp_min(eps), 0.0)


def similarity(u: Tensor, normalise: Normalise = "row", exclude_diagonal: bool = False) -> Tensor:  # [B, d] -> [B, B]
    """How alike the samples of a batch are, on one scale. Without the diagonal it is 0 before rows are normalised."""
    u = wide(u)
    with torch.autocast(u.device.type, enabled=False):
        u = unit(u) if normalise == "vector" else u
        g = u @ u.T
    g = g - g.diag().diag() if exclude_diagonal else g
    return unit(g) if normalise == "row" else g


def relational_loss(
    student: Tensor, teacher: Tensor, normalise: Normalise = "row", exclude_diagonal: bool = False
) -> Tensor:  # [B, d_s], [B, d_t] -> []
    """Mean square difference of the two similarity matrices, over the pairs compared; 0 for a single sample."""
    n = len(student)
    if n == 1:
        warnings.warn("kd_snn_liang: a batch of one sample has no pairs, the loss is 0", stacklevel=2)
        return 0.0 * wide(student).sum()
    ours, theirs = (similarity(u, normalise, exclude_diagonal) for u in (student, teacher.detach()))
    return (ours - theirs).square().sum() / (n * (n - 1) if exclude_diagonal else n * n)


def space(x: Tensor) -> tuple[int, ...]:
    """What is left of [T, B, C, H, W], tokens [T, B, N, D] or vectors [T, B, D] without time, batch and channels."""
    return x.shape[3:] if x.ndim == 5 else x.shape[2:-1]


def pooled(x: Tensor) -> Tensor:  # [T, B, ...] -> [T, B, channels]
    """The mean over space."""
    return wide(x).mean((3, 4)) if x.ndim == 5 else wide(x).mean(2) if x.ndim == 4 else x


class Relational(nn.Module):
    """`relational_loss` between pairs of taps, averaged over them.

    time: "mean" of the student's steps, or "flatten", which compares whole sequences.
    """

    def __init__(
        self,
        student: Sequence[str],
        teacher: Sequence[str],
        normalise: Normalise = "row",
        time: Time = "mean",
        exclude_diagonal: bool = False,
    ):
        super().__init__()
        self.taps = {"student": [*student], "teacher": [*teacher]}
        self.normalise, self.time, self.exclude_diagonal = normalise, time, exclude_diagonal

    def forward(self, step: Step) -> Tensor:
        losses = [self.pair(step.student.taps[s], step.teacher.taps[t]) for s, t in zip(*self.taps.values())]
        return torch.stack(losses).mean()

    def pair(self, s: Tensor, t: Tensor) -> Tensor:
        """[T, B, ...], [T, B, ...] -> []"""
        if space(s) != space(t):
            s, t = pooled(s), pooled(t)
        s = rate(wide(s)) if self.time == "mean" else s.transpose(0, 1)
        return relational_loss(s.flatten(1), rate(wide(t)).flatten(1), self.normalise, self.exclude_diagonal)


def kd_snn_liang(
    student: nn.Module,
    teacher: nn.Module,
    *,
    taps: Sequence[str] = (),
    teacher_taps: Sequence[str] = (),
    weight: NonNegative = 3000.0,  # ours
    normalise: Normalise = "row",  # ours
    time: Time = "mean",
    exclude_diagonal: bool = False,
) -> Plan:
    """Labels, and the similarities between the samples of a batch.

    taps, teacher_taps: features to compare, pair by pair; empty for the last map of each model.
    weight: of the similarity term; for 'row' it should grow with the batch, see above.
    normalise: row divides the rows of the matrix by their length, vector the feature of each sample.
    time: mean of the steps, or flatten to compare sequences.
    exclude_diagonal: leave out how alike a sample is to itself.
    """
    if len(taps or " ") != len(teacher_taps or " "):
        raise SpecError([f"kd_snn_liang: {len(taps)} taps and {len(teacher_taps)} teacher_taps, they go in pairs"])
    ours = [published(student, tap, "student")[0] for tap in taps or [""]]
    theirs = [published(teacher, tap, "teacher")[0] for tap in teacher_taps or [""]]
    loss: Terms = {"ce": (1.0, CE())}
    if weight:
        loss["kd_snn_liang"] = (weight, Relational(ours, theirs, normalise, time, exclude_diagonal))
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
