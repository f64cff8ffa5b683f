"""What is left of a pruned network: the share of synapses. `report.activity` counts the additions of the rest.

A synapse is left if its weight is not 0, the neuron behind it has no closed gate, and some live path leads from the
input to it: a neuron without a live synapse is dead, and so are those that leave it.

Shi, Ding, Hao, Yu, ICLR 2024, https://openreview.net/forum?id=eoSeaK4QJo (connectivity).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.core.taps import eval_mode, infer
from spikedistill.neurons import Neuron
from spikedistill.transforms.unstructured_pruning import Gate, Gated, Mask

Layer = nn.Conv2d | nn.Linear
Norm = nn.modules.batchnorm._BatchNorm


def synapses(layer: nn.Module, x: Tensor, dense: bool = False) -> Tensor:
    """Input [..., C, H, W] or [..., F] summed over the synapses of each output, as if all weights were 1 (or 0)."""
    assert isinstance(layer, Layer)
    weight = torch.ones_like(layer.weight) if dense else (layer.weight != 0).to(x.dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    how: dict[str, Any] = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
    return F.conv2d(x.flatten(0, -4), weight, **how).unflatten(0, x.shape[:-3])


def open_positions(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Convolution -> where some neuron that reads it has an open gate, [O, H, W]; those that others read have none."""
    masks: dict[nn.Module, Tensor] = {}
    for gated in [m for m in model.modules() if isinstance(m, Gated)]:
        mask = gated.gate.mask() if isinstance(gated.gate, Gate) else gated.gate.get_buffer("m")
        masks |= {conv: torch.maximum(masks.get(conv, mask), mask) for conv in gated.convs}
    return masks


@torch.no_grad()
def connectivity(model: nn.Module, shape: Sequence[int]) -> float:
    """Synapses that are left over all synapses, for images [C, H, W], each weight counted at every position."""
    return _live(model, shape, dense=False) / _live(model, shape, dense=True)


def _live(model: nn.Module, shape: Sequence[int], dense: bool) -> float:
    """How many synapses there are: the network runs on live (> 0) or dead (0) in place of activations."""
    total, started = 0.0, False

    def layer(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        nonlocal total, started
        live = (inputs[0] > 0).to(out.dtype) if started else torch.ones_like(inputs[0])
        started = True
        count = synapses(module, live, dense)
        total += (count * behind.get(module, 1.0)).sum(dtype=torch.float64).item()
        return count

    def neuron(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        return (inputs[0] > 0).to(out.dtype).expand_as(out)

    def passes(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        return inputs[0]

    hooks: list[tuple[tuple, Callable]] = [((nn.Conv2d, nn.Linear), layer), ((Neuron,), neuron), ((Norm,), passes)]
    if dense:
        hooks.append(((Gate, Mask), passes))
    with ExitStack() as stack, eval_mode(model):
        behind = {} if dense else open_positions(model)
        for module in model.modules():
            for kinds, hook in hooks:
                if isinstance(module, kinds):
                    stack.callback(module.register_forward_hook(hook).remove)
        infer(model, torch.ones(1, *shape, device=next(model.parameters()).device), steps=1)
    return total
