"""Accuracy of a model on data, at every time step."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from spikedistill.core.step import Batch
from spikedistill.core.taps import infer

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def evaluate(
    model: nn.Module,
    data: Iterable[Batch],
    steps: int | None = None,
    *,
    stream: str = "x",
    fabric: "Fabric | None" = None,
) -> dict[str, Any]:
    """{"accuracy", "loss", "samples", "by_step": [accuracy of the mean logits of the first t steps]}, shares in [0, 1].

    data: batches with "y" [B] and the stream that the model reads; with a method `epoch` each process takes its share.
    """
    rank, world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    source = data.epoch(0, rank=rank, world=world) if hasattr(data, "epoch") else data
    exact = torch.float32 if device.type == "mps" else torch.float64  # which has no other
    totals: torch.Tensor | None = None
    for batch in source:
        x, y = batch[stream].to(device), batch["y"].to(device)
        if not len(y):
            continue
        if fabric:
            with fabric.autocast():
                logits = infer(model, x, steps).logits
        else:
            logits = infer(model, x, steps).logits
        running = logits.cumsum(0) / torch.arange(1, len(logits) + 1, device=device).view(-1, 1, 1)
        right = (running.argmax(-1) == y).sum(1)
        loss = F.cross_entropy(running[-1], y, reduction="sum")
        counts = torch.cat([right, loss[None], loss.new_full((1,), len(y))]).to(exact)
        totals = counts if totals is None else totals + counts
    if totals is None:
        raise ValueError("there is nothing to evaluate on: the data are empty")
    if fabric and world > 1 and hasattr(data, "epoch"):
        totals = cast(torch.Tensor, fabric.all_reduce(totals, reduce_op="sum"))
    *right, loss, samples = totals.tolist()
    by_step = [r / samples for r in right]
    return {"accuracy": by_step[-1], "loss": loss / samples, "samples": int(samples), "by_step": by_step}
