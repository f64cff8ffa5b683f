"""A student as a NIR file (neuromorphic intermediate representation), the graph of one time step.

    decay V + gain X, fires above v_th, hard reset   ->  LIF: tau = dt / (1 - decay), r = gain tau / dt, or IF
    max pool of spikes                               ->  AvgPool2d, LIF without memory that fires above half a spike
    mean over space                                  ->  AvgPool2d, Flatten
    (x - mean) / std                                 ->  Conv2d 1x1
    a + b                                            ->  both lead into what reads the sum, which NIR adds

NIR neurons fire strictly above the threshold and reset to a value. A student that fires at the threshold gets the next
smaller float as its threshold, which is the same rule. A soft reset cannot be said in NIR and is refused.

NIR has continuous time: what is written as LIF means the same to a program that steps by the same `dt`; 1e-4 s is
snnTorch's. IF does not: r = 1 is a step's whole current, for programs that add r I at a step, as our reader does. One
that integrates r I over `dt` needs `if_as_lif`. IF starts at 0, so one that resets elsewhere is written with all its
potentials moved by that; a start elsewhere than at the reset, as hsd's neurons have it, cannot be said.

The graph takes one sample without a batch. Present a static image at every step; "output" are the logits of that step.

Pedersen et al. 2024, https://www.nature.com/articles/s41467-024-52259-9.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, nn

from spikedistill.export.folding import fold
from spikedistill.export.read_nir import DT, pair
from spikedistill.export.read_nir import readers as readers  # a format's module writes and reads
from spikedistill.neurons import Neuron
from spikedistill.spec import SpecError

EXTENSION = ".nir"
TOLERANCE = 1e-4  # of logits, relative to the largest
T, B = 5, 7  # of the input that is traced: sizes that no layer has by chance in front
STARTS = "its potential does not start where it resets to, which NIR cannot say, retrained or not; onnx and torch can"
LEADS = ((T, B), (1, B), (T * B,), (B,))
AS_IT_IS = {
    *("flatten", "unflatten", "view", "reshape", "unsqueeze", "squeeze", "expand", "contiguous", "clone", "to"),
    *("_to_copy", "_unsafe_view", "detach", "detach_", "lift_fresh_copy", "_assert_tensor_metadata"),
}

Value = list[str]  # the nodes whose outputs add up to it


def needs() -> list[str]:
    return []


def unfit(model: nn.Module) -> list[str]:
    """The neuron layers that NIR cannot say as they are: those with a soft reset."""
    return [name for name, m in model.named_modules() if isinstance(m, Neuron) and m.v_reset is None]


def starting(model: nn.Module) -> list[str]:
    """The neuron layers that NIR cannot say with any reset: those that start from a potential of their own."""
    return [name for name, m in model.named_modules() if isinstance(m, Neuron) and m.start != (m.v_reset or 0.0)]


def touching(model: nn.Module) -> list[str]:
    """The neuron layers that fire at the threshold, not only above it."""
    return [name for name, m in model.named_modules() if isinstance(m, Neuron) and not m.strict]


def write(student: nn.Module, x: Tensor, path: Path, dt: float = DT, if_as_lif: bool = False) -> None:
    """x: an input such as the file will get, [B, C, H, W] or [T, B, C, H, W]. See `graph`."""
    nir.write(path, graph(student, x, dt, if_as_lif))


def graph(student: nn.Module, x: Tensor, dt: float = DT, if_as_lif: bool = False) -> nir.NIRGraph:
    """The NIR graph of a student.

    dt: seconds of a time step. if_as_lif: write IF neurons as LIF whose tau is so long that float32 sees no leak, for
    programs that read IF otherwise (snnTorch 1.0 does).
    Raises SpecError naming every operation and layer that NIR cannot say.
    """
    if early := starting(student):
        raise SpecError([f"{', '.join(early)}: {STARTS}"])
    if soft := unfit(student):
        raise SpecError([f"{', '.join(soft)}: soft reset, which NIR cannot say; --retrain-for nir makes it hard"])
    folded = fold(student, x)
    frames = torch.zeros(T, B, *x.shape[-3:])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(folded, (frames,), strict=False)
    return _Writer(program, dt, if_as_lif).graph()


class _Writer:
    """Walks the operations of a program and writes a node for each."""

    def __init__(self, program: torch.export.ExportedProgram, dt: float, if_as_lif: bool):
        self.program, self.dt, self.if_as_lif = program, dt, if_as_lif
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []
        self.values: dict[str, Value] = {}
        self.binary: set[str] = set()  # nodes that emit 0 and 1
        self.tensors: dict[str, Tensor] = {}
        self.mistakes: list[str] = []
        self.counts: Counter[str] = Counter()

    def graph(self) -> nir.NIRGraph:
        signature = self.program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        state = {**self.program.state_dict, **self.program.constants}
        constants = signature.inputs_to_lifted_tensor_constants
        out: Any = None
        for n in self.program.graph.nodes:
            if n.op == "placeholder":
                if n.name in held:
                    self.tensors[n.name] = state[held[n.name]].detach()
                elif n.name in constants:
                    self.tensors[n.name] = state[constants[n.name]]
                else:
                    self.nodes["input"] = nir.Input({"input": np.array(self.shape(n))})
                    self.values[n.name] = ["input"]
            elif n.op == "output":
                out = n.args[0][0]
            elif n.op == "call_function":
                self.visit(n)
        if self.mistakes:
            first, *more = dict.fromkeys(self.mistakes)
            others = [m for m in more[:3]] + ([f"and {len(more) - 3} more"] if len(more) > 3 else [])
            raise SpecError([f"NIR cannot say this student: {first}", *others])
        self.nodes["output"] = nir.Output({"output": np.array(self.shape(out))})
        self.link(self.values[out.name], "output")
        return nir.NIRGraph(self.nodes, self.edges, metadata={"dt": self.dt, "written by": "spikedistill"})

    # what a node of the program is

    def where(self, n: torch.fx.Node) -> str:
        """The module that an operation belongs to."""
        stack = list((n.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0] if stack else ""

    def shape(self, n: torch.fx.Node) -> tuple[int, ...]:
        """The shape of a value without time and batch."""
        whole = tuple(n.meta["val"].shape)
        for lead in LEADS:
            if whole[: len(lead)] == lead:
                return whole[len(lead) :]
        self.refuse(n, f"its result {list(whole)} has lost time or batch")
        return whole

    def refuse(self, n: torch.fx.Node, why: str) -> Value:
        self.mistakes.append(f"{self.where(n) or 'the network'} ({self.operation(n)}): {why}")
        return ["input"]

    def operation(self, n: torch.fx.Node) -> str:
        return getattr(n.target, "_opname", str(n.target))

    # writing

    def add(self, name: str, node: nir.NIRNode, sources: Value) -> Value:
        self.counts[name] += 1
        name = name if self.counts[name] == 1 else f"{name}.{self.counts[name]}"
        self.nodes[name] = node
        self.link(sources, name)
        return [name]

    def link(self, sources: Value, target: str) -> None:
        for source in sources:
            if (source, target) in self.edges:
                self.mistakes.append(f"{target}: adds {source} to itself, which NIR cannot say")
            else:
                self.edges.append((source, target))

    def visit(self, n: Any) -> None:
        name = self.operation(n)
        handler = getattr(self, f"do_{name}", None)
        inputs = [a for a in n.args if isinstance(a, torch.fx.Node)]
        if all(a.name not in self.values for a in inputs):
            self.constant(n)
        elif handler:
            self.values[n.name] = handler(n, *n.args)
        elif name in AS_IT_IS:
            self.values[n.name] = self.reshaped(n, n.args[0])
        else:
            why = "there is no such node; spikes can be convolved, pooled, flattened, added and fired"
            self.values[n.name] = self.refuse(n, why)

    def constant(self, n: Any) -> None:
        """Something computed from weights alone."""
        args = [self.tensors[a.name] if isinstance(a, torch.fx.Node) else a for a in n.args]
        self.tensors[n.name] = n.target(*args, **n.kwargs)

    def tensor(self, a: Any) -> Tensor | None:
        return None if a is None else self.tensors[a.name].float()

    def reshaped(self, n: torch.fx.Node, x: torch.fx.Node) -> Value:
        """A view: nothing where only time and batch change, else a Flatten."""
        before, after, value = self.shape(x), self.shape(n), self.values[x.name]
        if before == after:
            return value
        if after == (int(np.prod(before)),):
            shape = {"input": np.array(before)}
            return self.add(f"{self.where(n) or 'net'}.flatten".removeprefix("net."), nir.Flatten(shape, 0, -1), value)
        return self.refuse(n, f"it makes {list(after)} out of {list(before)}, which is not flat")

    def do_conv2d(self, n, x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> Value:
        w, b = self.tensor(weight), self.tensor(bias)
        assert w is not None
        shape: Any = tuple(self.shape(x)[1:])
        if isinstance(padding, str):
            return self.refuse(n, f"padding '{padding}'")
        where: Any = [tuple(int(v) for v in (p if len(p) == 2 else p * 2)) for p in (stride, padding, dilation)]
        b = torch.zeros(len(w)) if b is None else b
        node = nir.Conv2d(shape, w.numpy(), where[0], where[1], where[2], groups, b.numpy())
        node.input_type = {"input": np.array(self.shape(x))}  # nir takes it from the weights, wrong for groups
        return self.add(self.where(n), node, self.values[x.name])

    def do_linear(self, n, x, weight, bias=None) -> Value:
        w, b = self.tensor(weight), self.tensor(bias)
        assert w is not None
        if len(self.shape(x)) != 1:
            return self.refuse(n, f"a linear layer on {list(self.shape(x))}, which is not flat")
        return self.affine(n, w, b, x)

    def affine(self, n, w: Tensor, b: Tensor | None, x) -> Value:
        node = nir.Linear(w.numpy()) if b is None else nir.Affine(w.numpy(), b.numpy())
        return self.add(self.where(n), node, self.values[x.name])

    def do_neuron(self, n, x, mean, var, weight, bias, decay, gain, *rest) -> Value:
        _, _, fixed_decay, fixed_gain, v_th, v_reset, strict, *_ = rest
        if mean is not None:
            return self.refuse(n, "its norm could not be folded")
        decay = fixed_decay if decay is None else float(self.tensors[decay.name])
        gain = fixed_gain if gain is None else float(self.tensors[gain.name])
        return self.fire(self.where(n), self.shape(n), decay, gain, v_th, v_reset, strict, self.values[x.name])

    def fire(self, name: str, shape, decay: float, gain: float, v_th: float, v_reset: float, strict, x: Value) -> Value:
        """A layer of neurons."""
        as_if = decay == 1.0 and gain == 1.0 and not self.if_as_lif
        if as_if:  # it starts at 0
            v_th, v_reset = v_th - v_reset, 0.0
        threshold = np.float32(v_th)
        if not strict:  # h >= v_th is h > the float below it
            threshold = np.nextafter(threshold, np.float32(-np.inf))

        def full(value: Any) -> np.ndarray:
            return np.full(shape, value, np.float32)

        reset = full(v_reset)
        if as_if:
            node = nir.IF(r=full(1.0), v_threshold=full(threshold), v_reset=reset)
        else:
            # without a leak: 1 - dt / tau is 1 in float32
            tau = self.dt / (1 - decay) if decay < 1 else self.dt * 1e10
            node = nir.LIF(full(tau), full(gain * tau / self.dt), reset.copy(), full(threshold), reset)
        (made,) = self.add(name, node, x)
        self.binary.add(made)
        return [made]

    def do_max_pool2d(self, n, x, kernel, stride=(), padding=(0, 0), dilation=(1, 1), ceil=False) -> Value:
        """1 where any of the spikes is: their mean is above half of one spike's share."""
        sources = self.values[x.name]
        if len(sources) > 1 or sources[0] not in self.binary:
            return self.refuse(n, "the maximum of what is not spikes (max pools are written for 0 and 1 only)")
        if ceil or tuple(dilation) != (1, 1):
            return self.refuse(n, "a max pool with ceil_mode or dilation")
        pooled = self.pool(n, x, kernel, stride, padding)
        memoryless = dict(decay=0.0, gain=1.0, v_th=0.5 / np.prod(pair(kernel)), v_reset=0.0, strict=True)
        return self.fire(f"{self.where(n)}.any", self.shape(n), **memoryless, x=pooled)

    def do_avg_pool2d(self, n, x, kernel, stride=(), padding=(0, 0), ceil=False, count_pad=True, divisor=None) -> Value:
        if ceil or divisor is not None or (not count_pad and any(padding)):
            return self.refuse(n, "an average pool with ceil_mode, a divisor, or edges counted apart")
        return self.pool(n, x, kernel, stride, padding)

    def pool(self, n, x, kernel, stride, padding) -> Value:
        how = [np.array(pair(v)) for v in (kernel, stride or kernel, padding)]
        node = nir.AvgPool2d(*how)
        node.input_type = {"input": np.array(self.shape(x))}
        node.output_type = {"output": np.array(self.shape(n))}
        return self.add(self.where(n) or "pool", node, self.values[x.name])

    def do_mean(self, n, x, dims=None, keep=False, **_) -> Value:
        before, after = self.shape(x), self.shape(n)
        whole = [d % len(x.meta["val"].shape) for d in dims or ()]
        last = len(x.meta["val"].shape) - 1
        if len(before) == 3 and sorted(whole) == [last - 1, last]:
            node = nir.AvgPool2d(*(np.array(v) for v in (before[1:], before[1:], (0, 0))))
            node.input_type = {"input": np.array(before)}
            node.output_type = {"output": np.array([before[0], 1, 1])}
            mean = self.add(f"{self.where(n)}.mean".lstrip("."), node, self.values[x.name])
            if keep:
                return mean
            flat = nir.Flatten({"input": np.array([before[0], 1, 1])}, 0, -1)
            return self.add(f"{self.where(n)}.flatten".lstrip("."), flat, mean)
        if len(before) == 2 and whole == [last] and len(after) == 1 and not keep:  # Vote: groups of neighbours
            w = torch.eye(before[0]).repeat_interleave(before[1], 1) / before[1]
            return self.affine(n, w, None, x)
        return self.refuse(n, f"a mean of {list(before)} over other than height and width")

    def do_unflatten(self, n, x, *_) -> Value:
        """Into groups that a mean over them will undo: the order in memory is the same."""
        before, after = self.shape(x), self.shape(n)
        if before != after and len(before) == 1 and all(user.target is torch.ops.aten.mean.dim for user in n.users):
            return self.values[x.name]
        return self.reshaped(n, x)

    def do_add(self, n, a, b, alpha=1) -> Value:
        if not all(isinstance(v, torch.fx.Node) and v.name in self.values for v in (a, b)) or alpha != 1:
            return self.channelwise(n, a, b, lambda x, c: x + c)
        if self.shape(a) != self.shape(b):
            return self.refuse(n, f"a sum of {list(self.shape(a))} and {list(self.shape(b))}")
        return self.values[a.name] + self.values[b.name]

    def do_sub(self, n, a, b, alpha=1) -> Value:
        return self.channelwise(n, a, b, lambda x, c: x - c)

    def do_rsub(self, n, a, b, alpha=1) -> Value:
        return self.channelwise(n, a, b, lambda x, c: c - alpha * x)

    def do_div(self, n, a, b) -> Value:
        return self.channelwise(n, a, b, lambda x, c: x / c)

    def do_mul(self, n, a, b) -> Value:
        if all(isinstance(v, torch.fx.Node) and v.name in self.values for v in (a, b)):
            why = "spikes are multiplied, and there is no node for it (join blocks by connect='add')"
            return self.refuse(n, why)
        return self.channelwise(n, a, b, lambda x, c: x * c)

    def channelwise(self, n, a, b, function: Callable[[Tensor, Tensor], Tensor]) -> Value:
        """x + c, x - c, x c or x / c with a number for each channel, or for all: a 1x1 convolution."""
        if not (isinstance(a, torch.fx.Node) and a.name in self.values):
            a, b = b, a
            if self.operation(n) in ("sub", "div"):
                return self.refuse(n, "a constant minus or over spikes")
        if isinstance(b, torch.fx.Node) and b.name in self.values:
            return self.refuse(n, "a difference or ratio of two signals")
        shape = self.shape(a)
        c = self.tensors[b.name].double() if isinstance(b, torch.fx.Node) else torch.tensor(float(b)).double()
        if len(shape) != 3 or c.numel() not in (1, shape[0]):
            return self.refuse(n, f"{list(c.shape)} numbers on {list(shape)}: only one for each channel can be written")
        c = c.flatten().expand(shape[0])
        bias = function(torch.zeros(shape[0]).double(), c)
        scale = function(torch.ones(shape[0]).double(), c) - bias
        weight, space = torch.diag(scale).float()[:, :, None, None].numpy(), (shape[1], shape[2])
        node = nir.Conv2d(space, weight, (1, 1), (0, 0), (1, 1), 1, bias.float().numpy())
        return self.add(self.where(n) or self.operation(n), node, self.values[a.name])
