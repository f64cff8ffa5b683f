"""kd_snn_liang: the golden value, the formula in loops, and the invariances that make it a loss of relations."""

from math import sqrt

import pytest
import torch

from spikedistill.core.output import Output
from spikedistill.core.step import Step
from spikedistill.core.taps import TapError
from spikedistill.methods.kd_snn_liang import Relational, kd_snn_liang, relational_loss, similarity
from spikedistill.spec import SpecError
from tests.methods.toy import toy_student, toy_teacher

D = torch.float64
KINDS = [("row", False), ("row", True), ("vector", False), ("vector", True)]
kinds = pytest.mark.parametrize(("normalise", "exclude"), KINDS)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def matrix_in_loops(u, normalise, exclude):
    rows = u.tolist()
    if normalise == "vector":
        rows = [[x / sqrt(dot(r, r)) for x in r] for r in rows]
    g = [[0.0 if exclude and i == j else dot(a, b) for j, b in enumerate(rows)] for i, a in enumerate(rows)]
    return [[x / sqrt(dot(r, r)) for x in r] for r in g] if normalise == "row" else g


def loss_in_loops(s, t, normalise, exclude):
    a, b, n = matrix_in_loops(s, normalise, exclude), matrix_in_loops(t, normalise, exclude), len(s)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j or not exclude]
    return sum((a[i][j] - b[i][j]) ** 2 for i, j in pairs) / len(pairs)


def step_of(student, teacher):
    """Taps "s" and "t"; a mapping gives several of each."""
    s = student if isinstance(student, dict) else {"s": student}
    t = teacher if isinstance(teacher, dict) else {"t": teacher}
    passes = {"student": Output(torch.zeros(3, 2, 4), s), "teacher": Output(torch.zeros(1, 2, 4), t)}
    return Step({}, passes)


def relational(**how):
    return Relational(["s"], ["t"], **how)


def test_golden_value():
    teacher, student = torch.tensor([[1.0, 2], [0, 1]], dtype=D), torch.tensor([[1.0, 0, 1], [1, 1, 0]], dtype=D)
    expected = torch.tensor([[0.928477, 0.371391], [0.894427, 0.447214]], dtype=D)
    torch.testing.assert_close(similarity(teacher), expected, atol=1e-6, rtol=0)
    expected = torch.tensor([[0.894427, 0.447214], [0.447214, 0.894427]], dtype=D)
    torch.testing.assert_close(similarity(student), expected, atol=1e-6, rtol=0)
    assert relational_loss(student, teacher).item() == pytest.approx(0.101727, abs=1e-6)


@kinds
def test_in_loops(normalise, exclude):
    s, t = torch.randn(5, 7, dtype=D), torch.randn(5, 3, dtype=D)
    value = relational_loss(s, t, normalise, exclude).item()
    assert value == pytest.approx(loss_in_loops(s, t, normalise, exclude), rel=1e-9)


@kinds
def test_zero_for_the_same_relations(normalise, exclude):
    t = torch.randn(6, 5, dtype=D)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=D))
    for s in (t, 3.7 * t, t @ turn):
        assert relational_loss(s, t, normalise, exclude) < 1e-24
    assert relational_loss(torch.randn(6, 5, dtype=D), t, normalise, exclude) > 1e-4


@kinds
def test_only_the_student_gets_a_gradient(normalise, exclude):
    s, t = torch.randn(4, 6, dtype=D, requires_grad=True), torch.randn(4, 3, dtype=D, requires_grad=True)
    ours, theirs = torch.autograd.grad(relational_loss(s, t, normalise, exclude), [s, t], allow_unused=True)
    assert theirs is None and ours.abs().max() > 1e-4
    assert torch.autograd.gradcheck(lambda x: relational_loss(x, t.detach(), normalise, exclude), s)


@kinds
def test_the_order_of_samples_channels_and_steps_is_of_no_account(normalise, exclude):
    s, t = torch.rand(3, 5, 4, 2, 2, dtype=D), torch.rand(1, 5, 3, 2, 2, dtype=D)
    objective, order = relational(normalise=normalise, exclude_diagonal=exclude), torch.tensor([3, 0, 4, 2, 1])
    value = objective(step_of(s, t))
    for a, b in ((s[:, order], t[:, order]), (s.flip(2), t), (s.flip(0), t)):
        torch.testing.assert_close(objective(step_of(a, b)), value)


def test_features_of_the_student_are_averaged_over_time_and_flattened_over_space():
    s, t = torch.rand(3, 4, 2, 2, 3, dtype=D), torch.rand(2, 4, 5, 2, 3, dtype=D)
    u, v = (s[0] + s[1] + s[2]) / 3, (t[0] + t[1]) / 2
    expected = loss_in_loops(u.reshape(4, -1), v.reshape(4, -1), "row", False)
    assert relational()(step_of(s, t)).item() == pytest.approx(expected, rel=1e-9)


def test_flatten_compares_sequences():
    s, t = torch.rand(3, 4, 2, 2, 2, dtype=D), torch.rand(1, 4, 5, 2, 2, dtype=D)
    rows = torch.stack([torch.cat([s[i, b].flatten() for i in range(3)]) for b in range(4)])
    expected = loss_in_loops(rows, t[0].reshape(4, -1), "vector", False)
    objective = relational(normalise="vector", time="flatten")
    assert objective(step_of(s, t)).item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(objective(step_of(s[:1], t)), relational(normalise="vector")(step_of(s[:1], t)))


def test_maps_of_other_sizes_tokens_and_vectors_are_averaged_over_space():
    s = torch.rand(2, 4, 3, 4, 4, dtype=D)
    vector = torch.rand(1, 4, 5, dtype=D)
    expected = loss_in_loops(s.mean((0, 3, 4)), vector[0], "row", False)
    blocks = torch.rand(1, 4, 5, 2, 3, dtype=D)
    blocks += vector[..., None, None] - blocks.mean((3, 4), keepdim=True)
    tokens = blocks.flatten(3).mT
    for t in (vector, blocks, tokens):
        assert relational()(step_of(s, t)).item() == pytest.approx(expected, rel=1e-9)
    same = torch.rand(1, 4, 6, 2, dtype=D)
    whole = loss_in_loops(same[0].reshape(4, -1), tokens[0].reshape(4, -1), "row", False)
    assert relational()(step_of(same, tokens)).item() == pytest.approx(whole, rel=1e-9)


def test_mean_over_pairs_of_taps():
    s, t = torch.rand(2, 4, 3, 2, 2, dtype=D), torch.rand(1, 4, 3, 2, 2, dtype=D)
    both = Relational(["s", "r"], ["t", "u"])(step_of({"s": s, "r": 1 - s**3}, {"t": t, "u": t.exp()}))
    alone = relational()(step_of(s, t)), relational()(step_of(1 - s**3, t.exp()))
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


def test_bounds_and_how_the_value_falls_with_the_batch():
    s, t = torch.randn(8, 9, dtype=D), torch.randn(8, 9, dtype=D)
    assert 0 < relational_loss(s, t) <= 4 / 8
    opposite = torch.tensor([[1.0], [-1]], dtype=D), torch.eye(2, dtype=D)
    assert relational_loss(*opposite) <= 4 / 2
    twice = torch.cat([s, s]), torch.cat([t, t])
    torch.testing.assert_close(relational_loss(*twice), relational_loss(s, t) / 2)
    torch.testing.assert_close(relational_loss(*twice, "vector"), relational_loss(s, t, "vector"))


@kinds
def test_a_silent_sample_has_value_but_no_gradient(normalise, exclude):
    s, t = torch.rand(4, 5), torch.rand(4, 3)
    s[1] = 0
    s.requires_grad_()
    value = relational_loss(s, t, normalise, exclude)
    (grad,) = torch.autograd.grad(value, s)
    assert value.isfinite() and grad.isfinite().all() and grad.abs().max() < 10
    if normalise == "vector" or exclude is False:
        assert similarity(s, normalise, exclude)[1].abs().max() == 0


def test_one_sample_gives_zero_and_a_warning():
    s = torch.rand(2, 1, 3, 2, 2, requires_grad=True)
    with pytest.warns(UserWarning, match="one sample"):
        value = relational()(step_of(s, torch.rand(1, 1, 4, 2, 2)))
    (grad,) = torch.autograd.grad(value, s)
    assert value == 0 and grad.abs().max() == 0


def test_half_precision_is_widened_before_the_product():
    s, t = torch.rand(6, 900), torch.rand(6, 300)
    half = relational_loss(s.bfloat16(), t.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, relational_loss(s.bfloat16().float(), t.bfloat16().float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            relational_loss(s, t), relational_loss(s.double(), t.double()).float(), rtol=1e-3, atol=0
        )


def test_builder():
    student, teacher = toy_student(), toy_teacher()
    plan = kd_snn_liang(student, teacher)
    assert {k: w for k, (w, _) in plan.loss.items()} == {"ce": 1.0, "kd_snn_liang": 3000.0}
    objective = plan.loss["kd_snn_liang"][1]
    assert isinstance(objective, Relational) and not [*objective.parameters()]
    assert (objective.normalise, objective.time, objective.exclude_diagonal) == ("row", "mean", False)
    assert objective.taps == {"student": ["stage2"], "teacher": ["stage2"]}
    other = kd_snn_liang(student, teacher, weight=2.5, normalise="vector", time="flatten", exclude_diagonal=True)
    weight, objective = other.loss["kd_snn_liang"]
    assert isinstance(objective, Relational) and weight == 2.5
    assert (objective.normalise, objective.time, objective.exclude_diagonal) == ("vector", "flatten", True)
    several = kd_snn_liang(student, teacher, taps=["stage2", "stage1"], teacher_taps=["stage1", "stage2"])
    objective = several.loss["kd_snn_liang"][1]
    assert getattr(objective, "taps", {}) == {"student": ["stage2", "stage1"], "teacher": ["stage1", "stage2"]}
    assert set(kd_snn_liang(student, teacher, weight=0).loss) == {"ce"}
    with pytest.raises(SpecError, match="2 taps and 1 teacher_taps"):
        kd_snn_liang(student, teacher, taps=["stage1", "stage2"], teacher_taps=["stage1"])
    with pytest.raises(SpecError, match="pairs"):
        kd_snn_liang(student, teacher, taps=["stage1", "stage2"])
    with pytest.raises(TapError, match="stage1"):
        kd_snn_liang(student, teacher, taps=["stag1"])
