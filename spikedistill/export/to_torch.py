"""A student as a program of torch.export: a file that torch alone loads and runs, without this package.

    program = torch.export.load("student.pt2").module();  logits = program(images)      [T, B, classes]

The batch is free; T is fixed. The file names its neuron layers, so that the check can compare their spikes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.export.folding import Deployed, plain
from spikedistill.export.verify import Trace

EXTENSION = ".pt2"
TOLERANCE = 1e-4  # of logits, relative to the largest


def needs() -> list[str]:
    return []


def trace(student: nn.Module, x: Tensor) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The program of x -> (logits, *spikes) with a free batch, and the names of its neuron layers."""
    net = Deployed(plain(student, x)).eval()
    batch = torch.export.Dim("batch")
    shape = {x.ndim - 4: batch}
    example = torch.cat([x, x], x.ndim - 4) if x.shape[x.ndim - 4] == 1 else x  # a batch of 1 would be taken as fixed
    with torch.no_grad():
        net(example)
        layers = [*net.layers]
        return torch.export.export(net, (example,), dynamic_shapes={"x": shape}, strict=False), layers


def write(student: nn.Module, x: Tensor, path: Path) -> None:
    """x: an input such as the program will get, [B, C, H, W] or [T, B, C, H, W]."""
    program, layers = trace(student, x)
    graph = program.graph
    out: Any = graph.output_node()
    spikes = out.args[0][1:]
    names = {layer: node.name for layer, node in zip(layers, spikes)}
    program = first_output_only(program)
    torch.export.save(program, path, extra_files={"layers.json": json.dumps(names)})


def first_output_only(program: Any) -> torch.export.ExportedProgram:
    """The same program without its further outputs."""
    out: Any = program.graph.output_node()
    out.args = ((out.args[0][0],),)
    program.graph_signature.output_specs = program.graph_signature.output_specs[:1]
    spec = torch.utils._pytree.tree_structure((0,))
    program.module_call_graph[0].signature.out_spec = spec
    program.graph_module.recompile()
    return program


def readers(path: Path) -> dict[str, Callable[[Tensor], Trace]]:
    """{reader: x -> Trace} of the programs that can run the file here."""
    extra = {"layers.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    layers = {node: layer for layer, node in json.loads(extra["layers.json"] or "{}").items()}

    class Watch(torch.fx.Interpreter):
        spikes: dict[str, Tensor]

        def run_node(self, n):
            out = super().run_node(n)
            if n.name in layers:
                self.spikes[layers[n.name]] = out
            return out

    def read(x: Tensor) -> Trace:
        watch = Watch(module)
        watch.spikes = {}
        with torch.no_grad():
            logits = watch.run(x)
        return Trace(logits[0] if isinstance(logits, tuple | list) else logits, watch.spikes)

    return {f"torch {torch.__version__}, torch.export": read}
