"""Energy by hand."""

import pytest
import torch

from spikedistill.models.foreign import Spiking
from spikedistill.models.small import small
from spikedistill.report import energy
from spikedistill.report.activity import activity

LAYERS = {"neuron": {"rate": 0.25, "neurons": 100}}
FIRST = {
    "kind": "mac",
    "operations": 900.0,
    "dense": 1000.0,
    "once": 1000.0,
    "inputs": 50.0,
    "outputs": 100.0,
    "weights": 10,
    "averaged": 1,
}
SECOND = {
    "kind": "ac",
    "operations": 400.0,
    "dense": 4000.0,
    "once": 1000.0,
    "inputs": 400.0,
    "outputs": 40.0,
    "weights": 1000,
    "averaged": 1,
}
STUDENT = {"steps": 4, "layers": LAYERS, "synapses": {"first": FIRST, "second": SECOND}}


def test_memory_costs_what_is_published_and_grows_between():
    assert [energy.access(b) * 8 for b in (1, 8192, 32768, 2**20)] == pytest.approx([10, 10, 20, 100])
    assert 10 / 8 < energy.access(16384) < 20 / 8 and energy.access(2**22) > 100 / 8
    assert energy.access(16384) * 8 == pytest.approx(200**0.5)


def test_a_spiking_network_by_hand():
    e = energy.spiking(STUDENT)
    assert e["compute"] == pytest.approx(1000 * 4.6 + 400 * 0.9)
    assert e["neurons"] == pytest.approx(100 * 4 * 4.6)
    small = 10 / 8  # pJ a byte: every memory here is of the smallest kind
    first = 1000 * (4 + 4) * small + 100 * 4 * small
    second = 400 * (4 + 2 * 4) * small
    neurons = 2 * 400 * 4 * small + 2 * 100 * 2 * small
    assert e["memory"] == pytest.approx(first + second + neurons)


def test_neurons_of_an_int8_network_have_32_bits():
    assert energy.spiking(STUDENT, energy.INT8)["neurons"] == pytest.approx(100 * 4 * (3.1 + 0.1))
    assert energy.spiking(STUDENT, energy.INT8)["compute"] == pytest.approx(1000 * 0.3 + 400 * 0.1)


def test_neurons_behind_closed_gates_cost_nothing():
    gated = STUDENT | {"layers": {"neuron": LAYERS["neuron"] | {"open": 40}}}
    e, whole = energy.spiking(gated), energy.spiking(STUDENT)
    assert e["neurons"] == pytest.approx(whole["neurons"] * 0.4) and e["compute"] == whole["compute"]
    assert whole["memory"] - e["memory"] == pytest.approx(2 * 60 * 4 * 4 * 10 / 8)  # the spikes are the same


@pytest.mark.parametrize("kind", ["ac", "mac"])
def test_what_is_multiplied_with_an_activation_lies_in_a_memory_of_its_size(kind):
    product = SECOND | {"kind": kind, "weights": 0}
    no, yes = (
        {"steps": 4, "layers": {}, "synapses": {"products": of}} for of in (product, product | {"operand": 2**18})
    )
    reads = 400 if kind == "ac" else 4000
    e = energy.spiking(yes)["memory"] - energy.spiking(no)["memory"]
    assert e == pytest.approx(reads * 4 * (100 - 10) / 8)
    assert energy.ann(yes)["memory"] - energy.ann(no)["memory"] == pytest.approx(1000 * 4 * (100 - 10) / 8)


def test_an_ann_on_frames_is_charged_for_all_of_them():
    x, image = torch.rand(5, 4, 2, 8, 8), torch.rand(4, 2, 8, 8)
    ann = small(classes=3, channels=2, widths=(4, 6), neuron="relu")
    frames, one = (activity(ann, [{"x": x, "y": torch.zeros(4)}]) for x in (x, image))
    all_, single = energy.table(frames)[0], energy.table(one)[0]
    for key in ("operations", "compute", "memory", "total"):
        assert all_[key] == pytest.approx(5 * single[key])
        assert energy.per_sample(frames)["total"] == pytest.approx(all_["total"])
    assert energy.table(frames, frames)[-1]["total"] == pytest.approx(all_["total"])  # as teacher
    student = activity(small(classes=3, channels=2, widths=(4, 6)), [{"x": x, "y": torch.zeros(4)}])
    of = {(row["name"], row["precision"]): row for row in energy.table(student)}
    shape = "ANN of the student's shape"
    assert of[f"{shape}, every frame", "float32"]["total"] == pytest.approx(all_["total"])
    assert of[f"{shape}, frames summed", "float32"]["total"] == pytest.approx(single["total"])
    assert len(of) == 2 + 6


def test_an_ann_of_the_shape_by_hand_in_8_and_4_bits():
    small = 10 / 8
    for p, mac, bytes_ in ((energy.FP32, 4.6, 4), (energy.INT8, 0.3, 1), (energy.INT4, 0.15, 0.5)):
        e = energy.ann(STUDENT, p)
        assert e["compute"] == pytest.approx(2000 * mac) and e["neurons"] == 0
        outputs = 100 + 40 / 4
        assert e["memory"] == pytest.approx(2000 * 2 * bytes_ * small + outputs * bytes_ * small)


def test_a_large_memory_costs_more():
    wide = SECOND | {"weights": 2**18}
    e = energy.spiking({"steps": 4, "layers": {}, "synapses": {"second": wide}})
    assert e["memory"] == pytest.approx(400 * (4 * 100 / 8 + 2 * 4 * 10 / 8))


def test_the_table_has_the_references_and_the_measured_shape():
    x = {"x": torch.rand(4, 1, 8, 8), "y": torch.zeros(4)}
    student = activity(small(classes=3, widths=(4, 6), steps=4), [x])
    teacher = activity(small(classes=3, widths=(8, 16), neuron="relu"), [x])
    rows = energy.table(student, teacher)
    names = [(row["name"], row["precision"]) for row in rows]
    shape = "ANN of the student's shape"
    assert names == [
        ("student", "float32"),
        ("student", "int8"),
        ("teacher", "float32"),
        (shape, "float32"),
        (shape, "int8"),
        (shape, "int4"),
    ]
    of = dict(zip(names, rows))
    dense = 64 * 9 * 4 + 16 * 9 * 4 * 6 + 6 * 3
    assert of[shape, "float32"]["operations"] == pytest.approx(dense / 1e6)
    assert of[shape, "float32"]["compute"] == pytest.approx(dense * 4.6 / 1e3)
    twin = activity(small(classes=3, widths=(4, 6), neuron="relu"), [x])
    assert energy.ann(twin)["compute"] == pytest.approx(energy.ann(student)["compute"])
    assert energy.ann(twin)["memory"] == pytest.approx(energy.ann(student)["memory"])
    assert of["teacher", "float32"]["compute"] > of[shape, "float32"]["compute"]
    assert all(row["total"] > row["compute"] > 0 for row in rows)
    assert energy.per_sample({"operations": {}}) is None and energy.per_sample(student)["total"] > 0


def test_neurons_of_another_library_are_not_taken_for_an_ann():
    class Other(torch.nn.Module):
        def forward(self, x):
            return (x > 0.5).float()

    x = {"x": torch.rand(4, 1, 8, 8), "y": torch.zeros(4)}
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6), Other(), torch.nn.Linear(6, 3))
    student = activity(Spiking(net, steps=2, mode="step", reset=lambda net: None), [x])
    assert student["foreign"] and student["layers"] == {} and energy.per_sample(student) is None
    teacher = activity(small(classes=3, widths=(8, 16), neuron="relu"), [x])
    assert "foreign" not in teacher
    assert [row["name"] for row in energy.table(student, teacher)] == ["teacher"] + 3 * ["ANN of the student's shape"]
    assert not any(row["name"] == "teacher" for row in energy.table(teacher, student))


def test_memories_of_a_dense_layer_hold_one_step_of_many():
    """A layer of float frames runs T times, and its memories are as large as those of the one that runs once."""
    big = {"inputs": 40_000.0, "outputs": 80_000.0, "weights": 10}  # beyond the smallest memory
    timed = FIRST | {"dense": 4000.0} | {k: 4 * v if k != "weights" else v for k, v in big.items()}
    once, four = ({"steps": 4, "layers": {}, "synapses": {"first": layer}} for layer in (FIRST | big, timed))
    assert energy.spiking(four)["memory"] == pytest.approx(4 * energy.spiking(once)["memory"])
    assert energy.ann(four)["memory"] == pytest.approx(energy.ann(once)["memory"])
