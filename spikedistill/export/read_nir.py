"""Programs that read a NIR file: our own, written from the definitions of the nodes, and snnTorch's importer."""

import contextlib
import io
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spikedistill.export.verify import Trace

DT = 1e-4  # seconds of a step, where the file says nothing; snnTorch's


class Executor:
    """Runs a NIR graph over [T, B, ...] by forward Euler steps of `dt`, as its equations stand. IF steps by 1.

    Knows the nodes that `to_nir.graph` writes. Raises ValueError for others.
    """

    def __init__(self, graph: nir.NIRGraph, dt: float = DT):
        self.nodes, self.dt = graph.nodes, dt
        self.sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
        for source, target in graph.edges:
            self.sources[target].append(source)
        self.order = self.sorted()
        self.weights = {
            name: {k: torch.from_numpy(np.array(v)) for k, v in vars(node).items() if isinstance(v, np.ndarray)}
            for name, node in self.nodes.items()
        }

    def sorted(self) -> list[str]:
        """Every node after those that it reads."""
        order: list[str] = []
        left = dict(self.sources)
        while left:
            ready = [name for name, sources in left.items() if all(s in order for s in sources)]
            if not ready:
                raise ValueError(f"the graph has a loop: {', '.join(left)}")
            order += ready
            for name in ready:
                del left[name]
        return order

    def run(self, x: Tensor) -> Trace:
        """x: [T, B, ...] -> "output" at every step, and what the neurons fired, by node."""
        voltages: dict[str, Tensor] = {}
        logits, spikes = [], {name: [] for name in self.order if isinstance(self.nodes[name], nir.LIF | nir.IF)}
        for now in x:
            values: dict[str, Tensor] = {}
            for name in self.order:
                sources = [values[s] for s in self.sources[name]]
                signal = now if isinstance(self.nodes[name], nir.Input) else sources[0]
                for more in sources[1:]:
                    signal = signal + more
                values[name] = self.step(name, signal, voltages)
                if name in spikes:
                    spikes[name].append(values[name])
            logits.append(values["output"])
        return Trace(torch.stack(logits), {name: torch.stack(s) for name, s in spikes.items()})

    def step(self, name: str, x: Tensor, voltages: dict[str, Tensor]) -> Tensor:
        node, w = self.nodes[name], self.weights[name]
        how: Any = node  # its fields are numbers, pairs or arrays
        if isinstance(node, nir.Input | nir.Output):
            return x
        if isinstance(node, nir.Conv2d):
            stride, padding, dilation = (pair([*v]) for v in (how.stride, how.padding, how.dilation))
            return F.conv2d(x, w["weight"], w["bias"], stride, padding, dilation, int(how.groups))
        if isinstance(node, nir.Affine):
            return F.linear(x, w["weight"], w["bias"])
        if isinstance(node, nir.Linear):
            return F.linear(x, w["weight"])
        if isinstance(node, nir.AvgPool2d):
            kernel, stride, padding = (pair([*v]) for v in (how.kernel_size, how.stride, how.padding))
            return F.avg_pool2d(x, kernel, stride, padding)
        if isinstance(node, nir.Flatten):
            start, end = (int(d) + 1 if d >= 0 else int(d) for d in (node.start_dim, node.end_dim))  # after the batch
            return x.flatten(start, end)
        if isinstance(node, nir.IF):
            v = voltages.get(name, torch.zeros(())) + w["r"] * x
        elif isinstance(node, nir.LIF):
            v = voltages.get(name, w["v_leak"])
            leak = (self.dt / w["tau"].double()).to(x.dtype)
            gain = (w["r"].double() * self.dt / w["tau"].double()).to(x.dtype)
            v = (1 - leak) * v + leak * w["v_leak"] + gain * x
        else:
            raise ValueError(f"node '{name}' is a {type(node).__name__}, which this reader does not know")
        fired = v > w["v_threshold"]
        voltages[name] = torch.where(fired, w["v_reset"].expand_as(v), v)
        return fired.to(x.dtype)


def readers(path: Path, steps: int | None = None) -> dict[str, Callable[[Tensor], Trace]]:
    """{reader: x -> Trace} of the programs that can run the file here: our own, and snnTorch's where it is installed.

    steps: T for images.
    """
    graph = nir.read(path)
    dt = float(graph.metadata.get("dt", DT))
    own = Executor(graph, dt)

    def read(x: Tensor) -> Trace:
        with torch.no_grad():
            return own.run(over_steps(x, steps))

    found: dict[str, Callable[[Tensor], Trace]] = {f"nir {nir.version}, own reader": read}
    if not snntorch_cannot(graph, dt):
        found[f"snnTorch {import_module('snntorch').__version__}"] = snntorch(path, steps)
    return found


def over_steps(x: Tensor, steps: int | None) -> Tensor:
    """Images [B, C, H, W] -> the same at every step, [T, B, C, H, W]; frames as they are."""
    return x if x.ndim == 5 else x.expand(steps or 1, *x.shape)


def snntorch_cannot(graph: nir.NIRGraph, dt: float = DT) -> str | None:
    """Why snnTorch's importer cannot be asked about a graph, or None."""
    if find_spec("snntorch") is None or find_spec("nirtorch") is None:
        return "it is not installed (pip install snntorch nirtorch)"
    if any(isinstance(node, nir.IF) for node in graph.nodes.values()):
        return "it reads IF as leaky, with a soft reset; --if-as-lif writes them so that it does not"
    if dt != DT:
        return f"it steps by {DT:g} s, the file by {dt:g} s"
    if any(isinstance(n, nir.LIF) and (n.v_leak.any() or np.any(n.v_reset)) for n in graph.nodes.values()):
        return "it knows no other potential to leak and reset to than 0"
    if any(isinstance(n, nir.Conv2d) and int(n.groups) > 1 for n in graph.nodes.values()):
        return "it reads a grouped convolution's channels from its weights, which fails"
    return None


def why_not_snntorch(path: Path) -> str | None:
    """Why `readers` does not ask snnTorch about a file, or None."""
    graph = nir.read(path)
    return snntorch_cannot(graph, float(graph.metadata.get("dt", DT)))


def snntorch(path: Path, steps: int | None) -> Callable[[Tensor], Trace]:
    """The file as snnTorch imports it, one sample at a time."""
    graph = nir.read(path)
    with contextlib.redirect_stdout(io.StringIO()):
        net = import_module("snntorch.import_nir").import_from_nir(graph)
    layers = {name: name.replace(".", "_") for name, node in graph.nodes.items() if isinstance(node, nir.LIF)}
    modules = dict(net.named_modules())

    def read(x: Tensor) -> Trace:
        x = over_steps(x, steps)
        logits, spikes = [], {name: [] for name in layers}
        hooks = [
            modules[key].register_forward_hook(lambda _m, _i, out, name=name: spikes[name].append(first(out)))
            for name, key in layers.items()
        ]
        try:
            with torch.no_grad():
                for b in range(x.shape[1]):
                    for key in layers.values():
                        modules[key].mem = torch.zeros(0)
                    state = None
                    for now in x[:, b]:
                        out = net(now) if state is None else net(now, state)
                        out, state = out if isinstance(out, tuple) else (out, None)
                        logits.append(out)
        finally:
            for hook in hooks:
                hook.remove()
        shape = (x.shape[1], x.shape[0])
        traces = {name: torch.stack(s).unflatten(0, shape).transpose(0, 1) for name, s in spikes.items()}
        return Trace(torch.stack(logits).unflatten(0, shape).transpose(0, 1), traces)

    return read


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def pair(v: int | Sequence[int]) -> tuple[int, int]:
    """An int, one or two of them -> two."""
    values = [int(i) for i in v] if isinstance(v, Sequence) else [int(v)]
    return (values[0], values[-1])
