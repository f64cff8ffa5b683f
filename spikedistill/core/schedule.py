"""Numbers that change over training, as functions of progress in [0, 1]."""

from collections.abc import Callable
from math import cos, pi

Schedule = Callable[[float], float]


def at(value: float | Schedule, progress: float) -> float:
    """A number, or a schedule read at this progress."""
    return value(progress) if callable(value) else value


def scaled(value: float | Schedule, factor: float) -> float | Schedule:
    """A number, or a schedule, times a factor."""
    return value if factor == 1 else (lambda p: factor * value(p)) if callable(value) else factor * value


def linear(start: float, end: float) -> Schedule:
    return lambda p: start + (end - start) * p


def cosine(start: float = 1.0, end: float = 0.0) -> Schedule:
    return lambda p: end + (start - end) * (1 + cos(pi * p)) / 2


def power(exponent: float) -> Schedule:
    """p ** exponent: 0 at the start, 1 at the end."""
    return lambda p: p**exponent


def steps(drops: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> Schedule:
    """1, multiplied by `factor` at each progress in `drops`."""
    return lambda p: factor ** sum(p >= d for d in drops)


def between(start: float, end: float, value: float = 1.0) -> Schedule:
    """`value` while start <= p < end, else 0."""
    return lambda p: value if start <= p < end else 0.0


def warmup(share: float, then: Schedule) -> Schedule:
    """Rise linearly from 0 over the first `share` of training, then follow `then` over the rest."""
    return lambda p: p / share if p < share else then((p - share) / (1 - share) if share < 1 else 1.0)
