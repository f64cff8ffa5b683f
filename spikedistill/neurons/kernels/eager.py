"""The neuron in plain torch with a backward pass written by hand: it needs the input alone and recomputes the rest.

Runs wherever torch runs, in any dtype. Spikes are equal to the bit to `functional.neuron`, and to those of the native
kernel: the norm is one product and one sum in float32 (float64 for float64), see `ops.Norm`.
"""

import torch
from torch import Tensor

from spikedistill.neurons.kernels.ops import How, Norm, empty
from spikedistill.neurons.surrogate import SURROGATES

OTHERS = (0, 1, 3, 4)  # T, B, H, W of [T, B, C, H, W]


def widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


def affine(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """1 / sqrt(var + eps) and scale, [C], in the dtype of x."""
    invstd = (norm.var.to(x.dtype) + norm.eps).sqrt().reciprocal()
    return invstd, invstd if norm.weight is None else norm.weight.to(x.dtype) * invstd


def shift(x: Tensor, norm: Norm, scale: Tensor) -> Tensor:
    """bias - mean scale, [C], in the dtype of x."""
    product = norm.mean.to(x.dtype) * scale
    return -product if norm.bias is None else norm.bias.to(x.dtype) - product


def normalized(x: Tensor, norm: Norm | None) -> Tensor:
    """The currents of the neuron, from x in float32 (or float64)."""
    if norm is None:
        return x
    _, scale = affine(x, norm)
    return x * per_channel(scale) + per_channel(shift(x, norm, scale))


def charge(v: Tensor | None, u: Tensor, t: int, how: How) -> Tensor:
    """H[t] from V[t-1] (None before the first step) and the currents of one step or of all."""
    rest = how.v_reset or 0.0
    v = torch.full_like(u[0], rest) if v is None else v
    h = how.decay * v + how.gain * u[t if len(u) > 1 else 0]
    return h + (1 - how.decay) * rest if rest else h


def fire(h: Tensor, how: How) -> Tensor:
    return (h > how.v_th if how.strict else h >= how.v_th).to(h.dtype)


def reset(h: Tensor, s: Tensor, how: How) -> Tensor:
    return h - how.v_th * s if how.v_reset is None else h * (1 - s) + how.v_reset * s


def forward(x: Tensor, norm: Norm | None, how: How, steps: int) -> Tensor:
    """[T or 1, ...] -> spikes [steps, ...]."""
    spikes, u, v = empty(x, steps), normalized(widen(x), norm), None
    for t in range(steps):
        h = charge(v, u, t, how)
        spikes[t] = s = fire(h, how)
        v = reset(h, s, how)
    return spikes


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of [T, B, C, H, W] over all but C."""
    var, mean = torch.var_mean(widen(x), OTHERS, correction=0)
    return mean, var


def backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm | None,
    how: How,
    need_x: bool,
    need_affine: bool,
    need_coefficients: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight [C], bias [C] and (decay, gain) [2], from the gradient of the spikes."""
    wide = widen(x)
    u = normalized(wide, norm)
    surrogate = list(SURROGATES.values())[how.kind](how.parameter)
    charges, v = [], None
    for t in range(len(grad)):
        charges.append(h := charge(v, u, t, how))
        v = reset(h, fire(h, how), how)
    du, coefficients, after = torch.zeros_like(u), u.new_zeros(2), None
    for t in reversed(range(len(grad))):
        h = charges.pop()
        g = surrogate.grad(h - how.v_th)
        dh = grad[t].to(h.dtype) * g
        if after is not None:
            stay = 1 if how.v_reset is None else 1 - fire(h, how)
            if not how.detach_reset:
                stay = stay + (-how.v_th if how.v_reset is None else how.v_reset - h) * g
            dh = dh + how.decay * after * stay
        i = t if len(u) > 1 else 0
        du[i] += how.gain * dh
        if need_coefficients:
            coefficients[1] += (dh * u[i]).sum()
            if charges:
                v = reset(charges[-1], fire(charges[-1], how), how)
                coefficients[0] += (dh * (v - (how.v_reset or 0.0))).sum()
        after = dh
    coefficients = coefficients if need_coefficients else None
    if norm is None:
        return du.to(x.dtype) if need_x else None, None, None, coefficients
    invstd, scale = affine(wide, norm)
    centred = wide - per_channel(norm.mean.to(wide.dtype))
    d_bias = du.sum(OTHERS)
    d_weight = (du * centred).sum(OTHERS) * invstd
    if norm.batch:
        count = du.numel() // len(d_bias)
        du = du - per_channel(d_bias / count) - centred * per_channel(d_weight * invstd / count)
    dx = (per_channel(scale) * du).to(x.dtype) if need_x else None
    return dx, d_weight if need_affine else None, d_bias if need_affine else None, coefficients
