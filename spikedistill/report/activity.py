"""What a network does: firing rates and synaptic operations, measured on data.

What counts as what, for convolutions, linear layers and products of two activations (attention):
  whole numbers, such as spikes and sums of spikes: k additions for an input of k, to every output that it reaches;
  averages of spikes (after average pooling, or a mean over space or time): the spikes that were averaged, because
  event-driven hardware adds each of them when it arrives and folds 1 / k into the weights;
  spikes, or averages of them, times one number that never changes (a neuron that fires u): the same, u is folded, too;
  anything else, such as an image: a multiply-add for each.
Nothing is counted for a weight that is 0, nor into or out of a neuron with a closed gate: pruned is skipped.
nn.MultiheadAttention is one layer, of multiply-adds: a softmax lies between its products.
Norms are folded into the weights before deployment and are not counted. Of other uses of weights the names are told.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from spikedistill.core.step import Batch
from spikedistill.core.taps import eval_mode, infer
from spikedistill.data.batches import Files, Tensors
from spikedistill.data.splits import SomeFrames
from spikedistill.models.foreign import has_foreign_neurons
from spikedistill.neurons import Neuron
from spikedistill.transforms.sparsity import open_positions
from spikedistill.transforms.tt_snn import HalfConv2d
from spikedistill.transforms.unstructured_pruning import Gated


@dataclass
class _Layer:
    spikes: float = 0.0
    sites: int = 0  # neurons x time steps x samples
    neurons: int = 0
    open: int | None = None  # neurons with an open gate, where they have gates
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
    operand: float = 0.0  # of products, in place of weights: values that an input is multiplied with
    calls: list[tuple[float, torch.Size, int]] = field(default_factory=list)  # dense, shape of the output, operand

    def add(
        self, operations: float, dense: float, binary: bool, inputs: Iterable[Tensor], out: Tensor, operand: int = 0
    ) -> None:
        self.operations += operations
        self.dense += dense
        self.binary &= binary
        self.inputs += sum(x.numel() for x in inputs)
        self.outputs += out.numel()
        self.calls.append((dense, out.shape, operand))

    def settle(self, steps: int, samples: int) -> None:
        """Find out what one time step is of the calls of a batch: each holds all steps, or there is one for each."""
        equal = Counter(shape for _, shape, _ in self.calls)
        for dense, shape, operand in self.calls:
            whole = shape[0] == steps * samples or shape[:2] == (steps, samples)
            self.once += dense / (steps if whole or equal[shape] % steps == 0 else 1)
            self.operand = max(self.operand, operand / max(samples, 1) / (steps if whole else 1))
        self.calls.clear()


def spread(data: Iterable[Batch], samples: int) -> Iterable[Batch]:
    """A split cut to evenly spaced samples, for it may be sorted by class; as it is where it has no more than these.

    Batches that come from anywhere else cannot be chosen from: they stay as they are.
    """
    if isinstance(data, SomeFrames):
        return replace(data, split=spread(data.split, samples))
    if not isinstance(data, Tensors | Files) or data.samples <= samples:
        return data
    rows = torch.arange(samples) * data.samples // samples
    how: dict[str, Any] = {"index": data.index[rows], "drop_last": False}
    if isinstance(data, Tensors):
        images = data.images[rows if isinstance(data.images, Tensor) else rows.numpy()]
        how |= {"images": images, "labels": data.labels[rows]}
    return replace(data, **how)


def activity(
    model: nn.Module, data: Iterable[Batch], steps: int | None = None, samples: int = 1000, neurons: bool = False
) -> dict[str, Any]:
    """Firing rates and operations per sample, over `samples` of `data`: evenly spaced ones of a split, else the first.

    "layers": name -> {"rate": spikes per neuron and step, "neurons"} and, with `neurons`, "rates", of every neuron, and
    for those with gates "open": how many have an open one; the second call of a layer in one pass is name#2;
    "rate": the same over all neurons; "steps": T; "frames": those of a sample of `data`, 1 for images.
    "operations": {"ac", "mac", "dense"}: additions for layers whose input is spikes, multiply-adds for those with other
    inputs (non-zero ones only), and multiply-adds of the same layers run densely, weights of 0 too. A static input is
    convolved once.
    "synapses": the same for each layer, name -> {"kind": ac or mac, "operations", "dense", "once": dense operations of
    one time step (what the ANN of this shape does for an image), "inputs", "outputs": values over all steps,
    "weights", "averaged": k where the input is means of k spikes}; "products" has no weights, but "operand": values of
    the largest activation that another is multiplied with, in one step.
    "uncounted": modules whose weights were used in a way that is not counted; "einsum", for three factors and more.
    "foreign": True, where there are neurons of another library, which are not among "layers".
    """
    gated = {id(m.neuron) for m in model.modules() if isinstance(m, Gated)}  # counted behind their gate
    firing = [(name, m) for name, m in model.named_modules() if isinstance(m, Neuron | Gated) and id(m) not in gated]
    layers = {name: _Layer() for name, _ in firing}
    kinds = _ConvNd | nn.Linear | nn.MultiheadAttention
    counts = {name: _Synapses() for name, m in model.named_modules() if isinstance(m, kinds)}
    modules, seen, steps_seen, frames = dict(model.named_modules()), 0, 1, 1
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    functions = _Functions({name: modules[name] for name in counts}, counts)
    with eval_mode(model):
        behind = open_positions(model)

    def fired(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, out: Tensor) -> None:
            functions.fired[name] += 1
            nth = functions.fired[name]
            layer = layers[name] if nth == 1 else layers.setdefault(f"{name}#{nth}", _Layer())
            layer.spikes += out.sum(dtype=torch.float64).item()
            layer.sites += out.numel()
            layer.neurons = out[0, 0].numel()
            if isinstance(module, Gated):
                layer.open = int(module.gate(torch.ones_like(out[0, 0])).sum())
            if neurons:
                each = out.flatten(2).sum((0, 1), dtype=torch.float64)
                layer.each = each if layer.each is None else layer.each + each

        return hook

    def operated(count: _Synapses) -> Callable:
        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any], out: Any) -> None:
            if isinstance(module, nn.MultiheadAttention):
                _count_attention(count, module, out[0], **dict(zip(("query", "key", "value"), inputs)) | named)
            elif id(module.weight) in functions.counted:
                functions.counted.remove(id(module.weight))
            else:
                x = (*inputs, *named.values())[0].detach()
                _count(count, module, x, out, bool(functions.fired), behind.get(module))

        return hook

    with ExitStack() as stack:
        for name, _ in firing:
            stack.callback(modules[name].register_forward_hook(fired(name)).remove)
        for name, count in counts.items():
            stack.callback(modules[name].register_forward_hook(operated(count), with_kwargs=True).remove)
        for batch in spread(data, samples):
            size = len(batch["y"]) if "y" in batch else batch["x"].shape[batch["x"].ndim == 5]
            take = min(size, samples - seen)
            timed = batch["x"].ndim == 5 or batch["x"].shape[0] != size
            x, frames = (batch["x"][:, :take], len(batch["x"])) if timed else (batch["x"][:take], 1)
            functions.fired.clear()
            with functions:
                steps_seen = len(infer(model, x.to(device), steps).logits)
            for count in counts.values():
                count.settle(steps_seen, take)
            seen += take
            if seen >= samples:
                break
    sites = sum(layer.sites for layer in layers.values())
    used = {name: s for name, s in counts.items() if s.dense}
    return {
        "samples": seen,
        "steps": steps_seen,
        "frames": frames,
        "rate": sum(layer.spikes for layer in layers.values()) / sites if sites else None,
        "layers": {
            name: {"rate": layer.spikes / layer.sites, "neurons": layer.neurons}
            | ({} if layer.open is None else {"open": layer.open})
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
            | ({"operand": s.operand} if s.operand else {})
            for name, s in used.items()
        },
        "uncounted": [*_uncounted(model, functions.read, used), *functions.uncounted],
    } | ({"foreign": True} if has_foreign_neurons(model) else {})


class _Functions(TorchFunctionMode):
    """Counts what no module does: products of two activations (attention), and with the weight of a linear layer.

    fired: how often neurons have, in this pass.
    counted: ids of weights, whose layer is about to return if it was called, and should not count again.
    read: ids of the parameters that other functions were given, lookups and norms apart.
    uncounted: names of products with more factors.
    """

    PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")
    NO_PRODUCTS = ("embedding", "embedding_bag", "layer_norm", "rms_norm", "__get__")

    def __init__(self, modules: dict[str, nn.Module], synapses: dict[str, _Synapses]):
        super().__init__()
        linear = [(name, m, m._parameters.get("weight")) for name, m in modules.items() if isinstance(m, nn.Linear)]
        self.linear = {id(weight): (m, synapses[name]) for name, m, weight in linear if weight is not None}
        self.synapses, self.fired = synapses, Counter[str]()
        self.counted, self.read, self.uncounted = set[int](), set[int](), dict[str, None]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name, kwargs = func(*args, **(kwargs or {})), getattr(func, "__name__", ""), kwargs or {}
        listed = (x if isinstance(x, list | tuple) else [x] for x in (*args, *kwargs.values()))
        given = [x for xs in listed for x in xs if isinstance(x, Tensor)]
        factors = given[1:] if name == "baddbmm" else given if name == "einsum" else given[:2]
        if name in self.PRODUCTS and len(factors) > 1 and all(x.ndim > 2 for x in factors):
            if len(factors) > 2:
                self.uncounted[name] = None
            else:
                self.product(func if name != "baddbmm" else torch.bmm, args, factors, out)
        elif name == "scaled_dot_product_attention" and len(given) > 2:  # a softmax lies between its two products
            q, k, v = given[:3]
            dense = float(q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
            self.add(dense, dense, False, given[:3], out, max(k.numel(), v.numel()))
        elif name == "linear" and id(given[1]) in self.linear:
            module, count = self.linear[id(given[1])]
            _count(count, module, given[0].detach(), out, bool(self.fired), None)
            self.counted.add(id(given[1]))
        elif name not in self.NO_PRODUCTS:
            self.read |= {id(x) for x in given if isinstance(x, nn.Parameter)}
        return out

    def product(self, func: Callable, args: tuple, factors: Sequence[Tensor], out: Tensor) -> None:
        """Of two factors: with ones in place of a factor, a product adds up what the other one sends."""

        def total(*of: Tensor) -> float:
            with torch.autocast(out.device.type, enabled=False):
                return func(*args[: func is torch.einsum], *of).sum(dtype=torch.float64).item()

        a, b = (x.detach().float() for x in factors)
        whole, ones = (_whole(a), _whole(b)), (torch.ones_like(a), torch.ones_like(b))
        dense = total(*ones)
        operations = total(*(x if w else one for x, w, one in zip((a, b), whole, ones))) if any(whole) else dense
        events, held = (a, b) if whole[0] or not whole[1] else (b, a)
        self.add(operations, dense, any(whole), (events, held), out, held.numel())

    def add(self, *counted: Any) -> None:
        self.synapses.setdefault("products", _Synapses()).add(*counted)


def _uncounted(model: nn.Module, read: set[int], used: Iterable[str]) -> list[str]:
    """Modules with a parameter that was read and that products may use, neither counted nor part of one that is."""
    found = []
    for name, module in model.named_modules():
        of = name.partition(".parametrizations")[0]
        for key, p in module.named_parameters(recurse=False):
            # what is one for all samples, [1, ...], is added to them, as biases are
            matrix = id(p) in read and p.ndim > 1 and len(p) > 1 and p.numel() > max(p.shape) and "bias" not in key
            if matrix and not any(f"{of}.".startswith(f"{layer}.") for layer in used):
                found.append(of or type(model).__name__)
    return [*dict.fromkeys(found)]


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
        count.calls.append((dense, out.shape, 0))
        count.weights = sum(p.numel() for p in module.parameters())
        return
    assert isinstance(module, nn.Linear | _ConvNd)
    k, unit = 1 if _whole(x) else spikes_averaged(x.float()) if fired else 0, 1.0
    if fired and not k:
        k, unit = _scaled(x.float(), count.unit)
        count.unit = unit / k if k else count.unit
    else:
        count.averaged = max(count.averaged, k)
    count.weights = sum(p.numel() for p in module.parameters())
    values = (x.float() / unit * k).round() if k else (x != 0).float()
    if isinstance(module, nn.Linear):
        dense = float(x.numel() * module.out_features)
    else:
        places, each = (x, module.out_channels) if module.transposed else (out, module.in_channels)
        dense = float(places.numel() * (each // module.groups) * prod(module.kernel_size))
        axes = 1 + len(module.kernel_size)
        values = values.flatten(0, -1 - axes) if values.ndim > axes else values[None]
    if open_ is not None or not bool(module.weight.all()):
        reached = _reached(module, values, (module.weight != 0).float())
        operations = (reached if open_ is None else reached * open_).sum(dtype=torch.float64).item()
    elif isinstance(module, nn.Linear):
        operations = values.sum(dtype=torch.float64).item() * module.out_features
    else:  # all outputs of a group are reached alike
        group = values.unflatten(1, (module.groups, -1)).sum(2)
        ones = torch.ones(module.groups, 1, *module.kernel_size, device=x.device)
        reached = _reached(module, group, ones).sum(dtype=torch.float64).item()
        operations = reached * (module.out_channels // module.groups)
    count.add(operations, dense, k > 0, [x], out)


def _reached(module: nn.Linear | _ConvNd, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer makes of x [N, C, ...] or [..., F] with other weights and no bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    axes = len(module.kernel_size)
    if module.transposed:
        how = module.stride, module.padding, module.output_padding, module.groups, module.dilation
        return getattr(F, f"conv_transpose{axes}d")(x, weight, None, *how)
    plain: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return plain._conv_forward(module, x, weight, None)  # pads in its mode


def _count_attention(
    count: _Synapses, module: nn.MultiheadAttention, out: Tensor, query: Tensor, key: Tensor, value: Tensor, **_: Any
) -> None:
    """Four projections, and of every query its products with all keys and all values: [L, B, E], or batch first."""
    tokens = key.shape[1 if module.batch_first and key.ndim > 2 else 0]
    products = 2 * tokens * query.shape[:-1].numel()
    dense = float(module.embed_dim * (sum(x.numel() for x in (query, key, value, out)) + products))
    count.weights = sum(p.numel() for p in module.parameters())
    count.add(dense, dense, False, (query, key, value), out)
