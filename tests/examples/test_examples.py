"""The examples run, on tiny images, where the libraries they are about are installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

import spikedistill as sd
from spikedistill import data, models
from spikedistill.core.taps import call, infer

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.rand(60, 1, 12, 12) * 0.3
    for i, c in enumerate(y):
        x[i, :, :, 4 * c : 4 * c + 4] += 0.6
    return data.from_tensors(x, y, x[:12], y[:12], valid=0.2, batch_size=16)


@pytest.mark.parametrize("library", ["spikingjelly", "snntorch"])
def test_a_student_of_another_library_is_distilled_and_comes_back(library, tiny, tmp_path):
    pytest.importorskip("spikingjelly.activation_based" if library == "spikingjelly" else library)
    loaded = example(f"{library}_student").main(tiny, epochs=1, out=str(tmp_path))
    x = torch.rand(4, 1, 12, 12)
    a = infer(loaded, x).logits
    assert a.shape == (4, 4, 3) and torch.equal(a, infer(loaded, x).logits)  # nothing is left from call to call
    assert infer(loaded, x[:2], steps=2).logits.shape == (2, 2, 3)
    (tap,) = loaded.dims
    assert call(loaded, x, taps=[tap]).taps[tap].shape == (4, 4, 32, 3, 3)
    frames = torch.rand(5, 2, 1, 12, 12)
    by_hand = []
    loaded.reset(loaded.net)
    for frame in loaded.normalize(frames):
        out = loaded.net(frame[None])[0] if loaded.mode == "sequence" else loaded.net(frame)
        by_hand.append(out)
    torch.testing.assert_close(infer(loaded, frames).logits, torch.stack(by_hand), atol=1e-5, rtol=1e-5)


def test_bkd_in_a_loop_of_your_own(tiny):
    torch.manual_seed(0)
    loop = example("own_loop")
    how = dict(classes=3, widths=(4, 6, 8))
    student, teacher = models.small(**how), models.small(**how, neuron="relu")
    before = [p.clone() for p in teacher.parameters()]
    sizes = dict(width=8, teacher_width=8)
    first = loop.train(student, teacher, tiny.train, **sizes)
    assert loop.train(student, teacher, tiny.train, epochs=4, **sizes) < first
    assert all(map(torch.equal, before, teacher.parameters()))


def test_the_loop_is_short():
    lines = (EXAMPLES / "own_loop.py").read_text().split('Returns the last loss."""')[1].split("if __name__")[0]
    assert len(lines.strip().splitlines()) <= 20


def test_the_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("SPIKEDISTILL_NOTEBOOK_SAMPLES", "200")
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "\n".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "accuracy" in text and "written and checked" in text
    assert sd.load(tmp_path / "runs" / "student").steps == 4
