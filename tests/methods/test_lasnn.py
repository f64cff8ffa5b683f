"""LaSNN: golden values, the maps in loops, and what a normalised map must not see."""

from math import sqrt
from typing import Any

import pytest
import torch

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.methods import lasnn
from spikedistill.methods.lasnn import Attention, Stages, attention_loss, attention_map, squared_error
from tests.methods.toy import toy_student, toy_teacher

D = torch.float64


def step_of(student, teacher, y=None):
    """Taps s0, s1, ... [T, B, C, H, W] of the student and t0, t1, ... of the teacher."""
    z = torch.zeros(len(student[0]), student[0].shape[1], 3, dtype=student[0].dtype)
    s, t = ({f"{k}{i}": x for i, x in enumerate(xs)} for k, xs in (("s", student), ("t", teacher)))
    return Step({}, {"student": Output(z, s), "teacher": Output(z[:1], t)})


def map_in_loops(x, power):
    """[C, H, W] of one sample -> the normalised map as a list over H W."""
    c, h, w = x.shape
    q = [sum(abs(x[k, i, j].item()) ** power for k in range(c)) for i in range(h) for j in range(w)]
    length = max(sqrt(sum(v * v for v in q)), 1e-12)
    return [v / length for v in q]


def test_golden_values():
    teacher = torch.tensor([[[[1.0, 2]], [[0, 1]]]], dtype=D)
    student = torch.tensor([[[[1.0, 0]], [[1, 1]]]], dtype=D)
    assert attention_map(teacher)[0].tolist() == pytest.approx([0.196116, 0.980581], abs=1e-6)
    assert attention_map(student)[0].tolist() == pytest.approx([0.894427, 0.447214], abs=1e-6)
    assert attention_loss(student, teacher).item() == pytest.approx(0.386059, abs=1e-6)
    assert 2 * attention_loss(student, teacher).item() == pytest.approx(0.772119, abs=2e-6)


@pytest.mark.parametrize("power", [1, 3])
def test_attention_in_loops_is_a_sum_over_layers_of_means(power):
    torch.manual_seed(0)
    s = [torch.randn(4, 2, 3, 4, 2, dtype=D), torch.randn(4, 2, 5, 2, 3, dtype=D)]
    t = [torch.randn(1, 2, 2, 4, 2, dtype=D), torch.randn(2, 2, 1, 2, 3, dtype=D)]
    expected = 0.0
    for x, y in zip(s, t):
        for b in range(2):
            maps = [map_in_loops(sum(z[k, b] for k in range(len(z))) / len(z), power) for z in (x, y)]
            expected += sum((p - q) ** 2 for p, q in zip(*maps)) / len(maps[0]) / 2
    assert Attention(["s0", "s1"], ["t0", "t1"], power)(step_of(s, t)).item() == pytest.approx(expected, rel=1e-9)


def test_mse_in_loops_is_a_sum_over_a_sample():
    torch.manual_seed(0)
    objective: Any = Stages(["s0", "s1"], ["t0", "t1"], [(2, 3), (2, 2)]).to(D)
    s = [torch.rand(3, 2, 2, 3, 2, dtype=D), torch.rand(3, 2, 2, 2, 2, dtype=D)]
    t = [torch.randn(2, 2, 3, 3, 2, dtype=D), torch.randn(1, 2, 2, 2, 2, dtype=D)]
    w, bias = objective.adapt[0].weight[..., 0, 0], objective.adapt[0].bias
    expected = ((s[1].mean(0) - t[1][0]) ** 2).sum().item()
    for b in range(2):
        for c in range(3):
            for h in range(3):
                for i in range(2):
                    x = bias[c] + sum(w[c, k] * s[0][:, b, k, h, i].sum() / 3 for k in range(2))
                    expected += (x - t[0][:, b, c, h, i].sum() / 2).item() ** 2
    assert objective(step_of(s, t)).item() == pytest.approx(expected / 2, rel=1e-9)


def test_scale_channels_and_sum_over_time_change_nothing():
    s, t = torch.rand(3, 2, 4, 3, 3, dtype=D), torch.rand(1, 2, 6, 3, 3, dtype=D)
    value = Attention(["s0"], ["t0"])
    base = value(step_of([s], [t]))
    for student, teacher in ((5 * s, t), (s, 0.1 * t), (s[:, :, [2, 0, 3, 1]], t), (s.flip(0), t), (s.sum(0)[None], t)):
        torch.testing.assert_close(value(step_of([student], [teacher])), base)
    assert value(step_of([t.repeat(3, 1, 1, 1, 1) * -2], [t])) < 1e-12
    assert attention_loss(t[0], 3 * t[0][:, :3].repeat(1, 2, 1, 1)) > 1e-6


def test_symmetric_value_and_gradient_of_the_student_alone():
    s, t = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4, requires_grad=True)
    torch.testing.assert_close(attention_loss(s, t), attention_loss(t, s))
    for loss, a, b in ((attention_loss, s, t), (squared_error, s, torch.randn(2, 3, 4, 4, requires_grad=True))):
        grad, none = torch.autograd.grad(loss(a, b), [a, b], allow_unused=True)
        assert none is None and grad.abs().max() > 0


@pytest.mark.parametrize("power", [1, 2])
def test_a_silent_layer_gives_one_over_its_size_and_no_nan(power):
    s = torch.zeros(3, 2, 4, 3, 3, requires_grad=True)
    value = Attention(["s0"], ["t0"], power)(step_of([s], [torch.rand(1, 2, 4, 3, 3)]))
    assert value.item() == pytest.approx(1 / 9)
    (grad,) = torch.autograd.grad(value, s)
    assert grad.abs().max() == 0
    assert Attention(["s0"], ["t0"])(step_of([torch.rand(1, 2, 4, 3, 3)], [s])).item() == pytest.approx(1 / 9)


def test_one_silent_sample_does_not_disturb_another():
    s = torch.rand(2, 2, 4, 3, 3)
    s[:, 1] = 0
    s.requires_grad_()
    (grad,) = torch.autograd.grad(Attention(["s0"], ["t0"])(step_of([s], [torch.rand(1, 2, 4, 3, 3)])), s)
    assert grad.isfinite().all() and grad[:, 0].abs().max() > 0 and grad[:, 1].abs().max() == 0


def test_maps_of_another_size_are_refused_or_interpolated():
    step = step_of([torch.rand(2, 2, 3, 4, 4)], [torch.rand(1, 2, 3, 2, 2)])
    for objective in (Attention(["s0"], ["t0"]), Stages(["s0"], ["t0"], [(3, 3)])):
        with pytest.raises(ValueError, match=r"lasnn: .*\[2, 3, 4, 4\].*\[2, 3, 2, 2\]"):
            objective(step)
        objective.resize = True
        assert objective(step).isfinite()


def test_same_number_of_positions_in_another_shape_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Attention(["s0"], ["t0"])(step_of([torch.rand(2, 2, 3, 2, 4)], [torch.rand(1, 2, 3, 4, 2)]))


def test_defaults_and_what_is_left_out():
    student, teacher = toy_student(), toy_teacher()
    assert {k: w for k, (w, _) in lasnn(student, teacher).loss.items()} == {"ce": 1.0, "lasnn": 1000.0}
    plan: Any = lasnn(student, teacher, variant="mse", soft=0.3, tau=2.5).loss
    assert {k: w for k, (w, _) in plan.items()} == {"ce": 1.0, "lasnn": 7e-5, "kd": 0.3} and plan["kd"][1].tau == 2.5
    assert plan["lasnn"][1].taps == {"student": ["stage1", "stage2"], "teacher": ["stage1", "stage2"]}
    assert [p.shape[0] for p in plan["lasnn"][1].parameters()] == [7, 7]
    assert [*lasnn(student, teacher, weight=0.0).loss] == ["ce"]
    named: Any = lasnn(student, teacher, taps=["stage2"], teacher_taps=["stage1"], power=3, resize=True).loss["lasnn"][
        1
    ]
    assert named.taps == {"student": ["stage2"], "teacher": ["stage1"]} and (named.power, named.resize) == (3, True)
