"""STDS: the map, the curves by their values, and a run of the optimiser against loops over numbers."""

import copy
from functools import partial
from math import pi, sin
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill.core.fit import Stage, fit, parameter_groups
from spikedistill.core.taps import infer
from spikedistill.methods import bkd
from spikedistill.optim import SGDSTDS, STDS, sparsity
from spikedistill.optim.stds import CURVES, soft_threshold
from tests.methods.toy import toy_batch, toy_student, toy_teacher

D = torch.float64


def test_soft_threshold():
    theta = torch.linspace(-2, 2, 41, dtype=D)
    w = soft_threshold(theta, 0.55)
    for a, b in zip(theta.tolist(), w.tolist()):
        assert b == pytest.approx(max(abs(a) - 0.55, 0) * (1 if a > 0 else -1))
    assert torch.equal(soft_threshold(theta, 0.0), theta)
    assert torch.equal(soft_threshold(-theta, 0.55), -w) and (w.diff() >= 0).all()
    zeros = [(soft_threshold(theta, d / 4) == 0).sum() for d in range(6)]
    assert zeros == sorted(zeros) and zeros[0] < zeros[-1]


def test_curves():
    sine, linear = CURVES["sine"], CURVES["linear"]
    assert [sine(p) for p in (0, 0.5, 1)] == pytest.approx([0, 0.5, 1]) and sine(0.25) == pytest.approx(0.1464466)
    for end in (0.0, 1.0):
        assert abs(sine(end + 1e-4) - sine(end - 1e-4)) < 1e-7
    assert [linear(p) for p in (0, 0.3, 1)] == [0, 0.3, 1] and CURVES["constant"](0.0) == 1


def weights(n=5):
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(n, 3, dtype=D))


@pytest.mark.parametrize("curve", ["sine", "linear", "constant"])
def test_updates_on_sgd_in_loops(curve):
    w, grads = weights(), [torch.randn(5, 3, dtype=D) for _ in range(6)]
    theta = [v + (0.7 if curve == "constant" else 0) * (1 if v > 0 else -1) for v in w.flatten().tolist()]
    optimiser = SGDSTDS([w], lr=0.3, momentum=0.5, weight_decay=0.1, threshold=0.7, curve=curve, updates=4)
    velocity = [0.0] * 15
    for n, grad in enumerate(grads, 1):
        w.grad = grad.clone()
        optimiser.step()
        p = min(1, n / 4)
        d = 0.7 * {"sine": (1 + sin(pi * (p - 0.5))) / 2, "linear": p, "constant": 1}[curve]
        for i, g in enumerate(grad.flatten().tolist()):
            g += 0.1 * theta[i]
            velocity[i] = g if n == 1 else 0.5 * velocity[i] + g
            theta[i] -= 0.3 * velocity[i]
        expected = [max(abs(t) - d, 0) * (1 if t > 0 else -1) for t in theta]
        assert w.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    assert 0 < (w == 0).sum() < 15


def test_updates_on_adam_are_adam_on_the_spines():
    w, spines = weights(), weights()
    optimiser, adam = STDS([w], lr=0.05, threshold=0.4, updates=10), torch.optim.Adam([spines], lr=0.05)
    for _ in range(10):
        w.grad = spines.grad = torch.randn(5, 3, dtype=D)
        optimiser.step()
        adam.step()
    torch.testing.assert_close(w.detach(), soft_threshold(spines.detach(), 0.4))


def test_without_a_threshold_it_is_adam():
    w, v = weights(), weights()
    optimiser, adam = STDS([w], lr=0.05, threshold=0.0, updates=3), torch.optim.Adam([v], lr=0.05)
    for _ in range(5):
        w.grad = v.grad = torch.randn(5, 3, dtype=D)
        optimiser.step()
        adam.step()
    assert torch.equal(w, v)


@pytest.mark.parametrize("straight_through", [True, False])
def test_a_silent_synapse_comes_back_after_the_expected_number_of_steps(straight_through):
    w = nn.Parameter(torch.tensor([[0.1, 3.0]], dtype=D))
    optimiser = SGDSTDS([w], lr=0.1, threshold=1.0, curve="linear", updates=1, straight_through=straight_through)
    w.grad = torch.zeros(1, 2, dtype=D)
    optimiser.step()
    assert w.tolist() == [[0, 2]]
    back = None
    for n in range(1, 13):
        w.grad = torch.tensor([[-1.0, -1.0]], dtype=D)
        optimiser.step()
        assert w[0, 1].item() == pytest.approx(2 + 0.1 * n)
        if back is None and w[0, 0] > 0:
            back = n
    # 0.1 + 0.1 n > 1
    assert back == (10 if straight_through else None)


def test_constant_curve_starts_with_the_weights_as_they_were():
    w = weights()
    before = w.detach().clone()
    optimiser = STDS([w], lr=0.1, threshold=2.0, curve="constant", updates=5)
    assert torch.equal(w, before)
    w.grad = torch.zeros(5, 3, dtype=D)
    optimiser.step()
    torch.testing.assert_close(w.detach(), before)


def test_one_threshold_for_all_layers_and_none_for_the_rest():
    model = toy_student()
    optimiser = STDS(parameter_groups(model), lr=1e-3, threshold=0.05, updates=4)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimiser.step()
    d = 0.05 * (1 + sin(pi * 0.25)) / 2
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), soft_threshold(start[name], d) if p.ndim > 1 else start[name])
    assert 0 < sparsity(model) < 1
    zeros = sum((p == 0).sum().item() for p in model.parameters() if p.ndim > 1)
    assert sparsity(model) == pytest.approx(zeros / (5 * 2 * 9 + 6 * 5 * 9 + 4 * 6))


def test_prune_names_the_parameters():
    student, head = nn.Linear(3, 3), nn.Linear(3, 3)
    groups = parameter_groups(nn.ModuleList([student, head]))
    optimiser = STDS(groups, lr=1e-9, threshold=9.0, updates=1, prune=[p for p in student.parameters() if p.ndim > 1])
    for p in (*student.parameters(), *head.parameters()):
        p.grad = torch.ones_like(p)
    optimiser.step()
    assert sparsity(student) == 1 and sparsity(head) == 0 and student.bias.abs().min() > 0


@pytest.mark.parametrize("kind", [STDS, SGDSTDS])
def test_parameters_without_a_gradient_wait(kind):
    w, v = weights(), weights(2)
    optimiser = kind([w, v], lr=0.1, threshold=0.5, updates=2)
    before = v.detach().clone()
    for step in range(4):
        w.grad, v.grad = torch.zeros_like(w), torch.zeros_like(v) if step > 1 else None
        optimiser.step()
        if step < 2:
            assert torch.equal(v, before)
    # the spines of a late one start above the threshold of that time, so that its weights start as they were
    torch.testing.assert_close(v.detach(), before)
    v.grad = torch.ones_like(v)
    optimiser.step()
    if kind is SGDSTDS:
        torch.testing.assert_close(v.detach(), soft_threshold(before + 0.5 * before.sign() - 0.1, 0.5))


def test_closures_see_the_weights():
    w = nn.Parameter(torch.tensor([[2.0, 0.1]], dtype=D))
    optimiser, seen = SGDSTDS([w], lr=0.1, threshold=0.5, curve="linear", updates=1), []

    def closure():
        seen.append(w.tolist())
        loss = w.sum()
        optimiser.zero_grad()
        loss.backward()
        return loss

    losses = [optimiser.step(closure).item() for _ in range(2)]
    assert seen == [[[2.0, 0.1]], [[pytest.approx(1.4), 0.0]]] and losses == pytest.approx([2.1, 1.4])


def test_state_goes_on_to_the_bit():
    grads = [torch.randn(5, 3, dtype=D) for _ in range(6)]

    def run(w, optimiser, some):
        for grad in some:
            w.grad = grad.clone()
            optimiser.step()

    w = weights()
    make = partial(STDS, lr=0.05, threshold=0.4, updates=6)
    whole = make([w])
    run(w, whole, grads[:3])
    v = nn.Parameter(w.detach().clone())
    rest = make([v])
    rest.load_state_dict(copy.deepcopy(whole.state_dict()))
    run(w, whole, grads[3:])
    run(v, rest, grads[3:])
    assert torch.equal(w, v) and (w == 0).any()


@pytest.mark.parametrize("kind, how", [(STDS, {"lr": 1e-2}), (SGDSTDS, {"lr": 0.1, "momentum": 0.9})])
def test_in_the_loop_with_bkd(kind, how, tmp_path):
    """The student that comes out, its checkpoint and a plain layer with its weights have the zeros."""
    student, batch = toy_student(), toy_batch()
    plan = bkd(student, toy_teacher())
    adapter: Any = plan.loss["bkd"][1]
    mine = [p for p in student.parameters() if p.ndim > 1]
    optim = partial(kind, threshold=0.3, updates=6, prune=mine, **how)
    stage = Stage([batch] * 3, **vars(plan), epochs=2, optim=optim, select="last")
    fit(stage, tmp_path, progress=False)
    assert sparsity(student) > 0.1 and sparsity(adapter) == 0
    plain = toy_student(seed=5)
    plain.load_state_dict(student.state_dict())
    assert torch.equal(infer(plain, batch["x"]).logits, infer(student, batch["x"]).logits)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optim"]
    assert saved["param_groups"][0]["done"] == 6 and saved["param_groups"][0]["initial_lr"] == how["lr"]


def test_mistakes_are_said():
    wrong: Any = "sin"
    with pytest.raises(ValueError, match="curve='sin' is unknown; valid: sine, linear, constant"):
        STDS([weights()], updates=3, curve=wrong)
    with pytest.raises(ValueError, match="updates=0"):
        STDS([weights()], updates=0)
