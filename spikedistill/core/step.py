"""One training step as a table: passes of models over streams of the batch, and what objectives may look at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn

from spikedistill.core.output import Output

Batch = dict[str, Tensor]


def samples(batch: Batch) -> int:
    """How many there are: "x" is [B, ...], or frames [T, B, C, H, W]."""
    return batch["x"].shape[1] if batch["x"].ndim == 5 else len(batch["x"])


class Infer(Protocol):
    """What keeps outputs, such as `spikedistill.cache.Cache`: its `infer` is that of core/taps.py, to the bit."""

    def infer(self, model: nn.Module, x: Tensor, steps: int | None, taps: Sequence[str]) -> Output: ...


@dataclass(frozen=True)
class Pass:
    """A forward pass to make in every step.

    model: any module that gives logits.  x: the stream of the batch that it reads.
    steps: T where the input is static; None for the model's own.
    grad: True trains the model; False runs it in evaluation mode without a graph.
    cache: keeps the outputs of a pass without grad, between steps, epochs and runs.
    """

    model: nn.Module
    x: str = "x"
    steps: int | None = None
    grad: bool = False
    cache: Infer | None = None


@dataclass(frozen=True)
class Step:
    """Everything that an objective may look at: the batch, the output of every pass, and progress in [0, 1]."""

    batch: Batch
    passes: Mapping[str, Output]
    progress: float = 0.0

    def __getitem__(self, name: str) -> Output:
        if name not in self.passes:
            raise KeyError(f"no pass '{name}' in this step: there are {', '.join(self.passes)}")
        return self.passes[name]

    @property
    def student(self) -> Output:
        return self["student"]

    @property
    def teacher(self) -> Output:
        return self["teacher"]

    def at(self, t: slice) -> "Step":
        """A slice of time of every pass (those with T = 1 stay whole)."""
        return replace(self, passes=Sliced(self.passes, t))


@dataclass(frozen=True)
class Sliced(Mapping[str, Output]):
    """Outputs at some time steps, each cut when it is looked at: a pass that nobody looks at need not run."""

    whole: Mapping[str, Output]
    t: slice

    def __getitem__(self, name: str) -> Output:
        return self.whole[name].at(self.t)

    def __contains__(self, name: object) -> bool:
        return name in self.whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)


Objective = Callable[[Step], Tensor]
"""Any function of a Step to a scalar; an nn.Module where it owns weights or hyperparameters.

`.taps`, where it has them, say what it needs: {"student": ["stage3"], "teacher": ["layer3"]}.
"""
