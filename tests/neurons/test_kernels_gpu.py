"""The Triton kernels against the eager one: on a GPU, or in Triton's interpreter where there is none."""

import copy
import os

import pytest
import torch

from spikedistill.neurons import ATan, Rectangle, Sigmoid, Triangle, kernels
from tests.neurons.test_kernels import close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: it is read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed: pip install triton (it comes with torch for CUDA)")

SURROGATES = [ATan(2.0), Sigmoid(4.0), Triangle(0.8), Rectangle(0.7)]
HOWS = [
    dict(v_th=0.8, v_reset=v_reset, strict=strict, detach_reset=detach, surrogate=surrogate)
    for v_reset, strict, detach in [(0.0, False, True), (None, True, False), (-0.3, False, False), (None, False, True)]
    for surrogate in SURROGATES
]


def results(kernel, dtype, layout, how, norm=None, static=False, T=4, shape=(2, 20, 7, 5)):
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(t, *shape, generator=g) * 1.5 for t in (1 if static else T, T))
    if layout == "channels_last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (len(x), shape[0]))
    x, grad = x.to(DEVICE, dtype).requires_grad_(), grad.to(DEVICE, dtype)
    decay, gain = (torch.tensor(c, device=DEVICE, requires_grad=True) for c in (0.6, 0.9))
    norm = copy.deepcopy(norm).to(DEVICE) if norm else None
    with kernels.use(kernel):
        if norm is None:
            spikes = kernels.neuron(x, decay, gain, **how, steps=T)
        else:
            spikes = kernels.norm_neuron(x, norm, decay, gain, **how, steps=T)
        spikes.backward(grad)
    return [spikes.detach(), x.grad, decay.grad, gain.grad] + ([norm.weight.grad, norm.bias.grad] if norm else [])


@pytest.mark.parametrize("layout, dtype", [("nchw", torch.float32), ("channels_last", torch.bfloat16)])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_triton_is_the_eager_kernel(how, layout, dtype):
    norm = torch.nn.BatchNorm2d(20)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    frozen = copy.deepcopy(norm).eval()
    for case in (dict(), dict(static=True), dict(norm=norm), dict(norm=frozen), dict(norm=norm, static=True)):
        found, want = (results(kernel, dtype, layout, how, **case) for kernel in ("triton", "eager"))
        assert torch.equal(found[0], want[0])
        close(found[1], want[1], 1e-2 if dtype == torch.bfloat16 else 1e-5)
        for a, b in zip(found[2:], want[2:]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # float32 sums in two orders


def test_constants_that_are_not_learned():
    x = torch.randn(3, 2, 4, 5, 5, device=DEVICE)
    for how in HOWS:
        with kernels.use("triton"):
            a = kernels.neuron(x, 0.6, 0.9, **how)
        with kernels.use("eager"):
            assert torch.equal(a, kernels.neuron(x, 0.6, 0.9, **how))
