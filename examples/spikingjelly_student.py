"""A student written in spikingjelly, distilled by BKD from an ANN.

    pip install spikedistill spikingjelly
    python examples/spikingjelly_student.py

The network runs in multi-step mode: [T, B, C, H, W] in, [T, B, classes] out. `models.Spiking` resets it before every
call and gives its layers as taps, here net.7, the last neurons.
"""

from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import spikedistill as sd


class Net(nn.Sequential):
    def __init__(self, channels, classes, width=16):
        def fire():
            return neuron.LIFNode(tau=2.0, decay_input=False, surrogate_function=surrogate.ATan(), step_mode="m")

        super().__init__(
            *(layer.Conv2d(channels, width, 3, padding=1, bias=False), layer.BatchNorm2d(width), fire()),
            layer.MaxPool2d(2),
            *(layer.Conv2d(width, 2 * width, 3, padding=1, bias=False), layer.BatchNorm2d(2 * width)),
            *(layer.MaxPool2d(2), fire()),
            *(layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(2 * width, classes)),
        )
        functional.set_step_mode(self, "m")


def student(classes, channels, steps=4, mean=(), std=()):
    """What `spikedistill distill --student examples/spikingjelly_student.py:student` builds."""
    return sd.models.Spiking(Net(channels, classes), steps, mean=mean, std=std, dims={"7": 32})


def main(data="fashion-mini", epochs=2, out="runs/spikingjelly"):
    how = dict(data=data, epochs=epochs, progress=False)
    teacher = f"{out}/teacher"
    sd.distill(student="small(widths=(8, 16, 32), neuron=relu)", methods="ce", out=teacher, **how)
    name = f"{__file__}:student"
    result = sd.distill(student=name, teacher=teacher, methods="bkd", out=f"{out}/student", precision="32-true", **how)
    print(f"test accuracy {result['test']['accuracy']:.2%}")
    return sd.load(f"{out}/student", fast=False, trust_code=True)  # it is this file that builds it


if __name__ == "__main__":
    main()
