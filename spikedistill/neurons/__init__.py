"""Spiking neurons: layers (`IF`, `LIF`, `PLIF`), their pure functions (`functional`) and surrogates (`surrogate`)."""

from collections.abc import Callable
from functools import partial

from torch import nn

from spikedistill.neurons.modules import IF, LIF, PLIF, Neuron, ReLU, listened
from spikedistill.neurons.surrogate import SURROGATES, ATan, Rectangle, Sigmoid, Triangle
from spikedistill.spec import SpecError, near, parse

NEURONS = {"if": IF, "lif": LIF, "plif": PLIF, "relu": ReLU}


def make(neuron: str | Callable[[], nn.Module], **defaults: object) -> Callable[[], nn.Module]:
    """A factory of neurons from text such as 'plif(tau=2.0, v_reset=None, surrogate=triangle(1.0))'.

    A callable is returned as it is. `defaults` are used where the text does not say otherwise.
    Raises SpecError for unknown names and settings.
    """
    if not isinstance(neuron, str):
        return neuron
    text = neuron.strip()
    name, positional, keywords = parse(text)
    name = "if" if name == "if_" else name
    if name not in NEURONS:
        raise SpecError([f"neuron '{name}' is unknown; {near(name, NEURONS)}"])
    if name == "relu":
        return ReLU
    if positional:
        raise SpecError([f"neuron '{text}': give its settings by name, such as {name}(v_th=1.0)"])
    keywords = defaults | keywords
    if isinstance(surrogate := keywords.get("surrogate"), str):
        kind, values, named = parse(surrogate)
        if kind not in SURROGATES:
            raise SpecError([f"surrogate '{kind}' is unknown; {near(kind, SURROGATES)}"])
        try:
            keywords["surrogate"] = SURROGATES[kind](*values, **named)
        except TypeError as error:
            raise SpecError([f"surrogate '{surrogate}': {error}"]) from None
    factory = partial(NEURONS[name], **keywords)
    try:
        factory()
    except (TypeError, ValueError) as error:
        raise SpecError([f"neuron '{text}': {error}"]) from None
    return factory


__all__ = ["IF", "LIF", "PLIF", "ATan", "Neuron", "ReLU", "Rectangle", "Sigmoid", "Triangle", "listened", "make"]
