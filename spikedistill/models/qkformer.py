"""QKFormer: a hierarchical transformer of spikes, whose first stages attend with tokens of Q alone.

    stage: embedding, then x <- x + attention(x);  x <- x + MLP(x)
    stages 1, 2   N(BN(W (K * N'(sum over the channels of a head of Q)))),  Q, K = N(BN(W x))      N' fires at 0.5
    stage 3       spiking self-attention, as in Spikformer
    embedding     N(BN(conv3x3 ..)) with a pool before a neuron, + N(BN(conv1x1 x)) of the same stride

Zhou, Zhang, Zhou, Yu, Huang, Fan, Yuan, Ma, Zhou, Tian 2024, https://arxiv.org/abs/2403.16552.
Differs from the paper: tokens stay maps, [T, B, D, H, W] in place of [T, B, N, D], and linear layers are 1x1
convolutions.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from spikedistill.models.layers import (
    BatchNorm2d,
    Conv2d,
    MakeNeuron,
    MaxPool2d,
    Network,
    NeuronName,
    Spiking,
    choose,
    over_space,
    spiking_conv,
    with_threshold,
)
from spikedistill.models.spikformer import Attention, Block
from spikedistill.neurons import Sigmoid, make
from spikedistill.spec import Count, Positive, SpecError

Stem = Literal["cifar", "imagenet"]
# whether the first convolution pools, and whether those of the three embeddings do
STEMS = {
    "cifar": (False, ((False,), (False, True), (False, True))),
    "imagenet": (True, ((True, False), (True, False), (True, False))),
}


def pooled_conv(channels: int, out: int, pool: bool, neuron: MakeNeuron) -> Spiking:
    """3x3 convolution, norm, a max pool where asked, neuron."""
    if not pool:
        return spiking_conv(channels, out, neuron=neuron)
    conv = Conv2d(channels, out, 3, 1, 1, bias=False)
    return Spiking(conv, nn.Sequential(BatchNorm2d(out), MaxPool2d(3, 2, 1)), neuron())


class Embedding(nn.Module):
    """3x3 convolutions, one for each of `pools`, beside a 1x1 convolution: a sum of spikes."""

    def __init__(self, channels: int, dim: int, pools: Sequence[bool], neuron: MakeNeuron):
        super().__init__()
        widths = [channels] + [dim] * (len(pools) - 1)
        self.branch = nn.Sequential(*(pooled_conv(c, dim, pool, neuron) for c, pool in zip(widths, pools)))
        self.shortcut = spiking_conv(channels, dim, 1, 2 if any(pools) else 1, neuron=neuron)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class TokenAttention(nn.Module):
    """Q-K token attention on maps [T, B, D, H, W]. v_th: threshold of the neuron that chooses tokens."""

    def __init__(self, dim: int, heads: int, v_th: float, neuron: MakeNeuron):
        super().__init__()
        self.heads = heads
        self.q = spiking_conv(dim, dim, 1, neuron=neuron)
        self.k = spiking_conv(dim, dim, 1, neuron=neuron)
        self.mask = with_threshold(neuron, v_th)
        self.project = spiking_conv(dim, dim, 1, neuron=neuron, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.q, self.k))  # [T, B, heads, d, H, W]
        return self.project((k * self.mask(q.sum(3, keepdim=True))).flatten(2, 3))


class QKFormer(Network):
    """stem, three stages of embedding and blocks, mean over tokens, linear. Taps: stage1 .. stage3, sums of spikes."""

    def __init__(
        self,
        *,
        blocks: Sequence[int],
        dim: int,
        heads: int,
        mlp_ratio: float,
        stem: str,
        scale: float,
        attention_v_th: float,
        classes: int,
        neuron: MakeNeuron,
        **images: Any,
    ):
        super().__init__(**images)
        if dim % 8 or dim // 4 % heads:
            raise SpecError([f"dim={dim} must be a multiple of 8, and a quarter of it of heads={heads}"])
        if len(blocks) != 3:
            raise SpecError([f"blocks={list(blocks)} must be three numbers, one a stage"])
        pool, pools = choose("stem", stem, STEMS)
        c = dim // 8
        self.stem = pooled_conv(self.channels, c, pool, neuron)
        for stage, count in enumerate(blocks, 1):
            out = dim // 2 ** (3 - stage)
            layers: list[nn.Module] = [Embedding(c, out, pools[stage - 1], neuron)]
            for _ in range(count):
                if stage < 3:
                    attention: nn.Module = TokenAttention(out, heads, attention_v_th, neuron)
                else:
                    attention = Attention(out, heads, scale, attention_v_th, False, neuron)
                layers.append(Block(out, int(out * mlp_ratio), attention, neuron))
            self.add_module(f"stage{stage}", nn.Sequential(*layers))
            self.dims[f"stage{stage}"] = c = out
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x, steps = self.start(x, steps)
        x = self.stem(x, steps)
        for stage in self.dims:
            x = getattr(self, stage)(x)
        return self.head(over_space(x))


def qkformer(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    blocks: Sequence[Count] = (1, 1, 2),
    dim: Count = 384,
    heads: Count = 8,
    mlp_ratio: Positive = 4.0,
    stem: Stem = "cifar",
    scale: Positive = 0.125,
    attention_v_th: Positive = 0.5,
    neuron: NeuronName = "lif",
) -> QKFormer:
    """QKFormer, 4-384 for CIFAR by default; 6,706,234 parameters with 10 classes.

    blocks: of the three stages; (1, 2, 7) for ImageNet. dim: width D of the last stage; the others have a quarter and a
    half. heads: of the attention; 6, 8, 12 for ImageNet with D = 384, 512, 768. mlp_ratio: width of the hidden layer of
    the MLP, in D. stem: 'cifar' keeps the size of the image in the first stage, 'imagenet' takes a quarter.
    scale: of the attention in the last stage. attention_v_th: threshold of the neurons on attention.
    neuron: 'lif' with tau 2 and sigmoid(4), or what `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    return QKFormer(**locals() | {"neuron": make(neuron, surrogate=Sigmoid(4.0))})
