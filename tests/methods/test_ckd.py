"""CKD: the phases, the distillation term in loops, who is taught by whom, and static2dvs where the teacher is off."""

import copy
from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spikedistill import runs
from spikedistill.core.fit import Passes, Stage, Trainee, fit
from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.core.taps import call, infer
from spikedistill.functional import kd_loss
from spikedistill.methods import ckd, static2dvs
from spikedistill.methods.ckd import CKD, guidance_loss, phase, replace_source
from spikedistill.objectives import Alignment, Head, StepLabels
from spikedistill.spec import SpecError
from tests.methods.toy import toy_student, toy_teacher

D = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def batch_of(size=4, steps=3):
    x, source, rgb = rand(steps, size, 2, 8, 8), rand(size, 2, 8, 8, seed=1), rand(size, 2, 8, 8, seed=2)
    streams = {"x": x.abs().float(), "source": source.abs().float(), "rgb": rgb.abs().float()}
    return streams | {"y": torch.arange(size) % 4, "index": torch.arange(size)}


def kl_in_loops(s, t, tau):
    def softmax(z):
        total = sum(exp(v / tau) for v in z)
        return [exp(v / tau) / total for v in z]

    rows = [sum(p * (log(p) - log(q)) for p, q in zip(softmax(b), softmax(a))) for a, b in zip(s, t)]
    return [tau**2 * row for row in rows]


def test_phases():
    w = phase()
    assert [w(p) for p in (0.0, 0.3, 0.41, 0.58, 0.7, 1.0)] == [1, 1, 1, 0, 0, 0]
    assert w(0.5) == 0.5 and w(0.46) == pytest.approx(1 / (1 + exp(-2.4)))
    # points measured on the figure
    for p, value in ((0.46, 0.93), (0.48, 0.76), (0.50, 0.51), (0.52, 0.26), (0.54, 0.06)):
        assert w(p) == pytest.approx(value, abs=0.03)
    values = [w(i / 1000) for i in range(1001)]
    assert values == sorted(values, reverse=True)
    other = phase(0.1, 0.9, 0.3, 20.0)
    assert other(0.4) == pytest.approx(1 / (1 + exp(20 * 0.1))) and other(0.1) == 1 and other(0.9) == 0
    assert phase(0, 1, 0.5, 1e6)(0.9) == 0
    for on, off, middle in ((0.41, 0.58, 0.3), (0.41, 0.58, 0.58), (0.5, 0.58, 0.5), (0.7, 0.6, 0.65)):
        with pytest.raises(SpecError, match=rf"ckd.middle: {middle} will not do: .*on={on}, .*off={off}"):
            phase(on, off, middle)  # w(middle) would be 1 or 0
    for on, off, middle in ((0.1, 0.2, 0.15), (0.0, 1.0, 0.99)):
        assert phase(on, off, middle)(middle) == 0.5


def weights_of(**how):
    weight = ckd(toy_student(), toy_teacher(), **how).loss["ckd"][0]
    assert callable(weight)
    return [weight(p) for p in (0.0, 0.41, 0.5, 0.51, 0.58, 1.0)]


def test_weight_over_training():
    late = 0.7 / (1 + exp(0.6))
    assert weights_of(weight=0.7) == pytest.approx([0.7, 0.7, 0.35, late, 0, 0])
    assert weights_of(phases="step", weight=0.7) == [0.7, 0.7, 0.7, 0, 0, 0]
    assert weights_of(phases="step", middle=0.4) == [1, 0, 0, 0, 0, 0]
    assert weights_of(phases="constant", weight=0.7) == [0.7] * 6
    assert weights_of(phases="step", middle=0.9) == [1] * 5 + [0]
    assert weights_of(on=0.5, off=0.51, middle=0.505) == [1, 1, 1, 0, 0, 0]
    with pytest.raises(SpecError, match=r"ckd.middle: 0.6"):
        weights_of(middle=0.6)
    assert weights_of(middle=0.51, steepness=600.0)[3] == pytest.approx(0.5)


@pytest.mark.parametrize("tau", [1.0, 3.5])
def test_guidance_in_loops(tau):
    s, t, keep = rand(3, 5, 4), rand(5, 4, seed=1), torch.tensor([True, False, True, True, False])
    mean = kl_in_loops(s.mean(0).tolist(), t.tolist(), tau)
    assert guidance_loss(s.mean(0)[None], t, tau).item() == pytest.approx(sum(mean) / 5, rel=1e-9)
    kept = (mean[0] + mean[2] + mean[3]) / 3
    assert guidance_loss(s.mean(0)[None], t, tau, keep).item() == pytest.approx(kept, rel=1e-9)
    each = [kl_in_loops(step, t.tolist(), tau) for step in s.tolist()]
    assert guidance_loss(s, t, tau).item() == pytest.approx(sum(map(sum, each)) / 15, rel=1e-9)
    squares = [(a - b) ** 2 for step in s.tolist() for x, y in zip(step, t.tolist()) for a, b in zip(x, y)]
    assert guidance_loss(s, t, tau, divergence="mse").item() == pytest.approx(sum(squares) / 60, rel=1e-9)
    assert guidance_loss(s, t, tau, torch.zeros(5, dtype=torch.bool)) == 0
    torch.testing.assert_close(guidance_loss(s[:1], t, tau), kd_loss(s[0], t, tau))


def test_guidance_invariants():
    s, t = rand(1, 5, 4).requires_grad_(), rand(5, 4, seed=1).requires_grad_()
    assert guidance_loss(t.detach()[None] + 3, t, 2.0).abs() < 1e-12 < guidance_loss(s, t, 2.0)
    grad, none = torch.autograd.grad(guidance_loss(s, t, 1e4), [s, t], allow_unused=True)
    assert none is None
    centred = [v.detach() - v.detach().mean(-1, keepdim=True) for v in (s, t)]
    torch.testing.assert_close(grad, (centred[0] - centred[1]) / 20, rtol=1e-2, atol=1e-5)


def outputs(plan, batch, progress):
    trainee = Trainee(Stage([batch], **vars(plan)))
    batch = trainee.prepare(batch, progress)
    calls = {k: call if p.grad else infer for k, p in trainee.passes.items()}
    done = {k: calls[k](p.model, batch[p.x], p.steps, trainee.taps[k]) for k, p in trainee.passes.items()}
    return trainee, Step(batch, done, progress)


@pytest.mark.parametrize("shared", [False, True])
def test_the_term_reads_the_hybrid_stream_and_its_head(shared):
    student, teacher, batch = toy_student(), toy_teacher(), batch_of()
    how = dict(shared_head=shared)
    plan = ckd(student, teacher, tau=3.0, **how)
    _, step = outputs(plan, batch, 0.2)
    term, labels = plan.loss["ckd"][1], plan.loss["ckd_source"][1]
    assert isinstance(term, CKD) and isinstance(labels, StepLabels) and term.head is labels.head
    z = step["source"].logits if term.head is None else term.head(step)
    t = step.teacher.logits[0]
    torch.testing.assert_close(t, infer(teacher, batch["rgb"]).logits[0])
    torch.testing.assert_close(term(step), kd_loss(z.mean(0), t, 3.0))
    every = ckd(student, teacher, kd_per_step=True, divergence="mse", shared_head=True).loss["ckd"][1]
    assert isinstance(every, CKD)
    torch.testing.assert_close(every(step), F.mse_loss(step["source"].logits, t.expand(3, -1, -1)))
    term(step).backward()
    named = dict(student.named_parameters())
    reached = [g is not None and bool(g.abs().max() > 0) for g in (p.grad for p in named.values())]
    assert all(reached) if shared else dict(zip(named, reached)) == {k: not k.startswith("head") for k in named}
    assert shared or (isinstance(term.head, Head) and term.head.linear.weight.grad is not None)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_event_pass_is_not_taught():
    z_e, z_h, t = rand(3, 5, 4).requires_grad_(), rand(3, 5, 4, seed=1).requires_grad_(), rand(1, 5, 4, seed=2)
    step = Step({}, {"student": Output(z_e), "source": Output(z_h), "teacher": Output(t)}, 0.1)
    none, grad = torch.autograd.grad(CKD(None)(step), [z_e, z_h], allow_unused=True)
    assert none is None and grad.abs().max() > 0
    order = torch.tensor([2, 0, 1])
    shuffled = Step({}, {"source": Output(z_h[order]), "teacher": Output(t)}, 0.1)
    torch.testing.assert_close(CKD(None)(shuffled), CKD(None)(step))


def test_a_spiking_teacher_enters_as_its_time_mean():
    z, t = rand(3, 5, 4), rand(2, 5, 4, seed=1)
    step = Step({}, {"source": Output(z), "teacher": Output(t)}, 0.1)
    torch.testing.assert_close(CKD(None, 1.5)(step), guidance_loss(z.mean(0)[None], (t[0] + t[1]) / 2, 1.5))


def test_replaced_samples_keep_their_teacher_image_and_may_be_left_out():
    z, t, swapped = rand(3, 5, 4), rand(1, 5, 4, seed=2), torch.tensor([True, False, False, True, False])
    step = Step({"swapped": swapped}, {"source": Output(z), "teacher": Output(t)}, 0.1)
    kept = guidance_loss(z.mean(0)[None][:, ~swapped], t[0][~swapped], 1.5)
    torch.testing.assert_close(CKD(None, 1.5, mask_replaced=True)(step), kept)
    torch.testing.assert_close(CKD(None, 1.5)(step), guidance_loss(z.mean(0)[None], t[0], 1.5))
    batch = batch_of()
    plan = ckd(toy_student(), toy_teacher(), exponent=2.0)
    after = plan.prepare(batch, 1.0)
    assert torch.equal(after["rgb"], batch["rgb"]) and torch.equal(after["source"], batch["x"])
    assert plan.passes["teacher"].x == "rgb"
    many = batch_of(1000, 1)
    assert plan.prepare(many, 0.5)["swapped"].float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_the_teacher_is_not_called_in_the_phase_where_it_is_off():
    student, teacher, batch = toy_student(), toy_teacher(), batch_of()
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainee = Trainee(Stage([batch], **vars(ckd(student, teacher))))
    for progress, expected, term in ((0.0, 1, True), (0.5, 2, True), (0.58, 2, False), (0.9, 2, False)):
        _, parts = trainee(batch, progress)
        assert len(calls) == expected and ("ckd" in parts) == term


@pytest.mark.parametrize("progress", [0.0, 0.55, 0.9])
def test_without_weight_it_is_static2dvs_to_the_bit(progress):
    student, teacher, batch = toy_student(), toy_teacher(), batch_of()
    totals = []
    how: dict[str, Any] = dict(align=0.7, exponent=2.0, lam=0.1, phi=0.3, grid=2)
    for build in (lambda: ckd(student, teacher, weight=0.0, **how), lambda: static2dvs(student, **how)):
        torch.manual_seed(1)
        trainee = Trainee(Stage([batch], **vars(build()))).eval()
        torch.manual_seed(2)
        totals.append(trainee(batch, progress)[0])
    assert torch.equal(totals[0], totals[1])


def test_settings_reach_the_terms():
    student, teacher = toy_student(), toy_teacher()
    how: dict[str, Any] = dict(align=0.3, tap="stage1", grid=3, feature="stage1", lam=0.2, phi=0.9, steps=7, classes=9)
    plan = ckd(student, teacher, **how)
    (_, labels), (_, event), (weight, align) = (plan.loss[name] for name in ("ckd_source", "ckd_event", "ckd_align"))
    assert isinstance(labels, StepLabels) and isinstance(event, StepLabels) and isinstance(align, Alignment)
    assert isinstance(labels.head, Head) and labels.head.linear.weight.shape == (9, 5 * 9) and weight == 0.3
    assert (labels.lam, labels.phi, event.lam, event.phi) == (0.2, 0.9, 0.2, 0.9) and align.tap == "stage1"
    assert event.weights is align.weights and align.weights.eta is not None and len(align.weights.eta) == 7
    assert labels.head.tap == "stage1" and labels.weights is None
    term = ckd(student, teacher, divergence="mse", kd_per_step=True, mask_replaced=True).loss["ckd"][1]
    other = ckd(student, teacher, tau=1.5, feature="stage1", pool=True).loss
    assert isinstance(term, CKD) and (term.divergence, term.per_step, term.mask_replaced) == ("mse", True, True)
    assert getattr(other["ckd"][1], "tau", None) == 1.5 and getattr(other["ckd_align"][1], "pool", None)


@pytest.mark.parametrize(
    "how, wrong",
    [
        (dict(divergence="mse", tau=9.0), ("tau",)),
        (dict(regularise=False, steps=3), ("steps",)),
        (dict(shared_head=True, tap="stage1", grid=2, classes=4), ("tap", "grid", "classes")),
    ],
)
def test_settings_that_do_nothing_are_refused(how, wrong):
    with pytest.raises(SpecError) as error:
        ckd(toy_student(), toy_teacher(), **how)
    assert [m.split(":")[0] for m in error.value.mistakes] == [f"ckd.{name}" for name in wrong]


def test_without_alignment_and_teacher_it_is_labels_of_two_streams():
    student, batch = toy_student().to(D), {k: v.to(D) if v.ndim > 1 else v for k, v in batch_of().items()}
    plain, lam, phi = copy.deepcopy(student), 0.2, 0.9
    plan = ckd(student, toy_teacher().to(D), weight=0, align=0, regularise=False, lam=lam, phi=phi, shared_head=True)
    total, parts = Trainee(Stage([batch], **vars(plan)))(batch, 0.0)
    total.backward()
    still, expected = batch["source"].expand_as(batch["x"]), torch.zeros((), dtype=D)
    for x in (still, batch["x"]):
        for z in plain(x):
            labels = (z.exp().sum(1).log() - z[torch.arange(4), batch["y"]]).sum() / 4
            expected = expected + ((1 - lam) * labels + lam * (z - phi).square().sum() / z.numel()) / 3
    expected.backward()
    assert set(parts) == {"ckd_source", "ckd_event", "accuracy"}
    torch.testing.assert_close(total, expected)
    for (name, p), q in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert q.grad is not None and q.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(student.state_dict(), plain.state_dict())  # the running statistics


def test_the_student_that_is_saved_answers_as_in_training(tmp_path):
    student, batch = toy_student(), batch_of(8)
    stage = Stage([batch] * 3, **vars(ckd(student, toy_teacher())), epochs=2)
    fit(stage, progress=False)
    trainee = Trainee(stage).eval()
    prepared = trainee.prepare(batch, 0.5)
    within = Passes(trainee, prepared)["student"].logits
    assert any(name.startswith("objectives.") for name in trainee.state_dict())
    runs.save(student, tmp_path / "student.safetensors")
    alone = runs.load(tmp_path / "student.safetensors", toy_student(seed=9))
    assert torch.equal(infer(alone, batch["x"]).logits, within) and within.std() > 0
    assert alone.state_dict().keys() == toy_student().state_dict().keys()


def test_replace_source_says_which():
    batch = batch_of()
    assert set(replace_source(batch, 0.5)) == {*batch, "swapped"}
