"""What a person sees while training runs: a bar on a terminal, else one line an epoch."""

import sys
import time
from collections.abc import Mapping
from typing import Any


class Progress:
    """Used as a context manager. `update` after every batch, `epoch` after every epoch."""

    def __init__(self, title: str, epochs: int, batches: int, enabled: bool = True):
        self.title, self.epochs, self.batches, self.enabled = title or "training", epochs, batches, enabled
        self.bar: Any = None
        self.rate, self.last = 0.0, time.perf_counter()

    def __enter__(self) -> "Progress":
        if self.enabled and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(None),
                progress.TextColumn("{task.fields[state]}"),
                progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(self.title, total=self.epochs * self.batches, state="")
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, epoch: int, batch: int, sums: Mapping[str, float], seen: int, images: int) -> None:
        """batch: how many of this epoch are done.  sums: of the metrics, with "steps" the number of them."""
        now = time.perf_counter()
        speed, self.last = images / max(now - self.last, 1e-9), now
        self.rate = 0.95 * self.rate + 0.05 * speed if self.rate else speed
        if self.bar and "steps" in sums:
            mean = {k: v / sums["steps"] for k, v in sums.items()}
            state = f"epoch {epoch + 1}/{self.epochs}  loss {mean['loss']:.3f}"
            state += f"  acc {mean['accuracy']:.1%}" if "accuracy" in mean else ""
            state += f"  {self.rate:,.0f} images/s"
            self.bar.update(self.task, completed=epoch * self.batches + batch, state=state)

    def epoch(self, line: Mapping[str, Any]) -> None:
        if not self.enabled or self.bar:
            return
        names = {"loss": "loss {:.3f}", "accuracy": "acc {:.1%}", "valid_accuracy": "valid {:.1%}"}
        words = [text.format(line[k]) for k, text in names.items() if k in line]
        left = line["seconds"] / (line["epoch"] + 1) * (self.epochs - line["epoch"] - 1)
        words += [f"{line['images_per_second']:,.0f} images/s", f"{left:.0f} s left"]
        print(f"{self.title}: epoch {line['epoch'] + 1}/{self.epochs}  {'  '.join(words)}", file=sys.stderr, flush=True)
