"""Neuron layers: the parameters of a neuron and a call. No state survives a call."""

from math import log

import torch
from torch import Tensor, nn

from spikedistill.neurons import kernels
from spikedistill.neurons.functional import neuron
from spikedistill.neurons.surrogate import ATan, Surrogate
from spikedistill.spec import Positive


def listened(module: nn.Module) -> bool:
    """Whether somebody waits for the output or the gradient of this module, so that it has to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


class Neuron(nn.Module):
    """What IF, LIF and PLIF share: threshold, reset, surrogate and the call.

    v_th: firing threshold.  v_reset: potential after a spike; None subtracts v_th instead (soft reset).
    strict: fire at H > v_th instead of H >= v_th.  detach_reset: no gradient through the spike in the reset.

    The child `v` receives the potentials after reset, [T, B, ...], only while it is tapped (`"stage3.neuron.v"`).
    """

    def __init__(
        self,
        v_th: Positive = 1.0,
        v_reset: float | None = 0.0,
        strict: bool = False,
        detach_reset: bool = True,
        surrogate: Surrogate = ATan(),
    ):
        super().__init__()
        self.v_th, self.v_reset, self.strict = v_th, v_reset, strict
        self.detach_reset, self.surrogate = detach_reset, surrogate
        self.v = nn.Identity()

    def coefficients(self) -> tuple[float | Tensor, float | Tensor]:
        """decay and gain of the charge."""
        raise NotImplementedError

    @property
    def start(self) -> float:
        """The potential before the first step."""
        return self.v_reset or 0.0

    @property
    def how(self) -> dict:
        """The keyword arguments that every form of the neuron takes."""
        names = ("v_th", "v_reset", "strict", "detach_reset", "surrogate")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        """Currents [T, B, ...] (or [1, B, ...] with `steps` = T for a constant input) -> spikes [T, B, ...]."""
        if not listened(self.v):
            return kernels.neuron(x, *self.coefficients(), **self.how, steps=steps)
        spikes, v = neuron(x, *self.coefficients(), **self.how, steps=steps)
        self.v(v)
        return spikes

    def run(self, x: Tensor, v0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Currents [T, B, ...] and a potential to start from -> spikes and the last potential: for streams."""
        if v0 is None:
            v0 = torch.full_like(x[0], self.start, dtype=torch.promote_types(x.dtype, torch.float32))
        spikes, v = neuron(x, *self.coefficients(), **self.how, v0=v0)
        return spikes, v[-1]

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.how.items())


class IF(Neuron):
    """Integrate and fire."""

    def coefficients(self) -> tuple[float, float]:
        return 1.0, 1.0


class Leaky(Neuron):
    """What LIF and PLIF share: their settings, of which `tau` goes to `set_leak`."""

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_th: Positive = 1.0,
        v_reset: float | None = 0.0,
        strict: bool = False,
        detach_reset: bool = True,
        surrogate: Surrogate = ATan(),
    ):
        super().__init__(v_th, v_reset, strict, detach_reset, surrogate)
        self.decay_input = decay_input
        self.set_leak(tau)

    def set_leak(self, tau: float) -> None:
        raise NotImplementedError


class LIF(Leaky):
    """Leaky integrate and fire. tau: membrane time constant in steps, >= 1. decay_input: the leak scales the input."""

    def set_leak(self, tau: float) -> None:
        if tau < 1:
            raise ValueError(f"tau must be at least 1, got {tau}")
        self.tau = tau

    def coefficients(self) -> tuple[float, float]:
        return 1 - 1 / self.tau, 1 / self.tau if self.decay_input else 1.0

    def extra_repr(self) -> str:
        return f"tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}"


class PLIF(Leaky):
    """LIF with a learned leak 1/tau = sigmoid(w), one w a layer. tau: its value at the start, > 1."""

    def set_leak(self, tau: float) -> None:
        if tau <= 1:
            raise ValueError(f"tau must be above 1, got {tau}")
        self.w = nn.Parameter(torch.tensor(-log(tau - 1)))

    def coefficients(self) -> tuple[Tensor, float | Tensor]:
        leak = torch.sigmoid(self.w)
        return 1 - leak, leak if self.decay_input else 1.0

    def extra_repr(self) -> str:
        return f"decay_input={self.decay_input}, {super().extra_repr()}"


class ReLU(nn.ReLU):
    """The neuron of an ANN twin: rectifies, at every time step it is given, and keeps T = 1 for a static input."""

    def __init__(self):
        super().__init__()

    def forward(self, input: Tensor, steps: int | None = None) -> Tensor:
        return super().forward(input)
