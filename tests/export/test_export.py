"""What is written computes what the student does, and a writer that is broken is caught where it begins."""

from copy import deepcopy
from importlib.util import find_spec

import nir
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from spikedistill.core.taps import infer
from spikedistill.export import check, fold, folding, form, plain, read_nir, to_nir, verify
from spikedistill.export.verify import Trace, reference
from spikedistill.methods.hsd import HalfIF
from spikedistill.models import build
from spikedistill.neurons import IF, LIF, PLIF
from spikedistill.spec import SpecError
from tests.export.wake import awake

ONNX = pytest.mark.skipif(bool(form("onnx").needs()), reason="needs the extra onnx")
SNNTORCH = pytest.mark.skipif(
    find_spec("snntorch") is None or find_spec("nirtorch") is None, reason="needs snntorch and nirtorch"
)
IMAGES = dict(classes=3, channels=2, steps=3, mean=[0.4, 0.5], std=[0.2, 0.3])
SMALL = "small(widths=(3, 4))"
FAMILIES = [
    "small(widths=(3, 4, 5), neuron=plif(tau=3.0))",
    "small(widths=(3, 4), neuron=lif(v_reset=0.1, strict=True, v_th=0.8))",
    "small(widths=(3, 4), head=spiking)",
    "small(widths=(3, 4), neuron=if(v_reset=-0.3, v_th=0.8))",
    "sew_resnet18(width=3)",
    "sew_resnet18(width=3, stem=imagenet, neuron=lif)",
    "resnet19(width=3, stem_width=3)",
    "ms_resnet18(width=3)",
    "vggsnn(size=8, widths=((3, 4), (5,)), vote=2)",
    "plif_net(size=8, width=3, hidden=8, vote=2)",
]


def student(text=SMALL, seed=0, **given):
    torch.manual_seed(seed)
    return awake(build(text, **IMAGES | given), torch.rand(8, 2, 8, 8))


def samples(count=8, seed=1):
    torch.manual_seed(seed)
    return [{"x": torch.rand(count // 2, 2, 8, 8), "y": torch.arange(count // 2) % 3} for _ in range(2)]


def written(model, name, path, **how):
    form(name).write(model, samples()[0]["x"], path, **how)
    return form(name).readers(path, **({"steps": model.steps} if name == "nir" else {}))


def checked(model, readers, batches=None):
    for reader, read in readers.items():
        found = check(model, batches or samples(), read, reader)
        assert found.fault is None, "\n".join(found.lines())
        assert found.samples == found.exact == 8 and found.before == found.after and found.logits < 1e-5
        fired = sum(layer.spikes > 0 for layer in found.layers.values())
        assert fired >= len(found.layers) - 2 and all(layer.agreement == 1 for layer in found.layers.values()), (
            found.lines()
        )
        yield reader, found


# folding


@pytest.mark.parametrize("text", [*FAMILIES, "spikformer(depth=1, dim=16, heads=2, pools=(4,))"])
def test_folded_is_equal_and_leaves_the_student_alone(text):
    model, x = student(text), torch.rand(4, 2, 8, 8)
    before, want = {k: v.clone() for k, v in model.state_dict().items()}, infer(model, x).logits
    for made in (fold(model, x), plain(model, x)):
        assert not [n for n, m in made.named_modules() if isinstance(m, nn.BatchNorm2d | nn.Dropout)]
        torch.testing.assert_close(infer(made, x).logits, want, atol=1e-4, rtol=1e-4)
    assert not any(type(m).__name__ in ("LIF", "IF", "PLIF") for m in plain(model, x).modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_norm_is_folded_only_where_nothing_else_sees_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
            self.alone = nn.BatchNorm2d(2, affine=False)
            self.head = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))

        def forward(self, x):
            x = self.norm(self.conv(self.norm(self.conv(x))).relu())
            return self.head(self.alone(x).mean((-2, -1)))

    torch.manual_seed(0)
    model, x = Twice(), torch.rand(6, 2, 5, 5)
    model.train()(x)
    made = fold(model.eval(), x)
    assert isinstance(made.norm, nn.BatchNorm2d) and isinstance(made.alone, nn.BatchNorm2d)
    assert isinstance(made.head[1], nn.Identity) and made.head[0].bias is not None
    torch.testing.assert_close(made(x), model(x))


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class Steps(nn.Module):
    """A convolution and a norm, and between and after them what a test says."""

    def __init__(self, between=None, after=None, norm=nn.BatchNorm2d, conv=None, head=None):
        super().__init__()
        self.conv, self.norm = conv or nn.Conv2d(2, 4, 3, padding=1), norm(4)
        self.also = self.norm  # called by this name
        self.between, self.after, self.head = between, after, head or nn.Linear(4, 3)

    def forward(self, x):
        x = y = self.conv(x)
        if self.between:
            y = self.between(y)
        y = self.also(y)
        return self.head((self.after(y, x) if self.after else y).mean((-2, -1)))


@pytest.mark.parametrize(
    ("how", "folds"),
    [
        (dict(), True),
        (dict(after=lambda y, x: y.relu_() * x.shape[-1]), True),
        (dict(norm=NormAndReLU), False),
        (dict(conv=weight_norm(nn.Conv2d(2, 4, 3))), False),
        (dict(between=nn.ReLU(inplace=True)), False),
        (dict(between=lambda y: y.add_(1)), False),
        (dict(after=lambda y, x: y.relu().add_(x)), False),
        (dict(after=lambda y, x: torch.cat([y, x])[:6] * x.flatten(1).mean()), False),
    ],
)  # fmt: skip
def test_a_norm_is_folded_where_it_alone_reads_a_convolution_and_both_are_known(how, folds):
    torch.manual_seed(0)
    model, x = Steps(**how), torch.rand(6, 2, 5, 5)
    model.train()(torch.randn(6, 2, 5, 5))
    nn.init.uniform_(model.norm.weight, -2, 2)
    made, want = fold(model.eval(), x), model(x)
    assert isinstance(made.norm, nn.Identity) == isinstance(made.also, nn.Identity) == folds
    torch.testing.assert_close(made(x), want, atol=1e-5, rtol=1e-5)


def test_the_channels_of_a_linear_layer_are_those_of_its_norm():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(4, 3)), torch.rand(6, 2, 5)
    model.train()(x)
    torch.testing.assert_close(fold(model.eval(), x)(x), model(x))


@pytest.mark.parametrize(
    "neuron",
    [
        LIF(tau=3.0),
        LIF(v_reset=0.3, strict=True, decay_input=False),
        IF(v_reset=None),
        PLIF(4.0, v_th=0.7),
        HalfIF(),
    ],
)
def test_the_plain_neuron_is_the_neuron(neuron):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 7) + 0.8
    torch.testing.assert_close(neuron.run(x)[0], neuron(x))
    h = verify.potentials(neuron, x, 6)
    assert torch.equal((h > neuron.v_th if neuron.strict else h >= neuron.v_th).float(), neuron(x))
    assert torch.equal(folding.PlainNeuron(neuron)(x), neuron(x))
    assert torch.equal(folding.PlainNeuron(neuron)(x[:1], 4), neuron(x[:1], 4))


# NIR


@pytest.mark.parametrize("text", FAMILIES)
def test_nir_computes_what_the_student_does(text, tmp_path):
    model = student(text)
    assert checked_readers(model, written(model, "nir", tmp_path / "s.nir"))
    frames = [{"x": torch.rand(5, 8, 2, 8, 8), "y": torch.arange(8) % 3}]
    assert checked_readers(model, form("nir").readers(tmp_path / "s.nir"), frames)


def checked_readers(*args):
    return dict(checked(*args))


@SNNTORCH
@pytest.mark.parametrize("text", [FAMILIES[0], FAMILIES[2], FAMILIES[6], FAMILIES[8]])
def test_nir_to_snntorch_is_exact(text, tmp_path):
    model = student(text)
    readers = written(model, "nir", tmp_path / "s.nir")
    assert len(readers) == 2 and any("snnTorch" in r for r in checked_readers(model, readers))
    lif = student("sew_resnet18(width=3)")
    assert "IF" in read_nir.snntorch_cannot(to_nir.graph(lif, samples()[0]["x"]))
    readers = written(lif, "nir", tmp_path / "if.nir", if_as_lif=True)
    assert any("snnTorch" in r for r in checked_readers(lif, readers))


def test_the_nodes_of_a_nir_file(tmp_path):
    model = student(SMALL + "", steps=3)
    to_nir.write(model, samples()[0]["x"], tmp_path / "s.nir", dt=1e-3)
    graph = nir.read(tmp_path / "s.nir")
    kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
    assert kinds == {
        "input": "Input", "normalize": "Conv2d", "normalize.2": "Conv2d", "stem.conv": "Conv2d", "stem.neuron": "LIF",
        "stage2.0": "AvgPool2d", "stage2.0.any": "LIF", "stage2.1.conv": "Conv2d", "stage2.1.neuron": "LIF",
        "mean": "AvgPool2d", "flatten": "Flatten", "head": "Affine", "output": "Output",
    }  # fmt: skip
    neuron = graph.nodes["stem.neuron"]
    assert neuron.tau.shape == (3, 8, 8) and np.allclose(neuron.tau, 2e-3) and np.allclose(neuron.r, 2.0)
    assert neuron.v_threshold.max() < 1 and np.allclose(neuron.v_threshold, 1) and graph.metadata["dt"] == 1e-3
    assert tuple(graph.nodes["input"].input_type["input"]) == (2, 8, 8)
    assert to_nir.readers(tmp_path / "s.nir", steps=3).keys() == {f"nir {nir.version}, own reader"}
    checked_readers(model, to_nir.readers(tmp_path / "s.nir", steps=3))


def test_a_neuron_at_the_threshold_fires_through_nir():
    node = to_nir._Writer(None, 1e-4, False)
    for strict in (False, True):
        node.nodes.clear(), node.edges.clear(), node.counts.clear()
        node.nodes["input"] = nir.Input({"input": np.array([1])})
        node.fire("n", (1,), 0.5, 1.0, 1.0, 0.0, strict, ["input"])
        node.nodes["output"] = nir.Output({"output": np.array([1])})
        node.link(["n"], "output")
        got = read_nir.Executor(nir.NIRGraph(node.nodes, node.edges)).run(torch.tensor([1.0, 0.5, 0.75]).view(3, 1, 1))
        # 1 fires (or stays: then 0.5 + 0.5 = 1 and stays again, 0.5 + 0.75 fires)
        want = LIF(decay_input=False, strict=strict)(torch.tensor([1.0, 0.5, 0.75]).view(3, 1, 1))
        assert torch.equal(got.logits, want) and want[0].item() == (not strict)


@pytest.mark.parametrize(
    "text, words",
    [
        ("small(widths=(3, 4), neuron=lif(v_reset=None))", "stem.neuron, stage2.1.neuron: soft reset"),
        ("sew_resnet18(width=3, connect='and')", r"stage1.0 \(mul\): spikes are multiplied.*connect='add'"),
        ("sew_resnet18(width=3, connect='iand')", r"stage1.0 \(mul\): spikes are multiplied"),
        ("spikformer(depth=1, dim=16, heads=2, pools=(4,))", r"attention \(matmul\)"),
    ],
)
def test_what_nir_cannot_say_is_refused_by_name(text, words):
    with pytest.raises(SpecError, match=words):
        to_nir.graph(student(text), samples()[0]["x"])


def test_a_start_of_its_own_is_refused_by_name():
    model = student()
    model.stem.neuron = HalfIF()
    with pytest.raises(SpecError, match=r"^stem.neuron: its potential does not start where it resets to"):
        to_nir.graph(model, samples()[0]["x"])


def test_a_maximum_of_sums_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = student()
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            x = self.base.stem(*self.base.start(x, None))
            return self.pool((x * 2).flatten(0, 1)).unflatten(0, x.shape[:2]).mean((-2, -1))

    with pytest.raises(SpecError, match="maximum of what is not spikes"):
        to_nir.graph(Net(), samples()[0]["x"])


# broken writers are caught


def spoil(path, change):
    """Write a NIR file again with its nodes changed."""
    graph = nir.read(path)
    change(graph)
    nir.write(path, nir.NIRGraph(graph.nodes, graph.edges, metadata=graph.metadata))


def no_bias(name):
    def change(graph):
        graph.nodes[name].bias = np.zeros_like(graph.nodes[name].bias)

    return change


def set_all(name, key, value):
    def change(graph):
        setattr(graph.nodes[name], key, np.full_like(getattr(graph.nodes[name], key), value))

    return change


def cut(source, target):
    return lambda graph: graph.edges.remove((source, target))


@pytest.mark.parametrize(
    "text, change, words",
    [
        (SMALL, no_bias("stem.conv"), "layer stem.neuron at time step 1"),
        (SMALL, no_bias("stage2.1.conv"), "layer stage2.1.neuron at time step 1"),
        (SMALL, no_bias("head"), "in the logits at time step 1"),
        (SMALL, no_bias("normalize"), "layer stem.neuron at time step 1"),
        (SMALL, set_all("stem.neuron", "v_reset", 0.9), "layer stem.neuron at time step 3"),
        (SMALL, set_all("stage2.1.neuron", "tau", 3e-4), "layer stage2.1.neuron at time step 1"),
        (SMALL, set_all("stage2.1.neuron", "v_threshold", 1.01), "layer stage2.1.neuron at time step"),
        (SMALL, set_all("stage2.0.any", "v_threshold", 0.3), "layer stage2.1.neuron at time step 1"),
        ("sew_resnet18(width=3)", cut("stem.neuron", "stage1.1.branch.0.conv"), "layer stage1.1.branch.0.neuron at time step"),
    ],
)  # fmt: skip
def test_a_broken_nir_writer_is_caught_where_it_begins(text, change, words, tmp_path):
    model = student(text)
    written(model, "nir", tmp_path / "s.nir")
    spoil(tmp_path / "s.nir", change)
    for reader, read in form("nir").readers(tmp_path / "s.nir", steps=3).items():
        found = check(model, samples(), read, reader)
        assert found.fault and words in found.fault, found.lines()


def test_a_spike_changed_by_rounding_is_no_fault_and_any_other_is(monkeypatch):
    model, (batch, _) = student(), samples()
    want, currents = reference(model, batch["x"])
    assert list(currents) == ["stem.neuron", "stage2.1.neuron"] and list(want.spikes) == list(currents)
    away = (verify.potentials(model.stem.neuron, currents["stem.neuron"], 3) - 1.0).abs()[1].flatten()
    nearest, farthest = int(away.argmin()), int(away.argmax())
    for place, limit, fault in (
        (nearest, float(away[nearest]) * 1.1, None),
        (nearest, float(away[nearest]) * 0.9, "layer stem.neuron at time step 2"),
        (farthest, verify.NEAR, "layer stem.neuron at time step 2"),
    ):
        monkeypatch.setattr(verify, "NEAR", limit)
        spikes = {k: v.clone() for k, v in want.spikes.items()}
        flat = spikes["stem.neuron"][1].flatten()
        flat[place] = 1 - flat[place]
        spikes["stem.neuron"][1] = flat.view_as(spikes["stem.neuron"][1])
        found = check(model, [batch], lambda x, spikes=spikes: Trace(want.logits, spikes), "me")
        assert found.layers["stem.neuron"].differ == 1 and found.exact == 3
        assert found.fault is None if fault is None else fault in str(found.fault)


def test_a_file_whose_logits_were_never_compared_is_a_fault(monkeypatch):
    model, batches = student(), samples()
    monkeypatch.setattr(verify, "NEAR", 1e9)
    monkeypatch.setattr(verify, "ASTRAY", 1.0)

    def flipped(x):  # a spike of every sample
        want, _ = reference(model, x)
        spikes = want.spikes["stem.neuron"].clone()
        spikes[0, :, 0, 0, 0] = 1 - spikes[0, :, 0, 0, 0]
        return Trace(want.logits + 1, want.spikes | {"stem.neuron": spikes})

    assert "no logits could be compared" in str(check(model, batches, flipped, "me").fault)
    other = deepcopy(model)  # as a folded student, whose spikes are those of the file
    other.stem.neuron.register_forward_hook(lambda _m, _i, out: torch.cat([flip(out[:1]), out[1:]]))
    assert "logits" in str(check(model, batches, lambda x: wrong(other, x), "me", folded=other).fault)
    assert check(model, batches, lambda x: reference(other, x)[0], "me", folded=other).fault is None


def flip(out):
    out = out.clone()
    out[0, :, 0, 0, 0] = 1 - out[0, :, 0, 0, 0]
    return out


def wrong(model, x):
    want, _ = reference(model, x)
    return Trace(want.logits + 1, want.spikes)


def test_many_spikes_changed_are_a_fault_even_if_each_could_be_rounding(monkeypatch):
    model, batches = student(), samples()
    monkeypatch.setattr(verify, "NEAR", 1e9)

    def inverted(x):
        want, _ = reference(model, x)
        return Trace(want.logits, want.spikes | {"stage2.1.neuron": 1 - want.spikes["stage2.1.neuron"]})

    assert "layer stage2.1.neuron" in str(check(model, batches, inverted, "me").fault)


def test_wrong_shapes_and_lost_layers_are_faults():
    model, (batch, _) = student(), samples()
    want, _ = reference(model, batch["x"])
    for trace, words in (
        (Trace(want.logits[:2], want.spikes), "logits are [2, 4, 3], the student's [3, 4, 3]"),
        (Trace(want.logits, {}), "layer stem.neuron is not in the file"),
        (Trace(want.logits, want.spikes | {"stem.neuron": want.spikes["stem.neuron"][:2]}), "layer stem.neuron: [2,"),
        (Trace(want.logits + 1e-3, want.spikes), "in the logits at time step 1: 0.001 away although all spikes"),
    ):
        assert words in str(check(model, [batch], lambda x, trace=trace: trace, "me").fault)


# torch.export and ONNX


def test_torch_export_runs_any_batch_without_this_package(tmp_path):
    model = student("small(widths=(3, 4), neuron=lif(v_reset=None))")
    assert checked_readers(model, written(model, "torch", tmp_path / "s.pt2"))
    program = torch.export.load(tmp_path / "s.pt2")
    assert "spikedistill" not in str(program.graph) and "batch_norm" not in str(program.graph)
    out = program.module()(x := torch.rand(5, 2, 8, 8))
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, infer(model, x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["torch", pytest.param("onnx", marks=ONNX)])
def test_a_broken_neuron_is_caught(kind, tmp_path, monkeypatch):
    model, soft = student(), folding.PlainNeuron.forward

    def subtracts(self, x, steps=None):
        self.v_reset = None
        return soft(self, x, steps)

    monkeypatch.setattr(folding.PlainNeuron, "forward", subtracts)
    ((reader, read),) = written(model, kind, tmp_path / "s").items()
    # under a constant input, what fired first at step 2 is where the reset tells, at step 3
    assert "layer stem.neuron at time step 3" in str(check(model, samples(), read, reader).fault)


@pytest.mark.parametrize("kind", ["torch", pytest.param("onnx", marks=ONNX)])
def test_a_dropped_bias_is_caught(kind, tmp_path, monkeypatch):
    model, absorb = student(), folding.absorb

    def forgets(synapse, norm):
        absorb(synapse, norm)
        if synapse.in_channels == 3:
            synapse.bias.data.zero_()

    monkeypatch.setattr(folding, "absorb", forgets)
    ((reader, read),) = written(model, kind, tmp_path / "s").items()
    assert "layer stage2.1.neuron at time step 1" in str(check(model, samples(), read, reader).fault)


@ONNX
def test_onnx_has_a_free_batch_and_one_output(tmp_path):
    import onnx
    import onnxruntime

    model = student("small(widths=(3, 4), neuron=plif(v_reset=None))")
    assert checked_readers(model, written(model, "onnx", tmp_path / "s.onnx"))
    proto = onnx.load(tmp_path / "s.onnx")
    assert [o.name for o in proto.graph.output] == ["logits"] and {n.domain for n in proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        x = torch.rand(count, 2, 8, 8)
        (got,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), infer(model, x).logits, atol=1e-5, rtol=1e-5)


def test_the_extra_is_named_where_onnx_is_missing(monkeypatch):
    monkeypatch.setattr("spikedistill.export.to_onnx.find_spec", lambda name: None)
    assert "pip install 'spikedistill[onnx]'" in form("onnx").needs()[0]
