"""What a network does: firing rates and synaptic operations, measured on data."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.step import Batch
from spikedistill.core.taps import infer
from spikedistill.neurons import Neuron


@dataclass
class _Layer:
    spikes: float = 0.0
    sites: int = 0  # neurons x time steps x samples
    neurons: int = 0


@dataclass
class _Synapses:
    operations: float = 0.0  # of inputs that are not zero
    dense: float = 0.0
    binary: bool = True  # inputs are whole numbers: an addition each, else a multiplication


def activity(model: nn.Module, data: Iterable[Batch], steps: int | None = None, samples: int = 1000) -> dict[str, Any]:
    """Firing rates and operations per sample, over the first `samples` of `data`.

    "layers": name -> {"rate": spikes per neuron and step, "neurons"};  "rate": the same over all neurons.
    "operations": {"ac", "mac", "dense"}: additions for layers whose input is spikes (an input of k spikes counts k),
    multiply-adds for those with other inputs (non-zero ones only), and multiply-adds of the same layers run densely.
    A static input is convolved once. Only convolutions and linear layers are counted, not norms or attention products.
    """
    layers = {name: _Layer() for name, m in model.named_modules() if isinstance(m, Neuron)}
    synapses = {name: _Synapses() for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    modules, seen = dict(model.named_modules()), 0

    def fired(layer: _Layer):
        def hook(module: nn.Module, inputs: tuple, out: Tensor) -> None:
            layer.spikes += out.sum(dtype=torch.float64).item()
            layer.sites += out.numel()
            layer.neurons = out[0, 0].numel()

        return hook

    def operated(count: _Synapses):
        def hook(module: nn.Module, inputs: tuple, out: Tensor) -> None:
            _count(count, module, inputs[0].detach(), out)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(modules[name].register_forward_hook(fired(layer)).remove)
        for name, count in synapses.items():
            stack.callback(modules[name].register_forward_hook(operated(count)).remove)
        for batch in data:
            x = batch["x"][: samples - seen]
            infer(model, x.to(next(model.parameters()).device), steps)
            seen += len(x)
            if seen >= samples:
                break
    sites = sum(layer.sites for layer in layers.values())
    return {
        "samples": seen,
        "rate": sum(layer.spikes for layer in layers.values()) / sites if sites else None,
        "layers": {
            name: {"rate": layer.spikes / layer.sites, "neurons": layer.neurons}
            for name, layer in layers.items()
            if layer.sites
        },
        "operations": {
            "ac": sum(s.operations for s in synapses.values() if s.binary) / seen,
            "mac": sum(s.operations for s in synapses.values() if not s.binary) / seen,
            "dense": sum(s.dense for s in synapses.values()) / seen,
        },
    }


def _count(count: _Synapses, module: nn.Module, x: Tensor, out: Tensor) -> None:
    """Add the operations of one call: every input goes to as many outputs as the kernel gives it, edges included."""
    whole = bool((x == x.round()).all()) and bool((x >= 0).all())
    count.binary &= whole
    weight = x if whole else (x != 0)
    if isinstance(module, nn.Linear):
        count.operations += weight.sum(dtype=torch.float64).item() * module.out_features
        count.dense += x.numel() * module.out_features
        return
    assert isinstance(module, nn.Conv2d)
    planes = weight.flatten(0, -4).float() if x.ndim > 3 else weight[None].float()
    group = planes.sum(1, keepdim=True) if module.groups == 1 else planes.unflatten(1, (module.groups, -1)).sum(2)
    ones = torch.ones(module.groups, 1, *module.kernel_size, device=x.device)
    fan_out = module.out_channels // module.groups
    count.operations += (
        F.conv2d(group, ones, None, module.stride, module.padding, module.dilation, module.groups)
        .sum(dtype=torch.float64)
        .item()
        * fan_out
    )
    count.dense += out.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
