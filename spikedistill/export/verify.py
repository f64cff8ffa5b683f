"""Does what was written compute what the student computes? Every spike and logit, on real samples.

Two programs round differently, so a potential that lies on the threshold to within rounding may fire in one and not in
the other, and everything after it in that sample may follow. That is told apart from a fault by where it begins: in
each sample, the first layer and time step at which spikes differ. There the student's potential must be within NEAR of
the threshold; otherwise the file computes something else, and the layer and step are named.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spikedistill.core.taps import infer
from spikedistill.neurons import Neuron

NEAR = 1e-4
"""Of potentials, relative to the threshold: what rounding moves in float32 sums of a few thousand terms."""
ASTRAY = 0.01
"""Share of spikes that rounding may change. More is a fault that the samples cannot locate."""


class Mismatch(RuntimeError):
    """What was written does not compute what the student does. The message says where it begins."""


@dataclass
class Trace:
    """logits [T, B, classes], and the spikes of each neuron layer, [T, B, ...] (in any shape of as many elements)."""

    logits: Tensor
    spikes: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Layer:
    """Of one neuron layer: how many spikes the student fired, and at how many sites the file differs."""

    spikes: float = 0.0
    differ: int = 0
    sites: int = 0

    @property
    def agreement(self) -> float:
        return 1 - self.differ / self.sites if self.sites else 1.0


@dataclass
class Comparison:
    """What a check found. `fault` is None where the file computes what the student does."""

    reader: str
    samples: int = 0
    layers: dict[str, Layer] = field(default_factory=dict)
    exact: int = 0  # samples in which every spike is the same
    logits: float = 0.0  # largest difference over the samples whose spikes are the same
    before: int = 0  # right answers of the student
    after: int = 0  # and of the file
    fault: str | None = None
    folded: "Comparison | None" = None  # the same against the student with its norms folded

    def lines(self) -> list[str]:
        """The figures, a line each."""
        out = [f"{self.reader}: {self.samples} samples"]
        width = max(map(len, self.layers), default=0)
        out += [
            f"  spikes {name:{width}}  {layer.agreement:.4%} equal ({layer.differ} of {layer.sites} differ)"
            for name, layer in self.layers.items()
        ]
        out.append(f"  samples with every spike equal: {self.exact} of {self.samples}")
        out.append(f"  logits differ by at most {self.logits:.2g} in those")
        if self.samples:
            out.append(f"  accuracy {self.before / self.samples:.2%} before, {self.after / self.samples:.2%} after")
        if self.folded:
            exact, logits = self.folded.exact, self.folded.logits
            out.append(
                f"  with the student's norms folded too: {exact} equal in every spike, logits within {logits:.2g}"
            )
        return out + ([f"  MISMATCH: {self.fault}"] if self.fault else [])


def reference(model: nn.Module, x: Tensor, steps: int | None = None) -> tuple[Trace, dict[str, Tensor]]:
    """The student's own trace, and the currents into each neuron layer, in the order in which they fire."""
    neurons = {name: m for name, m in model.named_modules() if isinstance(m, Neuron)}
    currents: dict[str, Tensor] = {}
    spikes: dict[str, Tensor] = {}

    def fired(name: str) -> Callable:
        def hook(module, args, out):
            currents[name], spikes[name] = args[0], out

        return hook

    hooks = [m.register_forward_hook(fired(name)) for name, m in neurons.items()]
    try:
        logits = infer(model, x, steps).logits
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(logits, spikes), currents


@torch.no_grad()
def potentials(neuron: Neuron, x: Tensor, steps: int) -> Tensor:
    """H of every step, before the reset, [T, B, ...], from currents [T or 1, B, ...]."""
    decay, gain = (float(torch.as_tensor(c).detach()) for c in neuron.coefficients())
    rest, v, out = neuron.v_reset or 0.0, torch.full_like(x[0], neuron.start), []
    for t in range(steps):
        h = decay * v + gain * x[t if len(x) > 1 else 0] + (1 - decay) * rest
        s = (h > neuron.v_th if neuron.strict else h >= neuron.v_th).to(h.dtype)
        v = h - neuron.v_th * s if neuron.v_reset is None else h * (1 - s) + rest * s
        out.append(h)
    return torch.stack(out)


def check(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    read: Callable[[Tensor], Trace],
    reader: str,
    tolerance: float = 1e-4,
    folded: nn.Module | None = None,
) -> Comparison:
    """Compare a reader of the written file with the student it was made from.

    batches: {"x", "y"}, with as many time steps as were written.  read: x -> Trace, its spikes named as the student's
    layers.  tolerance: of logits, relative to the largest.  folded: the student as `fold` left it, to be compared in
    the same pass: where only the unfolded one differs, folding rounded.  Stops at the first fault.
    """
    found = Comparison(reader, folded=Comparison(reader) if folded else None)
    for batch in batches:
        got = read(batch["x"])
        for net, of in ((model, found), (folded, found.folded)):
            if net is not None and of is not None:
                add(of, net, got, batch, tolerance)
        if found.fault:
            return found
    if found.samples and not found.exact:  # then nothing was said of the logits: the folded student may
        beside = found.folded or found
        why = None if beside.exact else "no sample has every spike equal, so no logits could be compared: give more"
        found.fault = beside.fault or why
    for name, layer in found.layers.items():
        if layer.differ > ASTRAY * max(layer.spikes, 1.0):
            share = layer.differ / max(layer.spikes, 1.0)
            found.fault = f"layer {name}: {share:.2%} as many spikes differ as it fires, more than rounding explains"
            break
    return found


def add(found: Comparison, model: nn.Module, got: Trace, batch: dict[str, Tensor], tolerance: float) -> None:
    """Add a batch to `found`."""
    y = batch["y"]
    want, currents = reference(model, batch["x"])
    found.fault = compare(model, want, got, currents, found, tolerance) or found.fault
    found.samples += len(y)
    found.before += int((want.logits.mean(0).argmax(-1) == y).sum())
    if got.logits.shape == want.logits.shape:
        found.after += int((got.logits.mean(0).argmax(-1) == y).sum())


def compare(
    model: nn.Module, want: Trace, got: Trace, currents: dict[str, Tensor], found: Comparison, tolerance: float
) -> str | None:
    """Count the spikes and logits of a batch in `found`; the fault where there is one."""
    if got.logits.shape != want.logits.shape:
        return f"logits are {list(got.logits.shape)}, the student's {list(want.logits.shape)}"
    if lacking := [name for name in want.spikes if name not in got.spikes]:
        return f"layer {lacking[0]} is not in the file"
    batch = want.logits.shape[1]
    open_ = torch.ones(batch, dtype=torch.bool)  # samples in which nothing has differed so far
    fault = None
    for name, spikes in want.spikes.items():
        a, b = spikes.float().reshape(len(spikes), batch, -1), got.spikes[name].float()
        if b.numel() != a.numel():
            return f"layer {name}: {list(b.shape)} spikes, the student has {list(spikes.shape)}"
        differ = a != b.reshape(a.shape)
        layer = found.layers.setdefault(name, Layer())
        layer.spikes += float(a.sum())
        layer.differ += int(differ.sum())
        layer.sites += a.numel()
        hit = differ.any(-1)  # [T, B]
        fresh = hit.any(0) & open_
        if fault is None and fresh.any():
            neuron = model.get_submodule(name)
            assert isinstance(neuron, Neuron)
            away = (potentials(neuron, currents[name].float(), len(spikes)) - neuron.v_th).abs().reshape(a.shape)
            first = hit & (hit.cumsum(0) == 1)  # the first step of each sample
            worst = torch.where(first[..., None] & differ & fresh[:, None], away, torch.zeros(())).amax(-1)
            wrong = worst > NEAR * max(1.0, abs(neuron.v_th))
            if wrong.any():
                t = int(wrong.any(1).int().argmax())
                i = int(worst[t].argmax())
                fault = (
                    f"it begins in layer {name} at time step {t + 1}: sample {found.samples + i} has other spikes "
                    f"where the potential is {worst[t, i]:.3g} away from the threshold"
                )
        open_ &= ~hit.any(0)
    found.exact += int(open_.sum())
    if fault is None and open_.any():
        gap = (want.logits - got.logits).abs()[:, open_].amax(-1).amax(-1)  # [T]
        found.logits = max(found.logits, float(gap.max()))
        wrong = gap > tolerance * max(1.0, float(want.logits.abs().max()))
        if wrong.any():
            t = int(wrong.int().argmax())
            fault = f"it begins in the logits at time step {t + 1}: {gap[t]:.3g} away although all spikes are equal"
    return fault
