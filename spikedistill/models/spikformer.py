"""Spikformer: a vision transformer of spikes, attention without softmax.

    x <- embedding(image)                                four 3x3 convolutions, pools, and x + conv(x) for position
    x <- x + SSA(x);  x <- x + MLP(x)                    `depth` times
    SSA(x) = N(BN(W N'(s Q K^T V))),  Q, K, V = N(BN(W x))       N' fires at 0.5, s = 0.125

Zhou, Zhu, He, Wang, Yan, Tian, Yuan 2023, https://arxiv.org/abs/2209.15425.
Differs from the paper: nothing in what is computed; tokens stay maps, [T, B, D, H, W] in place of [T, B, N, D], and a
linear layer is a 1x1 convolution with the same weights. So every tap is a map with its channels on axis 2, as in the
convolutional families. The layer norms that the released code declares and never calls are left out.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from spikedistill.models.layers import (
    MakeNeuron,
    MaxPool2d,
    Network,
    NeuronName,
    over_space,
    spiking_conv,
    with_threshold,
)
from spikedistill.neurons import Sigmoid, make
from spikedistill.spec import Count, Positive, SpecError


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Q K^T V in the cheaper of its two orders, which are equal without a softmax. [..., N, d] x 3 -> [..., N, d]."""
    tokens, d = q.shape[-2:]
    return q @ (k.mT @ v) if d < tokens else (q @ k.mT) @ v


class Attention(nn.Module):
    """Spiking self-attention on maps [T, B, D, H, W] of H W tokens. v_th: threshold of the neuron on Q K^T V."""

    def __init__(self, dim: int, heads: int, scale: float, v_th: float, bias: bool, neuron: MakeNeuron):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.q = spiking_conv(dim, dim, 1, neuron=neuron, bias=bias)
        self.k = spiking_conv(dim, dim, 1, neuron=neuron, bias=bias)
        self.v = spiking_conv(dim, dim, 1, neuron=neuron, bias=bias)
        self.neuron = with_threshold(neuron, v_th)
        self.project = spiking_conv(dim, dim, 1, neuron=neuron, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        y = attend(q, k, v) * self.scale
        y = y.transpose(2, 3).flatten(3)  # [T, B, N, D], which is the layout of a channels-last map
        return self.project(self.neuron(y.movedim(-1, 2).unflatten(-1, x.shape[-2:])))

    def split(self, x: Tensor) -> Tensor:
        """[T, B, D, H, W] -> [T, B, heads, N, d]."""
        return x.flatten(3).unflatten(2, (self.heads, -1)).mT


class Block(nn.Module):
    """x + attention(x), then x + MLP(x): sums of spikes, after the neuron."""

    def __init__(self, dim: int, hidden: int, attention: nn.Module, neuron: MakeNeuron):
        super().__init__()
        self.attention = attention
        self.mlp = nn.Sequential(
            spiking_conv(dim, hidden, 1, neuron=neuron, bias=True),
            spiking_conv(hidden, dim, 1, neuron=neuron, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Embedding(nn.Module):
    """Image to tokens: widths D/8, D/4, D/2, D, a max pool after the layers in `pools`, then x + conv(x)."""

    def __init__(self, channels: int, dim: int, pools: Sequence[int], neuron: MakeNeuron):
        super().__init__()
        widths = [channels, dim // 8, dim // 4, dim // 2, dim]
        self.layers = nn.ModuleList(spiking_conv(c, d, neuron=neuron) for c, d in pairwise(widths))
        self.pools = nn.ModuleList(MaxPool2d(3, 2, 1) if i in pools else nn.Identity() for i in range(1, 5))
        self.position = spiking_conv(dim, dim, neuron=neuron)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for layer, pool in zip(self.layers, self.pools):
            x = pool(layer(x, steps))
        return x + self.position(x)


class Spikformer(Network):
    """embedding, blocks, mean over tokens, linear. Taps: stage1 .. stage4 (fewer if `depth` is), sums of spikes."""

    def __init__(
        self,
        *,
        depth: int,
        dim: int,
        heads: int,
        mlp_ratio: float,
        pools: Sequence[int],
        scale: float,
        attention_v_th: float,
        qkv_bias: bool,
        classes: int,
        neuron: MakeNeuron,
        **images: Any,
    ):
        super().__init__(**images)
        if dim % 8 or dim % heads:
            raise SpecError([f"dim={dim} must be a multiple of 8 and of heads={heads}"])
        if not {1, 2, 3, 4}.issuperset(pools):
            raise SpecError([f"pools={list(pools)} must name some of the four convolutions, 1 to 4"])
        self.embedding = Embedding(self.channels, dim, pools, neuron)
        for stage, blocks in enumerate(groups(depth, min(depth, 4)), 1):
            how = (heads, scale, attention_v_th, qkv_bias, neuron)
            made = (Block(dim, int(dim * mlp_ratio), Attention(dim, *how), neuron) for _ in range(blocks))
            self.add_module(f"stage{stage}", nn.Sequential(*made))
            self.dims[f"stage{stage}"] = dim
        self.head = nn.Linear(dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x, steps = self.start(x, steps)
        x = self.embedding(x, steps)
        for stage in self.dims:
            x = getattr(self, stage)(x)
        return self.head(over_space(x))


def groups(total: int, parts: int) -> list[int]:
    """total in as equal parts as may be: 10, 4 -> 3, 3, 2, 2."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def spikformer(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    depth: Count = 4,
    dim: Count = 384,
    heads: Count = 12,
    mlp_ratio: Positive = 4.0,
    pools: Sequence[Count] = (3, 4),
    scale: Positive = 0.125,
    attention_v_th: Positive = 0.5,
    qkv_bias: bool = True,
    neuron: NeuronName = "lif",
) -> Spikformer:
    """Spikformer, 4-384 for CIFAR by default; 9,324,730 parameters with 10 classes.

    depth: blocks. dim: width D. heads: of the attention; 12 for D = 384 and 768, 8 for 512, 16 for 256.
    mlp_ratio: width of the hidden layer of the MLP, in D. pools: the map is halved after these of the four
    convolutions; (3, 4) for 32x32, (1, 2, 3, 4) for 224x224 and events. scale: of the attention; 0.25 for events.
    attention_v_th: threshold of the neuron on Q K^T V. qkv_bias: biases of Q, K and V; True as in the CIFAR code, False
    as for ImageNet and events.
    neuron: 'lif' with tau 2 and sigmoid(4), or what `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    return Spikformer(**locals() | {"neuron": make(neuron, surrogate=Sigmoid(4.0))})
