"""Seconds in turns, bytes kept for the backward pass, bytes resident at most."""

import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import TypeVar

import torch
from torch import nn

from spikedistill.runs import peak_memory, reset_peak_memory

Work = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


def in_turns(work: Mapping[Name, Work], rounds: int, warmup: int = 2) -> dict[Name, list[float]]:
    """Seconds of every call, by name. A round calls each once, so that what disturbs the machine disturbs all."""
    for call in work.values():
        for _ in range(warmup):
            call()
    seconds: dict[Name, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    ordered = sorted(1000 * s for s in seconds)
    n = len(ordered)
    return {"ms": median(ordered), "low": ordered[n // 4], "high": ordered[(3 * n) // 4]}


def saved_bytes(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """What autograd keeps between forward and backward: every storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward()
        total = sum(kept.values())
        loss.backward()
    return total


def resident_growth(work: Work, repeat: int = 3) -> int:
    """Bytes by which the process grows at most while `work` runs; call it in a fresh process."""
    device = torch.device("cpu")
    reset_peak_memory()
    before = peak_memory(device)
    for _ in range(repeat):
        work()
    return max(0, peak_memory(device) - before)
