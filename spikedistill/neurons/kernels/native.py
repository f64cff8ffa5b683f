"""The native kernel for processors (native.c), called with pointers. float32 and bfloat16, membranes in float32."""

import ctypes
import struct
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikedistill.neurons.kernels.ops import How, Norm, channels_last, empty

LIBRARY = Path(__file__).with_name("libnative.so")
ARGS = struct.Struct("=11q14q7d")  # the fields of Args in native.c
CONV = struct.Struct("=6q11q4q")  # the fields of Conv in sparse.c
FORWARD, BACKWARD, MOMENTS, POOL, UNPOOL = range(5)
OUTDATED = "was built for another version of this package"
LEVELS = {"baseline": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None, with one warning that says how to get it."""
    lib = None
    try:
        lib = ctypes.CDLL(str(LIBRARY))
        lib.spikedistill_run.argtypes, lib.spikedistill_run.restype = [ctypes.c_char_p], ctypes.c_int64
        lib.spikedistill_convolve.argtypes, lib.spikedistill_convolve.restype = [ctypes.c_char_p], ctypes.c_int64
        lib.spikedistill_init.restype = ctypes.c_int64
        lib.spikedistill_init.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
        why = OUTDATED if level(lib) < 0 else None
    except AttributeError:
        why = OUTDATED
    except OSError as e:
        why = "was not built" if not LIBRARY.exists() else f"does not load ({e})"
    if why is None:
        return lib
    warnings.warn(
        f"the native neuron kernel {why}: spiking layers run in plain torch on the CPU, about 10 times slower. "
        f"With a C compiler, reinstall the package (pip install -e . in a checkout)",
        stacklevel=2,
    )
    return None


def level(lib: ctypes.CDLL, name: str = "avx512_bf16") -> int:
    """Let the kernel use at most these instructions; returns what it takes on this processor, as in LEVELS."""
    return lib.spikedistill_init(parallel(), LEVELS[name], ARGS.size, CONV.size)


def parallel() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch itself runs on: a second pool of threads would fight with it."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            torch_cpu = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / name))
            return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0


def layout(x: Tensor, norm: bool) -> tuple[int, int, int]:
    """outer, C, inner of one step of a dense x."""
    if not norm:
        return 1, 1, x.shape[1:].numel()
    _, B, C, H, W = x.shape
    return (B * H * W, C, 1) if channels_last(x) else (B, C, H * W)


def vector(v: Tensor | None, channels: int) -> Tensor | None:
    """A per-channel value as the kernel reads it."""
    if v is None or (v.dtype == torch.float32 and v.shape == (channels,) and v.is_contiguous() and not v.is_cuda):
        return v
    if v.shape != (channels,) or v.device.type != "cpu":
        raise ValueError(f"expected {channels} values on the CPU, one per channel, got {list(v.shape)} on {v.device}")
    return v.detach().to(torch.float32).contiguous()


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def number(v: float | Tensor) -> float:
    return v.item() if isinstance(v, Tensor) else v


def run(op, x, norm, how, steps, need=0, grad=None, out=None, d_weight=None, d_bias=None, d_coefficients=None):
    outer, C, inner = layout(x, norm is not None)
    statistics = [None] * 4 if norm is None else [vector(v, C) for v in norm[:4]]
    rest = how.v_reset or 0.0
    send(
        *map(pointer, (x, grad, out, *statistics, d_weight, d_bias, d_coefficients, None)),
        *(op, x.dtype == torch.bfloat16, steps, len(x), outer, C, inner, torch.get_num_threads()),
        *(how.v_reset is not None, how.strict, how.detach_reset, how.kind, norm is not None and norm.batch, need),
        *(norm.eps if norm else 0.0, number(how.decay), number(how.gain)),
        *(number((1 - how.decay) * rest) if rest else 0.0, how.v_th, rest, how.parameter),
    )


def send(*fields: float) -> None:
    """Run the kernel with the fields of Args."""
    call("spikedistill_run", ARGS.pack(*fields))


def call(function: str, args: bytes) -> None:
    lib = library()
    if lib is None:
        raise RuntimeError("the native kernel was not built")
    if getattr(lib, function)(args):
        raise MemoryError("no memory for the buffers of the native kernel")


NO_NEURON = How(0.0, 0.0, 0.0, None, False, False, 0, 0.0)


def forward(x: Tensor, norm: Norm | None, how: How, steps: int) -> Tensor:
    """[T or 1, ...] -> spikes [steps, ...]."""
    out = empty(x, steps)
    run(FORWARD, x, norm, how, steps, out=out)
    return out


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of [T, B, C, H, W] over all but C."""
    mean, var = (x.new_empty(x.shape[2], dtype=torch.float32) for _ in range(2))
    run(MOMENTS, x, Norm(mean, var, None, None, 0.0, True), NO_NEURON, len(x))
    return mean, var


def backward(
    grad: Tensor, x: Tensor, norm: Norm | None, how: How, need_x: bool, need_affine: bool, need_coefficients: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight [C], bias [C] and (decay, gain) [2], from the gradient of the spikes."""
    dx = empty(x, len(x)) if need_x else None
    d_weight, d_bias = (x.new_empty(x.shape[2], dtype=torch.float32) if need_affine else None for _ in range(2))
    coefficients = x.new_empty(2, dtype=torch.float64) if need_coefficients else None
    need = need_x + 2 * need_affine + 4 * need_coefficients
    run(BACKWARD, x, norm, how, len(grad), need, grad, dx, d_weight, d_bias, coefficients)
    return dx, d_weight, d_bias, None if coefficients is None else coefficients.float()


class Pool(torch.autograd.Function):
    """2x2 max pool, or average (`mean`), of a dense [T, B, C, H, W], as torch's to the bit; an odd edge is left out.

    For the backward pass (`keep`) a max pool keeps one byte an output and an average nothing, where torch keeps x and
    eight bytes an output.
    """

    @staticmethod
    def forward(ctx, x, mean, keep):
        T, B, C, H, W = x.shape
        last = channels_last(x)
        h, w = H // 2, W // 2
        strides = (B * C * h * w, C * h * w, *((1, w * C, C) if last else (h * w, w, 1)))
        out = x.new_empty_strided((T, B, C, h, w), strides)  # no view: it may be changed in place
        which = x.new_empty(out.numel(), dtype=torch.uint8) if keep and not mean else None
        pool(POOL, x, out, x, which, mean)
        ctx.save_for_backward(which)
        ctx.of = mean, last, x.shape, x.stride()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyrefly: ignore[bad-override]
        mean, last, shape, stride = ctx.of
        dx = grad.new_empty_strided(shape, stride)
        if shape[-2] % 2 or shape[-1] % 2:
            dx.zero_()
        (which,) = ctx.saved_tensors
        pool(UNPOOL, dx, dx, (grad.movedim(2, -1) if last else grad).contiguous(), which, mean)
        return dx, None, None


def pool(op: int, large: Tensor, out: Tensor, x: Tensor, which: Tensor | None, mean: bool) -> None:
    """POOL x into out, or UNPOOL the gradient x into out; `large` gives the geometry of the map before the pool."""
    T, B, C, H, W = large.shape
    outer, channels = (T * B, C) if channels_last(large) else (T * B * C, 1)
    pointers = [pointer(t) for t in (x if op == POOL else None, x if op == UNPOOL else None, out)]
    sizes = (op, out.dtype == torch.bfloat16, H, 1, outer, channels, W, torch.get_num_threads())
    send(*pointers, *[0] * 7, pointer(which), *sizes, *(0, 0, 0, mean, 0, 0), *[0.0] * 7)
