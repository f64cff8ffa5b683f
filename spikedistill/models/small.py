"""Small convolutional networks for small images, and their ANN twins.

small   conv-norm-neuron stages with a max pool between them, global average, linear: for 28x28 and 32x32 images
"""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from spikedistill import neurons
from spikedistill.models.layers import MaxPool2d, Network, over_space, spiking_conv
from spikedistill.spec import Count


class Small(Network):
    """Stages of spiking convolutions; the image is halved after every stage but the last. Taps stage1 .. stageN."""

    def __init__(self, classes, channels, steps, mean, std, widths, depth, neuron, head="linear"):
        super().__init__(channels, steps, mean, std)
        self.stem = spiking_conv(channels, widths[0], neuron=neuron)
        last = widths[0]
        for i, width in enumerate(widths, 1):
            layers: list[nn.Module] = []
            if i > 1:
                layers.append(MaxPool2d(2))
            for _ in range(depth if i > 1 else depth - 1):
                layers.append(spiking_conv(last, width, neuron=neuron))
                last = width
            self.add_module(f"stage{i}", nn.Sequential(*layers))
            self.dims[f"stage{i}"] = width
        self.head = nn.Linear(last, classes)
        self.out = neuron() if head == "spiking" else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        """Images [B, C, H, W] or frames [T, B, C, H, W] -> logits [T, B, classes] (T = 1 for a twin on images)."""
        x = self.stem(*self.start(x, steps))
        for name in self.dims:
            x = self.get_submodule(name)(x)
        return self.out(self.head(over_space(x)))


def small(
    classes: Count = 10,
    channels: Count = 1,
    steps: Count = 4,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    widths: Sequence[Count] = (16, 64, 128),
    depth: Count = 1,
    neuron: str | Callable[[], nn.Module] = "lif(decay_input=False)",
    head: Literal["linear", "spiking"] = "linear",
) -> Small:
    """A small spiking CNN; `neuron="relu"` gives its ANN twin of the same parameters.

    widths: channels of each stage.  depth: convolutions in each stage.  neuron: see `neurons.make`.
    head: linear, or followed by neurons, so that the logits are spikes.
    """
    return Small(classes, channels, steps, mean, std, tuple(widths), depth, neurons.make(neuron), head)
