"""ResNet-19 and ordinary ResNets: the residual sum comes before the neuron.

    O = N( BN(conv2(N(BN(conv1 X)))) + shortcut(X) )        shortcut: X, or BN(conv1x1 X) without a neuron

With a spiking N this is ResNet-19; with N = ReLU it is the ordinary ResNet, so the same classes make ANN teachers.

Zheng, Wu, Deng, Hu, Li 2021 (tdBN), https://arxiv.org/abs/2011.05280; neuron, plain batch norm and a stem of
64 channels as in Deng, Li, Zhang, Gu 2022 (TET), https://arxiv.org/abs/2202.11946.
He, Zhang, Ren, Sun 2016, https://arxiv.org/abs/1512.03385, for the ANNs; 3x3 stem without pool, for small images.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spikedistill.models.layers import (
    BatchNorm2d,
    Conv2d,
    MakeNeuron,
    Network,
    NeuronName,
    kaiming,
    over_space,
    spiking_conv,
    tet_neuron,
)
from spikedistill.neurons import ReLU
from spikedistill.spec import Count


class PostSumBlock(nn.Module):
    """neuron(branch(x) + shortcut(x)): the sum is of currents, before the neuron."""

    def __init__(self, channels: int, width: int, stride: int, neuron: MakeNeuron):
        super().__init__()
        self.conv1 = spiking_conv(channels, width, 3, stride, neuron=neuron)
        self.conv2, self.norm2 = Conv2d(width, width, 3, 1, 1, bias=False), BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(Conv2d(channels, width, 1, stride, bias=False), BatchNorm2d(width))
        self.neuron = neuron()

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.norm2(self.conv2(self.conv1(x))) + self.shortcut(x))


class PostSumResNet(Network):
    """3x3 stem, stages of post-sum blocks, global average, linear. Taps: stage1 .. stageN, what the neurons emit.

    width: of the first stage, each next one doubles it.
    hidden: a linear layer with a neuron, half as wide as the last stage, before the last linear layer.
    """

    def __init__(
        self,
        depths: Sequence[int],
        hidden: bool,
        *,
        classes: int,
        stem_width: int,
        width: int,
        neuron: MakeNeuron,
        **images: Any,
    ):
        super().__init__(**images)
        self.stem = spiking_conv(self.channels, stem_width, neuron=neuron)
        c = stem_width
        for stage, depth in enumerate(depths, 1):
            out, blocks = width * 2 ** (stage - 1), []
            for i in range(depth):
                blocks.append(PostSumBlock(c, out, 2 if stage > 1 and i == 0 else 1, neuron))
                c = out
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
            self.dims[f"stage{stage}"] = c
        self.hidden = nn.Sequential(nn.Linear(c, c // 2), neuron()) if hidden else nn.Identity()
        self.head = nn.Linear(c // 2 if hidden else c, classes)
        kaiming(self)

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x, steps = self.start(x, steps)
        x = self.stem(x, steps)
        for stage in self.dims:
            x = getattr(self, stage)(x)
        return self.head(self.hidden(over_space(x)))


def resnet19(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    stem_width: Count = 64,
    width: Count = 128,
    neuron: NeuronName = "lif",
) -> PostSumResNet:
    """ResNet-19; 12,630,858 parameters with 10 classes.

    stem_width: channels of the stem. width: channels of the first stage; the other two double it.
    neuron: 'lif' with TET's settings (decay 0.5, input not decayed, fires above 1, triangle(1), reset not detached), or
    what `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    return PostSumResNet((3, 3, 2), True, **locals() | {"neuron": tet_neuron(neuron)})


def ann_resnet18(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    width: Count = 64,
) -> PostSumResNet:
    """The ordinary ResNet-18, an ANN, for small images; 11,173,962 parameters with 10 classes.

    steps: not used, an ANN has T = 1. width: channels of the first stage.
    """
    return PostSumResNet((2, 2, 2, 2), False, stem_width=width, neuron=ReLU, **locals())


def ann_resnet34(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    width: Count = 64,
) -> PostSumResNet:
    """The ordinary ResNet-34, an ANN, for small images; 21,282,122 parameters with 10 classes.

    steps: not used, an ANN has T = 1. width: channels of the first stage.
    """
    return PostSumResNet((3, 4, 6, 3), False, stem_width=width, neuron=ReLU, **locals())
