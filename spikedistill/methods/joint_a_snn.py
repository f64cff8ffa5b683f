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
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spikedistill.core.output import Output, rate
from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass, Step
from spikedistill.core.taps import published
from spikedistill.functional import soft_cross_entropy, wide
from spikedistill.neurons import Neuron, ReLU
from spikedistill.spec import Count, NonNegative, Positive, Share, SpecError

Model = TypeVar("Model", bound=nn.Module)
Readout = Literal["sum", "mean"]


class Factors(nn.Module):
    """A kernel [O, I, k, k] from U [k, k, O, r], sigma [k, k, r] and V [k, k, r, I] with r = min(O, I)."""

    def forward(self, u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(u.device.type, enabled=False):
            return ((u * sigma[..., None, :]) @ v).permute(2, 3, 0, 1)

    def right_inverse(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.linalg.svd(kernel.permute(2, 3, 0, 1), full_matrices=False))


def factors(module: nn.Module) -> parametrize.ParametrizationList | None:
    """Where a convolution keeps its factors (original0: U, original1: sigma, original2: V); None if it has none."""
    kept = getattr(module, "parametrizations", {"weight": None})["weight"]
    return kept if isinstance(kept, parametrize.ParametrizationList) and isinstance(kept[0], Factors) else None


def factorise(model: nn.Module) -> nn.Module:
    """Keep every convolution, in place, as free factors that start at its singular value decomposition.

    Raises SpecError where there is nothing to factorise.
    """
    plain = [m for m in model.modules() if isinstance(m, nn.Conv2d) and not parametrize.is_parametrized(m)]
    if not plain:
        raise SpecError([f"factorise: {type(model).__name__} has no plain convolution"])
    for conv in plain:
        parametrize.register_parametrization(conv, "weight", Factors())
    if isinstance(spec := getattr(model, "spec", None), dict):
        done = spec | {"transforms": [*spec.get("transforms", []), "factorise"]}
        setattr(model, "spec", done)  # noqa: B010, an attribute that nn.Module does not declare
    return model


def twin(model: Model) -> Model:
    """The ANN mode of a factorised model: a copy with ReLU for neurons; it shares U, V and linear biases."""
    ann = copy.deepcopy(model)
    for name, module in model.named_modules():
        other = ann.get_submodule(name)
        if (ours := factors(module)) is not None and (theirs := factors(other)) is not None:
            theirs.original0, theirs.original2 = ours.original0, ours.original2
        elif isinstance(module, nn.Linear):
            other.bias = module.bias
    for name, module in model.named_modules():
        if isinstance(module, Neuron):
            parent, _, leaf = name.rpartition(".")
            setattr(ann.get_submodule(parent), leaf, ReLU())
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
        return self.head(f), f


Exits = list[Tensor]  # one an exit, the last one last: logits [B, C] or features [B, c]


def label_loss(a: Exits, n: Exits, y: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(z, y) for z in (*a, *n)]).sum()


def soft_loss(logits: Tensor, target: Tensor, tau: float) -> Tensor:  # [B, C], [B, C] -> []
    """tau^2 times the soft cross-entropy, mean over the batch; the target gets no gradient."""
    return tau**2 * soft_cross_entropy(logits / tau, F.softmax(target.detach() / tau, -1)).mean()


def self_loss(a: Exits, tau: float) -> Tensor:
    return sum((soft_loss(early, a[-1], tau) for early in a[:-1]), torch.zeros((), device=a[-1].device))


def cross_loss(n: Exits, a: Exits, tau: float) -> Tensor:
    return torch.stack([soft_loss(student, target, tau) for student, target in zip(n, a)]).sum()


def feature_loss(student: Exits, ann: Exits) -> Tensor:
    return torch.stack([(wide(s) - wide(a.detach())).square().sum(1).mean() for s, a in zip(student, ann)]).sum()


class JointASNN(nn.Module):
    """L, with the early exits of both modes."""

    def __init__(
        self,
        exits: Sequence[nn.Module],
        taps: Sequence[str],
        alpha: float = 0.1,
        beta: float = 1.024e-3,
        tau: float = 3.0,
        readout: Readout = "sum",
    ):
        super().__init__()
        self.alpha, self.beta, self.tau, self.readout = alpha, beta, tau, readout
        self.taps = {"student": [*taps], "ann": [*taps]}
        self.snn = nn.ModuleList(exits)
        if exits:
            factorise(self.snn)
        self.ann = twin(self.snn)

    def read(self, exits: Iterable[nn.Module], out: Output, total: bool) -> tuple[Exits, Exits]:
        """Logits and features of all exits, over time."""
        *early, last = (out.taps[tap] for tap in self.taps["student"])
        pairs = [branch(x) for branch, x in zip(exits, early)] + [(out.logits, last.mean((-2, -1)))]
        over_time = (lambda x: x.sum(0)) if total else rate
        return [over_time(z) for z, _ in pairs], [over_time(f) for _, f in pairs]

    def forward(self, step: Step) -> Tensor:
        n, fs = self.read(self.snn, step.student, self.readout == "sum")
        a, fa = self.read(self.ann, step["ann"], False)
        soft = self_loss(a, self.tau) + cross_loss(n, a, self.tau)
        loss = (1 - self.alpha) * label_loss(a, n, step.batch["y"]) + self.alpha * soft
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
    neuron = next((m for m in student.modules() if isinstance(m, Neuron)), None)
    linear = [m for m in student.modules() if isinstance(m, nn.Linear)]
    strides = strides or [2 ** (len(early) - i) for i in range(len(early))]
    if neuron is None or not (classes or linear):
        what = "no spiking neurons" if neuron is None else "no linear layer: set classes="
        raise SpecError([f"joint_a_snn: the student ({type(student).__name__}) has {what}"])
    if len(strides) != len(early):
        raise SpecError([f"joint_a_snn.strides: {len(strides)} strides for {len(early)} early exits"])
    if all(factors(m) is None for m in student.modules()):
        factorise(student)
    size = classes or linear[-1].out_features
    branches = [Exit(channels, k, width, out, size, neuron) for (_, channels), k in zip(early, strides)]
    objective = JointASNN(branches, [*(tap for tap, _ in early), last], alpha, beta, tau, readout)
    passes = {"student": Pass(student, grad=True), "ann": Pass(twin(student), grad=True)}
    return Plan(passes, {"joint_a_snn": (1.0, objective)})
