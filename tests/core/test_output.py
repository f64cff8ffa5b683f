"""The mean over time is torch's to the bit, and map and gradient lie in memory as they did."""

import pytest
import torch

from spikedistill.core.output import Output, rate
from spikedistill.core.taps import call
from spikedistill.functional import kd_loss
from tests.methods.toy import toy_batch, toy_student


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


def test_logits_are_float32_at_least():
    """torch leaves log_softmax in bfloat16 under CPU autocast: the KL of close logits would be noise."""
    model, x = toy_student(), toy_batch()["x"]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16 and call(model, x).logits.dtype == torch.float32
        z = torch.randn(16, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
        near = (z + 0.3 * torch.randn(16, 100, generator=torch.Generator().manual_seed(1))).bfloat16()
        found = kd_loss(z, near, 4.0)
    assert call(model.double(), x.double()).logits.dtype == torch.float64
    assert found == pytest.approx(float(kd_loss(z.double(), near.double(), 4.0)), rel=1e-4)


def test_a_step_that_is_not_there_is_an_error():
    out = Output(torch.zeros(2, 1, 3))
    assert len(out.at(slice(1, 2)).logits) == 1 and len(Output(torch.zeros(1, 1, 3)).at(slice(5, 6)).logits) == 1
    with pytest.raises(ValueError, match="there is no time step 3, the output has 2"):
        out.at(slice(2, 3))
