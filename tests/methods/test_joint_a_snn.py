"""Joint A-SNN: golden value, the loss in loops, and who gets which gradient."""

import copy
from math import exp, log
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill import transforms
from spikedistill.core.fit import Stage, Trainee, fit
from spikedistill.core.output import Output
from spikedistill.core.plan import merge
from spikedistill.core.step import Step
from spikedistill.core.taps import infer
from spikedistill.methods import bkd, joint_a_snn, sakd
from spikedistill.methods.joint_a_snn import (
    Exit,
    Factors,
    factorise,
    factors,
    feature_loss,
    label_loss,
    soft_loss,
    twin,
)
from spikedistill.neurons import LIF
from spikedistill.spec import SpecError
from tests.methods.toy import toy_batch, toy_student, toy_teacher

D = torch.float64


def objective_of(plan) -> Any:
    return plan.loss["joint_a_snn"][1]


def log_softmax(z):
    top = max(z)
    total = sum(exp(v - top) for v in z)
    return [v - top - log(total) for v in z]


def soft_in_loops(x, target, tau):
    total = 0.0
    for row, q in zip(x.tolist(), target.tolist()):
        logs, weights = log_softmax([v / tau for v in row]), log_softmax([v / tau for v in q])
        total -= sum(exp(w) * z for w, z in zip(weights, logs))
    return tau**2 * total / len(x)


def labels_in_loops(x, y):
    return -sum(log_softmax(row)[target] for row, target in zip(x.tolist(), y.tolist())) / len(x)


def test_golden_value_is_kl_and_entropy_of_the_target():
    n, a = torch.tensor([[2.0, 1, -1]], dtype=D), torch.tensor([[3.0, 1, -2]], dtype=D)
    value = soft_loss(n[None], a[None], 3.0)
    assert value.item() == pytest.approx(8.513769, abs=1e-6)
    q = torch.softmax(a / 3, 1)
    kl = (q * (q.log() - torch.log_softmax(n / 3, 1))).sum()
    assert value.item() == pytest.approx(9 * (kl - (q * q.log()).sum()).item(), rel=1e-9)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("readout", ["sum", "mean"])
def test_loss_in_loops(readout, frames):
    """Exits of the modes replaced by what they return: two exits, three steps, two samples."""
    torch.manual_seed(0)
    student, batch = toy_student(), toy_batch(2)
    alpha, beta, tau = 0.3, 0.07, 2.5
    objective = objective_of(joint_a_snn(student, alpha=alpha, beta=beta, tau=tau, readout=readout)).to(D)
    objective.eval()
    maps = {"stage1": torch.rand(3, 2, 5, 8, 8, dtype=D), "stage2": torch.rand(3, 2, 6, 4, 4, dtype=D)}
    ann_maps = {k: torch.rand(frames, *v.shape[1:], dtype=D) for k, v in maps.items()}
    z, za = torch.randn(3, 2, 4, dtype=D), torch.randn(frames, 2, 4, dtype=D)
    step = Step(batch, {"student": Output(z, maps), "ann": Output(za, ann_maps)})
    early, fs = objective.snn[0](maps["stage1"])
    early_a, fa = objective.ann[0](ann_maps["stage1"])
    scale = 1 if readout == "sum" else 3
    n = [sum(early[t] for t in range(3)) / scale, sum(z[t] for t in range(3)) / scale]
    a = [sum(x[t] for t in range(frames)) / frames for x in (early_a, za)]
    f_s: list[Any] = [
        sum(fs[t] for t in range(3)) / scale,
        sum(maps["stage2"][t].mean((2, 3)) for t in range(3)) / scale,
    ]
    f_a = [sum(x[t] for t in range(frames)) / frames for x in (fa, ann_maps["stage2"].mean((3, 4)))]
    expected = (1 - alpha) * sum(labels_in_loops(x, batch["y"]) for x in (*n, *a))
    expected += alpha * soft_in_loops(a[0], a[1], tau)
    expected += alpha * (soft_in_loops(n[0], a[0], tau) + soft_in_loops(n[1], a[1], tau))
    squares = 0.0
    for s, t in zip(f_s, f_a):
        for i in range(2):
            for c in range(6):
                squares += (s[i, c] - t[i, c]).item() ** 2
    expected += beta * squares / 2
    assert objective(step).item() == pytest.approx(expected, rel=1e-9)


def test_the_mask_of_the_authors_changes_nothing():
    """Their squared error counts where either value is positive; counts and ReLU outputs are never negative."""
    s = torch.stack([torch.rand(3, 5, dtype=D).mul(3).floor(), torch.rand(3, 5, dtype=D)])
    a = torch.stack([torch.rand(3, 5, dtype=D), (torch.rand(3, 5, dtype=D) - 0.5).relu()])
    masked = sum((((x > 0) | (y > 0)) * (x - y) ** 2).sum() / 3 for x, y in zip(s, a))
    torch.testing.assert_close(feature_loss(s, a), masked)


def test_authors_beta_at_their_batch():
    s, a = torch.rand(1, 1024, 5, dtype=D), torch.rand(1, 1024, 5, dtype=D)
    default = objective_of(joint_a_snn(toy_student())).beta
    assert (default * feature_loss(s, a)).item() == pytest.approx(1e-6 * ((s[0] - a[0]) ** 2).sum().item(), rel=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_factors_have_the_papers_shapes_and_give_the_kernel_back(bias):
    conv = nn.Conv2d(4, 6, 3, bias=bias, dtype=D)
    kernel, x = conv.weight.detach().clone(), torch.rand(2, 4, 5, 5, dtype=D)
    before = conv(x)
    factorise(nn.Sequential(conv))
    (kept,) = factors(conv)
    shapes = [tuple(getattr(kept, f"original{i}").shape) for i in range(3)]
    assert shapes == [(3, 3, 6, 4), (3, 3, 4), (3, 3, 4, 4)]
    torch.testing.assert_close(conv.weight, kernel, atol=1e-12, rtol=0)
    torch.testing.assert_close(conv(x), before)
    scrambled = Factors()(*Factors().right_inverse(kernel.reshape(3, 3, 6, 4).permute(2, 3, 0, 1)))
    assert not torch.allclose(scrambled, kernel)
    with pytest.raises(SpecError, match="no plain convolution"):
        factorise(nn.Sequential(conv))


def test_a_student_with_gates_is_refused_and_one_with_factors_taken():
    for texts in (["unstructured_pruning"], ["factorise", "unstructured_pruning"]):
        student = toy_student()
        for text in texts:
            transforms.apply(student, text, shape=[2, 8, 8])
        with pytest.raises(SpecError, match="joint_a_snn: kernels with gates have no factors"):
            joint_a_snn(student)
    assert joint_a_snn(factorise(toy_student()))


def test_kernel_in_loops():
    u, s, v = torch.rand(1, 2, 3, 2, dtype=D), torch.rand(1, 2, 2, dtype=D), torch.rand(1, 2, 2, 4, dtype=D)
    kernel = Factors()(u, s, v)
    for o in range(3):
        for i in range(4):
            for w in range(2):
                expected = sum(u[0, w, o, r] * s[0, w, r] * v[0, w, r, i] for r in range(2))
                assert kernel[o, i, 0, w].item() == pytest.approx(float(expected))


def modes() -> Any:
    torch.manual_seed(1)
    student = factorise(toy_student())
    return student, twin(student)


def test_the_twin_shares_singular_vectors_and_biases_alone():
    student, ann = modes()
    shared = {id(p) for p in student.parameters()} & {id(p) for p in ann.parameters()}
    ours = {name: id(p) in shared for name, p in student.named_parameters()}
    assert {n for n, both in ours.items() if both} == {
        n for n in ours if n.endswith(("original0", "original2")) or n == "head.bias"
    }
    assert not any(isinstance(m, LIF) for m in ann.modules())
    with torch.no_grad():
        student.stem.conv.parametrizations.weight.original0.mul_(2)
        student.stem.conv.parametrizations.weight.original1.mul_(3)
    torch.testing.assert_close(student.stem.conv.weight, 3 * ann.stem.conv.weight)


def by_kind(model, grads):
    """Sum of the gradients' sizes for each kind of parameter."""
    kinds = {"original0": "u", "original1": "sigma", "original2": "v", "norm": "norm", "head.weight": "head"}
    found = dict.fromkeys(kinds.values(), 0.0)
    for name, p in model.named_parameters():
        for part, kind in kinds.items():
            if part in name and grads.get(id(p)) is not None:
                found[kind] += grads[id(p)].abs().sum().item()
    return found


def run(loss) -> Any:
    """Modes and exits after the backward pass of a term that is computed from what a step of training shows."""
    torch.manual_seed(2)
    student, batch = toy_student(), toy_batch()
    plan = joint_a_snn(student, width=5)
    trainee = Trainee(Stage([batch], **vars(plan)))
    objective = objective_of(plan)
    objective.forward = lambda step: loss(
        *objective.read(objective.snn, step.student, "sum"),
        *objective.read(objective.ann, step["ann"], "mean"),
        batch["y"],
    )
    trainee(batch, 0.0)[0].backward()
    grads = {id(p): p.grad for p in trainee.parameters()}
    ann = plan.passes["ann"].model
    return student, ann, objective, lambda model: by_kind(model, grads)


@pytest.mark.parametrize(
    "loss",
    [
        lambda n, fs, a, fa, y: soft_loss(n, a, 3.0),
        lambda n, fs, a, fa, y: feature_loss(fs, fa),
        lambda n, fs, a, fa, y: label_loss(n, y),
    ],
    ids=["cross", "feature", "label"],
)
def test_losses_of_the_snn_reach_the_shared_factors_and_nothing_else_of_the_ann(loss):
    student, ann, objective, kinds = run(loss)
    for own, other in ((student, ann), (objective.snn, objective.ann)):
        theirs, ours = kinds(other), kinds(own)
        assert theirs["sigma"] == theirs["norm"] == theirs["head"] == 0
        assert theirs["u"] > 0 and theirs["v"] > 0
        assert ours["u"] > 0 and ours["v"] > 0 and ours["sigma"] > 0


def test_features_pull_the_snn_alone():
    """The gradients of what the ANN has to itself are the same whatever the weight of the features."""
    found = []
    for beta in (0.0, 5.0):
        torch.manual_seed(2)
        student, batch = toy_student(), toy_batch()
        plan = joint_a_snn(student, width=5, beta=beta)
        Trainee(Stage([batch], **vars(plan)))(batch, 0.0)[0].backward()
        ann: Any = plan.passes["ann"].model
        found.append([m.stem.conv.parametrizations.weight.original1.grad for m in (ann, student)])
    torch.testing.assert_close(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def test_losses_of_the_ann_leave_what_the_snn_has_alone():
    student, ann, objective, kinds = run(lambda n, fs, a, fa, y: label_loss(a, y) + soft_loss(a[:-1], a[-1:], 3.0))
    for own, other in ((ann, student), (objective.ann, objective.snn)):
        theirs, ours = kinds(other), kinds(own)
        assert theirs["sigma"] == theirs["norm"] == theirs["head"] == 0
        assert min(ours.values()) > 0


def test_the_last_exit_teaches_and_does_not_learn_from_the_others():
    _, ann, objective, _ = run(lambda n, fs, a, fa, y: soft_loss(a[:-1], a[-1:], 3.0))
    assert ann.head.weight.grad is None or ann.head.weight.grad.abs().max() == 0
    late = [p.grad for n, p in ann.stage2.named_parameters() if "original1" in n or "norm" in n]
    assert all(g is None or g.abs().max() == 0 for g in late)
    assert ann.stem.norm.weight.grad.abs().max() > 0 and objective.ann[0].head.weight.grad.abs().max() > 0


def test_soft_loss_of_several_exits_with_one_target_and_with_one_each():
    a, n = torch.randn(3, 2, 3, dtype=D), torch.randn(3, 2, 3, dtype=D)
    assert soft_loss(a[:-1], a[-1:], 2.0).item() == pytest.approx(sum(soft_in_loops(x, a[2], 2.0) for x in a[:2]))
    assert soft_loss(n, a, 2.0).item() == pytest.approx(sum(soft_in_loops(x, t, 2.0) for x, t in zip(n, a)))
    assert soft_loss(a[:0], a[:1], 2.0) == 0
    n.requires_grad_(), a.requires_grad_()
    grad, none = torch.autograd.grad(soft_loss(n, a, 2.0), [n, a], allow_unused=True)
    assert none is None and grad.abs().max() > 0


def test_exits_of_four_stages_end_in_maps_of_4x4():
    sizes, seen = {1: 32, 2: 16, 3: 8}, []
    for i, k in zip(sizes, (8, 4, 2)):
        branch = Exit(6, k, 7, 9, 10, LIF())
        branch.neurons[2].register_forward_hook(lambda _m, _i, out: seen.append(out))
        logits, f = branch(torch.rand(2, 3, 6, sizes[i], sizes[i]))
        torch.testing.assert_close(f, seen[-1].mean((3, 4)))
        assert logits.shape == (2, 3, 10) and f.shape == (2, 3, 9)
    assert [tuple(out.shape) for out in seen] == [(2, 3, 9, 4, 4)] * 3


def test_default_strides_double_towards_the_image():
    from spikedistill.models import sew_resnet18

    objective = objective_of(joint_a_snn(sew_resnet18(width=4), width=3))
    assert [branch.convs[1].kernel_size[0] for branch in objective.snn] == [8, 4, 2]
    assert objective.taps["student"] == ["stage1", "stage2", "stage3", "stage4"] == objective.taps["ann"]


def test_merged_student_is_plain_and_gives_the_same_logits_twice():
    student, batch = toy_student(), toy_batch()
    keys = [*student.state_dict()]
    plan = joint_a_snn(student, width=5)
    fit(Stage([batch] * 2, **vars(plan), epochs=2), progress=False)
    trained = infer(student, batch["x"]).logits
    assert torch.equal(infer(student, batch["x"]).logits, trained)
    transforms.merge(student)
    assert [*student.state_dict()] == keys
    assert all(isinstance(m.weight, nn.Parameter) for m in student.modules() if isinstance(m, nn.Conv2d))
    torch.testing.assert_close(infer(student, batch["x"]).logits, trained, atol=1e-5, rtol=0)


def test_goes_with_bkd_and_keeps_the_taps():
    student, teacher, batch = toy_student(), toy_teacher(), toy_batch()
    plan = merge(bkd(student, teacher), joint_a_snn(student, width=5))
    assert set(plan.loss) == {"ce", "bkd", "wsld", "joint_a_snn"} and set(plan.passes) == {"student", "teacher", "ann"}
    before = copy.deepcopy(student.state_dict())
    fit(Stage([batch] * 2, **vars(plan), epochs=1), progress=False)
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert infer(student, batch["x"], taps=["stage1", "stage2"]).taps["stage2"].shape == (3, 4, 6, 4, 4)


def test_a_method_that_copies_the_teachers_weights_comes_first():
    student, teacher, batch = toy_student(), toy_student(seed=8), toy_batch()
    plan = merge(sakd(student, teacher), joint_a_snn(student, width=5))
    ann: Any = plan.passes["ann"].model
    for model in (student, ann):
        torch.testing.assert_close(model.stem.conv.weight, teacher.stem.conv.weight, atol=1e-5, rtol=0)
    assert Trainee(Stage([batch], **vars(plan)))(batch, 0.0)[0].isfinite()
    with pytest.raises(SpecError, match=r"stem.conv.weight was rewritten before: .*name sakd before"):
        sakd(student, teacher)


def test_what_it_cannot_use_is_said():
    with pytest.raises(SpecError, match="no spiking neurons"):
        joint_a_snn(toy_teacher())
    with pytest.raises(SpecError, match="2 strides for 1 early exits"):
        joint_a_snn(toy_student(), strides=(2, 4))


def kernel_of(model) -> Any:
    return factors(model.stem.conv)[0]


def test_a_student_that_was_factorised_before_is_taken_as_it_is():
    student: Any = factorise(toy_student())
    kept = kernel_of(student).original0
    plan = joint_a_snn(student)
    assert kernel_of(plan.passes["ann"].model).original0 is kept
