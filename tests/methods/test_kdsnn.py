"""KDSNN: the response of its golden values, the features in loops, margins by numerical integration."""

from math import exp, log, pi, sqrt
from typing import Any, cast

import pytest
import torch
from torch import nn

from spikedistill import models
from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.core.taps import infer
from spikedistill.functional import mean_square, shortcut
from spikedistill.methods import kdsnn
from spikedistill.methods.kdsnn import Features, MarginReLU, Pooled, margin, partial_distance
from spikedistill.spec import SpecError
from tests.methods.toy import toy_batch, toy_student, toy_teacher

D = torch.float64
ZS, ZT = torch.tensor([[2.0, 0, -1]], dtype=D), torch.tensor([[1, 0.5, -0.5]], dtype=D)


def step_of(student, teacher):
    """Taps s0, s1, ... [T, B, C, H, W] of the student and t0, t1, ... of the teacher."""
    zeros = torch.zeros(len(student[0]), student[0].shape[1], 3, dtype=student[0].dtype)
    s = {f"s{i}": x for i, x in enumerate(student)}
    t = {f"t{i}": x for i, x in enumerate(teacher)}
    return Step({}, {"student": Output(zeros, s), "teacher": Output(zeros[:1], t)})


def logits_step(z, v, y):
    return Step({"y": y}, {"student": Output(z), "teacher": Output(v)})


def total(plan, step):
    return torch.stack([weight * objective(step) for weight, objective in plan.loss.values()]).sum()


def plain(objective):
    """Without adapters, so that the numbers are those of the features."""
    objective.adapt = nn.ModuleList(nn.Identity() for _ in objective.taps["student"])
    return objective


def partial_in_loops(s, t):
    value = 0.0
    for a, b in zip(s.flatten().tolist(), t.flatten().tolist()):
        if not (a <= b <= 0):
            value += (a - b) ** 2
    return value / len(s)


def test_response_golden_values():
    step = logits_step(ZS[None], ZT[None], torch.tensor([0]))
    plan = kdsnn(toy_student(), toy_teacher(), variant="response")
    ce, kd = (objective(step).item() for _, objective in plan.loss.values())
    assert (ce, kd) == (pytest.approx(0.169846, abs=1e-6), pytest.approx(0.273413, abs=1e-6))
    assert total(plan, step).item() == pytest.approx(0.221630, abs=1e-6)


def test_response_is_a_convex_mix():
    step = logits_step(torch.randn(3, 4, 3, dtype=D), torch.randn(1, 4, 3, dtype=D), torch.tensor([0, 1, 2, 0]))
    other = logits_step(step.student.logits, step.teacher.logits, torch.tensor([2, 0, 1, 1]))
    build = lambda alpha: kdsnn(toy_student(), toy_teacher(), variant="response", alpha=alpha, tau=2.5)  # noqa: E731
    labels, soft, mix = (total(build(alpha), step) for alpha in (0.0, 1.0, 0.3))
    ce = nn.functional.cross_entropy(step.student.logits.mean(0), step.batch["y"])
    torch.testing.assert_close(labels, ce)
    torch.testing.assert_close(mix, 0.7 * labels + 0.3 * soft)
    torch.testing.assert_close(total(build(1.0), other), soft)


def test_response_in_loops_has_the_gradient_of_cross_entropy():
    z, v = torch.randn(3, 2, 4, dtype=D, requires_grad=True), torch.randn(2, 2, 4, dtype=D, requires_grad=True)
    plan = kdsnn(toy_student(), toy_teacher(), variant="response", alpha=1.0, tau=3.0)
    value = total(plan, logits_step(z, v, torch.tensor([0, 1])))
    expected = 0.0
    for i in range(2):
        s, t = ([sum(step[i, k].item() for step in x) / len(x) / 3.0 for k in range(4)] for x in (z, v))
        log_s, log_t = ([x - log(sum(map(exp, row))) for x in row] for row in (s, t))
        expected += sum(exp(q) * (q - p) for p, q in zip(log_s, log_t))
    assert value.item() == pytest.approx(9.0 * expected / 2, rel=1e-9)
    soft = torch.softmax(v.detach().mean(0) / 3, -1)
    cross_entropy = 9.0 * nn.functional.cross_entropy(z.mean(0) / 3, soft)
    torch.testing.assert_close(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (value, cross_entropy)))
    assert torch.autograd.grad(value, v, allow_unused=True) == (None,)


def test_response_at_the_teacher_is_zero_and_ignores_a_constant():
    v = torch.randn(1, 3, 4, dtype=D)
    z = (v + 5.0).repeat(2, 1, 1).requires_grad_()
    value = kdsnn(toy_student(), toy_teacher(), variant="response", alpha=1.0).loss["kd"][1](logits_step(z, v, None))
    assert abs(value.item()) < 1e-12
    assert torch.autograd.grad(value, z)[0].abs().max() < 1e-12


def test_partial_distance_case_by_case():
    for s, t, d in [
        (-2, -1, 0),
        (-1, -1, 0),
        (-1, 0, 0),
        (0.5, -1, 2.25),
        (0, 0, 0),
        (0.5, 0, 0.25),
        (-1, 2, 9),
        (3, 2, 1),
    ]:
        s = torch.full((1, 1, 1, 1), float(s), requires_grad=True)
        value = partial_distance(s, torch.full((1, 1, 1, 1), float(t)))
        assert value.item() == d
        assert (torch.autograd.grad(value, s)[0].item() == 0) == (d == 0)


@pytest.mark.parametrize("mean, std", [(0.3, 0.8), (-1.2, 0.5), (2.0, 1.5), (0.0, 1.0)])
def test_margin_is_the_mean_of_the_negative_side(mean, std):
    norm = nn.BatchNorm2d(2)
    with torch.no_grad():
        norm.bias.fill_(mean)
        norm.weight.copy_(torch.tensor([std, -std]))
    x = -torch.arange(0, 20_000).double() / 1000 - 0.0005
    density = torch.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * sqrt(2 * pi))
    expected = ((x * density).sum() / density.sum()).item()
    assert margin(norm, "").tolist() == pytest.approx([expected] * 2, rel=1e-4)
    assert not margin(norm, "").requires_grad


def test_margins_stay_finite_and_not_positive_at_the_extremes():
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([100.0, -100.0, 0.0, 3.0, -2.0]))
        norm.weight.copy_(torch.tensor([1e-3, 1e-3, 0.0, 0.0, 0.0]))
    m = margin(norm, "")
    assert m.isfinite().all() and (m <= 0).all()
    assert m[[1, 4]].tolist() == pytest.approx([-100.0, -2.0], abs=1e-3) and m[[0, 2, 3]].abs().max() < 1e-5


def test_feature_in_loops_with_margins_and_weights_of_depth():
    torch.manual_seed(0)
    sizes = [(2, 4), (3, 2), (2, 3)]
    s = [torch.randn(3, 2, c, h, h, dtype=D) for c, h in sizes]
    t = [torch.randn(2, 2, c, h, h, dtype=D) for c, h in sizes]
    m = [-torch.rand(c, dtype=D) for c, _ in sizes]
    dims = [(c, c) for c, _ in sizes]
    objective = plain(Features(["s0", "s1", "s2"], ["t0", "t1", "t2"], dims, [MarginReLU(x) for x in m])).to(D)
    expected = 0.0
    for i in range(3):
        x, target = sum(s[i][k] for k in range(3)) / 3, (t[i][0] + t[i][1]) / 2
        for c in range(sizes[i][0]):
            target[:, c] = target[:, c].clamp_min(m[i][c].item())
        expected += partial_in_loops(x, target) * (1 / 4, 1 / 2, 1.0)[i]
    assert objective(step_of(s, t)).item() == pytest.approx(expected, rel=1e-9)


def test_mse_in_loops_is_a_sum_over_groups_of_means():
    s = [torch.rand(2, 3, 2, 4, 4, dtype=D), torch.rand(2, 3, 3, 2, 2, dtype=D)]
    t = [torch.randn(1, 3, 2, 4, 4, dtype=D), torch.randn(1, 3, 3, 2, 2, dtype=D)]
    names = ["s0", "s1"], ["t0", "t1"], [(2, 2), (3, 3)]
    objective = plain(Features(*names, distance=mean_square, decay=1.0))
    expected = sum(((a[0] + a[1]) / 2 - b[0]).square().sum().item() / b.numel() for a, b in zip(s, t))
    assert objective(step_of(s, t)).item() == pytest.approx(expected, rel=1e-9)


def test_pooled_in_loops():
    torch.manual_seed(0)
    objective = Pooled("s0", "t0", (2, 3)).to(D)
    adapt = cast(nn.Linear, objective.adapt)
    s, t = torch.rand(3, 2, 2, 4, 4, dtype=D), torch.randn(1, 2, 3, 2, 2, dtype=D)
    expected = 0.0
    for b in range(2):
        x = [sum(s[:, b, c].flatten().tolist()) / 48 for c in range(2)]
        for c in range(3):
            y = sum(w * v for w, v in zip(adapt.weight[c].tolist(), x)) + adapt.bias[c].item()
            expected += (y - sum(t[0, b, c].flatten().tolist()) / 4) ** 2
    assert objective(step_of([s], [t])).item() == pytest.approx(expected / 2, rel=1e-9)
    assert isinstance(Pooled("s0", "t0", (3, 3)).adapt, nn.Identity)


def test_features_give_no_gradient_to_the_teacher_and_ignore_the_order_of_time():
    s, t = torch.rand(3, 2, 2, 4, 4, requires_grad=True), torch.rand(1, 2, 3, 4, 4, requires_grad=True)
    features = [Features(["s0"], ["t0"], [(2, 3)], distance=d) for d in (partial_distance, mean_square)]
    for objective in (*features, Pooled("s0", "t0", (2, 3))):
        value = objective.eval()(step_of([s], [t]))
        grad, none = torch.autograd.grad(value, [s, t], retain_graph=True, allow_unused=True)
        assert none is None and grad.abs().max() > 0
        torch.testing.assert_close(objective(step_of([s.flip(0)], [t])), value)
        value.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in objective.parameters())
    for distance in (partial_distance, mean_square):
        x = torch.rand(2, 3, 4, 4, requires_grad=True)
        assert (
            torch.autograd.grad(distance(torch.rand(2, 3, 4, 4, requires_grad=True), x), x, allow_unused=True)[0]
            is None
        )


def test_equal_features_cost_nothing():
    x = torch.rand(1, 2, 3, 4, 4)
    for distance in (partial_distance, mean_square):
        assert (
            plain(Features(["s0"], ["t0"], [(3, 3)], distance=distance))(step_of([x.repeat(4, 1, 1, 1, 1)], [x]))
            < 1e-12
        )


def test_maps_of_another_size_are_refused_or_interpolated():
    step = step_of([torch.rand(2, 2, 3, 4, 4)], [torch.rand(1, 2, 3, 2, 2)])
    with pytest.raises(ValueError, match=r"kdsnn: .*\[2, 3, 4, 4\].*\[2, 3, 2, 2\]"):
        Features(["s0"], ["t0"], [(3, 3)])(step)
    assert Features(["s0"], ["t0"], [(3, 3)], resize=True)(step).isfinite()


def test_norms_are_read_before_the_relu_with_fixed_margins():
    student, teacher = toy_student(), toy_teacher()
    norm: Any = teacher.get_submodule("stage2.1.norm")
    nn.init.normal_(norm.bias)
    plan = kdsnn(student, teacher, norms=("stem.norm", "stage2.1.norm"), weight=0.5)
    weight, objective = cast(Any, plan.loss["kdsnn"])
    assert weight == 0.5 and objective.taps == {
        "student": ["stage1", "stage2"],
        "teacher": ["stem.norm", "stage2.1.norm"],
    }
    assert [m.margin.numel() for m in objective.transforms] == [5, 7]
    torch.testing.assert_close(objective.transforms[1].margin.flatten(), margin(norm, ""))
    assert not [p for p in objective.transforms.parameters()] and (objective.transforms[1].margin <= 0).all()
    feature = infer(teacher, toy_batch()["x"], None, ["stage2.1.norm"]).taps["stage2.1.norm"]
    assert feature.min() < 0 < feature.max()
    for norms, problem in ((("stage2",), "'stage2' is no BatchNorm2d"), (("stem.norm",), "2 taps .* 1 norms")):
        with pytest.raises(SpecError, match=problem):
            kdsnn(student, teacher, norms=norms)


def test_the_norm_of_a_residual_block_is_read_with_its_shortcut():
    names = [f"stage{i}.1.norm2" for i in (1, 2, 3, 4)]
    student = models.build("resnet19(stem_width=2, width=2)", channels=2, steps=2)
    teacher: Any = models.build("ann_resnet18(width=4)", channels=2).eval()
    for name in names:
        nn.init.normal_(teacher.get_submodule(name).bias)
    objective: Any = kdsnn(student, teacher, taps=["stage1", "stage1", "stage2", "stage3"], norms=names).loss["kdsnn"][
        1
    ]
    x, stages = toy_batch()["x"], [f"stage{i}" for i in (1, 2, 3, 4)]
    seen = infer(teacher, x, None, [*objective.taps["teacher"], *stages]).taps
    for (_, tap, added), stage in zip(objective.pairs, stages, strict=True):
        assert added == tap.replace("norm2", "shortcut") and (seen[tap] + seen[added]).min() < 0
        torch.testing.assert_close((seen[tap] + seen[added]).relu(), seen[stage])
    one = ["s0"], ["stage2.1.norm2"], [(8, 8)], objective.transforms[1:2]
    last = plain(Features(*one, shortcuts=["stage2.1.shortcut"]))
    target = torch.maximum((seen["stage2.1.norm2"] + seen["stage2.1.shortcut"])[0], objective.transforms[1].margin)
    zeros = Output(torch.zeros(1, 4, 3), {"s0": torch.zeros(1, 4, 8, 4, 4)})
    step = Step({}, {"student": zeros, "teacher": Output(torch.zeros(1, 4, 3), seen)})
    torch.testing.assert_close(last(step), partial_distance(zeros.taps["s0"][0], target))
    with pytest.raises(
        SpecError, match=r"'stage4\.1\.norm1' is not the norm before the sum of its block, 'stage4\.1\.norm2'"
    ):
        shortcut(teacher, "stage4.1.norm1", "kdsnn")
    nested = nn.Module()
    nested.block = nn.Module()
    nested.block.shortcut, nested.block.branch = nn.Identity(), nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    assert shortcut(nested, "block.branch.1", "kdsnn") == "block.shortcut"  # as in Hugging Face
    teacher.stage4[1].downsample = None  # as in timm and torchvision, where it is called where it is not None
    with pytest.raises(SpecError, match=r"what 'stage4\.1' adds to 'stage4\.1\.norm2' cannot be tapped"):
        kdsnn(student, teacher, taps=["stage1", "stage1", "stage2", "stage3"], norms=names)


def test_pooled_takes_vectors_and_refuses_tokens():
    s, t = torch.rand(3, 2, 3, 4, 4, dtype=D), torch.randn(1, 2, 3, dtype=D)
    expected = (s.mean((0, 3, 4)) - t[0]).square().sum() / 2
    torch.testing.assert_close(Pooled("s0", "t0", (3, 3))(step_of([s], [t])), expected)
    with pytest.raises(ValueError, match=r"\[1, 2, 5, 3\] is neither a map nor a vector"):
        Pooled("s0", "t0", (3, 3))(step_of([s], [torch.randn(1, 2, 5, 3, dtype=D)]))


def test_settings_that_do_nothing_are_refused():
    for text, how in (
        ("weight: it does nothing with variant='response'", dict(variant="response", weight=5.0)),
        ("norms: it does nothing with variant='mse'", dict(variant="mse", norms=("stem.norm",))),
        ("tau: it does nothing with variant='feature'", dict(tau=2.0)),
        ("teacher_taps: it does nothing beside norms", dict(norms=("stem.norm",), teacher_taps=("stage1",))),
    ):
        with pytest.raises(SpecError, match=rf"kdsnn\.{text}"):
            kdsnn(toy_student(), toy_teacher(), **cast(Any, how))


def test_defaults_of_each_variant_and_a_clean_student():
    student, teacher = toy_student(), toy_teacher()
    keys = [*student.state_dict()]
    weights: Any = {v: kdsnn(student, teacher, variant=v).loss for v in ("response", "feature", "mse", "pooled")}
    assert {v: {k: w for k, (w, _) in loss.items()} for v, loss in weights.items()} == {
        "response": {"ce": 0.5, "kd": 0.5},
        "feature": {"ce": 1.0, "kdsnn": 1e-3},
        "mse": {"ce": 1.0, "kdsnn": 1.0},
        "pooled": {"ce": 1.0, "kdsnn": 7e-5},
    }
    assert weights["pooled"]["kdsnn"][1].taps == {"student": ["stage2"], "teacher": ["stage2"]}
    adapter = [tuple(p.shape) for p in weights["feature"]["kdsnn"][1].adapt[1].parameters()]
    assert adapter == [(7, 6, 1, 1), (7,), (7,)]  # a convolution without bias, and a norm
    assert weights["feature"]["kdsnn"][1].decay == 0.5 and weights["mse"]["kdsnn"][1].decay == 1.0
    assert [*kdsnn(student, teacher, weight=0.0).loss] == ["ce"] and [*student.state_dict()] == keys
