"""What several methods share that no method's own test covers: the pairing of taps and of map sizes."""

from typing import Any

import pytest
import torch
from torch import nn

from spikedistill.core.taps import TapError
from spikedistill.functional import classes_of, matched, paired
from spikedistill.models import build
from spikedistill.spec import SpecError


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
