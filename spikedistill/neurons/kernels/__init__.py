"""The fast neurons, with the signature of `neurons.functional`. This file is the one place that chooses between them."""

from torch import Tensor, nn

from spikedistill.neurons.functional import Number, time_steps
from spikedistill.neurons.kernels import eager
from spikedistill.neurons.surrogate import ATan, Surrogate


def neuron(
    x: Tensor,
    decay: Number,
    gain: Number,
    *,
    v_th: float = 1.0,
    v_reset: float | None = 0.0,
    strict: bool = False,
    detach_reset: bool = True,
    surrogate: Surrogate = ATan(),
    steps: int | None = None,
) -> Tensor:
    """Spikes [T, ...] of `functional.neuron`, keeping only the input for the backward pass."""
    steps = time_steps(x, steps)
    return eager.neuron(x, decay, gain, v_th, v_reset, strict, detach_reset, surrogate, steps)


def norm_neuron(
    x: Tensor,
    norm: nn.BatchNorm2d,
    decay: Number,
    gain: Number,
    *,
    v_th: float = 1.0,
    v_reset: float | None = 0.0,
    strict: bool = False,
    detach_reset: bool = True,
    surrogate: Surrogate = ATan(),
    steps: int | None = None,
) -> Tensor:
    """`neuron(norm(x))` with statistics over T, B, H and W in float32; updates the running statistics as `norm` would.

    x: [T, B, C, H, W], or [1, B, C, H, W] with `steps` = T.  Returns spikes [T, B, C, H, W].
    """
    how = dict(v_th=v_th, v_reset=v_reset, strict=strict, detach_reset=detach_reset, surrogate=surrogate)
    return neuron(norm(x), decay, gain, **how, steps=steps)
