"""Unstructured pruning: gates, prices and schedule by the paper's numbers; what training moves, and what is left."""

import copy
from itertools import pairwise
from math import exp
from typing import Any

import pytest
import torch
from torch import nn

from spikedistill import models
from spikedistill.core.evaluate import evaluate
from spikedistill.core.fit import Stage, Trainee, fit, parameter_groups
from spikedistill.core.plan import merge as merge_plans
from spikedistill.core.taps import call, infer
from spikedistill.methods import bkd
from spikedistill.models.layers import Conv2d, Spiking
from spikedistill.neurons import LIF
from spikedistill.report.activity import activity
from spikedistill.spec import SpecError
from spikedistill.transforms.rewrite import merge
from spikedistill.transforms.sparsity import connectivity, open_positions
from spikedistill.transforms.survey import survey
from spikedistill.transforms.unstructured_pruning import Gate, Gated, Search, gates_of, plan, unstructured_pruning
from tests.methods.toy import toy_batch, toy_student, toy_teacher
from tests.transforms.awake import awake

SHAPE = [2, 8, 8]


def pruned(seed=0, **how) -> Any:
    settings: dict[str, Any] = dict(shape=SHAPE, mean=0.1, std=0.2, weight=1e-4) | how
    return unstructured_pruning(toy_student(seed=seed), **settings)


def in_search(gate, slope=5.0):
    gate.train()
    gate.hard = False
    gate.slope.fill_(slope)
    return gate


def test_slopes_may_be_whole_numbers():
    gate = Gate((2,), 1.0, Search(0.8, (5, 1000)))
    gate.at(0.3)
    assert gate.slope.item() == pytest.approx(Search().slope(0.3)) and gate.slope.is_floating_point()


def test_mask_in_loops_and_the_two_modes():
    gate = in_search(Gate((2, 1, 2), 1.0), 3.0)
    gate.a.data = torch.tensor([0.2, -0.7, 0.0, 1.1])
    expected = [1 / (1 + exp(-3.0 * a)) for a in (0.2, -0.7, 0.0, 1.1)]
    assert gate.mask().shape == (2, 1, 2) and gate.mask().flatten().tolist() == pytest.approx(expected)
    for decided in (copy.deepcopy(gate).eval(), copy.deepcopy(gate)):
        decided.hard = decided.training
        assert decided.mask().flatten().tolist() == [1, 0, 0, 1] and not decided.mask().requires_grad
    assert gate.mask().requires_grad


def test_a_steep_gate_is_a_decided_one():
    gate = in_search(Gate((50,), 1.0, std=0.0), 1000.0)
    gate.a.data = torch.randn(50).sign()
    torch.testing.assert_close(gate.mask(), copy.deepcopy(gate).eval().mask(), atol=1e-4, rtol=0)


def test_gates_start_at_the_given_mean_and_spread():
    gate = Gate((4000,), 1.0, mean=0.3, std=0.2)
    assert gate.a.mean().item() == pytest.approx(0.3, abs=0.02) and gate.a.std().item() == pytest.approx(0.2, abs=0.02)
    assert in_search(Gate((5,), 1.0)).mask().tolist() == [0.5] * 5


def test_slope_rises_exponentially_over_the_search():
    search = Search(0.7, (4.0, 900.0), 0.1)
    at = [search.slope(p / 20) for p in range(21)]
    assert at[0] == at[2] == 4.0 and at[14] == pytest.approx(900.0) == at[20]
    assert all(a < b for a, b in pairwise(at[2:15]))
    assert search.slope(0.4) == pytest.approx((4.0 * 900.0) ** 0.5)
    assert Search().slope(0) == 5.0 and Search().slope(0.8) == pytest.approx(1000.0)


def chain(readers, stride=1, channels=3):
    """A convolution, neurons, and convolutions that read them one after the other."""
    layers = [Spiking(Conv2d(2, channels, 3, 1, 1), nn.Identity(), LIF())]
    for width in readers:
        layers.append(Spiking(Conv2d(channels, width, 3, stride, 1), nn.Identity(), LIF()))
        channels = width
    return nn.Sequential(*layers)


class Read(nn.Module):
    """Frames [T, B, C, H, W] through `net` to logits."""

    def __init__(self, net, features):
        super().__init__()
        self.net, self.head = net, nn.Linear(features, 4)

    def forward(self, x, steps=None):
        x = x if x.ndim == 5 else x.expand(steps or 2, *x.shape)
        return self.head(self.net(x).mean((-2, -1)))


def test_prices_of_the_paper():
    seen = survey(Read(chain([256, 4]), 4), [2, 32, 32])
    assert seen.uses["net.0.conv"] == seen.uses["net.1.conv"] == 1024 and seen.uses["head"] == 1
    assert seen.fan_out == {"net.0.neuron": 2304, "net.1.neuron": 36, "net.2.neuron": 4}
    assert seen.shapes["net.1.neuron"] == (256, 32, 32)
    strided = survey(Read(chain([256, 4], stride=2), 4), [2, 32, 32])
    assert strided.fan_out["net.0.neuron"] == 576
    assert strided.uses == {"net.0.conv": 1024, "net.1.conv": 256, "net.2.conv": 64, "head": 1}


def test_neurons_of_a_residual_sum_are_read_by_the_same_layers():
    model = models.build("sew_resnet18(width=4)", classes=7)
    seen = survey(model, [3, 32, 32])
    block = {n: f for n, f in seen.fan_out.items() if n.startswith("stage4.1") or n.startswith("stage4.0")}
    # stage4.0's first neurons: the second convolution of the block; its sum: both layers of stage4.1 and the head
    assert block["stage4.0.branch.0.neuron"] == block["stage4.1.branch.0.neuron"] == 32 * 9
    assert block["stage4.0.branch.1.neuron"] == block["stage4.0.shortcut.neuron"] == 32 * 9 + 7
    assert block["stage4.1.branch.1.neuron"] == 7
    assert seen.fan_out["stem.neuron"] == 4 * 9 * 2 + 8 * 9 / 4 + 8 / 4
    assert seen.uses["stage2.0.shortcut.conv"] == 32 * 32 / 4 and seen.uses["stage2.0.branch.1.conv"] == 16 * 16


def test_which_gates_there_are():
    gates = {n: m for n, m in pruned().named_modules() if isinstance(m, Gate)}
    assert set(gates) == {"stage2.1.conv.parametrizations.weight.0", "stage2.1.neuron.gate"}
    weights, neurons = gates.values()
    assert weights.shape == (6, 5, 3, 3) and weights.price == pytest.approx(1e-4 * 16)
    assert neurons.shape == (6, 4, 4) and neurons.price == pytest.approx(1e-4 * 4)
    more = pruned(stem=True, head=True)
    assert [n for n, m in more.named_modules() if isinstance(m, Gate)] == [
        "stem.conv.parametrizations.weight.0",
        *gates,
        "head.parametrizations.weight.0",
    ]
    assert more.head.parametrizations.weight[0].price == pytest.approx(1e-4)


def test_gates_have_no_weight_decay_and_survive_another_layout():
    model = pruned().to(memory_format=torch.channels_last)
    plain = {id(p) for p in parameter_groups(model)[1]["params"]}
    assert all(id(gate.a) in plain for gate in gates_of(model))


def opened(model, a=1.0):
    for gate in gates_of(model):
        nn.init.constant_(gate.a, a)
    return model


def test_open_gates_are_the_dense_model_and_closed_ones_silence_it():
    torch.manual_seed(0)
    x, dense = toy_batch()["x"], toy_student()
    model = opened(unstructured_pruning(copy.deepcopy(awake(dense, x)), shape=SHAPE))
    expected = infer(dense, x, taps=["stage2"])
    assert expected.taps["stage2"].sum() > 0
    torch.testing.assert_close(infer(model, x).logits, expected.logits)
    assert infer(opened(model, -1.0), x, taps=["stage2"]).taps["stage2"].abs().max() == 0


def test_a_neurons_gate_masks_spikes_not_membranes_over_batch_and_time():
    gate = Gate((2, 3, 3), 1.0).eval()
    gate.a.data = torch.randn(18)
    neuron, x = LIF(v_th=0.3), torch.rand(4, 2, 2, 3, 3)
    expected = neuron(x) * (gate.a > 0).float().view(1, 1, 2, 3, 3)
    assert torch.equal(Gated(neuron, gate)(x), expected) and expected.sum() > 0


def test_a_closed_neuron_gives_its_convolution_no_gradient():
    model = opened(pruned())
    model.train()
    for gate in gates_of(model):
        gate.hard = True
    gate = model.stage2[1].neuron.gate
    gate.a.data.view(6, 4, 4)[2] = -1
    call(model, toy_batch()["x"]).logits.square().sum().backward()
    grad = model.stage2[1].conv.parametrizations.weight.original.grad
    # the norm in between mixes within a channel alone
    assert grad[2].abs().max() == 0 and grad[[0, 1, 3, 4, 5]].abs().amax((1, 2, 3)).min() > 0


def penalty_of(model):
    penalty: Any = plan(model).loss["synops"][1]
    return penalty(None)


def test_penalty_in_loops_and_its_gradient():
    model = pruned(weight=0.3)
    expected = 0.0
    for gate, count in zip(gates_of(model), (16, 4)):
        in_search(gate, 7.0)
        expected += 0.3 * count * sum(1 / (1 + exp(-7.0 * a)) for a in gate.a.tolist())
    value = penalty_of(model)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    for gate, count in zip(gates_of(model), (16, 4)):
        m = gate.mask().flatten()
        torch.testing.assert_close(gate.a.grad, (0.3 * count * 7.0 * m * (1 - m)).detach())


def test_the_penalty_alone_lowers_every_gate_more_where_it_costs_more():
    model = pruned(mean=0.0, std=0.0, weight=1e-3).train()
    penalty_of(model).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    weights, neurons = (gate.a.detach() for gate in gates_of(model))
    assert weights.max() < 0 and neurons.max() < 0
    torch.testing.assert_close(weights.max() / neurons.max(), torch.tensor(4.0))


def test_search_moves_gates_and_fine_tuning_leaves_them_to_the_bit():
    torch.manual_seed(0)
    model, batch = pruned(search=0.5, slopes=(4.0, 50.0)), toy_batch()
    seen = []

    def look(progress):
        gates = torch.cat([gate.a.detach().clone() for gate in gates_of(model)])
        slope = gates_of(model)[0].slope.item()
        hard = {gate.hard for gate in gates_of(model)}
        seen.append(
            (progress, gates, model.stage2[1].conv.parametrizations.weight.original.detach().clone(), slope, hard)
        )

    p = merge_plans(bkd(model, toy_teacher()), plan(model))
    stage = Stage([batch] * 4, p.passes, p.loss, p.prepare, [look], epochs=2, select="last")
    result = fit(stage, progress=False)
    assert [progress for progress, *_ in seen] == [i / 8 for i in range(8)]
    for (now, a, w, slope, hard), (_, b, v, *_) in pairwise(seen):
        assert torch.equal(a, b) == (now >= 0.375) and not torch.equal(w, v)
        assert hard == {now >= 0.5} and slope == pytest.approx(4 * 12.5 ** min(now / 0.5, 1.0), rel=1e-5)
    assert result["epochs"][0]["synops"] > 0 and "synops" not in result["epochs"][1]


def test_evaluation_is_of_the_pruned_network_at_any_time():
    model, batch = opened(pruned(), -0.01), toy_batch()
    for gate in gates_of(model):
        in_search(gate)
    assert infer(model, batch["x"], taps=["stage2"]).taps["stage2"].abs().max() == 0
    assert call(model.train(), batch["x"], taps=["stage2"]).taps["stage2"].abs().max() > 0
    assert 0 <= evaluate(model, [batch])["accuracy"] <= 1


def test_folding_changes_nothing():
    torch.manual_seed(0)
    x, model = toy_batch()["x"], pruned(stem=True, head=True)
    model = awake(model, x)
    before = infer(model, x).logits
    merge(model)
    assert not gates_of(model) and torch.equal(infer(model, x).logits, before)
    kernel = model.stage2[1].conv.weight
    assert isinstance(kernel, nn.Parameter) and 0 < (kernel == 0).float().mean() < 1
    assert {"head.weight", "stem.conv.weight", "stage2.1.neuron.gate.m"} <= model.state_dict().keys()


def test_folding_in_training_mode_folds_the_decided_gates():
    model = pruned().train()
    decided = (model.stage2[1].conv.parametrizations.weight[0].a > 0).view(6, 5, 3, 3)
    merge(model)
    assert model.training and torch.equal(model.stage2[1].conv.weight != 0, decided)


def test_connectivity():
    model = opened(pruned())
    assert connectivity(model, SHAPE) == 1 and connectivity(toy_student(), SHAPE) == 1
    gate = model.stage2[1].conv.parametrizations.weight[0]
    gate.a.data.fill_(-1)
    first = 8 * 8 * 9 - 4 * 8 * 3 + 4  # positions x taps of a 3x3 on 8x8, without those over the border
    second = 4 * 4 * 9 - 4 * 4 * 3 + 4
    total = first * 2 * 5 + second * 5 * 6 + 6 * 4
    # the second layer is gone, and the head, whose inputs are dead
    assert connectivity(model, SHAPE) == pytest.approx(first * 2 * 5 / total)
    gate.a.data.view(6, 5, 3, 3)[1] = 1
    assert connectivity(model, SHAPE) == pytest.approx((first * 2 * 5 + second * 5 + 4) / total)
    model.stage2[1].neuron.gate.a.data.view(6, 4, 4)[1] = -1
    assert connectivity(model, SHAPE) == pytest.approx(first * 2 * 5 / total)
    assert connectivity(merge(model), SHAPE) == pytest.approx(first * 2 * 5 / total)
    nothing = opened(pruned(stem=True), -1)
    assert connectivity(nothing, SHAPE) == 0


def test_operations_by_counting():
    torch.manual_seed(0)
    x = toy_batch()["x"]
    model = awake(pruned(), x)
    out = infer(model, x, taps=["stage1", "stage2", "stem"])
    spikes = torch.nn.functional.max_pool2d(out.taps["stem"].flatten(0, 1), 2).unflatten(0, (3, 4))
    kernel, mask = model.stage2[1].conv.weight, model.stage2[1].neuron.gate.mask()
    count = 0
    for t in range(3):
        for b in range(4):
            for c, h, w in spikes[t, b].nonzero().tolist():
                for o in range(6):
                    for u in range(3):
                        for v in range(3):
                            y, z = h - u + 1, w - v + 1
                            if 0 <= y < 4 and 0 <= z < 4 and kernel[o, c, u, v] != 0 and mask[o, y, z]:
                                count += 1
    head = out.taps["stage2"].sum().item() * 4  # every spike of an average is added
    assert count > 50
    for network in (model, merge(model)):
        measured = activity(network, [{"x": x}])
        assert measured["operations"]["ac"] == pytest.approx((count + head) / 4)
        rate = measured["layers"]["stage2.1.neuron"]["rate"]  # of spikes that pass the gate
        assert rate == pytest.approx(out.taps["stage2"].mean().item())


def convolutions(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def test_operations_into_closed_neurons_behind_a_sum_are_not_counted():
    torch.manual_seed(0)
    x, model = torch.rand(2, 2, 8, 8), models.build("resnet19(stem_width=4, width=4)", channels=2, steps=2)
    unstructured_pruning(model, shape=SHAPE, mean=1.0)
    awake(model, x)
    name = {m: n for n, m in convolutions(model).items()}
    assert {name[conv] for conv in open_positions(model)} == {*name.values()} - {"stem.conv"}
    summed = ("stage2.0.conv2", "stage2.0.shortcut.0")
    before = activity(model, [{"x": x}])["synapses"]
    gate: Any = model.get_submodule("stage2.0.neuron.gate")
    gate.a.data.fill_(-1)
    assert all(activity(model, [{"x": x}])["synapses"][conv]["operations"] == 0 for conv in summed)
    gate.a.data.view(8, 4, 4)[:, :1] = 1
    left = connectivity(model, SHAPE)
    for network in (model, merge(model)):
        after = activity(network, [{"x": x}])["synapses"]
        assert all(0 < after[conv]["operations"] < before[conv]["operations"] for conv in summed)
        assert connectivity(network, SHAPE) == pytest.approx(left) and left < 1


def test_a_convolution_that_several_neurons_read_is_open_where_one_of_them_is():
    model = models.build("ms_resnet18(width=4)", channels=2, steps=2)
    unstructured_pruning(model, shape=SHAPE)
    convs = convolutions(model)
    for n, gated in model.named_modules():
        if isinstance(gated, Gated):
            nn.init.constant_(gated.gate.a, 1.0 if n == "stage4.1.neuron" else -1.0)
    masks = open_positions(model.eval())
    assert masks[convs["stage4.0.conv2"]].min() == 1  # the neuron of the next block reads it, and the last
    assert masks[convs["stage4.1.conv2"]].max() == 0
    assert convs["stage1.1.conv2"] not in masks  # a shortcut that shrinks reads the sum, too


def test_goes_with_bkd_and_keeps_the_taps():
    model, batch = pruned(), toy_batch()
    p = merge_plans(bkd(model, toy_teacher()), plan(model))
    assert set(p.loss) == {"ce", "bkd", "wsld", "synops"}
    Trainee(Stage([batch], **vars(p)))(batch, 0.2)[0].backward()
    assert all(q.grad is not None and q.grad.abs().max() > 0 for q in model.parameters())
    assert call(model, batch["x"], taps=["stage1", "stage2"]).taps["stage2"].shape == (3, 4, 6, 4, 4)


def test_mistakes_are_said():
    with pytest.raises(SpecError, match="no gates"):
        plan(toy_student())
    with pytest.raises(SpecError, match=r"should be less than search=0\.5"):
        pruned(search=0.5, hold=0.5)
    with pytest.raises(SpecError, match="no convolution but the first"):
        unstructured_pruning(Read(nn.Sequential(Conv2d(2, 3, 3)), 3), shape=SHAPE)
    layer = Spiking(Conv2d(2, 2, 3, 1, 1), nn.Identity(), LIF())
    with pytest.raises(SpecError, match="runs more than once"):
        unstructured_pruning(Read(nn.Sequential(layer, layer), 2), shape=SHAPE)
