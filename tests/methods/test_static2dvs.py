"""Static to event transfer: CKA and the weighted losses in loops, sliding replacement, and who gets which gradient."""

from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikedistill import models
from spikedistill.core.fit import Stage, Trainee
from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.core.taps import TapError, call
from spikedistill.functional import linear_cka, potential, replaced, step_losses
from spikedistill.methods import static2dvs
from spikedistill.methods.static2dvs import replace_source
from spikedistill.models.small import small
from spikedistill.models.vggsnn import vggsnn
from spikedistill.objectives import Alignment, Head, StepLabels, StepWeights
from spikedistill.spec import SpecError
from tests.methods.toy import toy_student, toy_teacher

D = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def batch_of(steps=3, size=4, seed=0):
    x, source = rand(steps, size, 2, 8, 8, seed=seed).abs().float(), rand(size, 3, 8, 8, seed=seed + 1).abs().float()
    return {"x": x, "source": source, "y": torch.arange(size) % 4, "index": torch.arange(size)}


def cka_in_loops(x, y):
    b = len(x)

    def centred(v):
        g = [[sum(p * q for p, q in zip(v[i], v[j])) for j in range(b)] for i in range(b)]
        rows, total = [sum(r) / b for r in g], sum(map(sum, g)) / b**2
        return [[g[i][j] - rows[i] - rows[j] + total for j in range(b)] for i in range(b)]

    g, h = centred(x), centred(y)

    def inner(a, c):
        return sum(p * q for r, s in zip(a, c) for p, q in zip(r, s))

    return inner(g, h) / (inner(g, g) ** 0.5 * inner(h, h) ** 0.5 + 1e-7)


def test_cka_in_loops():
    x, y = rand(3, 5, 4), rand(3, 5, 6, seed=1)
    expected = [cka_in_loops(a.tolist(), b.tolist()) for a, b in zip(x, y)]
    assert linear_cka(x, y).tolist() == pytest.approx(expected, rel=1e-9)
    assert linear_cka(x.view(3, 5, 2, 2, 1), y).tolist() == pytest.approx(expected, rel=1e-9)


def test_cka_invariants():
    x, y = rand(2, 6, 5), rand(2, 6, 5, seed=1)
    ones = torch.ones(2, dtype=D)
    q, _ = torch.linalg.qr(rand(5, 5, seed=2))
    torch.testing.assert_close(linear_cka(x, x), ones)
    torch.testing.assert_close(linear_cka(x, -3 * x @ q), ones)
    torch.testing.assert_close(linear_cka(x + rand(5, seed=3), y), linear_cka(x, y))
    xc, yc = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    norm = torch.linalg.matrix_norm
    feature_form = norm(xc.mT @ yc) ** 2 / (norm(xc.mT @ xc) * norm(yc.mT @ yc))
    torch.testing.assert_close(linear_cka(x, y), feature_form, rtol=1e-6, atol=1e-6)
    assert ((linear_cka(x, y) > 0) & (linear_cka(x, y) < 1)).all()


def aligned(static, event):
    """The alignment of two features with all weights 1."""
    passes = {"student": Output(event, {"v": event}), "source": Output(static, {"v": static})}
    return Alignment("v", StepWeights(len(event), learned=False))(Step({}, passes))


@pytest.mark.parametrize("size", [1, 4])
def test_a_silent_feature_and_a_single_sample_give_distance_1_and_finite_gradients(size):
    x = torch.zeros(2, size, 3, requires_grad=True)
    loss = aligned(x, rand(2, size, 3).float())
    loss.backward()
    assert loss == 1 and x.grad is not None and x.grad.isfinite().all()


def test_both_streams_are_drawn_to_each_other():
    v_s, v_e = rand(2, 4, 3).requires_grad_(), rand(2, 4, 3, seed=1).requires_grad_()
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(aligned(v_s, v_e), [v_s, v_e]))


def test_pooled_features_are_averaged_over_space():
    v_s, v_e, w = rand(3, 5, 4, 2, 3), rand(3, 5, 4, 2, 3, seed=1), StepWeights(3, learned=False)
    step = Step({}, {"student": Output(v_e[..., 0, 0], {"v": v_e}), "source": Output(v_s[..., 0, 0], {"v": v_s})})
    pooled = [[[[sum(sum(row) for row in c) / 6 for c in b] for b in t] for t in v.tolist()] for v in (v_s, v_e)]
    d = [1 - cka_in_loops(a, b) for a, b in zip(*pooled)]
    assert Alignment("v", w, pool=True)(step).item() == pytest.approx(sum(d) / 3, rel=1e-6)
    assert Alignment("v", w)(step).item() != pytest.approx(sum(d) / 3, rel=1e-3)
    with pytest.raises(ValueError, match=r"pool: 'v' has shape \[3, 5, 4\], no height and width"):
        Alignment("v", w, pool=True)(Step({}, {k: Output(v_e[..., 0, 0], {"v": v_e[..., 0, 0]}) for k in step.passes}))
    term = static2dvs(toy_student(), feature="stage2", pool=True).loss["static2dvs_align"][1]
    assert isinstance(term, Alignment) and term.pool


@pytest.mark.parametrize(
    "how, wrong",
    [
        (dict(per_step=False, lam=0.1, phi=0.2), ("lam", "phi")),
        (dict(sliding=False, exponent=1.0), ("exponent",)),
        (dict(regularise=False, steps=3), ("steps",)),
        (dict(shared_head=True, tap="stage1", grid=2, classes=4), ("tap", "grid", "classes")),
    ],
)
def test_settings_that_do_nothing_are_refused(how, wrong):
    with pytest.raises(SpecError) as error:
        static2dvs(toy_student(), **how)
    assert [m.split(":")[0] for m in error.value.mistakes] == [f"static2dvs.{name}" for name in wrong]
    switch = next(iter(how))
    assert static2dvs(toy_student(), **{switch: how[switch]})
    assert static2dvs(toy_student(), **{k: v for k, v in how.items() if k != switch})


def test_cka_is_computed_in_float32_under_autocast():
    x, y = rand(2, 6, 50).float(), rand(2, 6, 50, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cka(x, y), linear_cka(x, y).float())
        torch.testing.assert_close(linear_cka(x, y), linear_cka(x.double(), y.double()).float(), rtol=1e-5, atol=1e-6)


def step_losses_in_loops(z, y, lam, phi):
    out = []
    for step in z:
        ce = sum(log(sum(exp(v) for v in row)) - row[k] for row, k in zip(step, y)) / len(y)
        out.append((1 - lam) * ce + lam * sum((v - phi) ** 2 for row in step for v in row) / len(y) / len(step[0]))
    return out


def sigmoid(v):
    return 1 / (1 + exp(-v))


def test_the_terms_in_loops():
    z_e, z_s, v_e, v_s = rand(3, 5, 4), rand(3, 5, 4, seed=1), rand(3, 5, 6, seed=2), rand(3, 5, 6, seed=3)
    y, lam, phi, eta = torch.tensor([0, 3, 1, 2, 1]), 0.2, 0.7, [0.4, -1.0, 2.0]
    step = Step({"y": y}, {"student": Output(z_e, {"v": v_e}), "source": Output(z_s, {"v": v_s})}, 0.3)
    weights = StepWeights(3)
    assert weights.eta is not None and weights.eta.tolist() == [1, 1, 1]
    weights.eta.data = torch.tensor(eta, dtype=D)
    l_e, l_s = (step_losses_in_loops(z.tolist(), y.tolist(), lam, phi) for z in (z_e, z_s))
    assert step_losses(z_e, y, lam, phi).tolist() == pytest.approx(l_e, rel=1e-9)
    event, align = StepLabels("student", lam, phi, weights=weights), Alignment("v", weights)
    assert event(step).item() == pytest.approx(sum((1 - sigmoid(n)) * v for n, v in zip(eta, l_e)) / 3, rel=1e-6)
    d = [1 - cka_in_loops(a.tolist(), b.tolist()) for a, b in zip(v_s, v_e)]
    assert align(step).item() == pytest.approx(sum(sigmoid(n) * v for n, v in zip(eta, d)) / 3, rel=1e-6)
    shared = StepLabels("source", lam, phi)
    assert shared(step).item() == pytest.approx(sum(l_s) / 3, rel=1e-9) and not [*shared.parameters()]
    plain = StepWeights(3, learned=False)
    assert StepLabels("student", lam, phi, weights=plain)(step).item() == pytest.approx(sum(l_e) / 3, rel=1e-9)
    assert Alignment("v", plain)(step).item() == pytest.approx(sum(d) / 3, rel=1e-9)
    mean = F.cross_entropy(z_e.mean(0), y).item()
    assert StepLabels("student", lam, phi, False, weights=weights)(step).item() == pytest.approx(mean)
    assert StepLabels("source", lam, phi, False)(step).item() == pytest.approx(F.cross_entropy(z_s.mean(0), y).item())
    (event(step) + 0.3 * align(step)).backward()
    grad = [sigmoid(n) * (1 - sigmoid(n)) / 3 * (0.3 * a - b) for n, a, b in zip(eta, d, l_e)]
    assert weights.eta.grad is not None and weights.eta.grad.tolist() == pytest.approx(grad, rel=1e-6)
    with pytest.raises(ValueError, match="3 time steps, the weights of the steps 2: set steps="):
        Alignment("v", StepWeights(2))(step)


def test_limits_of_the_weights():
    weights = StepWeights(2)
    weights.eta = nn.Parameter(torch.tensor([40.0, -40.0]))
    align, event = weights(2)
    assert isinstance(align, torch.Tensor) and isinstance(event, torch.Tensor)
    assert align.tolist() == pytest.approx([1, 0]) and event.tolist() == pytest.approx([0, 1])


def test_replacement_is_per_sample_whole_and_of_the_right_share():
    x, source = rand(3, 400, 2, 4, 5), rand(400, 2, 4, 5, seed=1)
    torch.manual_seed(0)
    mixed, swapped = replaced(source, x, 0.3)
    assert mixed.shape == x.shape and swapped.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert torch.equal(mixed[:, swapped], x[:, swapped])
    assert torch.equal(mixed[:, ~swapped], source[~swapped].expand(3, -1, -1, -1, -1))
    torch.manual_seed(0)
    assert torch.equal(replaced(source, x, 0.3)[1], swapped)
    assert torch.equal(replaced(source, x, 1.0)[0], x) and replaced(source, x, 1.0)[1].all()
    assert torch.equal(replaced(source, x, 0.0)[0][1], source) and not replaced(source, x, 0.0)[1].any()
    assert torch.equal(replaced(source, x[0], 1.0)[0], x[0])


def test_colour_enters_as_its_largest_channel():
    red = torch.zeros(2, 3, 4, 4)
    red[:, 0] = 1
    mixed, _ = replaced(red, torch.rand(5, 2, 2, 4, 4), 0.0)
    assert mixed.shape == (5, 2, 2, 4, 4) and (mixed == 1).all()
    grey = torch.rand(2, 1, 4, 4)
    assert torch.equal(replaced(grey, torch.rand(5, 2, 2, 4, 4), 0.0)[0], grey.expand(5, 2, 2, 4, 4))
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\].*\[5, 2, 2, 6, 6\]"):
        replaced(red, torch.rand(5, 2, 2, 6, 6), 0.0)


def test_the_chance_slides_with_progress():
    batch = batch_of(size=1000)

    def share(plan, p):
        return plan.prepare(batch, p)["swapped"].float().mean().item()

    plan, other = static2dvs(toy_student()), static2dvs(toy_student(), exponent=1.0)
    assert [share(plan, p) for p in (0.0, 1.0)] == [0, 1]
    assert share(plan, 0.5) == pytest.approx(0.125, abs=0.04) and share(other, 0.5) == pytest.approx(0.5, abs=0.06)
    abrupt = static2dvs(toy_student(), sliding=False)
    assert [share(abrupt, p) for p in (0.0, 0.49, 0.5, 1.0)] == [0, 0, 1, 1]
    after = plan.prepare(batch, 0.5)
    assert torch.equal(after["y"], batch["y"]) and torch.equal(after["x"], batch["x"]) and batch["source"].ndim == 4


def parts(plan, batch, progress):
    return Trainee(Stage([batch], **vars(plan)))(batch, progress)


def test_a_stream_of_events_alone_is_aligned():
    student = toy_student()
    _, first = parts(static2dvs(student, shared_head=True, regularise=False), batch_of(), 1.0)
    assert first["static2dvs_align"] < 1e-5
    torch.testing.assert_close(first["static2dvs_source"], first["static2dvs_event"])
    _, other = parts(static2dvs(student), batch_of(), 0.0)
    assert other["static2dvs_align"] > 1e-2


def test_weights_are_shared_and_heads_are_not():
    student, batch = toy_student(), batch_of()
    plan = static2dvs(student, align=0.7)
    trainee, static = Trainee(Stage([batch], **vars(plan))), plan.loss["static2dvs_source"][1]
    named = dict(trainee.objectives.named_parameters())
    assert [tuple(p.shape) for p in named.values()] == [(4, 6), (4,), (3,)]

    def gradients(term):
        trainee.zero_grad()
        prepared = trainee.prepare(batch, 0.0)
        taps = {k: trainee.taps[k] for k in trainee.passes}
        outputs = {k: call(p.model, prepared[p.x], p.steps, taps[k]) for k, p in trainee.passes.items()}
        trainee.loss[term][1](Step(prepared, outputs, 0.0)).backward()
        assert isinstance(static, StepLabels) and isinstance(static.head, Head)
        named = dict(student.named_parameters())
        watched = (named["stem.conv.weight"], named["head.weight"], static.head.linear.weight)
        return [p.grad is not None and bool(p.grad.abs().max() > 0) for p in watched]

    assert gradients("static2dvs_source") == [True, False, True]
    assert gradients("static2dvs_event") == [True, True, False]
    assert gradients("static2dvs_align") == [True, False, False]


def test_total():
    student, batch = toy_student(), batch_of()
    plan = static2dvs(student, align=0.7, lam=0.2, phi=0.9, grid=2, feature="stage1", tap="stage1", exponent=9.0)
    trainee = Trainee(Stage([batch], **vars(plan))).eval()
    mixed = batch["source"].amax(1, keepdim=True).expand(3, 4, 2, 8, 8)
    event, static = call(student, batch["x"], taps=["stage1"]), call(student, mixed, taps=["stage1"])
    own = plan.loss["static2dvs_source"][1]
    assert isinstance(own, StepLabels) and isinstance(own.head, Head)
    pooled = F.adaptive_avg_pool2d(static.taps["stage1"].flatten(0, 1), 2).flatten(1).unflatten(0, (3, 4))
    l_s = step_losses(own.head.linear(pooled), batch["y"], 0.2, 0.9).mean()
    l_e = (1 - sigmoid(1)) * step_losses(event.logits, batch["y"], 0.2, 0.9).mean()
    l_da = sigmoid(1) * (1 - linear_cka(event.taps["stage1"], static.taps["stage1"])).mean()
    torch.testing.assert_close(trainee(batch, 0.0)[0], l_s + l_e + 0.7 * l_da)


def test_potentials_of_the_last_spiking_layer():
    student = toy_student()
    assert potential(student, "", "x") == "stage2.1.neuron.v" and potential(student, "stage1", "x") == "stage1"
    assert potential(small(head="spiking"), "", "x") == "stage3.1.neuron.v"
    assert potential(vggsnn(size=16, widths=((4,), (4, 4))), "", "x") == "stage2.1.neuron.v"
    for name, last in (
        ("resnet19(stem_width=2, width=2)", "stage3.1.neuron"),  # not that of the hidden linear layer
        ("plif_net(size=4, width=2, hidden=2)", "stage2.2.neuron"),
        ("ms_resnet18(width=2)", "neuron"),
        ("spike_driven(depth=1, dim=8)", "stage1.0.mlp.1.neuron"),  # the one after the mean reads no map
    ):
        assert potential(models.build(name), "", "x") == f"{last}.v"
    with pytest.raises(TapError, match="no spiking neurons"):
        static2dvs(toy_teacher())
    align = static2dvs(student).loss["static2dvs_align"][1]
    assert isinstance(align, Alignment) and align.taps == {
        "source": ["stage2.1.neuron.v"],
        "student": ["stage2.1.neuron.v"],
    }


def test_images_run_first_so_that_running_statistics_lean_to_events():
    student, batch = toy_student(), batch_of()
    batch["x"] += 5
    plan = static2dvs(student)
    means, norm = [], student.get_submodule("stem.norm")
    for name in ("source", "student"):
        alone = toy_student()
        alone.get_submodule("stem.norm").momentum = 1.0
        call(alone, plan.prepare(batch, 0.0)[plan.passes[name].x])
        means.append(alone.get_submodule("stem.norm").running_mean)
    trainee = Trainee(Stage([batch], **vars(plan)))
    trainee(batch, 0.0)
    torch.testing.assert_close(norm.running_mean, 0.09 * means[0] + 0.1 * means[1])  # 0.9 x 0.1 of what came first
    assert [*trainee.models] == ["student"]


def test_size_of_the_published_network():
    with torch.device("meta"):
        student = vggsnn(classes=101, steps=10, bias=False)
        plan = static2dvs(student, grid=3)
    trainee = Trainee(Stage([], **vars(plan)))
    assert sum(p.numel() for p in trainee.parameters()) == 10_153_684


def test_replace_source_keeps_the_batch():
    batch = batch_of()
    after = replace_source(batch, 0.5)
    assert set(after) == {*batch, "swapped"} and after["source"].shape == batch["x"].shape
