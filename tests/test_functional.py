"""What several methods share that no method's own test covers: the pairing of taps and of map sizes."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill.core.taps import TapError
from spikedistill.functional import classes_of, matched, paired
from spikedistill.models import build
from spikedistill.spec import SpecError
from tests.methods.toy import toy_student, toy_teacher

bkd, ckd, distilling_spikes, energy_efficient_kd, lasnn, tet = (
    import_module(f"spikedistill.methods.{name}")  # the names of the package are those of the functions
    for name in ("bkd", "ckd", "distilling_spikes", "energy_efficient_kd", "lasnn", "tet")
)


def model(**dims: int) -> Any:
    module: Any = nn.Module()
    module.dims = dims
    return module


def test_pairs_by_name_then_by_order():
    student = model(stage1=2, stage2=3, neuron=3)
    assert paired(student, model(stage1=4, stage2=5), (), (), "m") == (["stage1", "stage2"],) * 2 + ([(2, 4), (3, 5)],)
    assert paired(model(a=1, b=2), model(x=3, y=4), (), (), "m") == (["a", "b"], ["x", "y"], [(1, 3), (2, 4)])
    assert paired(student, model(x=7, y=8), ["neuron"], ["x"], "m") == (["neuron"], ["x"], [(3, 7)])
    assert paired(student, model(x=7, y=8), [""], [""], "m") == (["neuron"], ["y"], [(3, 8)])


def test_taps_that_do_not_fit_are_told():
    with pytest.raises(TapError, match="m: the student has a, the teacher x, y: no name is shared"):
        paired(model(a=1), model(x=1, y=2), (), (), "m")
    with pytest.raises(TapError, match=r"student \(Module\) publishes no taps"):
        paired(model(), model(), (), (), "m")
    for taps, teacher_taps in ((["a"], []), ([], ["x"]), (["a"], ["x", "y"])):
        with pytest.raises(SpecError, match=f"m: {len(taps)} taps and {len(teacher_taps)} teacher_taps"):
            paired(model(a=1), model(x=1, y=2), taps, teacher_taps, "m")
    with pytest.raises(TapError, match=r"teacher \(Module\) publishes no tap 'xx': did you mean 'x1'"):
        paired(model(a=1), model(x1=1), ["a"], ["xx"], "m")


def test_matched_keeps_refuses_or_interpolates():
    x, large, small = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 8, 8), torch.rand(2, 5, 2, 2)
    same = torch.rand(2, 5, 4, 4)
    assert matched(same, x, True, "m") is same and matched(same, x, False, "m") is same
    for teacher in (large, small):
        assert matched(teacher, x, True, "m").shape == (2, 5, 4, 4)
        with pytest.raises(ValueError, match=r"m: student feature \[2, 3, 4, 4\] and teacher feature \[2, 5"):
            matched(teacher, x, False, "m")
    torch.testing.assert_close(matched(torch.full((1, 1, 2, 2), 3.0), x, True, "m"), torch.full((1, 1, 4, 4), 3.0))
    with pytest.raises(ValueError, match="do not fit"):
        matched(torch.rand(2, 5, 6), torch.rand(2, 3, 4), True, "m")


@pytest.mark.parametrize(
    ("text", "classes"),
    [("plif_net(vote=10, width=2, hidden=8)", 3), ("vggsnn(vote=4, size=8, widths=((3,), (4,)))", 5), ("small", 7)],
)
def test_the_classes_of_a_network_that_votes(text, classes):
    model = build(text, classes=classes, channels=2)
    assert classes_of(model, None, "me") == classes and classes_of(model, 9, "me") == 9


def test_losses_of_bfloat16_are_those_of_its_values_in_float32():
    z, v = (torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    y = torch.tensor([0, 1, 2, 3])
    losses = (
        lambda z, v: bkd.wsld_loss(z[0], v[0], y, 3.0),
        lambda z, v: energy_efficient_kd.two_temperature_loss(z[0], v[0], 2.0, 8.0),
        lambda z, v: ckd.guidance_loss(z, v[0]),
        lambda z, v: ckd.guidance_loss(z, v[0], divergence="mse"),
        lambda z, v: tet.tet_loss(z, y),
        lambda z, v: tet.spread(z, 1.0),
    )
    for loss in losses:
        value = loss(z, v)
        assert value.dtype == torch.float32 and torch.equal(value, loss(z.float(), v.float()))


@pytest.mark.parametrize(
    "method, how, setting",
    [
        (lasnn, dict(variant="mse", power=3), "lasnn.power: it does nothing with variant='mse'"),
        (energy_efficient_kd, dict(squared=True), "energy_efficient_kd.squared: it does nothing with spikes=0"),
        (distilling_spikes, dict(window=2), "distilling_spikes.window: it does nothing with signal='potential'"),
        (distilling_spikes, dict(stride=2), "distilling_spikes.stride: it does"),
        (distilling_spikes, dict(reduction="sum"), "distilling_spikes.reduction: it does"),
        (distilling_spikes, dict(scale=2.0), "distilling_spikes.scale: it does"),
        (ckd, dict(phases="constant", on=0.2), "ckd.on: it does nothing with phases='constant'"),
        (ckd, dict(phases="constant", middle=0.2), "ckd.middle: it does"),
        (ckd, dict(phases="step", steepness=9.0), "ckd.steepness: it does nothing with phases='step'"),
    ],
)
def test_settings_that_do_nothing_are_refused(method, how, setting):
    how = how | ({"signal": "potential"} if method is distilling_spikes else {})
    with pytest.raises(SpecError) as error:
        getattr(method, method.__name__.split(".")[-1])(toy_student(), toy_teacher(), **how)
    assert len(error.value.mistakes) == 1 and error.value.mistakes[0].startswith(setting)
