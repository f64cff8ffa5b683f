"""Surrogate derivatives of the spike function.

A spike is s = 1[x >= 0] with x = H - V_th. Its derivative is zero almost everywhere, so the backward pass uses the
derivative of a smooth `primitive` instead. Each surrogate here integrates to 1 over the real line.

`value` is the primitive and `grad` its derivative; both are elementwise and keep shape and dtype. `kind` numbers the
formula for the native kernels, which take it with the single parameter in `parameter`.
"""

from dataclasses import dataclass, fields
from math import pi
from typing import ClassVar

import torch
from torch import Tensor

from spikedistill.spec import Positive


@dataclass(frozen=True)
class ATan:
    """grad(x) = (alpha / 2) / (1 + (pi alpha x / 2)^2), peak alpha / 2. Fang et al. 2021, arXiv:2007.05785."""

    alpha: Positive = 2.0
    kind: ClassVar[int] = 0

    def value(self, x: Tensor) -> Tensor:
        return torch.atan(pi * self.alpha / 2 * x) / pi + 0.5

    def grad(self, x: Tensor) -> Tensor:
        return self.alpha / 2 / (1 + (pi * self.alpha / 2 * x) ** 2)


@dataclass(frozen=True)
class Sigmoid:
    """grad(x) = alpha s (1 - s) with s = sigmoid(alpha x), peak alpha / 4. SpikingJelly's default neuron."""

    alpha: Positive = 4.0
    kind: ClassVar[int] = 1

    def value(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.alpha * x)

    def grad(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.alpha * x)
        return self.alpha * (s * (1 - s))


@dataclass(frozen=True)
class Triangle:
    """grad(x) = max(0, gamma - |x|) / gamma^2, peak 1 / gamma. Deng et al. 2022 (TET), arXiv:2202.11946."""

    gamma: Positive = 1.0
    kind: ClassVar[int] = 2

    def value(self, x: Tensor) -> Tensor:
        x = (x / self.gamma).clamp(-1, 1)
        return 0.5 + x - 0.5 * x * x.abs()

    def grad(self, x: Tensor) -> Tensor:
        return (self.gamma - x.abs()).clamp_min(0) / self.gamma**2


@dataclass(frozen=True)
class Rectangle:
    """grad(x) = 1 / (2 a) where |x| < a, else 0. Wu et al. 2018 (STBP), arXiv:1706.02609."""

    a: Positive = 0.5
    kind: ClassVar[int] = 3

    def value(self, x: Tensor) -> Tensor:
        return (x / (2 * self.a) + 0.5).clamp(0, 1)

    def grad(self, x: Tensor) -> Tensor:
        return (x.abs() < self.a).to(x.dtype) / (2 * self.a)


Surrogate = ATan | Sigmoid | Triangle | Rectangle
SURROGATES = {"atan": ATan, "sigmoid": Sigmoid, "triangle": Triangle, "rectangle": Rectangle}


def parameter(surrogate: Surrogate) -> float:
    """The one number of a surrogate: alpha, gamma or a."""
    return getattr(surrogate, fields(surrogate)[0].name)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, surrogate, strict):
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return (x > 0 if strict else x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyrefly: ignore[bad-override]
        (x,) = ctx.saved_tensors
        return grad * ctx.surrogate.grad(x), None, None


def spike(x: Tensor, surrogate: Surrogate, strict: bool = False) -> Tensor:
    """1 where x >= 0 (x > 0 if strict), else 0; gradient of `surrogate`. Any shape, keeps shape and dtype."""
    return _Spike.apply(x, surrogate, strict)
