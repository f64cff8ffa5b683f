"""The neuron in plain torch with a backward pass written by hand: it keeps the input alone and recomputes the rest.

Runs wherever torch runs. Equal to `functional.neuron` to the bit in the forward pass.
"""

import torch
from torch import Tensor

from spikedistill.neurons.functional import Number
from spikedistill.neurons.surrogate import Surrogate


def charge(x, v, t, decay, gain, rest):
    """H[t] from V[t-1] and X[t]. x holds one step or all; v is None before the first spike (V = rest)."""
    current = gain * x[t if len(x) > 1 else 0]
    if v is None:
        v = torch.full_like(current, rest)
    h = decay * v + current
    return h + (1 - decay) * rest if rest else h


class _Neuron(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, decay, gain, v_th, v_reset, strict, detach_reset, surrogate, steps):
        ctx.save_for_backward(x, *(c if isinstance(c, Tensor) else None for c in (decay, gain)))
        ctx.floats = decay, gain
        ctx.how = v_th, v_reset, strict, detach_reset, surrogate, steps
        rest = v_reset or 0.0
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        spikes, v = x.new_empty(steps, *x.shape[1:]), None
        for t in range(steps):
            h = charge(wide, v, t, decay, gain, rest)
            s = h > v_th if strict else h >= v_th
            spikes[t] = s
            v = h - v_th * s.to(h.dtype) if v_reset is None else h.masked_fill(s, rest)
        return spikes

    @staticmethod
    def backward(ctx, grad):
        x, decay, gain = ctx.saved_tensors
        decay, gain = (ctx.floats[0] if decay is None else decay), (ctx.floats[1] if gain is None else gain)
        v_th, v_reset, strict, detach_reset, surrogate, steps = ctx.how
        rest = v_reset or 0.0
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        charges, before, v = [], [], None
        for t in range(steps):
            h = charge(wide, v, t, decay, gain, rest)
            s = h > v_th if strict else h >= v_th
            before.append(v)
            charges.append(h)
            v = h - v_th * s.to(h.dtype) if v_reset is None else h.masked_fill(s, rest)
        grad_x, grad_v = torch.zeros_like(wide), None
        grad_decay = grad_gain = wide.new_zeros(())
        for t in reversed(range(steps)):
            h = charges.pop()
            g = surrogate.grad(h - v_th)
            grad_h = grad[t].to(h.dtype) * g
            if grad_v is not None:
                if v_reset is None:
                    grad_h = grad_h + (grad_v if detach_reset else grad_v * (1 - v_th * g))
                else:
                    stay = (h <= v_th if strict else h < v_th).to(h.dtype)
                    grad_h = grad_h + grad_v * (stay if detach_reset else stay + (rest - h) * g)
            i = t if len(x) > 1 else 0
            grad_x[i] += gain * grad_h
            v = before.pop()
            if ctx.needs_input_grad[1] and v is not None:
                grad_decay = grad_decay + (grad_h * (v - rest)).sum()
            if ctx.needs_input_grad[2]:
                grad_gain = grad_gain + (grad_h * wide[i]).sum()
            grad_v = decay * grad_h
        grads = [grad_x.to(x.dtype), grad_decay, grad_gain]
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), *[None] * 6


def neuron(
    x: Tensor,
    decay: Number,
    gain: Number,
    v_th: float,
    v_reset: float | None,
    strict: bool,
    detach_reset: bool,
    surrogate: Surrogate,
    steps: int,
) -> Tensor:
    """[T or 1, ...] -> spikes [steps, ...]. Twice differentiable it is not; use `functional.neuron` for that."""
    return _Neuron.apply(x, decay, gain, v_th, v_reset, strict, detach_reset, surrogate, steps)
