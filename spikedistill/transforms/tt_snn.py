"""TT-SNN: train a convolution as its tensor-train cores, then multiply them back into one.

A 3x3 convolution W [O, I, 3, 3] becomes four, w1 1x1 (I to r), w2 3x1 and w3 1x3 (r to r), w4 1x1 (r to O):

    sequential  y[t] = w4 w3 w2 w1 x[t]                        STT
    parallel    y[t] = w4 (w2 + w3) / 2 w1 x[t]                PTT
    half        as parallel in early steps, w4 w1 x[t] in late ones; t < ceil(T / 2) is early         HTT

    sequential  W[o,i,u,v] = sum_{d,c,e} w4[o,d] w3[d,c,v] w2[c,e,u] w1[e,i]
    parallel    the same with K[:,:,u,1] += w2[u] / 2, K[:,:,1,v] += w3[v] / 2 in the middle: a cross, corners are 0

r (I + O) + 6 r^2 parameters instead of 9 I O. `merge` gives the plain convolutions back (for `half` two kernels).

Reference: Lee, Yin, Kim, Moitra, Li, Panda, DATE 2024, https://arxiv.org/abs/2401.08001. Ranks: see `vbmf`.
Evidence: code
Differs from the authors' code: `half` works for any T and for a schedule of your own; estimated ranks are at least 8
and a tenth of the channels, for a kernel of noise has rank 0; a bias is kept, in w4; the pool after a layer of stride 2
rounds up, so shapes stay what they were. A layer that meets an input with T = 1 runs once, as its first step does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spikedistill.functional import put, record
from spikedistill.models.layers import Conv2d, MaxPool2d
from spikedistill.spec import Count, SpecError
from spikedistill.transforms.rewrite import Where, merge, selects, written
from spikedistill.transforms.vbmf import estimated_rank

Mode = Literal["sequential", "parallel", "half"]
Downsample = Literal["maxpool", "stride"]
Rank = Count | Annotated[float, Gt(0), Le(1)] | Sequence[Count] | Literal["vbmf"]


def by_step(x: Tensor, full: Sequence[bool], early: Callable, late: Callable) -> Tensor:  # [T, B, ...] -> [T, B, ...]
    """`early` on the steps that are full, `late` on the others, both on [steps * B, ...], in the order of time."""
    if len(full) != len(x):
        raise ValueError(f"tt_snn: the schedule has {len(full)} steps, the input {len(x)}")
    order = sorted(range(len(x)), key=lambda t: not full[t])
    split = sum(full)
    parts = [(early, order[:split]), (late, order[split:])]
    y = torch.cat([layer(x[steps].flatten(0, 1)).unflatten(0, (len(steps), -1)) for layer, steps in parts if steps])
    return y if order == [*range(len(x))] else y[[order.index(t) for t in range(len(x))]]


def full_steps(steps: int, schedule: Sequence[bool] = ()) -> list[bool]:
    """Which steps are early: those of the schedule, or the first half, rounded up."""
    if schedule:
        return [*schedule[:1]] if steps == 1 else [*schedule]
    return [t < ceil(steps / 2) for t in range(steps)]


class HalfConv2d(Conv2d):
    """A merged layer of mode `half`: its 3x3 kernel in the full steps, a 1x1 kernel `late` in the others."""

    def __init__(self, *args, schedule: Sequence[bool] = (), **how):
        super().__init__(*args, **how)
        self.schedule = schedule
        self.late = nn.Parameter(self.weight[:, :, :1, :1].detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        early = partial(F.conv2d, weight=self.weight, bias=self.bias, stride=self.stride, padding=1)
        late = partial(F.conv2d, weight=self.late, bias=self.bias, stride=self.stride)
        return by_step(input, full_steps(len(input), self.schedule), early, late)

    def parts(self, steps: int) -> list[tuple[Conv2d, list[int]]]:
        """A plain convolution, and the time steps it is of; twice."""
        full, parts = full_steps(steps, self.schedule), []
        for weight, of_full in ((self.weight, True), (self.late, False)):
            kernel = weight.shape[-1]
            conv = Conv2d(self.in_channels, self.out_channels, kernel, self.stride[0], kernel // 2, bias=False)
            conv.weight = nn.Parameter(weight.detach())
            parts.append((conv, [t for t in range(steps) if full[t] == of_full]))
        return parts


class TTConv2d(nn.Module):
    """The four cores in the place of a 3x3 convolution of stride 1 or 2, on [T, B, I, H, W]."""

    def __init__(self, conv: nn.Conv2d, rank: int, mode: Mode, downsample: Downsample, schedule: Sequence[bool]):
        super().__init__()
        self.mode, self.schedule = mode, tuple(schedule)
        self.stride = conv.stride[0] if downsample == "stride" else 1
        i, o, s = conv.in_channels, conv.out_channels, self.stride
        tall, flat = ((s, 1), (1, s)) if mode == "sequential" else ((s, s), (s, s))
        make = partial(nn.Conv2d, bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
        self.w1 = make(i, rank, 1)
        self.w2 = make(rank, rank, (3, 1), tall, (1, 0))
        self.w3 = make(rank, rank, (1, 3), flat, (0, 1))
        self.w4 = make(rank, o, 1, bias=conv.bias is not None)
        self.pool = MaxPool2d(2, ceil_mode=True) if conv.stride[0] > self.stride else nn.Identity()
        for core in (self.w1, self.w2, self.w3, self.w4):
            nn.init.kaiming_uniform_(core.weight)
        if conv.bias is not None:
            self.w4.bias = nn.Parameter(conv.bias.detach().clone())

    def middle(self, a: Tensor) -> Tensor:  # [N, r, H, W] -> same, strided
        return self.w3(self.w2(a)) if self.mode == "sequential" else (self.w2(a) + self.w3(a)) / 2

    def skip(self, a: Tensor) -> Tensor:  # the size of `middle`, without its cores
        return a[..., :: self.stride, :: self.stride]

    def forward(self, x: Tensor) -> Tensor:
        a = self.w1(x.flatten(0, 1))
        if self.mode == "half":
            full = full_steps(len(x), self.schedule)
            a = by_step(a.unflatten(0, x.shape[:2]), full, self.middle, self.skip).flatten(0, 1)
        else:
            a = self.middle(a)
        return self.pool(self.w4(a).unflatten(0, x.shape[:2]))

    def kernels(self) -> tuple[Tensor, Tensor]:
        """The dense kernel [O, I, 3, 3], and the one of late steps [O, I, 1, 1]."""
        w1, w4 = self.w1.weight[:, :, 0, 0], self.w4.weight[:, :, 0, 0]
        w2, w3 = self.w2.weight[:, :, :, 0], self.w3.weight[:, :, 0, :]
        if self.mode == "sequential":
            middle = torch.einsum("dcv,ceu->deuv", w3, w2)
        else:
            middle = F.pad(w2[..., None], (1, 1)) / 2 + F.pad(w3[:, :, None], (0, 0, 1, 1)) / 2
        return torch.einsum("od,deuv,ei->oiuv", w4, middle, w1), (w4 @ w1)[:, :, None, None]

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The same function as one convolution (and its pool)."""
        full, late = self.kernels()
        o, i = full.shape[:2]
        how = dict(bias=self.w4.bias is not None, device=full.device, dtype=full.dtype)
        if self.mode == "half":
            conv = HalfConv2d(i, o, 3, self.stride, 1, schedule=self.schedule, **how)
            conv.late.copy_(late)
        else:
            conv = Conv2d(i, o, 3, self.stride, 1, **how)
        conv.weight.copy_(full)
        if conv.bias is not None and self.w4.bias is not None:
            conv.bias.copy_(self.w4.bias)
        return conv if isinstance(self.pool, nn.Identity) else nn.Sequential(conv, self.pool)


def needs_all_steps(model: nn.Module) -> bool:
    """Whether a layer computes something else after half of the steps, so that it has to know how many they are."""
    return any(isinstance(m, HalfConv2d) or (isinstance(m, TTConv2d) and m.mode == "half") for m in model.modules())


@torch.no_grad()
def tt_svd(layer: TTConv2d, weight: Tensor) -> None:
    """Set the cores of a sequential layer to the truncated tensor train of a dense kernel [O, I, 3, 3]."""
    (o, i), r = weight.shape[:2], layer.w1.out_channels
    u, s, v = torch.linalg.svd(weight.permute(1, 2, 3, 0).reshape(i, 9 * o), full_matrices=False)
    layer.w1.weight.copy_(u[:, :r].T[:, :, None, None])
    u, s, v = torch.linalg.svd((s[:r, None] * v[:r]).reshape(3 * r, 3 * o), full_matrices=False)
    layer.w2.weight.copy_(u[:, :r].reshape(r, 3, r).permute(2, 0, 1)[..., None])
    u, s, v = torch.linalg.svd((s[:r, None] * v[:r]).reshape(3 * r, o), full_matrices=False)
    layer.w3.weight.copy_(u[:, :r].reshape(r, 3, r).permute(2, 0, 1)[:, :, None])
    layer.w4.weight.copy_((s[:r, None] * v[:r]).T[:, :, None, None])


def ranks(convs: Sequence[nn.Conv2d], rank: Rank) -> list[int]:
    """One rank a layer, at most its smaller number of channels."""
    least = [min(conv.weight.shape[:2]) for conv in convs]
    if rank == "vbmf":
        found = [estimated_rank(conv.weight.detach()) for conv in convs]
        if not any(found):
            raise SpecError(["tt_snn.rank: vbmf finds noise alone, the weights are not trained: give a number, rank=8"])
        return [min(max(r, 8, round(0.1 * n)), n) for r, n in zip(found, least)]  # the lower bounds are ours
    if isinstance(rank, Sequence):
        if len(rank) != len(convs):
            raise SpecError([f"tt_snn.rank: {len(rank)} ranks for {len(convs)} layers; give one rank, or one a layer"])
        return [min(int(r), n) for r, n in zip(rank, least)]
    return [max(1, round(rank * n)) if isinstance(rank, float) else min(rank, n) for n in least]


def tt_snn(
    model: nn.Module,
    *,
    rank: Rank = "vbmf",
    mode: Mode = "parallel",
    where: Where = "",
    downsample: Downsample = "maxpool",
    schedule: Sequence[bool] = (),
    init: Literal["kaiming", "svd"] = "kaiming",
) -> nn.Module:
    """Rewrite the 3x3 convolutions of a model, in place, as tensor-train layers under the same names.

    rank: of all layers, at most their channels; a share of the channels (0.25); a list, one a layer; or vbmf, which
    estimates it from trained weights and refuses those that were only drawn.
    mode: sequential, parallel, or half, which drops the middle cores in late steps.
    where: pattern(s) on the names of layers, such as 'stage3*'; empty for all but the first convolution.
    downsample: what replaces a stride of 2, a max pool after the cores as in the code, or strided cores.
    schedule: for half, whether each step is full; empty for the first half of the steps.
    init: of the cores, kaiming as in the code; svd starts a sequential layer near its old kernel.
    Raises SpecError where nothing would change.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    first = next(iter(convs), "")
    fit = {n: c for n, c in convs.items() if isinstance(c, Conv2d) and _is_3x3(c)}
    found = {n: c for n, c in fit.items() if (selects(where, n, c) if where else n != first)}
    if not found:
        what = f"where={where!r} names no 3x3 convolution with time" if where else "no 3x3 convolution but the first"
        raise SpecError([f"tt_snn: {what} in {type(model).__name__}; it has {', '.join(fit) or 'none'}"])
    if rewritten := [n for n, c in found.items() if parametrize.is_parametrized(c)]:
        raise SpecError([f"tt_snn: '{rewritten[0]}' has gates or factors, which cores would replace: leave out one"])
    if init == "svd" and mode != "sequential":
        raise SpecError([f"tt_snn.init: svd is for mode='sequential', not '{mode}': only that one can hold any kernel"])
    chosen = ranks([*found.values()], rank)
    for (name, conv), r in zip(found.items(), chosen):
        layer = TTConv2d(conv, r, mode, downsample, schedule)
        if init == "svd":
            tt_svd(layer, conv.weight)
        put(model, name, layer)
    settings = dict(rank=chosen, mode=mode, where=[*found], downsample=downsample, schedule=[*schedule])
    record(model, written("tt_snn", **settings))
    return model


def _is_3x3(conv: nn.Conv2d) -> bool:
    same = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.dilation == (1, 1)
    return same and conv.groups == 1 and conv.stride in ((1, 1), (2, 2))


__all__ = ["TTConv2d", "merge", "tt_snn"]
