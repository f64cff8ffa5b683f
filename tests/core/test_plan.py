"""Merging plans, taps, schedules and slices of time."""

import pytest
import torch
from torch import nn

from spikedistill.core import schedule
from spikedistill.core.output import Output, rate
from spikedistill.core.plan import MergeError, Plan, merge, same, unchanged
from spikedistill.core.step import Pass, Step
from spikedistill.core.taps import TapError, call, check_taps, eval_mode, infer, published
from spikedistill.methods import bkd, ce, kd, tet
from spikedistill.objectives import CE, KD, KDPerStep, PerStep
from tests.methods.toy import toy_batch, toy_student, toy_teacher


def test_merge_is_the_union_in_the_order_written():
    student, teacher = toy_student(), toy_teacher()
    plan = merge(tet(student), kd(student, teacher), bkd(student, teacher))
    assert [*plan.passes] == ["student", "teacher"]
    assert [*plan.loss] == ["ce_per_step", "spread", "ce", "kd", "bkd", "wsld"]
    assert plan.prepare is unchanged


def test_one_name_with_two_meanings_is_an_error_that_names_it():
    student, teacher = toy_student(), toy_teacher()
    with pytest.raises(MergeError, match=r"term 'kd' means two things: 1 x KD.* and 1 x KD"):
        merge(kd(student, teacher, tau=2.0), kd(student, teacher, tau=3.0))
    with pytest.raises(MergeError, match=r"term '(ce|kd)' means two things"):  # no one factor makes both terms agree
        merge(kd(student, teacher), kd(student, teacher, ce=0.1, weight=0.9))
    with pytest.raises(MergeError, match=r"1 x CE\(label_smoothing=0.1\) and 1 x CE\(\)"):
        merge(Plan({}, {"ce": (1.0, CE(label_smoothing=0.1))}), ce(student))
    other = Plan(ce(student).passes, {"ce": (1.0, CE("long", counts=True))})
    with pytest.raises(MergeError, match=r"1 x CE\(\) and 1 x CE\(student=long, counts=True\)"):
        merge(ce(student), other)
    both = merge(ce(student), Plan(tet(student).passes, {"k": (1.0, KDPerStep(2.0))}))
    with pytest.raises(MergeError, match=r"1 x KDPerStep\(tau=2.0\) and 1 x KDPerStep\(tau=3.0\)"):
        merge(both, Plan(tet(student).passes, {"k": (1.0, KDPerStep(3.0))}))
    with pytest.raises(MergeError, match="term 'kd' means two things: a schedule x"):
        merge(Plan({}, {"kd": (schedule.linear(1, 0), KD())}), Plan({}, {"kd": (2.0, KD())}))
    with pytest.raises(MergeError, match="pass 'teacher' means two things"):
        merge(kd(student, teacher), bkd(student, toy_teacher()))
    with pytest.raises(MergeError, match="pass 'student'"):
        merge(ce(student), Plan({"student": Pass(student, steps=7, grad=True)}, {}))
    with pytest.raises(MergeError, match="term 'bkd'"):  # two restoration blocks are two things
        merge(bkd(student, teacher), bkd(student, teacher))


def test_a_plan_is_scaled_until_shared_terms_weigh_the_same():
    student, teacher = toy_student(), toy_teacher()
    mixed = kd(student, teacher, ce=0.1, weight=0.9)
    weights = {name: weight for name, (weight, _) in merge(bkd(student, teacher, weight=3.0), mixed).loss.items()}
    assert weights == pytest.approx({"ce": 1.0, "bkd": 3.0, "wsld": 1.0, "kd": 9.0})
    weights = {name: weight for name, (weight, _) in merge(mixed, bkd(student, teacher, weight=3.0)).loss.items()}
    assert weights == pytest.approx({"ce": 0.1, "kd": 0.9, "bkd": 0.3, "wsld": 0.1})  # a tenth of the above

    fading = Plan({}, {"ce": (2.0, CE()), "other": (schedule.linear(4, 0), PerStep(CE()))})
    other = merge(Plan({}, {"ce": (1.0, CE())}), fading).loss["other"][0]
    assert [other(p) for p in (0.0, 0.5, 1.0)] == [2.0, 1.0, 0.0]

    for pair in ([ce(student), kd(student, teacher, ce=0.0)], [kd(student, teacher, ce=0.0), ce(student)]):
        loss = merge(*pair).loss
        assert (loss["ce"][0], loss["kd"][0]) == (1.0, 1.0)  # a weight of 0 asks for nothing


def test_prepare_and_after_step_are_composed():
    calls = []

    def doubled(batch, progress):
        return {"x": batch["x"] * 2}

    def plus_one(batch, progress):
        return {"x": batch["x"] + progress}

    merged = merge(Plan({}, {}, doubled, [calls.append]), Plan({}, {}, plus_one, [calls.append]))
    assert merged.prepare({"x": 3}, 1.0) == {"x": 7}
    for hook in merged.after_step:
        hook(0.5)
    assert calls == [0.5, 0.5]


def test_same_objectives():
    assert same(PerStep(KD(2.0)), PerStep(KD(2.0))) and not same(PerStep(KD(2.0)), PerStep(KD(3.0)))
    assert not same(CE(), KD()) and not same(CE(), CE("long")) and not same(nn.Linear(1, 1), nn.Linear(1, 1))


def test_schedules():
    p = [0.0, 0.25, 0.5, 1.0]
    assert [*map(schedule.linear(1, 3), p)] == [1, 1.5, 2, 3]
    assert [*map(schedule.power(3), p)] == [0, 0.25**3, 0.125, 1]
    assert [*map(schedule.cosine(2, 1), p)] == pytest.approx([2, 1.5 + 0.5**0.5 / 2, 1.5, 1])
    assert [*map(schedule.steps((0.25, 0.5)), p)] == pytest.approx([1, 0.1, 0.01, 0.01])
    assert [*map(schedule.between(0.25, 0.5), p)] == [0, 1, 0, 0]
    assert [*map(schedule.warmup(0.5, schedule.linear(1, 0)), p)] == [0, 0.5, 1, 0]
    assert schedule.warmup(0, schedule.linear(1, 0))(0) == 1
    assert schedule.at(3.0, 0.5) == 3 and schedule.at(schedule.power(2), 0.5) == 0.25


def test_slices_of_time_keep_what_has_one_step():
    student, teacher = Output(torch.randn(3, 2, 4), {"a": torch.randn(1, 2)}), Output(torch.randn(1, 2, 4))
    step = Step({}, {"student": student, "teacher": teacher}).at(slice(1, 2))
    assert torch.equal(step.student.logits, student.logits[1:2]) and len(step.student.taps["a"]) == 1
    assert step.teacher is teacher
    assert torch.equal(rate(student.logits), student.logits.mean(0))
    with pytest.raises(KeyError, match="no pass 'long' in this step: there are student, teacher"):
        step["long"]


def test_per_step_is_the_mean_over_steps_of_the_student():
    step = Step(toy_batch(), {"student": Output(torch.randn(3, 4, 4)), "teacher": Output(torch.randn(1, 4, 4))})
    parts = [KD(3.0)(Step(step.batch, {k: o.at(slice(t, t + 1)) for k, o in step.passes.items()})) for t in range(3)]
    torch.testing.assert_close(PerStep(KD(3.0))(step), sum(parts) / 3)


def test_taps_arrive_time_first_from_every_kind_of_model():
    x = torch.rand(4, 2, 8, 8)
    out = call(toy_student(3), x, taps=["stage1", "stage2.1.conv", "head"])
    assert [tuple(t.shape[:2]) for t in out.taps.values()] == [(3, 4)] * 3
    ann = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(180, 4))
    out = call(ann, x, taps=["0"])
    assert out.logits.shape == (1, 4, 4) and out.taps["0"].shape == (1, 4, 5, 6, 6)


def test_membrane_tap_does_not_change_the_model():
    student, x = toy_student(3).eval(), torch.rand(4, 2, 8, 8)
    plain = call(student, x).logits
    out = call(student, x, taps=["stage2.1.neuron.v", "stage2.1.neuron"])
    torch.testing.assert_close(out.logits, plain)
    assert out.taps["stage2.1.neuron.v"].dtype == torch.float32
    assert out.taps["stage2.1.neuron"].unique().tolist() == [0, 1]
    assert not student.stage2[1].neuron.v._forward_hooks


def test_an_unknown_tap_names_the_valid_ones():
    with pytest.raises(TapError, match=r"no tap 'stage9': did you mean 'stage2'\? its taps are stage1, stage2"):
        check_taps(toy_student(), ["stage9"])
    with pytest.raises(TapError, match=r"student \(Small\) publishes no tap 'stag2': did you mean 'stage2'"):
        published(toy_student(), "stag2", "student")
    with pytest.raises(TapError, match="publishes no taps: set its `dims`"):
        published(nn.Linear(1, 1), "", "teacher")
    assert published(toy_student(), "", "student") == ("stage2", 6)


def test_a_tap_that_fires_twice_or_never_is_an_error():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.twice(self.twice(x))

    for tap, count in (("twice", 2), ("never", 0)):
        with pytest.raises(TapError, match=f"'{tap}' of Odd fired {count} times"):
            call(Odd(), torch.rand(2, 3), taps=[tap])
    with pytest.raises(ValueError, match=r"must return logits .* returned \[2, 3, 4, 5\]"):
        call(Odd(), torch.rand(2, 3, 4, 5))


def test_evaluation_restores_every_mode():
    student = toy_student()
    student.stem.norm.eval()
    with eval_mode(student):
        assert not student.training and not student.head.training
    assert student.training and student.head.training and not student.stem.norm.training
    assert infer(student, torch.rand(2, 2, 8, 8)).logits.requires_grad is False and student.training
