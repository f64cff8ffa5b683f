"""The 2x2 pools are those of torch to the bit, and keep less."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from spikedistill.neurons import kernels
from spikedistill.neurons.kernels import native
from tests.neurons.helpers import LAYOUTS, draw, laid, lay, saved_bytes

POOLS = {"max": (kernels.max_pool, F.max_pool2d), "average": (kernels.avg_pool, F.avg_pool2d)}


def same_bits(a, b):
    """Equal to the sign of zero; all NaN are one."""
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    bits = [torch.where(t.isnan(), torch.full_like(t, torch.nan), t).contiguous().view(whole) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)


def pooled_alike(ours, torchs, x, layout, grad):
    a, b = (lay(x.clone(), layout).requires_grad_() for _ in range(2))
    y, want = ours(a), torchs(b.flatten(0, 1), 2).unflatten(0, b.shape[:2])
    assert type(y.grad_fn).__name__ == "PoolBackward"  # the kernel, not torch
    y.backward(grad)
    want.backward(grad)
    return same_bits(y, want) and same_bits(a.grad, b.grad) and laid(y) == laid(want) and laid(a.grad) == laid(b.grad)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pools_are_those_of_torch_to_the_bit(built, pool, layout, dtype):
    """Spikes and ReLUs (ties: the first), numbers, odd edges, NaN, infinities, zeros of either sign, any gradient."""
    shapes = [(2, 5, 6, 8), (3, 64, 8, 8), (1, 3, 41, 33), (2, 1, 9, 2), (2, 700, 2, 3), (4, 17, 3, 31), (1, 2, 2, 300)]
    for i, shape in enumerate(shapes):
        x = draw(3, shape, "nchw", i, dtype)
        odd = x.clone()
        for value, low, high in (
            ("nan", 1, 1.5),
            ("inf", 1.5, 9),
            ("-inf", -9, -1.5),
            ("-0.0", -0.8, 0),
            ("0", 0, 0.6),
        ):
            odd[(x > low) & (x < high)] = float(value)
        grad = draw(3, (*shape[:2], shape[2] // 2, shape[3] // 2), LAYOUTS[i % 2], i + 1, dtype)
        grad = torch.where(grad.abs() < 0.2, torch.full_like(grad, -0.0), grad)
        tiny = x * (1e-38 if pool == "max" else 1)  # of their averages, torch rounds some to the zero of the other sign
        for values in ((x > 1).to(dtype), x.relu(), x, odd, tiny):
            assert pooled_alike(*POOLS[pool], values, layout, grad)
        with torch.no_grad():
            y = POOLS[pool][0](lay(odd, layout))
            assert same_bits(y, POOLS[pool][1](lay(odd, layout).flatten(0, 1), 2).unflatten(0, y.shape[:2]))


@pytest.mark.parametrize("pool", POOLS)
def test_pools_of_every_instruction_set_and_number_of_threads(built, pool):
    lib, threads, x = native.library(), torch.get_num_threads(), draw(4, (8, 24, 15, 14), "channels_last").relu()
    try:
        for name, number in product(native.LEVELS, (1, 3)):
            native.level(lib, name)
            torch.set_num_threads(number)
            for layout, dtype in product(LAYOUTS, (torch.float32, torch.bfloat16)):
                assert pooled_alike(*POOLS[pool], x.to(dtype), layout, draw(4, (8, 24, 7, 7)).to(dtype))
    finally:
        native.level(lib)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("pool", POOLS)
def test_pools_read_views_and_expanded_gradients(built, pool):
    ours, torchs = POOLS[pool]
    base = draw(8, (3, 10, 12, 9))
    for view in (
        lambda t: t[::2],
        lambda t: t[:, :, 1::2],
        lambda t: t.transpose(-1, -2),
        lambda t: t[..., 1:],
        lambda t: t[:1].expand(4, -1, -1, -1, -1),
    ):
        grads = []
        for f in (ours, lambda x: torchs(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])):
            x = base.clone().requires_grad_()
            f(view(x)).sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize("pool", POOLS)
def test_pools_that_the_kernel_does_not_take(kernel, pool):
    ours, torchs = POOLS[pool]
    x = draw(3, (2, 5, 6, 9)).double().requires_grad_()
    with kernels.use("auto"):
        assert torch.equal(ours(x), torchs(x.flatten(0, 1), 2).unflatten(0, (3, 2)))
    assert ours(draw(3, (0, 5, 6, 8)).requires_grad_()).shape == (3, 0, 5, 3, 4)
    with pytest.raises(RuntimeError, match="too small"):
        ours(draw(3, (2, 5, 1, 9)))
    y = ours(x.float()).square().sum()
    if kernel == "native":
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
    seen = torch.compile(ours, backend="eager", fullgraph=True)(x.float())
    assert torch.equal(seen, ours(x.float()))
    assert torch.equal(torch.jit.trace(ours, x.float())(2 - x.float()), ours(2 - x.float()))


def test_a_pool_keeps_one_byte_an_output_or_nothing(built):
    x = draw(4, (3, 20, 8, 6)).requires_grad_()
    assert saved_bytes(lambda: kernels.max_pool(x)) == x.numel() // 4
    assert saved_bytes(lambda: kernels.avg_pool(x)) == 0
