"""TET: golden values, the formula in loops, and where it meets cross-entropy of the time mean."""

from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.methods import tet
from spikedistill.methods.tet import spread, tet_loss
from tests.methods.toy import toy_student

D = torch.float64
Z = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D)
Y = torch.tensor([0])


def by_plan(z, y, **settings):
    step = Step({"y": y}, {"student": Output(z)})
    return sum(weight * objective(step) for weight, objective in tet(toy_student(), **settings).loss.values())


def in_loops(z, y, lam, phi):
    labels, square, (steps, batch, classes) = 0.0, 0.0, z.shape
    for t in range(steps):
        for b in range(batch):
            u = z[t, b].tolist()
            labels -= u[y[b]] - log(sum(exp(x) for x in u))
            square += sum((x - phi) ** 2 for x in u)
    return (1 - lam) * labels / (steps * batch) + lam * square / (steps * batch * classes)


def test_golden_values():  # numpy, z[0] = [2, 0, -1], z[1] = [0, 1, 0], label 0
    assert tet_loss(Z, Y, lam=0.0).item() == pytest.approx(0.860645, abs=1e-6)
    assert spread(Z, 1.0).item() == pytest.approx(1.333333, abs=1e-6)
    assert tet_loss(Z, Y).item() == pytest.approx(0.884280, abs=1e-6)
    assert by_plan(Z, Y).item() == pytest.approx(0.884280, abs=1e-6)


@pytest.mark.parametrize(("lam", "phi"), [(0.05, 1.0), (0.3, 0.4), (0.0, 1.0), (1.0, -0.7)])
def test_the_formula_in_loops(lam, phi):
    torch.manual_seed(0)
    z, y = torch.randn(5, 4, 3, dtype=D), torch.tensor([0, 2, 1, 2])
    expected = in_loops(z, y, lam, phi)
    assert tet_loss(z, y, lam, phi).item() == pytest.approx(expected, abs=1e-12)
    assert by_plan(z, y, lam=lam, phi=phi).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_soft_labels(lam):
    torch.manual_seed(0)
    z, y = torch.randn(5, 4, 3, dtype=D), torch.rand(4, 3, dtype=D)
    each = [F.cross_entropy(u, torch.full((4,), k), reduction="none") @ y[:, k] / 4 for u in z for k in range(3)]
    expected = (1 - lam) * sum(each).item() / 5 + lam * spread(z, 0.4).item()
    assert tet_loss(z, y, lam, 0.4).item() == pytest.approx(expected, abs=1e-12)
    assert by_plan(z, y, lam=lam, phi=0.4).item() == pytest.approx(expected, abs=1e-12)
    hot = F.one_hot(torch.tensor([0, 2, 1, 2]), 3).to(D)
    torch.testing.assert_close(tet_loss(z, hot, lam), tet_loss(z, torch.tensor([0, 2, 1, 2]), lam))


def test_no_less_than_the_loss_of_the_mean_and_equal_where_steps_agree():
    torch.manual_seed(1)
    z, y = torch.randn(6, 4, 3, dtype=D), torch.tensor([0, 2, 1, 2])
    assert tet_loss(z, y, lam=0.0) > F.cross_entropy(z.mean(0), y)
    same = z[:1].expand(6, 4, 3)
    torch.testing.assert_close(tet_loss(same, y, lam=0.0), F.cross_entropy(z[0], y))
