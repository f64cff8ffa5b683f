"""Augmentations of a batch of images or event frames, written `"flip|shift(2)"` and applied from left to right.

Each takes x, float [B,C,H,W] in [0,1] (or [B,T,C,H,W]: the same draw for all T), and a CPU generator; it draws once
per sample and returns a new tensor of the same shape. Draws are made on the CPU, so they do not depend on the device.
`repr` gives the text back that `parse` reads.

On frames [B,T,C,H,W] of events the values are counts: all but jitter take them. drop_time, drop_events and noise are
for them alone; drop_time, drop_area and drop_events are after Gu et al. 2021, EventDrop, arXiv 2106.05836.
"""

import ast
import difflib
import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .batches import Augment, DataError


def _in(low: float, high: float, default: Any = MISSING) -> Any:  # a parameter and its valid range
    return field(default=default, metadata={"range": (low, high)})


def _range(f: Field) -> str:
    low, high = f.metadata["range"]
    return f"{f.name} is {'a whole number' if f.type is int else 'a number'} from {low} to {high}"


def _usage(word: str) -> str:
    return f"{word}({', '.join(f.name for f in fields(WORDS[word]))})"


@dataclass(frozen=True, repr=False)
class _Word:
    """What the augmentations share: their arguments are checked, and they print as they are written."""

    takes: ClassVar[str] = "images and events"

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), f.metadata["range"]
            number = isinstance(value, int if f.type is int else int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise DataError(f"{_usage(type(self).__name__)}: {_range(f)}, not {value!r}")

    def __repr__(self) -> str:
        values = [(getattr(self, f.name), f.default) for f in fields(self)]
        plain = all(value == default for value, default in values)
        return type(self).__name__ + ("" if plain else f"({', '.join(repr(value) for value, _ in values)})")


def _uniform(x: Tensor, generator: Generator, low: float, high: float) -> Tensor:  # [B,C,..] -> [B]
    return (torch.rand(len(x), generator=generator) * (high - low) + low).to(x.device)


def _each(draw: Tensor, x: Tensor) -> Tensor:  # [B] -> [B,1,..,1]
    return draw.view(-1, *[1] * (x.dim() - 1))


def _fits(word: _Word, pixels: int, x: Tensor) -> None:
    if pixels >= min(x.shape[-2:]):
        raise DataError(f"{word!r} is too large for images of {x.shape[-2]}x{x.shape[-1]} pixels")


@dataclass(frozen=True, repr=False)
class flip(_Word):
    """Left and right swapped, with probability p."""

    p: float = _in(0, 1, 0.5)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        return torch.where(_each(_uniform(x, generator, 0, 1) < self.p, x), x.flip(-1), x)


@dataclass(frozen=True, repr=False)
class shift(_Word):
    """Moved by a whole number of pixels from -pixels to pixels both ways, zeros moving in: padding and random crop."""

    pixels: int = _in(0, 64)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        _fits(self, self.pixels, x)
        p, (high, wide) = self.pixels, x.shape[-2:]
        by = torch.randint(0, 2 * p + 1, (2, len(x), 1), generator=generator).to(x.device)
        rows, cols = by[0] + torch.arange(high, device=x.device), by[1] + torch.arange(wide, device=x.device)
        # [B,H,W,..]: the gathered pixels keep their channels together, which is channels_last
        pixels = F.pad(x, (p, p, p, p)).movedim((-2, -1), (1, 2))
        sample = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        return pixels[sample, rows[:, :, None], cols[:, None, :]].movedim((1, 2), (-2, -1))


@dataclass(frozen=True, repr=False)
class roll(_Word):
    """Moved as by `shift`, but what leaves on one side comes in on the other."""

    pixels: int = _in(0, 64)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        _fits(self, self.pixels, x)
        high, wide = x.shape[-2:]
        by = torch.randint(-self.pixels, self.pixels + 1, (2, len(x), 1), generator=generator).to(x.device)
        rows = (torch.arange(high, device=x.device) - by[0]) % high
        cols = (torch.arange(wide, device=x.device) - by[1]) % wide
        sample = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        pixels = x.movedim((-2, -1), (1, 2))
        return pixels[sample, rows[:, :, None], cols[:, None, :]].movedim((1, 2), (-2, -1))


@dataclass(frozen=True, repr=False)
class cutout(_Word):
    """A black square of size pixels, centred anywhere in the image (DeVries, Taylor 2017, arXiv 1708.04552)."""

    size: int = _in(1, 512)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        _fits(self, self.size, x)
        high, wide = x.shape[-2:]
        top = _uniform(x, generator, 0, high).floor() - self.size // 2
        left = _uniform(x, generator, 0, wide).floor() - self.size // 2
        return _holed(x, top, left, torch.full_like(top, self.size), torch.full_like(left, self.size))


def _holed(x: Tensor, top: Tensor, left: Tensor, high: Tensor, wide: Tensor) -> Tensor:
    """x with a rectangle of each sample zeroed, the same in all channels and steps. The rest are [B], in pixels."""
    rows, cols = torch.arange(x.shape[-2], device=x.device), torch.arange(x.shape[-1], device=x.device)
    in_rows = (rows >= top[:, None]) & (rows < (top + high)[:, None])  # [B,H]
    in_cols = (cols >= left[:, None]) & (cols < (left + wide)[:, None])
    hole = in_rows[:, :, None] & in_cols[:, None, :]
    return x.masked_fill(hole.view(len(x), *[1] * (x.dim() - 3), *x.shape[-2:]), 0)


@dataclass(frozen=True, repr=False)
class drop_area(_Word):
    """A rectangle anywhere is emptied, shaped as the image; its part of the area is drawn from 0 to share."""

    share: float = _in(0, 1, 0.3)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        side = _uniform(x, generator, 0, self.share).sqrt()
        high, wide = ((side * pixels).round() for pixels in x.shape[-2:])
        top = (_uniform(x, generator, 0, 1) * (x.shape[-2] - high + 1)).floor()
        left = (_uniform(x, generator, 0, 1) * (x.shape[-1] - wide + 1)).floor()
        return _holed(x, top, left, high, wide)


@dataclass(frozen=True, repr=False)
class rotate(_Word):
    """Turned about the centre by an angle from -degrees to degrees, bilinear, zeros turning in."""

    degrees: float = _in(0, 180)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        angle = _uniform(x, generator, -self.degrees, self.degrees) * (math.pi / 180)
        cos, sin, zero, (high, wide) = angle.cos(), angle.sin(), torch.zeros_like(angle), x.shape[-2:]
        theta = torch.stack([cos, -sin * high / wide, zero, sin * wide / high, cos, zero], 1).view(-1, 2, 3)
        flat = x.flatten(1, -3)
        grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
        return F.grid_sample(flat, grid.to(x.dtype), align_corners=False).view(x.shape)


@dataclass(frozen=True, repr=False)
class jitter(_Word):
    """Contrast about the image's mean, then brightness, each times a factor from 1-strength to 1+strength."""

    takes: ClassVar[str] = "images"
    strength: float = _in(0, 1)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        low, high = 1 - self.strength, 1 + self.strength
        contrast = _each(_uniform(x, generator, low, high), x)
        brightness = _each(_uniform(x, generator, low, high), x)
        mean = _each(x.flatten(1).mean(1), x)
        return ((mean + (x - mean) * contrast) * brightness).clamp(0, 1)


def _frames(word: _Word, x: Tensor) -> None:
    if x.dim() != 5:
        raise DataError(f"{word!r} is for frames of events [B,T,C,H,W], not for {list(x.shape)}")


@dataclass(frozen=True, repr=False)
class drop_time(_Word):
    """Frames in a row are emptied, anywhere in time; their part of all T is drawn from 0 to share, then rounded."""

    takes: ClassVar[str] = "events"
    share: float = _in(0, 1, 0.5)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        _frames(self, x)
        steps = x.shape[1]
        length = (_uniform(x, generator, 0, self.share) * steps).round()
        start = (_uniform(x, generator, 0, 1) * (steps - length + 1)).floor()
        at = torch.arange(steps, device=x.device)
        empty = (at >= start[:, None]) & (at < (start + length)[:, None])  # [B,T]
        return x.masked_fill(empty.view(*empty.shape, 1, 1, 1), 0)


@dataclass(frozen=True, repr=False)
class drop_events(_Word):
    """Events are lost, those of a cell (pixel, polarity, step) together, with a probability drawn from 0 to share."""

    takes: ClassVar[str] = "events"
    share: float = _in(0, 1, 0.5)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        _frames(self, x)
        lost = _each(_uniform(x, generator, 0, self.share), x)
        return x.masked_fill(torch.rand(x.shape, generator=generator).to(x.device) < lost, 0)


@dataclass(frozen=True, repr=False)
class noise(_Word):
    """Events added: a Poisson number of mean `rate` in every cell (pixel, polarity, step), each drawn for itself."""

    takes: ClassVar[str] = "events"
    rate: float = _in(0, 10, 0.01)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        _frames(self, x)
        return x + torch.poisson(torch.full(x.shape, float(self.rate)), generator=generator).to(x.device, x.dtype)


@dataclass(frozen=True, repr=False)
class chain:
    """Several, one after the other."""

    parts: tuple[Augment, ...]

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        for part in self.parts:
            x = part(x, generator)
        return x

    def __repr__(self) -> str:
        return "|".join(map(repr, self.parts))


IMAGES = (flip, shift, roll, cutout, drop_area, rotate, jitter)
EVENTS = (drop_time, drop_events, noise)
WORDS: dict[str, type[_Word]] = {word.__name__: word for word in IMAGES + EVENTS}


def suits(change: Augment | None, events: bool) -> None:
    """DataError where a word of an augmentation is for images in [0,1] and the data are events, or the reverse."""
    for word in change.parts if isinstance(change, chain) else (change,):
        if isinstance(word, _Word) and ("events" if events else "images") not in word.takes:
            raise DataError(f"{word!r} is for {word.takes}: these data are {'events' if events else 'images'}")


def parse(text: str) -> Augment | None:
    """`"flip|shift(2)"` -> a callable; `"none"` -> None. Raises DataError naming the word or argument that is wrong."""
    if text.strip() == "none":
        return None
    try:
        parts = _parts(ast.parse(text.strip(), mode="eval").body, text)
    except DataError:
        raise
    except (SyntaxError, ValueError):
        raise DataError(f"cannot read the augmentation {text!r}: write it like 'flip|shift(2)', or 'none'") from None
    return parts[0] if len(parts) == 1 else chain(tuple(parts))


def _parts(node: ast.expr, text: str) -> list[Augment]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _parts(node.left, text) + _parts(node.right, text)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise SyntaxError
    word = call.func.id
    if word not in WORDS:
        near = difflib.get_close_matches(word, WORDS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"unknown augmentation {word!r} in {text!r}: {hint}Valid: {', '.join(map(_usage, WORDS))}; none"
        )
    try:
        args = [ast.literal_eval(value) for value in call.args]
        named = {k.arg or "**": ast.literal_eval(k.value) for k in call.keywords}
        return [WORDS[word](*args, **named)]  # type: ignore[list-item]
    except DataError:
        raise
    except (TypeError, ValueError):
        ranges = "; ".join(map(_range, fields(WORDS[word])))
        raise DataError(f"wrong arguments of {word} in {text!r}: it is {_usage(word)}, where {ranges}") from None
