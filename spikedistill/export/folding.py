"""A copy of a student for inference: batch norms folded into the convolutions before them, training-only parts gone.

    BN(W x + b) = (g / s) W x + (b - m) g / s + beta,    s = sqrt(var + eps)

Equal to the student up to rounding: a membrane potential within rounding of the threshold may fall on its other side.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikedistill.core.taps import infer
from spikedistill.models import layers
from spikedistill.neurons import Neuron, listened
from spikedistill.transforms.tt_snn import HalfConv2d

SYNAPSES = (nn.Conv2d, nn.Linear)
# those whose forward is known, and with it that they are linear, the map of a norm, or nothing
KNOWN_SYNAPSES = (*SYNAPSES, layers.Conv2d, HalfConv2d)
KNOWN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, layers.BatchNorm2d)
KNOWN_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, layers.Dropout)


@torch.no_grad()
def fold(model: nn.Module, x: Tensor) -> nn.Module:
    """A folded copy in evaluation mode. x: an input of the model; its values do not matter, only the way they take.

    A norm is folded where it alone reads what one convolution or linear layer returned, both being called once, and
    both being torch's or ours: a class with a forward of its own may compute anything. Other norms stay. Dropout is
    removed. Raises ValueError for a model whose weights are rounded to bfloat16 already.
    """
    if any(m.weight.dtype == torch.bfloat16 for m in model.modules() if isinstance(m, SYNAPSES)):
        raise ValueError("the weights are rounded to bfloat16: take load(run, fast=False), which gives those trained")
    copy = deepcopy(model).eval()
    named = [*copy.named_modules(remove_duplicate=False)]
    readers = _Readers()
    hooks = [m.register_forward_hook(readers.made) for m in copy.modules() if _known(m, KNOWN_SYNAPSES)]
    for norm in [m for m in copy.modules() if _known(m, KNOWN_NORMS)]:
        hooks += [norm.register_forward_pre_hook(readers.enter), norm.register_forward_hook(readers.leave)]
    try:
        with readers:
            infer(copy, x)
    finally:
        for hook in hooks:
            hook.remove()
    calls = [m for m, _ in readers.outputs.values()] + [m for m, _ in readers.pairs]
    gone = {m for m in copy.modules() if _known(m, KNOWN_DROPS)}
    for norm, source in readers.pairs:
        if source not in readers.outputs or source in readers.read or norm.running_mean is None:
            continue
        synapse, out = readers.outputs[source]
        one_axis = isinstance(synapse, nn.Conv2d) == isinstance(norm, nn.BatchNorm2d) and out.ndim != 3
        if one_axis and calls.count(norm) == calls.count(synapse) == 1:
            absorb(synapse, norm)
            gone.add(norm)
    for name, module in named:
        if module in gone:
            copy.set_submodule(name, nn.Identity())
    return copy


def _known(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module computes what one of these classes does: a subclass, hooks or a parametrisation may not."""
    ours = getattr(module.forward, "__func__", None) in {kind.forward for kind in kinds}
    return ours and not listened(module) and not is_parametrized(module)


class _Readers(TorchDispatchMode):
    """Which outputs of synapses norms are called on, and which of them any other operation reads or changes."""

    def __init__(self):
        super().__init__()
        self.outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # by id, which is free for no other as long as they live
        self.pairs: list[tuple[Any, int]] = []  # norm, id of its input
        self.read: set[int] = set()
        self.in_norm = False

    def made(self, synapse: nn.Module, _args: Any, out: Tensor) -> None:
        self.outputs[id(out)] = synapse, out

    def enter(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.pairs.append((norm, id(args[0]) if args else 0))
        self.in_norm = True

    def leave(self, *_: Any) -> None:
        self.in_norm = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.in_norm:
            self.read |= {id(leaf) for leaf in tree_leaves((args, kwargs))} & self.outputs.keys()
        return func(*args, **(kwargs or {}))


def absorb(synapse: Any, norm: Any) -> None:
    """Put a norm's affine map into the weights before it, computed in float64."""
    weight, dtype = synapse.weight.double(), synapse.weight.dtype
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    if synapse.bias is not None:
        bias = bias + synapse.bias.double() * scale
    per_output = scale.view(-1, *[1] * (weight.ndim - 1))
    synapse.weight = nn.Parameter((weight * per_output).to(dtype))
    if isinstance(synapse, HalfConv2d):
        synapse.late = nn.Parameter((synapse.late.double() * per_output).to(dtype))
    synapse.bias = nn.Parameter(bias.to(dtype))


class PlainNeuron(nn.Module):
    """A neuron in operations that every program knows, step by step, without a gradient. Call as `Neuron`."""

    def __init__(self, neuron: Neuron):
        super().__init__()
        self.decay, self.gain = (float(torch.as_tensor(c).detach()) for c in neuron.coefficients())
        self.v_th, self.v_reset, self.strict, self.start = neuron.v_th, neuron.v_reset, neuron.strict, neuron.start

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        rest, v, spikes = self.v_reset or 0.0, None, []
        for t in range(len(x) if steps is None else steps):
            now = x[t if len(x) > 1 else 0]
            h = self.gain * now if v is None else self.decay * v + self.gain * now
            if added := (self.decay * self.start if v is None else 0.0) + (1 - self.decay) * rest:
                h = h + added
            s = (h > self.v_th if self.strict else h >= self.v_th).to(h.dtype)
            v = h - self.v_th * s if self.v_reset is None else h * (1 - s) + rest * s
            spikes.append(s)
        return torch.stack(spikes)


class Deployed(nn.Module):
    """x -> (logits [T, B, classes], *spikes of each neuron layer): what is traced. The spikes are for the check.

    layers: the names of the neuron layers, in the order in which they fired, after a call.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.layers = net, []
        self.fired: dict[str, Tensor] = {}
        for name, module in net.named_modules():
            if isinstance(module, PlainNeuron):
                module.register_forward_hook(lambda _m, _i, out, name=name: self.fired.__setitem__(name, out))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = self.net(x)
        self.layers, spikes = [*self.fired], [*self.fired.values()]
        self.fired.clear()
        return (logits if logits.ndim == 3 else logits[None], *spikes)


def plain(model: nn.Module, x: Tensor) -> nn.Module:
    """A folded copy whose neurons are `PlainNeuron`s: nothing in it needs this package."""
    copy = fold(model, x)
    for name, module in list(copy.named_modules()):
        if isinstance(module, Neuron):
            copy.set_submodule(name, PlainNeuron(module))
    return copy
