"""The layers that know time: merged with the batch, or the same at every step."""

from typing import Any

import pytest
import torch
from torch import nn

from spikedistill.models.layers import (
    AvgPool2d,
    Conv2d,
    Dropout,
    MaxPool2d,
    Vote,
    choose,
    kaiming,
    over_space,
    sequence,
    spiking_conv,
    tet_neuron,
)
from spikedistill.neurons import IF, LIF, PLIF, ATan, ReLU, Triangle
from spikedistill.spec import SpecError


def test_dropout_drops_the_same_at_every_step():
    torch.manual_seed(0)
    x, layer = torch.ones(4, 8, 50), Dropout(0.4)
    y = layer(x)
    assert torch.equal(y, y[:1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert 0.3 < (y == 0).float().mean() < 0.5
    assert layer.eval()(x) is x or torch.equal(layer(x), x)


def test_the_mean_over_space_hands_back_a_gradient_in_the_layout_of_the_map():
    for last in (True, False):
        x = torch.randn(3, 2, 4, 6, 5)  # [T, B, H, W, C] or [T, B, C, H, W]
        x = (x.movedim(-1, 2) if last else x).requires_grad_()
        y = over_space(x)
        torch.testing.assert_close(y, x.mean((-2, -1)))
        g = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(grad, (g / (x.shape[-1] * x.shape[-2]))[..., None, None].expand_as(x))
        assert grad.stride() == x.stride()


def test_an_exporter_sees_the_mean_over_space_as_one_mean():
    class Net(nn.Module):
        def forward(self, x):
            return over_space(x)

    x = torch.randn(3, 2, 4, 6, 5).movedim(-1, 2)
    nodes = torch.export.export(Net(), (x,)).graph.nodes
    assert [n.target for n in nodes if n.op == "call_function"] == [torch.ops.aten.mean.dim]


HOWS: list[dict[str, Any]] = [
    *(dict(kernel_size=2), dict(kernel_size=(2, 2)), dict(kernel_size=2, stride=1), dict(kernel_size=3)),
    *(dict(kernel_size=2, padding=1), dict(kernel_size=2, ceil_mode=True), dict(kernel_size=(2, 1), stride=2)),
]
MORE: dict[Any, list[dict[str, Any]]] = {
    MaxPool2d: [dict(kernel_size=2, dilation=2)],
    AvgPool2d: [dict(kernel_size=2, divisor_override=3), dict(kernel_size=2, count_include_pad=False)],
}


@pytest.mark.parametrize("layer", [MaxPool2d, AvgPool2d])
def test_pools_take_every_setting_of_torch(layer):
    x = torch.randn(3, 2, 5, 9, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for how in HOWS + MORE[layer]:
        want = getattr(nn, layer.__name__)(**how)(x.flatten(0, 1)).unflatten(0, (3, 2))
        assert torch.equal(layer(**how)(x), want), how


def test_votes_are_means_of_neighbours():
    x = torch.arange(12.0).view(1, 2, 6)
    assert Vote(3)(x).tolist() == [[[1, 4], [7, 10]]]


def test_neuron_defaults_of_a_family_give_way_to_the_text():
    tet = tet_neuron("lif")()
    assert isinstance(tet, LIF) and tet.coefficients() == (0.5, 1.0)
    assert tet.strict and not tet.detach_reset and tet.surrogate == Triangle(1.0)
    own: Any = tet_neuron("lif(tau=4.0, decay_input=True, strict=False, surrogate=atan(3.0))")()
    assert own.coefficients() == (0.75, 0.25) and not own.strict and own.surrogate == ATan(3.0)
    assert isinstance(tet_neuron("plif")(), PLIF)
    for text in ("if", " if(v_th=0.5)", "if_", "if_(v_th=0.5)"):
        assert isinstance(tet_neuron(text)(), IF) and tet_neuron(text)().strict
    assert tet_neuron("relu") is ReLU and tet_neuron(ReLU) is ReLU
    with pytest.raises(SpecError, match="tua"):
        tet_neuron("lif(tua=2)")


def test_kaiming_reaches_every_convolution():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Sequential(nn.Conv2d(64, 128, 1)))
    kaiming(model)
    assert model[0].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert model[1][0].weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)


@pytest.mark.parametrize("of", ["norm", "neuron"])
def test_a_hook_on_the_gradient_of_a_part_is_called(of):
    layer, seen = spiking_conv(2, 3), []
    getattr(layer, of).register_full_backward_hook(lambda *_args: seen.append(of))
    layer(torch.rand(4, 2, 2, 5, 5).requires_grad_()).sum().backward()
    assert seen == [of]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("pool", [MaxPool2d(2), AvgPool2d(2)])
def test_what_a_pool_returns_may_be_changed_in_place(pool, last):
    x = torch.rand(3, 2, 4, 6, 7)
    x = (x.movedim(2, -1).contiguous().movedim(-1, 2) if last else x).requires_grad_()
    pool(x).mul_(3).add_(1).sum().backward()
    grad, x.grad = x.grad, None
    (type(pool).__bases__[0].forward(pool, x.flatten(0, 1)) * 3).sum().backward()
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize("layer", [Conv2d(16, 16, 3, padding=1), MaxPool2d(2), AvgPool2d(2)])
def test_functional_transforms_see_torch_s_own_operators(layer):
    x = (torch.rand(3, 2, 2, 16, 6, 6) < 0.1).float()
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(each) for each in x]))
    grad = torch.func.grad(lambda x: layer(x).square().sum())(x[0])
    assert grad.shape == x[0].shape and grad.abs().max() > 0


class Silent(LIF):
    """A neuron of one's own."""

    def forward(self, x, steps=None):
        return super().forward(x, steps) * 0


def test_a_neuron_of_ones_own_is_called():
    layer, x = spiking_conv(2, 3, neuron=Silent), torch.rand(4, 2, 2, 5, 5) * 9
    assert layer(x).abs().max() == 0
    layer.neuron = LIF()
    assert layer(x).max() == 1


def test_choices_and_shapes():
    assert choose("pool", "avg", {"avg": 3}) == 3
    with pytest.raises(SpecError, match="pool='agv' is unknown; did you mean 'avg'"):
        choose("pool", "agv", {"avg": 3, "max": 4})
    assert sequence(torch.zeros(2, 1, 4, 4)).shape == (1, 2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        sequence(torch.zeros(3, 4))
