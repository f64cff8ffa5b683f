"""The smallest student and teacher that have every signal a method may read."""

import torch

from spikedistill.models.small import small
from spikedistill.neurons import LIF

CLASSES, SIZE = 4, 8


def toy_student(steps: int = 3, seed: int = 0):
    torch.manual_seed(seed)
    return small(classes=CLASSES, channels=2, steps=steps, widths=(5, 6), neuron="lif(v_th=0.5)")


def toy_teacher(seed: int = 1):
    """An ANN with other widths than the student."""
    torch.manual_seed(seed)
    return small(classes=CLASSES, channels=2, widths=(5, 7), neuron="relu")


def spiking(build):
    """A method on students and teachers whose logits are spikes."""

    def built(student, teacher):
        student.out, teacher.out = LIF(v_th=0.2), LIF(v_th=0.2)
        return build(student, teacher)

    return built


def toy_batch(batch: int = 4, seed: int = 2):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, 2, SIZE, SIZE, generator=g)
    y = torch.randint(0, CLASSES, (batch,), generator=g)
    source, rgb = torch.rand(2, batch, 2, SIZE, SIZE, generator=g)  # static images of the same classes, see static2dvs
    return {"x": x, "y": y, "index": torch.arange(batch), "source": source, "rgb": rgb}
