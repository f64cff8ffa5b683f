"""Every kernel is the reference: spikes to the bit, gradients against float64, statistics and running ones against torch."""

import copy
import sys
import warnings
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from spikedistill.neurons import LIF, PLIF, ATan, Rectangle, Sigmoid, Triangle, functional, kernels
from spikedistill.neurons.kernels import native
from tests.neurons.helpers import LAYOUTS, draw, laid, saved_bytes

SHAPES = [(2, 5, 3, 3), (3, 64, 8, 8), (2, 16, 1, 1), (1, 3, 40, 33), (5, 33, 7, 2), (2, 1, 9, 9), (1, 700, 2, 3)]
SURROGATES = [
    ATan(2.0),
    ATan(0.7),
    Sigmoid(4.0),
    Sigmoid(2.5),
    Triangle(1.0),
    Triangle(0.6),
    Rectangle(0.5),
    Rectangle(1.2),
]
RESETS = [0.0, None, -0.3]
HOWS = [
    dict(v_th=v_th, v_reset=v_reset, strict=strict, detach_reset=detach, surrogate=surrogate)
    for (v_th, v_reset, strict, detach), surrogate in zip(
        product((1.0, 0.7), RESETS, (False, True), (True, False)), SURROGATES * 3
    )
]
TS = [1, 2, 4, 7, 16]


def batch_norm(C, seed=0, **how):
    norm = nn.BatchNorm2d(C, **how)
    g = torch.Generator().manual_seed(seed)
    if norm.affine:
        norm.weight.data.uniform_(0.5, 1.5, generator=g)
        norm.bias.data.normal_(generator=g)
    if norm.track_running_stats:
        norm.running_mean.normal_(generator=g)
        norm.running_var.uniform_(0.5, 2.0, generator=g)
    return norm


def reference(x, norm, decay, gain, **how):
    u = x if norm is None else norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return functional.neuron(u, decay, gain, **how)


def charges(u, decay, gain, steps, v_th, v_reset, strict, **_):
    """H [T, ...], in loops."""
    rest, hs = v_reset or 0.0, []
    v = torch.full_like(u[0], rest)
    for t in range(steps):
        h = decay * v + gain * u[t if len(u) > 1 else 0] + (1 - decay) * rest
        s = (h > v_th if strict else h >= v_th).to(h.dtype)
        v = h - v_th * s if v_reset is None else h * (1 - s) + rest * s
        hs.append(h)
    return torch.stack(hs)


def firm(h, v_th, surrogate, **_):
    """Neurons that no rounding moves over the threshold, or over the edge of a rectangle, at any step."""
    far = (h - v_th).abs() > 1e-4
    if isinstance(surrogate, Rectangle):
        far &= ((h - v_th).abs() - surrogate.a).abs() > 1e-4
    return far.all(0)


def close(a, b, tolerance=1e-5):
    """Relative to the largest value; 1e-12 is what float64 leaves where a gradient is zero."""
    error, scale = (a.double() - b.double()).abs().max(), b.double().abs().max()
    assert error.item() <= tolerance * scale.item() + 1e-12


def close_sum(a, terms):
    """a is the sum of terms of both signs: beside 1e-5 of the largest sum, 1e-6 of the terms that had to cancel."""
    over = (0, 1, 3, 4) if terms.ndim == 5 and a.ndim else [*range(terms.ndim)]  # [T, B, C, H, W] -> [C], else all
    b, size = terms.sum(over), terms.abs().sum(over)
    assert ((a.double() - b).abs() <= 1e-5 * b.abs().max() + 1e-6 * size + 1e-12).all(), (a, b, size)


def of_each_neuron(number, x):
    """A coefficient as the float64 reference takes it: one a neuron, so that its gradient is the terms of the sum."""
    return torch.full(x.shape[1:], torch.tensor(number).item(), dtype=torch.float64, requires_grad=True)


# ---- spikes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", TS)
def test_spikes_are_those_of_the_reference_to_the_bit(kernel, T, layout):
    for i, (shape, how) in enumerate(product(SHAPES, HOWS[::5])):
        x = draw(T, shape, layout, seed=i)
        spikes = kernels.neuron(x, 0.6, 0.9, **how)
        want, _ = functional.neuron(x, 0.6, 0.9, **how)
        assert torch.equal(spikes, want)
        assert laid(spikes) == laid(x)


@pytest.mark.parametrize("how", HOWS[::4], ids=str)
def test_spikes_of_millions_of_neurons(built, how):
    for seed, (decay, gain) in enumerate([(0.5, 0.5), (1.0, 1.0), (1 - 1 / 1.7, 1.0)]):
        x, norm = draw(4, (16, 16, 32, 32), "channels_last", seed), batch_norm(16).eval()
        assert torch.equal(kernels.neuron(x, decay, gain, **how), functional.neuron(x, decay, gain, **how)[0])
        spikes = kernels.norm_neuron(x, norm, decay, gain, **how)
        with kernels.use("eager"):
            assert torch.equal(spikes, kernels.norm_neuron(x, norm, decay, gain, **how))


def test_threshold_hit_exactly(kernel):
    x = torch.full((3, 40), 1.0)
    for strict in (False, True):
        want, _ = functional.neuron(x, 1.0, 1.0, strict=strict)
        assert torch.equal(kernels.neuron(x, 1.0, 1.0, strict=strict), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [1, 4, 64])
def test_static_input_is_the_repeated_input(kernel, T, layout):
    for how in HOWS[::7]:
        x, norm = draw(1, (3, 20, 5, 6), layout), batch_norm(20)
        assert torch.equal(
            kernels.neuron(x, 0.6, 0.9, **how, steps=T), functional.neuron(x, 0.6, 0.9, **how, steps=T)[0]
        )
        once, repeated = (y.clone().requires_grad_() for y in (x, x.expand(T, -1, -1, -1, -1)))
        g = draw(T, (3, 20, 5, 6), seed=1)
        a = kernels.norm_neuron(once, norm, 0.6, 0.9, **how, steps=T)
        b = kernels.norm_neuron(repeated, norm, 0.6, 0.9, **how)
        same = (a == b).all(0)
        assert same.float().mean() > 0.999  # the statistics are sums in another order
        (a * g * same).sum().backward()
        (b * g * same).sum().backward()
        close(once.grad[0], repeated.grad.sum(0), 3e-5)  # float32 on both sides, T terms


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_is_the_same_numbers_in_every_kernel(built, layout):
    """Equal statistics, equal spikes: the affine transform is one product and one sum in all of them."""
    for i, (T, shape, how) in enumerate(product((1, 4), SHAPES, HOWS[::5])):
        for affine in (True, False):
            x, norm = draw(T, shape, layout, i), batch_norm(shape[1], i, affine=affine).eval()
            spikes = kernels.norm_neuron(x, norm, 0.6, 0.9, **how)
            with kernels.use("eager"):
                assert torch.equal(spikes, kernels.norm_neuron(x, norm, 0.6, 0.9, **how))
            assert laid(spikes) == laid(x)


@pytest.mark.parametrize("training", [True, False])
def test_norm_neuron_is_norm_then_neuron(kernel, training):
    x, norm = draw(4, (8, 64, 16, 16), "channels_last"), batch_norm(64).train(training)
    other = copy.deepcopy(norm).double()
    spikes = kernels.norm_neuron(x, norm, 0.5, 0.5)
    u = other(x.double().flatten(0, 1)).unflatten(0, x.shape[:2])
    keep = firm(charges(u, 0.5, 0.5, 4, 1.0, 0.0, False), 1.0, ATan())
    assert keep.float().mean() > 0.99
    assert torch.equal((spikes * keep).double(), functional.neuron(u, 0.5, 0.5)[0] * keep)


# ---- gradients --------------------------------------------------------------------------------------------------------


def check_gradients(T, shape, layout, how, *, norm=None, static=False, seed=0, decay=0.6, gain=0.9):
    x = draw(1 if static else T, shape, layout, seed)
    norm64 = copy.deepcopy(norm).double() if norm else None
    # contiguous: channels_last with N = 1 has wrong gradients in the norm of torch 2.13 itself
    x64 = x.double().contiguous().requires_grad_()
    decay64, gain64 = (of_each_neuron(c, x) for c in (decay, gain))
    u = x64 if norm is None else norm64(x64.flatten(0, 1)).unflatten(0, x.shape[:2])
    with torch.no_grad():
        keep = firm(charges(u, decay64, gain64, T, **how), **how)
    g = draw(T, shape, layout, seed + 1) * keep
    u.retain_grad()
    spikes64, _ = functional.neuron(u, decay64, gain64, **how, steps=T)
    spikes64.backward(g.double())

    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    decay, gain = (torch.tensor(c, requires_grad=True) for c in (decay, gain))
    if norm is None:
        spikes = kernels.neuron(x, decay, gain, **how, steps=T)
    else:
        spikes = kernels.norm_neuron(x, norm, decay, gain, **how, steps=T)
    assert torch.equal((spikes * keep).double(), spikes64 * keep)
    spikes.backward(g)
    close(x.grad, x64.grad)
    close_sum(decay.grad, decay64.grad)
    close_sum(gain.grad, gain64.grad)
    if norm is not None and norm.affine:
        weight, bias = (p.detach()[:, None, None] for p in (norm64.weight, norm64.bias))
        close_sum(norm.weight.grad, u.grad * (u.detach() - bias) / weight)
        close_sum(norm.bias.grad, u.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_gradients_of_the_neuron(kernel, how, layout):
    for T, shape, static in [(4, (3, 20, 7, 5), False), (1, (2, 33, 3, 3), False), (5, (2, 3, 9, 11), True)]:
        check_gradients(T, shape, layout, how, static=static)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_gradients_of_norm_and_neuron(kernel, how, layout):
    for T, shape, static in [(4, (3, 20, 7, 5), False), (1, (4, 33, 3, 3), False), (5, (3, 5, 9, 11), True)]:
        for training in (True, False):
            norm = batch_norm(shape[1], affine=T != 1).train(training)
            check_gradients(T, shape, layout, how, norm=norm, static=static)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", TS)
def test_gradients_over_the_grid(kernel, T, layout):
    """Every combination of shape, reset, surrogate and rule at some T in some layout: a seventh of them at a time."""
    start = 2 * TS.index(T) + LAYOUTS.index(layout)
    for i, (shape, v_reset, surrogate, detach, strict) in enumerate(
        product(SHAPES, RESETS, SURROGATES[1::2], (True, False), (True, False))
    ):
        if i % 7 != start % 7:
            continue
        if T * shape[0] * shape[2] * shape[3] < 16:
            continue  # with two or three values the gradient through the statistics is all cancellation
        how = dict(v_th=0.8, v_reset=v_reset, strict=strict, detach_reset=detach, surrogate=surrogate)
        for norm in (None, batch_norm(shape[1], i), batch_norm(shape[1], i).eval()):
            check_gradients(T, shape, layout, how, norm=norm, static=i % 3 == 0 and norm is None, seed=i)


def test_gradient_without_parameters_that_need_one(kernel):
    """Frozen norm, frozen input: each gradient can be asked for alone."""
    g = draw(4, (3, 8, 5, 5), seed=1)
    for frozen in product((True, False), repeat=2):
        x, norm = draw(4, (3, 8, 5, 5)).requires_grad_(not frozen[0]), batch_norm(8)
        norm.requires_grad_(not frozen[1])
        spikes = kernels.norm_neuron(x, norm, 0.5, 0.5)
        assert spikes.requires_grad != all(frozen)
        if not all(frozen):
            spikes.backward(g)
        assert (x.grad is None, norm.weight.grad is None) == frozen


@pytest.mark.parametrize("layer", [LIF(), PLIF(1.6), PLIF(1.6, decay_input=False, v_reset=-0.2)], ids=str)
def test_layers_and_learned_leaks(kernel, layer):
    x, layer64 = draw(4, (3, 20, 7, 5)), copy.deepcopy(layer)
    for name, p in layer.named_parameters():
        setattr(layer64, name, nn.Parameter(of_each_neuron(p.item(), x).detach()))
    x64 = x.double().requires_grad_()
    spikes64, _ = functional.neuron(x64, *layer64.coefficients(), **layer.how)
    with torch.no_grad():
        keep = firm(charges(x64, *layer64.coefficients(), 4, **layer.how), **layer.how)
    g = draw(4, (3, 20, 7, 5), seed=1) * keep
    spikes64.backward(g.double())
    layer.zero_grad()
    x.requires_grad_()
    layer(x).backward(g)
    close(x.grad, x64.grad)
    for p, p64 in zip(layer.parameters(), layer64.parameters()):
        close_sum(p.grad, p64.grad)


def test_eager_in_float64_is_the_reference():
    for how, static in zip(HOWS, [False, True] * 12):
        grads = []
        for f in (functional.neuron, kernels.neuron):
            x = draw(1 if static else 5, (3, 4, 3, 3), dtype=torch.float64).requires_grad_()
            c = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.6, 0.9)]
            spikes = f(x, *c, **how, steps=5)
            spikes = spikes[0] if isinstance(spikes, tuple) else spikes
            spikes.backward(draw(5, (3, 4, 3, 3), seed=1, dtype=torch.float64))
            grads.append([spikes.detach(), x.grad, *(v.grad for v in c)])
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_refused(kernel):
    x = draw(2, (2, 3, 4, 4)).requires_grad_()
    (g,) = torch.autograd.grad(kernels.neuron(x, 0.5, 0.5).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


# ---- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_float32_rounded(built, layout):
    for i, (T, shape, how) in enumerate(product((1, 4), SHAPES, HOWS[::5])):
        x, g = draw(T, shape, layout, i, torch.bfloat16), draw(T, shape, layout, i + 1, torch.bfloat16)
        for norm in (None, batch_norm(shape[1]), batch_norm(shape[1]).eval()):
            if T * shape[0] * shape[2] * shape[3] == 1:
                continue
            found = []
            for dtype in (torch.bfloat16, torch.float32):
                a, n = x.to(dtype, copy=True).requires_grad_(), copy.deepcopy(norm)
                y = kernels.neuron(a, 0.6, 0.9, **how) if n is None else kernels.norm_neuron(a, n, 0.6, 0.9, **how)
                y.backward(g.to(dtype))
                assert y.dtype == a.grad.dtype == dtype
                found.append([y, a.grad] + ([n.weight.grad, n.bias.grad, *n.buffers()] if n else []))
            for p, q in zip(*found):
                assert torch.equal(p, q.to(p.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4])
def test_moments_far_from_zero(kernel, layout, offset):
    for shape in SHAPES:
        x = draw(3, shape, layout, scale=2.0) + offset
        mean, var = torch.ops.spikedistill.moments(x)
        var64, mean64 = torch.var_mean(x.double(), (0, 1, 3, 4), correction=0)
        close(mean, mean64, 1e-6)
        close(var, var64, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_statistics_are_those_of_torch(kernel, layout):
    for how in [
        dict(),
        dict(momentum=0.3, eps=1e-3),
        dict(momentum=None),
        dict(track_running_stats=False),
        dict(affine=False),
        dict(momentum=1.0),
    ]:
        norm = batch_norm(20, **how)
        other = copy.deepcopy(norm)
        for i, training in enumerate((True, True, False, True)):
            x = draw(3, (2, 20, 5, 4), layout, i)
            kernels.norm_neuron(x, norm.train(training), 0.5, 0.5)
            other.train(training)(x.flatten(0, 1))
            assert norm.state_dict().keys() == other.state_dict().keys()
            for a, b in zip(norm.buffers(), other.buffers()):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_autocast_keeps_parameters_in_float32(kernel):
    conv, norm = nn.Conv2d(3, 16, 3), batch_norm(16)
    x = torch.randn(8, 3, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        u = conv(x).unflatten(0, (4, 2))
        spikes = kernels.norm_neuron(u, norm, 0.5, 0.5)
    spikes.sum().backward()
    assert u.dtype == spikes.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == conv.weight.grad.dtype == torch.float32


# ---- same on every machine --------------------------------------------------------------------------------------------


def everything(seed=0):
    """All results of some calls, to be compared to the bit."""
    out = []
    for layout, dtype, shape in product(LAYOUTS, (torch.float32, torch.bfloat16), [(8, 64, 16, 16), (3, 35, 21, 9)]):
        x, norm = draw(4, shape, layout, seed, dtype).requires_grad_(), batch_norm(shape[1])
        decay = torch.tensor(0.6, requires_grad=True)
        for surrogate in (ATan(), Sigmoid()):
            y = kernels.norm_neuron(x, norm, decay, 0.9, surrogate=surrogate)
            y.backward(draw(4, shape, layout, seed + 1, dtype))
        out += [y, x.grad, decay.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()]
    return out


def test_number_of_threads_changes_nothing(built):
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_instruction_sets_change_nothing(built):
    found, taken = [], []
    try:
        for name in native.LEVELS:
            taken.append(native.level(native.library(), name))
            found.append(everything())
    finally:
        native.level(native.library())
    assert taken[0] == 0
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


# ---- odd input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS[::3], ids=str)
def test_nan_infinity_and_huge_values(kernel, how):
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e38, 1e-40, 0.0])
    x = odd[torch.randint(len(odd), (5, 2, 3, 4, 4), generator=torch.Generator().manual_seed(0))]
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    spikes, (want, _) = kernels.neuron(a, 0.6, 0.9, **how), functional.neuron(b, 0.6, 0.9, **how)
    assert torch.equal(spikes, want)
    spikes.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_one_nan_in_a_batch_silences_its_channel_alone(kernel):
    x, norm = draw(3, (2, 4, 5, 5)), batch_norm(4)
    clean = kernels.norm_neuron(x, copy.deepcopy(norm), 0.5, 0.5)
    x[1, 0, 2, 3, 3] = float("nan")
    spikes = kernels.norm_neuron(x, norm, 0.5, 0.5)
    assert not spikes[:, :, 2].any() and norm.running_var.isnan().tolist() == [False, False, True, False]
    assert torch.equal(spikes[:, :, [0, 1, 3]], clean[:, :, [0, 1, 3]])


@pytest.mark.parametrize("shape", [(4, 0, 3, 5, 5), (4, 2, 3, 0, 5)])
def test_empty_batch(kernel, shape):
    x, norm = torch.randn(shape, requires_grad=True), batch_norm(3)
    other = copy.deepcopy(norm)
    spikes = kernels.norm_neuron(x, norm, 0.5, 0.5)
    other(x.flatten(0, 1))
    assert spikes.shape == kernels.neuron(x, 0.5, 0.5).shape == shape
    spikes.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), other.buffers()))


def test_views_are_read_right(kernel):
    base = draw(8, (4, 6, 10, 12)).requires_grad_()
    for view in [
        base[::2],
        base[:, 1:3],
        base.transpose(0, 1),
        base.transpose(3, 4),
        base[..., ::3],
        base.flip(0)[2:],
        base[:1].expand(4, -1, -1, -1, -1),
        base.permute(0, 1, 3, 4, 2),
        base.flatten(1, 3),
    ]:
        spikes, (want, _) = kernels.neuron(view, 0.6, 0.9), functional.neuron(view, 0.6, 0.9)
        assert torch.equal(spikes, want)
        g = torch.randn(view.shape).transpose(-1, -2).contiguous().transpose(-1, -2)  # not laid out as the input
        grads = [torch.autograd.grad(y, base, g)[0] for y in (spikes, want)]
        close(*grads)
        if view.ndim == 5:
            norm = batch_norm(view.shape[2])
            a = kernels.norm_neuron(view, copy.deepcopy(norm), 0.6, 0.9)
            b = kernels.norm_neuron(view.contiguous(), norm, 0.6, 0.9)
            assert (a == b).float().mean() > 0.999
    assert torch.equal(kernels.neuron(base, 0.6, 0.9).sum().expand(3), kernels.neuron(base, 0.6, 0.9).sum().expand(3))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(kernel, default):
    found = []
    for dtype in (torch.float32, default):
        x, norm = draw(5, (3, 4, 6, 5)).requires_grad_(), batch_norm(4)
        leak = torch.tensor(0.6, requires_grad=True)
        torch.set_default_dtype(dtype)
        try:
            spikes = kernels.norm_neuron(x, norm, leak, 0.9)
            (spikes * torch.linspace(0, 1, 5)).sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        grads = [x.grad, norm.weight.grad, norm.bias.grad, leak.grad]
        found.append([spikes.detach(), norm.running_mean, norm.running_var, *grads])
    for a, b in zip(*found):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # of the weights of the sum alone


def test_gradients_that_are_expanded(kernel):
    x = draw(4, (2, 3, 5, 5), "channels_last").requires_grad_()
    (a,) = torch.autograd.grad(kernels.neuron(x, 0.6, 0.9).sum(), x)
    (b,) = torch.autograd.grad(functional.neuron(x, 0.6, 0.9)[0].sum(), x)
    close(a, b)


def test_wrong_calls_raise(kernel):
    x, norm = draw(3, (2, 4, 5, 5)), batch_norm(4)
    with pytest.raises(ValueError, match="3 time steps but steps=2"):
        kernels.neuron(x, 0.5, 0.5, steps=2)
    with pytest.raises(ValueError, match="C = 4"):
        kernels.norm_neuron(x[:, :, :3], norm, 0.5, 0.5)
    with pytest.raises(ValueError, match="T, B, C, H, W"):
        kernels.norm_neuron(x[0], norm, 0.5, 0.5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kernels.norm_neuron(x[:1, :1, :, :1, :1], norm, 0.5, 0.5)
    with pytest.raises(ValueError, match="no kernel 'fast'"), kernels.use("fast"):
        pass


def test_what_only_the_reference_knows(kernel):
    """A surrogate of the user's, and a decay for each channel, are computed, slowly."""

    class Flat:
        def grad(self, x):
            return torch.ones_like(x)

    x = draw(3, (2, 4, 5, 5)).requires_grad_()
    decay = torch.rand(4, 1, 1, requires_grad=True)
    spikes = kernels.neuron(x, decay, 0.9, surrogate=Flat())
    assert torch.equal(spikes, functional.neuron(x, decay, 0.9, surrogate=Flat())[0])
    spikes.sum().backward()
    assert decay.grad.shape == decay.shape
    assert kernels.norm_neuron(x, batch_norm(4), decay, 0.9).shape == x.shape


def test_other_dtypes():
    for dtype in (torch.float16, torch.float64):
        x = draw(3, (2, 4, 5, 5), dtype=dtype).requires_grad_()
        spikes, (want, _) = kernels.neuron(x, 0.6, 0.9), functional.neuron(x, 0.6, 0.9)
        assert torch.equal(spikes, want)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (spikes, want)]
        close(*grads, 1e-3 if dtype == torch.float16 else 1e-12)
    norm = batch_norm(4).double()
    assert kernels.norm_neuron(x, norm, 0.6, 0.9).dtype == torch.float64


@given(
    T=st.integers(1, 9),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(LAYOUTS),
    decay=st.floats(0, 1, width=32),
    gain=st.floats(-2, 3, width=32),
    v_th=st.floats(-1, 2, width=32),
    v_reset=st.none() | st.floats(-1, 1, width=32),
    strict=st.booleans(),
    detach_reset=st.booleans(),
    surrogate=st.sampled_from(SURROGATES),
    static=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    normed=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_counter_example(built, T, shape, layout, decay, gain, static, dtype, normed, seed, **how):
    x, norm = draw(1 if static else T, shape, layout, seed, dtype), batch_norm(shape[1], seed).eval()

    def run(x):
        if normed:
            return kernels.norm_neuron(x, norm, decay, gain, **how, steps=T)
        return kernels.neuron(x, decay, gain, **how, steps=T)

    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    spikes = run(a)
    with kernels.use("eager"):
        want = run(b)
    assert torch.equal(spikes, want)
    u = x.double()
    if normed:
        u = copy.deepcopy(norm).double()(u.flatten(0, 1)).unflatten(0, x.shape[:2])
    else:
        assert torch.equal(spikes, functional.neuron(x, decay, gain, **how, steps=T)[0])
    keep = firm(charges(u.detach(), decay, gain, T, **how), **how)
    g = draw(T, shape, "nchw", seed + 1, dtype) * keep
    spikes.backward(g)
    with kernels.use("eager"):
        want.backward(g)
    close(a.grad, b.grad, 1e-5 if dtype == torch.float32 else 1e-2)


# ---- memory, compile, export, build -----------------------------------------------------------------------------------


def test_only_the_input_is_kept(kernel):
    x, norm = draw(4, (3, 20, 7, 5)).requires_grad_(), batch_norm(20)
    assert saved_bytes(lambda: kernels.neuron(x, 0.5, 0.5)) == x.nbytes
    assert (
        saved_bytes(lambda: kernels.norm_neuron(x, norm, 0.5, 0.5)) == x.nbytes + 4 * 20 * 4
    )  # mean, var, weight, bias


def samples():
    x, C = draw(3, (2, 5, 4, 3), "channels_last").requires_grad_(), 5
    decay, weight, bias = torch.tensor(0.6, requires_grad=True), torch.rand(C).requires_grad_(), torch.rand(C)
    how = (0.6, 0.9, 1.0, 0.0, False, True, 0, 2.0)
    none = (None, None, None, None)
    mean, var = torch.rand(C), torch.rand(C)
    yield "neuron", (x, *none, None, None, 0.0, False, *how, 3)
    yield "neuron", (x[:1], *none, decay, None, 0.0, False, *how, 4)
    yield "neuron", (x, mean, var, weight, bias, decay, None, 1e-5, True, *how, 3)
    yield "neuron", (x.detach(), mean, var, None, None, None, None, 1e-5, False, *how, 3)
    grad, xd, wd = torch.randn(3, 2, 5, 4, 3), x.detach(), weight.detach()
    yield "neuron_backward", (grad, xd, mean, var, wd, bias, None, None, 1e-5, True, *how, True, True, False)
    yield "neuron_backward", (grad, xd, *none, decay.detach(), None, 0.0, False, *how, True, False, True)
    yield "moments", (xd,)


@pytest.mark.parametrize("name, args", list(samples()), ids=lambda v: v if isinstance(v, str) else "")
def test_operators_are_registered_right(kernel, name, args):
    # the gradient of the statistics is part of that of the neuron, so mean and var have none of their own
    torch.library.opcheck(getattr(torch.ops.spikedistill, name).default, args)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.lif, self.plif = nn.Conv2d(3, 8, 3), batch_norm(8), LIF(), PLIF()

    def forward(self, x):
        x = self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = kernels.norm_neuron(x, self.norm, *self.lif.coefficients(), **self.lif.how)
        return self.plif(2 * x).mean((0, 3, 4))


def test_compiles_to_one_graph(kernel):
    x, eager = draw(4, (2, 3, 8, 8)), Net()
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        a, b = eager(x), run(x)
        close(b, a)
        a.square().sum().backward()
        b.square().sum().backward()
    for p, q in zip(compiled.parameters(), eager.parameters()):
        close(p.grad, q.grad, 1e-4)
    for p, q in zip(compiled.buffers(), eager.buffers()):
        torch.testing.assert_close(p, q)


@pytest.mark.slow
def test_compiles_with_inductor(kernel):
    x, eager = draw(4, (2, 3, 8, 8)), Net()
    compiled = copy.deepcopy(eager)
    a, b = eager(x), torch.compile(compiled, fullgraph=True)(x)
    close(b, a)
    a.square().sum().backward()
    b.square().sum().backward()
    for p, q in zip(compiled.parameters(), eager.parameters()):
        close(p.grad, q.grad, 1e-4)


def test_exports_as_one_operator(kernel):
    x, net = draw(4, (2, 3, 8, 8)), Net().eval()
    B = torch.export.Dim("B", min=2)
    program = torch.export.export(net, (x,), dynamic_shapes=[{1: B}])
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("spikedistill.neuron.default") == 2
    for batch in (2, 5):
        x = draw(4, (batch, 3, 8, 8), seed=batch)
        torch.testing.assert_close(program.module()(x), net(x))


def test_a_missing_library_is_said_once(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    native.library.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x = draw(4, (2, 3, 4, 4))
            spikes = [kernels.neuron(x, 0.5, 0.5) for _ in range(3)]
        assert len(caught) == 1
        assert "was not built" in str(caught[0].message) and "pip install" in str(caught[0].message)
        assert torch.equal(spikes[0], functional.neuron(x, 0.5, 0.5)[0])
        with kernels.use("native"), pytest.raises(RuntimeError, match="not built"):
            kernels.neuron(x, 0.5, 0.5)
    finally:
        native.library.cache_clear()


def test_missing_triton_is_said(monkeypatch):
    monkeypatch.delitem(sys.modules, "spikedistill.neurons.kernels.gpu", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels._gpu.cache_clear()
    try:
        with (
            pytest.warns(UserWarning, match="triton is not installed"),
            pytest.raises(ValueError, match="needs the package triton"),
            kernels.use("triton"),
        ):
            pass
    finally:
        kernels._gpu.cache_clear()


def test_there_is_one_pool_of_threads(built):
    kernels.neuron(draw(4, (2, 64, 32, 32)), 0.5, 0.5)
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "omp" in line.rsplit("/", 1)[-1]}
    assert len(runtimes) == 1
    assert native.parallel()


def test_trains_a_step(kernel):
    net = Net()
    before = copy.deepcopy(net.state_dict())
    loss = F.mse_loss(net(draw(4, (2, 3, 8, 8))), torch.ones(2, 8))
    loss.backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert all(not torch.equal(v, before[k]) for k, v in net.state_dict().items() if "weight" in k or "running" in k)
