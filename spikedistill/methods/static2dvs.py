"""Static to event transfer: one network on event clips and static images, which turn into events during training.

    P(p) = p^3                          each static sample is swapped for the event sample of its pair with this chance
    d[t]  = 1 - CKA( V_s[t], V_e[t] )   membrane potentials of both streams, post reset, in one batch
    l[t]  = (1 - lam) CE(z[t], y) + lam mean( (z[t] - phi)^2 )                     TET, for static and event stream
    L_s   = (1/T) sum_t l_s[t]                                                     own head h_s, in training only
    L_e   = (1/T) sum_t (1 - sigmoid(eta_t)) l_e[t]                                the student's own head
    L_da  = (1/T) sum_t sigmoid(eta_t) d[t]
    L     = L_s + L_e + align L_da      no teacher; eta_t is learned from 1; no gradient is stopped

Reference: He, Zhao, Li, Shen, Kong, Zeng, AAAI 2024, https://arxiv.org/abs/2303.13077.
Evidence: code
CE is a mean over the batch. CKA is one number a batch, that of each device where there are several; it does not depend
on the size of a feature, and a batch of one sample gives none (d = 1). While l_e[t] > align d[t], eta_t rises and takes
weight from the labels. A batch has "x", events [T, B, C, H, W], and "source", for each of them a static image of its
class, [B, C', H, W]. Images of other channels than the events enter as V = max over RGB, repeated over channels and T.
Differs from the authors' code: BatchNorm takes its statistics over T and B of a stream at once, not step by step. In
both images run first, then events: of the running ones 53 % are of events here, 74 % there (momentum 0.1, T = 10).
With sliding=False the code also leaves L_da out, which is align=0 here. Pixels of events are summed where frames are
smaller than the sensor; theirs are resized bilinearly, which averages. No sampler draws the classes evenly; theirs does
for N-Caltech101. Their ResNet aligns no potentials, but a norm of its last map averaged over space, [B, 512]; for
ms_resnet18, which has no norm there, feature="stage4", pool=True is nearest.
The static head sees the last map averaged to grid x grid; the authors' VGG-SNN is grid=3, their ResNet grid=1.
"""

from torch import nn

from spikedistill.core.plan import Plan
from spikedistill.core.schedule import Schedule, power
from spikedistill.core.step import Pass
from spikedistill.functional import idle, potential, replace_source
from spikedistill.objectives import Alignment, StepLabels, StepWeights, static_head
from spikedistill.spec import Count, NonNegative, Positive, Share


def static2dvs(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    align: NonNegative = 0.5,
    exponent: Positive = 3.0,
    sliding: bool = True,
    regularise: bool = True,
    per_step: bool = True,
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
    """Train on events with the help of static images of the same classes; needs no teacher.

    align: weight of the alignment of the two streams.
    exponent: of the chance that a static sample is replaced, as progress grows.
    sliding: False replaces none in the first half of training and all in the second.
    regularise: learned weights of the time steps; False has 1 everywhere.
    per_step: labels at every step; False compares the time mean, and the weights then serve the alignment only.
    lam: share of the mean-square term of the labels.  phi: what it draws the logits to, the authors' firing threshold.
    steps: time steps of the events, None for those of the student.
    feature: tap to align; empty for the potentials of the last neurons of the last map, "stage3.0.neuron" takes spikes.
    pool: average it over space before.
    tap: map under the static head; empty for the last one.  grid: height and width to which that head averages it.
    shared_head: classify static images with the student's own head.
    classes: None for the outputs of the student's last linear layer.
    """
    labels = dict(lam=lam != 1e-3, phi=phi != 0.5)
    idle("static2dvs", "with per_step=False", **{name: given and not per_step for name, given in labels.items()})
    idle("static2dvs", "with sliding=False", exponent=exponent != 3.0 and not sliding)
    idle("static2dvs", "with regularise=False", steps=steps is not None and not regularise)
    chance: Schedule = power(exponent) if sliding else lambda p: float(p >= 0.5)
    feature = potential(student, feature, "static2dvs")
    weights = StepWeights(steps or getattr(student, "steps", 1), regularise)
    head = static_head(student, shared_head, tap, grid, classes, "static2dvs")
    return Plan(
        {"student": Pass(student, grad=True), "source": Pass(student, x="source", grad=True)},
        {
            "static2dvs_source": (1.0, StepLabels("source", lam, phi, per_step, head)),
            "static2dvs_event": (1.0, StepLabels("student", lam, phi, per_step, weights=weights)),
            "static2dvs_align": (align, Alignment(feature, weights, pool)),
        },
        prepare=lambda batch, progress: replace_source(batch, chance(progress), "static2dvs"),
    )
