"""meom: golden values, masks that stay, masked views computed by hand, and both terms in loops."""

from functools import partial
from math import exp, log

import pytest
import torch
from torch import nn

from spikedistill.core.output import Output, rate
from spikedistill.core.step import Step
from spikedistill.core.taps import infer
from spikedistill.functional import kd_per_step
from spikedistill.methods.meom import TMPD, TPD, fixed_masks, mask_shape, meom, tmpd_loss, tpd_loss, views
from tests.methods.toy import toy_batch, toy_student, toy_teacher

D = torch.float64
GOLD = torch.tensor([[[2.0, 0, -1]], [[0, 1, 0]]], dtype=D)
THREE = torch.cat([GOLD, torch.tensor([[[1.0, 0.5, 0]]], dtype=D)])


def softmax(z):
    total = sum(exp(v) for v in z)
    return [exp(v) / total for v in z]


def tpd_in_loops(z, tau):
    steps, batch, classes = z.shape
    total = 0.0
    for b in range(batch):
        means = [[sum(z[k, b, c].item() for k in range(t + 1)) / (t + 1) for c in range(classes)] for t in range(steps)]
        for t in range(steps - 1):
            p, q = (softmax([x / tau for x in means[i]]) for i in (t + 1, t))
            total -= sum(a * log(b) for a, b in zip(p, q))
    return total / (batch * (steps - 1))


def tmpd_in_loops(z, seen, lam, tau):
    steps, batch, classes = z.shape
    total = 0.0
    for t in range(steps):
        for b in range(batch):
            mixed = [((1 - lam) * seen[0, b, c] + lam * seen[t + 1, b, c]).item() for c in range(classes)]
            p, q = softmax([x / tau for x in mixed]), softmax([x / tau for x in z[t, b].tolist()])
            total += tau**2 * sum(a * log(a / b) for a, b in zip(p, q))
    return total / (steps * batch)


class Tiny(nn.Module):
    """A teacher whose tap is a vector: h is one linear layer. With time: [T, B, D] instead of [B, D]."""

    steps: int

    def __init__(self, weight, time=1):
        super().__init__()
        self.body, self.time, self.dims = nn.Identity(), time, {"body": weight.shape[1]}
        self.head = nn.Linear(*weight.T.shape, bias=False).to(D)
        self.head.weight = nn.Parameter(weight)

    def forward(self, x):
        if self.time > 1:
            x = torch.stack([x * (t + 1) for t in range(self.time)])
        return self.head(self.body(x).square() if self.time > 1 else self.body(x))


def step_of(z, x):
    return Step({"x": x}, {"student": Output(z)})


def test_golden_tpd():
    assert tpd_loss(GOLD, 1.0).item() == pytest.approx(1.198699, abs=1e-6)
    assert tpd_loss(THREE, 1.0).item() == pytest.approx(1.088210, abs=1e-6)
    assert tpd_loss(GOLD, 2.0).item() == pytest.approx(1.125071, abs=1e-6)


def test_golden_view():
    teacher = Tiny(torch.tensor([[1, 0.5], [0, 0.5], [-1, 0]], dtype=D))
    seen = views(teacher, torch.tensor([[1.0, 2]], dtype=D), "body", lambda f: torch.tensor([[True, False]]))
    assert seen.tolist() == [[[2, 1, -1]], [[1, 0, -1]]]
    z, mixed = torch.randn(1, 1, 3, dtype=D), torch.tensor([[[1.5, 0.5, -1]]], dtype=D)
    torch.testing.assert_close(tmpd_loss(z, seen, 0.5, 2.0), kd_per_step(z, mixed, 2.0))


def test_in_loops():
    z, seen = torch.randn(4, 3, 5, dtype=D), torch.randn(5, 3, 5, dtype=D)
    assert tpd_loss(z, 1.7).item() == pytest.approx(tpd_in_loops(z, 1.7), rel=1e-9)
    assert tmpd_loss(z, seen, 0.3, 1.7).item() == pytest.approx(tmpd_in_loops(z, seen, 0.3, 1.7), rel=1e-9)


@pytest.mark.parametrize(("level", "shape"), [("element", (7, 4, 4)), ("channel", (7, 1, 1))])
def test_views_of_a_convolutional_teacher(level, shape):
    teacher, x = toy_teacher().double(), toy_batch()["x"].double()
    out = infer(teacher, x, taps=["stage2"])
    feature, masks = out.taps["stage2"], fixed_masks(3, mask_shape((7, 4, 4), level), 0.6, 5)
    assert masks.shape == (3, *shape)
    expected = [out.logits[0]]
    for t in range(3):
        masked = feature[0].clone()
        for b in range(len(x)):
            for d in range(7):
                for i in range(4):
                    for j in range(4):
                        kept = masks[t, d, i, j] if level == "element" else masks[t, d, 0, 0]
                        masked[b, d, i, j] *= float(kept)
        expected.append(teacher.head(masked.mean((-2, -1))))
    seen = views(teacher, x, "stage2", lambda f: masks)
    torch.testing.assert_close(seen, torch.stack(expected).detach())
    z = torch.randn(3, 4, 4, dtype=D)
    objective = TMPD(teacher, "stage2", 0.6, 0.3, 1.7, level, seed=5)
    expected_loss = tmpd_in_loops(z, seen, 0.3, 1.7)
    assert objective(step_of(z, x)).item() == pytest.approx(expected_loss, rel=1e-9)


def test_a_tap_in_the_middle_and_a_teacher_with_time():
    spiking, x, batch = toy_student(3).double(), toy_batch()["x"].double(), 4
    masks = fixed_masks(2, (5, 8, 8), 0.6, 5)
    seen = views(spiking, x, "stage1", lambda f: masks)
    torch.testing.assert_close(seen[0], rate(infer(spiking, x).logits))
    alone = views(spiking, x[:2], "stage1", lambda f: masks[1:])
    torch.testing.assert_close(alone[1], seen[2, :2])
    assert seen.shape == (3, batch, 4) and (seen[0] - seen[1]).abs().max() > 1e-6
    teacher, x = Tiny(torch.randn(3, 2, dtype=D), time=3), torch.randn(5, 2, dtype=D)
    mask = torch.tensor([[True, False]])
    expected = sum(((t + 1) * x * mask).square() @ teacher.head.weight.T for t in range(3)) / 3
    torch.testing.assert_close(views(teacher, x, "body", lambda f: mask)[1], torch.as_tensor(expected).detach())
    frames = torch.rand(2, *toy_batch()["x"].shape)
    assert views(toy_teacher(), frames, "stage2", lambda f: f.new_ones(1, *f.shape)).shape == (2, batch, 4)


def test_a_tap_without_the_batch_is_refused():
    class Merged(Tiny):
        def forward(self, x):
            return super().forward(self.body(x.repeat(2, 1))[: len(x)])

    teacher, merged = Merged(torch.randn(3, 2, dtype=D)), Merged(torch.randn(3, 2, dtype=D))
    merged.steps = 2
    for model, text in ((teacher, r"'body' has shape \[6, 2\]"), (merged, r"'body' is \[6, 2\]")):
        with pytest.raises(ValueError, match=text):
            views(model, torch.randn(3, 2, dtype=D), "body", lambda f: f.new_ones(1, 2))


def test_as_many_steps_as_samples_are_told_apart():
    teacher, x = Tiny(torch.randn(3, 2, dtype=D), time=4), torch.randn(4, 2, dtype=D)
    teacher.steps, mask = 4, torch.tensor([[True, False]])
    seen = views(teacher, x, "body", lambda f: mask)
    assert seen.shape == (2, 4, 3)
    for b in range(4):
        torch.testing.assert_close(seen[:, b : b + 1], views(teacher, x[b : b + 1], "body", lambda f: mask))


def test_the_teacher_stays_as_it_was():
    teacher, batch = toy_teacher(), toy_batch()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    seen = views(teacher, batch["x"], "stage2", lambda f: f.new_ones(2, *f.shape))
    assert not seen.requires_grad and teacher.training
    torch.testing.assert_close(seen, infer(teacher, batch["x"]).logits.expand(3, -1, -1))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not teacher.get_submodule("stage2")._forward_hooks


def test_without_masking_it_is_the_plain_per_step_term():
    teacher, x = toy_teacher(), toy_batch()["x"]
    z, v = torch.randn(3, 4, 4), infer(teacher, x).logits[0]
    for rho, lam in ((0.5, 0.0), (1.0, 0.5)):
        objective = TMPD(teacher, "stage2", rho, lam, tau=1.7)
        torch.testing.assert_close(objective(step_of(z, x)), kd_per_step(z, v, 1.7))
    masked = TMPD(teacher, "stage2", rho=0.5, tau=1.7)(step_of(z, x))
    assert abs(masked - kd_per_step(z, v, 1.7)) > 1e-4


def test_masks_depend_on_seed_and_step_alone():
    masks = fixed_masks(4, (30, 5, 5), 0.7, 3)
    assert masks.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert all((a != b).any() for i, a in enumerate(masks) for b in masks[:i])
    fixed_masks.cache_clear()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(fixed_masks(4, (30, 5, 5), 0.7, 3), masks)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fixed_masks(2, (30, 5, 5), 0.7, 3), masks[:2])
    assert not torch.equal(fixed_masks(4, (30, 5, 5), 0.7, 4), masks)
    assert mask_shape((6, 5, 4), "channel") == (6, 1, 1) and mask_shape((9, 6), "channel") == (1, 6)
    assert mask_shape((6,), "channel") == (6,) and mask_shape((6, 5, 4), "element") == (6, 5, 4)


def test_masks_are_drawn_for_every_batch_only_where_asked_and_in_training():
    teacher, x, z = toy_teacher(), toy_batch()["x"], torch.randn(3, 4, 4)
    objective = TMPD(teacher, "stage2", rho=0.5, resample="batch")
    values = [objective(step_of(z, x)).item() for _ in range(3)]
    assert len(set(values)) == 3
    torch.manual_seed(7)
    again = objective(step_of(z, x))
    torch.manual_seed(7)
    drawn = torch.rand(3, 7, 4, 4) < 0.5
    torch.testing.assert_close(again, tmpd_loss(z, views(teacher, x, "stage2", lambda f: drawn), 0.5, 3.0))
    fixed = TMPD(teacher, "stage2", rho=0.5)
    assert fixed(step_of(z, x)) == fixed(step_of(z, x)) == objective.eval()(step_of(z, x))


def test_tpd_is_at_least_the_entropy_and_equal_to_it_for_equal_steps():
    z = torch.randn(4, 3, 5, dtype=D)
    means = torch.stack([z[: t + 1].mean(0) for t in range(4)])
    p = torch.softmax(means[1:] / 1.7, -1)
    assert tpd_loss(z, 1.7) > -(p * p.log()).sum(-1).mean()
    p = torch.softmax(z[0] / 1.7, -1)
    torch.testing.assert_close(tpd_loss(z[:1].expand(4, -1, -1), 1.7), -(p * p.log()).sum(-1).mean())
    assert abs(tpd_loss(z.flip(0), 1.7) - tpd_loss(z, 1.7)) > 1e-4


def test_gradients():
    z = torch.randn(3, 2, 5, dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad(tpd_loss(z, 1.7), z)
    means = [z[0], (z[0] + z[1]) / 2, (z[0] + z[1] + z[2]) / 3]
    slopes = [(torch.softmax(means[t] / 1.7, -1) - torch.softmax(means[t + 1] / 1.7, -1)) / 1.7 / 4 for t in range(2)]
    expected = torch.stack([slopes[0] + slopes[1] / 2, slopes[1] / 2, torch.zeros_like(slopes[0])])
    torch.testing.assert_close(grad, expected.detach())
    assert grad[2].abs().max() == 0
    one = tpd_loss(z[:1], 1.7)
    (grad,) = torch.autograd.grad(one, z)
    assert one == 0 and grad.abs().max() == 0
    seen = torch.randn(4, 2, 5, dtype=D, requires_grad=True)
    grad, none = torch.autograd.grad(tmpd_loss(z, seen, 0.3, 1.7), [z, seen], allow_unused=True)
    assert none is None and grad.abs().max() > 0


def test_builder():
    student, teacher = toy_student(), toy_teacher()
    plan = meom(student, teacher)
    assert {k: w for k, (w, _) in plan.loss.items()} == {"ce_per_step": 1.0, "tmpd": 0.5, "tpd": 0.3}
    tmpd, tpd = plan.loss["tmpd"][1], plan.loss["tpd"][1]
    assert isinstance(tmpd, TMPD) and isinstance(tpd, TPD)
    assert (tmpd.tap, tmpd.rho, tmpd.lam, tmpd.tau, tpd.tau) == ("stage2", 0.9, 0.5, 3.0, 3.0)
    assert (tmpd.level, tmpd.resample, tmpd.seed) == ("element", "never", 0)
    assert not [*tmpd.parameters()] and not [*tmpd.buffers()]
    build = partial(meom, teacher_tap="stage1", tmpd=0.2, tpd=0.1, rho=0.6, lam=0.3, tau=2.0, tpd_tau=1.5)
    plan = build(student, teacher, level="channel", resample="batch", seed=4)
    tmpd, tpd = plan.loss["tmpd"][1], plan.loss["tpd"][1]
    assert isinstance(tmpd, TMPD) and isinstance(tpd, TPD)
    assert (tmpd.tap, tmpd.rho, tmpd.lam, tmpd.tau, tpd.tau) == ("stage1", 0.6, 0.3, 2.0, 1.5)
    assert (tmpd.level, tmpd.resample, tmpd.seed) == ("channel", "batch", 4)
    assert (plan.loss["tmpd"][0], plan.loss["tpd"][0]) == (0.2, 0.1)
    z = torch.randn(3, 4, 4)
    assert tpd(step_of(z, None)) == tpd_loss(z, 1.5)
    assert set(meom(student, teacher, tmpd=0, tpd=0).loss) == {"ce_per_step"}
