"""What the tests of the kernels share."""

import torch

LAYOUTS = ["nchw", "channels_last"]


def draw(T, shape, layout="nchw", seed=0, dtype=torch.float32, scale=1.5):
    x = torch.randn(T, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return lay(x.to(dtype), layout)


def lay(x, layout):
    if layout == "nchw":
        return x.contiguous()
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])


def laid(x):
    """Strides where they mean something."""
    return [s for s, n in zip(x.stride(), x.shape) if n > 1]


def saved_bytes(f):
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f()
    return sum(saved.values())
