"""Distillation of logits: the golden value, the formula in loops, its gradient, and per step."""

from math import exp, log

import pytest
import torch

from spikedistill.core.output import Output
from spikedistill.core.plan import MergeError, merge
from spikedistill.core.step import Step
from spikedistill.functional import kd_loss
from spikedistill.methods import ce, kd
from spikedistill.spec import SpecError
from tests.methods.toy import toy_student, toy_teacher

D = torch.float64
Z = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D)
V = torch.tensor([[3.0, 1, -2]], dtype=D)


def loss(z, v, y, **settings):
    step = Step({"y": y}, {"student": Output(z), "teacher": Output(v)})
    terms = kd(toy_student(), toy_teacher(), **settings).loss.values()
    return torch.stack([weight * objective(step) for weight, objective in terms]).sum()


def softmax(z):
    exps = [exp(x) for x in z]
    return [x / sum(exps) for x in exps]


def in_loops(z, v, y, tau, weight, ce, per_step=False, counts=False):
    steps, batch, _ = z.shape
    value = 0.0
    for b in range(batch):
        mean = [sum(of) / (1 if counts else steps) for of in zip(*z[:, b].tolist())]
        target = softmax([sum(of) / (1 if counts else len(v)) / tau for of in zip(*v[:, b].tolist())])
        value -= ce * log(softmax(mean)[y[b]])
        for u in z[:, b].tolist() if per_step else [mean]:
            q = softmax([x / tau for x in u])
            kl = sum(p * log(p / own) for p, own in zip(target, q))
            value += weight * tau**2 * kl / (steps if per_step else 1)
    return value / batch


def test_golden_value():  # numpy: KL at temperature 2 of [3, 1, -2] from the time mean [1, 0.5, -0.5] is 0.150552
    assert kd_loss(Z.mean(0), V, 2.0).item() == pytest.approx(0.602209, abs=1e-6)
    shifted = Z.mean(0) + 3.0
    assert kd_loss(shifted, Z.mean(0), 2.0).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize(("tau", "weight", "ce"), [(4.0, 1.0, 1.0), (2.5, 0.7, 0.3), (1.0, 2.0, 0.0)])
def test_the_formula_in_loops(tau, weight, ce, per_step):
    torch.manual_seed(0)
    z, v, y = torch.randn(5, 4, 3, dtype=D), torch.randn(2, 4, 3, dtype=D), torch.tensor([0, 2, 1, 2])
    found = loss(z, v, y, tau=tau, weight=weight, ce=ce, per_step=per_step).item()
    assert found == pytest.approx(in_loops(z, v, y.tolist(), tau, weight, ce, per_step), abs=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_counts_in_loops(steps):
    torch.manual_seed(0)
    z, v, y = torch.randn(5, 4, 3, dtype=D), torch.randn(steps, 4, 3, dtype=D), torch.tensor([0, 2, 1, 2])
    found = loss(z, v, y, tau=2.5, weight=0.7, ce=0.3, counts=True).item()
    assert found == pytest.approx(in_loops(z, v, y.tolist(), 2.5, 0.7, 0.3, counts=True), abs=1e-12)


def test_counts_by_hand():
    """Spike counts (2, 0) of the student and (1, 1) of the teacher at temperature 1; rates would be (1, 0), (.5, .5)."""
    z, v = torch.tensor([[[1.0, 0]], [[1, 0]]], dtype=D), torch.tensor([[[1.0, 0]], [[0, 1]]], dtype=D)
    q = 1 / (1 + exp(-2))
    expected = log(0.5) - 0.5 * log(q) - 0.5 * log(1 - q) - log(q)
    assert loss(z, v, torch.tensor([0]), tau=1.0, counts=True).item() == pytest.approx(expected, rel=1e-12)


def test_counts_are_of_whole_trains_and_labels_of_counts_are_other_labels():
    student, teacher = toy_student(), toy_teacher()
    with pytest.raises(SpecError, match=r"kd\.counts: .*per_step"):
        kd(student, teacher, counts=True, per_step=True)
    plan = kd(student, teacher, counts=True)
    assert merge(ce(student, counts=True), plan).loss.keys() == {"ce", "kd"}
    for other in (ce(student), kd(student, teacher)):
        with pytest.raises(MergeError, match="counts=True"):
            merge(other, plan)


def test_gradient():
    torch.manual_seed(1)
    z, v, tau = torch.randn(4, 3, dtype=D, requires_grad=True), torch.randn(4, 3, dtype=D, requires_grad=True), 2.5
    kd_loss(z, v, tau).backward()
    torch.testing.assert_close(z.grad, tau * ((z / tau).softmax(-1) - (v / tau).softmax(-1)).detach() / 4)
    assert v.grad is None
