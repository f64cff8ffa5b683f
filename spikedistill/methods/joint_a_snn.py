"""Joint A-SNN: one skeleton run with ReLU and with spikes, trained together, kernels sharing their singular vectors.

    W_m[:, :, i, j] = U_ij diag(sigma_m,ij) V_ij       m = ann, snn; U, V shared, sigma, norms and classifiers apart
    a_i, n_i: logits [B, C] of exit i in ANN and SNN mode; f_i^A, f_i^S: the pooled features before them; 4 is the last
    L_label = sum_i ( CE(a_i, y) + CE(n_i, y) )
    L_self  = tau^2 sum_{i<4} H( softmax(a_4 / tau), softmax(a_i / tau) )      no gradient to a_4
    L_cross = tau^2 sum_i     H( softmax(a_i / tau), softmax(n_i / tau) )      no gradient to a_i
    L_feat  = (1/B) sum_i sum_{b,c} ( f_i^S - f_i^A )^2                        no gradient to f_i^A
    L       = (1 - alpha) L_label + alpha (L_self + L_cross) + beta L_feat

Reference: Guo, Peng, Chen, Zhang, Liu, Huang, Ma, Pattern Recognition 142 (2023), https://arxiv.org/abs/2305.02099.
Evidence: code
SNN logits and features are summed over time, so tau = 3 is tau / T on their mean; readout="mean" takes that instead.
Cross-entropies are means over the batch. L_feat is a sum over channels and a mean over the batch: the authors' 1e-6 on
a sum over their batch of 1024 is beta = 1.024e-3 here. The ANN is a copy of the student made by the builder and trained
as pass "ann"; a given teacher is not used. The builder rewrites the student in place (`factorise`); `transforms.merge`
makes its kernels plain again. Early exits are training-only, with the student's neurons and shared factors.
Differs from the authors' code: kernels are permuted before the SVD, not reshaped, so they start as they were; the
statistics of norms are over all steps at once; frames in ANN mode are averaged.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spikedistill.core.output import Output
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass, Step
from spikedistill.core.taps import published
from spikedistill.functional import classes_of, put, record, wide
from spikedistill.neurons import Neuron, ReLU
from spikedistill.spec import Count, NonNegative, Positive, Share, SpecError

Readout = Literal["sum", "mean"]


class Factors(nn.Module):
    """A kernel [O, I, k, k] from U [k, k, O, r], sigma [k, k, r] and V [k, k, r, I] with r = min(O, I)."""

    def forward(self, u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(u.device.type, enabled=False):
            return ((u * sigma[..., None, :]) @ v).permute(2, 3, 0, 1)

    def right_inverse(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.linalg.svd(kernel.permute(2, 3, 0, 1), full_matrices=False))


def factors(model: nn.Module) -> list[parametrize.ParametrizationList]:
    """Where convolutions keep their factors (original0: U, original1: sigma, original2: V)."""
    kept = [m for m in model.modules() if isinstance(m, parametrize.ParametrizationList)]
    return [m for m in kept if isinstance(m[0], Factors)]


def factorise(model: nn.Module) -> nn.Module:
    """Keep every convolution, in place, as free factors that start at its singular value decomposition.

    Raises SpecError where there is nothing to factorise.
    """
    plain = [m for m in model.modules() if isinstance(m, nn.Conv2d) and not parametrize.is_parametrized(m)]
    if not plain:
        raise SpecError([f"factorise: {type(model).__name__} has no plain convolution"])
    for conv in plain:
        parametrize.register_parametrization(conv, "weight", Factors())
    record(model, "factorise")
    return model


def twin(model: nn.Module) -> Any:
    """The ANN mode of a factorised model: a copy with ReLU for neurons; it shares U, V and linear biases."""
    shared: list[Any] = [p for kept in factors(model) for p in (kept.original0, kept.original2)]
    shared += [m.bias for m in model.modules() if isinstance(m, nn.Linear)]
    ann = copy.deepcopy(model, {id(p): p for p in shared})  # what is in the memo is taken as it is
    for name, module in model.named_modules():
        if isinstance(module, Neuron):
            put(ann, name, ReLU())
    return ann


class Exit(nn.Module):
    """An early exit: 1x1, k x k with stride k, 1x1, each with norm and neuron; average over space; linear."""

    def __init__(self, channels: int, k: int, width: int, out: int, classes: int, neuron: nn.Module):
        super().__init__()
        sizes = [(channels, width, 1), (width, width, k), (width, out, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, k, bias=False) for i, o, k in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)
        self.neurons = nn.ModuleList(copy.deepcopy(neuron) for _ in sizes)
        self.head = nn.Linear(out, classes)
        for conv in self.convs.parameters():
            nn.init.kaiming_normal_(conv, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [T, B, c, H, W] -> [T, B, C], [T, B, out]
        for conv, norm, neuron in zip(self.convs, self.norms, self.neurons):
            x = neuron(norm(conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))
        f = x.mean((-2, -1))
        return wide(self.head(f)), f


def label_loss(z: Tensor, y: Tensor) -> Tensor:  # [exits, B, C], [B] or [B, C] -> []
    """Cross-entropy of every exit, summed over the exits."""
    return torch.stack([F.cross_entropy(logits, y) for logits in z]).sum()


def soft_loss(z: Tensor, target: Tensor, tau: float) -> Tensor:  # [exits, B, C], [exits or 1, B, C] -> []
    """tau^2 times the soft cross-entropy, summed over the exits; the target gets no gradient."""
    h = -(F.softmax(target.detach() / tau, -1) * F.log_softmax(z / tau, -1)).sum(-1)
    return tau**2 * h.mean(1).sum()


def feature_loss(student: Tensor, ann: Tensor) -> Tensor:  # [exits, B, c], [exits, B, c] -> []
    """Squared error, summed over channels and exits; the ANN gets no gradient."""
    return (wide(student) - wide(ann.detach())).square().sum(2).mean(1).sum()


class JointASNN(nn.Module):
    """L, with the early exits of both modes."""

    def __init__(
        self, exits: Sequence[nn.Module], taps: Sequence[str], alpha: float, beta: float, tau: float, readout: Readout
    ):
        super().__init__()
        self.alpha, self.beta, self.tau, self.readout = alpha, beta, tau, readout
        self.taps = {"student": [*taps], "ann": [*taps]}
        self.snn: Any = factorise(nn.ModuleList(exits)) if exits else nn.ModuleList()
        self.ann = twin(self.snn)

    def read(self, exits: nn.ModuleList, out: Output, readout: Readout) -> tuple[Tensor, Tensor]:
        """Logits [exits, B, C] and features [exits, B, c] of all exits, the last one last."""
        *early, last = (out.taps[tap] for tap in self.taps["student"])
        pairs = [branch(x) for branch, x in zip(exits, early)] + [(out.logits, last.mean((-2, -1)))]
        z, f = (torch.stack(over_time, 1) for over_time in zip(*pairs))  # [T, exits, B, ...]
        return (z.sum(0), f.sum(0)) if readout == "sum" else (z.mean(0), f.mean(0))

    def forward(self, step: Step) -> Tensor:
        n, fs = self.read(self.snn, step.student, self.readout)
        a, fa = self.read(self.ann, step["ann"], "mean")
        soft = soft_loss(a[:-1], a[-1:], self.tau) + soft_loss(n, a, self.tau)
        loss = (1 - self.alpha) * label_loss(torch.cat([a, n]), step.batch["y"]) + self.alpha * soft
        return loss + self.beta * feature_loss(fs, fa)


def joint_a_snn(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    alpha: Share = 0.1,
    beta: NonNegative = 1.024e-3,
    tau: Positive = 3.0,
    readout: Readout = "sum",
    exits: Sequence[str] = (),
    strides: Sequence[Count] = (),
    width: Count = 128,
    classes: Count | None = None,
) -> Plan:
    """Train a student and its ANN twin together; needs no teacher. Factorises the student's convolutions in place.

    alpha: share of the soft terms against the labels.  beta: weight of the features.  tau: temperature.
    readout: sum of the steps, as the authors have it, or mean.
    exits: taps of the early exits; empty for all but the last map.
    strides: of the early exits, to bring their maps to one size; empty for 2 before the last, 4 before that, and so on.
    width: channels inside an early exit.  classes: None for the outputs of the student's last linear layer.
    """
    last, out = published(student, "", "student")
    taps: Sequence[str] = exits or [tap for tap in getattr(student, "dims", ()) if tap != last]
    early = [published(student, tap, "student") for tap in taps]
    strides = strides or [2 ** (len(early) - i) for i in range(len(early))]
    if len(strides) != len(early):
        raise SpecError([f"joint_a_snn.strides: {len(strides)} strides for {len(early)} early exits"])
    neuron = next((m for m in student.modules() if isinstance(m, Neuron)), None)
    if neuron is None:
        raise SpecError([f"joint_a_snn: the student ({type(student).__name__}) has no spiking neurons"])
    size = classes_of(student, classes, "joint_a_snn")
    convs = [m for m in student.modules() if isinstance(m, nn.Conv2d) and parametrize.is_parametrized(m)]
    if len(convs) > sum(len(m) == 1 for m in factors(student)):
        raise SpecError(["joint_a_snn: kernels with gates have no factors for the ANN to share: leave out one"])
    student = student if convs else factorise(student)
    branches = [Exit(channels, k, width, out, size, neuron) for (_, channels), k in zip(early, strides)]
    objective = JointASNN(branches, [*(tap for tap, _ in early), last], alpha, beta, tau, readout)
    passes = {"student": Pass(student, grad=True), "ann": Pass(twin(student), grad=True)}
    return Plan(passes, {"joint_a_snn": (1.0, objective)})
