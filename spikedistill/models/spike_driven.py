"""Spike-driven Transformer: attention by masks, whose products are of spikes, and membranes on every shortcut.

    F = BN(conv(..))                         three 3x3 convolutions with neurons and one without
    x <- F + BN(conv(N(F)))                  position
    x <- x + BN(W (Q * N'(sum over tokens of K * V))),  Q, K, V = N(BN(W N(x)))         N' fires at 0.5
    x <- x + BN(W2 N(BN(W1 N(x))))

Yao, Hu, Zhou, Yuan, Tian, Xu, Li 2023, https://arxiv.org/abs/2307.01694.
Differs from the paper: tokens stay maps, [T, B, D, H, W] in place of [T, B, N, D]. The sum over tokens is one per
channel, so the number of heads changes nothing and is no setting; unused layers of the released code are left out.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from spikedistill.models.layers import (
    BatchNorm2d,
    Conv2d,
    MakeNeuron,
    MaxPool2d,
    Network,
    NeuronName,
    spiking_conv,
    with_threshold,
)
from spikedistill.models.spikformer import groups
from spikedistill.neurons import Sigmoid, make
from spikedistill.spec import Count, Positive, SpecError


def currents(channels: int, out: int, kernel: int = 1, bias: bool = True) -> nn.Sequential:
    """A convolution and its norm, without a neuron."""
    return nn.Sequential(Conv2d(channels, out, kernel, 1, kernel // 2, bias=bias), BatchNorm2d(out))


class MaskAttention(nn.Module):
    """Membranes [T, B, D, H, W] -> currents of the same shape. v_th: threshold of the neuron that makes the mask."""

    def __init__(self, dim: int, v_th: float, neuron: MakeNeuron):
        super().__init__()
        self.neuron = neuron()
        self.q = spiking_conv(dim, dim, 1, neuron=neuron)
        self.k = spiking_conv(dim, dim, 1, neuron=neuron)
        self.v = spiking_conv(dim, dim, 1, neuron=neuron)
        self.mask = with_threshold(neuron, v_th)
        self.project = currents(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        s = self.neuron(x)
        mask = self.mask((self.k(s) * self.v(s)).sum((-2, -1), keepdim=True))
        return self.project(self.q(s) * mask)


class Block(nn.Module):
    """x + attention(x), then x + MLP(x): sums of currents, before the neurons."""

    def __init__(self, dim: int, hidden: int, v_th: float, neuron: MakeNeuron):
        super().__init__()
        self.attention = MaskAttention(dim, v_th, neuron)
        self.mlp = nn.Sequential(
            neuron(), spiking_conv(dim, hidden, 1, neuron=neuron, bias=True), currents(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Embedding(nn.Module):
    """Image to membranes: widths D/8, D/4, D/2, D, a max pool after the layers in `pools`, then x + conv(N(x))."""

    def __init__(self, channels: int, dim: int, pools: Sequence[int], neuron: MakeNeuron):
        super().__init__()
        widths = [channels, dim // 8, dim // 4, dim // 2]
        self.layers = nn.ModuleList(spiking_conv(c, d, neuron=neuron) for c, d in pairwise(widths))
        self.pools = nn.ModuleList(MaxPool2d(3, 2, 1) if i in pools else nn.Identity() for i in range(1, 5))
        self.last = currents(dim // 2, dim, 3, bias=False)
        self.position = nn.Sequential(neuron(), currents(dim, dim, 3, bias=False))

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for layer, pool in zip(self.layers, self.pools):
            x = pool(layer(x, steps))
        x = self.pools[3](self.last(x))
        return x + self.position(x)


class SpikeDriven(Network):
    """embedding, blocks, mean over tokens, neuron, linear. Taps: stage1 .. stage4 (fewer if `depth` is), membranes."""

    def __init__(
        self,
        *,
        depth: int,
        dim: int,
        mlp_ratio: float,
        pools: Sequence[int],
        mask_v_th: float,
        classes: int,
        neuron: MakeNeuron,
        **images: Any,
    ):
        super().__init__(**images)
        if dim % 8:
            raise SpecError([f"dim={dim} must be a multiple of 8"])
        if not {1, 2, 3, 4}.issuperset(pools):
            raise SpecError([f"pools={list(pools)} must name some of the four convolutions, 1 to 4"])
        self.embedding = Embedding(self.channels, dim, pools, neuron)
        for stage, blocks in enumerate(groups(depth, min(depth, 4)), 1):
            made = (Block(dim, int(dim * mlp_ratio), mask_v_th, neuron) for _ in range(blocks))
            self.add_module(f"stage{stage}", nn.Sequential(*made))
            self.dims[f"stage{stage}"] = dim
        self.neuron = neuron()
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x, steps = self.start(x, steps)
        x = self.embedding(x, steps)
        for stage in self.dims:
            x = getattr(self, stage)(x)
        return self.head(self.neuron(x.mean((-2, -1))))


def spike_driven(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    depth: Count = 2,
    dim: Count = 512,
    mlp_ratio: Positive = 4.0,
    pools: Sequence[Count] = (3, 4),
    mask_v_th: Positive = 0.5,
    neuron: NeuronName = "lif",
) -> SpikeDriven:
    """Spike-driven Transformer, 2-512 for CIFAR by default; 10.2 M parameters with 10 classes.

    depth: blocks. dim: width D. mlp_ratio: width of the hidden layer of the MLP, in D. pools: the map is halved after
    these of the four convolutions; (3, 4) for 32x32, (1, 2, 3, 4) for 224x224 and events.
    mask_v_th: threshold of the neuron that makes the mask.
    neuron: 'lif' with tau 2 and sigmoid(4), or what `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    return SpikeDriven(**locals() | {"neuron": make(neuron, surrogate=Sigmoid(4.0))})
