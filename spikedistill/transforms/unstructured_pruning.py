"""Unstructured pruning: gates on weights and neurons, pushed down in proportion to the operations they control.

    W_eff = m_w W,  s = m_n N(BN(conv(x, W_eff)))      a gate a weight, and one a neuron position [O, H, W]
    m = sigmoid(beta a) while searching in training;  m = 1[a > 0] afterwards, and always in evaluation
    R = weight sum_l [ c_w sum sigmoid(beta a_w) + c_n sum sigmoid(beta a_n) ]
    c_w = H_in W_in / stride^2                         how often a weight is used
    c_n = sum_q O_q k_q^2 / stride_q^2                 fan-out into the convolutions and linear layers q that read it
    beta = b0 (b1 / b0)^p                              p goes from 0 to 1 over the search
    L = task + R while searching, then the task alone with the gates frozen

Reference: Shi, Ding, Hao, Yu, ICLR 2024, https://openreview.net/forum?id=eoSeaK4QJo, sec. 4.
Evidence: code
Search and fine-tuning are one stage, told apart by progress. R is a plain sum over gates, the same for every batch
size; it grows with the network. The readers of a neuron are found by running the network once; pools and borders are
ignored in c, as in the code. Gates that start at 0 prune everything until they have moved: evaluation says little
before the search has ended. The first neurons, which encode the image, have no gate. `merge` folds m_w into W and m_n
into fixed maps; `sparsity` measures what is left.
Differs from the authors' code: gates are trained by the optimiser of the weights, theirs have an Adam of their own;
linear layers behind a pool count as readers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, cast

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spikedistill.core.plan import Plan
from spikedistill.core.schedule import between
from spikedistill.core.step import Batch, Pass, Step
from spikedistill.functional import put, record
from spikedistill.spec import Count, NonNegative, Positive, Share, SpecError
from spikedistill.transforms.rewrite import written
from spikedistill.transforms.survey import survey
from spikedistill.transforms.tt_snn import TTConv2d


@dataclass(frozen=True)
class Search:
    """When gates move: while progress < share, beta rising from slopes[0], at progress `hold`, to slopes[1]."""

    share: float = 0.8
    slopes: tuple[float, float] = (5.0, 1000.0)
    hold: float = 0.0

    def slope(self, p: float) -> float:
        low, high = self.slopes
        return low * (high / low) ** min(max((p - self.hold) / (self.share - self.hold), 0.0), 1.0)


class Gate(nn.Module):
    """x -> m x, for x of this shape behind axes that share the mask.  price: of an open gate, in the loss."""

    def __init__(
        self, shape: Sequence[int], price: float, search: Search = Search(), mean: float = 0.0, std: float = 0.0
    ):
        super().__init__()
        self.shape, self.price, self.search, self.hard = tuple(shape), price, search, False
        # one axis: `parameter_groups` gives that no weight decay, which would pull every gate to 0
        self.a = nn.Parameter(mean + std * torch.randn(prod(shape)))
        self.register_buffer("slope", torch.tensor(float(search.slopes[0])), persistent=False)

    def at(self, progress: float) -> None:
        self.hard = progress >= self.search.share
        self.slope.fill_(self.search.slope(progress))

    def mask(self) -> Tensor:
        """In [0, 1] while it searches in training; afterwards, and in evaluation, 0 or 1 and without a gradient."""
        if self.hard or not self.training:
            return (self.a > 0).to(self.a.dtype).view(self.shape)
        return torch.sigmoid(self.slope * self.a).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask().to(x.dtype)


class Mask(nn.Module):
    """A gate that is decided."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("m", mask.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.m.to(x.dtype)


class Gated(nn.Module):
    """Neurons whose spikes [T, B, O, H, W] pass a gate. Their membranes do not.

    convs: the convolutions that gated neurons alone read, these among them.
    """

    def __init__(self, neuron: nn.Module, gate: nn.Module, convs: Sequence[nn.Module] = ()):
        super().__init__()
        self.neuron, self.gate, self.convs = neuron, gate, tuple(convs)  # a tuple, so that they are no part of this

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        return self.gate(self.neuron(x, steps))

    def merged(self) -> nn.Module:
        return Gated(self.neuron, Mask(self.gate.mask()), self.convs) if isinstance(self.gate, Gate) else self


def unstructured_pruning(
    model: nn.Module,
    *,
    shape: Sequence[Count],
    weight: NonNegative = 5e-11,
    search: Annotated[float, Gt(0), Le(1)] = 0.8,
    slopes: tuple[Positive, Positive] = (5.0, 1000.0),
    hold: Share = 0.0,
    mean: float = 0.0,
    std: NonNegative = 0.0,
    stem: bool = False,
    head: bool = False,
) -> nn.Module:
    """Put gates, in place, on the weights of convolutions and on the spikes of neurons. Train it with `plan(model)`.

    shape: of an image, [channels, height, width].
    weight: of the penalty, for one operation; 5e-12 to 5e-11 on CIFAR-10, 1e-10 to 1e-9 on events, 5e-11 to 2e-10 on
    ImageNet.
    search: share of training in which gates move; the rest fine-tunes the weights that are left.
    slopes: beta at the start and at the end of the search; an end below 200 leaves gates undecided.
    hold: share of training before beta starts to grow.
    mean, std: of the gates at the start; 0 is the authors', a short search wants a small positive mean.
    stem: gate the weights of the first convolution too, as the authors do on CIFAR-10 and events.
    head: gate the weights of linear layers too, likewise.
    Raises SpecError where nothing would change.
    """
    if hold >= search:
        raise SpecError([f"unstructured_pruning.hold: {hold} will not do: it should be less than search={search}"])
    seen, modules, when = survey(model, shape), dict(model.named_modules()), Search(search, tuple(slopes), hold)
    first = next((n for n in seen.uses if isinstance(modules[n], nn.Conv2d)), "")
    layers = [n for n in seen.uses if (stem if n == first else head or isinstance(modules[n], nn.Conv2d))]
    neurons = [n for n in [*seen.shapes][1:] if len(seen.shapes[n]) == 3 and seen.fan_out[n]]
    if not layers and not neurons:
        raise SpecError(
            [f"unstructured_pruning: {type(model).__name__} has no convolution but the first, and no neurons"]
        )
    like = next(model.parameters())
    for name in layers:
        gate = Gate(cast(Tensor, modules[name].weight).shape, weight * seen.uses[name], when, mean, std).to(like)
        parametrize.register_parametrization(modules[name], "weight", gate)
    for name in neurons:
        gate = Gate(seen.shapes[name], weight * seen.fan_out[name], when, mean, std).to(like)
        convs = [modules[conv] for conv, behind in seen.behind.items() if name in behind and {*behind} <= {*neurons}]
        put(model, name, Gated(modules[name], gate, convs))
    model.train(model.training)
    settings = dict(shape=[*shape], weight=weight, search=search, slopes=[*slopes], hold=hold, mean=mean, std=std)
    record(model, written("unstructured_pruning", **settings, stem=stem, head=head))
    return model


def gates_of(model: nn.Module) -> list[Gate]:
    return [m for m in model.modules() if isinstance(m, Gate)]


def plan(model: nn.Module) -> Plan:
    """What training with gates adds to any method: the penalty, and their slope and end by progress.

    Merge it with the method's plan. Raises SpecError for a model without gates, or with some that folding would lose.
    """
    gates = gates_of(model)
    if not gates:
        raise SpecError(["unstructured_pruning: the student has no gates; rewrite it with the transform first"])
    if any(gates_of(m) for m in model.modules() if isinstance(m, TTConv2d)):
        raise SpecError(["unstructured_pruning: tt_snn multiplies the gated cores into a full kernel: leave out one"])

    def move(batch: Batch, progress: float) -> Batch:
        for gate in gates:
            gate.at(progress)
        return batch

    def penalty(step: Step) -> Tensor:
        return torch.stack([gate.price * gate.mask().sum() for gate in gates]).sum()

    loss: dict = {"synops": (between(0.0, gates[0].search.share), penalty)}
    return Plan({"student": Pass(model, grad=True)}, loss, prepare=move)
