"""What one image shows of a network: how often its weights are used, and who reads its neurons and convolutions."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from spikedistill.core.taps import call, eval_mode
from spikedistill.neurons import Neuron
from spikedistill.spec import SpecError


@dataclass
class Survey:
    """By name, in the order of the forward pass.

    uses: layer -> at how many positions each weight is used, H_in W_in / stride^2 (borders ignored); 1 if linear.
    shapes: neurons -> the shape they emit, without time and batch.
    fan_out: neurons -> synapses that leave each, sum_q O_q k_q^2 / stride_q^2 over the layers q that read it.
    behind: convolution -> the neurons that read it, where these alone do and all emit maps of its shape.
    """

    uses: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fan_out: dict[str, float] = field(default_factory=dict)
    behind: dict[str, list[str]] = field(default_factory=dict)


def survey(model: nn.Module, shape: Sequence[int]) -> Survey:
    """Run a model on one black image [C, H, W] and look at its convolutions, linear layers and neurons.

    A layer reads neurons if a gradient finds a way from its input to their output that crosses no other layer: pools,
    norms and residual sums are seen through. Neurons read convolutions likewise. Raises SpecError for one that runs
    twice in a call.
    """
    found, marks, maps, sizes = Survey(), {}, {}, {}

    def read(x: Tensor, marks: dict[str, Tensor]) -> list[str]:
        if not (marks and x.requires_grad):
            return []
        ways = torch.autograd.grad(x.sum(), [*marks.values()], retain_graph=True, allow_unused=True)
        return [name for name, way in zip(marks, ways) if way is not None]

    def behind(x: Tensor, name: str = "") -> None:
        for conv in read(x, maps):
            found.behind[conv].append(name if found.shapes.get(name) == sizes[conv] else "")

    def emits(name: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple, named: dict, out: Tensor) -> Tensor:
            once(name, marks)
            marks[name] = out.new_ones((), requires_grad=True)
            found.shapes[name], found.fan_out[name] = tuple(out.shape[2:]), 0.0
            behind((*inputs, *named.values())[0], name)
            return out.detach() * marks[name]

        return hook

    def reads(name: str) -> Callable:
        def hook(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor], out: Tensor) -> Tensor:
            once(name, found.uses)
            x, each = inputs[0], layer.weight.shape[0]
            if isinstance(layer, nn.Conv2d):
                found.uses[name] = prod(x.shape[-2:]) / prod(layer.stride)
                each = each * prod(layer.kernel_size) / layer.groups / prod(layer.stride)
            else:
                found.uses[name] = 1.0
            for neurons in read(x, marks):
                found.fan_out[neurons] += each
            behind(x)
            maps[name], sizes[name], found.behind[name] = out.new_ones((), requires_grad=True), out.shape[-3:], []
            return out.detach() * maps[name]

        return hook

    like = next(model.parameters())
    with ExitStack() as stack, eval_mode(model), torch.enable_grad():
        for name, module in model.named_modules():
            if isinstance(module, Neuron | nn.Conv2d | nn.Linear):
                fires = isinstance(module, Neuron)
                hook = (emits if fires else reads)(name)
                stack.callback(module.register_forward_hook(hook, with_kwargs=fires).remove)
        behind(call(model, torch.zeros(1, *shape, device=like.device, dtype=like.dtype)).logits)
    found.behind = {conv: names for conv, names in found.behind.items() if names and all(names)}
    return found


def once(name: str, seen: dict) -> None:
    if name in seen:
        raise SpecError([f"unstructured_pruning: '{name}' runs more than once in a call, which cannot be priced"])
