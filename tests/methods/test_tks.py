"""TKS: golden values, the formula in loops, and who teaches whom."""

from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spikedistill.core.output import Output
from spikedistill.core.schedule import at
from spikedistill.core.step import Step
from spikedistill.methods import tks
from spikedistill.methods.tks import TKS, right_steps, tks_loss
from tests.methods.toy import toy_student

D = torch.float64
Y = torch.tensor([0])


def tensor(*steps):
    """Logits of single samples, a list a step -> [T, 1, C]."""
    return torch.tensor(steps, dtype=D)[:, None]


def mixed(batch=6, steps=4, classes=3, seed=1):
    """Logits [T, B, C] and labels of which some steps, all, and none are right."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(steps, batch, classes, generator=g, dtype=D) * 2
    y = torch.randint(0, classes, (batch,), generator=g)
    z[:, 0, y[0]] += 6
    z[:, 1, y[1]] -= 6
    return z, y


def softmax(z):
    exps = [exp(v) for v in z]
    return [v / sum(exps) for v in exps]


def in_loops(z, y, tau, target, wrong, soften):
    z, y, value = z.tolist(), y.tolist(), 0.0
    for b in range(len(y)):
        right = [step[b] for step in z if max(range(len(step[b])), key=step[b].__getitem__) == y[b]]
        total = [sum(row[k] for row in right) for k in range(len(z[0][b]))]
        q = softmax([v / (len(right) if right and target == "mean" else 1) / tau for v in total])
        if not right and wrong == "skip":
            continue
        if not right and wrong == "one_hot":
            q = [float(k == y[b]) for k in range(len(q))]
        for step in z:
            p = softmax([v / tau for v in step[b]] if soften else step[b])
            value -= sum(a * log(c) for a, c in zip(q, p) if a)
    return tau**2 * value / len(z) / len(y)


def test_golden_values():
    z = tensor([2, 0, -1], [0, 1, 0])
    assert right_steps(z, Y).flatten().tolist() == [1, 0]
    assert F.softmax(z[0, 0] / 2, -1).tolist() == pytest.approx([0.628532, 0.231224, 0.140244], abs=1e-6)
    assert tks_loss(z, Y, 2.0).item() == pytest.approx(4.746496, abs=1e-6)
    assert tks_loss(tensor([2, 0, -1], [1, 0.5, 0]), Y, 2.0).item() == pytest.approx(3.469211, abs=1e-6)
    assert tks_loss(tensor([0, 2, -1], [0, 1, 0]), Y, 2.0).item() == pytest.approx(6.109248, abs=1e-6)


@pytest.mark.parametrize("soften", [False, True])
@pytest.mark.parametrize("wrong", ["uniform", "one_hot", "skip"])
@pytest.mark.parametrize("target", ["sum", "mean"])
def test_the_loss_in_loops(target, wrong, soften):
    z, y = mixed()
    count = right_steps(z, y).sum(0).flatten()
    assert count[0] == 4 and count[1] == 0 and any(0 < n < 4 for n in count.tolist())
    expected = in_loops(z, y, 2.5, target, wrong, soften)
    for detach in (True, False):
        assert tks_loss(z, y, 2.5, target, wrong, soften, detach).item() == pytest.approx(expected, rel=1e-9)
    soft = 0.6 * F.one_hot(y, 3).to(D) + 0.4 / 3
    assert tks_loss(z, soft, 2.5, target, wrong, soften).item() == pytest.approx(expected, rel=1e-9)


def test_gradient_with_and_without_the_targets():
    z, y = mixed()
    z.requires_grad_()
    right = right_steps(z, y)
    q = torch.softmax((right * z).sum(0) / 3, -1)
    log_p = torch.log_softmax(z, -1)
    pull = 9.0 * (log_p.exp() - q) / z[..., 0].numel()
    mean = log_p.mean(0)
    through = -3.0 / len(y) * q * (mean - (q * mean).sum(-1, keepdim=True))
    (detached,) = torch.autograd.grad(tks_loss(z, y, 3.0), z)
    (whole,) = torch.autograd.grad(tks_loss(z, y, 3.0, detach_target=False), z)
    torch.testing.assert_close(detached, pull.detach())
    torch.testing.assert_close(whole, (pull + right * through).detach())
    assert (whole - detached)[:, 1].abs().max() == 0 and (whole - detached)[:, 0].abs().max() > 1e-9


def test_the_shared_target_is_never_wrong():
    z, y = mixed(batch=200, seed=3)
    right = right_steps(z, y)
    known = right.sum(0).flatten() > 0
    assert ((right * z).sum(0).argmax(-1) == y)[known].all() and 0 < known.sum() < 200


def test_order_of_time_changes_nothing_and_only_the_mean_survives_repetition():
    z, y = mixed()
    torch.testing.assert_close(tks_loss(z.flip(0), y), tks_loss(z, y))
    twice = z.repeat(2, 1, 1)
    torch.testing.assert_close(tks_loss(twice, y, target="mean"), tks_loss(z, y, target="mean"))
    assert (tks_loss(twice, y) - tks_loss(z, y)).abs() > 1e-3


def test_a_single_right_step_at_temperature_1_meets_itself():
    z = tensor([2, 0, -1]).requires_grad_()
    value, p = tks_loss(z, Y, 1.0), torch.softmax(z[0, 0], 0)
    torch.testing.assert_close(value, -(p * p.log()).sum())
    assert torch.autograd.grad(value, z)[0].abs().max() < 1e-12


def test_skipped_samples_have_no_gradient_but_count_in_the_mean():
    z, y = mixed()
    z.requires_grad_()
    value = tks_loss(z, y, on_all_wrong="skip")
    (grad,) = torch.autograd.grad(value, z)
    known = right_steps(z, y).sum(0).flatten() > 0
    assert grad[:, ~known].abs().max() == 0 and (grad[:, known].abs().amax((0, 2)) > 0).all()
    torch.testing.assert_close(value, tks_loss(z[:, known], y[known]) * known.sum() / len(y))


def plan_of(**settings: Any) -> Any:
    return tks(toy_student(), **settings).loss


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_target_takes_over_linearly(alpha):
    loss = plan_of(alpha=alpha)
    for p in (0.0, 0.25, 1.0):
        assert [at(loss[k][0], p) for k in ("ce", "tks")] == pytest.approx([1 - alpha * p, alpha * p])
    fixed = plan_of(alpha=alpha, static=True)
    assert (fixed["ce"][0], fixed["tks"][0]) == (alpha, 1 - alpha)


def test_settings_reach_the_formula():
    z, y = mixed()
    step = Step({"y": y}, {"student": Output(z)})
    settings: Any = {"tau": 1.7, "target": "mean", "on_all_wrong": "one_hot", "soften_student": True}
    torch.testing.assert_close(plan_of(**settings)["tks"][1](step), tks_loss(z, y, 1.7, "mean", "one_hot", True))
    torch.testing.assert_close(plan_of()["tks"][1](step), tks_loss(z, y, 3.0))
    assert at(plan_of()["ce"][0], 1.0) == pytest.approx(0.3)
    assert plan_of()["tks"][1].how["detach_target"] is True
    assert plan_of(detach_target=False)["tks"][1].how["detach_target"] is False
    assert isinstance(plan_of()["tks"][1], TKS) and [*tks(toy_student()).passes] == ["student"]
