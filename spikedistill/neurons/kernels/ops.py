"""The neuron as operators of torch, so that autograd, torch.compile and torch.export each see one opaque call.

    spikedistill::neuron           currents -> spikes, through BatchNorm first where `mean` and `var` are given
    spikedistill::neuron_backward  the gradients, from the input and the statistics alone: nothing else is kept
    spikedistill::moments          mean and biased variance of each channel, over everything else; constants to autograd

Written as registrations by hand instead of `torch.library.custom_op`, which costs 50 us a call instead of 15.
"""

from collections.abc import Callable
from math import prod
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NORM = "Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias"
COEFFICIENTS = "Tensor? decay, Tensor? gain"
CONSTANTS = (
    "float eps, bool batch, float fixed_decay, float fixed_gain, float v_th, float? v_reset, bool strict, "
    "bool detach_reset, int kind, float parameter"
)

lib = torch.library.Library("spikedistill", "DEF")
lib.define(f"neuron(Tensor x, {NORM}, {COEFFICIENTS}, {CONSTANTS}, SymInt steps) -> Tensor")
lib.define(
    f"neuron_backward(Tensor grad, Tensor x, {NORM}, {COEFFICIENTS}, {CONSTANTS}, "
    "bool need_x, bool need_affine, bool need_coefficients) -> (Tensor, Tensor, Tensor, Tensor)",
)
lib.define("moments(Tensor x) -> (Tensor, Tensor)")


class Norm(NamedTuple):
    """BatchNorm as numbers: u = x scale + shift, scale = weight / sqrt(var + eps), shift = bias - mean scale.

    batch: the statistics are those of x, so that the gradient flows through them.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    batch: bool


class How(NamedTuple):
    """The constants of a neuron. decay and gain are tensors where they are learned."""

    decay: float | Tensor
    gain: float | Tensor
    v_th: float
    v_reset: float | None
    strict: bool
    detach_reset: bool
    kind: int
    parameter: float


def bundle(mean, var, weight, bias, decay, gain, eps, batch, fixed_decay, fixed_gain, *how) -> tuple[Norm | None, How]:
    norm = None if mean is None else Norm(mean, var, weight, bias, eps, batch)
    return norm, How(fixed_decay if decay is None else decay, fixed_gain if gain is None else gain, *how)


def dense(x: Tensor) -> Tensor:
    """x as it is where time is outermost and a step is contiguous (NCHW or channels_last), else a contiguous copy."""
    return x if x.is_contiguous() or channels_last(x) else x.contiguous()


def channels_last(x: Tensor) -> bool:
    """Whether [T, B, C, H, W] lies in memory as [T, B, H, W, C]."""
    if x.ndim != 5:
        return False
    _, B, C, H, W = x.shape
    want = (B * C * H * W, C * H * W, 1, W * C, C)
    return all(n == 1 or s == w for n, s, w in zip(x.shape, x.stride(), want))


def empty(x: Tensor, steps, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for [steps, ...] in the layout of a dense x."""
    shape = x.shape[1:]
    strides = (prod(shape), *x.stride()[1:])
    return torch.empty_strided((steps, *shape), strides, dtype=dtype or x.dtype, device=x.device)


def match(grad: Tensor, x: Tensor) -> Tensor:
    """grad in the layout and dtype of a dense x."""
    steps, step = grad.shape[0], prod(grad.shape[1:])
    if grad.dtype == x.dtype and grad.stride()[1:] == x.stride()[1:] and (steps == 1 or grad.stride(0) == step):
        return grad
    return empty(x, steps).copy_(grad)


class _Neuron(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:7])
        ctx.constants = args[7:-1]
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.spikedistill.neuron.default(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyrefly: ignore[bad-override]
        saved, need = ctx.saved_tensors, ctx.needs_input_grad
        _, _, _, weight, bias, decay, gain = saved
        which = need[0], need[3] or need[4], need[5] or need[6]
        x, affine_weight, affine_bias, coefficients = torch.ops.spikedistill.neuron_backward.default(
            grad, *saved, *ctx.constants, *which
        )
        grads = [x if need[0] else None, None, None]
        grads += [
            g.to(p.dtype) if n else None for g, p, n in zip((affine_weight, affine_bias), (weight, bias), need[3:])
        ]
        grads += [coefficients[i].view_as(p).to(p.dtype) if need[5 + i] else None for i, p in enumerate((decay, gain))]
        return *grads, *[None] * (len(ctx.constants) + 1)


def define(choose: Callable[[Tensor], ModuleType]) -> None:
    """Register the operators; `choose` gives the module that computes for a tensor."""

    def neuron(x, *args):
        x, (norm, how) = dense(x), bundle(*args[:-1])
        return choose(x).forward(x, norm, how, args[-1])

    def backward(grad, x, *args):
        (norm, how), need, x = bundle(*args[:-3]), args[-3:], dense(x)
        found = choose(x).backward(match(grad, x), x, norm, how, *need)
        return tuple(x.new_empty(0) if g is None else g for g in found)

    def moments(x):
        x = dense(x)
        return choose(x).moments(x)

    lib.impl("neuron", neuron, "CompositeExplicitAutograd")
    lib.impl("neuron_backward", backward, "CompositeExplicitAutograd")
    lib.impl("moments", moments, "CompositeExplicitAutograd")

    def constant(x):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.spikedistill.moments.default(x)

    lib.impl("neuron", _Neuron.apply, "Autograd")
    lib.impl("moments", constant, "Autograd")  # their gradient is part of that of the neuron

    def shape(x, *args):
        return empty(dense(x), args[-1])

    def backward_shapes(grad, x, *args):
        need_x, need_affine, need_coefficients = args[-3:]
        wide, x = torch.promote_types(x.dtype, torch.float32), dense(x)
        none = x.new_empty(0)
        affine = [x.new_empty(x.shape[2], dtype=wide) if need_affine else none.clone() for _ in range(2)]
        coefficients = x.new_empty(2, dtype=wide) if need_coefficients else none.clone()
        return empty(x, x.shape[0]) if need_x else none, *affine, coefficients

    def moments_shapes(x):
        new = dict(dtype=torch.promote_types(x.dtype, torch.float32))
        return x.new_empty(x.shape[2], **new), x.new_empty(x.shape[2], **new)

    torch.library.register_fake("spikedistill::neuron", shape, lib=lib)
    torch.library.register_fake("spikedistill::neuron_backward", backward_shapes, lib=lib)
    torch.library.register_fake("spikedistill::moments", moments_shapes, lib=lib)
