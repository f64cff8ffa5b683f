"""BKD: golden values of an independent numpy computation, the formula in loops, and the invariants of the paper."""

from math import exp, log

import pytest
import torch
from torch import nn

from spikedistill.core.fit import Stage, Trainee
from spikedistill.core.output import Output, rate
from spikedistill.core.step import Step
from spikedistill.core.taps import infer
from spikedistill.methods import bkd
from spikedistill.methods.bkd import BKD, WSLD, bkd_loss, blur, wsld_loss
from spikedistill.models import Foreign, measure_dims
from spikedistill.spec import SpecError
from tests.methods.toy import CLASSES, toy_batch, toy_student, toy_teacher
from tests.models.test_foreign import ViT

D = torch.float64


def softmax(z):
    total = sum(exp(v) for v in z)
    return [exp(v) / total for v in z]


def wsld_in_loops(zs, zt, y, tau):
    total = 0.0
    for s, t, target in zip(zs.tolist(), zt.tolist(), y.tolist()):
        ps, pt = softmax(s), softmax(t)
        cs, ct = (-sum(w * log(p) for w, p in zip(target, probs)) for probs in (ps, pt))
        weight = 1 - exp(-max(0.0, cs / (ct + 1e-7)))
        soft_t, soft_s = softmax([v / tau for v in t]), softmax([v / tau for v in s])
        total += weight * -sum(a * log(b) for a, b in zip(soft_t, soft_s))
    return tau**2 * total / len(zs)


def test_wsld_golden_value():
    zs, zt = torch.tensor([[2.0, 0, -1]], dtype=D), torch.tensor([[1, 0.5, -0.5]], dtype=D)
    assert wsld_loss(zs, zt, torch.tensor([0]), 2.0).item() == pytest.approx(1.102921, abs=1e-6)


@pytest.mark.parametrize("tau", [1.0, 3.5])
def test_wsld_in_loops_with_hard_and_soft_targets(tau):
    zs, zt = torch.randn(5, 4, dtype=D) * 2, torch.randn(5, 4, dtype=D) * 2
    labels = torch.randint(0, 4, (5,))
    hard = nn.functional.one_hot(labels, 4).to(D)
    soft = 0.7 * hard + 0.3 * hard.roll(1, 0)
    assert wsld_loss(zs, zt, soft, tau).item() == pytest.approx(wsld_in_loops(zs, zt, soft, tau), rel=1e-9)
    assert wsld_loss(zs, zt, labels, tau).item() == pytest.approx(wsld_in_loops(zs, zt, hard, tau), rel=1e-9)


def test_wsld_at_the_teacher_has_value_but_no_gradient():
    z = torch.randn(3, 5, dtype=D, requires_grad=True)
    value = wsld_loss(z, z.detach(), torch.tensor([0, 1, 2]), 2.0)
    soft = -(torch.softmax(z / 2, 1) * torch.log_softmax(z / 2, 1)).sum(1).mean()
    assert value.item() == pytest.approx((4 * (1 - exp(-1)) * soft).item(), rel=1e-5)
    (grad,) = torch.autograd.grad(value, z)
    assert grad.abs().max() < 1e-12


def test_wsld_vanishes_for_a_student_that_is_right_and_the_weight_has_no_gradient():
    sure = torch.tensor([[60.0, 0, 0]], dtype=D)
    assert wsld_loss(sure, torch.zeros(1, 3, dtype=D), torch.tensor([0]), 2.0) < 1e-12
    zs, zt = torch.randn(4, 3, dtype=D, requires_grad=True), torch.randn(4, 3, dtype=D, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0])
    grad, none = torch.autograd.grad(wsld_loss(zs, zt, y, 3.0), [zs, zt], allow_unused=True)
    assert none is None
    cs, ct = (nn.functional.cross_entropy(z, y, reduction="none") for z in (zs, zt))
    weight = (1 - torch.exp(-cs / (ct + 1e-7))).detach()
    expected = 3.0 * weight[:, None] * (torch.softmax(zs / 3, 1) - torch.softmax(zt / 3, 1)) / 4
    torch.testing.assert_close(grad, expected.detach())


def step_of(student, teacher, labels=None):
    zeros = torch.zeros(len(student), student.shape[1], 3, dtype=student.dtype)
    passes = {"student": Output(zeros, {"s": student}), "teacher": Output(zeros[:1], {"t": teacher})}
    return Step({"y": labels}, passes)


def identity(objective):
    objective.restore = nn.Identity()
    return objective


def test_feature_golden_values_for_map_and_vector():
    x, objective = torch.ones(1, 2, 3, 2, 2), identity(BKD("s", "t", (3, 3), ratio=0.0))
    assert 2e-3 * objective(step_of(x, torch.zeros(1, 2, 3, 2, 2))).item() == pytest.approx(0.024)
    assert 2e-3 * objective(step_of(x, torch.zeros(1, 2, 3))).item() == pytest.approx(0.006)


def test_feature_in_loops():
    torch.manual_seed(0)
    objective = BKD("s", "t", (2, 3), ratio=0.4).to(D)
    s, t = torch.rand(4, 2, 2, 3, 3, dtype=D), torch.randn(1, 2, 3, 3, 3, dtype=D)
    torch.manual_seed(5)
    value = objective(step_of(s, t)).item()
    torch.manual_seed(5)
    draw = torch.rand(2, 3, 1, 1)
    x = objective.align(sum(s[i] for i in range(4)) / 4).clone()
    for b in range(2):
        for d in range(3):
            if draw[b, d] < 0.4:
                x[b, d] = 0
    y, total = objective.restore(x), 0.0
    for b in range(2):
        for d in range(3):
            for h in range(3):
                for w in range(3):
                    total += (y[b, d, h, w] - t[0, b, d, h, w]).item() ** 2
    assert value == pytest.approx(total / 2, rel=1e-9)
    objective.eval()
    clean = objective.restore(objective.align(s.mean(0)))
    assert objective(step_of(s, t)).item() == pytest.approx(((clean - t[0]) ** 2).sum().item() / 2, rel=1e-9)


def test_blur_drops_whole_channels_of_samples():
    x = torch.rand(200, 50, 3, 4) + 0.5
    y = blur(x, 0.3, torch.Generator().manual_seed(0))
    kept = y.flatten(2) == x.flatten(2)
    assert (kept.all(2) | (y.flatten(2) == 0).all(2)).all()
    assert (~kept.all(2)).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(y, blur(x, 0.3, torch.Generator().manual_seed(0)))
    assert not torch.equal(y, blur(x, 0.3, torch.Generator().manual_seed(1)))
    assert torch.equal(blur(x, 0.0), x)
    assert blur(x, 1.0).abs().max() == 0


def test_blur_of_everything_gives_the_student_no_gradient():
    s = torch.rand(2, 2, 4, 3, 3, requires_grad=True)
    objective = BKD("s", "t", (4, 5), ratio=1.0)
    objective(step_of(s, torch.rand(1, 2, 5, 3, 3))).backward()
    assert s.grad.abs().max() == 0 and objective.align.weight.grad.abs().max() == 0
    assert objective.restore[2].bias.grad.abs().max() > 0


def test_feature_invariants():
    s, t = torch.rand(4, 2, 3, 3, 3), torch.rand(1, 2, 3, 3, 3)
    objective = BKD("s", "t", (3, 3), ratio=0.5).eval()
    value = objective(step_of(s, t))
    torch.testing.assert_close(objective(step_of(s.flip(0), t)), value)
    torch.testing.assert_close(objective(step_of(s.mean(0, keepdim=True), t)), value)
    torch.testing.assert_close(objective(step_of(torch.cat([s, s], 1), torch.cat([t, t], 1))), value)
    assert identity(objective)(step_of(t.expand(4, -1, -1, -1, -1), t)) < 1e-10


def test_student_and_teacher_enter_as_their_time_means():
    s, t = torch.rand(4, 2, 3, 3, 3), torch.rand(3, 2, 3, 3, 3)
    objective = BKD("s", "t", (3, 3)).eval()
    torch.testing.assert_close(objective(step_of(s, t)), objective(step_of(s, t.mean(0, keepdim=True))))
    zs, zt, y = torch.randn(4, 5, 3, dtype=D), torch.randn(2, 5, 3, dtype=D), torch.tensor([0, 1, 2, 0, 1])
    step = Step({"y": y}, {"student": Output(zs), "teacher": Output(zt)})
    torch.testing.assert_close(WSLD(3.0)(step), wsld_loss(zs.mean(0), zt.mean(0), y, 3.0))


def test_the_feature_term_gives_the_teacher_no_gradient():
    s, t = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4, requires_grad=True)
    for reduction in ("sum_per_sample", "mean"):
        grad, none = torch.autograd.grad(bkd_loss(s, t, reduction), [s, t], allow_unused=True)
        assert none is None and grad.abs().max() > 0
    student, teacher = torch.rand(2, 2, 3, 4, 4), torch.rand(1, 2, 3, 2, 2, requires_grad=True)
    BKD("s", "t", (3, 3), resize=True)(step_of(student, teacher)).backward()
    assert teacher.grad is None


def test_adapter_only_where_channels_differ():
    block = 2 * (9 * 5**2 + 5)
    assert sum(p.numel() for p in BKD("s", "t", (5, 5)).parameters()) == block
    assert sum(p.numel() for p in BKD("s", "t", (4, 5)).parameters()) == block + 4 * 5 + 5


def test_maps_of_other_size_are_refused_with_both_shapes_or_interpolated():
    s, t = torch.rand(2, 2, 3, 4, 4), torch.rand(1, 2, 3, 2, 2)
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\].*\[2, 3, 2, 2\]"):
        BKD("s", "t", (3, 3))(step_of(s, t))
    assert BKD("s", "t", (3, 3), resize=True)(step_of(s, t)).isfinite()


def test_tokens_and_vectors_that_do_not_fit_are_refused():
    s, tokens = torch.rand(2, 2, 3, 4, 4), torch.rand(1, 2, 16, 3)
    with pytest.raises(ValueError, match=r"\[2, 16, 3\] do not fit: choose a teacher tap that is a map .* or a vector"):
        BKD("s", "t", (3, 3))(step_of(s, tokens))
    for x in (s.flatten(3).mT, s.mean((-2, -1))):
        with pytest.raises(ValueError, match=r"the student's 's' is .*: choose a map"):
            BKD("s", "t", (3, 3))(step_of(x, torch.rand(1, 2, 3)))


def test_mean_reduction_is_the_sum_divided_by_the_size_of_a_sample():
    a, b = torch.rand(3, 4, 5, 6), torch.rand(3, 4, 5, 6)
    torch.testing.assert_close(bkd_loss(a, b), bkd_loss(a, b, "mean") * 4 * 5 * 6)


def test_training_parts_stay_out_of_the_student():
    student, teacher = toy_student(), toy_teacher()
    keys = [*student.state_dict()]
    plan = bkd(student, teacher)
    assert [*student.state_dict()] == keys and set(plan.loss) == {"ce", "bkd", "wsld"}
    assert set(bkd(student, teacher, weight=0, wsld=0).loss) == {"ce"}
    assert set(bkd(student, teacher, weight=0).loss) == {"ce", "wsld"}


def parts_of(student, teacher, **settings):
    """The trainee in evaluation mode, with the same restoration block for the same settings, its total and terms."""
    torch.manual_seed(3)
    trainee = Trainee(Stage([], **vars(bkd(student, teacher, **settings)))).eval()
    return trainee, *trainee(toy_batch(), 0.5)


def test_the_feature_term_is_linear_in_its_weight_and_the_total_is_the_sum():
    student, teacher = toy_student(), toy_teacher()
    for how in ({}, dict(reduction="mean", hidden=3, wsld=0.3)):
        (trainee, total, one), (_, _, three) = (parts_of(student, teacher, weight=w, **how) for w in (0.2, 0.6))
        passes = {k: infer(p.model, toy_batch()["x"], taps=trainee.taps[k]) for k, p in trainee.passes.items()}
        plain = trainee.loss["bkd"][1](Step(toy_batch(), passes))
        torch.testing.assert_close(one["bkd"], 0.2 * plain)
        torch.testing.assert_close(three["bkd"], 3 * one["bkd"])
        torch.testing.assert_close(three["wsld"], one["wsld"], rtol=0, atol=0)
        torch.testing.assert_close(total, one["ce"] + one["bkd"] + one["wsld"])


def test_without_both_terms_it_is_cross_entropy_to_the_bit():
    student, batch = toy_student(), toy_batch()
    trainee = Trainee(Stage([], **vars(bkd(student, toy_teacher(), weight=0, wsld=0))))
    plain = nn.CrossEntropyLoss()
    losses = trainee(batch, 0.5)[0], plain(rate(student(batch["x"])), batch["y"])
    ours, theirs = ([loss, *torch.autograd.grad(loss, [*student.parameters()])] for loss in losses)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(ours, theirs, strict=True))


def test_what_does_nothing_is_refused():
    student, teacher = toy_student(), toy_teacher()
    how = dict(blur=0.3, reduction="mean", hidden=3, resize=True, pool_before=True)
    for name, value in {**how, "tap": "stage1", "teacher_tap": "stage1"}.items():
        with pytest.raises(SpecError, match=f"{name}: it does nothing with weight=0"):
            bkd(student, teacher, weight=0, **{name: value})
    with pytest.raises(SpecError, match="tau: it does nothing with wsld=0"):
        bkd(student, teacher, wsld=0, tau=3.0)
    with pytest.raises(SpecError, match="resize: it does nothing with pool_before"):
        bkd(student, teacher, resize=True, pool_before=True)
    assert set(bkd(student, teacher, weight=5.0, reduction="mean", hidden=32, wsld=0).loss) == {"ce", "bkd"}
    assert set(bkd(student, teacher, weight=0, blur=0.15, hidden=None, wsld=0, tau=2.0).loss) == {"ce"}
    del student.dims, teacher.dims
    assert set(bkd(student, teacher, weight=0, tau=3.0).loss) == {"ce", "wsld"}  # needs no taps


def test_pool_before_restores_one_pixel_in_loops():
    torch.manual_seed(0)
    objective = BKD("s", "t", (2, 3), hidden=4, pool_before=True).to(D).eval()
    s, t = torch.rand(4, 2, 2, 3, 3, dtype=D), torch.randn(1, 2, 3, 5, 4, dtype=D)  # of any two sizes
    first, _, second = objective.restore

    def dense(conv, row):  # of a kernel on one pixel only the middle counts
        weight, middle = conv.weight.tolist(), conv.kernel_size[0] // 2
        return [b + sum(k[middle][middle] * v for k, v in zip(w, row)) for w, b in zip(weight, conv.bias.tolist())]

    total = 0.0
    for b in range(2):
        row = dense(objective.align, [sum(s[:, b, c].flatten().tolist()) / 36 for c in range(2)])
        row = dense(second, [max(v, 0.0) for v in dense(first, row)])
        total += sum((row[d] - t[0, b, d].mean().item()) ** 2 for d in range(3))
    assert objective(step_of(s, t)).item() == pytest.approx(total / 2, rel=1e-9)
    vector = t.mean((-2, -1))
    torch.testing.assert_close(objective(step_of(s, vector)), objective(step_of(s, t)))
    plans = [bkd(toy_student(), toy_teacher(), pool_before=p) for p in (False, True)]
    assert [plan.loss["bkd"][1].pool_before for plan in plans] == [False, True]


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("measured", [False, True])
def test_a_transformer_teaches_what_its_head_takes(pool, measured):
    torch.manual_seed(0)
    net = ViT(CLASSES, pool=pool)
    teacher = Foreign(net, (0.5,) * 2, (0.3,) * 2, size=12, dims={"blocks.0": 8, "blocks.1": 8, "head.input": 8})
    net.patch_embed.proj = nn.Conv2d(2, 8, 4, 4)
    batch = toy_batch()
    if measured:
        teacher.dims = measure_dims(teacher, batch["x"])
    trainee, _, terms = parts_of(toy_student(), teacher, weight=0.3, wsld=0)
    assert trainee.taps["teacher"] == ["net.head.input"]
    seen = infer(trainee.passes["student"].model, batch["x"], taps=["stage2"]).taps["stage2"]
    tokens = infer(teacher, batch["x"], taps=["net.norm"]).taps["net.norm"][0]
    vector = tokens[:, 0] if pool == "token" else net.fc_norm(tokens[:, 1:].mean(1))
    term = trainee.loss["bkd"][1]
    y = term.restore(term.align(seen.mean(0))).mean((-2, -1))
    torch.testing.assert_close(terms["bkd"], 0.3 * (y - vector).square().sum().detach() / len(y))
    trainee.train()(batch, 0.5)[0].backward()
    assert all(p.grad is None for p in teacher.parameters()) and term.restore[0].weight.grad.abs().max() > 0
