"""SEW-ResNet: residual blocks joined after the neuron.

    O = g( SN(BN(conv(... X))), shortcut(X) )
    g = add: A + X        and: A X        iand: (1 - A) X

The shortcut is the identity, or a 1x1 convolution with norm and neuron where the shape changes. With `add` the outputs
are small integers, at most one above those of the input.

Fang, Yu, Chen, Huang, Masquelier, Tian 2021, https://arxiv.org/abs/2102.04159.
Differs from the paper: logits are returned at every step (their mean over time is the paper's output), and
stem="cifar" (3x3, stride 1, no pool) is there for small images.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spikedistill.models.layers import (
    MakeNeuron,
    MaxPool2d,
    Network,
    NeuronName,
    choose,
    kaiming,
    over_space,
    spiking_conv,
)
from spikedistill.neurons import Neuron, make
from spikedistill.spec import Count

Stem = Literal["cifar", "imagenet"]
Connect = Literal["add", "and", "iand"]

CONNECT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, x: a + x,
    "and": lambda a, x: a * x,
    "iand": lambda a, x: (1 - a) * x,
}
# kernel and stride of the first convolution, and what follows it
STEMS = {"cifar": (3, 1, nn.Identity), "imagenet": (7, 2, lambda: MaxPool2d(3, 2, 1))}


class SEWBlock(nn.Module):
    """g(branch(x), shortcut(x)): the sum is of spikes, after the neuron."""

    def __init__(self, branch: nn.Sequential, shortcut: nn.Module, connect: str = "add"):
        super().__init__()
        choose("connect", connect, CONNECT)
        self.branch, self.shortcut, self.connect = branch, shortcut, connect

    def forward(self, x: Tensor) -> Tensor:
        return CONNECT[self.connect](self.branch(x), self.shortcut(x))


def basic(channels: int, width: int, stride: int, neuron: MakeNeuron) -> nn.Sequential:
    """3x3 (strided), 3x3."""
    return nn.Sequential(
        spiking_conv(channels, width, 3, stride, neuron=neuron), spiking_conv(width, width, 3, neuron=neuron)
    )


def bottleneck(channels: int, width: int, stride: int, neuron: MakeNeuron) -> nn.Sequential:
    """1x1, 3x3 (strided), 1x1 to four times the width."""
    return nn.Sequential(
        spiking_conv(channels, width, 1, neuron=neuron),
        spiking_conv(width, width, 3, stride, neuron=neuron),
        spiking_conv(width, 4 * width, 1, neuron=neuron),
    )


class SEWResNet(Network):
    """stem, four stages of SEW blocks, global average, linear. Taps: stage1 .. stage4, the joined outputs."""

    def __init__(
        self,
        depths: Sequence[int],
        expansion: int,
        *,
        classes: int,
        stem: str,
        connect: str,
        zero_init: bool,
        width: int,
        neuron: NeuronName,
        **images: Any,
    ):
        super().__init__(**images)
        branch, spiking = bottleneck if expansion > 1 else basic, make(neuron)
        kernel, stride, pool = choose("stem", stem, STEMS)
        self.stem = spiking_conv(self.channels, width, kernel, stride, neuron=spiking)
        self.pool = pool()
        c = width
        for stage, depth in enumerate(depths, 1):
            inner, blocks = width * 2 ** (stage - 1), []
            for i in range(depth):
                stride, out = 2 if stage > 1 and i == 0 else 1, inner * expansion
                same = stride == 1 and c == out
                shortcut = nn.Identity() if same else spiking_conv(c, out, 1, stride, neuron=spiking)
                blocks.append(SEWBlock(branch(c, inner, stride, spiking), shortcut, connect))
                c = out
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
            self.dims[f"stage{stage}"] = c
        self.head = nn.Linear(c, classes)
        kaiming(self)
        if zero_init:
            silence(self)

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x, steps = self.start(x, steps)
        x = self.pool(self.stem(x, steps))
        for stage in self.dims:
            x = getattr(self, stage)(x)
        return self.head(over_space(x))


def silence(model: nn.Module) -> None:
    """Make every identity block the identity: no spikes from its branch (every one where `and` joins them)."""
    for block in model.modules():
        if isinstance(block, SEWBlock):
            norm, neuron = (block.branch[-1].get_submodule(name) for name in ("norm", "neuron"))
            nn.init.zeros_(norm.get_parameter("weight"))
            current = always(neuron) if block.connect == "and" else 0.0
            norm.get_parameter("bias").data.copy_(torch.as_tensor(current))


def always(neuron: nn.Module) -> float | Tensor:
    """A current at which a neuron fires at every step, 1 % above the least, for rounding and strict ones; 1 for ReLU.

    A hard reset puts it back to where it started, a soft one leaves it no lower.
    """
    if not isinstance(neuron, Neuron):
        return 1.0
    return 1.01 * (neuron.v_th - neuron.start) / neuron.coefficients()[1]


def sew_resnet18(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    stem: Stem = "cifar",
    connect: Connect = "add",
    zero_init: bool = False,
    width: Count = 64,
    neuron: NeuronName = "if",
) -> SEWResNet:
    """SEW-ResNet-18; 11,689,512 parameters with the ImageNet stem and 1000 classes.

    stem: 'cifar' is 3x3 at full size, 'imagenet' 7x7 with stride 2 and a max pool. connect: how a block joins branch
    and shortcut. zero_init: blocks start as the identity. width: channels of the first stage.
    neuron: 'if', or what `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    return SEWResNet((2, 2, 2, 2), 1, **locals())


def sew_resnet34(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    stem: Stem = "cifar",
    connect: Connect = "add",
    zero_init: bool = False,
    width: Count = 64,
    neuron: NeuronName = "if",
) -> SEWResNet:
    """SEW-ResNet-34; 21,797,672 parameters with the ImageNet stem and 1000 classes.

    stem: 'cifar' is 3x3 at full size, 'imagenet' 7x7 with stride 2 and a max pool. connect: how a block joins branch
    and shortcut. zero_init: blocks start as the identity. width: channels of the first stage.
    neuron: 'if', or what `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    return SEWResNet((3, 4, 6, 3), 1, **locals())


def sew_resnet50(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    stem: Stem = "cifar",
    connect: Connect = "add",
    zero_init: bool = False,
    width: Count = 64,
    neuron: NeuronName = "if",
) -> SEWResNet:
    """SEW-ResNet-50; 25,557,032 parameters with the ImageNet stem and 1000 classes.

    stem: 'cifar' is 3x3 at full size, 'imagenet' 7x7 with stride 2 and a max pool. connect: how a block joins branch
    and shortcut. zero_init: blocks start as the identity. width: channels of the first stage.
    neuron: 'if', or what `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    return SEWResNet((3, 4, 6, 3), 4, **locals())
