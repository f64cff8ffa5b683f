"""SAKD: the weights copied, the features in loops, the schedules update by update."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.core.taps import call, infer
from spikedistill.functional import mean_square
from spikedistill.methods import sakd
from spikedistill.methods.sakd import Stages, burst, early_then, start_from
from spikedistill.models.small import small
from spikedistill.spec import SpecError
from tests.methods.toy import toy_batch, toy_student, toy_teacher

D = torch.float64


def twin(seed=5, neuron="relu"):
    """A network of the toy student's architecture."""
    torch.manual_seed(seed)
    model = small(classes=4, channels=2, widths=(5, 6), neuron=neuron)
    for name, x in model.named_buffers():
        if x.is_floating_point():
            nn.init.uniform_(x, 0.5, 1.5)
        else:
            x += 3
        assert "running" in name or "tracked" in name
    return model


def step_of(student, teacher):
    """Taps s0, s1, ... [T, B, C, H, W] of the student and t0, t1, ... of the teacher."""
    z = torch.zeros(len(student[0]), student[0].shape[1], 3, dtype=student[0].dtype)
    s, t = ({f"{k}{i}": x for i, x in enumerate(xs)} for k, xs in (("s", student), ("t", teacher)))
    return Step({}, {"student": Output(z, s), "teacher": Output(z[:1], t)})


def bare(count):
    """The term without its transforms, so that the numbers are those of the features."""
    names = [f"s{i}" for i in range(count)], [f"t{i}" for i in range(count)]
    objective = Stages(*names, [(1, 1)] * count)
    objective.transform = nn.ModuleList(nn.Identity() for _ in range(count))
    return objective


def test_features_in_loops_are_a_sum_over_stages_of_means():
    torch.manual_seed(0)
    s = [torch.rand(3, 2, 2, 4, 3, dtype=D), torch.rand(3, 2, 3, 2, 2, dtype=D)]
    t = [torch.randn(1, 2, 2, 4, 3, dtype=D), torch.randn(2, 2, 3, 2, 2, dtype=D)]
    expected = 0.0
    for x, y in zip(s, t):
        a = [sum(x[k].flatten().tolist()[i] for k in range(3)) / 3 for i in range(x[0].numel())]
        b = [sum(y[k].flatten().tolist()[i] for k in range(len(y))) / len(y) for i in range(y[0].numel())]
        expected += sum((p - q) ** 2 for p, q in zip(a, b)) / len(a)
    assert bare(2)(step_of(s, t)).item() == pytest.approx(expected, rel=1e-9)


def test_a_mean_over_elements_and_a_sum_over_stages():
    s, t = torch.rand(2, 2, 3, 2, 2), torch.rand(1, 2, 3, 2, 2)
    value = bare(1)(step_of([s], [t]))
    large = [x.repeat_interleave(3, -1).repeat_interleave(3, -2) for x in (s, t)]
    torch.testing.assert_close(bare(1)(step_of(*([x] for x in large))), value)
    torch.testing.assert_close(bare(1)(step_of([torch.cat([s, s], 1)], [torch.cat([t, t], 1)])), value)
    torch.testing.assert_close(bare(2)(step_of([s, s], [t, t])), 2 * value)
    torch.testing.assert_close(bare(1)(step_of([s.flip(0)], [t])), value)
    assert bare(1)(step_of([t], [t])) == 0


def test_transforms_come_after_the_time_mean():
    torch.manual_seed(0)
    for kernel, size in ((3, 9), (1, 1)):
        objective = Stages(["s0"], ["t0"], [(2, 3)], kernel).to(D)
        phi: Any = objective.transform[0]
        assert [tuple(p.shape) for p in phi.parameters()] == [(3, 2, kernel, kernel), (3,), (3,)]
        assert phi[0].weight.numel() == 6 * size
        s, t = torch.rand(3, 2, 2, 4, 4, dtype=D), torch.rand(1, 2, 3, 4, 4, dtype=D)
        y = nn.functional.conv2d(s.mean(0), phi[0].weight, padding=kernel // 2)
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        assert objective(step_of([s], [t])).item() == pytest.approx(((y - t[0]) ** 2).mean().item(), rel=1e-6)


def test_no_gradient_to_the_teacher():
    s, t = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4, requires_grad=True)
    grad, none = torch.autograd.grad(mean_square(s, t), [s, t], allow_unused=True)
    assert none is None and grad.abs().max() > 0


@pytest.mark.parametrize("tau, value", [(1.0, 0.245891), (None, 0.273413)])
def test_golden_values_of_the_outputs(tau, value):
    zs, zt = torch.tensor([[[2.0, 0, -1]]], dtype=D), torch.tensor([[[1, 0.5, -0.5]]], dtype=D)
    term: Any = sakd(toy_student(), toy_teacher(), init="no", tau=tau).loss["kd"][1]
    step = Step({}, {"student": Output(zs), "teacher": Output(zt)})
    assert term(step).item() == pytest.approx(value, abs=1e-6)
    same = Step({}, {"student": Output(zt), "teacher": Output(zt)})
    assert abs(term(same).item()) < 1e-12


def test_level_1_copies_every_tensor_and_shares_none():
    student, teacher = toy_student(), twin()
    given = copy.deepcopy(teacher.state_dict())
    assert start_from(student, teacher) == [*given]
    assert all(torch.equal(student.state_dict()[name], x) for name, x in given.items())
    with torch.no_grad():
        for p in student.parameters():
            p += 1
    call(student.train(), toy_batch()["x"])
    assert all(torch.equal(teacher.state_dict()[name], x) for name, x in given.items())
    x = toy_batch()["x"]
    plan = sakd(toy_student(steps=1), teacher)
    torch.testing.assert_close(plan.passes["student"].model.state_dict(), given)
    assert infer(plan.passes["student"].model, x).logits.isfinite().all()


def test_level_1_leaves_what_only_the_student_has():
    student = twin(neuron="plif(tau=3.0)")
    leak = {k: v.clone() for k, v in student.state_dict().items() if k.endswith("neuron.w")}
    start_from(student, twin(seed=8))
    assert leak and all(torch.equal(student.state_dict()[k], v) for k, v in leak.items())


def test_level_1_refuses_another_architecture_or_copies_what_fits():
    student, teacher = toy_student(), toy_teacher()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(
        SpecError, match=r"stage2.1.conv.weight of the student is \[6, 5, 3, 3\], not \[7, 5, 3, 3\].*matching"
    ):
        sakd(student, teacher)
    torch.testing.assert_close(student.state_dict(), before)
    assert all(
        name.startswith("stem") or "tracked" in name or name == "head.bias"
        for name in start_from(student, teacher, "matching")
    )
    torch.testing.assert_close(student.stem.state_dict(), teacher.stem.state_dict())
    for init in ("same", "matching"):
        with pytest.raises(SpecError, match=r"weight of the student is missing; init='no' starts[^,]*$"):
            start_from(student, nn.Sequential(nn.Linear(2, 2)), init)


def test_matching_counters_and_biases_are_no_match():
    student, teacher = toy_student(), twin()
    for spiking in (teacher.stem, teacher.stage2[1]):
        spiking.conv = nn.Identity()
    teacher.head.weight = nn.Parameter(torch.zeros(4, 9))
    with pytest.raises(SpecError, match=r"head.weight of the student is \[4, 6\], not \[4, 9\]; init='no' [^,]*$"):
        start_from(student, teacher, "matching")


def test_early_weight_by_epochs():
    schedule = early_then(10 / 120)
    updates = 7
    values = [schedule((e * updates + u) / (120 * updates)) for e in range(120) for u in range(updates)]
    assert values == [10.0] * 10 * updates + [0.01] * 110 * updates


@pytest.mark.parametrize("epochs, updates", [(120, 2503), (7, 13), (90, 49)])
def test_burst_at_the_first_eleven_updates_of_every_epoch(epochs, updates):
    schedule = burst(epochs, updates)
    for e in range(epochs):
        values = [schedule((e * updates + u) / (epochs * updates)) for u in (*range(12), updates - 1)]
        assert values == [10.0] * 11 + [0.01] * 2


def weights_of(**settings: Any):
    plan: Any = sakd(toy_student(), toy_teacher(), init="no", **settings).loss
    read = lambda w: (w(0.001), w(0.5)) if callable(w) else w  # noqa: E731
    kernel = plan["sakd"][1].transform[0][0].kernel_size[0] if "sakd" in plan else None
    tau = plan["kd"][1].tau if "kd" in plan else None
    return [read(plan[k][0]) if k in plan else None for k in ("ce", "sakd", "kd")], tau, kernel


def test_presets_and_what_overrides_them():
    assert weights_of() == ([1.0, 100.0, 1.0], 4.0, 3)
    assert weights_of(preset="official_code") == ([1.0, 100.0, None], None, 3)
    assert weights_of(scale="imagenet") == ([1.0, (10.0, 0.01), 10.0], 1.0, 1)
    assert weights_of(scale="imagenet", early=0.6) == ([1.0, (10.0, 10.0), 10.0], 1.0, 1)
    code = {"scale": "imagenet", "preset": "official_code"}
    assert weights_of(**code, epochs=2, updates=30) == ([1.0, (10.0, 10.0), 10.0], 1.0, 1)
    assert weights_of(**code, epochs=3, updates=30) == ([1.0, (10.0, 0.01), 10.0], 1.0, 1)
    assert weights_of(**code, feature=3.0, logits=0.0, kernel=3) == ([1.0, 3.0, None], None, 3)
    assert weights_of(feature=0.0, logits=2.0, tau=2.5) == ([1.0, None, 2.0], 2.5, None)


def test_a_schedule_made_of_the_length_of_training_wants_to_know_it():
    code: dict[str, Any] = {"scale": "imagenet", "preset": "official_code", "init": "no"}
    for given in ({}, {"epochs": 7}, {"updates": 13}):
        with pytest.raises(SpecError, match=r"sakd\.epochs, sakd\.updates: .*epochs of your training"):
            sakd(toy_student(), toy_teacher(), **code, **given)
    weight = sakd(toy_student(), toy_teacher(), **code, epochs=7, updates=13).loss["sakd"][0]
    assert callable(weight)
    values = [weight((e * 13 + u) / (7 * 13)) for e in range(7) for u in range(13)]
    assert values == ([10.0] * 11 + [0.01] * 2) * 7


def test_the_cifar_script_starts_from_its_own_weights_and_the_rest_from_the_teachers():
    cases: Any = (({}, True), ({"preset": "official_code"}, False), ({"scale": "imagenet"}, True))
    for settings, copied in cases:
        student, teacher = toy_student(), twin()
        sakd(student, teacher, **settings)
        assert torch.equal(student.head.weight, teacher.head.weight) == copied


def test_maps_of_another_size_are_refused_and_the_student_stays_plain():
    step = step_of([torch.rand(2, 2, 3, 4, 4)], [torch.rand(1, 2, 3, 2, 2)])
    with pytest.raises(ValueError, match=r"sakd: .*\[2, 3, 4, 4\].*\[2, 3, 2, 2\]"):
        Stages(["s0"], ["t0"], [(3, 3)])(step)
    assert Stages(["s0"], ["t0"], [(3, 3)], resize=True)(step).isfinite()
    student = toy_student()
    keys = [*student.state_dict()]
    sakd(student, twin())
    assert [*student.state_dict()] == keys
