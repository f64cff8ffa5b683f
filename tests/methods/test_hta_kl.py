"""hta_kl: golden values, the formula in loops, and what the head and the weights must do."""

from functools import partial
from math import exp, log

import pytest
import torch

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.functional import kd_loss
from spikedistill.methods.hta_kl import HTAKL, head_of, hta_kl, hta_kl_loss
from spikedistill.objectives import CE
from tests.methods.toy import toy_student, toy_teacher

D = torch.float64
GOLD, TEACHER = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D), torch.tensor([[3.0, 1, -2]], dtype=D)
scopes = pytest.mark.parametrize("scope", ["all", "region"])


def softmax(z):
    total = sum(exp(v) for v in z)
    return [exp(v) / total for v in z]


def parts_in_loops(s, v, tau, delta, scope="all"):
    """w, FKL, RKL and the loss of one sample."""
    p, q = softmax([x / tau for x in v]), softmax([x / tau for x in s])
    head, reached = set(), 0.0
    for c in sorted(range(len(p)), key=lambda c: -p[c]):
        if reached >= delta:
            break
        head.add(c)
        reached += p[c]
    gaps = [abs(a - b) for a, b in zip(p, q)]
    w = sum(g for c, g in enumerate(gaps) if c in head) / sum(gaps)
    classes = range(len(p))
    fkl = sum(p[c] * log(p[c] / q[c]) for c in classes if scope == "all" or c in head)
    rkl = sum(q[c] * log(q[c] / p[c]) for c in classes if scope == "all" or c not in head)
    return w, fkl, rkl, tau**2 * (w * fkl + (1 - w) * rkl)


def loss_in_loops(s, v, tau, delta, scope="all"):
    return sum(parts_in_loops(a, b, tau, delta, scope)[3] for a, b in zip(s.tolist(), v.tolist())) / len(s)


def case(classes=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(5, classes, dtype=D, generator=g).requires_grad_()
    return s, 1.5 * torch.randn(5, classes, dtype=D, generator=g)


def step_of(z, teacher):
    return Step({}, {"student": Output(z), "teacher": Output(teacher if teacher.ndim == 3 else teacher[None])})


def test_golden_values():
    mean = GOLD.mean(0)
    assert head_of(torch.softmax(TEACHER, -1), 0.5).tolist() == [[True, False, False]]
    w, fkl, rkl, _ = parts_in_loops(mean[0].tolist(), TEACHER[0].tolist(), 1.0, 0.5)
    assert (w, fkl, rkl) == pytest.approx((0.5, 0.272887, 0.452794), abs=1e-6)
    assert hta_kl_loss(mean, TEACHER, 1.0).item() == pytest.approx(0.362840, abs=1e-6)
    _, fkl, rkl, _ = parts_in_loops(mean[0].tolist(), TEACHER[0].tolist(), 2.0, 0.5)
    assert (fkl, rkl) == pytest.approx((0.150552, 0.186761), abs=1e-6)
    assert hta_kl_loss(mean, TEACHER, 2.0).item() == pytest.approx(0.674627, abs=1e-6)
    assert parts_in_loops(GOLD[0, 0].tolist(), TEACHER[0].tolist(), 2.0, 0.5)[0] == pytest.approx(0.365529, abs=1e-6)
    assert hta_kl_loss(GOLD[0], TEACHER, 2.0).item() == pytest.approx(0.173288, abs=1e-6)
    assert hta_kl_loss(GOLD[1], TEACHER, 2.0).item() == pytest.approx(1.681724, abs=1e-6)


@scopes
@pytest.mark.parametrize(("tau", "delta"), [(1.0, 0.3), (3.0, 0.8)])
def test_in_loops(tau, delta, scope):
    s, v = case()
    expected = loss_in_loops(s.detach(), v, tau, delta, scope)
    assert hta_kl_loss(s, v, tau, delta, scope).item() == pytest.approx(expected, rel=1e-9)


def test_time_mean_and_per_step():
    z, v = torch.randn(3, 5, 6, dtype=D), torch.randn(2, 5, 6, dtype=D)
    teacher = (v[0] + v[1]) / 2
    mean = HTAKL(1.7, 0.8)(step_of(z, v))
    assert mean.item() == pytest.approx(loss_in_loops((z[0] + z[1] + z[2]) / 3, teacher, 1.7, 0.8), rel=1e-9)
    per_step = HTAKL(1.7, 0.8, "per_step", "region")(step_of(z, v))
    expected = sum(loss_in_loops(z[t], teacher, 1.7, 0.8, "region") for t in range(3)) / 3
    assert per_step.item() == pytest.approx(expected, rel=1e-9)
    one = step_of(z[:1], v)
    torch.testing.assert_close(HTAKL(1.7, 0.8, "per_step")(one), HTAKL(1.7, 0.8)(one))


def test_head_is_the_shortest_prefix_that_reaches_delta():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.05, 0.05, 0.85, 0.05]], dtype=D)
    assert head_of(p, 0.35).int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert head_of(p, 0.5).int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert head_of(p, 0.75).int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 0]]
    assert head_of(p, 1e-9).sum(-1).tolist() == [1, 1]
    assert head_of(p, 1.01).all()


@scopes
def test_the_order_of_classes_is_of_no_account(scope):
    s, v = case()
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    for delta in (0.3, 0.8):
        value = hta_kl_loss(s, v, 1.7, delta, scope)
        torch.testing.assert_close(hta_kl_loss(s[:, order], v[:, order], 1.7, delta, scope), value)


def test_between_both_kl_and_zero_only_at_the_teacher():
    s, v = case()
    for b in range(5):
        w, fkl, rkl, loss = parts_in_loops(s[b].tolist(), v[b].tolist(), 1.7, 0.8)
        assert 0 <= w <= 1 and min(fkl, rkl) <= loss / 1.7**2 <= max(fkl, rkl)
        value = hta_kl_loss(s[b : b + 1], v[b : b + 1], 1.7, 0.8).item() / 1.7**2
        assert min(fkl, rkl) <= value <= max(fkl, rkl) and value > 1e-3
    shift = torch.randn(5, 1, dtype=D)
    torch.testing.assert_close(hta_kl_loss(s + shift, v - shift, 1.7), hta_kl_loss(s, v, 1.7))
    same = (v + shift).requires_grad_()
    value = hta_kl_loss(same, v, 1.7)
    (grad,) = torch.autograd.grad(value, same)
    assert abs(value) < 1e-12 and grad.isfinite().all() and grad.abs().max() < 1e-9
    exact = hta_kl_loss(v.float(), v.float(), 1.7, weight_grad=True)
    assert exact == 0


def test_a_head_of_all_classes_is_plain_distillation():
    s, v = case()
    torch.testing.assert_close(hta_kl_loss(s, v, 1.7, 1.01), kd_loss(s, v, 1.7))
    torch.testing.assert_close(hta_kl_loss(s, v, 1.7, 1.01, "region"), kd_loss(s, v, 1.7))


def test_weights_of_single_heads():
    for seed in range(30):
        s, v = (x.detach() for x in case(seed=seed))
        assert all(parts_in_loops(a, b, 1.7, 1e-9)[0] <= 0.5 + 1e-12 for a, b in zip(s.tolist(), v.tolist()))
        two = hta_kl_loss(s[:, :2], v[:, :2], 1.7, 1e-9)
        p, q = torch.softmax(v[:, :2] / 1.7, -1), torch.softmax(s[:, :2] / 1.7, -1)
        both = (p * (p / q).log() + q * (q / p).log()).sum(-1)
        torch.testing.assert_close(two, 1.7**2 * both.mean() / 2)


@scopes
def test_gradient_with_the_weights_held_still(scope):
    s, v = case()
    (grad,) = torch.autograd.grad(hta_kl_loss(s, v, 1.7, 0.8, scope), s)
    weights = torch.tensor([parts_in_loops(a, b, 1.7, 0.8)[0] for a, b in zip(s.tolist(), v.tolist())], dtype=D)
    p = torch.softmax(v / 1.7, -1)
    head = head_of(p, 0.8).to(D) if scope == "region" else torch.ones_like(p)
    tail = 1 - head if scope == "region" else head

    def held(x):
        q = torch.softmax(x / 1.7, -1)
        forward, reverse = (head * p * (p / q).log()).sum(-1), (tail * q * (q / p).log()).sum(-1)
        return 1.7**2 * (weights * forward + (1 - weights) * reverse).mean()

    (expected,) = torch.autograd.grad(held(s), s)
    torch.testing.assert_close(grad, expected)
    (other,) = torch.autograd.grad(hta_kl_loss(s, v, 1.7, 0.8, scope, weight_grad=True), s)
    assert (other - grad).abs().max() > 1e-4
    assert torch.autograd.gradcheck(lambda x: hta_kl_loss(x, v, 1.7, 0.8, scope, True), s)


@scopes
def test_nothing_flows_to_the_teacher(scope):
    s, v = case()
    v.requires_grad_()
    for through in (False, True):
        value = hta_kl_loss(s, v, 1.7, 0.8, scope, through)
        grad, none = torch.autograd.grad(value, [s, v], allow_unused=True)
        assert none is None and grad.abs().max() > 0


def test_extreme_and_narrow_logits():
    sure, wrong = torch.tensor([[900.0, 0, 0]]), torch.tensor([[0, 0, 900.0]], requires_grad=True)
    value = hta_kl_loss(wrong, sure, 1.0)
    (grad,) = torch.autograd.grad(value, wrong)
    assert value.isfinite() and grad.isfinite().all()
    s, v = (x.detach().bfloat16() for x in case())
    assert hta_kl_loss(s, v).dtype == torch.float32
    torch.testing.assert_close(hta_kl_loss(s, v), hta_kl_loss(s.float(), v.float()))


def test_builder():
    student, teacher = toy_student(), toy_teacher()
    plan = hta_kl(student, teacher)
    assert {k: w for k, (w, _) in plan.loss.items()} == {"ce": 1.0, "hta_kl": 1.0}
    term = plan.loss["hta_kl"][1]
    assert isinstance(term, HTAKL) and isinstance(plan.loss["ce"][1], CE)
    assert (term.tau, term.delta, term.time, term.scope, term.weight_grad) == (2.0, 0.5, "mean", "all", False)
    build = partial(hta_kl, weight=0.3, tau=1.7, delta=0.8, time="per_step", scope="region", weight_grad=True)
    weight, term = build(student, teacher).loss["hta_kl"]
    assert isinstance(term, HTAKL) and weight == 0.3
    assert (term.tau, term.delta, term.time, term.scope, term.weight_grad) == (1.7, 0.8, "per_step", "region", True)
    z = torch.randn(1, 5, 6, dtype=D)
    v = torch.randn(5, 6, dtype=D)
    torch.testing.assert_close(term(step_of(z, v)), hta_kl_loss(z[0], v, 1.7, 0.8, "region"))
    (grad,) = torch.autograd.grad(term(step_of(z.requires_grad_(), v)), z)
    (expected,) = torch.autograd.grad(hta_kl_loss(z[0], v, 1.7, 0.8, "region", True), z)
    torch.testing.assert_close(grad, expected)
    assert set(hta_kl(student, teacher, weight=0).loss) == {"ce"}
