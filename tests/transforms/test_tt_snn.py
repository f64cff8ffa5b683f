"""TT-SNN: the layers by hand and in loops, the merge, and the rank by its properties."""

import copy
from math import ceil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikedistill import models
from spikedistill.core.taps import infer
from spikedistill.models.layers import Conv2d
from spikedistill.spec import SpecError
from spikedistill.transforms.tt_snn import HalfConv2d, TTConv2d, full_steps, merge, ranks, tt_snn
from spikedistill.transforms.vbmf import estimated_rank, evb_rank
from tests.methods.toy import toy_batch, toy_student
from tests.transforms.awake import awake

D = torch.float64
MODES = ("sequential", "parallel", "half")
modes = pytest.mark.parametrize("mode", MODES)


def layer(mode, rank=3, stride=1, downsample: Any = "maxpool", schedule=(), bias=False, channels=(4, 5)) -> Any:
    torch.manual_seed(0)
    conv = Conv2d(channels[0], channels[1], 3, stride, 1, bias=bias, dtype=D)
    return TTConv2d(conv, rank, mode, downsample, schedule)


def spikes(steps, height, width, channels=4):
    return (torch.rand(steps, 2, channels, height, width, dtype=D) < 0.4).to(D)


@modes
@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize("stride, downsample", [(1, "maxpool"), (2, "maxpool"), (2, "stride")])
@pytest.mark.parametrize("bias", [False, True])
def test_merged_layer_is_the_layer_and_has_the_size_of_the_dense_one(mode, size, stride, downsample, bias):
    tt, x = layer(mode, 3, stride, downsample, bias=bias), spikes(5, *size)
    merged = tt.merged()
    dense = Conv2d(4, 5, 3, stride, 1, dtype=D)(x)
    assert tt(x).shape == merged(x).shape == dense.shape
    torch.testing.assert_close(merged(x), tt(x), atol=1e-12, rtol=0)
    pooled = stride == 2 and downsample == "maxpool"
    assert isinstance(merged, nn.Sequential) == pooled and tt(x).abs().max() > 0.1
    assert ((merged[0] if pooled else merged).bias is not None) == bias


@modes
def test_layer_is_the_four_convolutions(mode):
    tt, x = layer(mode), spikes(3, 6, 5)
    for t in range(3):
        a = F.conv2d(x[t], tt.w1.weight)
        tall, flat = F.conv2d(a, tt.w2.weight, padding=(1, 0)), F.conv2d(a, tt.w3.weight, padding=(0, 1))
        row = F.conv2d(tall, tt.w3.weight, padding=(0, 1))
        middle = {"sequential": row, "parallel": (tall + flat) / 2, "half": (tall + flat) / 2 if t < 2 else a}[mode]
        torch.testing.assert_close(tt(x)[t], F.conv2d(middle, tt.w4.weight))


def test_kernels_in_loops():
    seq, par = layer("sequential", 2), layer("parallel", 2)
    for tt in (seq, par):
        (w1, w2, w3, w4), r = (c.weight for c in (tt.w1, tt.w2, tt.w3, tt.w4)), range(2)
        full, late = tt.kernels()
        for o in range(5):
            for i in range(4):
                assert late[o, i, 0, 0].item() == pytest.approx(sum((w4[o, d] * w1[d, i]).item() for d in r))
                for u in range(3):
                    for v in range(3):
                        expected = 0.0
                        for d in r:
                            for e in r:
                                if tt is seq:
                                    mid = sum((w3[d, c, 0, v] * w2[c, e, u, 0]).item() for c in r)
                                else:
                                    mid = (w2[d, e, u, 0] / 2).item() * (v == 1) + (w3[d, e, 0, v] / 2).item() * (
                                        u == 1
                                    )
                                expected += (w4[o, d] * w1[e, i]).item() * mid
                        assert full[o, i, u, v].item() == pytest.approx(expected)


def test_corners_are_zero_in_parallel_alone():
    corners = (slice(None), slice(None), [0, 0, 2, 2], [0, 2, 0, 2])
    assert layer("parallel").kernels()[0][corners].abs().max() == 0
    assert layer("sequential").kernels()[0][corners].abs().min() > 0


@modes
def test_rank_and_number_of_parameters(mode):
    tt = layer(mode, 2, channels=(6, 7))
    assert sum(p.numel() for p in tt.parameters()) == 2 * (6 + 7) + 6 * 2**2
    assert torch.linalg.matrix_rank(tt.kernels()[0].flatten(1)) <= 2


def test_sequential_holds_every_separable_kernel():
    tt = layer("sequential", 4, channels=(4, 4))
    column, row = torch.rand(3, dtype=D), torch.rand(3, dtype=D)
    with torch.no_grad():
        tt.w1.weight.copy_(torch.eye(4, dtype=D)[..., None, None])
        tt.w4.weight.copy_(torch.eye(4, dtype=D)[..., None, None])
        tt.w2.weight.copy_(torch.eye(4, dtype=D)[..., None, None] * column[:, None])
        tt.w3.weight.copy_(torch.eye(4, dtype=D)[..., None, None] * row)
    expected = torch.einsum("oi,u,v->oiuv", torch.eye(4, dtype=D), column, row)
    torch.testing.assert_close(tt.kernels()[0], expected)


def test_half_is_parallel_early_and_1x1_late():
    half, par = layer("half"), layer("parallel")
    par.load_state_dict(half.state_dict())
    for steps in (1, 2, 3, 4, 5):
        x, early = spikes(steps, 6, 6), ceil(steps / 2)
        torch.testing.assert_close(half(x)[:early], par(x)[:early])
        late = F.conv2d(x.flatten(0, 1), half.kernels()[1]).unflatten(0, (steps, 2))
        torch.testing.assert_close(half(x)[early:], late[early:])


@pytest.mark.parametrize("downsample", ["maxpool", "stride"])
def test_schedules_of_half(downsample):
    x, par = spikes(4, 6, 6), layer("parallel", 3, 2, downsample)
    assert torch.equal(layer("half", 3, 2, downsample, (True,) * 4)(x), par(x))
    mixed, never = (layer("half", 3, 2, downsample, s) for s in ((False, True, False, True), (False,) * 4))
    torch.testing.assert_close(mixed(x)[1::2], par(x)[1::2])
    torch.testing.assert_close(mixed(x)[::2], never(x)[::2])
    torch.testing.assert_close(mixed.merged()(x), mixed(x))
    torch.testing.assert_close(mixed(x[:1]), never(x[:1].expand(4, -1, -1, -1, -1))[:1])
    with pytest.raises(ValueError, match="schedule has 4 steps, the input 3"):
        mixed(x[:3])
    assert full_steps(5) == [True, True, True, False, False] and full_steps(1, (False, True)) == [False]


def test_gradients_reach_all_cores_and_late_steps_leave_the_middle_alone():
    x = spikes(4, 6, 6)
    for mode in MODES:
        tt = layer(mode)
        tt(x).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in tt.parameters())
    tt = layer("half")
    tt(x)[2:].square().sum().backward()
    middle = [tt.w2.weight.grad, tt.w3.weight.grad]
    assert all(g is None or g.abs().max() == 0 for g in middle) and tt.w1.weight.grad.abs().max() > 0


@modes
@pytest.mark.parametrize("name", ["small(depth=2)", "sew_resnet18(width=4)", "ms_resnet18(width=4)", "vggsnn(size=16)"])
def test_merged_network_is_the_network(mode, name):
    torch.manual_seed(0)
    widths = "widths=((4, 8), (8, 8))" if "vgg" in name else ""
    model: Any = models.build(name.replace("size=16", f"size=16, {widths}"), channels=3, steps=4)
    x = torch.rand(2, 3, 16, 16)
    shapes = {k: v.shape for k, v in infer(model, x, taps=[*model.dims]).taps.items()}
    awake(tt_snn(model, rank=3, mode=mode), x)
    before = infer(model, x, taps=[*model.dims])
    assert {k: v.shape for k, v in before.taps.items()} == shapes
    merge(model)
    torch.testing.assert_close(infer(model, x).logits, before.logits, atol=1e-5, rtol=0)
    assert before.taps[next(iter(model.dims))].abs().max() > 0 and not model.training
    assert any(isinstance(m, HalfConv2d) for m in model.modules()) == (mode == "half")


def rewritten(model, **how) -> Any:
    return tt_snn(model, **how)


def test_default_choice_leaves_the_first_and_small_kernels():
    model = tt_snn(models.build("sew_resnet18(width=4)"), rank=2)
    rewritten = {n for n, m in model.named_modules() if isinstance(m, TTConv2d)}
    assert len(rewritten) == 16 and not any("stem" in n or "shortcut" in n for n in rewritten)
    assert {n.split(".")[0] for n in rewritten} == {"stage1", "stage2", "stage3", "stage4"}


def test_static_image_is_the_same_as_its_frames():
    torch.manual_seed(0)
    x = torch.rand(2, 2, 8, 8)
    for mode in MODES:
        model = awake(tt_snn(toy_student(4), rank=2, mode=mode), x)
        frames = x.expand(4, -1, -1, -1, -1)
        torch.testing.assert_close(infer(model, x, 4).logits, infer(model, frames).logits)
        assert infer(model, x, 1).logits.shape[0] == 1


def test_where_by_pattern_names_and_function():
    kinds = ("stage2*", ["stage2.1.conv"], lambda name, module: module.out_channels == 6, ("nothing", "stage2.?.conv"))
    for where in kinds:
        model = tt_snn(toy_student(), rank=2, where=where)
        assert [n for n, m in model.named_modules() if isinstance(m, TTConv2d)] == ["stage2.1.conv"]
    everything = rewritten(toy_student(), rank=2, where="*")
    assert isinstance(everything.stem.conv, TTConv2d) and isinstance(everything.stage2[1].conv, TTConv2d)


def test_a_rewrite_that_would_change_nothing_is_an_error():
    with pytest.raises(SpecError, match=r"where='stage9\*' names no 3x3 convolution.*stem.conv, stage2.1.conv"):
        tt_snn(toy_student(), where="stage9*")
    with pytest.raises(SpecError, match="no 3x3 convolution but the first in Sequential; it has none"):
        tt_snn(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(SpecError, match="nothing to fold"):
        merge(toy_student())
    with pytest.raises(SpecError, match="2 ranks for 1 layers"):
        tt_snn(toy_student(), rank=[2, 3])
    with pytest.raises(SpecError, match="svd is for mode='sequential', not 'half'"):
        tt_snn(toy_student(), init="svd", mode="half")


@pytest.mark.parametrize("rank, expected", [(3, 3), (99, 5), (0.4, 2), (0.01, 1), (1.0, 5), ([4], 4)])
def test_rank_as_number_share_or_list(rank, expected):
    assert rewritten(toy_student(), rank=rank).stage2[1].conv.w2.out_channels == expected


def test_svd_start_is_exact_at_full_rank_and_nearer_with_more_rank():
    torch.manual_seed(0)
    kernel, errors = Conv2d(6, 6, 3, 1, 1, dtype=D).weight.detach(), []
    u, v = torch.rand(3, dtype=D), torch.rand(3, dtype=D)
    separable = torch.einsum("oi,u,v->oiuv", torch.rand(6, 2, dtype=D) @ torch.rand(2, 6, dtype=D), u, v)
    for r in (2, 4, 6):
        model: Any = nn.Sequential(Conv2d(6, 6, 3, 1, 1, bias=False, dtype=D))
        for target in (kernel, separable):
            with torch.no_grad():
                model[0].weight.copy_(target)
            tt = rewritten(copy.deepcopy(model), rank=r, mode="sequential", where="*", init="svd")[0]
            errors.append((tt.kernels()[0] - target).norm().item())
    assert errors[0] > errors[2] > errors[4] and max(errors[1::2]) < 1e-12


def test_evb_rank():
    g = torch.Generator().manual_seed(0)
    for rank, shape in ((12, (64, 576)), (30, (128, 1152))):
        low = torch.randn(shape[0], rank, generator=g) @ torch.randn(rank, shape[1], generator=g)
        noisy = low + 0.1 * torch.randn(shape, generator=g)
        assert evb_rank(noisy) == evb_rank(noisy.T) == evb_rank(1e-3 * noisy) == rank
    assert evb_rank(torch.randn(64, 576, generator=g)) == 0
    assert evb_rank(torch.zeros(4, 9)) == 0


def test_estimated_ranks_are_clamped_and_noise_alone_is_refused():
    g = torch.Generator().manual_seed(0)
    shapes = ((100, 120), (64, 64), (5, 6), (64, 64))
    convs = [Conv2d(i, o, 3, 1, 1) for o, i in shapes]
    for conv in convs:
        conv.weight = nn.Parameter(torch.randn(conv.weight.shape, generator=g))
    assert [estimated_rank(conv.weight) for conv in convs[:2]] == [0, 0]
    with pytest.raises(SpecError, match="vbmf finds noise alone, the weights are not trained: give a number"):
        tt_snn(nn.Sequential(*convs[:2]))
    low = torch.einsum("or,rn->on", torch.randn(64, 20, generator=g), torch.randn(20, 64 * 9, generator=g))
    noise = 0.1 * torch.randn(64, 64, 3, 3, generator=g)
    assert estimated_rank(low.view(64, 64, 3, 3) + noise) == 20
    convs[3].weight = nn.Parameter(low.view(64, 64, 3, 3) + noise)
    assert ranks(convs, "vbmf") == [10, 8, 5, 20]


def test_a_convolution_of_two_names_is_rewritten_and_merged_under_both():
    conv = Conv2d(4, 4, 3, 1, 1)
    model = rewritten(nn.Sequential(Conv2d(4, 4, 3, 1, 1), conv, nn.Sequential(conv)), rank=2)
    assert model[1] is model[2][0] and isinstance(model[1], TTConv2d)
    x = spikes(2, 6, 6).float()
    before = model(x)
    merge(model)
    torch.testing.assert_close(model(x), before)
    assert not [m for m in model.modules() if isinstance(m, TTConv2d)]
    twice = merge(nn.Sequential(layer("parallel"), nn.Sequential(*[layer("parallel", channels=(5, 5))] * 2)))
    assert not [m for m in twice.modules() if isinstance(m, TTConv2d)]


def test_mode_and_device_of_the_model_are_kept():
    model = rewritten(toy_student().double().eval(), rank=2)
    assert not model.stage2[1].conv.training and model.stage2[1].conv.w2.weight.dtype == D
    merge(model.train())
    assert model.stage2[1].conv.training and model.stage2[1].conv.weight.dtype == D
    assert infer(model, toy_batch()["x"].double()).logits.dtype == D
