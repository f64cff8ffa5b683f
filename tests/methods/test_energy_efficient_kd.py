"""Two temperatures: golden values, the formula in loops, where it is zero, and the spikes counted."""

from functools import partial
from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.core.taps import call
from spikedistill.functional import kd_loss
from spikedistill.methods import energy_efficient_kd
from spikedistill.methods.energy_efficient_kd import Spikes, TwoTemperatures, spike_rate, two_temperature_loss
from spikedistill.report.activity import activity
from spikedistill.spec import SpecError
from tests.methods.toy import toy_batch, toy_student, toy_teacher

D = torch.float64
S, V = torch.tensor([[1.0, 0.5, -0.5]], dtype=D), torch.tensor([[3.0, 1, -2]], dtype=D)
FACTOR = {"product": lambda s, t: s * t, "student_squared": lambda s, t: s * s, "student": lambda s, t: s}


def softmax(z):
    exps = [exp(v) for v in z]
    return [v / sum(exps) for v in exps]


def test_golden_values():
    o = S.clone().requires_grad_()
    value = two_temperature_loss(o, V, 2.0, 4.0)
    assert value.item() == pytest.approx(0.139949, abs=1e-6) and value.item() / 8 == pytest.approx(0.0174936, abs=1e-7)
    assert torch.autograd.grad(value, o)[0][0].tolist() == pytest.approx([-0.336153, 0.102212, 0.233940], abs=1e-6)


@pytest.mark.parametrize("scale", [*FACTOR])
def test_in_loops(scale):
    torch.manual_seed(0)
    z, v = torch.randn(3, 4, 5, dtype=D) * 2, torch.randn(2, 4, 5, dtype=D) * 2
    expected = 0.0
    for b in range(4):
        p = softmax([sum(z[t, b, k].item() for t in range(3)) / 3 / 1.5 for k in range(5)])
        q = softmax([sum(v[t, b, k].item() for t in range(2)) / 2 / 6.0 for k in range(5)])
        expected += FACTOR[scale](1.5, 6.0) * sum(a * log(a / c) for a, c in zip(q, p)) / 4
    step = Step({}, {"student": Output(z), "teacher": Output(v)})
    assert TwoTemperatures(1.5, 6.0, scale)(step).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale, size", [("product", 6.0), ("student_squared", 1.5), ("student", 1.0)])
def test_gradient_and_its_size(scale, size):
    o, v = torch.randn(4, 5, dtype=D, requires_grad=True), torch.randn(4, 5, dtype=D, requires_grad=True)
    grad, none = torch.autograd.grad(two_temperature_loss(o, v, 1.5, 6.0, scale), [o, v], allow_unused=True)
    assert none is None
    torch.testing.assert_close(grad, (size * (torch.softmax(o / 1.5, -1) - torch.softmax(v / 6, -1)) / 4).detach())


def test_equal_temperatures_are_distillation():
    o, v = torch.randn(4, 5, dtype=D), torch.randn(4, 5, dtype=D)
    torch.testing.assert_close(two_temperature_loss(o, v, 3.5, 3.5), kd_loss(o, v, 3.5))


def test_zero_at_the_scaled_teacher_alone():
    v = torch.randn(4, 5, dtype=D)
    assert two_temperature_loss(0.25 * v + torch.randn(4, 1, dtype=D), v, 2.0, 8.0).abs() < 1e-12
    assert two_temperature_loss(v, v, 2.0, 8.0) > 1e-2


def test_the_minimum_is_smaller_by_the_ratio_of_temperatures():
    v = torch.tensor([[3.0, 0.5, -2]])
    sizes = []
    for tau in (8.0, 2.0):
        o = torch.zeros(1, 3, requires_grad=True)
        optim = torch.optim.Adam([o], 0.05)
        for _ in range(600):
            optim.zero_grad()
            two_temperature_loss(o, v, tau, 8.0).backward()
            optim.step()
        sizes.append((o - o.mean()).norm().item())
    assert sizes[1] / sizes[0] == pytest.approx(0.25, rel=1e-2)


def test_spikes_in_loops():
    torch.manual_seed(0)
    layers = [(torch.rand(3, 2, *shape) < 0.4).double() for shape in ((2, 3, 3), (5,))]
    rates = []
    for b in range(2):
        fired = sum(s[t, b].flatten().tolist().count(1.0) for s in layers for t in range(3))
        rates.append(fired / (3 * (18 + 5)))
    assert spike_rate(layers).item() == pytest.approx(sum(rates) / 2, rel=1e-9)
    assert spike_rate(layers, squared=True).item() == pytest.approx(sum(r * r for r in rates) / 2, rel=1e-9)
    assert spike_rate([torch.zeros(2, 3, 4)]) == 0 and spike_rate([torch.ones(2, 3, 4)], True) == 1


def test_spikes_of_the_student_are_what_the_report_counts():
    student, batch = toy_student(), toy_batch()
    plan: Any = energy_efficient_kd(student, toy_teacher(), spikes=0.3)
    weight, term = plan.loss["spikes"]
    assert weight == 0.3 and isinstance(term, Spikes) and term.taps == {"student": ["stem.neuron", "stage2.1.neuron"]}
    student.eval()
    value = term(Step(batch, {"student": call(student, batch["x"], taps=term.taps["student"])}))
    assert value.item() == pytest.approx(activity(student, [batch])["rate"], abs=1e-6) and 0 < value < 1
    value.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.stem.parameters())


def test_terms_and_weights():
    build: Any = partial(energy_efficient_kd, toy_student(), toy_teacher())
    loss = build().loss
    assert {k: w for k, (w, _) in loss.items()} == {"ce": 0.5, "energy_efficient_kd": 0.5}
    assert (loss["energy_efficient_kd"][1].tau_student, loss["energy_efficient_kd"][1].tau_teacher) == (2.0, 8.0)
    loss = build(alpha=0.7, ce_temperature=2.5, spikes=0.1, squared=True, tau_student=3.0, scale="student").loss
    assert {k: w for k, (w, _) in loss.items()} == pytest.approx(
        {"ce_softened": 0.3, "energy_efficient_kd": 0.7, "spikes": 0.1}
    )
    assert loss["spikes"][1].squared and loss["energy_efficient_kd"][1].scale == "student"
    z, y = torch.randn(3, 4, 5, dtype=D), torch.tensor([0, 1, 4, 2])
    torch.testing.assert_close(
        loss["ce_softened"][1](Step({"y": y}, {"student": Output(z)})), F.cross_entropy(z.mean(0) / 2.5, y)
    )


def test_odd_settings_are_told():
    with pytest.warns(UserWarning, match="tau_student > tau_teacher"):
        energy_efficient_kd(toy_student(), toy_teacher(), tau_student=9.0)
    with pytest.raises(SpecError, match=r"spikes: the student \(Small\) has no spiking neuron"):
        energy_efficient_kd(toy_teacher(), toy_teacher(), spikes=0.1)
