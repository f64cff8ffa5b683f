"""seal_kd: golden values, ELA and STA in loops, and their gradients."""

from math import exp, log, sqrt

import pytest
import torch
import torch.nn.functional as F

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.functional import kd_loss, kd_per_step
from spikedistill.methods.seal_kd import ELA, STA, align, ela_loss, seal_kd, sta_loss, step_weights
from tests.methods.toy import toy_student, toy_teacher

D = torch.float64
GOLD = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D)
THREE = torch.cat([GOLD, torch.tensor([[[1.0, 0.5, 0]]], dtype=D)])
TEACHER, LABEL = torch.tensor([[3.0, 1, -2]], dtype=D), torch.tensor([0])


def softmax(z):
    total = sum(exp(v) for v in z)
    return [exp(v) / total for v in z]


def kl_in_loops(target, z, tau):
    p, q = softmax([v / tau for v in target]), softmax([v / tau for v in z])
    return tau**2 * sum(a * (log(a) - log(b)) for a, b in zip(p, q))


def ela_in_loops(z, v, y, tau, mode):
    steps, batch, classes = z.shape
    total = 0.0
    for t in range(steps):
        for b in range(batch):
            s, teacher, label = z[t, b].tolist(), v[b].tolist(), int(y[b])
            k = max(range(classes), key=s.__getitem__)
            if k != label:
                s[k] = s[label]
                if mode != "keep":
                    pair = [teacher[k], teacher[label]]
                    teacher[k] = teacher[label] = min(pair) if mode == "min" else sum(pair) / 2
            total += kl_in_loops(teacher, s, tau)
    return total / (steps * batch)


def sta_in_loops(z, tau, temperature, center):
    steps, batch, classes = z.shape
    total = 0.0
    for b in range(batch):
        rows = z[:, b].tolist()
        p = [softmax(row) for row in rows]
        sure = [(log(classes) + sum(x * log(x + 1e-8) for x in row)) / log(classes) for row in p]
        flat = [[x - sum(row) / classes for x in row] for row in rows] if center else rows

        def cosine(i, j, flat=flat):
            dot = sum(a * b for a, b in zip(flat[i], flat[j]))
            return dot / sqrt(sum(a * a for a in flat[i]) * sum(a * a for a in flat[j]))

        for i in range(steps):
            others = [j for j in range(steps) if j != i]
            weights = softmax([sure[j] * cosine(i, j) / temperature for j in others])
            g = [sum(w * rows[j][c] for w, j in zip(weights, others)) for c in range(classes)]
            total += kl_in_loops(g, rows[i], tau)
    return total / (steps * batch)


def case(seed=0):
    """Four steps, six samples, five classes; about half of the steps are wrong."""
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(4, 6, 5, dtype=D, generator=g)
    y = torch.randint(0, 5, (6,), generator=g)
    z[:2] += 5 * F.one_hot(y, 5)
    wrong = z.argmax(-1) != y
    assert 5 < wrong.sum() < 19
    return z.requires_grad_(), 3 * torch.randn(6, 5, dtype=D, generator=g), y


def step_of(z, v, y):
    return Step({"y": y}, {"student": Output(z), "teacher": Output(v if v.ndim == 3 else v[None])})


def test_golden_ela():
    z, v = align(GOLD, TEACHER, LABEL)
    assert z.tolist() == [[[2, 0, -1]], [[0, 0, 0]]] and v.tolist() == [[[3, 1, -2]], [[1, 1, -2]]]
    assert ela_loss(GOLD[:1], TEACHER, LABEL).item() == pytest.approx(0.234145, abs=1e-6)
    assert ela_loss(GOLD[1:], TEACHER, LABEL).item() == pytest.approx(0.731296, abs=1e-6)
    assert ela_loss(GOLD, TEACHER, LABEL).item() == pytest.approx(0.482720, abs=1e-6)


def test_golden_sta():
    assert step_weights(GOLD)[..., 0].tolist() == [[0, 1], [1, 0]]
    assert sta_loss(GOLD).item() == pytest.approx(1.066728, abs=1e-6)
    expected = [[0, 0.485728, 0.514272], [0.492020, 0, 0.507980], [0.590987, 0.409013, 0]]
    for row, right in zip(step_weights(THREE)[..., 0].tolist(), expected):
        assert row == pytest.approx(right, abs=1e-6)
    assert sta_loss(THREE).item() == pytest.approx(0.416915, abs=1e-6)


def test_golden_total():
    plan = seal_kd(toy_student(), toy_teacher())
    total = torch.zeros((), dtype=D)
    for weight, objective in plan.loss.values():
        assert not callable(weight)
        total = total + weight * objective(step_of(GOLD, TEACHER, LABEL))
    assert total.item() == pytest.approx(1.310287, abs=1e-6)


@pytest.mark.parametrize("mode", ["min", "keep", "mean"])
def test_ela_in_loops(mode):
    z, v, y = case()
    expected = ela_in_loops(z.detach(), v, y, 2.0, mode)
    assert ela_loss(z, v, y, 2.0, mode).item() == pytest.approx(expected, rel=1e-9)
    soft = 0.6 * F.one_hot(y, 5).to(D) + 0.08
    assert ela_loss(z, v, soft, 2.0, mode).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("temperature", "center"), [(1.0, False), (0.3, True)])
def test_sta_in_loops(temperature, center):
    z, v, y = case()
    expected = sta_in_loops(z.detach(), 2.0, temperature, center)
    assert sta_loss(z, 2.0, temperature, center).item() == pytest.approx(expected, rel=1e-6)
    assert STA(2.0, temperature, center)(step_of(z, v, y)).item() == pytest.approx(expected, rel=1e-6)


def test_ela_without_errors_is_the_plain_term():
    z, v, y = case()
    right = z.detach() + 30 * F.one_hot(y, 5)
    torch.testing.assert_close(ela_loss(right, v, y, 2.0), kd_per_step(right, v, 2.0))
    assert abs(ela_loss(z, v, y, 2.0) - kd_per_step(z, v, 2.0)) > 1e-3


def test_the_gradient_of_ela():
    """The numbers of a worked example: the wrongly preferred class gets none and the true class is pushed down."""
    z = torch.tensor([[[1.0, 2, 0, 0]]], dtype=D, requires_grad=True)
    v, y = torch.tensor([[9.0, 1, 2, 2]], dtype=D), torch.tensor([0])
    (grad,) = torch.autograd.grad(ela_loss(z, v, y, 3.0), z)
    assert grad[0, 0].tolist() == pytest.approx([0.495, 0, -0.248, -0.248], abs=6e-4)
    assert grad[0, 0, 1] == 0
    (grad,) = torch.autograd.grad(kd_loss(z[0], v, 3.0), z)
    assert grad[0, 0].tolist() == pytest.approx([-1.591, 0.929, 0.331, 0.331], abs=6e-4)


def test_the_preferred_class_of_a_wrong_step_gets_no_gradient_and_nothing_is_changed_in_place():
    z, v, y = case()
    z_before, v_before = z.detach().clone(), v.clone()
    v.requires_grad_()
    grad, none = torch.autograd.grad(ela_loss(z, v, y, 2.0), [z, v], allow_unused=True)
    assert none is None
    k = z.argmax(-1)
    preferred = grad.gather(-1, k[..., None])[..., 0]
    assert (preferred[k != y] == 0).all() and (preferred[k == y] != 0).all()
    assert torch.equal(z.detach(), z_before) and torch.equal(v.detach(), v_before)


def test_weights_over_steps():
    z, _, _ = case()
    weights = step_weights(z)
    assert not weights.requires_grad and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(4, 6, dtype=D))
    assert weights.diagonal(dim1=0, dim2=1).abs().max() == 0
    same = step_weights(z[:1].expand(4, -1, -1))
    torch.testing.assert_close(same, ((1 - torch.eye(4, dtype=D)) / 3)[..., None].expand(-1, -1, 6))
    assert sta_loss(z[:1].expand(4, -1, -1), 2.0) < 1e-12
    shift = torch.randn(4, 6, 1, dtype=D)
    torch.testing.assert_close(step_weights(z + shift, center=True), step_weights(z, center=True))
    assert (step_weights(z + shift) - weights).abs().max() > 1e-3


def test_confidence_is_1_for_a_sure_step_and_0_for_an_even_one():
    sure, even = torch.tensor([[800.0, 0, 0]], dtype=D), torch.ones(1, 3, dtype=D)
    weights = step_weights(torch.stack([sure, sure, even]))[0, :, 0]
    assert weights.tolist() == pytest.approx([0, exp(1) / (exp(1) + 1), 1 / (exp(1) + 1)], abs=1e-9)


def test_nothing_flows_through_the_other_steps():
    z, _, _ = case()
    (grad,) = torch.autograd.grad(sta_loss(z, 2.0), z)
    weights, g = step_weights(z), torch.zeros(4, 6, 5, dtype=D)
    for i in range(4):
        for j in range(4):
            g[i] += weights[i, j, :, None] * z[j].detach()
    expected = 2.0 * (torch.softmax(z / 2.0, -1) - torch.softmax(g / 2.0, -1)) / 24
    torch.testing.assert_close(grad, expected.detach())


def test_one_step_has_no_others():
    z, v, y = case()
    value = STA(2.0)(step_of(z[:1], v, y))
    (grad,) = torch.autograd.grad(value, z)
    assert value == 0 and grad.abs().max() == 0


def test_the_order_of_steps_is_of_no_account():
    z, v, y = case()
    order = torch.tensor([2, 0, 3, 1])
    for objective in (ELA(2.0), STA(2.0, 0.5)):
        torch.testing.assert_close(objective(step_of(z[order], v, y)), objective(step_of(z, v, y)))


def test_a_teacher_with_time_is_averaged():
    z, v, y = case()
    other = v.roll(1, 0)
    teacher = torch.stack([v + other, v - 3 * other, v + 2 * other])
    torch.testing.assert_close(ELA(2.0)(step_of(z, teacher, y)), ela_loss(z, v, y, 2.0))


def test_half_precision():
    z, v, y = (x.detach() for x in case())
    assert step_weights(z.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(step_weights(z.float()), step_weights(z.float().double()).float())
        assert ela_loss(z.float(), v.float(), y).isfinite()


def test_builder():
    student, teacher = toy_student(), toy_teacher()
    plan = seal_kd(student, teacher)
    assert {k: w for k, (w, _) in plan.loss.items()} == {"ce_per_step": 1.0, "ela": 0.6, "sta": 0.15}
    ela, sta = plan.loss["ela"][1], plan.loss["sta"][1]
    assert isinstance(ela, ELA) and isinstance(sta, STA)
    assert (ela.tau, ela.teacher_mode, sta.tau, sta.temperature, sta.center) == (3.0, "min", 3.0, 1.0, False)
    plan = seal_kd(student, teacher, tau=2.0, teacher_mode="mean", temperature=0.4, center=True, alpha=0.2, beta=0.1)
    ela, sta = plan.loss["ela"][1], plan.loss["sta"][1]
    assert isinstance(ela, ELA) and isinstance(sta, STA)
    assert (ela.tau, ela.teacher_mode, sta.tau, sta.temperature, sta.center) == (2.0, "mean", 2.0, 0.4, True)
    assert (plan.loss["ela"][0], plan.loss["sta"][0]) == (0.2, 0.1)
    assert set(seal_kd(student, teacher, alpha=0, beta=0).loss) == {"ce_per_step"}
