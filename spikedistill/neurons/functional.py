"""Spiking neurons as pure functions of a sequence: the readable reference.

Every neuron of this package is one recurrence, elementwise over everything but time:

    H[t] = decay V[t-1] + gain X[t] + (1 - decay) V_reset        charge
    S[t] = 1[H[t] >= V_th]   (> if strict)                       fire
    V[t] = H[t] (1 - S[t]) + V_reset S[t]                        hard reset
    V[t] = H[t] - V_th S[t]                                      soft reset (v_reset is None, counted as 0 above)

    IF                    decay = 1            gain = 1
    LIF, input decayed    decay = 1 - 1/tau    gain = 1/tau
    LIF, input not decayed  decay = 1 - 1/tau  gain = 1
    PLIF                  1/tau = sigmoid(w), w learned       Fang et al. 2021, arXiv:2007.05785, eq. 7

The membrane is computed in float32 (float64 for float64 input) whatever the dtype of the input. Nothing is kept between
calls: pass the last potential as `v0` to continue a sequence.
"""

import torch
from torch import Tensor

from spikedistill.neurons.surrogate import ATan, Surrogate, spike

Number = float | Tensor


def neuron(
    x: Tensor,
    decay: Number,
    gain: Number,
    *,
    v_th: float = 1.0,
    v_reset: float | None = 0.0,
    strict: bool = False,
    detach_reset: bool = True,
    surrogate: Surrogate = ATan(),
    v0: Tensor | None = None,
    steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a layer of neurons over a sequence of input currents.

    x: [T, ...] currents, or [1, ...] with `steps` = T for a current that is the same at every step.
    decay, gain: floats or scalar tensors (learned in PLIF).
    v0: [...] potential to start from; V_reset (0 for a soft reset) if None.
    detach_reset: no gradient through the spike in the reset.
    Returns spikes [T, ...] in the dtype of x, and potentials after reset [T, ...] in float32 (or float64).
    Raises ValueError where x has neither 1 nor `steps` time steps.
    """
    steps = time_steps(x, steps)
    rest = 0.0 if v_reset is None else v_reset
    x, dtype = x.to(torch.promote_types(x.dtype, torch.float32)), x.dtype
    v = torch.full_like(x[0], rest) if v0 is None else v0.to(x.dtype)
    current = gain * x
    spikes, potentials = [], []
    for t in range(steps):
        h = decay * v + current[t if len(x) == steps else 0]
        if rest:
            h = h + (1 - decay) * rest
        s = spike(h - v_th, surrogate, strict)
        r = s.detach() if detach_reset else s
        v = h - v_th * r if v_reset is None else h * (1 - r) + rest * r
        spikes.append(s)
        potentials.append(v)
    return torch.stack(spikes).to(dtype), torch.stack(potentials)


def time_steps(x: Tensor, steps: int | None) -> int:
    """The T that a call means: that of x, or `steps` for a constant input. Raises ValueError where they disagree."""
    if steps is None or len(x) == steps:
        return len(x)
    if len(x) != 1 or steps < 1:
        raise ValueError(f"input has {len(x)} time steps but steps={steps}: give 1 or {steps} steps of input")
    return steps


def if_(x: Tensor, **how) -> tuple[Tensor, Tensor]:
    """Integrate and fire: H = V + X. Arguments and results of `neuron`."""
    return neuron(x, 1.0, 1.0, **how)


def lif(x: Tensor, tau: float = 2.0, decay_input: bool = True, **how) -> tuple[Tensor, Tensor]:
    """Leaky integrate and fire: H = V + (X - (V - V_reset)) / tau, or V - (V - V_reset) / tau + X. See `neuron`."""
    return neuron(x, 1 - 1 / tau, 1 / tau if decay_input else 1.0, **how)


def plif(x: Tensor, w: Tensor, decay_input: bool = True, **how) -> tuple[Tensor, Tensor]:
    """LIF whose leak 1/tau = sigmoid(w) is learned, w a scalar. See `neuron`."""
    leak = torch.sigmoid(w)
    return neuron(x, 1 - leak, leak if decay_input else 1.0, **how)
