"""Cross knowledge distillation (CKD): an ANN on RGB images teaches a spiking network that is to work on events.

    o_h, o_e                            logits of the hybrid stream (images turning into events, P = p^3) and of events
    w(p) = 1 / (1 + exp(k (p - 1/2)))   1 up to p = on, 0 from p = off: the teacher is only asked before that
    L_kd = tau^2 (1/B) sum_b KL( softmax(z_t / tau) || softmax(mean_t o_h[t] / tau) )         hybrid stream alone
    l[t] = (1 - lam) CE(o[t], y) + lam mean( (o[t] - phi)^2 )
    L    = (1/T) sum_t l_h[t]  +  (1/T) sum_t (1 - sigmoid(eta_t)) l_e[t]
         + align (1/T) sum_t sigmoid(eta_t) (1 - CKA(V_h[t], V_e[t]))  +  weight w(p) L_kd

Reference: Ye, Qian, Wang, Lin, Xu, Qian, Li, ICME 2025, https://arxiv.org/abs/2507.09269, overview figure. All but L_kd
is the method it builds on, `static2dvs`, https://arxiv.org/abs/2303.13077.
Evidence: partly: streams, sum of terms and phases are those of the figure, w is measured on it; the forms of all but
L_kd are taken from static2dvs; divergence, tau and weight are ours.
KL is summed over classes and averaged over the batch. A batch has "x", events [T, B, C, H, W], and for each of them an
image of its class: "source" as `static2dvs` has it and "rgb" as the teacher sees it, which is never replaced. While the
teacher is on, hardly any sample is: 1.7 % on average up to p = 0.41; `mask_replaced` leaves those out of L_kd.
With two heads L_kd reaches the shared layers alone, with `shared_head` the classifier of events too.
What differs from the code of static2dvs does so here: pixels of events are summed, not resized bilinearly; no sampler
draws classes evenly; potentials are aligned where their ResNet has its last norm averaged over space (see `pool`).
"""

from math import tanh
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.output import rate
from spikedistill.core.plan import Plan
from spikedistill.core.schedule import Schedule, power
from spikedistill.core.step import Pass, Step
from spikedistill.functional import idle, potential, replace_source, wide
from spikedistill.objectives import Alignment, Head, StepLabels, StepWeights, static_head
from spikedistill.spec import Count, NonNegative, Positive, Share, SpecError

Divergence = Literal["kl", "mse"]


def phase(on: float = 0.41, off: float = 0.58, middle: float = 0.5, steepness: float = 60.0) -> Schedule:
    """w(p): exactly 1 up to `on`, exactly 0 from `off`, between them a falling logistic that is 1/2 at `middle`."""
    if not on < middle < off:
        raise SpecError(
            [f"ckd.middle: {middle} will not do: one half lies between whole, on={on}, and none, off={off}"]
        )
    return lambda p: 1.0 if p <= on else 0.0 if p >= off else (1 - tanh(steepness * (p - middle) / 2)) / 2


def guidance_loss(
    student: Tensor, teacher: Tensor, tau: float = 2.0, keep: Tensor | None = None, divergence: Divergence = "kl"
) -> Tensor:  # [T, B, C], [B, C], [B] -> []
    """tau^2 KL, or the mean square difference of logits, averaged over T and over the samples to `keep`."""
    student, teacher = wide(student), wide(teacher.detach()).expand_as(student)
    if divergence == "mse":
        each = (student - teacher).square().mean((0, 2))
    else:
        log_s, log_t = F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1)
        each = tau**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean(0)
    return each.mean() if keep is None else (each * keep).sum() / keep.sum().clamp_min(1)


class CKD(nn.Module):
    """L_kd on the hybrid stream, through its head where it has one."""

    def __init__(
        self,
        head: Head | None,
        tau: float = 2.0,
        divergence: Divergence = "kl",
        per_step: bool = False,
        mask_replaced: bool = False,
    ):
        super().__init__()
        self.head, self.tau, self.divergence = head, tau, divergence
        self.per_step, self.mask_replaced = per_step, mask_replaced
        self.taps = {} if head is None else head.taps

    def forward(self, step: Step) -> Tensor:
        z = step["source"].logits if self.head is None else self.head(step)
        keep = ~step.batch["swapped"] if self.mask_replaced else None
        z = z if self.per_step else rate(z)[None]
        return guidance_loss(z, rate(step.teacher.logits), self.tau, keep, self.divergence)


def ckd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: NonNegative = 1.0,
    tau: Positive = 2.0,  # ours
    divergence: Divergence = "kl",  # ours
    kd_per_step: bool = False,
    mask_replaced: bool = False,
    phases: Literal["logistic", "step", "constant"] = "logistic",
    on: Share = 0.41,
    off: Share = 0.58,
    middle: Share = 0.5,
    steepness: Positive = 60.0,
    align: NonNegative = 0.5,
    exponent: Positive = 3.0,
    regularise: bool = True,
    lam: Share = 1e-3,
    phi: float = 0.5,
    steps: Count | None = None,
    feature: str = "",
    pool: bool = False,
    tap: str = "",
    grid: Count = 1,
    shared_head: bool = False,
    classes: Count | None = None,
) -> Plan:
    """Train on events with images of the same classes, and in the first half of training with an ANN that sees them.

    weight: of the distillation term.  tau: its temperature.  divergence: kl, or mse of the logits.
    kd_per_step: compare the teacher with every step of the hybrid stream instead of with its time mean.
    mask_replaced: leave samples that are events already out of the distillation term.
    phases: logistic as the paper draws it; step ends it at `middle`; constant never does.
    on, off: progress up to which it is whole, and from which there is none.  middle: progress of one half.
    steepness: k of the logistic.
    align: weight of the alignment of the two streams.
    exponent: of the chance that an image is replaced, as progress grows.
    regularise: learned weights of the time steps; False has 1 everywhere.
    lam: share of the mean-square term of the labels.  phi: what it draws the logits to.
    steps: time steps of the events, None for those of the student.
    feature: tap to align; empty for the potentials of the last neurons of the last map.  pool: average it over space.
    tap: map under the head of the hybrid stream; empty for the last one.
    grid: height and width to which that head averages it.
    shared_head: classify the hybrid stream with the student's own head.
    classes: None for the outputs of the student's last linear layer.
    """
    how = dict(on=on != 0.41, off=off != 0.58, steepness=steepness != 60.0)
    idle("ckd", f"with phases='{phases}'", **{k: v and phases != "logistic" for k, v in how.items()})
    idle("ckd", "with phases='constant'", middle=phases == "constant" and middle != 0.5)
    idle("ckd", "with divergence='mse'", tau=divergence == "mse" and tau != 2.0)
    idle("ckd", "with regularise=False", steps=steps is not None and not regularise)
    curve: dict[str, Schedule] = {"step": lambda p: float(p <= middle), "constant": lambda p: 1.0}
    chance, w = power(exponent), curve[phases] if phases in curve else phase(on, off, middle, steepness)
    feature = potential(student, feature, "ckd")
    weights = StepWeights(steps or getattr(student, "steps", 1), regularise)
    head = static_head(student, shared_head, tap, grid, classes, "ckd")
    events, hybrid = Pass(student, grad=True), Pass(student, x="source", grad=True)
    return Plan(
        {"student": events, "source": hybrid, "teacher": Pass(teacher, x="rgb")},
        {
            "ckd_source": (1.0, StepLabels("source", lam, phi, head=head)),
            "ckd_event": (1.0, StepLabels("student", lam, phi, weights=weights)),
            "ckd_align": (align, Alignment(feature, weights, pool)),
            "ckd": (lambda p: weight * w(p), CKD(head, tau, divergence, kd_per_step, mask_replaced)),
        },
        prepare=lambda batch, progress: replace_source(batch, chance(progress), "ckd"),
    )
