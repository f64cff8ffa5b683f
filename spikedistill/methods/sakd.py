"""SAKD: an ANN of the student's own architecture gives it its weights, its features and its outputs.

    level 1   every weight and running statistic of the teacher starts the student
    level 2   L_fea   = sum_k mean_{b,c,h,w} ( phi_k(mean_t F_s[t]) - F_t )^2     phi: convolution - BN, one a stage k
              L_logit = tau^2 KL( softmax(z_t / tau) || softmax(mean_t z[t] / tau) )
              L       = CE( mean_t z[t], y ) + feature(p) L_fea + logits L_logit

Reference: Qiu et al., "Self-architectural knowledge distillation for spiking neural networks", Neural Networks 178,
2024; the code read here is that of its first version, https://openreview.net/forum?id=QwFw-CcUb10.
Evidence: code
L_fea is a mean over all elements and a sum over stages, so its weight depends on neither batch nor feature size. KL is
summed over classes and averaged over the batch. Scale and preset choose what is not given:

    scale      preset          feature                                                    logits   tau   kernel   init
    cifar      paper           100                                                        1 (ours) 4     3        same
    cifar      official_code   100                                                        0        4     3        no
    imagenet   paper           10 for the first `early` of training, then 0.01            10       1     1        same
    imagenet   official_code   10 for the first 11 updates of every epoch, else 0.01      10       1     1        same

The last row is a slip in the authors' ImageNet loop, an update counted as an epoch, and what their logs show; their
CIFAR script is feature only. Kernel 1 is also that of their ResNet-19.
Differs from the code: the teacher is in evaluation mode (theirs updates its batch norms on ImageNet); phi is no part of
the student; level 1 fails where it does not fit, where theirs skips what has another name.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.schedule import Schedule
from spikedistill.core.step import Pass, Step
from spikedistill.functional import matched, mean_square, paired
from spikedistill.objectives import CE, KD
from spikedistill.spec import Count, NonNegative, Positive, Share, SpecError

Init = Literal["same", "matching", "no"]


def start_from(student: nn.Module, teacher: nn.Module, init: Init = "same") -> list[str]:
    """Level 1: copy the teacher's tensors into those of the same name and shape. Returns their names.

    Raises SpecError where one does not fit ("same") or no weight of a layer does ("matching").
    """
    mine, given = student.state_dict(), teacher.state_dict()
    fits = [name for name, x in given.items() if name in mine and mine[name].shape == x.shape]
    wrong = next((name for name in given if name not in fits), None)
    weights = {name for name, p in teacher.named_parameters() if p.ndim > 1} & {*fits}
    if (init == "same" and wrong) or not weights:
        module, _, attribute = str(wrong).rpartition(".")
        if wrong not in mine and hasattr(dict(student.named_modules()).get(module), attribute):
            how = "if a method did that, as joint_a_snn does, name sakd before it"
            raise SpecError([f"sakd.init: the student's {wrong} was rewritten before: {how}"])
        there = f"{list(mine[wrong].shape)}, not {list(given[wrong].shape)}" if wrong in mine else "missing"
        rest = "init='no' starts from the student's own weights" + (", 'matching' copies what fits" if weights else "")
        raise SpecError(
            [f"sakd.init: the teacher is of another architecture: {wrong} of the student is {there}; {rest}"]
        )
    with torch.no_grad():
        for name in fits:
            mine[name].copy_(given[name])
    return fits


def early_then(share: float, high: float = 10.0, low: float = 0.01) -> Schedule:
    """`high` over the first `share` of training, then `low`."""
    return lambda p: high if p < share else low


def burst(epochs: int, updates: int, first: int = 11, high: float = 10.0, low: float = 0.01) -> Schedule:
    """`high` for the first updates of every epoch, else `low`, in a training of `epochs` of `updates` each."""
    # the first update of an epoch may come out a rounding error before it
    return lambda p: high if (p * epochs + 1e-9) % 1 < first / updates - 1e-9 else low


class Stages(nn.Module):
    """`mean_square` of pairs of taps, summed over pairs. dims: channels of student and teacher, for each pair."""

    def __init__(
        self,
        taps: Sequence[str],
        teacher_taps: Sequence[str],
        dims: Sequence[tuple[int, int]],
        kernel: int = 3,
        resize: bool = False,
    ):
        super().__init__()
        self.taps, self.resize = {"student": [*taps], "teacher": [*teacher_taps]}, resize
        self.transform = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s, t, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(t)) for s, t in dims
        )

    def forward(self, step: Step) -> Tensor:
        losses = []
        for s, t, phi in zip(*self.taps.values(), self.transform):
            x = phi(rate(step.student.taps[s]))
            losses.append(mean_square(x, matched(rate(step.teacher.taps[t]), x, self.resize, "sakd")))
        return torch.stack(losses).sum()


def sakd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    scale: Literal["cifar", "imagenet"] = "cifar",
    preset: Literal["paper", "official_code"] = "paper",
    init: Init | None = None,
    feature: NonNegative | None = None,
    logits: NonNegative | None = None,
    tau: Positive | None = None,
    kernel: Literal[1, 3] | None = None,
    early: Share = 10 / 120,
    epochs: Count | None = None,
    updates: Count | None = None,
    taps: Sequence[str] = (),
    teacher_taps: Sequence[str] = (),
    resize: bool = False,
) -> Plan:
    """Start from the twin's weights, then labels, its features at every stage, and its outputs.

    scale, preset: choose the values of the table above for what is not given.
    init: same copies every tensor of the teacher, matching those that fit, no leaves the student as it is.
    feature: weight of the features, constant if given.  logits: weight of the outputs.  tau: their temperature.
    kernel: of the transforms of the student's features.
    early: share of training with the high weight, of imagenet and paper.
    epochs, updates: length of the training and of its epochs, of imagenet and official_code, which needs them.
    taps, teacher_taps: stages to compare, pair by pair; empty for those of one name, or all in order.
    resize: interpolate a teacher map of another height and width.
    """
    schedule: Schedule | float = early_then(early)
    if (scale, preset, feature) == ("imagenet", "official_code", None):
        if epochs is None or updates is None:
            how = "give the epochs of your training and the updates in each (theirs: 120 and 2503)"
            raise SpecError([f"sakd.epochs, sakd.updates: the authors' ImageNet schedule is made of them: {how}"])
        schedule = burst(epochs, updates)
    b, c, t, k = (100.0, float(preset == "paper"), 4.0, 3) if scale == "cifar" else (schedule, 10.0, 1.0, 1)
    b, c = b if feature is None else feature, c if logits is None else logits
    t, k = tau or t, kernel or k
    ours, theirs, dims = paired(student, teacher, taps, teacher_taps, "sakd")
    init = init or ("no" if (scale, preset) == ("cifar", "official_code") else "same")
    if init != "no":
        start_from(student, teacher, init)
    loss: dict = {"ce": (1.0, CE())}
    if b:
        loss["sakd"] = (b, Stages(ours, theirs, dims, k, resize))
    if c:
        loss["kd"] = (c, KD(t))
    return Plan({"student": Pass(student, grad=True), "teacher": Pass(teacher)}, loss)
