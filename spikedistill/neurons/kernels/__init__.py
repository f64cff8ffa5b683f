"""The fast neurons, with the signature of `neurons.functional`. This file is the one place that chooses between them.

native  C, for float32 and bfloat16 on the CPU; built when the package is installed
triton  for CUDA, where triton is installed
eager   plain torch, for everything else
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d

from spikedistill.neurons import functional
from spikedistill.neurons.functional import Number, time_steps
from spikedistill.neurons.kernels import eager, native, ops, sparse
from spikedistill.neurons.kernels.ops import channels_last, dense
from spikedistill.neurons.surrogate import SURROGATES, ATan, Surrogate, parameter

_forced = "auto"


@contextmanager
def use(name: str) -> Iterator[None]:
    """`with use("eager"):` or "native", "triton", "auto": force a kernel, to test and to compare. For the process."""
    global _forced
    if name not in ("auto", "eager", "native", "triton"):
        raise ValueError(f"no kernel {name!r}: auto, eager, native, triton")
    if name == "triton" and _gpu() is None:
        raise ValueError("the kernel 'triton' needs the package triton, which is not installed")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(x: Tensor) -> ModuleType:
    """The module that computes for x."""
    if _forced == "eager" or x.numel() == 0:
        return eager
    if _forced == "native":
        if not native.takes(x):
            raise ValueError(f"the native kernel takes float32 and bfloat16 on the CPU, not {x.dtype} on {x.device}")
        return native
    if _forced == "triton" or x.is_cuda:
        gpu = _gpu()
        return gpu if gpu and (_forced == "triton" or gpu.takes(x)) else eager
    return native if native.takes(x) and native.library() else eager


@cache
def _gpu() -> ModuleType | None:
    """The Triton kernels, or None, with one warning."""
    try:
        return import_module("spikedistill.neurons.kernels.gpu")
    except ImportError:
        warnings.warn("triton is not installed: spiking layers run in plain torch on the GPU, slower", stacklevel=2)
        return None


ops.define(choose)


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
    how = dict(v_th=v_th, v_reset=v_reset, strict=strict, detach_reset=detach_reset, surrogate=surrogate)
    if _only_reference(x, decay, gain, surrogate):
        return functional.neuron(x, decay, gain, **how, steps=steps)[0]
    return _call(x, None, None, None, None, decay, gain, 0.0, False, **how, steps=steps)


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
    Keeps x and two numbers per channel for the backward pass.
    """
    steps = time_steps(x, steps)
    if x.ndim != 5 or x.shape[2] != norm.num_features:
        raise ValueError(f"expected [T, B, C, H, W] with C = {norm.num_features}, got {list(x.shape)}")
    how = dict(v_th=v_th, v_reset=v_reset, strict=strict, detach_reset=detach_reset, surrogate=surrogate)
    if x.numel() == 0 or _only_reference(x, decay, gain, surrogate):
        u = nn.BatchNorm2d.forward(norm, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return neuron(u, decay, gain, **how, steps=steps)
    batch = norm.training or norm.running_mean is None
    mean, var = _batch_statistics(x, norm) if batch else (norm.running_mean, norm.running_var)
    return _call(x, mean, var, norm.weight, norm.bias, decay, gain, norm.eps, batch, **how, steps=steps)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution of [N, C, H, W] with padding 1: by its spikes alone where x has few, see `kernels/sparse.py`."""
    if not traced(x) and native.takes(x) and native.takes(weight):
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        if sparse.takes(x, weight) and choose(x) is native:
            return sparse.convolution(x, weight, bias)
    return conv2d(x, weight, bias, padding=1)


def max_pool(x: Tensor) -> Tensor:
    """2x2 max pool of [T, B, C, H, W], as torch's to the bit, and with less to keep for the backward pass."""
    return _pool(x, False)


def avg_pool(x: Tensor) -> Tensor:
    """2x2 average pool, likewise."""
    return _pool(x, True)


def traced(x: Tensor) -> bool:
    """Whether a compiler, an exporter or torch.func watches, which should see torch's own operators."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return watched or type(x) is not Tensor


def _pool(x: Tensor, mean: bool) -> Tensor:
    if traced(x) or x.ndim != 5 or min(x.shape[-2:]) < 2 or choose(x) is not native:
        return (avg_pool2d if mean else max_pool2d)(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
    return native.Pool.apply(dense(x), mean, torch.is_grad_enabled() and x.requires_grad)


def _only_reference(x: Tensor, decay: Number, gain: Number, surrogate: Surrogate) -> bool:
    """What the kernels do not know: a surrogate of the user's, or a decay or gain for each neuron."""
    many = any(isinstance(c, Tensor) and c.numel() != 1 for c in (decay, gain))
    return many or not x.is_floating_point() or type(surrogate) not in SURROGATES.values()


def _call(x, mean, var, weight, bias, decay, gain, eps, batch, *, surrogate, steps, **how) -> Tensor:
    numbers = [(c, 0.0) if isinstance(c, Tensor) else (None, c) for c in (decay, gain)]
    (decay, fixed_decay), (gain, fixed_gain) = numbers
    return torch.ops.spikedistill.neuron.default(
        *(x, mean, var, weight, bias, decay, gain, eps, batch, fixed_decay, fixed_gain, *how.values()),
        *(surrogate.kind, parameter(surrogate), steps),
    )


def _batch_statistics(x: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of x; the running ones follow as in torch.nn.BatchNorm2d."""
    count = x.numel() // x.shape[2]
    if count == 1:
        raise ValueError(f"expected more than 1 value per channel when training, got input {list(x.shape)}")
    mean, var = torch.ops.spikedistill.moments.default(x)
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None and norm.num_batches_tracked is not None
        running, dtype = norm.running_mean, norm.running_mean.dtype
        norm.num_batches_tracked.add_(1)
        new = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.to(dtype)
        running.lerp_(mean.to(dtype), new)
        norm.running_var.lerp_((var * (count / (count - 1))).to(dtype), new)
    return mean, var
