"""Students that fire, without training."""

import torch
from torch import nn


def awake(model, x):
    """The same model with norms as after training: statistics of x, and enough bias that every layer fires."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(1)
    for norm in norms:
        norm.momentum = 1.0
        with torch.no_grad():
            norm.weight.uniform_(0.6, 1.4, generator=generator)
            norm.bias.uniform_(0.2, 0.9, generator=generator)
    model.train()
    with torch.no_grad():
        model(x)
    return model.eval()
