"""Spiking neurons: layers (`IF`, `LIF`, `PLIF`), their pure functions (`functional`) and surrogates (`surrogate`)."""

from collections.abc import Callable
from functools import partial

from torch import nn

from spikedistill.neurons.modules import IF, LIF, PLIF, Neuron, ReLU, listened
from spikedistill.neurons.surrogate import SURROGATES, ATan, Rectangle, Sigmoid, Surrogate, Triangle
from spikedistill.spec import SpecError, bind, near, parse, settings

NEURONS = {"if": IF, "lif": LIF, "plif": PLIF, "relu": ReLU}


def make(neuron: str | Callable[[], nn.Module], **defaults: object) -> Callable[[], nn.Module]:
    """A factory of neurons from text such as 'plif(tau=2.0, v_reset=None, surrogate=triangle(1.0))'.

    A callable is returned as it is. `defaults` are used where the text does not say otherwise and the neuron has such a
    setting. Raises SpecError for unknown names and settings, and for values that will not do.
    """
    if not isinstance(neuron, str):
        return neuron
    name, positional, asked = parse(neuron)
    name = "if" if name == "if_" else name
    if name not in NEURONS:
        raise SpecError([f"neuron '{name}' is unknown; {near(name, NEURONS)}"])
    kind = NEURONS[name]
    if positional:
        raise SpecError([f"neuron '{neuron.strip()}': give settings by name, {name}(key=value)"])
    valid = {key for each in NEURONS.values() for key in settings(each.__init__, skip=1)}
    if wrong := defaults.keys() - valid:
        raise SpecError([f"{key}: neurons have no such setting; {near(key, valid)}" for key in sorted(wrong)])
    asked = {k: v for k, v in defaults.items() if k in settings(kind.__init__, skip=1)} | asked
    if not isinstance(surrogate := asked.get("surrogate", ATan()), Surrogate):
        asked["surrogate"] = _surrogate(str(surrogate))
    keywords, mistakes = bind(kind.__init__, asked, name, skip=1)
    if mistakes:
        raise SpecError(mistakes)
    factory = partial(kind, **keywords) if keywords else kind
    try:
        factory()
    except (TypeError, ValueError) as error:
        raise SpecError([f"neuron '{neuron.strip()}': {error}"]) from None
    return factory


def _surrogate(text: str) -> Surrogate:
    """'triangle(1.0)', 'triangle(gamma=1.0)' or 'triangle'."""
    name, values, named = parse(text)
    if name not in SURROGATES:
        raise SpecError([f"surrogate '{name}' is unknown; {near(name, SURROGATES)}"])
    valid = [*settings(SURROGATES[name])]
    if len(values) > len(valid):
        raise SpecError([f"surrogate '{text}': it takes {valid[0]} alone"])
    clean, mistakes = bind(SURROGATES[name], dict(zip(valid, values)) | named, name)
    if mistakes:
        raise SpecError(mistakes)
    return SURROGATES[name](**clean)


__all__ = ["IF", "LIF", "PLIF", "ATan", "Neuron", "ReLU", "Rectangle", "Sigmoid", "Triangle", "listened", "make"]
