"""What several methods use: formulas, pure functions of tensors and means over the batch; taps in pairs; rewrites."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.plan import MergeError
from spikedistill.core.step import Batch
from spikedistill.core.taps import TapError, published
from spikedistill.models.layers import Vote
from spikedistill.neurons import Neuron
from spikedistill.spec import SpecError


def wide(x: Tensor) -> Tensor:
    """At least float32: sums of bf16 features, and a softmax of bf16 logits, are off by percents."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kd_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:  # [B, C], [B, C] -> []
    """tau^2 KL(softmax(t / tau) || softmax(s / tau)), mean over the batch; the teacher gets no gradient.

    Hinton, Vinyals, Dean 2015, arXiv:1503.02531, sec. 2.
    """
    log_s = F.log_softmax(wide(student) / tau, -1)
    log_t = F.log_softmax(wide(teacher.detach()) / tau, -1)
    return tau**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def kd_per_step(student: Tensor, teacher: Tensor, tau: float) -> Tensor:  # [T, B, C], [B, C] or [T, B, C] -> []
    """`kd_loss` at every time step, averaged over the steps; a teacher without time is the same at every step."""
    return kd_loss(student.flatten(0, 1), teacher.expand_as(student).flatten(0, 1), tau)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:  # [B, C], [B] or [B, C] -> [B]
    """-sum_k y_k log softmax(z)_k for each sample. Labels [B] and their one-hot rows [B, C] give the same value."""
    return F.cross_entropy(wide(logits), target, reduction="none")


def matched(teacher: Tensor, student: Tensor, resize: bool, who: str) -> Tensor:  # [B, C_t, h, w], [B, C_s, H, W]
    """The teacher's map at the student's height and width: [B, C_t, H, W], interpolated where `resize` allows it.

    Raises ValueError, beginning with `who` and naming both shapes, where they differ and it does not.
    """
    if teacher.shape[-2:] == student.shape[-2:]:
        return teacher
    if not resize or teacher.ndim != 4 or student.ndim != 4:
        shapes = f"student feature {list(student.shape)} and teacher feature {list(teacher.shape)}"
        raise ValueError(f"{who}: {shapes} do not fit: choose other taps, or resize=True to interpolate the teacher's")
    return F.interpolate(wide(teacher), student.shape[-2:], mode="bilinear")


def paired(
    student: nn.Module, teacher: nn.Module, taps: Sequence[str], teacher_taps: Sequence[str], who: str
) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Taps of student and teacher pair by pair, and the channels of each pair.

    Where none are named: those that both publish under one name; where no name is shared, all of them in order.
    Raises SpecError or TapError, beginning with `who` or naming the model, for lists that do not fit.
    """
    if not taps and not teacher_taps:
        ours, theirs = [*getattr(student, "dims", {})], [*getattr(teacher, "dims", {})]
        shared = [tap for tap in ours if tap in theirs]
        if not shared and len(ours) != len(theirs):
            lists = f"student has {', '.join(ours) or 'none'}, the teacher {', '.join(theirs) or 'none'}"
            raise TapError(f"{who}: the {lists}: no name is shared, so give taps and teacher_taps")
        taps, teacher_taps = (shared, shared) if shared else (ours or [""], theirs or [""])
    if len(taps) != len(teacher_taps):
        raise SpecError([f"{who}: {len(taps)} taps and {len(teacher_taps)} teacher_taps, they go in pairs"])
    pairs = [(published(student, s, "student"), published(teacher, t, "teacher")) for s, t in zip(taps, teacher_taps)]
    return [s for (s, _), _ in pairs], [t for _, (t, _) in pairs], [(a, b) for (_, a), (_, b) in pairs]


def linear_cka(x: Tensor, y: Tensor) -> Tensor:  # [T, B, ...], [T, B, ...] -> [T]
    """Linear centred kernel alignment of the samples at each time step, in [0, 1]: <G, H> / (|G| |H| + 1e-7).

    G and H are the centred Gram matrices of a batch, in Frobenius norm. 0 for a batch of one sample or equal rows.
    Kornblith et al. 2019, arXiv:1905.00414, eq. 1 to 3, with the biased estimate.
    """
    with torch.autocast(x.device.type, enabled=False):
        centred = (wide(v).flatten(2) - wide(v).flatten(2).mean(1, keepdim=True) for v in (x, y))
        g, h = (v @ v.mT for v in centred)
        norms = torch.linalg.matrix_norm(g) * torch.linalg.matrix_norm(h)
        return (g * h).sum((-2, -1)) / (norms + 1e-7)


def step_losses(z: Tensor, y: Tensor, lam: float, phi: float) -> Tensor:  # [T, B, C], [B] or [B, C] -> [T]
    """(1 - lam) CE(z[t], y) + lam mean( (z[t] - phi)^2 ) at every time step (TET), each a mean over the batch."""
    z = wide(z)
    ce = torch.stack([F.cross_entropy(step, y) for step in z])
    return (1 - lam) * ce + lam * (z - phi).square().mean((1, 2))


def replaced(source: Tensor, x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Sliding replacement: each sample of `source` is swapped for the whole of its `x` with probability `share`.

    source: [B, C', H, W], the same at every step, or [T, B, C', H, W].  x: [T, B, C, H, W] or [B, C, H, W].
    Other channels than those of x become V = max over them (the V of HSV), repeated.
    Returns the mixed stream, in the shape of x, and which samples are swapped, [B]. Raises ValueError for other shapes.
    He et al. 2024, arXiv:2303.13077.
    """
    if source.shape[-2:] != x.shape[-2:] or source.shape[-4] != x.shape[-4] or source.ndim > x.ndim:
        raise ValueError(f"replacement: static images {list(source.shape)} and events {list(x.shape)} do not fit")
    if source.shape[-3] != x.shape[-3]:
        source = source.amax(-3, keepdim=True)
    swap = torch.rand(x.shape[-4], device=x.device) < share
    return torch.where(swap.view(-1, 1, 1, 1), x, source), swap


def stream(batch: Mapping[str, Tensor], name: str, who: str) -> Tensor:
    """A stream of the batch. Raises ValueError, beginning with `who`, where it is not there."""
    if name not in batch:
        what = "images of the classes of the events: data.Pairs(events, images), --pair on the command line"
        raise ValueError(f"{who}: the batch has {', '.join(batch)} and no '{name}': it needs {what}")
    return batch[name]


def replace_source(batch: Batch, share: float, who: str = "replacement") -> Batch:
    """The batch with samples of "source" `replaced` by those of "x"; "swapped" [B] says which.

    Raises ValueError, beginning with `who`, where there is no "source", MergeError where another method has it.
    """
    if "swapped" in batch:
        raise MergeError(f"{who}: the images of this batch are replaced already: take one of the two methods")
    source, swapped = replaced(stream(batch, "source", who), batch["x"], share)
    return batch | {"source": source, "swapped": swapped}


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:  # same shape twice -> []
    """Mean square difference over all elements; the teacher gets no gradient."""
    return (wide(student) - wide(teacher.detach())).square().mean()


def classes_of(model: nn.Module, classes: int | None, who: str) -> int:
    """`classes`, or where it is None the outputs of the model's last linear layer, over the votes that a class has.

    Raises SpecError, beginning with `who`, where there is none.
    """
    sizes = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    if not (classes or sizes):
        raise SpecError([f"{who}: {type(model).__name__} has no linear layer to tell its classes by: set classes="])
    return classes or sizes[-1] // prod(m.size for m in model.modules() if isinstance(m, Vote))


def potential(model: nn.Module, tap: str, who: str) -> str:
    """`tap`, or where it is empty the membrane potentials of the last neurons of the last map in `dims`.

    Neurons between that map and the classifier are not meant (a hidden linear layer, a spiking readout), save where the
    map has none of its own: then the model's last. Raises TapError, beginning with `who`, where there are none at all.
    """
    neurons = [name for name, m in model.named_modules() if isinstance(m, Neuron)]
    last = next(reversed(getattr(model, "dims", {})), "")
    inside = [name for name in neurons if name == last or name.startswith(f"{last}.")] or neurons
    if not (tap or inside):
        raise TapError(f"{who}: {type(model).__name__} has no spiking neurons to take potentials from")
    return tap or f"{inside[-1]}.v"


def shortcut(model: nn.Module, norm: str, who: str) -> str:
    """The tap that is added to this norm in a residual block, its child `shortcut`; "" where the norm is in none.

    Raises SpecError, beginning with `who`, where it is not the last norm before the sum, or what is added has no tap.
    """
    for depth in range(norm.count("."), 0, -1):
        block = ".".join(norm.split(".")[:depth])
        inside = model.get_submodule(block)
        if not (hasattr(inside, "shortcut") or hasattr(inside, "downsample")):
            continue
        norms = [n for n, m in inside.named_modules() if isinstance(m, nn.BatchNorm2d)]
        last = [n for n in norms if n.split(".")[0] not in ("shortcut", "downsample")][-1]
        if norm != f"{block}.{last}":
            raise SpecError([f"{who}.norms: '{norm}' is not the norm before the sum of its block, '{block}.{last}' is"])
        if hasattr(inside, "downsample") or not isinstance(inside.shortcut, nn.Module):
            raise SpecError(
                [f"{who}.norms: what '{block}' adds to '{norm}' cannot be tapped: give teacher_taps instead"]
            )
        return f"{block}.shortcut"
    return ""


def idle(who: str, why: str, **given: bool) -> None:
    """Raise SpecError for settings of a method that were given although they do nothing there."""
    if mistakes := [f"{who}.{name}: it does nothing {why}" for name, other in given.items() if other]:
        raise SpecError(mistakes)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of this name, in the mode of the model, and under every other name that it has there."""
    old = model.get_submodule(name)
    for parent in [*model.modules()]:
        parent._modules.update({leaf: module for leaf, child in parent._modules.items() if child is old})
    module.train(model.training)


def record(model: nn.Module, text: str) -> None:
    """Add a rewrite to `model.spec`, where it has one, so that a saved model can be built again."""
    spec = getattr(model, "spec", None)
    if isinstance(spec, dict):
        done = spec | {"transforms": [*spec.get("transforms", ()), text]}
        setattr(model, "spec", done)  # noqa: B010, an attribute that nn.Module does not declare
