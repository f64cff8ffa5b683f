"""Convolutions by spikes are convolutions: against float64, against loops, and dense ones where there are many spikes."""

import copy
import threading
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from spikedistill import models
from spikedistill.models.layers import Conv2d
from spikedistill.neurons import kernels
from spikedistill.neurons.kernels import native, sparse
from tests.neurons.helpers import saved_bytes

pytestmark = pytest.mark.usefixtures("built")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
CHANNELS = [(16, 16), (20, 48), (64, 64), (70, 128), (128, 32), (96, 256)]


def events(N, C, H, W, share=0.1, dtype=torch.float32, values=(1.0,), seed=0):
    """[N, C, H, W], channels last: `share` of the elements are one of `values`, the others 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.tensor(values)[torch.randint(len(values), (N, H, W, C), generator=g)]
    return (x * (torch.rand(x.shape, generator=g) < share)).to(dtype).movedim(-1, 1)


def kernel_of(out, C, dtype=torch.float32, last=True, seed=1):
    w = torch.randn(out, C, 3, 3, generator=torch.Generator().manual_seed(seed)) / (9 * C) ** 0.5
    return w.to(dtype).to(memory_format=torch.channels_last if last else torch.contiguous_format)


def gradients(f, x, w, b=None):
    """Output and gradients of f for a fixed gradient of the output."""
    inputs = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    y = f(*inputs, *[None] * (b is None))
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, inputs, g)


def by_spikes(x, w, b):
    with sparse.limited(1):
        y = sparse.convolution(x, w, b)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward"  # the kernel, not torch
    return y


def error(x, w, b=None):
    """Largest error of output and gradients against float64, in parts of the largest value."""
    truth = gradients(
        lambda x, w, b: F.conv2d(x, w, b, padding=1), *(t if t is None else t.double() for t in (x, w, b))
    )
    return max(
        float((a.double() - t).abs().max() / t.abs().max().clamp_min(1e-9))
        for a, t in zip(gradients(by_spikes, x, w, b), truth)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C, out", CHANNELS)
def test_convolutions_are_those_of_float64(C, out, dtype):
    for N, (H, W), share in product((1, 3), ((1, 1), (5, 3), (20, 7)), (0.0, 0.1, 1.0)):
        for values, last in (((1.0,), True), ((0.25, 0.5, -1.0, 3.0), False)):
            x, b = events(N, C, H, W, share, dtype, values), torch.linspace(-1, 1, out).to(dtype)
            assert error(x, kernel_of(out, C, dtype, last), b if last else None) < TOLERANCE[dtype]


def test_convolution_written_as_loops():
    N, C, H, W = 2, 16, 4, 5
    x, w = events(N, C, H, W, 0.3, values=(1.0, 2.0)), kernel_of(16, C)
    y, dx, dw = gradients(by_spikes, x, w)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double()
    want_y, want_dx, want_dw = (
        torch.zeros(y.shape).double(),
        torch.zeros(x.shape).double(),
        torch.zeros(w.shape).double(),
    )
    for n, r, c, row, col in product(range(N), range(H), range(W), range(3), range(3)):
        i, j = r + row - 1, c + col - 1
        if 0 <= i < H and 0 <= j < W:
            tap = w[:, :, row, col].double()
            want_y[n, :, r, c] += tap @ x[n, :, i, j].double()
            want_dx[n, :, i, j] += tap.T @ g[n, :, r, c]
            want_dw[:, :, row, col] += torch.outer(g[n, :, r, c], x[n, :, i, j].double())
    for found, want in ((y, want_y), (dx, want_dx), (dw, want_dw)):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 4),
    C=st.integers(16, 140),
    H=st.integers(1, 12),
    W=st.integers(1, 70),
    blocks=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.03, 0.2, 0.7]),
    dtype=st.sampled_from(DTYPES),
    binary=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_no_counter_example(N, C, H, W, blocks, share, dtype, binary, biased, seed):
    x = events(N, C, H, W, share, dtype, (1.0,) if binary else (0.5, 2.0, -3.0), seed)
    b = torch.linspace(-1, 1, 16 * blocks).to(dtype) if biased else None
    assert error(x, kernel_of(16 * blocks, C, dtype, seed % 2 == 0, seed), b) < TOLERANCE[dtype]


def test_neither_threads_nor_calls_change_a_bit():
    lib, threads = native.library(), torch.get_num_threads()
    w = kernel_of(64, 70)
    for values in ((1.0,), (0.5, 2.0)):
        x, first = events(5, 70, 9, 14, 0.2, values=values), {}
        try:
            for name, number in product(native.LEVELS, (1, 3, 1)):
                level = native.level(lib, name)
                torch.set_num_threads(number)
                found = gradients(by_spikes, x, w)
                for a, b in zip(found, first.setdefault(level, found)):
                    assert torch.equal(a, b)
        finally:
            native.level(lib)
            torch.set_num_threads(threads)
        for found in first.values():  # nor the instructions, but for the order of sums
            for a, b in zip(found, first[0]):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bits_are_the_elements_that_are_not_0():
    for C, dtype in product((16, 64, 70, 128), DTYPES):
        x = events(3, C, 5, 7, 0.4, dtype)
        x[0, 3] = -0.0
        bits, binary = sparse.spikes(x, kernel_of(16, C, dtype), 1.0)
        words = x.movedim(1, -1).reshape(-1, C) != 0
        for q in range(bits.shape[-1]):
            mine = bits[..., q].reshape(-1, 1) >> torch.arange(min(64, C - 64 * q)) & 1
            assert torch.equal(mine.bool(), words[:, 64 * q : 64 * q + 64])
        assert binary and not sparse.spikes(2 * x, kernel_of(16, C, dtype), 1.0)[1]


def test_all_of_a_large_input_is_seen():
    """Several chunks of pixels, of which the first already has spikes; one more spike than allowed is one too many."""
    x, w = events(40, 16, 16, 16, 0.1), kernel_of(16, 16)
    count = int(x.count_nonzero())
    found = sparse.spikes(x, w, (count + 0.5) / x.numel())
    assert found is not None and sum(int(b).bit_count() for b in found[0].flatten().tolist()) == count
    assert sparse.spikes(x, w, (count - 0.5) / x.numel()) is None
    assert error(x, w) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_spikes_take_the_dense_convolution(dtype):
    w = kernel_of(32, 32, dtype)
    few, many = (events(4, 32, 8, 8, share, dtype).requires_grad_() for share in (0.22, 0.28))
    with sparse.limited(0.25):
        assert type(kernels.convolution(few, w, None).grad_fn).__name__ == "ConvolutionBackward"
        assert type(kernels.convolution(many, w, None).grad_fn).__name__ == "ConvolutionBackward0"
        assert torch.equal(kernels.convolution(many, w, None), F.conv2d(many, w, padding=1))
    with kernels.use("eager"):
        assert torch.equal(kernels.convolution(few, w, None), F.conv2d(few, w, padding=1))


def test_what_the_kernel_does_not_take_is_dense():
    x, w = events(2, 32, 6, 6), kernel_of(32, 32)
    for a, b in (
        (x.contiguous(), w),  # NCHW
        (x.double(), w.double()),
        (x[:, :8], w[:, :8]),
        (x, w[:20]),
        (x[:0], w),
    ):
        assert torch.equal(kernels.convolution(a, b, None), F.conv2d(a, b, padding=1))
    seen = torch.compile(lambda x: kernels.convolution(x, w, None), backend="eager", fullgraph=True)(x)
    assert torch.equal(seen, F.conv2d(x, w, padding=1))
    for how in (
        dict(stride=2),
        dict(padding=0),
        dict(dilation=2, padding=2),
        dict(groups=2),
        dict(padding_mode="reflect"),
    ):
        conv = Conv2d(32, 32, 3, **{"padding": 1, **how})
        y = conv(x[None])[0]
        assert type(y.grad_fn).__name__ != "ConvolutionBackward"
        assert torch.equal(y, nn.Conv2d.forward(conv, x))


def test_channels_that_do_not_fit_are_refused_as_torch_does():
    w = kernel_of(32, 32)
    for channels in (16, 64):
        with pytest.raises(RuntimeError, match=f"to have 32 channels, but got {channels} channels"):
            kernels.convolution(events(2, channels, 6, 6, 0.05), w, None)


def test_the_output_may_be_changed_in_place():
    x, w = events(2, 32, 6, 6, 0.05), kernel_of(32, 32).requires_grad_()
    y = kernels.convolution(x, w, None)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward" and y.is_contiguous(memory_format=torch.channels_last)
    y.mul_(2).add_(1).square().sum().backward()
    (want,) = torch.autograd.grad((F.conv2d(x, w, padding=1) * 2 + 1).square().sum(), w)
    torch.testing.assert_close(w.grad, want, rtol=1e-4, atol=1e-4)


def test_a_limit_is_of_its_thread():
    inside, go = threading.Event(), threading.Event()

    def hold():
        with sparse.limited(-1.0):
            inside.set()
            go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    x, w = events(2, 32, 6, 6, 0.05), kernel_of(32, 32).requires_grad_()
    with sparse.limited(1.0):
        go.set()
        thread.join()
        assert type(kernels.convolution(x, w, None).grad_fn).__name__ == "ConvolutionBackward"
    assert sparse.instead.get() is None


def test_odd_numbers_reach_the_output():
    w = kernel_of(16, 16)
    for value in (torch.nan, torch.inf, 1e38):
        x = events(1, 16, 5, 5, 0.1)
        x[0, 2, 1, 1] = value
        y, want = by_spikes(x, w.requires_grad_(), None), F.conv2d(x, w, padding=1)
        assert torch.equal(y.isnan(), want.isnan())
        torch.testing.assert_close(y, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_gradients_that_are_expanded_and_second_ones():
    x, w = events(2, 32, 6, 7), kernel_of(32, 32)
    found, want = ([t.detach().requires_grad_() for t in (x, w)] for _ in range(2))
    by_spikes(*found, None).sum().backward()
    F.conv2d(*want, padding=1).sum().backward()
    for a, b in zip(found, want):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    (first,) = torch.autograd.grad(by_spikes(*found, None).square().sum(), found[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_spikes_are_kept_as_bits():
    x, w = events(4, 64, 8, 8, 0.1).requires_grad_(), kernel_of(64, 64).requires_grad_()
    assert saved_bytes(lambda: kernels.convolution(x, w, None)) == x.nbytes // 32 + w.nbytes
    assert saved_bytes(lambda: kernels.convolution(x * 0.5, w, None)) == x.nbytes + x.nbytes // 32 + w.nbytes


@pytest.mark.parametrize("low", [False, True])
def test_networks_learn_the_same_with_and_without(low, monkeypatch):
    """`small` with a weight of few spikes: loss and gradients of every parameter, in float32 and under autocast."""
    torch.manual_seed(0)
    model = models.build("small(widths=(16, 32, 64))", classes=10, channels=1, steps=3)
    model = model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -1.0)
    images, taken = torch.rand(6, 1, 20, 20), []
    monkeypatch.setattr(sparse, "spikes", lambda *a, f=sparse.spikes: taken.append(f(*a)) or taken[-1])
    found = []
    for limit in (0.5, -1.0):
        net = copy.deepcopy(model)
        with sparse.limited(limit), torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = net(images)
        y.float().square().mean().backward()
        found.append([y.float(), *(p.grad for p in net.parameters())])
    assert [t is not None for t in taken] == [True, True, False, False]
    if low:  # a spike more or less, where rounding decides
        assert F.cosine_similarity(found[0][0].flatten(), found[1][0].flatten(), 0) > 0.99
        return
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_missing_library_is_an_error_here(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(RuntimeError, match="not built"):
        sparse.convolution(events(1, 16, 3, 3), kernel_of(16, 16), None)
