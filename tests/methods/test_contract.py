"""What every method must do. A new method enrols with one line."""

import copy
from functools import partial

import pytest
import torch

from spikedistill import transforms
from spikedistill.core.evaluate import evaluate
from spikedistill.core.fit import Stage, Trainee, fit
from spikedistill.core.plan import Plan, merge
from spikedistill.core.step import Pass, Step
from spikedistill.core.taps import call, infer
from spikedistill.methods import (
    METHODS,
    activity,
    bkd,
    ce,
    ckd,
    ckdsnn,
    distilling_spikes,
    energy_efficient_kd,
    full_range_kd,
    hsd,
    hta_kl,
    joint_a_snn,
    kd,
    kd_snn_liang,
    kdsnn,
    lasnn,
    meom,
    sakd,
    seal_kd,
    static2dvs,
    strong2weak,
    tet,
    tks,
    tser,
    tssd,
)
from spikedistill.objectives import CE
from tests.methods.toy import spiking, toy_batch, toy_student, toy_teacher

# name -> (builder with settings that are not the defaults, pass names)
ENROLLED = {
    "ce": partial(ce, label_smoothing=0.1),
    "tet": partial(tet, lam=0.1, phi=0.7),
    "kd": partial(kd, tau=3.0, weight=0.7, ce=0.4),
    "kd, per step": partial(kd, tau=3.0, per_step=True),
    "kd, counts": spiking(partial(kd, tau=3.0, weight=0.7, counts=True)),
    "bkd": partial(bkd, blur=0.0, weight=1e-3, wsld=0.5, tau=3.0),
    "bkd, mean": partial(bkd, blur=0.0, weight=1.0, reduction="mean", hidden=3),
    "kdsnn": partial(kdsnn, norms=("stem.norm", "stage2.1.norm"), weight=0.01),
    "kdsnn, response": partial(kdsnn, variant="response", alpha=0.3, tau=3.0),
    "kdsnn, mse": partial(kdsnn, variant="mse", weight=0.4),
    "kdsnn, pooled": partial(kdsnn, variant="pooled", weight=0.3),
    "distilling_spikes": spiking(partial(distilling_spikes, alpha=0.4, sliding=0.6, window=1, tau=3.0)),
    "distilling_spikes, potential": partial(distilling_spikes, signal="potential", alpha=0.3, tau=3.0),
    "joint_a_snn": partial(joint_a_snn, alpha=0.3, beta=0.01, tau=2.0, width=7),
    "joint_a_snn, mean": partial(joint_a_snn, alpha=0.6, readout="mean", strides=(4,), width=3),
    "lasnn": partial(lasnn, weight=3.0, power=3, soft=0.2, tau=3.0),
    "lasnn, mse": partial(lasnn, variant="mse", weight=0.01),
    "kd_snn_liang": partial(kd_snn_liang, weight=7.0, taps=("stage1", "stage2"), teacher_taps=("stage2", "stage1")),
    "kd_snn_liang, vector": partial(kd_snn_liang, weight=7.0, normalise="vector", time="flatten"),
    "sakd": partial(sakd, init="matching", feature=2.0, logits=0.5, tau=3.0, kernel=1),
    "sakd, imagenet": partial(sakd, scale="imagenet", preset="official_code", init="no", epochs=3, updates=30),
    "full_range_kd": partial(full_range_kd, alpha=0.4, beta=0.7, tau=2.0),
    "full_range_kd, right": partial(full_range_kd, alpha=0, preset="official_code", fallback="skip", tau=1.5),
    "tser": partial(tser, tau=2.0, alpha=0.3, gamma=0.2, entropy_tau=1.5),
    "strong2weak": partial(strong2weak, s2w=0.6, w2s=0.3, tau=3.0, scale_tau2=True),
    "strong2weak, ensemble": partial(strong2weak, variant="ensemble_student", tau=1.5, detach_teacher=False),
    "static2dvs": partial(static2dvs, align=0.7, exponent=60.0, lam=0.1, phi=0.2),
    "static2dvs, events": partial(static2dvs, sliding=False, regularise=False, grid=2, tap="stage1"),
    "static2dvs, shared": partial(static2dvs, exponent=60.0, per_step=False, shared_head=True, feature="stage1"),
    "tks": partial(tks, tau=2.0, alpha=0.6, on_all_wrong="one_hot", soften_student=True),
    "tks, static": partial(tks, alpha=0.4, static=True, target="mean", detach_target=False),
    "seal_kd": partial(seal_kd, alpha=0.4, beta=0.3, tau=2.0, temperature=0.5, center=True),
    "seal_kd, mean": partial(seal_kd, teacher_mode="mean", beta=0, tau=1.5),
    "energy_efficient_kd": partial(
        energy_efficient_kd, tau_teacher=6.0, tau_student=1.5, alpha=0.3, spikes=0.2, squared=True
    ),
    "energy_efficient_kd, softened": partial(energy_efficient_kd, ce_temperature=2.0, scale="student"),
    "activity": partial(activity, alpha=0.3, tau=3.0, act=0.2, act_p=2, logits=0.1, logits_p=1, logits_on="step"),
    "activity, mse": partial(activity, kd="mse", act=0.1, act_on="spike", act_per="spikes"),
    "ckdsnn": partial(ckdsnn, beta=2.0, gamma=0.6, map_temperature=0.5, tau=3.0, noise=0.0),
    "ckdsnn, code": partial(ckdsnn, preset="official_code", tap="stage1", teacher_tap="stage1", noise=0.2),
    "ckd": partial(ckd, weight=0.7, tau=3.0, align=0.4, exponent=60.0, lam=0.1),
    "ckd, shared": partial(ckd, phases="constant", divergence="mse", kd_per_step=True, exponent=60.0, shared_head=True),
    "meom": partial(meom, rho=0.6, lam=0.3, tau=2.0, tpd_tau=1.5, tmpd=0.7, tpd=0.2),
    "meom, channel": partial(meom, level="channel", teacher_tap="stage1", tpd=0, seed=4),
    "hta_kl": partial(hta_kl, weight=0.7, tau=3.0, delta=0.8, scope="region"),
    "hta_kl, per step": partial(hta_kl, time="per_step", tau=1.5, weight_grad=True),
    "hsd": partial(hsd, init="none", weight=0.7, tau=3.0),
    "hsd, code": partial(hsd, init="none", preset="official_code", tau=1.5),
    "tssd": partial(tssd, alpha=0.7, beta=0.4, tau=3.0, long=5, weak_ce=0.3),
    "tssd, conv": partial(tssd, weak="conv", taps=("stage1", "stage2"), target="mean", scale_tau2=False),
}
every = pytest.mark.parametrize("build", ENROLLED.values(), ids=ENROLLED.keys())


def trainee_of(build, student=None, teacher=None):
    torch.manual_seed(3)
    plan = build(student or toy_student(), teacher or toy_teacher())
    return Trainee(Stage([toy_batch()], **vars(plan)))


def total_of(trainee, batch):
    torch.manual_seed(4)
    return trainee(batch, 0.5)[0]


def test_every_method_is_enrolled():
    assert {name.split(",")[0] for name in ENROLLED} == set(METHODS)


@every
def test_loss_is_a_finite_scalar_and_reaches_the_student_alone(build):
    student, teacher = toy_student(), toy_teacher()
    buffers = copy.deepcopy(teacher.state_dict())
    trainee = trainee_of(build, student, teacher)
    total = total_of(trainee, toy_batch())
    assert total.ndim == 0 and total.isfinite()
    total.backward()
    reached = [p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters()]
    assert all(reached)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, buffers[k]) for k, v in teacher.state_dict().items())


@every
def test_every_objective_that_owns_weights_trains_them(build):
    trainee = trainee_of(build)
    total_of(trainee, toy_batch()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainee.objectives.parameters())


@every
def test_a_mean_over_the_batch(build):
    trainee = trainee_of(build).eval()
    batch = toy_batch()
    value = total_of(trainee, batch)
    twice = {k: torch.cat([v, v]) for k, v in batch.items()}
    order = torch.tensor([2, 0, 3, 1])
    if build is not ENROLLED["kd_snn_liang"]:  # rows of a B x B matrix have length 1: a doubled batch halves the term
        torch.testing.assert_close(total_of(trainee, twice), value)
    torch.testing.assert_close(total_of(trainee, {k: v[order] for k, v in batch.items()}), value)


@every
def test_each_term_needs_only_the_taps_it_declares(build):
    student, teacher = toy_student(), toy_teacher()
    trainee = trainee_of(build, student, teacher)
    batch = trainee.prepare(toy_batch(), 0.5)
    for name, (_, objective) in trainee.loss.items():
        taps = getattr(objective, "taps", {})
        passes = {k: infer(p.model, batch[p.x], p.steps, taps.get(k, ())) for k, p in trainee.passes.items()}
        assert objective(Step(batch, passes, 0.5)).isfinite(), name


@every
@pytest.mark.parametrize("teacher_steps", [1, 2, 3])
@pytest.mark.parametrize("student_steps", [1, 3])
def test_any_number_of_steps_on_either_side(build, teacher_steps, student_steps):
    teacher = toy_teacher() if teacher_steps == 1 else toy_student(teacher_steps, seed=9)
    assert total_of(trainee_of(build, toy_student(student_steps), teacher), toy_batch()).isfinite()


@every
def test_state_round_trip(build):
    trainee, other = trainee_of(build), trainee_of(build, toy_student(seed=7))
    other.load_state_dict(trainee.state_dict())
    torch.testing.assert_close(total_of(other.eval(), toy_batch()), total_of(trainee.eval(), toy_batch()))


@every
def test_merges_with_itself_and_with_another(build):
    student, teacher = toy_student(), toy_teacher()
    plan = build(student, teacher)
    assert merge(plan, plan).loss.keys() == plan.loss.keys()
    other = Plan({"student": Pass(student, grad=True)}, {"another": (0.5, CE())})
    merged = merge(plan, other)
    assert merged.loss.keys() == plan.loss.keys() | {"another"}
    assert merged.passes.keys() == plan.passes.keys()


@every
def test_trains_in_the_loop_and_leaves_a_plain_student(build):
    student = toy_student()
    before = copy.deepcopy(student.state_dict())
    plan = build(student, toy_teacher())
    batch = toy_batch(8)
    result = fit(Stage([batch] * 3, **vars(plan), epochs=2, valid=[batch]), progress=False)
    assert result["epochs"][-1]["loss"] < float("inf")
    if "joint_a_snn" in str(build):  # its subject is the student's kernels kept as shared factors
        transforms.merge(student)
    assert [*student.state_dict()] == [*before]
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert call(student, batch["x"]).logits.shape == (3, 8, 4)
    assert 0 <= evaluate(student, [batch])["accuracy"] <= 1
