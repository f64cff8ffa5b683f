"""HSD: the quantised activation and its gradients, the neuron that equals it, conversion, frames, the stepwise loss."""

import copy
from math import exp, floor, log

import pytest
import torch
from torch import nn

from spikedistill import transforms
from spikedistill.core.fit import Stage, Trainee, fit
from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.core.taps import call, infer
from spikedistill.functional import kd_loss, kd_per_step
from spikedistill.methods import hsd
from spikedistill.methods.hsd import (
    HalfIF,
    Integrate,
    Quantised,
    converted,
    frames,
    hsd_convert,
    hsd_quantise,
    hsd_step1,
    quantised,
)
from spikedistill.methods.joint_a_snn import twin
from spikedistill.models.small import small
from spikedistill.models.vggsnn import vggsnn
from spikedistill.neurons import IF
from spikedistill.spec import SpecError
from tests.methods.toy import toy_batch, toy_student

D = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def ann(seed=1, widths=(5, 6)):
    torch.manual_seed(seed)
    return small(4, 2, 3, widths=widths, neuron="relu")


@pytest.mark.parametrize(("levels", "u"), [(4, 8.0), (3, 1.7)])
def test_activation_in_loops(levels, u):
    x = rand(200) * 4
    ceiling = torch.tensor(u, dtype=D)
    y = quantised(x, ceiling, levels)
    expected = [u * min(max(floor(levels * v / u + 0.5) / levels, 0), 1) for v in x.tolist()]
    assert y.tolist() == pytest.approx(expected, rel=1e-12)
    assert set((y * levels / u).round(decimals=9).tolist()) == set(range(levels + 1))
    torch.testing.assert_close(quantised(y, ceiling, levels), y)
    edge = u / (2 * levels)
    assert quantised(torch.tensor([edge - 1e-6, u - edge + 1e-6], dtype=D), ceiling, levels).tolist() == [0, u]


def test_gradients_of_the_activation():
    levels, u = 4, torch.tensor(1.6, dtype=D, requires_grad=True)
    edge = 0.2  # u / 2L
    x = torch.tensor([-edge - 0.01, -edge + 0.01, 0.5, 1.6 + edge - 0.01, 1.6 + edge + 0.01], dtype=D)
    x.requires_grad_()
    gx, gu = [], []
    for i in range(5):
        a, b = torch.autograd.grad(quantised(x, u, levels)[i], [x, u])
        gx.append(a[i].item())
        gu.append(b.item())
    assert gx == pytest.approx([0, 1, 1, 1, 0])
    # through both factors: clip(q) - (x / u) inside, 0 below, 1 above
    q = [0, 0, 0.25, 1, 1]
    inside = [False, True, True, True, False]
    assert gu == pytest.approx([c - v / 1.6 * i for c, v, i in zip(q, x.tolist(), inside)])


def test_the_neuron_counts_what_the_activation_gives():
    levels, u = 4, 1.6
    x = rand(300) * 1.5
    x = x[((levels * x / u + 0.5) % 1 - 0.5).abs() < 0.45]  # no ties
    layer = Integrate(torch.tensor(u, dtype=D))
    out = layer(x[None, :, None], levels)
    assert out.shape == (levels, len(x), 1) and set(out.unique().tolist()) == {0, u}
    torch.testing.assert_close(out.mean(0)[:, 0], quantised(x, torch.tensor(u, dtype=D), levels))
    assert torch.equal(Integrate(torch.tensor(u, dtype=D), scaled=False)(x[None, :, None], levels) * u, out)


def test_the_potential_is_conserved():
    x, neuron, seen = rand(6, 20), HalfIF(), []
    neuron.v.register_forward_hook(lambda _m, _i, v: seen.append(v))
    spikes = neuron(x)
    torch.testing.assert_close(seen[0][-1], 0.5 + x.sum(0) - spikes.sum(0))
    by_hand = [0.5, 0.6, 0.4]  # 1.0 does not fire, 1.6 does and leaves 0.6, 1.0 does not
    assert HalfIF()(torch.tensor(by_hand)[:, None])[:, 0].tolist() == [0, 1, 0]
    x.requires_grad_()
    (grad,) = torch.autograd.grad(neuron(x)[-1].sum(), x)
    assert grad[0].abs().max() > 0
    # with gradient through the reset, a spike at once has less effect on what follows than the current that made it
    one = torch.tensor([[0.6], [0.3]], requires_grad=True)  # H = 1.1 fires, 0.4 does not
    (grad,) = torch.autograd.grad(HalfIF()(one)[1].sum(), one)
    assert grad[0].item() == pytest.approx((1 - 0.9) * 0.4) and grad[1].item() == pytest.approx(0.4)


def kl_in_loops(s, t, tau):
    def softmax(z):
        total = sum(exp(v / tau) for v in z)
        return [exp(v / tau) / total for v in z]

    return sum(tau**2 * sum(p * (log(p) - log(q)) for p, q in zip(softmax(b), softmax(a))) for a, b in zip(s, t))


def test_stepwise_loss_in_loops():
    z, t = rand(3, 5, 4), rand(5, 4, seed=1)
    expected = sum(kl_in_loops(step, t.tolist(), 3.5) for step in z.tolist()) / 15
    assert kd_per_step(z, t, 3.5).item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(kd_per_step(z.flip(0), t, 3.5), kd_per_step(z, t, 3.5))
    assert kd_per_step(z, t, 3.5) > kd_loss(z.mean(0), t, 3.5)
    torch.testing.assert_close(kd_per_step(z[:1], t, 3.5), kd_loss(z[0], t, 3.5))
    assert kd_per_step(t.expand(3, 5, 4) + 1, t, 3.5).abs() < 1e-12
    s, teacher = z.clone().requires_grad_(), t.clone().requires_grad_()
    grad, none = torch.autograd.grad(kd_per_step(s, teacher, 3.5), [s, teacher], allow_unused=True)
    assert none is None and grad.abs().max() > 0


def test_the_teacher_is_the_mean_of_its_frames():
    z, a = rand(3, 5, 4), rand(6, 5, 4, seed=1)
    term = hsd(toy_student(), toy_student(), tau=3.0, init="none").loss["hsd"][1]
    step = Step({}, {"student": Output(z), "teacher": Output(a)})
    torch.testing.assert_close(term(step), kd_per_step(z, a.mean(0), 3.0))


def test_frames():
    x = rand(7, 2, 2, 3, 3)
    one = frames({"x": x}, (), ())
    assert torch.equal(one["x"], x[:3]) and torch.equal(one["frames"], x)
    assert torch.equal(frames({"x": x}, (), (), both_half=True)["frames"], x[:3])
    chosen = frames({"x": x}, (4, 0), (-1,), both_half=True)
    assert torch.equal(chosen["x"], x[[4, 0]]) and torch.equal(chosen["frames"], x[6:])
    assert len(frames({"x": x[:1]}, (), ())["x"]) == 1
    static = frames({"x": x[0]}, (1,), ())
    assert torch.equal(static["x"], x[0]) and torch.equal(static["frames"], x[0])
    with pytest.raises(ValueError, match="no frame 7, a recording has 7"):
        frames({"x": x}, (0,), (7,))


def trained():
    """An ANN with statistics and ceilings of its own."""
    model = ann()
    plan = hsd_step1(model, levels=3, ceiling=2.0)
    assert set(plan.loss) == {"ce"} and plan.passes["student"].model is model
    fit(Stage([toy_batch(8)] * 3, **vars(plan), epochs=2), progress=False)
    return model


def test_step_1_trains_the_ceilings():
    model = trained()
    ceilings = [m.ceiling.item() for m in model.modules() if isinstance(m, Quantised)]
    assert len(ceilings) == 2 and all(u != 2.0 for u in ceilings)
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())


def test_conversion_keeps_the_weights_and_shares_nothing():
    teacher, student = trained(), ann(seed=5)
    before = copy.deepcopy(teacher.state_dict())
    plan = hsd(student, teacher)
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not {t.data_ptr() for t in ours.values() if t.numel()} & {t.data_ptr() for t in theirs.values()}
    layers = [m for m in student.modules() if isinstance(m, Integrate)]
    assert not any(m.ceiling.requires_grad for m in layers)
    assert len(layers) == 2 and all(m.scaled for m in layers)
    assert not any("ceiling" in name for name, _ in student.named_parameters())
    kept = {k: v.clone() for k, v in ours.items() if "ceiling" in k}
    fit(Stage([toy_batch(8)] * 3, **vars(plan), epochs=1), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in kept.items())
    assert hsd(student, teacher).passes["student"].model is student  # converted already: left as it is


def test_a_converted_layer_answers_as_its_ann_over_as_many_steps_as_levels():
    teacher, student = trained().eval(), ann(seed=5)
    converted(student, teacher)
    x = toy_batch(8)["x"]
    a, b = infer(teacher, x, taps=["stem.neuron"]), infer(student, x, 3, taps=["stem.neuron"])
    torch.testing.assert_close(b.taps["stem.neuron"].mean(0), a.taps["stem.neuron"][0])
    assert b.logits.shape == (3, 8, 4)


def test_an_activation_of_two_names_is_replaced_under_both():
    act = nn.ReLU()
    model = hsd_quantise(nn.Sequential(nn.Conv2d(2, 3, 3), act, nn.Sequential(act, nn.Conv2d(3, 3, 1), act)))
    assert model[1] is model[2][0] is model[2][2] and isinstance(model[1], Quantised)
    hsd_convert(model)
    assert model[1] is model[2][0] is model[2][2] and isinstance(model[1], Integrate)
    neuron = IF()
    ann = twin(nn.Sequential(neuron, nn.Conv2d(2, 2, 1), neuron))
    assert not [m for m in ann.modules() if isinstance(m, IF)]


def test_what_does_not_fit_is_refused():
    teacher = trained()
    for student, model, message in (
        (ann(widths=(5, 7)), teacher, "different networks"),
        (toy_student(), teacher, "no ReLU; build it with neuron='relu'"),
        (ann(), ann(), "teacher is the ANN of step 1"),
        (teacher, teacher, "another module"),
    ):
        with pytest.raises(SpecError, match=message):
            hsd(student, model)
    with pytest.raises(SpecError, match="no Quantised"):
        hsd_convert(ann())


def test_rewrites_are_written_down():
    model = ann()
    vars(model)["spec"] = {"model": "small"}
    hsd_convert(hsd_quantise(model, 3, 2.0), scaled=False)
    assert vars(model)["spec"]["transforms"] == ["hsd_quantise(levels=3, ceiling=2.0)", "hsd_convert(scaled=False)"]
    assert all(not m.scaled for m in model.modules() if isinstance(m, Integrate))


def test_plan_and_preset():
    teacher, events = trained(), {"x": rand(6, 4, 2, 8, 8).abs().float(), "y": torch.arange(4)}
    for preset, seen in (("paper", 6), ("official_code", 3)):
        student = ann(seed=5)
        plan = hsd(student, teacher, weight=0.7, tau=3.0, preset=preset)
        trainee = Trainee(Stage([events], **vars(plan))).eval()
        total, _ = trainee(events, 0.3)
        z, a = call(student, events["x"][:3]).logits, infer(teacher, events["x"][:seen]).logits
        soft = kd_per_step(z, a.mean(0), 3.0) / (1 if preset == "paper" else 4)
        assert z.shape == (3, 4, 4) and len(a) == seen
        torch.testing.assert_close(total, nn.functional.cross_entropy(z.mean(0), events["y"]) + 0.7 * soft)
        scaled = [m.scaled for m in student.modules() if isinstance(m, Integrate)]
        assert scaled == [preset == "paper"] * 2
    plan = hsd(toy_student(), toy_student(), init="none", student_frames=(1,), teacher_frames=(2, 3))
    after = plan.prepare(events, 0.0)
    assert torch.equal(after["x"], events["x"][[1]]) and torch.equal(after["frames"], events["x"][2:4])
    assert plan.passes["teacher"].x == "frames" and not plan.passes["teacher"].grad


def test_size_of_the_published_network():
    with torch.device("meta"):
        network = hsd_quantise(vggsnn(neuron="relu"))
        assert sum(p.numel() for p in network.parameters()) == 9_271_498 + 8
        assert sum(p.numel() for p in hsd_convert(network).parameters()) == 9_271_498


def test_the_rewrites_are_repeated_on_a_fresh_network():
    student = ann(seed=5)
    vars(student)["spec"] = {}
    hsd(student, trained())
    fresh = transforms.apply_spec(ann(seed=6), vars(student)["spec"])
    fresh.load_state_dict(student.state_dict())
    x = toy_batch()["x"]
    assert torch.equal(infer(fresh, x, 3).logits, infer(student, x, 3).logits)
