"""TSSD: golden values, both terms in loops, who gets which gradient, and the longer run."""

from math import exp, log
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill.core.fit import Stage, Trainee, fit
from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.core.taps import TapError, call, infer
from spikedistill.methods import tssd
from spikedistill.methods.tssd import Spatial, Temporal, WeakLabels, lengthened, spatial_loss, temporal_loss
from spikedistill.spec import SpecError
from tests.methods.toy import toy_batch, toy_student, toy_teacher

D = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def kl_in_loops(target, z, tau):
    def softmax(x):
        total = sum(exp(v / tau) for v in x)
        return [exp(v / tau) / total for v in x]

    return tau**2 * sum(p * (log(p) - log(q)) for p, q in zip(softmax(target), softmax(z)))


def mean_in_loops(z, b):
    """The time mean of a sample's logits."""
    return [sum(z[t, b, c].item() for t in range(len(z))) / len(z) for c in range(z.shape[2])]


@pytest.mark.parametrize(("tau", "value"), [(1.0, 0.245891), (2.0, 0.279038), (4.0, 0.273413)])
def test_golden_values(tau, value):
    student, teacher = torch.tensor([[[2.0, 0, -1]]], dtype=D), torch.tensor([[[1, 0.5, -0.5]]], dtype=D)
    assert temporal_loss(student, teacher, tau).item() == pytest.approx(value, abs=1e-6)
    for target in ("step", "mean"):
        assert spatial_loss(student, teacher, tau, target).item() == pytest.approx(value, abs=1e-6)


def test_temporal_term_in_loops():
    short, long = rand(3, 5, 4), rand(7, 5, 4, seed=1)
    expected = sum(kl_in_loops(mean_in_loops(long, b), mean_in_loops(short, b), 3.5) for b in range(5)) / 5
    assert temporal_loss(short, long, 3.5).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("target", ["step", "mean"])
def test_spatial_term_in_loops(target):
    weak, final = rand(3, 5, 4), rand(3, 5, 4, seed=1)
    expected = 0.0
    for t in range(3):
        for b in range(5):
            aim = final[t, b].tolist() if target == "step" else mean_in_loops(final, b)
            expected += kl_in_loops(aim, weak[t, b].tolist(), 3.5) / 15
    assert spatial_loss(weak, final, 3.5, target).item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="shorter"):
        spatial_loss(weak, final[:2], 3.5)


def test_zero_where_both_say_the_same():
    z = rand(1, 5, 4)
    assert temporal_loss(z.expand(3, 5, 4), z.expand(6, 5, 4) + 1, 2.0).abs() < 1e-12
    final = rand(3, 5, 4)
    assert spatial_loss(final + 2, final, 2.0).abs() < 1e-12
    assert spatial_loss(final.mean(0).expand(3, 5, 4), final, 2.0, "mean").abs() < 1e-12
    order = torch.tensor([2, 0, 3, 1])
    other = rand(3, 5, 4, seed=2)
    torch.testing.assert_close(spatial_loss(other[..., order], final[..., order]), spatial_loss(other, final))
    assert spatial_loss(other, final) > 0 and temporal_loss(other, final) > 0


def test_nothing_flows_to_the_teaching_side():
    for loss in (temporal_loss, spatial_loss):
        z, target = rand(3, 5, 4).requires_grad_(), rand(3, 5, 4, seed=1).requires_grad_()
        grad, none = torch.autograd.grad(loss(z, target, 2.0), [z, target], allow_unused=True)
        assert none is None and grad.abs().max() > 0


def test_frames_of_the_longer_run():
    x = rand(4, 2, 2, 3, 3)
    one = lengthened({"x": x}, 3, 6)
    assert torch.equal(one["x"], x[:3]) and torch.equal(one["long"], x[[0, 1, 2, 3, 0, 1]])
    assert torch.equal(lengthened({"x": x[0]}, 3, 6)["long"], x[0])
    whole = lengthened({"x": x})
    assert torch.equal(whole["x"], x) and torch.equal(whole["long"], torch.cat([x, x]))
    with pytest.raises(ValueError, match="long: 3 will not do: it should be at least the 4 frames"):
        lengthened({"x": x}, None, 3)


def test_no_frame_is_left_out_unasked():
    recording = {"x": torch.rand(5, 2, 2, 8, 8)}
    seen = tssd(toy_student(5)).prepare(recording, 0.0)
    assert torch.equal(seen["x"], recording["x"]) and len(seen["long"]) == 10
    for steps in (2, 3, 8):  # the longer run would be no longer, or not twice as long
        with pytest.raises(SpecError, match=rf"samples have 5 frames, the student {steps} steps: say how many"):
            tssd(toy_student(steps)).prepare(recording, 0.0)
    assert len(tssd(toy_student(2), steps=2).prepare(recording, 0.0)["x"]) == 2
    student: Any = toy_student()
    del student.steps
    assert len(tssd(student).prepare(recording, 0.0)["long"]) == 10
    with pytest.raises(SpecError, match=r"tssd\.steps: Small does not say how many an image takes"):
        tssd(student).prepare(toy_batch(), 0.0)
    assert tssd(student, steps=2).prepare(toy_batch(), 0.0).keys() == {*toy_batch(), "long"}


def step_of_training(student, **settings) -> tuple[Any, Any, Any]:
    torch.manual_seed(3)
    plan = tssd(student, **settings)
    return plan, Trainee(Stage([toy_batch()], **vars(plan))), toy_batch()


@pytest.mark.parametrize("frames", [False, True])
def test_the_whole_step_in_its_parts(frames):
    """What the loop makes of the plan: the passes, their lengths and the weights."""
    student = toy_student(4).eval()
    settings = dict(alpha=0.7, beta=0.3, tau=3.0, steps=2, long=5, weak_ce=0.4, taps=("stage1",))
    plan, trainee, batch = step_of_training(student, **settings)
    if frames:
        batch |= {"x": torch.rand(4, 4, 2, 8, 8)}
    x, seen = batch["x"], trainee.prepare(batch, 0.1)
    total = trainee.eval()(batch, 0.1)[0]
    short = call(student, x[:2] if frames else x, None if frames else 2, ["stage1"])
    long = infer(student, x[[0, 1, 2, 3, 0]] if frames else x, None if frames else 5).logits
    assert short.logits.shape == (2, 4, 4) and long.shape == (5, 4, 4) and set(seen) == {*batch, "long"}
    linear = plan.loss["tssd_space"][1].heads[0].linear
    weak = linear(short.taps["stage1"].mean((3, 4)))
    expected = nn.functional.cross_entropy(short.logits.mean(0), batch["y"])
    expected += 0.7 * temporal_loss(short.logits, long, 3.0) + 0.3 * spatial_loss(weak, short.logits, 3.0)
    expected += 0.4 * nn.functional.cross_entropy(weak.mean(0), batch["y"])
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(long[:2], short.logits)  # the first steps do not depend on those that follow


def test_weights_with_and_without_tau_squared():
    plan = tssd(toy_student())
    assert {k: w for k, (w, _) in plan.loss.items()} == {"ce": 1.0, "tssd_time": 1.0, "tssd_space": 1.0}
    assert (plan.passes["long"].steps, plan.passes["student"].steps, plan.passes["long"].grad) == (6, None, False)
    term: Any = plan.loss["tssd_space"][1]
    assert (term.tau, term.target, term.taps) == (2.0, "step", {"student": ["stage1"]})
    bare = tssd(toy_student(), alpha=0.5, beta=0.6, tau=4.0, scale_tau2=False, weak_ce=0.2, target="mean")
    weights = {k: w for k, (w, _) in bare.loss.items()}
    assert weights == pytest.approx({"ce": 1.0, "tssd_time": 0.5 / 16, "tssd_space": 0.6 / 16, "tssd_weak": 0.2})
    assert set(tssd(toy_student(), alpha=0, beta=0).loss) == {"ce"}
    assert set(tssd(toy_student(), alpha=0, beta=0).passes) == {"student"}
    assert set(tssd(toy_student(), alpha=0, beta=0, weak_ce=1.0).loss) == {"ce", "tssd_weak"}


def test_several_weak_classifiers_are_averaged():
    plan = tssd(toy_student(), taps=("stage1", "stage2"), weak_ce=1.0)
    space: Any = plan.loss["tssd_space"][1]
    final, y = rand(3, 4, 4).float(), torch.tensor([0, 1, 2, 3])
    taps = {"stage1": torch.rand(3, 4, 5, 8, 8), "stage2": torch.rand(3, 4, 6, 4, 4)}
    step = Step({"y": y}, {"student": Output(final, taps)})
    weak = [head(step) for head in space.heads]
    torch.testing.assert_close(space(step), sum(spatial_loss(w, final, 2.0) for w in weak) / 2)
    labels = sum(nn.functional.cross_entropy(w.mean(0), y) for w in weak) / 2
    torch.testing.assert_close(plan.loss["tssd_weak"][1](step), labels)
    assert space.taps == {"student": ["stage1", "stage2"]} == plan.loss["tssd_weak"][1].taps
    assert [*space.heads] == [*plan.loss["tssd_weak"][1].heads]


def test_weak_classifiers_pull_what_lies_below_them():
    student: Any = toy_student()
    plan, trainee, batch = step_of_training(student, weak="conv", alpha=0)
    trainee.loss = {"tssd_space": plan.loss["tssd_space"]}
    trainee(batch, 0.0)[0].backward()
    assert student.stem.conv.weight.grad.abs().max() > 0
    above = [*student.stage2.parameters(), *student.head.parameters()]
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in above)
    assert all(p.grad.abs().max() > 0 for p in plan.loss["tssd_space"][1].parameters())


def test_the_convolutional_classifier_in_parts():
    student = toy_student()
    head: Any = tssd(student, weak="conv").loss["tssd_space"][1].heads[0].eval()
    x = torch.rand(3, 4, 5, 8, 8)
    out = head(Step({}, {"student": Output(torch.zeros(3, 4, 4), {"stage1": x})}))
    spikes = head.neuron(torch.stack([head.norm(head.conv(x[t])) for t in range(3)]))
    assert spikes.shape == (3, 4, 5, 4, 4) and set(spikes.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(out, head.linear(spikes.mean((3, 4))))
    assert head.neuron is not student.stem.neuron


def test_the_longer_run_moves_no_statistics_and_the_student_stays_plain():
    found = []
    for long in (4, 9):
        student = toy_student()
        keys = [*student.state_dict()]
        plan = tssd(student, alpha=0.0 if long == 4 else 1e-9, beta=0, long=long)
        fit(Stage([toy_batch(8)] * 2, **vars(plan), epochs=1), progress=False)
        assert [*student.state_dict()] == keys
        found.append(infer(student, toy_batch()["x"]).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def test_what_it_cannot_use_is_said():
    with pytest.raises(SpecError, match=r"tssd\.long: 2 will not do: it should be at least the 3 steps"):
        tssd(toy_student(), long=2)
    with pytest.raises(SpecError, match="no spiking neuron for the weak classifier"):
        tssd(toy_teacher(), weak="conv")
    with pytest.raises(TapError, match="did you mean 'stage1'"):
        tssd(toy_student(), taps=("stag1",))
    assert isinstance(tssd(toy_student()).loss["tssd_time"][1], Temporal)
    assert isinstance(tssd(toy_student()).loss["tssd_space"][1], Spatial)
    assert isinstance(tssd(toy_student(), weak_ce=1.0).loss["tssd_weak"][1], WeakLabels)
