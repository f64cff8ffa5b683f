"""What a model returned, time first. An ANN is a spiking network with T = 1, and T = 1 broadcasts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Output:
    """logits [T, B, C] and the taps asked for, name -> [T, B, ...]."""

    logits: Tensor
    taps: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, t: slice) -> "Output":
        """A slice of time. What has T = 1 while the logits have more is the same at every step and stays.

        Raises ValueError where the slice begins after the last step.
        """
        steps = len(self.logits)
        if steps == 1:
            return self
        if t.start is not None and t.start >= steps:
            raise ValueError(f"there is no time step {t.start + 1}, the output has {steps}")
        return Output(self.logits[t], {k: x[t] if len(x) == steps else x for k, x in self.taps.items()})


def rate(x: Tensor) -> Tensor:
    """[T, B, ...] -> [B, ...]: the mean over time, in memory in the order of x, which `x.mean(0)` would change."""
    if len(x) == 1:
        return x[0]
    order = sorted(range(1, x.ndim), key=x.stride, reverse=True)
    back = [order.index(d) for d in range(1, x.ndim)]
    return x.permute(0, *order).mean(0).permute(back)
