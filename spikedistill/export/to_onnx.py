"""A student as an ONNX file. Input "x", output "logits" [T, B, classes]; the batch is free, T is fixed.

The spikes of a layer are values of the graph called "spikes.<layer>": not outputs, but there for whoever adds them.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from spikedistill.export.to_torch import trace
from spikedistill.export.verify import Trace

EXTENSION = ".onnx"
TOLERANCE = 1e-5  # of logits, relative to the largest


def needs() -> list[str]:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    return [f"ONNX needs {', '.join(missing)}: pip install 'spikedistill[onnx]'"] if missing else []


def write(student: nn.Module, x: Tensor, path: Path) -> None:
    """x: an input such as the file will get, [B, C, H, W] or [T, B, C, H, W]."""
    onnx = import_module("onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every operator of torchvision that is not there
    program, layers = trace(student, x)
    names = ["logits", *(f"spikes.{layer}" for layer in layers)]
    made = torch.onnx.export(program, input_names=["x"], output_names=names, dynamo=True, verbose=False)
    assert made is not None
    model = made.model_proto
    del model.graph.output[1:]  # the spikes stay inside, under their names
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def readers(path: Path) -> dict[str, Callable[[Tensor], Trace]]:
    """{reader: x -> Trace} of the programs that can run the file here."""
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    model = onnx.load(path)
    known = {name for node in model.graph.node for name in node.output if name.startswith("spikes.")}
    for name in sorted(known):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [o.name for o in session.get_outputs()]

    def read(x: Tensor) -> Trace:
        values = dict(zip(outputs, map(torch.from_numpy, session.run(None, {"x": x.contiguous().numpy()}))))
        logits = values.pop("logits")
        return Trace(logits, {name.removeprefix("spikes."): value for name, value in values.items()})

    return {f"onnxruntime {runtime.__version__}": read}
