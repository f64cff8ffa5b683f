"""The networks of the benchmark: ours, and the same layers written with each other library as its users would.

A VGG of six 3x3 convolutions with batch norm and LIF (64, 64, pool, 128, 128, pool, 256, 256), the mean over space, a
linear layer, images [B, 3, 32, 32], T steps, logits averaged over time. Every builder takes T and returns a module
images -> logits [B, 10]. Values differ between libraries (surrogates, leaks); the work is the same.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from spikedistill import models
from spikedistill.models.layers import AvgPool2d, over_space, spiking_conv
from spikedistill.neurons import make
from spikedistill.neurons.kernels import sparse

Found = TypeVar("Found")
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256)  # 0: a 2x2 average pool
STAGES = ((1, 3), (3, 6), (6, 8))  # of these layers, after the first


class Ours(nn.Module):
    """The VGG in this package."""

    def __init__(self, steps: int, neuron: str = "lif"):
        super().__init__()
        self.steps, last, layers = steps, 3, list[nn.Module]()
        for width in WIDTHS:
            layers.append(spiking_conv(last, width, neuron=make(neuron)) if width else AvgPool2d(2))
            last = width or last
        # from pool to pool, so that `models.recompute` finds parts
        self.stem, self.stage1, self.stage2, self.stage3 = layers[0], *(nn.Sequential(*layers[a:b]) for a, b in STAGES)
        self.head = nn.Linear(last, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x[None], self.steps))))
        return self.head(over_space(x)).mean(0)


class Alone(nn.Module):
    """The convolutions of a network and nothing else: what no norm, neuron or pool can make faster.

    Each gets the map that it had in the first call of the whole network, and a gradient drawn once.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.work: list[tuple[nn.Conv2d, Tensor, bool]] = []
        self.grads: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.work:
            self._watch(x)
        maps = [conv(m.detach().requires_grad_(learns)) for conv, m, learns in self.work]
        self.grads = self.grads or [torch.randn_like(m) for m in maps]
        return cast(Tensor, _Cut.apply(x.new_zeros(len(x), 10), self.grads, *maps))

    def _watch(self, x: Tensor) -> None:
        with torch.enable_grad():
            self.work = reads(self.model, lambda: self.model(x), lambda conv, m: (conv, m.detach(), m.requires_grad))


def reads(model: nn.Module, run: Callable[[], Any], note: Callable[[nn.Conv2d, Tensor], Found]) -> list[Found]:
    """Call `run`, and `note` with each convolution of the model and what it reads, in their order."""
    found = list[Found]()

    def hook(conv: Any, given: tuple[Tensor]) -> None:
        found.append(note(conv, given[0]))

    hooks = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d)]
    run()
    for handle in hooks:
        handle.remove()
    return found


class _Cut(torch.autograd.Function):
    """Constant logits of maps that get these gradients, whatever that of the logits is."""

    @staticmethod
    def forward(ctx, logits, grads, *maps):
        ctx.grads = grads
        return logits

    @staticmethod
    def backward(ctx, grad):  # pyrefly: ignore[bad-override]
        return None, None, *ctx.grads


class Dense(nn.Module):
    """A network whose convolutions multiply every element, as they do where many are spikes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with sparse.limited(-1):
            return self.model(x)


class Static(nn.Module):
    """A network of this package on images."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).mean(0)


def sew_resnet18(steps: int) -> nn.Module:
    return Static(models.build("sew_resnet18(stem=cifar)", classes=10, channels=3, steps=steps))


def spikformer(steps: int) -> nn.Module:
    return Static(models.build("spikformer(depth=4, dim=384)", classes=10, channels=3, steps=steps))


class Relu(nn.Module):
    """The VGG with ReLU on a batch of T x B images: the same multiplications, no dynamics."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.net = steps, _plain(lambda: [nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.repeat(self.steps, 1, 1, 1)).unflatten(0, (self.steps, -1)).mean(0)


def _plain(neuron: Callable[[], list[nn.Module]], head: bool = True) -> nn.Sequential:
    layers, last = list[nn.Module](), 3
    for width in WIDTHS:
        if width:
            layers += [nn.Conv2d(last, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), *neuron()]
            last = width
        else:
            layers.append(nn.AvgPool2d(2))
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)] if head else []
    return nn.Sequential(*layers, *end)


def spikingjelly(*names: str) -> list[Any]:
    return [importlib.import_module(f"spikingjelly.activation_based.{name}") for name in names]


class SpikingJelly(nn.Module):
    """spikingjelly, multi-step: the image repeated T times, every layer on [T, B, ...]."""

    def __init__(self, steps: int, once: bool = False):
        super().__init__()
        neuron, layer, self.functional, surrogate = spikingjelly("neuron", "layer", "functional", "surrogate")
        layers, last = list[nn.Module](), 3
        for width in WIDTHS:
            if width:
                conv = layer.Conv2d(last, width, 3, padding=1, bias=False)
                lif = neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())
                layers += [conv, layer.BatchNorm2d(width), lif]
                last = width
            else:
                layers.append(layer.AvgPool2d(2))
        end = [layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(last, 10)]
        self.net, self.steps, self.once = nn.Sequential(*layers, *end), steps, once
        self.functional.set_step_mode(self.net, "m")

    def forward(self, x: Tensor) -> Tensor:
        self.functional.reset_net(self.net)
        if not self.once:
            return self.net(x[None].repeat(self.steps, 1, 1, 1, 1)).mean(0)
        x = self.net[1](self.net[0](x[None])).expand(self.steps, -1, -1, -1, -1)  # the first layer has no dynamics
        return self.net[2:](x).mean(0)


class SpikingJellySEW(nn.Module):
    """SEW-ResNet-18 with ADD, in spikingjelly's layers, with a stem for 32x32."""

    def __init__(self, steps: int):
        super().__init__()
        neuron, layer, self.functional = spikingjelly("neuron", "layer", "functional")
        self.steps = steps

        def unit(i: int, o: int, kernel: int, stride: int = 1) -> nn.Sequential:
            conv = layer.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
            return nn.Sequential(conv, layer.BatchNorm2d(o), neuron.LIFNode(tau=2.0, detach_reset=True))

        class Block(nn.Module):
            def __init__(self, i: int, o: int, stride: int):
                super().__init__()
                self.branch = nn.Sequential(unit(i, o, 3, stride), unit(o, o, 3))
                self.down = unit(i, o, 1, stride) if stride > 1 or i != o else nn.Identity()

            def forward(self, x: Tensor) -> Tensor:
                return self.branch(x) + self.down(x)

        widths, last, layers = (64, 128, 256, 512), 64, [unit(3, 64, 3)]
        for width in widths:
            layers += [Block(last, width, 1 if width == 64 else 2), Block(width, width, 1)]
            last = width
        self.net = nn.Sequential(*layers, layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(last, 10))
        self.functional.set_step_mode(self.net, "m")

    def forward(self, x: Tensor) -> Tensor:
        self.functional.reset_net(self.net)
        return self.net(x[None].repeat(self.steps, 1, 1, 1, 1)).mean(0)


class SnnTorch(nn.Module):
    """snnTorch: a loop over T, one membrane a layer."""

    def __init__(self, steps: int):
        super().__init__()
        snn: Any = importlib.import_module("snntorch")
        surrogate: Any = importlib.import_module("snntorch.surrogate")
        how = dict(beta=0.5, spike_grad=surrogate.atan(), init_hidden=True, reset_mechanism="zero")
        self.net, self.steps = _plain(lambda: [snn.Leaky(**how)]), steps
        self.leaky = snn.Leaky

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            if isinstance(module, self.leaky):
                cast(Any, module).reset_mem()
        return torch.stack([self.net(x) for _ in range(self.steps)]).mean(0)


class Norse(nn.Module):
    """norse: a loop over T, the state of all layers passed on."""

    def __init__(self, steps: int):
        super().__init__()
        norse: Any = importlib.import_module("norse.torch")
        self.net = norse.SequentialState(*_plain(lambda: [norse.LIFBoxCell()]))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        state, logits = None, []
        for _ in range(self.steps):
            out, state = self.net(x, state)
            logits.append(out)
        return torch.stack(logits).mean(0)


class Sinabs(nn.Module):
    """sinabs: samples and steps in one axis, [B * T, ...]."""

    def __init__(self, steps: int):
        super().__init__()
        sinabs: Any = importlib.import_module("sinabs.layers")
        how = dict(tau_mem=2.0, num_timesteps=steps, norm_input=False)
        self.net, self.steps, self.sinabs = _plain(lambda: [sinabs.LIFSqueeze(**how)]), steps, sinabs

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            if isinstance(module, self.sinabs.LIFSqueeze):
                cast(Any, module).reset_states()
        x = x.repeat_interleave(self.steps, 0)
        return self.net(x).unflatten(0, (-1, self.steps)).mean(1)


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None
