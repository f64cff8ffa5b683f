"""Images as spikes over time, for networks that are to read spikes from their first layer on.

    direct      the image itself at every step; the first layer of the network makes spikes of it
    bernoulli   x[t] = 1 with probability x, else 0: rate coding, at most one spike a step
    poisson     x[t] ~ Poisson(x): a Poisson process of rate x a step, counted; bright pixels send two or more

The draw is part of the batch: every pass of a step, teacher or student, reads the same spikes. It is a function of the
seed, the epoch and the batch, as augmentation is, so training resumes to the bit and evaluation always sees one draw.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batches import Augment, DataError
from .splits import Data, Split

ENCODINGS = ("direct", "bernoulli", "poisson")


def spikes(x: Tensor, steps: int, kind: str, draws: torch.Generator) -> Tensor:  # [B,C,H,W] in [0,1] -> [T,B,C,H,W]
    """Spikes of mean x at each of T = `steps` steps, drawn independently. kind: bernoulli or poisson."""
    if kind == "poisson":
        return torch.poisson(x.cpu().expand(steps, *x.shape), draws).to(x.device)
    return (torch.rand(steps, *x.shape, generator=draws).to(x.device) < x).to(x.dtype)


@dataclass(frozen=True)
class Encode:
    """The last change of a batch: images [B,C,H,W], augmented by `first`, to spikes [B,T,C,H,W]."""

    steps: int
    kind: str
    first: Augment | None = None

    def __call__(self, x: Tensor, draws: torch.Generator) -> Tensor:
        x = x if self.first is None else self.first(x, draws)
        return spikes(x, self.steps, self.kind, draws).transpose(0, 1)


def encoded(data: Data, kind: str, steps: int) -> Data:
    """Data of images as data of spikes over `steps` steps, in every split. Spikes are not normalised: mean 0, std 1.

    Raises DataError for an encoding that there is not, and for data that have frames already.
    """
    if kind not in ENCODINGS:
        raise DataError(f"no encoding {kind!r}; valid: {', '.join(ENCODINGS)}")
    if kind == "direct":
        return data
    if data.steps is not None:
        raise DataError(f"{data.name} has frames over time already: only images are encoded")

    def part(split: Split) -> Split:
        return replace(split, augment=Encode(steps, kind, split.augment))

    channels = data.shape[0]
    return replace(
        data,
        train=part(data.train),
        valid=None if data.valid is None else part(data.valid),
        test=part(data.test),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        augment=f"{data.augment}|{kind}" if data.augment != "none" else kind,
        steps=steps,
    )
