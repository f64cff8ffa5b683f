"""The benchmark measures what it says; how fast is never asserted."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spikedistill import cli
from spikedistill.bench import networks
from spikedistill.bench.measure import in_turns, saved_bytes, spread
from spikedistill.models import parameters
from spikedistill.recipes import bench


def test_calls_take_turns_after_warming_up():
    order: list[str] = []
    seconds = in_turns({n: lambda n=n: order.append(n) for n in "ab"}, rounds=2, warmup=1)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_spread_is_in_milliseconds():
    assert spread([0.004, 0.001, 0.002, 0.003, 0.1]) == {"ms": 3.0, "low": 2.0, "high": 4.0}


def test_saved_bytes_counts_storages_once_and_no_parameters():
    model, x = nn.Linear(4, 3, bias=False), torch.rand(5, 4, requires_grad=True)
    assert saved_bytes(lambda: (model(x) * 1.0).sum(), model) == 5 * 4 * 4
    assert saved_bytes(lambda: (h := model(x)).mul(h).sum(), model) == 5 * 4 * 4 + 5 * 3 * 4


def test_the_networks_are_the_same_size():
    ours, relu = networks.Ours(2), networks.Relu(2)
    assert parameters(ours) == parameters(relu)
    x = torch.rand(2, 3, 32, 32)
    assert ours(x).shape == relu(x).shape == (2, 10)


def test_convolutions_alone_are_those_of_the_network():
    alone, x = networks.Alone(networks.Ours(2)), torch.rand(2, 3, 32, 32)
    F.cross_entropy(alone(x), torch.tensor([0, 1])).backward()
    trained = {k for k, p in alone.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {k for k, _ in alone.named_parameters() if k.endswith("conv.weight")} and len(trained) == 6
    shapes = [[*m.shape] for _, m, _ in alone.work]
    assert shapes[:2] == [[1, 2, 3, 32, 32], [2, 2, 64, 32, 32]] and shapes[-1] == [2, 2, 256, 8, 8]
    assert [learns for *_, learns in alone.work] == [False, *[True] * 5]
    (conv, m, _), weight = alone.work[1], alone.work[1][0].weight
    (want,) = torch.autograd.grad(conv(m), weight, alone.grads[1])
    assert torch.equal(weight.grad, want)


def test_recomputed_stages_keep_less():
    saved = [saved_bytes(loss, net) for net, loss, _ in (bench.by_steps(2, again) for again in (False, True))]
    assert 0 < saved[1] < saved[0] / 2


def test_methods_are_timed_with_the_teacher_running_and_cached(monkeypatch):
    monkeypatch.setattr(bench, "METHODS", {k: bench.METHODS[k] for k in ("ce", "kd", "ckd", "bkd")})
    small = "small(widths=(2, 3))"
    monkeypatch.setattr(bench, "STUDENT", small)
    monkeypatch.setattr(bench, "TEACHER", small.replace("))", "), neuron=relu)"))
    c = bench.Config(rounds=1, steps=2)
    rows = {row["name"]: row for row in bench.methods_table(c)}
    teacher, quickstart = "the teacher's forward pass", "bkd(weight=5.0, reduction=mean, hidden=32, wsld=0)"
    assert [*rows] == [teacher, "ce", "kd", "bkd", quickstart]  # ckd needs events
    assert {name for name, row in rows.items() if "cached" in row} == {"kd", "bkd", quickstart}
    assert all(row["train"]["ms"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert rows["bkd"]["cached_ratio"] == rows["bkd"]["cached"]["ms"] / rows["ce"]["train"]["ms"]
    assert rows["bkd"]["extra"] == 2 * (9 * 3 * 3 + 3) and rows[quickstart]["extra"] == 2 * 9 * 3 * 32 + 3 + 32
    (table,) = bench.drawn("methods", [*rows.values()], c)
    assert len({len(line) for line in [table.heads, *table.rows]}) == 1


def test_a_part_is_measured_written_and_joined_to_the_others(tmp_path, capsys):
    words = ["--rounds", "1", "--batch", "2", "--steps", "2", "--no-compiled", "--no-memory", "--out", str(tmp_path)]
    for part in ("vgg", "neuron", "convolution"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "--parts", part, *words])
        assert not stop.value.code
    found = json.loads((tmp_path / "speed.json").read_text())["parts"]
    assert [*found] == ["vgg", "neuron", "convolution"]
    rows = {row["name"]: row for row in found["vgg"]["rows"]}
    assert {"ours, auto", "ours, fp32", "ReLU net, T x B images, bf16"} <= rows.keys()
    assert all(row["train"]["ms"] > 0 and row["infer"]["ms"] > 0 and row["saved_mib"] > 0 for row in rows.values())
    assert len(rows["ours, auto"]["shares"]) == 5 and all(0 <= share <= 1 for share in rows["ours, auto"]["shares"])
    assert all(row["dense"]["ms"] > 0 and row["0.1"]["ms"] > 0 for row in found["convolution"]["rows"])
    text = (tmp_path / "speed.md").read_text()
    assert (
        "ours, auto" in text
        and "LIF alone" in text
        and "Convolutions forward and backward" in text
        and "spikedistill bench" in text
    )
    assert "LIF alone" in capsys.readouterr().out
    assert text.count("medians of 1 rounds") == 1
    found["neuron"]["config"]["rounds"] = 7  # a part that was measured by another command
    text = bench.page(found)
    assert text.count("medians of 1 rounds") == 2 and text.count("medians of 7 rounds") == 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--parts", "vg", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "vgg" in capsys.readouterr().err
