"""Cross-entropy: the golden value, and in loops the time mean, the counts and the smoothed labels."""

from math import exp, log

import pytest
import torch

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.methods import ce
from tests.methods.toy import toy_student

D = torch.float64
Z = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D)


def loss(z, y, **settings):
    ((weight, objective),) = ce(toy_student(), **settings).loss.values()
    return (weight * objective(Step({"y": y}, {"student": Output(z)}))).item()


def in_loops(z, y, smoothing=0.0, counts=False):
    value, (steps, batch, classes) = 0.0, z.shape
    for b in range(batch):
        u = [sum(z[t, b, k].item() for t in range(steps)) / (1 if counts else steps) for k in range(classes)]
        log_sum = log(sum(exp(x) for x in u))
        for k in range(classes):
            target = (1 - smoothing) * (k == y[b].item()) + smoothing / classes
            value -= target * (u[k] - log_sum)
    return value / batch


def test_golden_value():  # numpy, z[0] = [2, 0, -1], z[1] = [0, 1, 0], label 0
    assert loss(Z, torch.tensor([0])) == pytest.approx(0.604131, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.13])
@pytest.mark.parametrize("counts", [False, True])
def test_the_formula_in_loops(smoothing, counts):
    torch.manual_seed(0)
    z, y = torch.randn(5, 4, 3, dtype=D), torch.tensor([0, 2, 1, 2])
    expected = in_loops(z, y, smoothing, counts)
    assert loss(z, y, label_smoothing=smoothing, counts=counts) == pytest.approx(expected, abs=1e-12)


def test_counts_of_spikes():
    spikes = torch.zeros(4, 1, 3)
    spikes[:, 0, 1], spikes[:2, 0, 0] = 1, 1  # counts 2, 4, 0
    z = [exp(2.0), exp(4.0), 1.0]
    assert loss(spikes, torch.tensor([1]), counts=True) == pytest.approx(-log(z[1] / sum(z)), abs=1e-6)
