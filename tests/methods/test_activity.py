"""Activity: golden values, the formulas in loops, the report's spike rate, and what the penalties do."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spikedistill.core.fit import Stage, Trainee
from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.core.taps import call, infer
from spikedistill.methods import activity
from spikedistill.methods.activity import MSE, activity_loss, logits_loss
from spikedistill.models.small import small
from spikedistill.neurons import LIF
from spikedistill.objectives import KD
from spikedistill.report.activity import activity as measured
from spikedistill.spec import SpecError
from tests.methods.toy import CLASSES, toy_batch, toy_student, toy_teacher

D = torch.float64
Z = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D)
S = torch.tensor([[[1.0, 0, 1, 0]], [[1, 0, 0, 0]]], dtype=D)  # T = 2, B = 1, N = 4


def build(**settings: Any) -> Any:
    return activity(toy_student(), settings.pop("teacher", toy_teacher()), **settings)


def test_golden_values():
    assert logits_loss(Z).item() == pytest.approx(0.5)
    assert logits_loss(Z, 1).item() == pytest.approx(0.666667, abs=1e-6)
    assert logits_loss(Z, 2, "step").item() == pytest.approx(1.0)
    assert (logits_loss(Z, 2, "step") - logits_loss(Z)).item() == pytest.approx(Z.var(0, unbiased=False).mean().item())
    assert activity_loss([S]).item() == pytest.approx(0.375)
    assert activity_loss([S], 2).item() == pytest.approx(0.3125)
    assert activity_loss([S], 2, "spike").item() == activity_loss([S], 1, "spike").item() == pytest.approx(0.375)
    assert activity_loss([S], per="spikes").item() == pytest.approx(3.0)


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("per", ["rate", "spikes"])
@pytest.mark.parametrize("on", ["rate", "spike"])
@pytest.mark.parametrize("p", [1, 2])
def test_activity_in_loops(p, on, per, floor):
    torch.manual_seed(0)
    layers, expected = [torch.randint(0, 2, (3, 2, *shape)).to(D) for shape in ((2, 3, 2), (5,))], 0.0
    for s in layers:
        n, flat = s[0, 0].numel(), s.flatten(2).tolist()
        values = []
        for b in range(2):
            for i in range(n):
                spikes = [flat[t][b][i] for t in range(3)]
                values += [v**p for v in spikes] if on == "spike" else [max(0.0, sum(spikes) / 3 - floor) ** p]
        expected += (n / 17 if per == "rate" else n * 3) * sum(values) / len(values)
    assert activity_loss(layers, p, on, per, floor).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("on", ["mean", "step"])
@pytest.mark.parametrize("p", [1, 2])
def test_logits_in_loops(p, on):
    z = torch.randn(3, 2, 4, dtype=D)
    rows = (
        z.tolist()
        if on == "step"
        else [[[sum(z[t, b, k].item() for t in range(3)) / 3 for k in range(4)] for b in range(2)]]
    )
    values = [abs(v) ** p for step in rows for row in step for v in row]
    assert logits_loss(z, p, on).item() == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_gradients_of_the_logits_and_of_mse():
    z, v = torch.randn(3, 2, 4, dtype=D, requires_grad=True), torch.randn(2, 2, 4, dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad(logits_loss(z), z)
    torch.testing.assert_close(grad, (2 * z.mean(0) / 8 / 3).detach().expand(3, -1, -1))
    step = Step({}, {"student": Output(z), "teacher": Output(v)})
    difference = z.mean(0) - v.mean(0)
    torch.testing.assert_close(MSE()(step), difference.square().sum() / 8)
    grad, none = torch.autograd.grad(MSE()(step), [z, v], allow_unused=True)
    torch.testing.assert_close(grad, (2 * difference / 8 / 3).detach().expand(3, -1, -1))
    assert none is None


def test_one_value_two_gradients_on_spikes():
    s = S.clone().requires_grad_()
    one, two = (torch.autograd.grad(activity_loss([s], p, "spike"), s)[0] for p in (1, 2))
    torch.testing.assert_close(one, torch.full_like(S, 1 / 8))
    torch.testing.assert_close(two, S / 4)


def test_silence_costs_nothing_and_all_firing_is_1():
    for p in (1, 2):
        for on in ("rate", "spike"):
            assert activity_loss([torch.zeros(2, 3, 4), torch.zeros(2, 3, 2, 2, 2)], p, on) == 0
            full = [torch.ones(2, 3, 4), torch.ones(2, 3, 2, 2, 2)]
            assert activity_loss(full, p, on).item() == pytest.approx(1.0)
            assert activity_loss(full, p, on, "spikes").item() == pytest.approx(2 * 12)


def test_below_the_floor_a_neuron_has_no_gradient():
    s = S.clone().requires_grad_()
    (grad,) = torch.autograd.grad(activity_loss([s], floor=0.6), s)
    assert grad[:, 0, 0].min() > 0 and grad[:, 0, 1:].abs().max() == 0
    with pytest.raises(SpecError, match=r"activity\.floor"):
        build(act_on="spike", floor=0.1)


def test_the_penalty_is_the_rate_of_the_report():
    student, batch = toy_student(), toy_batch()
    term = build(teacher=None).loss["activity"][1]
    assert term.taps == {"student": ["stem.neuron", "stage2.1.neuron"]}
    value = term(Step(batch, {"student": infer(student, batch["x"], taps=term.taps["student"])}))
    assert value.item() == pytest.approx(measured(student, [batch])["rate"], abs=1e-6) and 0 < value < 1


@pytest.mark.parametrize("bf16", [False, True])
def test_neurons_of_the_readout_are_left_out(bf16):
    torch.manual_seed(0)
    student = small(classes=CLASSES, channels=2, steps=3, widths=(5, 6), neuron="lif(v_th=0.5)", head="spiking")
    batch, term = toy_batch(), activity(student).loss["activity"][1]
    taps: Any = getattr(term, "taps", {})
    assert "out" in taps["student"]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = infer(student, batch["x"], taps=taps["student"])
    hidden = [x for name, x in output.taps.items() if name != "out"]
    torch.testing.assert_close(term(Step(batch, {"student": output})), activity_loss(hidden))


def test_a_student_that_spikes_in_its_outputs_alone_has_nothing_to_penalise():
    student = toy_teacher()
    student.out = LIF(v_th=0.2)
    plan = activity(student)
    with pytest.raises(SpecError, match=r"activity\.act: .*only spiking neurons are its outputs: set act=0"):
        Trainee(Stage([], **vars(plan)))(toy_batch(), 0.5)
    assert Trainee(Stage([], **vars(activity(student, act=0))))(toy_batch(), 0.5)[0].isfinite()


def test_nothing_added_is_cross_entropy():
    loss = build(teacher=None, act=0.0, logits=0.0).loss
    assert {k: w for k, (w, _) in loss.items()} == {"ce": 1.0}
    plain = build(alpha=0.0, act=0.0, logits=0.0).loss
    z, v, y = torch.randn(3, 2, 4, requires_grad=True), torch.randn(1, 2, 4), torch.tensor([0, 3])
    step = Step({"y": y}, {"student": Output(z), "teacher": Output(v)})
    value = sum((w * term(step) for w, term in plain.values()), torch.zeros(()))
    torch.testing.assert_close(value, F.cross_entropy(z.mean(0), y))
    grads = [torch.autograd.grad(x, z)[0] for x in (value, F.cross_entropy(z.mean(0), y))]
    torch.testing.assert_close(*grads)


def test_terms_weights_and_settings():
    def weights(plan):
        return {k: w for k, (w, _) in plan.loss.items()}

    assert weights(build()) == {"ce": 0.5, "kd": 0.5, "activity": 0.01, "logits": 0.01}
    plan = build(kd="mse", alpha=0.3, act=0.2, logits=0.1)
    assert weights(plan) == {"ce": 0.7, "kd_mse": 0.3, "activity": 0.2, "logits": 0.1}
    for plan in (build(kd="none"), build(teacher=None)):
        assert weights(plan) == {"ce": 1.0, "activity": 0.01, "logits": 0.01} and [*plan.passes] == ["student"]
    loss = build(tau=2.5, act_p=2, act_on="spike", act_per="spikes", logits_p=1, logits_on="step").loss
    assert isinstance(loss["kd"][1], KD) and loss["kd"][1].tau == 2.5
    assert loss["activity"][1].how == {"p": 2, "on": "spike", "per": "spikes", "floor": 0.0}
    assert (loss["logits"][1].p, loss["logits"][1].on) == (1, "step")
    assert build(floor=0.2).loss["activity"][1].how["floor"] == 0.2
    with pytest.raises(SpecError, match=r"act: the student \(Small\) has no spiking neuron"):
        activity(toy_teacher())


def test_free_logits_stay_finite_and_smaller_for_a_larger_weight():
    y, sizes = torch.tensor([1, 2]), []
    for weight in (0.0, 0.01, 0.1):
        z = torch.zeros(1, 2, 3, requires_grad=True)
        optim = torch.optim.SGD([z], 2.0)
        for _ in range(1500):
            optim.zero_grad()
            (F.cross_entropy(z[0], y) + weight * logits_loss(z)).backward()
            optim.step()
        assert z[0].argmax(-1).tolist() == y.tolist()
        (grad,) = torch.autograd.grad(F.cross_entropy(z[0], y) + weight * logits_loss(z), z)
        assert (grad.norm() < 1e-6) == (weight > 0)
        sizes.append(z.norm().item())
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_constant_changes_the_penalty_but_not_the_label_term():
    z, y = torch.randn(2, 3, 4, dtype=D), torch.tensor([0, 1, 2])
    torch.testing.assert_close(F.cross_entropy((z + 2).mean(0), y), F.cross_entropy(z.mean(0), y))
    assert logits_loss(z - z.mean(-1, keepdim=True) + 2) > logits_loss(z - z.mean(-1, keepdim=True)) + 3.9


def test_spikes_do_not_outlive_the_step_and_listening_changes_no_output():
    student, batch = toy_student(), toy_batch()
    trainee = Trainee(Stage([batch], **vars(activity(student))))
    seen: list[Any] = []
    taps = trainee.taps["student"]
    student.eval()
    assert torch.equal(call(student, batch["x"]).logits, call(student, batch["x"], taps=taps).logits)
    hook = student.stem.neuron.register_forward_hook(lambda m, i, out: seen.append(weakref.ref(out)))
    total, _ = trainee(batch, 0.5)
    total.backward()
    hook.remove()
    del total
    gc.collect()
    assert [ref() for ref in seen] == [None]
    assert not student.stem.neuron._forward_hooks


def test_the_penalty_reaches_the_weights_through_the_surrogate():
    student, batch = toy_student(), toy_batch()
    term: Any = activity(student).loss["activity"][1]
    term(Step(batch, {"student": call(student, batch["x"], taps=term.taps["student"])})).backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {name for name, _ in student.named_parameters() if not name.startswith("head")}
