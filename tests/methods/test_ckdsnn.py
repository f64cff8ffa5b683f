"""ckdsnn: golden values, both terms in loops, the two kinds of activation map, and where the noise comes from."""

from functools import partial
from math import exp, log, sqrt

import pytest
import torch
from torch import nn

from spikedistill import models
from spikedistill.core.fit import Stage, Trainee
from spikedistill.core.output import Output, rate
from spikedistill.core.step import Step
from spikedistill.core.taps import infer
from spikedistill.functional import kd_loss
from spikedistill.methods.ckdsnn import NLD, SAMD, activation_map, ckdsnn, grad_cam, looks, nld_loss, samd_loss
from tests.methods.toy import toy_batch, toy_student, toy_teacher

D = torch.float64
LOGITS, TEACHER = torch.tensor([[1, 0.5, -0.5]], dtype=D), torch.tensor([[3.0, 1, -2]], dtype=D)
DRAW = torch.tensor([[1, -1, 0.5]], dtype=D)
presets = pytest.mark.parametrize("preset", ["paper", "official_code"])


def softmax(z):
    total = sum(exp(v) for v in z)
    return [exp(v) / total for v in z]


def kl(p, q):
    return sum(a * log(a / b) for a, b in zip(p, q))


def samd_in_loops(student, teacher, temperature, preset):
    def distributions(maps):
        rows = [m.flatten().tolist() for m in maps]
        every = [v for row in rows for v in row]
        out = []
        for row in rows:
            scope = every if preset == "official_code" else row
            low, high = min(scope), max(scope)
            out.append(softmax([(v - low) / (high - low + 1e-3) / temperature for v in row]))
        return out

    total = sum(kl(p, q) for p, q in zip(distributions(teacher), distributions(student))) / len(student)
    return total * (temperature**2 if preset == "paper" else 1)


def nld_in_loops(s, v, draw, tau, noise, preset):
    total = 0.0
    for row, target, eps in zip(s.tolist(), v.tolist(), draw.tolist()):
        mean = sum(row) / len(row)
        variance = sum((x - mean) ** 2 for x in row) / (len(row) - 1)
        p = softmax([x / tau for x in target])
        if preset == "paper":
            q = softmax([(x + noise * (mean + e * sqrt(variance))) / tau for x, e in zip(row, eps)])
        else:
            soft, noisy = softmax([x / tau for x in row]), softmax([(mean + e * variance) / tau for e in eps])
            q = [(1 - noise) * a + noise * b for a, b in zip(soft, noisy)]
        total += kl(p, q)
    return tau**2 * total / len(s)


class Plain(nn.Module):
    """An ANN that ends in a linear layer on the spatial mean, or (square) on the mean of squares. Tap: body."""

    def __init__(self, square=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.square = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), nn.Linear(3, 4), square
        self.dims = {"body": 3}

    def forward(self, x):
        x = self.body(x)
        return self.head((x.square() if self.square else x).mean((-2, -1)))


def step_of(spikes, feature, logits=None, teacher=None):
    logits = torch.zeros(*spikes.shape[:2], 3, dtype=spikes.dtype) if logits is None else logits
    teacher = torch.zeros(1, spikes.shape[1], 3, dtype=spikes.dtype) if teacher is None else teacher
    return Step({}, {"student": Output(logits, {"s": spikes}), "teacher": Output(teacher, {"t": feature})})


def test_golden_samd():
    te, st = torch.tensor([[[1.0, 0], [2, 0]]], dtype=D), torch.tensor([[[3.0, 1], [2, 1]]], dtype=D)
    assert samd_loss(st, te, preset="official_code").item() == pytest.approx(0.018464, abs=1e-6)
    assert samd_loss(st, te).item() == pytest.approx(0.073854, abs=1e-6)


def test_golden_nld():
    assert LOGITS.std().item() == pytest.approx(0.763763, abs=1e-6)
    assert nld_loss(LOGITS, TEACHER, DRAW, 2.0, 0.1).item() == pytest.approx(0.564650, abs=1e-6)
    assert nld_loss(LOGITS, TEACHER, DRAW, 2.0, 0.1, "official_code").item() == pytest.approx(0.640928, abs=1e-6)
    assert nld_loss(LOGITS, TEACHER, DRAW, 2.0, 0.0).item() == pytest.approx(0.602209, abs=1e-6)
    assert nld_loss(LOGITS, TEACHER, DRAW, 2.0, 0.0, "official_code").item() == pytest.approx(0.602209, abs=1e-6)


@presets
def test_samd_in_loops(preset):
    st, te = 3 * torch.rand(4, 3, 5, dtype=D), torch.rand(4, 3, 5, dtype=D)
    te *= torch.tensor([0.3, 1, 2, 5], dtype=D)[:, None, None]
    expected = samd_in_loops(st, te, 0.7, preset)
    assert samd_loss(st, te, 0.7, preset).item() == pytest.approx(expected, rel=1e-9)


@presets
def test_nld_in_loops(preset):
    s, v, draw = (torch.randn(6, 4, dtype=D) for _ in range(3))
    expected = nld_in_loops(s, v, draw, 3.0, 0.4, preset)
    assert nld_loss(s, v, draw, 3.0, 0.4, preset).item() == pytest.approx(expected, rel=1e-9)


def test_spikes_are_summed_over_time_and_channels():
    spikes, te = (torch.rand(3, 2, 4, 3, 3) > 0.6).to(D), torch.rand(2, 2, 5, 3, 3, dtype=D)
    counts = [[[0.0] * 3 for _ in range(3)] for _ in range(2)]
    for t, b, c, h, w in torch.nonzero(spikes).tolist():
        counts[b][h][w] += 1 if 0 <= t < 3 and 0 <= c < 4 else 0
    linear = nn.Linear(5, 3).to(D)
    logits = linear(te.mean((-2, -1)))
    objective = SAMD("s", "t", linear, temperature=0.7)
    target = torch.zeros(2, 3, 3, dtype=D)
    for b in range(2):
        best = int(logits[:, b].sum(0).argmax())
        for d in range(5):
            target[b] += (linear.weight[best, d] * (te[0, b, d] + te[1, b, d]) / 2).detach()
    expected = samd_in_loops(torch.tensor(counts, dtype=D), target.clamp(min=0), 0.7, "paper")
    value = objective(step_of(spikes, te, teacher=logits))
    assert value.item() == pytest.approx(expected, rel=1e-9)
    for other in (spikes.flip(0), spikes.flip(2)):
        torch.testing.assert_close(objective(step_of(other, te, teacher=logits)), value)
    order = torch.randperm(9)
    shuffled = (x.flatten(-2)[..., order].unflatten(-1, (3, 3)) for x in (spikes, te))
    torch.testing.assert_close(objective(step_of(*shuffled, teacher=logits)), value)
    tokens = spikes.flatten(3).mT
    torch.testing.assert_close(objective(step_of(tokens, te, teacher=logits)), value)
    with pytest.raises(ValueError, match="no map"):
        objective(step_of(spikes[..., 0, 0], te, teacher=logits))


def test_samd_vanishes_for_the_same_place_and_is_bounded():
    te = 50 * torch.rand(3, 4, 4, dtype=D)
    assert samd_loss(3.0 * te + 7, te) < 1e-9
    assert samd_loss(torch.rand(3, 4, 4, dtype=D), te) > 1e-3
    half = torch.tensor([[1.0] * 8 + [0.0] * 8], dtype=D).view(1, 4, 4)
    for a, b in ((half, 1 - half), *((torch.rand(1, 4, 4) > 0.5, torch.rand(1, 4, 4) > 0.5) for _ in range(20))):
        assert samd_loss(a.to(D), b.to(D), preset="official_code") < 0.124
    assert samd_loss(half, 1 - half, preset="official_code") > 0.12


def test_batch_mates_matter_in_the_code_only():
    st, te = torch.rand(4, 3, 3, dtype=D), torch.rand(4, 3, 3, dtype=D)
    assert torch.equal(looks(st, 0.7)[:2], looks(st[:2], 0.7))
    st[3] += 4
    torch.testing.assert_close(samd_loss(st[:1], te[:1]), samd_loss(st, te) * 4 - samd_loss(st[1:], te[1:]) * 3)
    assert not torch.allclose(looks(st, 0.7, True)[:2], looks(st[:2], 0.7, True))


def test_silence_is_uniform():
    silent, te = torch.zeros(2, 3, 3, requires_grad=True), torch.rand(2, 3, 3)
    value = samd_loss(silent, te)
    (grad,) = torch.autograd.grad(value, silent)
    assert value.isfinite() and grad.isfinite().all()
    torch.testing.assert_close(looks(silent, 2.0).exp(), torch.full((2, 9), 1 / 9))


@presets
def test_only_the_student_gets_a_gradient(preset):
    st, te = torch.rand(3, 2, 4, dtype=D, requires_grad=True), torch.rand(3, 2, 4, dtype=D, requires_grad=True)
    grad, none = torch.autograd.grad(samd_loss(st, te, 0.7, preset), [st, te], allow_unused=True)
    assert none is None and grad.abs().max() > 0
    assert torch.autograd.gradcheck(lambda x: samd_loss(x, te.detach(), 0.7, preset), st)
    s, v = torch.randn(3, 4, dtype=D, requires_grad=True), torch.randn(3, 4, dtype=D, requires_grad=True)
    grad, none = torch.autograd.grad(nld_loss(s, v, s.detach().flip(1), 3.0, 0.4, preset), [s, v], allow_unused=True)
    assert none is None and grad.abs().max() > 0


def test_statistics_of_the_noise_have_a_gradient_in_the_code_only():
    s, draw = torch.randn(3, 4, dtype=D, requires_grad=True), torch.randn(3, 4, dtype=D)
    v = torch.randn(3, 4, dtype=D)
    (grad,) = torch.autograd.grad(nld_loss(s, v, draw, 3.0, 0.4), s)
    noisy = s + 0.4 * (s.mean(1, keepdim=True) + draw * s.std(1, keepdim=True))
    expected = 3.0 * (torch.softmax(noisy / 3, 1) - torch.softmax(v / 3, 1)) / 3
    torch.testing.assert_close(grad, expected.detach())
    assert torch.autograd.gradcheck(lambda x: nld_loss(x, v, draw, 3.0, 0.4, "official_code"), s)


@presets
def test_nld_invariants(preset):
    v = torch.randn(3, 4, dtype=D)
    for seed in range(20):
        torch.manual_seed(seed)
        s, draw = torch.randn(3, 4, dtype=D), torch.randn(3, 4, dtype=D)
        assert nld_loss(s, v, draw, 3.0, 0.4, preset) >= 0
        torch.testing.assert_close(nld_loss(s, v, draw, 3.0, 0.0, preset), kd_loss(s, v, 3.0))
    even = torch.full((3, 4), 1.7, dtype=D)
    torch.testing.assert_close(nld_loss(even, v, draw, 3.0, 0.4), kd_loss(even, v, 3.0))
    sure = torch.tensor([[400.0, 0, 0, 0]] * 3, requires_grad=True)
    value = nld_loss(sure, torch.zeros(3, 4), torch.tensor([[1.0, 0, 0, 0]]), 1.0, 0.4, preset)
    (grad,) = torch.autograd.grad(value, sure)
    assert value.isfinite() and grad.isfinite().all()


@presets
def test_noise_is_drawn_in_training_only(preset):
    s, v = torch.randn(3, 2, 4, dtype=D), torch.randn(2, 2, 4, dtype=D)
    step, objective = step_of(torch.zeros(3, 2, 1, 1, 1, dtype=D), torch.zeros(1), s, v), NLD(3.0, 0.4, preset)
    torch.manual_seed(5)
    value = objective(step)
    torch.manual_seed(5)
    draw = torch.randn(2, 4, dtype=D)
    torch.testing.assert_close(value, nld_loss(s.mean(0), v.mean(0), draw, 3.0, 0.4, preset))
    assert objective(step) != value
    state = torch.get_rng_state()
    quiet = objective.eval()(step)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(quiet, kd_loss(s.mean(0), v.mean(0), 3.0))


@pytest.mark.parametrize("steps", [1, 3])
def test_both_maps_agree_on_a_linear_layer_after_the_mean(steps):
    teacher = (toy_teacher() if steps == 1 else toy_student(steps)).double()
    x = toy_batch()["x"].double()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    out = infer(teacher, x, taps=["stage2"])
    feature = rate(out.taps["stage2"])
    plain = activation_map(feature, teacher.head.weight[rate(out.logits).argmax(1)].detach())
    graded = grad_cam(teacher, x, "stage2")
    size = feature.shape[-1] * feature.shape[-2]
    torch.testing.assert_close(graded * size, plain)
    assert plain.max() > 0 and not graded.requires_grad
    assert activation_map(feature, torch.full_like(feature[..., 0, 0], -1.0)).abs().max() == 0
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.training and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not teacher.get_submodule("stage2")._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(grad_cam(teacher.requires_grad_(False), x, "stage2"), graded)


def test_grad_cam_by_finite_differences():
    teacher, x = Plain(square=True).double(), torch.randn(3, 2, 5, 5, dtype=D)
    feature = teacher.body(x).detach()
    best = teacher(x).argmax(1)
    omega = torch.zeros(3, 3, dtype=D)
    for d in range(3):
        for i in range(9):
            moved = feature.clone()
            moved.flatten(2)[:, d, i] += 1e-6
            slope = (teacher.head(moved.square().mean((2, 3))) - teacher.head(feature.square().mean((2, 3)))) / 1e-6
            omega[:, d] += slope[torch.arange(3), best].detach() / 9
    torch.testing.assert_close(grad_cam(teacher, x, "body"), activation_map(feature, omega), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("square", [False, True])
def test_plain_cam_only_of_a_teacher_that_is_linear_in_the_mean(square):
    teacher, batch = Plain(square), toy_batch()
    teacher.head.weight.data.abs_()  # no empty map
    plan = ckdsnn(toy_student(), teacher, resize=True)
    samd, out = plan.loss["samd"][1], infer(teacher, batch["x"], taps=["body"])
    assert isinstance(samd, SAMD) and samd.plain is None
    step = Step(batch, {"teacher": out})
    graded = grad_cam(teacher, batch["x"], "body")
    plain = activation_map(out.taps["body"][0], teacher.head.weight.detach()[out.logits[0].argmax(1)])
    torch.testing.assert_close(samd.target(step), graded if square else plain)
    assert samd.plain is not square and plain.max() > 0 and (graded - plain).abs().max() > 1e-3
    torch.testing.assert_close(samd.target(step), graded if square else plain)
    assert Trainee(Stage([batch], **vars(plan)))(batch, 0.0)[0].isfinite()
    with pytest.raises(ValueError, match=r"\[4, 1, 4, 4\].*\[4, 1, 6, 6\].*resize"):
        Trainee(Stage([batch], **vars(ckdsnn(toy_student(), teacher))))(batch, 0.0)


def test_only_a_map_that_is_named_may_hold_other_things_than_spikes():
    membranes = models.build("spike_driven(dim=8, pools=(4,))", classes=4, channels=2, steps=2)
    how = dict(gamma=0.0, resize=True)
    for student in (membranes, toy_teacher()):
        trainee = Trainee(Stage([toy_batch()], **vars(ckdsnn(student, toy_teacher(), **how))))
        for again in (trainee, trainee.eval()):
            with pytest.raises(ValueError, match="of the student holds no spikes: name the map to be summed"):
                again(toy_batch(), 0.0)
        last = [*student.dims][-1]
        named = Trainee(Stage([toy_batch()], **vars(ckdsnn(student, toy_teacher(), tap=last, **how))))
        assert named(toy_batch(), 0.0)[0].isfinite()
    summed = models.build("sew_resnet18(stem=cifar, width=4)", classes=4, channels=2, steps=2)
    assert Trainee(Stage([toy_batch()], **vars(ckdsnn(summed, toy_teacher(), **how))))(toy_batch(), 0.0)[0].isfinite()


def test_builder():
    student, teacher = toy_student(), toy_teacher()
    plan = ckdsnn(student, teacher)
    assert {k: w for k, (w, _) in plan.loss.items()} == {"ce": 1.0, "samd": 1.0, "nld": 1.0}
    samd, nld = plan.loss["samd"][1], plan.loss["nld"][1]
    assert isinstance(samd, SAMD) and isinstance(nld, NLD)
    assert (samd.how, samd.resize) == ({"temperature": 2.0, "preset": "paper"}, False)
    assert samd.frozen == (teacher, teacher.head)
    assert (nld.tau, nld.noise, nld.preset) == (2.0, 0.1, "paper")
    assert not [*samd.parameters()] and not [*samd.children()]
    build = partial(ckdsnn, map_temperature=0.7, tau=3.0, noise=0.3, preset="official_code", beta=0.5, gamma=0.2)
    plan = build(student, teacher, tap="stage1", teacher_tap="stage1")
    samd, nld = plan.loss["samd"][1], plan.loss["nld"][1]
    assert isinstance(samd, SAMD) and isinstance(nld, NLD)
    assert (samd.s, samd.t, samd.how) == ("stage1", "stage1", {"temperature": 0.7, "preset": "official_code"})
    assert (nld.tau, nld.noise, nld.preset) == (3.0, 0.3, "official_code")
    assert (plan.loss["samd"][0], plan.loss["nld"][0]) == (0.5, 0.2)
    assert set(ckdsnn(student, teacher, beta=0, gamma=0).loss) == {"ce"}
