"""Distilling Spikes: the three losses in loops, their identities, and which outputs the method takes."""

import copy
from math import exp, log
from typing import Any

import pytest
import torch

from spikedistill.core.fit import Stage, Trainee, fit
from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.methods import distilling_spikes, kd
from spikedistill.methods.distilling_spikes import (
    Spikes,
    Task,
    default_window,
    full_loss,
    soft_loss,
    window_loss,
    windows,
)
from spikedistill.models.small import small
from spikedistill.models.vggsnn import plif_net
from spikedistill.spec import SpecError
from tests.methods.toy import toy_batch, toy_student, toy_teacher

D = torch.float64


def trains(steps=7, batch=3, classes=4, seed=0, share=0.5):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(steps, batch, classes, generator=g, dtype=D) < share).to(D)


def windows_in_loops(x, w, stride):
    count = (len(x) - w) // stride + 1
    return [[[sum(x[j * stride + i][b][k] for i in range(w)) / w for k in range(len(x[0][0]))]
             for b in range(len(x[0]))] for j in range(count)]  # fmt: skip


def flat(rows):
    return [v for row in rows for v in (flat(row) if isinstance(row, list) else [row])]


def window_loss_in_loops(s, t, w, stride):
    a, b = windows_in_loops(s.tolist(), w, stride), windows_in_loops(t.tolist(), w, stride)
    values = [(p - q) ** 2 for p, q in zip(flat(a), flat(b))]
    return sum(values) / len(values)


def kl_in_loops(s, t, tau):
    def softmax(z):
        total = sum(exp(v / tau) for v in z)
        return [exp(v / tau) / total for v in z]

    total = 0.0
    for a, b in zip(s, t):
        total += sum(p * (log(p) - log(q)) for p, q in zip(softmax(b), softmax(a)))
    return tau**2 * total / len(s)


def step_of(s, t, y=None, progress=0.0):
    return Step({} if y is None else {"y": y}, {"student": Output(s), "teacher": Output(t)}, progress)


@pytest.mark.parametrize(("w", "stride"), [(1, 1), (3, 1), (3, 2), (4, 3), (7, 1)])
def test_windows_in_loops(w, stride):
    s, t = trains(), trains(seed=1, share=0.3)
    assert len(windows(s, w, stride, 7)) == (7 - w) // stride + 1
    assert windows(s, w, stride, 7).flatten().tolist() == pytest.approx(flat(windows_in_loops(s.tolist(), w, stride)))
    assert window_loss(s, t, w, stride).item() == pytest.approx(window_loss_in_loops(s, t, w, stride), rel=1e-12)
    summed = window_loss(s, t, w, stride, "sum").item()
    assert summed == pytest.approx(w**2 * window_loss_in_loops(s, t, w, stride), rel=1e-12)


def test_by_hand():
    s = torch.tensor([[[1.0]], [[0]], [[1]], [[1]]], dtype=D)
    t = torch.tensor([[[0.0]], [[1]], [[1]], [[0]]], dtype=D)
    assert full_loss(s, t).item() == 0.75  # 3 of 4 entries differ
    # windows of two steps: 1/2 1/2 1 and 1/2 1 1/2
    assert window_loss(s, t, 2).item() == pytest.approx((0.25 + 0.25) / 3)
    assert window_loss(s, t, 4).item() == pytest.approx((3 / 4 - 2 / 4) ** 2)
    # counts (2, 0) and (1, 1) at tau 1: KL of (1/2, 1/2) from softmax(2, 0)
    s, t = torch.tensor([[[1.0, 0]], [[1, 0]]], dtype=D), torch.tensor([[[1.0, 0]], [[0, 1]]], dtype=D)
    q = 1 / (1 + exp(-2))
    assert soft_loss(s, t, 1.0).item() == pytest.approx(log(0.5) - 0.5 * log(q) - 0.5 * log(1 - q))


@pytest.mark.parametrize("tau", [1.0, 3.5])
def test_soft_in_loops(tau):
    s, t = trains(), trains(seed=1, share=0.3)
    a, b = (x.sum(0).tolist() for x in (s, t))
    assert soft_loss(s, t, tau).item() == pytest.approx(kl_in_loops(a, b, tau), rel=1e-9)
    a, b = (windows_in_loops(x.tolist(), 3, 2) for x in (s, t))
    a, b = ([[3 * v for v in row] for window in x for row in window] for x in (a, b))
    assert soft_loss(s, t, tau, True, 3, 2).item() == pytest.approx(kl_in_loops(a, b, tau), rel=1e-9)
    assert soft_loss(s, t, tau).item() != pytest.approx(soft_loss(t, s, tau).item(), rel=1e-3)


def test_identities():
    s, t = trains(), trains(seed=1, share=0.3)
    assert full_loss(s, t).item() == pytest.approx((s != t).double().mean().item(), rel=1e-12)
    assert window_loss(s, t, 1).item() == pytest.approx(full_loss(s, t).item(), rel=1e-12)
    assert window_loss(s, t, 7).item() == pytest.approx((s.mean(0) - t.mean(0)).square().mean().item(), rel=1e-12)
    for loss in (full_loss, window_loss, lambda a, b: soft_loss(a, b, 2.0)):
        assert loss(s, s) == 0 and loss(s, t) > 0
    assert soft_loss(s, t, 1e6) / 1e12 < 1e-10  # uniform at a high temperature
    one_more = t + torch.ones_like(t) / 7
    assert soft_loss(s, one_more, 2.0).item() == pytest.approx(soft_loss(s, t, 2.0).item(), rel=1e-9)


def test_the_order_of_time_matters_to_trains_and_short_windows_alone():
    s, t, order = trains(), trains(seed=1), torch.tensor([3, 1, 0, 6, 5, 2, 4])
    assert window_loss(s[order], t, 7).item() == pytest.approx(window_loss(s, t, 7).item(), rel=1e-12)
    assert soft_loss(s[order], t, 2.0).item() == pytest.approx(soft_loss(s, t, 2.0).item(), rel=1e-12)
    assert abs(full_loss(s[order], t) - full_loss(s, t)) > 1e-3
    assert abs(window_loss(s[order], t, 3) - window_loss(s, t, 3)) > 1e-4


def test_a_delay_costs_less_in_windows():
    s = torch.zeros(9, 1, 1, dtype=D)
    s[4] = 1
    assert window_loss(s, s.roll(1, 0), 3) < full_loss(s, s.roll(1, 0)) / 2


def test_a_window_longer_than_time_and_the_default():
    with pytest.raises(ValueError, match=r"window=8.*7 time steps"):
        window_loss(trains(), trains(), 8)
    assert [default_window(n) for n in (1, 2, 4, 10, 20)] == [1, 2, 2, 2, 4]
    s, t = trains(20), trains(20, seed=1)
    assert window_loss(s, t) == window_loss(s, t, 4)
    assert soft_loss(s, t, 2.0, per_window=True) == soft_loss(s, t, 2.0, True, 4)


def test_a_teacher_of_another_number_of_steps():
    s, t = trains(6), trains(3, seed=1)
    held = t.repeat_interleave(2, 0)  # the same train in steps half as long
    assert window_loss(s, t, 3, 2).item() == pytest.approx(window_loss(s, held, 3, 2).item(), rel=1e-12)
    assert soft_loss(s, t, 3.0).item() == pytest.approx(soft_loss(s, held, 3.0).item(), rel=1e-12)
    assert soft_loss(s, t, 3.0, True, 2).item() == pytest.approx(soft_loss(s, held, 3.0, True, 2).item(), rel=1e-12)
    long = trains(9, seed=2)  # a step of the student is one and a half of the teacher
    first = (long[0] + long[1] / 2) / 1.5
    torch.testing.assert_close(windows(long, 1, 1, 6)[0], first)
    with pytest.raises(ValueError, match="student has 6 time steps, the teacher 3"):
        full_loss(s, t)


@pytest.mark.parametrize("loss", [full_loss, window_loss, lambda s, t: soft_loss(s, t, 3.0)])
def test_no_gradient_to_the_teacher(loss):
    s, t = trains().requires_grad_(), trains(seed=1).requires_grad_()
    grad, none = torch.autograd.grad(loss(s, t), [s, t], allow_unused=True)
    assert none is None and grad.abs().max() > 0


def test_scale_is_the_number_of_classes_unless_given():
    s, t = trains(), trains(seed=1)
    assert Spikes(full_loss, None)(step_of(s, t)).item() == pytest.approx(4 * full_loss(s, t).item())
    assert Spikes(full_loss, 0.3)(step_of(s, t)).item() == pytest.approx(0.3 * full_loss(s, t).item())
    assert Spikes(soft_loss, tau=3.0)(step_of(s, t)).item() == pytest.approx(soft_loss(s, t, 3.0).item())


def test_task_on_counts_or_rates():
    s, y = trains(), torch.tensor([0, 2, 1])
    counts, total = s.sum(0).tolist(), 0.0
    for c, k in zip(counts, y.tolist()):
        total += log(sum(exp(v) for v in c)) - c[k]
    assert Task()(step_of(s, s, y)).item() == pytest.approx(total / 3)
    rates = [(c[k] / 7 - (k == label)) ** 2 for c, label in zip(counts, y.tolist()) for k in range(4)]
    assert Task("mse")(step_of(s, s, y)).item() == pytest.approx(sum(rates) / 12)
    hot = torch.nn.functional.one_hot(y, 4).to(D)
    for kind in ("ce", "mse"):
        assert Task(kind)(step_of(s, s, hot)).item() == pytest.approx(Task(kind)(step_of(s, s, y)).item())


def spiking(seed, widths=(5, 6), steps=4):
    torch.manual_seed(seed)
    return small(4, 2, steps, widths=widths, neuron="lif(v_th=0.2)", head="spiking")


def test_total_is_the_weighted_sum():
    student, teacher, batch = spiking(0), spiking(1, (5, 7)), toy_batch()
    how: dict[str, Any] = dict(alpha=0.3, full=0.5, sliding=2.0, soft=0.7, window=3, scale=5.0, tau=3.0, task="mse")
    plan = distilling_spikes(student, teacher, **how)
    assert {p.x for p in plan.passes.values()} == {"x"}  # one draw of the input for both
    trainee = Trainee(Stage([batch], **vars(plan))).eval()
    s, t = student(batch["x"]), teacher(batch["x"])
    assert 0 < s.mean() < 1 and s.shape == (4, 4, 4)
    distilled = 5 * (0.5 * full_loss(s, t) + 2 * window_loss(s, t, 3)) + 0.7 * soft_loss(s, t, 3.0)
    expected = 0.7 * Task("mse")(step_of(s, t, batch["y"])) + 0.3 * distilled
    torch.testing.assert_close(trainee(batch, 0.0)[0], expected)


def test_windows_reach_the_terms_from_the_settings():
    student, teacher, batch = spiking(0), spiking(1, (5, 7)), toy_batch()
    how: dict[str, Any] = dict(alpha=1.0, sliding=0.5, window=2, stride=2, reduction="sum", per_window=True, tau=1.5)
    trainee = Trainee(Stage([batch], **vars(distilling_spikes(student, teacher, **how)))).eval()
    s, t = student(batch["x"]), teacher(batch["x"])
    expected = 0.5 * 4 * window_loss(s, t, 2, 2, "sum") + soft_loss(s, t, 1.5, True, 2, 2)
    torch.testing.assert_close(trainee(batch, 0.0)[0], expected)
    assert window_loss(s, t, 2, 2) != window_loss(s, t, 2, 1)


def test_alpha_takes_terms_away():
    student, teacher = spiking(0), spiking(1)
    assert set(distilling_spikes(student, teacher, alpha=0.0).loss) == {"spikes_task"}
    assert set(distilling_spikes(student, teacher, alpha=1.0, full=1.0).loss) == {"spikes_full", "spikes_soft"}


def test_outputs_that_are_not_spikes_are_refused_at_the_start():
    plan = distilling_spikes(toy_student(), toy_teacher())
    trainee = Trainee(Stage([toy_batch()], **vars(plan)))
    with pytest.raises(ValueError, match=r"student are not spikes.*potential"):
        trainee(toy_batch(), 0.0)
    with pytest.raises(ValueError, match="student are not spikes"):
        trainee.eval()(toy_batch(), 0.5)
    objective, ones = Spikes(full_loss), torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="teacher are not spikes"):
        objective(step_of(ones, ones / 2))
    assert objective(step_of(ones, ones / 2, progress=0.1)).item() == pytest.approx(0.25)


def test_potential_is_kd_of_the_time_mean():
    student, teacher = toy_student(), toy_teacher()
    ours = distilling_spikes(student, teacher, signal="potential", alpha=0.3, soft=0.5, tau=3.0)
    theirs = kd(student, teacher, ce=0.7, weight=0.15, tau=3.0)
    a, b = (Trainee(Stage([], **vars(plan))).eval()(toy_batch(), 0.5)[0] for plan in (ours, theirs))
    torch.testing.assert_close(a, b)
    mistakes: list[dict[str, Any]] = [dict(full=1.0), dict(sliding=1.0), dict(per_window=True), dict(task="mse")]
    for wrong in mistakes:
        with pytest.raises(ValueError, match="signal='spikes'"):
            distilling_spikes(student, teacher, signal="potential", **wrong)


def test_a_chain_trains_each_network_in_its_own_stage():
    """What was trained teaches as one that was loaded does: with its weights and running statistics, changing neither."""
    big, middle, student, batch = spiking(1, (8, 9)), spiking(5, (5, 7)), spiking(0, (4, 5)), toy_batch(8)
    first = [copy.deepcopy(m.state_dict()) for m in (big, middle, student)]

    def stage(small, large):
        fit(Stage([batch] * 3, **vars(distilling_spikes(small, large, alpha=0.8, sliding=1.0))), progress=False)

    def same(model, state):
        return all(torch.equal(x, state[name]) for name, x in model.state_dict().items())

    stage(middle, big)
    taught, fresh, other = copy.deepcopy(middle.state_dict()), spiking(9, (5, 7)), spiking(0, (4, 5))
    assert same(big, first[0]) and not same(middle, first[1])
    stage(student, middle)
    assert same(big, first[0]) and same(middle, taught) and not same(student, first[2])
    fresh.load_state_dict(taught)
    stage(other, fresh)
    assert same(student, other.state_dict())
    direct = spiking(0, (4, 5))
    stage(direct, big)
    assert not same(student, direct.state_dict())


@pytest.mark.parametrize(
    "how, wrong",
    [
        (dict(window=3, stride=2, reduction="sum", scale=5.0), ("scale", "reduction", "window", "stride")),
        (dict(full=1.0, reduction="sum", window=3), ("reduction", "window")),
        (dict(per_window=True, reduction="sum", scale=5.0), ("scale", "reduction")),
        (dict(soft=0.0, full=1.0, tau=3.0, per_window=True, window=2), ("tau", "per_window", "window")),
    ],
)
def test_settings_that_do_nothing_are_refused(how, wrong):
    with pytest.raises(SpecError) as error:
        distilling_spikes(spiking(0), spiking(1), **how)
    assert [m.split(":")[0] for m in error.value.mistakes] == [f"distilling_spikes.{name}" for name in wrong]


@pytest.mark.parametrize("signal", ["spikes", "potential"])
def test_a_loss_of_nothing_is_refused(signal):
    with pytest.raises(SpecError, match=r"distilling_spikes\.alpha: 1 takes the labels away"):
        distilling_spikes(spiking(0), spiking(1), alpha=1.0, soft=0.0, signal=signal)
    assert distilling_spikes(spiking(0), spiking(1), alpha=0.9, soft=0.0, signal=signal).loss


def test_votes_are_averages_and_single_ones_are_spikes():
    x = {"x": torch.rand(2, 1, 8, 8), "y": torch.tensor([0, 1])}
    torch.manual_seed(0)
    for vote in (10, 1):
        how: dict[str, Any] = dict(classes=2, channels=1, steps=2, size=8, width=4, hidden=20, drop=0.0, vote=vote)
        student = plif_net(**how, neuron="plif(v_th=0.05)")
        trainee = Trainee(Stage([], **vars(distilling_spikes(student, student))))
        if vote == 1:
            assert trainee(x, 0.0)[0].isfinite()
            continue
        with pytest.raises(ValueError, match=r"not spikes: .*small\(head=spiking\) or plif_net\(vote=1\)"):
            trainee(x, 0.0)
