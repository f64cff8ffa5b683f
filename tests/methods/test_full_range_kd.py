"""full_range_kd: golden values, the formula in loops, and the bounds that the paper is about."""

from math import exp, log

import pytest
import torch

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.functional import kd_loss, kd_per_step
from spikedistill.methods.full_range_kd import TWSD, ensemble_of_right, full_range_kd, twsd_loss
from spikedistill.objectives import CE, KDPerStep, PerStep
from tests.methods.toy import toy_student, toy_teacher

D = torch.float64
GOLD = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D)
TEACHER, LABEL = torch.tensor([[[3.0, 1, -2]]], dtype=D), torch.tensor([0])
MODES = [("paper", "uniform"), ("official_code", "uniform"), ("official_code", "skip")]
modes = pytest.mark.parametrize(("preset", "fallback"), MODES)


def softmax(z):
    total = sum(exp(v) for v in z)
    return [exp(v) / total for v in z]


def kl_in_loops(target, z, tau):
    p, q = softmax([v / tau for v in target]), softmax([v / tau for v in z])
    return tau**2 * sum(a * (log(a) - log(b)) for a, b in zip(p, q))


def twsd_in_loops(z, y, tau, preset, fallback):
    steps, batch, classes = z.shape
    total, kept = 0.0, 0
    for b in range(batch):
        used = range(steps)
        if preset == "official_code":
            used = [t for t in used if max(range(classes), key=z[t, b].tolist().__getitem__) == y[b]]
        if not used and fallback == "skip":
            continue
        target = [sum(z[t, b, c].item() for t in used) / max(len(used), 1) for c in range(classes)]
        total += sum(kl_in_loops(target, z[t, b].tolist(), tau) for t in range(steps)) / steps
        kept += 1
    return total / max(kept, 1)


def step_of(z, teacher=TEACHER, y=LABEL):
    return Step({"y": y}, {"student": Output(z), "teacher": Output(teacher)})


def total_of(step, **settings):
    plan = full_range_kd(toy_student(), toy_teacher(), **settings)
    total = torch.zeros((), dtype=D)
    for weight, objective in plan.loss.values():
        assert not callable(weight)
        total = total + weight * objective(step)
    return total


def case(steps=4, batch=5, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(steps, batch, classes, dtype=D, generator=g)
    z[:, 0] = -z[:, 0].abs()
    z[:, 0, 1] = 1.0  # the first sample is never right, the second always
    z[:, 1, 2] = 9.0
    y = torch.tensor([0, 2, 1, 0, 1])[:batch]
    return z.requires_grad_(), torch.randn(batch, classes, dtype=D, generator=g), y


def test_golden_values():
    assert PerStep(CE())(step_of(GOLD)).item() == pytest.approx(0.860645, abs=1e-6)
    for tau, twkl, mean, right in ((3.0, 1.034992, 0.269153, 0.549321), (1.0, 0.529402, 0.256515, 0.456491)):
        assert KDPerStep(tau)(step_of(GOLD)).item() == pytest.approx(twkl, abs=1e-6)
        assert twsd_loss(GOLD, LABEL, tau).item() == pytest.approx(mean, abs=1e-6)
        assert twsd_loss(GOLD, LABEL, tau, "official_code").item() == pytest.approx(right, abs=1e-6)
    assert total_of(step_of(GOLD)).item() == pytest.approx(1.202220, abs=1e-6)
    assert total_of(step_of(GOLD), preset="official_code").item() == pytest.approx(1.342304, abs=1e-6)


def test_no_step_is_right():
    z = torch.tensor([[[0.0, 2, -1]], [[0, 1, 0]]], dtype=D, requires_grad=True)
    assert twsd_loss(z, LABEL, 3.0, "official_code").item() == pytest.approx(0.457493, abs=1e-6)
    skipped = twsd_loss(z, LABEL, 3.0, "official_code", "skip")
    (grad,) = torch.autograd.grad(skipped, z)
    assert skipped == 0 and grad.abs().max() < 1e-15


@modes
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_self_term_in_loops(preset, fallback, tau):
    z, _, y = case()
    value = twsd_loss(z, y, tau, preset, fallback).item()
    assert value == pytest.approx(twsd_in_loops(z.detach(), y, tau, preset, fallback), rel=1e-9)


def test_teacher_term_in_loops_with_a_teacher_that_has_time():
    z, _, _ = case()
    teacher = torch.randn(3, 5, 3, dtype=D)
    mean = [[sum(teacher[t, b, c].item() for t in range(3)) / 3 for c in range(3)] for b in range(5)]
    expected = sum(kl_in_loops(mean[b], z[t, b].tolist(), 2.5) for t in range(4) for b in range(5)) / 20
    assert KDPerStep(2.5)(step_of(z, teacher)).item() == pytest.approx(expected, rel=1e-9)


def test_the_whole_with_other_weights():
    z, v, y = case()
    expected = sum(-log(softmax(z[t, b].tolist())[y[b]]) for t in range(4) for b in range(5)) / 20
    expected += 0.7 * sum(kl_in_loops(v[b].tolist(), z[t, b].tolist(), 2.0) for t in range(4) for b in range(5)) / 20
    expected += 0.3 * twsd_in_loops(z.detach(), y, 2.0, "official_code", "skip")
    settings = dict(alpha=0.7, beta=0.3, tau=2.0, preset="official_code", fallback="skip")
    assert total_of(step_of(z, v[None], y), **settings).item() == pytest.approx(expected, rel=1e-9)


def test_target_of_right_steps():
    z, _, y = case()
    target, some = ensemble_of_right(z, y)
    assert some[:2].tolist() == [False, True]
    assert target[0].abs().max() == 0
    torch.testing.assert_close(target[1], z[:, 1].mean(0))
    one_hot = torch.nn.functional.one_hot(y, 3).to(D)
    torch.testing.assert_close(ensemble_of_right(z, 0.6 * one_hot + 0.1)[0], target)


@modes
def test_nothing_flows_through_the_self_target(preset, fallback):
    z, _, y = case()
    (grad,) = torch.autograd.grad(twsd_loss(z, y, 2.5, preset, fallback), z)
    e = z.mean(0) if preset == "paper" else ensemble_of_right(z, y)[0]
    expected = 2.5 * (torch.softmax(z / 2.5, -1) - torch.softmax(e / 2.5, -1)) / 4
    if fallback == "skip":
        some = ensemble_of_right(z, y)[1]
        expected = expected * some[:, None] / some.sum()
    else:
        expected = expected / 5
    torch.testing.assert_close(grad, expected.detach())


def test_nothing_flows_to_the_teacher():
    z, v, y = case()
    v = v[None].requires_grad_()
    grad, none = torch.autograd.grad(KDPerStep(2.5)(step_of(z, v, y)), [z, v], allow_unused=True)
    assert none is None
    expected = 2.5 * (torch.softmax(z / 2.5, -1) - torch.softmax(v / 2.5, -1)) / 20
    torch.testing.assert_close(grad, expected.detach())


def test_every_step_bounds_the_mean():
    z, v, y = case()
    step = step_of(z, v[None], y)
    assert PerStep(CE())(step) > CE()(step)
    assert KDPerStep(2.0)(step) > kd_loss(z.mean(0), v, 2.0)
    for same in (z[:1], z[:1].expand(4, -1, -1)):
        step = step_of(same, v[None], y)
        torch.testing.assert_close(PerStep(CE())(step), CE()(step))
        torch.testing.assert_close(KDPerStep(2.0)(step), kd_loss(same[0], v, 2.0))


def test_all_steps_bound_the_first_ones():
    z, v, y = case()
    whole = PerStep(CE())(step_of(z, v[None], y)) + 0.2 * KDPerStep(2.0)(step_of(z, v[None], y))
    for cut in (1, 2, 3):
        first = CE()(step_of(z[:cut], v[None], y)) + 0.2 * kd_loss(z[:cut].mean(0), v, 2.0)
        assert first <= 4 / cut * whole


@modes
def test_the_order_of_steps_is_of_no_account(preset, fallback):
    z, v, y = case()
    settings = dict(alpha=0.7, beta=0.3, tau=2.0, preset=preset, fallback=fallback)
    forth, back = total_of(step_of(z, v[None], y), **settings), total_of(step_of(z.flip(0), v[None], y), **settings)
    torch.testing.assert_close(forth, back)


def test_the_self_term_vanishes_where_all_steps_agree():
    z, _, y = case()
    shift = torch.randn(4, 5, 1, dtype=D)
    assert twsd_loss(z[:1] + shift, y, 2.0) < 1e-12
    assert twsd_loss(z, y, 2.0) > 1e-3
    assert twsd_loss(z[:1], y, 2.0) == 0


def test_a_teacher_of_every_step():
    z, _, _ = case()
    teacher = torch.randn(4, 5, 3, dtype=D)
    expected = sum(kd_loss(z[t], teacher[t], 2.0) for t in range(4)) / 4
    torch.testing.assert_close(kd_per_step(z, teacher, 2.0), expected)


def test_builder():
    student, teacher = toy_student(), toy_teacher()
    plan = full_range_kd(student, teacher)
    assert {k: w for k, (w, _) in plan.loss.items()} == {"ce_per_step": 1.0, "twkl": 0.2, "twsd": 0.5}
    twkl, twsd = plan.loss["twkl"][1], plan.loss["twsd"][1]
    assert isinstance(twkl, KDPerStep) and isinstance(twsd, TWSD)
    assert (twkl.tau, twsd.tau, twsd.preset, twsd.fallback) == (3.0, 3.0, "paper", "uniform")
    assert set(full_range_kd(student, teacher, alpha=0, beta=0).loss) == {"ce_per_step"}
    assert plan.passes["student"].grad and not plan.passes["teacher"].grad
