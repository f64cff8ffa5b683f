"""strong2weak: golden values, the formula in loops for every variant, and who gets a gradient."""

from itertools import pairwise
from math import exp, log

import pytest
import torch

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.methods import strong2weak as strong2weak_builder
from spikedistill.methods.strong2weak import Strong2Weak, confidence, strong2weak, strong2weak_loss
from spikedistill.objectives import CE
from tests.methods.toy import toy_student

D = torch.float64
GOLD = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D)
THREE = torch.cat([GOLD, torch.tensor([[[1.0, 0.5, 0]]], dtype=D)])
VARIANTS = ["plain", "cascade", "ensemble_teacher", "ensemble_student"]
every = pytest.mark.parametrize("variant", VARIANTS)
both = pytest.mark.parametrize("direction", ["s2w", "w2s"])


def softmax(z):
    total = sum(exp(v) for v in z)
    return [exp(v) / total for v in z]


def kl_in_loops(teacher, student, tau):  # [B, C] twice
    total = 0.0
    for t, s in zip(teacher, student):
        p, q = softmax([v / tau for v in t]), softmax([v / tau for v in s])
        total += sum(a * log(a / b) for a, b in zip(p, q))
    return total / len(teacher)


def loss_in_loops(z, tau, direction, variant):
    z, steps = z.tolist(), len(z)
    con = [sum(max(softmax(row)) for row in z[t]) / len(z[t]) for t in range(steps)]
    order = sorted(range(steps), key=lambda t: -con[t])
    order = order if direction == "s2w" else order[::-1]

    def others(k):
        rows = range(len(z[0]))
        left = [t for t in range(steps) if t != k]
        return [[sum(z[t][b][c] for t in left) / len(left) for c in range(len(z[0][0]))] for b in rows]

    if variant == "cascade":
        return sum(kl_in_loops(z[a], z[b], tau) for a, b in pairwise(order)) / (steps - 1)
    teacher = others(order[-1]) if variant == "ensemble_teacher" else z[order[0]]
    student = others(order[0]) if variant == "ensemble_student" else z[order[-1]]
    return kl_in_loops(teacher, student, tau)


def case(seed=0):
    """Four steps with confidences that differ, the samples of which disagree on which is the surest."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 6, 5, dtype=D, generator=g) * torch.tensor([1.0, 3, 0.4, 2], dtype=D)[:, None, None]
    surest = torch.softmax(z, -1).amax(-1).argmax(0)
    assert len(set(surest.tolist())) > 1
    return z.requires_grad_()


def test_golden_values():
    assert confidence(THREE).tolist() == pytest.approx([0.843795, 0.576117, 0.506480], abs=1e-6)
    assert strong2weak_loss(GOLD).item() == pytest.approx(0.272806, abs=1e-6)
    assert strong2weak_loss(GOLD, scale_tau2=True).item() == pytest.approx(1.091222, abs=1e-6)
    assert strong2weak_loss(GOLD, direction="w2s").item() == pytest.approx(0.258889, abs=1e-6)
    assert strong2weak_loss(GOLD, direction="w2s", scale_tau2=True).item() == pytest.approx(1.035556, abs=1e-6)
    assert strong2weak_loss(THREE, variant="cascade").item() == pytest.approx(0.161849, abs=1e-6)
    ce = CE()(Step({"y": torch.tensor([0])}, {"student": Output(GOLD)}))
    assert ce.item() == pytest.approx(0.604131, abs=1e-6)


@every
@both
def test_in_loops(direction, variant):
    z = case()
    expected = loss_in_loops(z, 3.5, direction, variant)
    assert strong2weak_loss(z, 3.5, direction, variant).item() == pytest.approx(expected, rel=1e-9)
    scaled = strong2weak_loss(z, 3.5, direction, variant, scale_tau2=True)
    assert scaled.item() == pytest.approx(3.5**2 * expected, rel=1e-9)


@every
@both
def test_of_no_account_are_the_order_of_steps_and_shifts_of_logits(direction, variant):
    z = case()
    value = strong2weak_loss(z, 3.5, direction, variant)
    torch.testing.assert_close(strong2weak_loss(z[[2, 0, 3, 1]], 3.5, direction, variant), value)
    torch.testing.assert_close(strong2weak_loss(z + torch.randn(4, 6, 1, dtype=D), 3.5, direction, variant), value)


@every
@both
def test_zero_for_one_step_and_for_equal_steps(direction, variant):
    z = case()
    one = strong2weak_loss(z[:1], 3.5, direction, variant)
    (grad,) = torch.autograd.grad(one, z)
    assert one == 0 and grad.abs().max() == 0
    assert strong2weak_loss(z[:1].expand(3, -1, -1), 3.5, direction, variant) < 1e-12
    assert strong2weak_loss(z[:2], 3.5, direction, variant) > 1e-3


@every
@both
def test_two_steps_make_all_variants_one(direction, variant):
    z = case()[1:3]
    torch.testing.assert_close(
        strong2weak_loss(z, 3.5, direction, variant), strong2weak_loss(z, 3.5, direction, "plain")
    )


def test_a_tie_of_different_steps_is_no_pair():
    tied = torch.tensor([[[2.0, 0, -1]], [[0, 2, -1]]], dtype=D)
    for direction in ("s2w", "w2s"):
        assert strong2weak_loss(tied, 2.0, direction) == 0


def reached(z, *how, **more):
    (grad,) = torch.autograd.grad(strong2weak_loss(z, *how, **more), z)
    return [t for t in range(len(z)) if grad[t].abs().max() > 1e-9]


def test_who_gets_a_gradient():
    z = case()
    order = confidence(z).argsort(descending=True).tolist()
    strong, weak = order[0], order[-1]
    assert reached(z, 3.5) == [weak]
    assert reached(z, 3.5, "w2s") == [strong]
    assert reached(z, 3.5, detach_teacher=False) == sorted([strong, weak])
    assert reached(z, 3.5, "s2w", "cascade") == sorted(order[1:])
    assert reached(z, 3.5, "w2s", "cascade") == sorted(order[:-1])
    assert reached(z, 3.5, "s2w", "cascade", detach_teacher=False) == [0, 1, 2, 3]
    assert reached(z, 3.5, "s2w", "ensemble_teacher") == [weak]
    assert reached(z, 3.5, "w2s", "ensemble_teacher") == [strong]
    assert reached(z, 3.5, "s2w", "ensemble_student") == sorted(order[1:])
    assert reached(z, 3.5, "w2s", "ensemble_student") == sorted(order[:-1])


def test_gradient_of_the_weak_step():
    z = case()
    order = confidence(z).argsort(descending=True).tolist()
    (grad,) = torch.autograd.grad(strong2weak_loss(z, 3.5), z)
    expected = (torch.softmax(z[order[-1]] / 3.5, -1) - torch.softmax(z[order[0]] / 3.5, -1)) / (3.5 * 6)
    torch.testing.assert_close(grad[order[-1]], expected.detach())


def test_a_step_of_larger_logits_is_not_less_confident():
    z = case().detach()
    for t in range(4):
        larger = z.clone()
        larger[t] *= 1.7
        assert confidence(larger)[t] >= confidence(z)[t]
        assert not confidence(z.requires_grad_()).requires_grad


def test_all_processes_choose_the_same_steps(monkeypatch):
    z, elsewhere = case(), torch.tensor([0.0, 0.0, 9.0, 0.0], dtype=D)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda con: con.add_(elsewhere))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    con = torch.softmax(z.detach(), -1).amax(-1).mean(1)
    torch.testing.assert_close(confidence(z), (con + elsewhere) / 2)
    weakest = confidence(z).argmin().item()
    assert reached(z, 3.5) == [weakest] and weakest != con.argmin()
    with torch.no_grad():  # a trial before training, on a processor, where a group of GPUs adds nothing up
        torch.testing.assert_close(confidence(z), con)


def test_builder():
    student = toy_student()
    assert strong2weak_builder is strong2weak
    plan = strong2weak(student)
    assert {k: w for k, (w, _) in plan.loss.items()} == {"ce": 1.0, "s2w": 1.0}
    assert set(plan.passes) == {"student"}
    term = plan.loss["s2w"][1]
    assert isinstance(term, Strong2Weak) and isinstance(plan.loss["ce"][1], CE)
    assert (term.tau, term.direction, term.variant) == (2.0, "s2w", "cascade")
    assert term.detach_teacher and not term.scale_tau2
    both = strong2weak(student, s2w=0.5, w2s=0.3, tau=3.0, variant="plain", detach_teacher=False, scale_tau2=True)
    assert {k: w for k, (w, _) in both.loss.items()} == {"ce": 1.0, "s2w": 0.5, "w2s": 0.3}
    z = case()
    for name in ("s2w", "w2s"):
        value = both.loss[name][1](Step({}, {"student": Output(z)}))
        torch.testing.assert_close(value, strong2weak_loss(z, 3.0, name, "plain", False, True))
    assert set(strong2weak(student, s2w=0).loss) == {"ce"}
