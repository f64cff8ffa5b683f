"""Augmentations of a batch of images, written `"flip|shift(2)"` and applied from left to right.

Each takes x, float [B,C,H,W] in [0,1] (or [B,T,C,H,W]: the same draw for all T), and a CPU generator; it draws once
per sample and returns a new tensor of the same shape. Draws are made on the CPU, so they do not depend on the device.
`repr` gives the text back that `parse` reads.
"""

import ast
import difflib
import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

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
class cutout(_Word):
    """A black square of size pixels, centred anywhere in the image (DeVries, Taylor 2017, arXiv 1708.04552)."""

    size: int = _in(1, 512)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        _fits(self, self.size, x)
        high, wide = x.shape[-2:]
        top = _uniform(x, generator, 0, high).floor() - self.size // 2
        left = _uniform(x, generator, 0, wide).floor() - self.size // 2
        rows, cols = torch.arange(high, device=x.device), torch.arange(wide, device=x.device)
        in_rows = (rows >= top[:, None]) & (rows < top[:, None] + self.size)  # [B,H]
        in_cols = (cols >= left[:, None]) & (cols < left[:, None] + self.size)
        hole = in_rows[:, :, None] & in_cols[:, None, :]
        return x.masked_fill(hole.view(len(x), *[1] * (x.dim() - 3), high, wide), 0)


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

    strength: float = _in(0, 1)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        low, high = 1 - self.strength, 1 + self.strength
        contrast = _each(_uniform(x, generator, low, high), x)
        brightness = _each(_uniform(x, generator, low, high), x)
        mean = _each(x.flatten(1).mean(1), x)
        return ((mean + (x - mean) * contrast) * brightness).clamp(0, 1)


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


WORDS: dict[str, type[_Word]] = {word.__name__: word for word in (flip, shift, cutout, rotate, jitter)}


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
