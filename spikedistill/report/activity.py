"""What a network does: firing rates and synaptic operations, measured on data.

What counts as what, for convolutions, linear layers and products of activations (attention):
  whole numbers, such as spikes and sums of spikes: k additions for an input of k, to every output that it reaches;
  averages of spikes (after average pooling, or a mean over space or time): the spikes that were averaged, because
  event-driven hardware adds each of them when it arrives and folds 1 / k into the weights;
  spikes, or averages of them, times one number that never changes (a neuron that fires u): the same, u is folded, too;
  anything else, such as an image: a multiply-add for each.
Nothing is counted for a weight that is 0, nor into or out of a neuron with a closed gate: pruned is skipped.
Norms are folded into the weights before deployment and are not counted.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spikedistill.core.step import Batch
from spikedistill.core.taps import eval_mode, infer
from spikedistill.models.foreign import has_foreign_neurons
from spikedistill.neurons import Neuron
from spikedistill.transforms.sparsity import open_positions, synapses
from spikedistill.transforms.tt_snn import HalfConv2d
from spikedistill.transforms.unstructured_pruning import Gated


@dataclass
class _Layer:
    spikes: float = 0.0
    sites: int = 0  # neurons x time steps x samples
    neurons: int = 0
    each: Tensor | None = None  # spikes of every neuron


@dataclass
class _Synapses:
    operations: float = 0.0  # of inputs that are not zero
    dense: float = 0.0
    once: float = 0.0  # dense, of one time step
    inputs: int = 0
    outputs: int = 0
    weights: int = 0
    averaged: int = 1  # the largest k of which an input was the mean
    binary: bool = True  # inputs are whole numbers, or means of them: additions, else multiplications
    unit: float = 0.0  # what one spike adds, where spikes are scaled
    calls: list[tuple[float, torch.Size]] = field(default_factory=list)


def activity(
    model: nn.Module, data: Iterable[Batch], steps: int | None = None, samples: int = 1000, neurons: bool = False
) -> dict[str, Any]:
    """Firing rates and operations per sample, over the first `samples` of `data`.

    "layers": name -> {"rate": spikes per neuron and step, "neurons"} and, with `neurons`, "rates", of every neuron;
    "rate": the same over all neurons; "steps": T.
    "operations": {"ac", "mac", "dense"}: additions for layers whose input is spikes, multiply-adds for those with other
    inputs (non-zero ones only), and multiply-adds of the same layers run densely, weights of 0 too. A static input is
    convolved once.
    "synapses": the same for each layer, name -> {"kind": ac or mac, "operations", "dense", "once": dense operations of
    one time step (what the ANN of this shape does for an image), "inputs", "outputs": values over all steps,
    "weights", "averaged": k where the input is means of k spikes}.
    "foreign": True, where there are neurons of another library, which are not among "layers".
    """
    gated = {id(m.neuron) for m in model.modules() if isinstance(m, Gated)}  # counted behind their gate
    firing = [(name, m) for name, m in model.named_modules() if isinstance(m, Neuron | Gated) and id(m) not in gated]
    layers = {name: _Layer() for name, _ in firing}
    counts = {name: _Synapses() for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    modules, seen, steps_seen = dict(model.named_modules()), 0, 1
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    fired_yet = [False]
    with eval_mode(model):
        behind = open_positions(model)

    def fired(layer: _Layer):
        def hook(module: nn.Module, inputs: tuple, out: Tensor) -> None:
            fired_yet[0] = True
            layer.spikes += out.sum(dtype=torch.float64).item()
            layer.sites += out.numel()
            layer.neurons = out[0, 0].numel()
            if neurons:
                each = out.flatten(2).sum((0, 1), dtype=torch.float64)
                layer.each = each if layer.each is None else layer.each + each

        return hook

    def operated(count: _Synapses):
        def hook(module: nn.Module, inputs: tuple, out: Tensor) -> None:
            _count(count, module, inputs[0].detach(), out, fired_yet[0], behind.get(module))

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(modules[name].register_forward_hook(fired(layer)).remove)
        for name, count in counts.items():
            stack.callback(modules[name].register_forward_hook(operated(count)).remove)
        for batch in data:
            size = len(batch["y"]) if "y" in batch else batch["x"].shape[batch["x"].ndim == 5]
            take = min(size, samples - seen)
            timed = batch["x"].ndim == 5 or batch["x"].shape[0] != size
            x = batch["x"][:, :take] if timed else batch["x"][:take]
            fired_yet[0] = False
            with _Products(counts):
                steps_seen = len(infer(model, x.to(device), steps).logits)
            for count in counts.values():
                for dense, shape in count.calls:
                    merged = shape[0] == steps_seen * take
                    timed = merged or (len(shape) > 1 and shape[:2] == (steps_seen, take))
                    count.once += dense / (steps_seen if timed else 1)
                count.calls.clear()
            seen += take
            if seen >= samples:
                break
    sites = sum(layer.sites for layer in layers.values())
    used = {name: s for name, s in counts.items() if s.dense}
    return {
        "samples": seen,
        "steps": steps_seen,
        "rate": sum(layer.spikes for layer in layers.values()) / sites if sites else None,
        "layers": {
            name: {"rate": layer.spikes / layer.sites, "neurons": layer.neurons}
            | ({} if layer.each is None else {"rates": (layer.each / (layer.sites / layer.neurons)).tolist()})
            for name, layer in layers.items()
            if layer.sites
        },
        "operations": {
            "ac": sum(s.operations for s in used.values() if s.binary) / seen,
            "mac": sum(s.operations for s in used.values() if not s.binary) / seen,
            "dense": sum(s.dense for s in used.values()) / seen,
        },
        "synapses": {
            name: {
                "kind": "ac" if s.binary else "mac",
                "operations": s.operations / seen,
                "dense": s.dense / seen,
                "once": s.once / seen,
                "inputs": s.inputs / seen,
                "outputs": s.outputs / seen,
                "weights": s.weights,
                "averaged": s.averaged,
            }
            for name, s in used.items()
        },
    } | ({"foreign": True} if has_foreign_neurons(model) else {})


class _Products(TorchFunctionMode):
    """Counts products of two activations, which no module does: those of attention."""

    NAMES = ("matmul", "__matmul__", "bmm")

    def __init__(self, synapses: dict[str, _Synapses]):
        super().__init__()
        self.count, self.synapses = synapses.get("products") or _Synapses(), synapses

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name in self.NAMES and len(args) > 1 and args[0].ndim > 2 and args[1].ndim > 2:
            a, b = args[0].detach(), args[1].detach()
            operations = dense = float(out.numel() * a.shape[-1])
            whole = [_whole(a), _whole(b)]
            if all(whole):
                operations = out.sum(dtype=torch.float64).item()
            elif any(whole):
                events, other = (a, b.shape[-1]) if whole[0] else (b, a.shape[-2])
                operations = events.sum(dtype=torch.float64).item() * other
            self.add(operations, dense, any(whole), args[:2], out)
        elif name == "scaled_dot_product_attention" and len(args) > 2:  # a softmax lies between its two products
            q, k, v = args[:3]
            dense = float(q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
            self.add(dense, dense, False, args[:3], out)
        return out

    def add(self, operations: float, dense: float, binary: bool, inputs: Iterable[Tensor], out: Tensor) -> None:
        self.synapses["products"] = self.count
        self.count.operations += operations
        self.count.dense += dense
        self.count.binary &= binary
        self.count.inputs += sum(x.numel() for x in inputs)
        self.count.outputs += out.numel()
        self.count.calls.append((dense, out.shape))


def _whole(x: Tensor) -> bool:
    return bool((x == x.round()).all()) and bool((x >= 0).all())


def spikes_averaged(x: Tensor, most: int = 65536) -> int:
    """The smallest k for which x >= 0 holds means of k spikes, whole numbers over k; 0 where there is none.

    The smallest positive value is m / k with a small m, so k is looked for among multiples of its inverse.
    """
    positive = x[x > 0]
    if not len(positive) or bool((x < 0).any()):
        return 0
    inverse = 1 / positive.min().item()
    for m in range(1, 9):
        k = round(m * inverse)
        if 0 < k <= most and (x * k - (x * k).round()).abs().max() < 1e-3 * max(1.0, k**0.5 / 16):
            return k
    return 0


def _scaled(x: Tensor, before: float) -> tuple[int, float]:
    """k and the smallest positive value u of x, where x / u holds whole numbers over k; (0, 1) where it does not.

    before: u / k of earlier calls. That of this one must be a whole multiple of it, which then counts as so many, or a
    part: no spike is scaled anew.
    """
    if not (x > 0).any():
        return 0, 1.0
    smallest = x[x > 0].min().item()
    k = spikes_averaged(x / smallest, 8)
    ratio = smallest / k / before if k and before else 1.0
    steady = min(abs(r / max(1, round(r)) - 1) for r in (ratio, 1 / ratio)) < 1e-3
    return (k * max(1, round(ratio)), smallest) if k and steady else (0, 1.0)


def _count(count: _Synapses, module: nn.Module, x: Tensor, out: Tensor, fired: bool, open_: Tensor | None) -> None:
    """Add the operations of one call: every input goes to as many outputs as the kernel gives it, edges included.

    fired: spikes came before, so that what is not whole may be an average of them (an image's pixels are not).
    open_: [O, H, W] of what has an open gate behind it.
    """
    if isinstance(module, HalfConv2d):
        parts = [(conv, steps) for conv, steps in module.parts(len(x)) if steps]
        for conv, steps in parts:
            _count(count, conv, x[steps], out[steps], fired, open_)
        dense = sum(count.calls.pop()[0] for _ in parts)
        count.calls.append((dense, out.shape))
        count.weights = sum(p.numel() for p in module.parameters())
        return
    assert isinstance(module, nn.Linear | nn.Conv2d)
    k, unit = 1 if _whole(x) else spikes_averaged(x.float()) if fired else 0, 1.0
    if fired and not k:
        k, unit = _scaled(x.float(), count.unit)
        count.unit = unit / k if k else count.unit
    else:
        count.averaged = max(count.averaged, k)
    count.binary &= k > 0
    count.weights = sum(p.numel() for p in module.parameters())
    count.inputs += x.numel()
    count.outputs += out.numel()
    values = (x.float() / unit * k).round() if k else (x != 0).float()
    if isinstance(module, nn.Linear):
        dense = float(x.numel() * module.out_features)
    else:
        kernel = module.kernel_size[0] * module.kernel_size[1]
        dense = float(out.numel() * (module.in_channels // module.groups) * kernel)
        values = values if x.ndim > 3 else values[None]
    if open_ is not None or not bool(module.weight.all()):
        reached = synapses(module, values)
        count.operations += (reached if open_ is None else reached * open_).sum(dtype=torch.float64).item()
    elif isinstance(module, nn.Linear):
        count.operations += values.sum(dtype=torch.float64).item() * module.out_features
    else:  # all outputs of a group are reached alike
        planes = values.flatten(0, -4)
        group = planes.sum(1, keepdim=True) if module.groups == 1 else planes.unflatten(1, (module.groups, -1)).sum(2)
        ones = torch.ones(module.groups, 1, *module.kernel_size, device=x.device)
        reached = F.conv2d(group, ones, None, module.stride, module.padding, module.dilation, module.groups)
        count.operations += reached.sum(dtype=torch.float64).item() * (module.out_channels // module.groups)
    count.dense += dense
    count.calls.append((dense, out.shape))
