"""VGG-like networks: VGGSNN for event frames, and the 6conv2fc network of PLIF.

VGGSNN: eight 3x3 convolutions with bias, norm and neuron, halved in size after every second one, and a linear layer per
step. Deng, Li, Zhang, Gu 2022 (TET), https://arxiv.org/abs/2202.11946.

6conv2fc: six convolutions of 256 channels, two linear layers of spiking neurons, whose last layer votes by tens.
Fang, Yu, Chen, Masquelier, Huang, Tian 2021 (PLIF), https://arxiv.org/abs/2007.05785.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from spikedistill.models.layers import (
    AvgPool2d,
    Dropout,
    MakeNeuron,
    MaxPool2d,
    Network,
    NeuronName,
    Stage,
    Vote,
    choose,
    kaiming,
    spiking_conv,
    tet_neuron,
)
from spikedistill.neurons import make
from spikedistill.spec import Count, Share, SpecError

Pool = Literal["avg", "max", "stride"]
POOLS = {"avg": lambda: AvgPool2d(2), "max": lambda: MaxPool2d(2), "stride": nn.Identity}


class VGG(Network):
    """Groups of convolutions, each followed by a pool; then `head` on the flattened map.

    Taps: stage1 .. stageN, the spikes of each group before its pool. widths: channels, group by group.
    size: of the (square) input. head: makes the classifier from the number of its inputs.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        head: Callable[[int], nn.Module],
        *,
        size: int,
        pool: str,
        neuron: MakeNeuron,
        bias: bool,
        **images: Any,
    ):
        super().__init__(**images)
        self.size, self.pool, c = size, choose("pool", pool, POOLS)(), self.channels
        for stage, group in enumerate(widths, 1):
            layers = []
            for i, width in enumerate(group, 1):
                stride = 2 if pool == "stride" and i == len(group) else 1
                layers.append(spiking_conv(c, width, 3, stride, neuron=neuron, bias=bias))
                c = width
            self.add_module(f"stage{stage}", Stage(*layers))
            self.dims[f"stage{stage}"] = c
            size = (size + 1) // 2 if pool == "stride" else size // 2
        if not size:
            raise SpecError([f"size={self.size} is too small to be halved {len(widths)} times"])
        self.head = head(c * size * size)
        kaiming(self)

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x, steps = self.start(x, steps)
        if x.shape[-2:] != (self.size, self.size):
            raise ValueError(f"built for images of {self.size}x{self.size}, got {list(x.shape[-2:])}: set size=")
        for stage in self.dims:
            x = self.pool(getattr(self, stage)(x, steps))
        return self.head(x.flatten(2))


def vggsnn(
    *,
    classes: Count = 10,
    channels: Count = 2,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    size: Count = 48,
    pool: Pool = "avg",
    widths: Sequence[Sequence[Count]] = ((64, 128), (256, 256), (512, 512), (512, 512)),
    bias: bool = True,
    vote: Count = 1,
    neuron: NeuronName = "lif",
) -> VGG:
    """VGGSNN; 9,271,498 parameters with 2 channels, 48x48 and 10 classes.

    size: height and width of the input. pool: 'avg' as published, 'stride' in the last convolution of each group as in
    the released training script, or 'max'. widths: channels, group by group. bias: of the convolutions.
    vote: outputs a class, averaged.
    neuron: 'lif' with TET's settings (decay 0.5, input not decayed, fires above 1, triangle(1), reset not detached), or
    what `neurons.make` takes; 'relu' is the same network as an ANN.
    """

    def head(features: int) -> nn.Module:
        linear = nn.Linear(features, classes * vote)
        return linear if vote == 1 else nn.Sequential(linear, Vote(vote))

    images = dict(channels=channels, steps=steps, mean=mean, std=std)
    return VGG(widths, head, size=size, pool=pool, neuron=tet_neuron(neuron), bias=bias, **images)


def plif_net(
    *,
    classes: Count = 10,
    channels: Count = 3,
    steps: Count = 8,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    size: Count = 32,
    width: Count = 256,
    hidden: Count = 2048,
    drop: Share = 0.5,
    vote: Count = 10,
    neuron: NeuronName = "plif",
) -> VGG:
    """6conv2fc of the PLIF paper; 36,718,344 parameters, eight of which are time constants.

    size: height and width of the input. width: channels of the convolutions. hidden: width of the first linear layer.
    drop: dropout before both linear layers, the same at every step. vote: spiking outputs a class, averaged, so that
    logits are in [0, 1].
    neuron: 'plif', or what `neurons.make` takes; 'relu' is the same network as an ANN.
    """
    spiking = make(neuron)

    def head(features: int) -> nn.Module:
        first = [Dropout(drop), nn.Linear(features, hidden, bias=False), spiking()]
        return nn.Sequential(
            *first, Dropout(drop), nn.Linear(hidden, classes * vote, bias=False), spiking(), Vote(vote)
        )

    images = dict(channels=channels, steps=steps, mean=mean, std=std)
    return VGG(((width,) * 3,) * 2, head, size=size, pool="max", neuron=spiking, bias=False, **images)
