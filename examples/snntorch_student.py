"""A student written in snnTorch, distilled by BKD from an ANN.

    pip install spikedistill snntorch
    python examples/snntorch_student.py

snnTorch runs one time step a call: [B, C, H, W] in, [B, classes] out. `models.Spiking` resets its hidden states, calls
it T times and gives its layers as taps, here taps.lif2.
"""

import snntorch as snn
from snntorch import surrogate
from torch import nn

import spikedistill as sd


class Net(nn.Module):
    def __init__(self, channels, classes, width=16):
        super().__init__()

        def fire():
            return snn.Leaky(beta=0.5, spike_grad=surrogate.atan(), init_hidden=True, reset_mechanism="zero")

        self.conv1, self.norm1, self.lif1 = nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), fire()
        self.conv2, self.norm2, self.lif2 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), fire()
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.lif1(self.norm1(self.conv1(x)))
        x = self.lif2(self.norm2(self.conv2(x)))
        return self.head(x.mean((-2, -1)))


def student(classes, channels, steps=4, mean=(), std=()):
    """What `spikedistill distill --student examples/snntorch_student.py:student` builds."""
    net = Net(channels, classes)
    return sd.models.Spiking(net, steps, mode="step", mean=mean, std=std, dims={"lif2": 32})


def main(data="fashion-mini", epochs=2, out="runs/snntorch"):
    how = dict(data=data, epochs=epochs, progress=False)
    teacher = f"{out}/teacher"
    sd.distill(student="small(widths=(8, 16, 32), neuron=relu)", methods="ce", out=teacher, **how)
    name = f"{__file__}:student"
    result = sd.distill(student=name, teacher=teacher, methods="bkd", out=f"{out}/student", precision="32-true", **how)
    print(f"test accuracy {result['test']['accuracy']:.2%}")
    return sd.load(f"{out}/student", fast=False, trust_code=True)  # it is this file that builds it


if __name__ == "__main__":
    main()
