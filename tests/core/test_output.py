"""The mean over time is torch's to the bit, and map and gradient lie in memory as they did."""

import pytest
import torch

from spikedistill.core.output import rate


def maps(order, dtype):
    x = torch.randn(3, *(dict(zip("BCHW", (2, 5, 4, 6)))[axis] for axis in order)).to(dtype)
    return x.permute(0, *(1 + order.index(axis) for axis in "BCHW"))


@pytest.mark.parametrize("order", ["BCHW", "BHWC", "CBWH"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rate_keeps_the_order_in_memory(order, dtype):
    x = maps(order, dtype).requires_grad_()
    y = rate(x)
    assert torch.equal(y, x.mean(0)) and y.stride() == x[0].stride()
    g = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, g)
    assert torch.equal(grad, (g / 3).expand_as(x)) and grad[0].stride() == x[0].stride()


def test_rate_of_logits_of_one_step_and_of_expanded_steps():
    z = torch.randn(1, 4, 3)
    assert torch.equal(rate(z), z[0]) and torch.equal(rate(z.expand(2, -1, -1)), z[0])
    assert torch.equal(rate(torch.tensor([1.0, 2.0])), torch.tensor(1.5))
