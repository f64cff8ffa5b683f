"""Torch's layers for tensors with time in front, and the spiking layer: convolution, norm, neuron.

Every activation is [T, B, ...]. A layer without dynamics sees T and B as one batch, so its weights, names and state
dict are those of torch. T = 1 means "the same at every step": a static image goes through the first convolution once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spikedistill.neurons import LIF, Neuron, Triangle, kernels, listened, make
from spikedistill.spec import SpecError, near

MakeNeuron = Callable[[], nn.Module]
NeuronName = str | MakeNeuron  # what builders take: 'lif', 'plif(tau=2.0)', 'relu', or something that makes one
Choice = TypeVar("Choice")


def over_time(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer that knows no time: [T, B, ...] -> [T, B, ...]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def over_space(x: Tensor) -> Tensor:
    """[T, B, C, H, W] -> [T, B, C]: the mean over height and width.

    torch gives the gradient of `x.mean((-2, -1))` as NCHW, which the layer before would have to copy.
    """
    plain = kernels.traced(x) or not kernels.channels_last(x)
    return x.mean((-2, -1)) if plain else x.movedim(2, -1).mean((2, 3))


class Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        how = self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        if how == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
            return over_time(lambda x: kernels.convolution(x, self.weight, self.bias), input)
        return over_time(super().forward, input)


class BatchNorm2d(nn.BatchNorm2d):
    """Statistics over time, batch and space, as usual in this field (tdBN without its threshold factor)."""

    def forward(self, input: Tensor) -> Tensor:
        return over_time(super().forward, input)


class MaxPool2d(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        plain = (self.padding, self.dilation, self.ceil_mode, self.return_indices) == (0, 1, False, False)
        return kernels.max_pool(input) if plain and _halves(self) else over_time(super().forward, input)


class AvgPool2d(nn.AvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        plain = (self.padding, self.ceil_mode, self.divisor_override) == (0, False, None)
        return kernels.avg_pool(input) if plain and _halves(self) else over_time(super().forward, input)


def _halves(pool: nn.MaxPool2d | nn.AvgPool2d) -> bool:
    return all(size in (2, (2, 2)) for size in (pool.kernel_size, pool.stride))


class Dropout(nn.Dropout):
    """Drops the same elements at every time step."""

    def forward(self, input: Tensor) -> Tensor:
        return input * F.dropout(torch.ones_like(input[:1]), self.p, self.training)


class Vote(nn.Module):
    """Averages groups of `size` neighbouring outputs: [..., size * C] -> [..., C]."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).mean(-1)


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
        x, norm, neuron = self.conv(x), self.norm, self.neuron
        if type(norm) is BatchNorm2d and isinstance(neuron, Neuron) and type(neuron).forward is Neuron.forward:
            if not any(map(listened, (norm, neuron, neuron.v))):
                return kernels.norm_neuron(x, norm, *neuron.coefficients(), **neuron.how, steps=steps)
        return neuron(norm(x), steps)


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


class Stage(nn.Sequential):
    """Layers in a row that take `steps`, of which the first may meet an input that is the same at every step."""

    def forward(self, input: Tensor, steps: int | None = None) -> Tensor:
        for layer in self:
            input = layer(input, steps)
        return input


class Network(nn.Module):
    """A model that takes images or frames in [0, 1] and returns logits [T, B, classes].

    dims: its taps, name -> channels, in the order of the forward pass; the last is the map before pooling.
    steps: T for images where the caller names none. mean, std: per channel, for what the model was trained on.
    """

    def __init__(self, channels: int, steps: int, mean: Sequence[float] = (), std: Sequence[float] = ()):
        super().__init__()
        if (len(mean) or len(std)) and not len(mean) == len(std) == channels:
            given = f"mean={list(mean)} and std={list(std)}"
            raise SpecError([f"{given}: a model of {channels} channels takes {channels} of each, or none"])
        self.channels, self.steps = channels, steps
        self.dims: dict[str, int] = {}
        self.normalize = Normalize(mean, std) if len(mean) else nn.Identity()

    def start(self, x: Tensor, steps: int | None) -> tuple[Tensor, int]:
        """Images [B, C, H, W] or frames [T, B, C, H, W] -> normalised [1 or T, B, C, H, W], and T.

        Raises ValueError for other shapes, and where the frames are not `steps` many.
        """
        frames = x.ndim == 5
        x = sequence(x)
        if x.shape[2] != self.channels:
            raise ValueError(f"{type(self).__name__} was built for {self.channels} channels, got {list(x.shape)}")
        if frames and steps not in (None, len(x)):
            raise ValueError(f"the input has {len(x)} frames but steps={steps}: leave steps out, it is for images")
        return self.normalize(x), len(x) if frames else steps or self.steps


def with_threshold(make: MakeNeuron, v_th: float) -> nn.Module:
    """A neuron that fires at `v_th`; an ANN's has no threshold."""
    neuron = make()
    if isinstance(neuron, Neuron):
        neuron.v_th = v_th
    return neuron


def tet_neuron(neuron: NeuronName) -> MakeNeuron:
    """`neuron` as in TET, https://arxiv.org/abs/2202.11946, where the text says no more: H = V/2 + X, fires above 1."""
    return make(neuron, decay_input=False, strict=True, detach_reset=False, surrogate=Triangle(1.0))


def choose(what: str, key: str, table: Mapping[str, Choice]) -> Choice:
    """table[key], or SpecError with the nearest valid key."""
    if key not in table:
        raise SpecError([f"{what}='{key}' is unknown; {near(key, table)}"])
    return table[key]


def kaiming(model: nn.Module) -> None:
    """Draw every convolution anew: Kaiming normal, fan out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def recompute(model: nn.Module) -> nn.Module:
    """Let each part of a model (stem, stages ...) keep its input alone and run again in the backward pass.

    For large T: what is kept falls to the maps between the parts, plus one part at a time, for one more forward pass.
    Outputs, gradients and running statistics are the same to the bit. A part with a tap inside keeps everything.
    Changes `model`, not its state dict, and returns it. Raises ValueError where no part has a convolution.
    """
    parts = [part for part in model.children() if _convolves(part)]
    if len(parts) == 1 and any(map(_convolves, parts[0].children())):
        recompute(parts[0])
        return model
    if not parts:
        raise ValueError(f"{type(model).__name__} has no parts with convolutions to compute again")
    for part in parts:
        part.forward = partial(_forgetful, part)
    return model


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) for m in module.modules())


def _forgetful(part: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    forward, inside = partial(type(part).forward, part, **kwargs), [*part.modules()]
    if not torch.is_grad_enabled() or any(map(listened, inside[1:])):
        return forward(*args)
    again = _second_run([(m, m.training) for m in inside])
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again))


@contextmanager
def _second_run(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Modules in the modes of the first run, and with copies of their buffers: a norm counts a batch once."""
    now = [(m, m.training, dict(m._buffers)) for m, _ in modes]
    try:
        for m, mode in modes:
            m.training = mode
            m._buffers.update({k: v.clone() for k, v in m._buffers.items() if v is not None})
        yield
    finally:
        for m, mode, buffers in now:
            m.training = mode
            m._buffers.update(buffers)
