"""Energy of an inference, estimated from counted operations: with arithmetic alone, and with the memory it needs.

Arithmetic alone is the usual figure: a multiply-add 4.6 pJ, an addition 0.9 pJ (32-bit floats, 45 nm). It flatters a
spiking network, because memory costs more than arithmetic and because an ANN would be quantised before it is deployed.
So there are two more things here: a model with memory traffic, and the ANN of the student's own shape in 8 and 4 bits.

Constants: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, fig. 1.1.9 (45 nm,
0.9 V), https://doi.org/10.1109/ISSCC.2014.6757323. The traffic counts the kinds of access of E. Lemaire et al., "An
analytical estimation of spiking neural networks energy efficiency", ICONIP 2022, https://arxiv.org/abs/2210.13107,
with simpler assumptions, which are ours:
  every layer has a memory for weights, one for its input and one for its state, each as large as what it holds;
  nothing is reused between two accesses, save that a dense layer keeps the sum of an output in a register;
  a multiply-add reads a weight and an input, and an output is written once;
  an addition by an event reads a weight, and reads and writes the potential it adds to;
  a neuron, at every step, reads and writes its potential and costs a multiply-add (leak, threshold, reset), of 32 bits
  whatever the weights have, as its potential has; one behind a closed gate is left out;
  an activation that another is multiplied with (attention) is read as weights are, from a memory of its size;
  a spike is written and read once as an address of 16 bits.
A layer of multiply-adds is counted densely, zeros too, in student and ANN alike; a static image meets it once. An ANN
that was measured on T frames is charged for all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from typing import Any


@dataclass(frozen=True)
class Arithmetic:
    """pJ of a multiply-add, an addition, a neuron's update; bytes of a weight, an activation and a potential."""

    name: str
    mac: float
    ac: float
    weight: float
    activation: float
    update: float = 3.1 + 0.1  # a multiply-add of integers of 32 bits
    state: float = 4.0


FP32 = Arithmetic("float32", mac=3.7 + 0.9, ac=0.9, weight=4, activation=4, update=3.7 + 0.9)
INT8 = Arithmetic("int8", mac=0.2 + 0.1, ac=0.1, weight=1, activation=1)  # 8-bit multiplier, 32-bit adder
INT4 = Arithmetic("int4", mac=0.05 + 0.1, ac=0.1, weight=0.5, activation=0.5)
"""Not in the source: a multiplier of half the width is taken as a quarter of it."""

SRAM = ((8 * 2**10, 10.0), (32 * 2**10, 20.0), (2**20, 100.0))  # bytes, pJ of an access of 64 bits
ADDRESS = 2.0  # bytes of a spike's address


def access(size: float) -> float:
    """pJ a byte of a memory of `size` bytes: between the published sizes, and beyond 1 MiB, straight in logarithms."""
    size = max(size, SRAM[0][0])
    (a, low), (b, high) = SRAM[:2] if size <= SRAM[1][0] else SRAM[1:]
    slope = log(high / low) / log(b / a)
    return low * exp(slope * log(size / a)) / 8


def spiking(activity: Mapping[str, Any], p: Arithmetic = FP32) -> dict[str, float]:
    """pJ a sample of a network as measured by `activity`: {"compute", "neurons", "memory"}.

    "compute" is arithmetic of the synapses alone; "neurons", the arithmetic of neurons, belongs to the model with
    memory.
    """
    compute = memory = neurons = 0.0
    for layer in activity["synapses"].values():
        weights, outputs = held(layer) * p.weight, layer["outputs"] / activity["steps"]
        if layer["kind"] == "ac":
            compute += layer["operations"] * p.ac
            memory += layer["operations"] * (p.weight * access(weights) + 2 * p.state * access(outputs * p.state))
        else:
            compute += layer["dense"] * p.mac
            memory += dense_traffic(layer, layer["dense"], layer["outputs"], p)
    for layer in activity["layers"].values():
        alive = layer.get("open", layer["neurons"])
        neurons += alive * activity["steps"] * p.update
        memory += 2 * alive * activity["steps"] * p.state * access(alive * p.state)
        spikes = layer["neurons"] * activity["steps"] * layer["rate"]
        memory += 2 * spikes * ADDRESS * access(alive * ADDRESS)
    return {"compute": compute, "neurons": neurons, "memory": memory}


def ann(activity: Mapping[str, Any], p: Arithmetic = FP32, of: str = "once") -> dict[str, float]:
    """pJ a sample of the network's shape run densely as an ANN: for one time step, or (dense) for all that it ran."""
    compute = memory = 0.0
    for layer in activity["synapses"].values():
        compute += layer[of] * p.mac
        memory += dense_traffic(layer, layer[of], layer["outputs"] * (layer[of] / layer["dense"]), p)
    return {"compute": compute, "neurons": 0.0, "memory": memory}


def held(layer: Mapping[str, Any]) -> float:
    """Values of what the inputs of a layer are multiplied with."""
    return layer.get("operand") or layer["weights"]


def dense_traffic(layer: Mapping[str, Any], macs: float, outputs: float, p: Arithmetic) -> float:
    """pJ of the memory of a dense layer: a weight and an input a multiply-add, and every output once.

    Memories hold a time step.
    """
    share = layer["once"] / layer["dense"]
    read = p.weight * access(held(layer) * p.weight)
    read += p.activation * access(layer["inputs"] * share * p.activation)
    return macs * read + outputs * p.activation * access(layer["outputs"] * share * p.activation)


def table(student: Mapping[str, Any], teacher: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Rows {"name", "precision", "compute", "memory", "total", "operations"}: nJ a sample, million operations.

    "compute" is synaptic arithmetic alone, "total" the model with memory traffic. The student as measured; the teacher;
    and the ANN of the student's shape in float32, int8 and int4, whose accuracy is another question (that of the
    ReLU twin, less what quantisation costs it). An image meets that ANN once. On T frames it stands there twice: it
    sees every frame, as the twin does, or their sum (whose few additions are left out). Frames that encode an image
    cannot be told from recordings. A network with neurons of another library has no row.
    """
    spikes, shape = bool(student["layers"]) or not counted(student), "ANN of the student's shape"
    networks: list[tuple[str, Mapping[str, Any], str | None, Arithmetic]] = []
    networks += [("student", student, None if spikes else "dense", p) for p in (FP32, INT8) if counted(student)]
    if teacher and counted(teacher):
        networks.append(("teacher", teacher, None if teacher["layers"] else "dense", FP32))
    if spikes and student.get("frames", 1) > 1:
        networks += [(f"{shape}, every frame", student, "dense", p) for p in (FP32, INT8, INT4)]
        shape += ", frames summed"
    networks += [(shape, student, "once", p) for p in (FP32, INT8, INT4)] if spikes else []
    rows = []
    for name, measured, of, p in networks:
        e = ann(measured, p, of) if of else spiking(measured, p)
        layers = measured["synapses"].values()
        operations = sum(layer[of or ("operations" if layer["kind"] == "ac" else "dense")] for layer in layers)
        rows.append(
            {
                "name": name,
                "precision": p.name,
                "operations": operations / 1e6,
                "compute": e["compute"] / 1e3,
                "memory": e["memory"] / 1e3,
                "total": sum(e.values()) / 1e3,
            }
        )
    return rows


def counted(measured: Mapping[str, Any]) -> bool:
    """Whether the spikes of a network were counted: those of another library's neurons are not."""
    return not measured.get("foreign")


def per_sample(measured: Mapping[str, Any]) -> dict[str, float] | None:
    """nJ a sample in float32: {"compute": arithmetic of the synapses, "total": with neurons and memory}; None for
    neurons of another library, and for measurements of an earlier version, which did not keep the layers.
    """
    if "synapses" not in measured or not counted(measured):
        return None
    e = spiking(measured) if measured["layers"] else ann(measured, of="dense")
    return {"compute": e["compute"] / 1e3, "total": sum(e.values()) / 1e3}
