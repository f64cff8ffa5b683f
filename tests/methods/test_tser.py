"""TSER: golden values, the formula in loops, and what the entropy does."""

from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.functional import kd_loss, kd_per_step
from spikedistill.methods import tser
from spikedistill.methods.tser import Entropy, entropy
from spikedistill.objectives import CE, KDPerStep, PerStep
from tests.methods.toy import toy_student, toy_teacher

D = torch.float64
Z = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D)
V = torch.tensor([[3.0, 1, -2]], dtype=D)
Y = torch.tensor([0])


def plan_of(**settings: Any) -> Any:
    return tser(toy_student(), toy_teacher(), **settings)


def total(plan, z, v, y):
    step = Step({"y": y}, {"student": Output(z), "teacher": Output(v if v.ndim == 3 else v[None])})
    return torch.stack([weight * objective(step) for weight, objective in plan.loss.values()]).sum()


def softmax(z):
    exps = [exp(v) for v in z]
    return [v / sum(exps) for v in exps]


def in_loops(z, v, y, tau, ce, kd, gamma, entropy_tau):
    """The whole loss over lists."""
    value, steps, batch = 0.0, len(z), len(z[0])
    for t in range(steps):
        for b in range(batch):
            q, p, h = (
                softmax([x / tau for x in v[b]]),
                softmax([x / tau for x in z[t][b]]),
                softmax([x / entropy_tau for x in z[t][b]]),
            )
            value -= ce * log(softmax(z[t][b])[y[b]])
            value += kd * tau**2 * sum(a * log(a / c) for a, c in zip(q, p))
            value += gamma * sum(a * log(a) for a in h)
    return value / steps / batch


def test_golden_values():
    assert PerStep(CE())(Step({"y": Y}, {"student": Output(Z)})).item() == pytest.approx(0.860645, abs=1e-6)
    assert kd_per_step(Z, V, 2.0).item() == pytest.approx(0.873904, abs=2e-6)
    assert kd_per_step(Z, V, 2.0).item() / 4 == pytest.approx(0.218476, abs=1e-6)
    assert entropy(Z, 2.0).item() == pytest.approx(0.987202, abs=1e-6)
    assert entropy(Z, 1.0).item() == pytest.approx(0.749797, abs=1e-6)
    assert total(plan_of(tau=2.0, alpha=0.5, gamma=0.1), Z, V, Y).item() == pytest.approx(0.768555, abs=1e-6)


@pytest.mark.parametrize("teacher_steps", [1, 3])
def test_the_loss_in_loops(teacher_steps):
    torch.manual_seed(0)
    z, v = torch.randn(3, 4, 5, dtype=D) * 2, torch.randn(teacher_steps, 4, 5, dtype=D) * 2
    y = torch.tensor([0, 3, 4, 0])
    lists = (
        z.tolist(),
        [[sum(v[t, b, k].item() for t in range(teacher_steps)) / teacher_steps for k in range(5)] for b in range(4)],
    )
    for settings, weights in (
        ({"alpha": 0.3, "gamma": 0.4}, (0.7, 0.3, 0.4, 2.5)),
        ({"alpha": 0.3, "ce_weight": 1.1, "kd_weight": 0.2, "entropy_tau": 1.5}, (1.1, 0.2, 0.1, 1.5)),
        ({"ce_weight": 0.0, "kd_weight": 0.0, "gamma": 2.0}, (0.0, 0.0, 2.0, 2.5)),
    ):
        value = total(plan_of(tau=2.5, **settings), z, v, y).item()
        assert value == pytest.approx(in_loops(*lists, y.tolist(), 2.5, *weights), rel=1e-9)


def test_one_step_without_entropy_is_distillation():
    z, v, y = torch.randn(1, 4, 5, dtype=D), torch.randn(4, 5, dtype=D), torch.tensor([0, 1, 2, 4])
    plan = plan_of(gamma=0.0, alpha=0.2, tau=3.5)
    assert [*plan.loss] == ["ce_per_step", "tser"]
    expected = 0.8 * F.cross_entropy(z[0], y) + 0.2 * kd_loss(z[0], v, 3.5)
    torch.testing.assert_close(total(plan, z, v, y), expected)


def test_never_below_the_terms_of_the_time_mean():
    torch.manual_seed(0)
    for _ in range(20):
        z, v, y = torch.randn(3, 1, 5, dtype=D) * 3, torch.randn(1, 5, dtype=D) * 3, torch.tensor([2])
        mean = z.mean(0)
        assert PerStep(CE())(Step({"y": y}, {"student": Output(z)})) >= F.cross_entropy(mean, y)
        assert kd_per_step(z, v, 2.0) >= kd_loss(mean, v, 2.0)
        p = torch.softmax(z / 2, -1).mean(0)
        assert entropy(z, 2.0) <= -(p * p.log()).sum()
        same = mean.repeat(3, 1, 1)
        torch.testing.assert_close(kd_per_step(same, v, 2.0), kd_loss(mean, v, 2.0))


def test_order_of_time_and_a_constant_change_nothing():
    z, v, y = torch.randn(3, 2, 4, dtype=D), torch.randn(2, 4, dtype=D), torch.tensor([1, 3])
    plan = plan_of(gamma=0.3)
    value = total(plan, z, v, y)
    torch.testing.assert_close(total(plan, z.flip(0), v, y), value)
    torch.testing.assert_close(total(plan, z + torch.randn(3, 2, 1, dtype=D), v, y), value)


def test_entropy_of_equal_outputs_and_its_gradient():
    z = torch.zeros(2, 3, 5, dtype=D, requires_grad=True)
    value = entropy(z, 1.7)
    assert value.item() == pytest.approx(log(5)) and torch.autograd.grad(value, z)[0].abs().max() < 1e-15
    z = torch.randn(2, 3, 5, dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad(entropy(z, 1.7), z)
    p = torch.softmax(z / 1.7, -1)
    h = -(p * p.log()).sum(-1, keepdim=True)
    torch.testing.assert_close(grad, -p * (p.log() + h) / 1.7 / 6)
    assert torch.autograd.gradcheck(lambda x: entropy(x, 1.7), z)


def test_more_gamma_means_more_entropy_at_the_minimum():
    v, found = torch.tensor([[4.0, 0, -1]]), []
    for gamma in (0.0, 0.3, 3.0):
        z = torch.zeros(1, 1, 3, requires_grad=True)
        optim, plan = torch.optim.Adam([z], 0.05), plan_of(alpha=1.0, tau=2.0, gamma=gamma)
        for _ in range(300):
            optim.zero_grad()
            total(plan, z, v, Y).backward()
            optim.step()
        found.append(entropy(z, 2.0).item())
    assert found[0] < found[1] < found[2]


def test_never_below_minus_gamma_log_classes():
    z = torch.zeros(2, 1, 4, dtype=D)
    value = total(plan_of(alpha=1.0, gamma=0.7), z, z[0], Y)
    assert value.item() == pytest.approx(-0.7 * log(4))


def test_no_gradient_to_the_teacher_and_a_gradient_to_every_step():
    z, v = torch.randn(3, 2, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    grad, none = torch.autograd.grad(total(plan_of(), z, v, torch.tensor([0, 1])), [z, v], allow_unused=True)
    assert none is None and (grad.flatten(1).abs().amax(1) > 0).all()
    closed = torch.softmax(z / 3, -1) - torch.softmax(v.mean(0) / 3, -1)
    (grad,) = torch.autograd.grad(kd_per_step(z, v.mean(0), 3.0), z)
    torch.testing.assert_close(grad, 3 * closed / 6)


def test_large_half_precision_logits_stay_finite():
    z = (torch.eye(4)[None].repeat(2, 1, 1) * 100 - 50).half()
    for value in (kd_per_step(z, z[0].flip(0), 2.0), entropy(z, 2.0)):
        assert value.isfinite()


def test_defaults():
    loss = plan_of().loss
    assert {k: w for k, (w, _) in loss.items()} == {"ce_per_step": 0.5, "tser": 0.5, "entropy": -0.1}
    assert isinstance(loss["tser"][1], KDPerStep) and isinstance(loss["entropy"][1], Entropy)
    assert loss["tser"][1].tau == loss["entropy"][1].tau == 3.0
    loss = plan_of(tau=2.0, entropy_tau=5.0).loss
    assert (loss["tser"][1].tau, loss["entropy"][1].tau) == (2.0, 5.0)
