"""MS-ResNet: the shortcut carries membrane potentials and never passes a neuron.

    O = shortcut(X) + BN(conv2(N(BN(conv1(N(X))))))        shortcut: X, or BN(conv1x1 X)

Hu, Deng, Wu, Yao, Li 2021, https://arxiv.org/abs/2112.08954; widths, neuron and initial gains as in
Lee et al. 2024 (TT-SNN), https://arxiv.org/abs/2401.08001: decay 0.25, input not decayed, fires above 0.5, rectangular
surrogate; norms start at the threshold, those that end a branch at a fifth of it.
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
    Stage,
    over_space,
    spiking_conv,
)
from spikedistill.neurons import Rectangle, make
from spikedistill.spec import Count


class MembraneBlock(nn.Module):
    """shortcut(x) + branch(neuron(x)): currents in, currents out. `steps` = T where x is the same at every step."""

    def __init__(self, channels: int, width: int, stride: int, neuron: MakeNeuron):
        super().__init__()
        self.neuron = neuron()
        self.conv1 = spiking_conv(channels, width, 3, stride, neuron=neuron)
        self.conv2, self.norm2 = Conv2d(width, width, 3, 1, 1, bias=False), BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(Conv2d(channels, width, 1, stride, bias=False), BatchNorm2d(width))

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        return self.shortcut(x) + self.norm2(self.conv2(self.conv1(self.neuron(x, steps))))


class MSResNet(Network):
    """3x3 stem without a neuron, four stages, neuron, global average, linear.

    Taps: stage1 .. stage4, the membrane sums; neuron, the spikes of the last of them.
    """

    def __init__(self, depths: Sequence[int], *, classes: int, width: int, neuron: MakeNeuron, **images: Any):
        super().__init__(**images)
        self.stem = nn.Sequential(Conv2d(self.channels, width, 3, 1, 1, bias=False), BatchNorm2d(width))
        self.stages, c = [f"stage{i}" for i in range(1, len(depths) + 1)], width
        for i, (stage, depth) in enumerate(zip(self.stages, depths)):
            out, blocks = width * 2**i, []
            for j in range(depth):
                blocks.append(MembraneBlock(c, out, 2 if i > 0 and j == 0 else 1, neuron))
                c = out
            self.add_module(stage, Stage(*blocks))
            self.dims[stage] = c
        self.neuron = neuron()
        self.dims["neuron"] = c
        self.head = nn.Linear(c, classes)
        gain = getattr(self.neuron, "v_th", 1.0)
        for module in self.modules():
            if isinstance(module, BatchNorm2d):
                nn.init.constant_(module.weight, gain)
        for module in self.modules():
            if isinstance(module, MembraneBlock):
                nn.init.constant_(module.norm2.weight, gain / 5)

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x, steps = self.start(x, steps)
        x = self.stem(x)
        for stage in self.stages:
            x = getattr(self, stage)(x, steps)
        return self.head(over_space(self.neuron(x)))


def membrane_neuron(neuron: NeuronName) -> MakeNeuron:
    """`neuron` as in TT-SNN where the text says no more."""
    how = dict(tau=4 / 3, decay_input=False, v_th=0.5, strict=True, surrogate=Rectangle(0.5))
    return make(neuron, **how)


def ms_resnet18(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    width: Count = 64,
    neuron: NeuronName = "lif",
) -> MSResNet:
    """MS-ResNet-18 for small images; 11,173,962 parameters with 10 classes.

    width: channels of the first stage.
    neuron: 'lif' with TT-SNN's settings (decay 0.25, input not decayed, fires above 0.5, rectangle(0.5)), or what
    `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    return MSResNet((2, 2, 2, 2), **locals() | {"neuron": membrane_neuron(neuron)})


def ms_resnet34(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    width: Count = 64,
    neuron: NeuronName = "lif",
) -> MSResNet:
    """MS-ResNet-34 for small images; 21,282,122 parameters with 10 classes.

    width: channels of the first stage.
    neuron: 'lif' with TT-SNN's settings (decay 0.25, input not decayed, fires above 0.5, rectangle(0.5)), or what
    `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    return MSResNet((3, 4, 6, 3), **locals() | {"neuron": membrane_neuron(neuron)})
