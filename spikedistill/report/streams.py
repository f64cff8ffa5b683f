"""A picture of what a network across modalities reads: image, hybrid stream and event stream of a few samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikedistill.core.step import Batch
from spikedistill.report.figures import BLUE, GREY, ORANGE

GAP, LINE, MARGIN = 0.05, 0.24, 0.12  # inches: between frames, of a line of text, around everything


def coloured(frame: Tensor, top: float = 1.0, events: bool = False) -> Tensor:
    """A frame [C,H,W] as a picture [H,W,3], full colour at `top`. Events: ON blue, OFF orange, both black, on white.
    Images: their own colours, those of the first channel where there are not three.
    """
    frame = (frame.float() / top).clamp(0, 1)
    if not events:
        return (frame if len(frame) == 3 else frame[:1].expand(3, -1, -1)).permute(1, 2, 0)
    off, on = frame.sqrt()  # a single event is still to be seen
    ink = on[..., None] * (1 - _rgb(BLUE)) + off[..., None] * (1 - _rgb(ORANGE))
    return (1 - ink).clamp(0, 1)


def _rgb(colour: str) -> Tensor:
    return torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def picture(batch: Batch, path: str | Path, **how: Any) -> Path:
    """Write what `draw` draws as SVG, PNG or PDF, by the ending of `path`."""
    draw(batch, **how).savefig(path)
    return Path(path)


def draw(batch: Batch, *, samples: int = 3, classes: Sequence[str] = (), title: str = "") -> Any:
    """The first `samples` of a batch of `data.Pairs` over time, as a matplotlib Figure.

    batch: "x" [T,B,2,H,W], the event stream; optionally "rgb" [B,C,H,W], what a teacher sees, and "source", the hybrid
    stream: [B,C,H,W], an image at every step, or [T,B,C,H,W] where a method has mixed it with events. Each sample has a
    row for each of its streams, and a column for each time step. Raises ValueError where there are no frames to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    batch = {name: value.detach().cpu() for name, value in batch.items()}
    events, image = batch["x"], batch.get("rgb")
    if events.dim() != 5 or events.shape[2] != 2 or not events.numel():
        raise ValueError(f"x is {list(events.shape)}: a picture over time needs frames [T,B,2,H,W]")
    steps, samples, streams = len(events), min(samples, events.shape[1]), {"events": events}
    if "source" in batch:
        source = batch["source"]
        streams = {"hybrid": source if source.dim() == 5 else source.expand(steps, *source.shape)} | streams

    wide = min(1.1, 13 / steps)  # of a frame; all lengths are in inches
    high = wide * events.shape[-2] / events.shape[-1]
    block = len(streams) * (high + GAP) - GAP
    left = MARGIN + (0 if image is None else block * image.shape[-1] / image.shape[-2] + GAP) + LINE
    width = max(left + steps * (wide + GAP) - GAP + MARGIN, 3.2)
    height = MARGIN + LINE * bool(title) + samples * (LINE + block + GAP) + LINE + MARGIN
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")

    def show(pixels: Tensor, x: float, y: float, w: float, h: float) -> None:  # y from the top
        axes = figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))
        axes.imshow(pixels.numpy(), interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        for edge in axes.spines.values():
            edge.set(color="0.8", linewidth=0.6)

    def write(text: str, x: float, y: float, **how) -> None:
        style: Any = {"fontsize": 9, "va": "bottom", "parse_math": False} | how
        figure.text(x / width, 1 - y / height, text, **style)

    y = MARGIN + LINE * bool(title)
    if title:
        write(title, MARGIN, y - 0.06, fontsize=10)
    for sample in range(samples):
        y += LINE
        if "y" in batch and batch["y"].dim() == 1:
            label = int(batch["y"][sample])
            write(classes[label] if label < len(classes) else f"class {label}", MARGIN, y - 0.05)
        if image is not None:
            show(coloured(image[sample]), MARGIN, y, left - MARGIN - LINE - GAP, block)
        for name, x in streams.items():
            shown = x[:, sample].float()
            mixed = name == "events" or (shown.shape[1] == 2 and not torch.equal(shown[:, 0], shown[:, 1]))
            top = max(1.0, float(shown[shown > 0].quantile(0.95))) if (shown > 1).any() else 1.0
            write(name, left - 0.05, y + high / 2, rotation=90, va="center", ha="right", fontsize=8, color=GREY)
            for t in range(steps):
                x0 = left + t * (wide + GAP)
                show(coloured(shown[t], top, mixed), x0, y, wide, high)
                if not sample and name == next(iter(streams)):
                    write(
                        f"t = {t + 1}" if wide > 0.5 else f"{t + 1}", x0 + wide / 2, y - 0.05, ha="center", fontsize=8
                    )
            y += high + GAP
    marks = [Patch(color=c, label=text) for c, text in ((BLUE, "brighter"), (ORANGE, "darker"), ("black", "both"))]
    at = (1 - MARGIN / width, MARGIN / 2 / height)
    figure.legend(handles=marks, loc="lower right", bbox_to_anchor=at, ncols=3, fontsize=8, frameon=False, borderpad=0)
    return figure
