"""The kernels against the reference: the same spikes to the bit, the same gradients within float32."""

from itertools import product

import pytest
import torch

from spikedistill.models.layers import BatchNorm2d
from spikedistill.neurons import ATan, Rectangle, Sigmoid, Triangle, functional, kernels

GRID = [*product([0.0, None, -0.3], [True, False], [ATan(1.7), Sigmoid(3.0), Triangle(0.8), Rectangle(0.6)])]


@pytest.mark.parametrize("kernel", ["eager", "native"])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_layer_of_neurons(kernel, steps):
    torch.manual_seed(0)
    for v_reset, detach_reset, surrogate in GRID:
        x = (torch.randn(steps, 2, 5, 7, 9) * 1.5).requires_grad_()
        how = dict(v_th=0.9, v_reset=v_reset, detach_reset=detach_reset, surrogate=surrogate)
        weights = torch.randn_like(x)
        expected = functional.neuron(x, 0.6, 0.7, **how)[0]
        (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
        with kernels.use(kernel):
            spikes = kernels.neuron(x, 0.6, 0.7, **how)
            (got,) = torch.autograd.grad((spikes * weights).sum(), x)
        assert torch.equal(spikes, expected)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["eager", "native"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("static", [False, True])
def test_norm_and_neuron_agree_with_each_other_and_with_torch(kernel, layout, static):
    torch.manual_seed(1)
    steps = 4
    x = torch.randn(1 if static else steps, 6, 5, 8, 8) * 2 + 3
    x = x.flatten(0, 1).to(memory_format=layout).unflatten(0, x.shape[:2]).requires_grad_()
    weights, norms = torch.randn(steps, 6, 5, 8, 8), [BatchNorm2d(5), BatchNorm2d(5)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(2))
    expected = functional.neuron(norms[0](x), 0.5, 1.0, steps=steps)[0]
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *norms[0].parameters()])
    with kernels.use(kernel):
        spikes = kernels.norm_neuron(x, norms[1], 0.5, 1.0, steps=steps)
        got = torch.autograd.grad((spikes * weights).sum(), [x, *norms[1].parameters()])
    # two ways to write (x - mean) / std differ in the last bit, so a potential at the threshold may fall either way
    assert (spikes != expected).float().mean() < 1e-4
    if torch.equal(spikes, expected):
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    for a, b in zip(norms[0].buffers(), norms[1].buffers()):
        torch.testing.assert_close(a, b)


def test_the_result_does_not_depend_on_the_number_of_threads():
    x, norm, threads = torch.randn(4, 8, 16, 9, 9), BatchNorm2d(16), torch.get_num_threads()
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        y = x.clone().requires_grad_()
        kernels.norm_neuron(y, norm, 0.5, 0.5).sum().backward()
        results.append(y.grad)
    torch.set_num_threads(threads)
    assert torch.equal(*results)
