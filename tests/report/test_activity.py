"""Rates and operations, counted in loops."""

import pytest
import torch
from torch import nn

from spikedistill.core.taps import infer
from spikedistill.models.small import small
from spikedistill.report.activity import activity


def operations_in_loops(conv: nn.Conv2d, x: torch.Tensor) -> float:
    """Every input of value k goes to as many outputs as the kernel reaches from it, k times. x: [N, C, H, W]."""
    kh, kw = conv.kernel_size
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    height, width = x.shape[-2:]
    out_h = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    out_w = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    total = 0.0
    for i in range(out_h):
        for j in range(out_w):
            for a in range(kh):
                for b in range(kw):
                    h, w = i * sh - ph + a * dh, j * sw - pw + b * dw
                    if 0 <= h < height and 0 <= w < width:
                        total += x[:, :, h, w].sum().item()
    return total * conv.out_channels / conv.groups


@pytest.mark.parametrize("how", [dict(stride=2, padding=1), dict(padding=2, dilation=2), dict(groups=2, bias=False)])
def test_a_convolution_counts_what_it_adds(how):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (3, 2), **how)
    model = nn.Sequential(conv, nn.Flatten(1), nn.LazyLinear(3))
    x = (torch.rand(5, 4, 7, 6) < 0.3).float() * torch.randint(1, 3, (5, 4, 7, 6))
    model(x)
    counted = activity(model, [{"x": x}])
    linear = model[2]
    inner = conv(x)
    assert counted["operations"]["ac"] == pytest.approx(operations_in_loops(conv, x) / 5)
    nonzero = (inner != 0).sum().item() * 3
    assert counted["operations"]["mac"] == pytest.approx(nonzero / 5)
    dense = inner.numel() * 4 // conv.groups * 6 + 5 * linear.in_features * 3
    assert counted["operations"]["dense"] == pytest.approx(dense / 5) and counted["rate"] is None


def test_rates_by_layer_and_over_all():
    torch.manual_seed(0)
    model, x = small(classes=3, widths=(4, 6), steps=5), torch.rand(7, 1, 8, 8)
    spikes = infer(model, x, taps=["stem.neuron", "stage2.1.neuron"]).taps
    counted = activity(model, [{"x": x[:4]}, {"x": x[4:]}])
    assert counted["samples"] == 7
    for name, s in spikes.items():
        layer = counted["layers"][name]
        assert layer["rate"] == pytest.approx(s.mean().item()) and layer["neurons"] == s[0, 0].numel()
    total = sum(s.sum().item() for s in spikes.values()) / sum(s.numel() for s in spikes.values())
    assert counted["rate"] == pytest.approx(total)


def test_a_static_image_is_convolved_once_and_samples_are_limited():
    model, x = small(classes=3, widths=(4, 6), steps=5), torch.rand(7, 1, 8, 8)
    one, five = (activity(model, [{"x": x}], steps)["operations"] for steps in (1, 5))
    stem = 7 * 4 * (8 * 8 * 9 - 2 * (3 * 8 * 2) + 4) / 7
    assert one["mac"] <= five["mac"] and stem <= one["mac"] <= stem + 5 * 6 * 3
    assert activity(model, [{"x": x}] * 3, samples=10)["samples"] == 10
