"""The neuron in Triton, for CUDA: one kernel forward, two backward; sums over a batch are those of torch.

Memory is taken as flat, as in native.c: element i of one step belongs to channel (i / inner) mod C. The gradient of the
currents is kept in float32 for as long as a backward call lasts; what is saved between the passes is the input alone.
Run under Triton's interpreter only (TRITON_INTERPRET=1), where it agrees with `eager`; on a GPU neither its results nor
its speed have been seen yet.
"""

from math import pi

import torch
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]
from torch import Tensor

from spikedistill.neurons.kernels import eager
from spikedistill.neurons.kernels.eager import moments  # noqa: F401  the third function of a kernel
from spikedistill.neurons.kernels.native import layout
from spikedistill.neurons.kernels.ops import How, Norm, empty

BLOCK = 1024
SOFT, HARD_ZERO, HARD = 0, 1, 2


@triton.jit
def _fires(h, v_th, STRICT: tl.constexpr):
    if STRICT:
        s = h > v_th
    else:
        s = h >= v_th
    return s


@triton.jit
def _reset(h, v_th, rest, STRICT: tl.constexpr, RESET: tl.constexpr):
    """V after reset. As in the reference an infinite H leaves NaN."""
    s = _fires(h, v_th, STRICT)
    if RESET == 0:
        v = h - tl.where(s, v_th, 0.0)
    else:
        v = h * tl.where(s, 0.0, 1.0) + tl.where(s, rest, 0.0)
    return v


@triton.jit
def _current(x, i, inside, c, scale, shift, NORM: tl.constexpr):
    u = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        u = u * tl.load(scale + c, mask=inside, other=0.0) + tl.load(shift + c, mask=inside, other=0.0)
    return u


@triton.jit
def _charge(v, u, decay, gain, offset, RESET: tl.constexpr):
    h = decay * v + gain * u
    if RESET == 2:
        h = h + offset
    return h


@triton.jit
def _coefficients(learned, decay, gain, offset, LEARNED: tl.constexpr):
    if LEARNED:
        decay = tl.load(learned)
        gain = tl.load(learned + 1)
        offset = tl.load(learned + 2)
    return decay, gain, offset


@triton.jit
def _slope(z, a, b, KIND: tl.constexpr):
    if KIND == 0:
        g = b / (a + z * z)
    elif KIND == 1:
        e = tl.exp(-tl.abs(a * z))
        g = a * (e / ((1.0 + e) * (1.0 + e)))
    elif KIND == 2:
        d = a - tl.abs(z)
        g = tl.where(d < 0.0, 0.0, d) * b
    else:
        g = tl.where(tl.abs(z) < a, b, 0.0)
    return g


@triton.jit
def _forward(
    x, out, scale, shift, learned, decay, gain, offset, v_th, rest, size, channels, inner, steps, next,
    NORM: tl.constexpr, LEARNED: tl.constexpr, STRICT: tl.constexpr, RESET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    size, next = tl.cast(size, tl.int64), tl.cast(next, tl.int64)  # t * size may pass 2^31
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    c = (i // inner) % channels
    decay, gain, offset = _coefficients(learned, decay, gain, offset, LEARNED)
    v = tl.zeros([BLOCK], tl.float32) + rest
    for t in range(steps):
        u = _current(x, i + t * next, inside, c, scale, shift, NORM)
        h = _charge(v, u, decay, gain, offset, RESET)
        s = tl.where(_fires(h, v_th, STRICT), 1.0, 0.0)
        tl.store(out + i + t * size, s.to(out.dtype.element_ty), mask=inside)
        v = _reset(h, v_th, rest, STRICT, RESET)


@triton.jit
def _backward(
    x, grad, hs, du, sums, scale, shift, learned, decay, gain, offset, v_th, rest, a, b,
    size, channels, inner, steps, next,
    NORM: tl.constexpr, LEARNED: tl.constexpr, STRICT: tl.constexpr, RESET: tl.constexpr, DETACH: tl.constexpr,
    KIND: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hs [steps, size]: H on the way forward. du [1 or steps, size]: gradient of the currents."""
    size, next = tl.cast(size, tl.int64), tl.cast(next, tl.int64)  # t * size may pass 2^31
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    c = (i // inner) % channels
    decay, gain, offset = _coefficients(learned, decay, gain, offset, LEARNED)
    v = tl.zeros([BLOCK], tl.float32) + rest
    for t in range(steps):
        u = _current(x, i + t * next, inside, c, scale, shift, NORM)
        h = _charge(v, u, decay, gain, offset, RESET)
        tl.store(hs + i + t * size, h, mask=inside)
        v = _reset(h, v_th, rest, STRICT, RESET)
    tl.debug_barrier()
    through = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sum_decay = tl.zeros([BLOCK], tl.float32)
    sum_gain = tl.zeros([BLOCK], tl.float32)
    for k in range(steps):
        t = steps - 1 - k
        h = tl.load(hs + i + t * size, mask=inside, other=0.0)
        g = _slope(h - v_th, a, b, KIND)
        dh = tl.load(grad + i + t * size, mask=inside, other=0.0).to(tl.float32) * g
        if k > 0:
            stay = tl.zeros([BLOCK], tl.float32) + 1.0
            if RESET != 0:
                stay = tl.where(_fires(h, v_th, STRICT), 0.0, 1.0)
            if not DETACH:
                if RESET == 0:
                    stay = stay - v_th * g
                else:
                    stay = stay + (rest - h) * g
            dh = dh + through * stay
        through = decay * dh
        total = total + gain * dh
        if next > 0:
            tl.store(du + i + t * size, gain * dh, mask=inside)
        if SUMS:
            u = _current(x, i + t * next, inside, c, scale, shift, NORM)
            sum_gain += tl.where(inside, dh * u, 0.0)
            if t > 0:
                v = _reset(tl.load(hs + i + (t - 1) * size, mask=inside, other=0.0), v_th, rest, STRICT, RESET)
                sum_decay += tl.where(inside, dh * (v - rest), 0.0)
    if next == 0:
        tl.store(du + i, total, mask=inside)
    if SUMS:
        tl.store(sums + 2 * tl.program_id(0), tl.sum(sum_decay, 0))
        tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(sum_gain, 0))


@triton.jit
def _finish(
    x, du, dx, scale, mean, mean_du, slope, size, channels, inner, BATCH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient of x from that of the normalised currents. size: of all steps, since channels repeat with the step."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    c = (i // inner) % channels
    d = tl.load(du + i, mask=inside, other=0.0)
    if BATCH:
        centred = tl.load(x + i, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + c, mask=inside, other=0.0)
        d = d - tl.load(mean_du + c, mask=inside, other=0.0) - centred * tl.load(slope + c, mask=inside, other=0.0)
    d = d * tl.load(scale + c, mask=inside, other=0.0)
    tl.store(dx + i, d.to(dx.dtype.element_ty), mask=inside)


def takes(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def constants(x: Tensor, norm: Norm | None, how: How, steps: int):
    """What both passes need, in the order of the kernels: tensors, numbers, sizes; and what a compilation fixes."""
    rest = how.v_reset or 0.0
    scale = shift = x
    if norm is not None:
        like = x.new_empty(0, dtype=torch.float32)
        _, scale = eager.affine(like, norm)
        shift = eager.shift(like, norm, scale)
    learned, decay, gain, offset = x, how.decay, how.gain, 0.0
    if isinstance(decay, Tensor) or isinstance(gain, Tensor):
        given = (decay, gain, (1 - decay) * rest)
        learned = torch.stack([torch.as_tensor(c, dtype=torch.float32, device=x.device).reshape(()) for c in given])
        decay = gain = 0.0
    else:
        offset = (1 - decay) * rest
    outer, channels, inner = layout(x, norm is not None)
    size = outer * channels * inner
    next = size if x.shape[0] > 1 else 0
    tensors, numbers = (scale, shift, learned), (float(decay), float(gain), float(offset), float(how.v_th), float(rest))
    fixed = dict(
        NORM=norm is not None,
        LEARNED=learned is not x,
        STRICT=how.strict,
        RESET=SOFT if how.v_reset is None else HARD if rest else HARD_ZERO,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    return tensors, numbers, (size, channels, inner, steps, next), fixed


def surrogate_constants(kind: int, p: float) -> tuple[float, float]:
    c = pi * p / 2
    return [(1 / c**2, p / 2 / c**2), (p, 0.0), (p, 1 / p**2), (p, 1 / (2 * p))][kind]


def forward(x: Tensor, norm: Norm | None, how: How, steps: int) -> Tensor:
    """[T or 1, ...] -> spikes [steps, ...]."""
    out = empty(x, steps)
    tensors, numbers, sizes, fixed = constants(x, norm, how, steps)
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(sizes[0], BLOCK),)](x, out, *tensors, *numbers, *sizes, **fixed)
    return out


def backward(
    grad: Tensor, x: Tensor, norm: Norm | None, how: How, need_x: bool, need_affine: bool, need_coefficients: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight [C], bias [C] and (decay, gain) [2], from the gradient of the spikes."""
    steps = grad.shape[0]
    tensors, numbers, sizes, fixed = constants(x, norm, how, steps)
    size, channels, inner, _, _ = sizes
    programs = triton.cdiv(size, BLOCK)
    hs = x.new_empty(steps * size, dtype=torch.float32)
    du = empty(x, x.shape[0], dtype=torch.float32)
    sums = hs.new_empty(programs, 2)
    with torch.cuda.device_of(x):
        _backward[(programs,)](
            *(x, grad, hs, du, sums, *tensors, *numbers, *surrogate_constants(how.kind, how.parameter), *sizes),
            **(fixed | dict(DETACH=how.detach_reset, KIND=how.kind, SUMS=need_coefficients)),
        )
    del hs
    coefficients = sums.sum(0) if need_coefficients else None
    if norm is None:
        return du.to(x.dtype) if need_x else None, None, None, coefficients
    mean = norm.mean.float()
    invstd, scale = eager.affine(du, norm)
    d_bias = d_weight = mean_du = slope = mean
    if need_affine or norm.batch:
        d_bias = du.sum(eager.OTHERS)
        d_weight = ((x - eager.per_channel(mean)) * du).sum(eager.OTHERS) * invstd
        count = du.numel() // channels
        mean_du, slope = d_bias / count, d_weight * invstd / count
    dx = None
    if need_x:
        dx = empty(x, x.shape[0])
        with torch.cuda.device_of(x):
            _finish[(triton.cdiv(du.numel(), BLOCK),)](
                *(x, du, dx, scale, mean, mean_du, slope, du.numel(), channels, inner),
                **dict(BATCH=norm.batch, BLOCK=BLOCK, enable_fp_fusion=False),
            )
    return dx, d_weight if need_affine else None, d_bias if need_affine else None, coefficients
