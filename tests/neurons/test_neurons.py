"""Neurons against voltages computed by hand, surrogates against their primitives."""

from fractions import Fraction
from itertools import product
from math import pi

import pytest
import torch

from spikedistill.neurons import IF, LIF, PLIF, ATan, Rectangle, Sigmoid, Triangle, functional, kernels, make
from spikedistill.neurons.surrogate import spike
from spikedistill.spec import SpecError

D = torch.float64
SURROGATES = [ATan(), ATan(3.1), Sigmoid(), Sigmoid(2.3), Triangle(), Triangle(0.6), Rectangle(), Rectangle(0.8)]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_gradient_is_the_finite_difference_of_the_primitive(surrogate):
    x = torch.linspace(-2.9, 3.1, 997, dtype=D)
    kinks = [0.6, 1.0, 0.5, 0.8]
    x = x[torch.stack([(x.abs() - k).abs() > 1e-4 for k in kinks]).all(0) & (x.abs() > 1e-4)]
    e = 1e-6
    torch.testing.assert_close(
        surrogate.grad(x), (surrogate.value(x + e) - surrogate.value(x - e)) / (2 * e), atol=1e-7, rtol=1e-6
    )
    x.requires_grad_()
    (through,) = torch.autograd.grad(spike(x, surrogate).sum(), x)
    torch.testing.assert_close(through, surrogate.grad(x))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_gradient_integrates_to_one_and_the_primitive_rises_from_zero_to_one(surrogate):
    x = torch.linspace(-1000, 1000, 4_000_001, dtype=D)
    assert torch.trapezoid(surrogate.grad(x), x).item() == pytest.approx(1, abs=1e-3)
    assert surrogate.value(x[:1]).item() == pytest.approx(0, abs=1e-3)
    assert surrogate.value(x[-1:]).item() == pytest.approx(1, abs=1e-3)


def test_peaks():
    zero = torch.zeros(1, dtype=D)
    peaks = {ATan(3.0): 1.5, Sigmoid(3.0): 0.75, Triangle(0.5): 2.0, Rectangle(0.4): 1.25}
    for surrogate, peak in peaks.items():
        assert surrogate.grad(zero).item() == pytest.approx(peak)
    assert ATan().grad(torch.tensor([1 / pi], dtype=D)).item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "decay, gain, v_th, x, charges, spikes",
    [
        (0.5, 1.0, 1.0, 0.6, [0.6, 0.9, 1.05, 0.6], [0, 0, 1, 0]),
        (0.5, 0.5, 1.0, 0.6, [0.3, 0.45, 0.525, 0.5625], [0, 0, 0, 0]),
        (0.25, 1.0, 0.5, 0.6, [0.6, 0.6, 0.6, 0.6], [1, 1, 1, 1]),
        (0.5, 1.0, 1.0, 1.2, [1.2, 1.2, 1.2, 1.2], [1, 1, 1, 1]),
    ],
)
def test_hard_reset_by_hand(decay, gain, v_th, x, charges, spikes):
    s, v = functional.neuron(torch.full((4, 1), x, dtype=D), decay, gain, v_th=v_th)
    assert s.flatten().tolist() == spikes
    after = [h * (1 - fired) for h, fired in zip(charges, spikes)]
    torch.testing.assert_close(v.flatten(), torch.tensor(after, dtype=D))


def test_soft_reset_by_hand():
    s, v = functional.neuron(torch.full((4, 1), 1.2, dtype=D), 0.5, 1.0, v_reset=None)
    assert s.flatten().tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(v.flatten() + 1, torch.tensor([1.2, 1.3, 1.35, 1.375], dtype=D))


def test_reset_to_another_value_by_hand():
    """tau = 4, v_reset = -0.4: the leak pulls to -0.4, so does a spike. H = V + (X - (V + 0.4)) / 4."""
    s, v = functional.lif(torch.tensor([[2.0], [9.0], [0.0]], dtype=D), tau=4.0, v_reset=-0.4)
    h1 = -0.4 + 2.0 / 4
    h2 = h1 + (9.0 - (h1 + 0.4)) / 4
    assert h1 < 1 < h2 and s.flatten().tolist() == [0, 1, 0]
    torch.testing.assert_close(v.flatten(), torch.tensor([h1, -0.4, -0.4], dtype=D))
    s, v = functional.lif(torch.tensor([[0.2], [0.9]], dtype=D), tau=4.0, decay_input=False, v_reset=-0.4)
    h2 = -0.2 - (-0.2 + 0.4) / 4 + 0.9
    torch.testing.assert_close(v.flatten(), torch.tensor([-0.2, h2], dtype=D))


def test_integrate_and_fire_counts_exactly():
    """With a soft reset, a constant input c fires floor(c T) times: exact in sixteenths, `>=` included."""
    for k in range(1, 16):
        c = Fraction(k, 16)
        s, _ = functional.if_(torch.full((1, 1), float(c), dtype=D), v_reset=None, steps=48)
        assert s.sum().item() == (c * 48).__floor__()


def test_strict_differs_exactly_at_the_threshold():
    x = torch.tensor([[1.0]])
    assert functional.if_(x)[0].item() == 1 and functional.if_(x, strict=True)[0].item() == 0
    assert kernels.neuron(x, 1.0, 1.0).item() == 1 and kernels.neuron(x, 1.0, 1.0, strict=True).item() == 0


def test_lif_with_decayed_input_never_fires_below_the_threshold():
    s, v = functional.lif(torch.full((1, 1), 0.999, dtype=D), steps=60)
    assert s.sum() == 0 and v[0].item() == pytest.approx(0.4995)


def test_plif_starts_as_lif_and_learns_its_leak():
    x = torch.randn(5, 40) * 2
    neuron = PLIF(tau=2.0)
    assert torch.equal(neuron(x), LIF(tau=2.0)(x))
    torch.testing.assert_close(1 / torch.sigmoid(PLIF(tau=3.7).w), torch.tensor(3.7))
    neuron(x).sum().backward()
    assert neuron.w.grad.abs() > 0


def unrolled(x, decay, gain, v_th, v_reset, strict, detach_reset, surrogate):
    """The spike train with the surrogate's primitive in place of the step: its gradient is what backward must give."""
    rest, v, out = v_reset or 0.0, torch.full_like(x[0], v_reset or 0.0), []
    for t in range(len(x)):
        h = rest + decay * (v - rest) + gain * x[t]
        hard = (h > v_th if strict else h >= v_th).to(x.dtype)
        smooth = surrogate.value(h - v_th)
        s = hard.detach() + smooth - smooth.detach()
        r = hard.detach() if detach_reset else s
        v = h - v_th * r if v_reset is None else h * (1 - r) + rest * r
        out.append(s)
    return torch.stack(out)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("surrogate", [ATan(1.7), Sigmoid(3.0), Triangle(0.8), Rectangle(0.6)], ids=str)
def test_both_paths_have_the_gradient_of_the_unrolled_primitive(surrogate, steps):
    torch.manual_seed(0)
    grid = product([0.0, None, -0.3], [True, False], [True, False], [True, False])
    for v_reset, detach_reset, strict, static in grid:
        x = (torch.randn(1 if static else steps, 60, dtype=D) * 1.5).requires_grad_()
        decay, gain = (torch.tensor(c, dtype=D, requires_grad=True) for c in (0.6, 0.7))
        how = dict(v_th=0.9, v_reset=v_reset, strict=strict, detach_reset=detach_reset, surrogate=surrogate)
        weights = torch.randn(steps, 60, dtype=D)
        expected = unrolled(x.expand(steps, -1) if static else x, decay, gain, **how)
        wanted = torch.autograd.grad((expected * weights).sum(), [x, decay, gain], allow_unused=True)
        reference = functional.neuron(x, decay, gain, **how, steps=steps)[0]
        fast = kernels.neuron(x, decay, gain, **how, steps=steps)
        for spikes in (reference, fast):
            assert torch.equal(spikes, expected.detach().round())
            got = torch.autograd.grad((spikes * weights).sum(), [x, decay, gain], allow_unused=True)
            for a, b in zip(got, wanted):
                a, b = (torch.zeros((), dtype=D) if v is None else v for v in (a, b))
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_membrane_is_float32_under_bf16():
    """Sixteen small currents add up in float32; in bf16 the sum would stop growing."""
    x = torch.full((1, 3), 2**-9, dtype=torch.bfloat16)
    s, v = functional.if_(x, steps=600)
    assert s.dtype == torch.bfloat16 and v.dtype == torch.float32
    assert v[510].tolist() == [pytest.approx(511 * 2**-9)] * 3 and s[511].tolist() == [1, 1, 1]
    assert torch.equal(kernels.neuron(x, 1.0, 1.0, steps=600), s)


def test_nothing_is_kept_between_calls_and_a_stream_goes_on_where_it_stopped():
    x, layer = torch.randn(6, 2, 30) * 2, LIF(v_reset=None)
    whole = layer(x)
    assert torch.equal(layer(x), whole)
    first, v = layer.run(x[:2])
    second, _ = layer.run(x[2:], v)
    assert torch.equal(torch.cat([first, second]), whole)


def test_potentials_can_be_tapped():
    x, layer, seen = torch.randn(4, 2, 5), IF(v_th=0.8), []
    plain = layer(x)
    layer.v.register_forward_hook(lambda m, i, out: seen.append(out))
    assert torch.equal(layer(x), plain) and torch.equal(seen[0], functional.if_(x, v_th=0.8)[1])


def test_static_input_equals_the_repeated_one():
    x = torch.randn(1, 2, 30) * 2
    assert torch.equal(LIF()(x, 4), LIF()(x.expand(4, -1, -1)))
    with pytest.raises(ValueError, match="2 time steps but steps=4"):
        LIF()(torch.zeros(2, 1, 3), 4)


@pytest.mark.parametrize(
    "text, words",
    [
        ("lfi", "'lfi' is unknown; did you mean 'lif'"),
        ("lif(tau=0.5)", "tau must be at least 1"),
        ("lif(taw=2.0)", "lif.taw: no such setting; did you mean 'tau'?"),
        ("lif(v_th=abc)", "lif.v_th: 'abc' will not do: it should be a valid number"),
        ("lif(v_reset=none)", "lif.v_reset: 'none' will not do: it should be a valid number"),
        ("plif(strict=maybe)", "plif.strict: 'maybe' will not do: it should be a valid boolean"),
        ("if(tau=2.0)", "if.tau: no such setting"),
        ("if(v_th=0)", "if.v_th: 0 will not do: it should be greater than 0"),
        ("relu(tau=3)", "relu.tau: no such setting; it takes none"),
        ("lif(surrogate=atan(alfa=1))", "atan.alfa: no such setting; did you mean 'alpha'?"),
        ("lif(surrogate=3)", "surrogate '3' is unknown"),
        ("lif(surrogate=atn)", "surrogate 'atn' is unknown; did you mean 'atan'"),
        ("lif(surrogate=atan(1, 2))", "surrogate 'atan"),
        ("lif(2.0)", "by name"),
        ("lif(tau=2", "cannot read"),
    ],
)
def test_text_with_mistakes(text, words):
    with pytest.raises(SpecError, match=words.replace("(", r"\(")):
        make(text)


def test_text():
    neuron = make("if(v_reset=None, surrogate=triangle(1.5))")()
    assert isinstance(neuron, IF) and neuron.v_reset is None and neuron.surrogate == Triangle(1.5)
    for text in ("false", "False", "'no'", "0"):
        assert make(f"plif(decay_input={text})")().decay_input is False
    assert make("lif(v_th=1)", tau=3.0, strict=True)().how["strict"] and make("if", tau=3.0, v_th=0.5)().v_th == 0.5
    assert make("lif", tau=3.0)().tau == 3.0 and make("lif(tau=4.0)", tau=3.0)().tau == 4.0
