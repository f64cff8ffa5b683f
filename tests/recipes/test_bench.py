"""The benchmark measures what it says; how fast is never asserted."""

import json

import pytest
import torch
from torch import nn

from spikedistill import cli
from spikedistill.bench import networks
from spikedistill.bench.measure import in_turns, saved_bytes, spread
from spikedistill.models import parameters


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


def test_a_part_is_measured_written_and_joined_to_the_others(tmp_path, capsys):
    words = ["--rounds", "1", "--batch", "2", "--steps", "2", "--no-compiled", "--no-memory", "--out", str(tmp_path)]
    for part in ("vgg", "neuron"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "--parts", part, *words])
        assert not stop.value.code
    found = json.loads((tmp_path / "speed.json").read_text())["parts"]
    assert [*found] == ["vgg", "neuron"]
    rows = {row["name"]: row for row in found["vgg"]["rows"]}
    assert {"ours, auto", "ours, fp32", "ReLU net, T x B images, bf16"} <= rows.keys()
    assert all(row["train"]["ms"] > 0 and row["infer"]["ms"] > 0 and row["saved_mib"] > 0 for row in rows.values())
    text = (tmp_path / "speed.md").read_text()
    assert "ours, auto" in text and "LIF alone" in text and "spikedistill bench" in text
    assert "LIF alone" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--parts", "vg", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "vgg" in capsys.readouterr().err
