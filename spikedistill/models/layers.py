"""Torch's layers for tensors with time in front, and the spiking layer: convolution, norm, neuron.

Every activation is [T, B, ...]. A layer without dynamics sees T and B as one batch, so its weights, names and state
dict are those of torch. T = 1 means "the same at every step": a static image goes through the first convolution once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from spikedistill.neurons import LIF, Neuron, kernels, listened

MakeNeuron = Callable[[], nn.Module]


def over_time(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer that knows no time: [T, B, ...] -> [T, B, ...]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return over_time(super().forward, input)


class BatchNorm2d(nn.BatchNorm2d):
    """Statistics over time, batch and space, as usual in this field (tdBN without its threshold factor)."""

    def forward(self, input: Tensor) -> Tensor:
        return over_time(super().forward, input)


class MaxPool2d(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return over_time(super().forward, input)


class AvgPool2d(nn.AvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return over_time(super().forward, input)


class Normalize(nn.Module):
    """(x - mean) / std per channel, [T, B, C, H, W]. A model brings its own, so that data are always in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Spiking(nn.Module):
    """conv, norm, neuron: currents in, spikes out. `steps` = T where the input is static ([1, B, ...])."""

    def __init__(self, conv: nn.Module, norm: nn.Module, neuron: nn.Module):
        super().__init__()
        self.conv, self.norm, self.neuron = conv, norm, neuron

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x = self.conv(x)
        apart = listened(self.norm) or listened(self.neuron) or not isinstance(self.neuron, Neuron)
        if apart or type(self.norm) is not BatchNorm2d or listened(self.neuron.v):
            return self.neuron(self.norm(x), steps)
        return kernels.norm_neuron(x, self.norm, *self.neuron.coefficients(), **self.neuron.how, steps=steps)


def spiking_conv(
    channels: int, out: int, kernel: int = 3, stride: int = 1, *, neuron: MakeNeuron = LIF, bias: bool = False
) -> Spiking:
    """A convolution that keeps the size at stride 1, BatchNorm and a neuron."""
    conv = Conv2d(channels, out, kernel, stride, kernel // 2, bias=bias)
    return Spiking(conv, BatchNorm2d(out), neuron())


def sequence(x: Tensor) -> Tensor:
    """Images [B, C, H, W] -> [1, B, C, H, W]; frames [T, B, C, H, W] as they are. ValueError for anything else."""
    if x.ndim not in (4, 5):
        raise ValueError(f"expected images [B, C, H, W] or frames [T, B, C, H, W], got {list(x.shape)}")
    return x[None] if x.ndim == 4 else x
