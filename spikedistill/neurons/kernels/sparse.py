"""Convolutions of spikes on the CPU (sparse.c): they add weights up where there are spikes and keep the spikes as bits.

A dense convolution multiplies every element, also the nineteen of twenty that are 0. This one is slower for each, but
does only what is there, so it is taken where few elements are not 0 (`LIMITS`). The choice depends on the data and the
processor alone, never on time, so that a run gives the same numbers again. Sums are in float32, in another order than
those of the dense one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spikedistill.neurons.kernels import native

SPIKES, FORWARD, WEIGHTS = range(3)
LANES = 16
# Share of elements that are not 0 up to which forward and backward pass together gain, measured on Zen 4. Processors
# with tiles (AMX) multiply bfloat16 several times faster and stay with the dense one, for nobody has measured there.
LIMITS = {torch.float32: 0.4, torch.bfloat16: -1.0 if torch.cpu._is_amx_tile_supported() else 0.32}


instead: ContextVar[float | None] = ContextVar("instead", default=None)  # of LIMITS


@contextmanager
def limited(share: float) -> Iterator[None]:
    """`with limited(-1):` takes dense convolutions alone, 1 this one always; for both types and for this thread."""
    token = instead.set(share)
    try:
        yield
    finally:
        instead.reset(token)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel knows this convolution: x [N, C, H, W] channels last, weight [O, C, 3, 3], O = 16 k."""
    return (
        native.takes(x)
        and x.dtype == weight.dtype
        and weight.shape[1:] == (x.shape[1], 3, 3)
        and weight.shape[0] % LANES == 0
        and x.shape[1] >= LANES
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def send(op, x, bits, weight, bias, grad, out, shape, binary=False, allowed=0) -> None:
    """Run the kernel with the fields of Conv; `shape` is that of x."""
    (N, C, H, W), bf16, threads = shape, weight.dtype == torch.bfloat16, torch.get_num_threads()
    pointers = map(native.pointer, (x, bits, weight, bias, grad, out))
    sizes = (op, bf16, N, H, W, C, *weight.shape[::2], binary, allowed, threads)
    across = (out if op == WEIGHTS else weight).stride()
    native.call("spikedistill_convolve", native.CONV.pack(*pointers, *sizes, *across))


def spikes(x: Tensor, weight: Tensor, limit: float) -> tuple[Tensor, bool] | None:
    """A bit for each element of x that is not 0, and whether all those are 1; None where they are more than `limit`."""
    N, C, H, W = x.shape
    bits, found = x.new_empty(N, H, W, -(-C // 64), dtype=torch.int64), x.new_zeros(2, dtype=torch.int64)
    allowed = int(limit * x.numel())
    send(SPIKES, x, bits, weight, None, None, found, x.shape, allowed=allowed)
    count, other = found.tolist()
    return (bits, not other) if count <= allowed else None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)` of what `takes` allows; by spikes where their share is within `LIMITS`."""
    limit = instead.get()
    found = spikes(x, weight, LIMITS[x.dtype] if limit is None else limit)
    return F.conv2d(x, weight, bias, padding=1) if found is None else Convolution.apply(x, weight, bias, *found)


class Convolution(torch.autograd.Function):
    """Keeps the weight and a bit for each element of x, and x itself only where some elements are neither 0 nor 1."""

    @staticmethod
    def forward(ctx, x, weight, bias, bits, binary):
        N, _, H, W = x.shape
        # no view, which autograd would not let anybody change in place
        out = torch.empty(N, len(weight), H, W, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        added = None if bias is None else bias.detach().float().contiguous()
        send(FORWARD, x, bits, weight, added, None, out, x.shape, binary)
        ctx.save_for_backward(None if binary else x, weight, bits)
        ctx.shape = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyrefly: ignore[bad-override]
        x, weight, bits = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = dw = db = None
        if need_x:  # a convolution with the kernel turned around
            turned = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            dx = F.conv2d(grad, turned, padding=1)
        if need_weight:
            dw = torch.empty_like(weight)
            send(WEIGHTS, x, bits, weight, None, grad, dw, ctx.shape, x is None)
        if need_bias:
            db = grad.sum((0, 2, 3))
        return dx, dw, db, None, None
