"""Networks: the families of the literature by name, models of timm, and functions of your own files.

`build("sew_resnet18(width=32)", classes=10)` makes one from text; the builders are plain functions, to be called too.
"""

import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from spikedistill import own
from spikedistill.models import foreign
from spikedistill.models.foreign import Foreign, Spiking, measure_dims, module
from spikedistill.models.layers import recompute
from spikedistill.models.ms_resnet import ms_resnet18, ms_resnet34
from spikedistill.models.qkformer import qkformer
from spikedistill.models.resnet19 import ann_resnet18, ann_resnet34, resnet19
from spikedistill.models.sew_resnet import sew_resnet18, sew_resnet34, sew_resnet50
from spikedistill.models.small import small
from spikedistill.models.spike_driven import spike_driven
from spikedistill.models.spikformer import spikformer
from spikedistill.models.vggsnn import plif_net, vggsnn
from spikedistill.neurons import make
from spikedistill.spec import SpecError, bind, near, parse, settings

MODELS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function
    for function in (
        small,  # for 28x28 and 32x32 images, in minutes
        plif_net,  # 2021, Fang et al., PLIF, arXiv:2007.05785: 6conv2fc
        resnet19,  # 2021, Zheng et al., tdBN, arXiv:2011.05280; 2022, Deng et al., TET
        sew_resnet18,  # 2021, Fang et al., SEW-ResNet, arXiv:2102.04159
        sew_resnet34,
        sew_resnet50,
        ms_resnet18,  # 2021, Hu et al., MS-ResNet, arXiv:2112.08954; 2024, Lee et al., TT-SNN
        ms_resnet34,
        vggsnn,  # 2022, Deng et al., TET, arXiv:2202.11946
        spikformer,  # 2023, Zhou et al., Spikformer, arXiv:2209.15425
        spike_driven,  # 2023, Yao et al., Spike-driven Transformer, arXiv:2307.01694
        qkformer,  # 2024, Zhou et al., QKFormer, arXiv:2403.16552
        ann_resnet18,  # 2016, He et al., ResNet, arXiv:1512.03385: ANN teachers
        ann_resnet34,
    )
}

GIVEN = ("classes", "channels", "steps", "mean", "std")
"""What data and a run say of a model: passed on to builders that take it, unless the text says otherwise."""


def build(model: str | nn.Module, **given: Any) -> nn.Module:
    """A model from text; a module is returned as it is.

    model: a name of MODELS with settings, 'sew_resnet18(width=32)'; 'timm:resnet18(pretrained=True)' or 'hf:NAME' of
    Hugging Face; or
    'path/to/file.py:function', a function of yours that returns a module and is called with what it takes of `given`.
    given: settings where the text has none. Builders that do not take one of GIVEN do without it; models of timm take
    the classes and bring their own normalisation.
    The result has `spec`: build(spec["model"], **spec["settings"]) makes the same module again, here or elsewhere.
    Raises SpecError with every mistake.
    """
    if isinstance(model, nn.Module):
        return model
    if mistakes := check(model, **given):
        raise SpecError(mistakes)
    name, _, asked = parse(model)
    if library := _library_of(name):
        # the text keeps its settings, so that a mean in it is not taken for that of the data when it is built again
        given = {k: v for k, v in given.items() if k == "classes" or k not in GIVEN}
        function = LIBRARIES[library][0]
        built, spec = function(name.partition(":")[2], **given | asked), {"model": model, "settings": given}
    else:
        if ".py:" in name:
            function = own.imported(name)
            chosen = _taken(function, given) | asked
            try:
                inspect.signature(function).bind(**chosen)
            except TypeError as error:
                raise SpecError([f"{name} cannot be called with {', '.join(chosen) or 'nothing'}: {error}"]) from None
        else:
            function = MODELS[name]
            chosen, _ = bind(function, _taken(function, given) | asked, name)
            # with its defaults of today, so that a saved student outlives a change of them
            chosen = {k: p.default for k, p in settings(function).items() if p.default is not p.empty} | chosen
        built, spec = function(**chosen), {"model": name, "settings": chosen}
    if not isinstance(built, nn.Module):
        raise SpecError([f"{name} returned a {type(built).__name__}: it must return a torch.nn.Module"])
    try:
        plain = json.loads(json.dumps(spec))
    except TypeError as error:
        raise SpecError([f"{name}: settings must be plain values ({error}); for objects call the builder"]) from None
    setattr(built, "spec", plain)  # noqa: B010, an attribute that nn.Module does not declare
    return built


def check(model: str, **given: Any) -> list[str]:
    """The mistakes in a model's text (and `given`), found without building it or importing a file of yours."""
    try:
        name, positional, asked = parse(model)
    except SpecError as error:
        return error.mistakes
    mistakes = [f"'{model}': give settings by name, {name}(key=value)"] if positional else []
    if library := _library_of(name):
        function, package, example = LIBRARIES[library]
        if name == f"{library}:":
            mistakes.append(f"'{name}' names no model: write {library}:{example}")
        if importlib.util.find_spec(package) is None:
            mistakes.append(foreign.NEEDS[package])
        known = settings(function, skip=1)
        mine = asked if library == "hf" else {k: v for k, v in asked.items() if k in known}  # timm's models take more
        return mistakes + bind(function, mine, name, skip=1)[1]
    if own.is_own(name):
        return mistakes + own.check(name, asked)
    if name not in MODELS:
        return [*mistakes, f"'{name}' is unknown; {near(name, MODELS)} (or timm:NAME, hf:NAME, file.py:function)"]
    clean, wrong = bind(MODELS[name], _taken(MODELS[name], given) | asked, name)
    if isinstance(neuron := clean.get("neuron"), str):
        try:
            make(neuron)
        except SpecError as error:
            wrong += [f"{name}.neuron: {m}" for m in error.mistakes]
    return mistakes + wrong


def weightless(model: str) -> bool:
    """Whether a model's text, which `check` accepts, names one whose weights are drawn, or those of its last layer."""
    name, _, asked = parse(model)
    if not _library_of(name):
        return not own.is_own(name)
    return "checkpoint_path" not in asked and not keeps_classes(model)


def keeps_classes(model: str) -> bool:
    """Whether a model's text names a trained one of a library, with the classes that it was trained for."""
    name, _, asked = parse(model)
    library = _library_of(name)
    if not library or asked.keys() & {"classes", "num_classes", "checkpoint_path"}:
        return False
    given = {k: v for k, v in asked.items() if k == "pretrained"}
    return bool(bind(LIBRARIES[library][0], given, name, skip=1)[0].get("pretrained"))


def parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(p.numel() for p in model.parameters())


LIBRARIES: dict[str, tuple[Callable[..., nn.Module], str, str]] = {
    "timm": (foreign.timm, "timm", "resnet18"),
    "hf": (foreign.hf, "transformers", "google/vit-base-patch16-224"),
}
"""Prefix -> builder, package, an example."""


def _library_of(name: str) -> str:
    """'timm' for 'timm:resnet18'; '' for models that are not of a library."""
    prefix, colon, _ = name.partition(":")
    return prefix if colon and prefix in LIBRARIES else ""


def _taken(function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without what is common to all models and this function does not take."""
    known = inspect.signature(function).parameters.values()
    names = GIVEN if any(p.kind is p.VAR_KEYWORD for p in known) else [p.name for p in known]
    return {k: v for k, v in given.items() if k in names or k not in GIVEN}


__all__ = [
    "GIVEN",
    "MODELS",
    "Foreign",
    "Spiking",
    "build",
    "check",
    "keeps_classes",
    "measure_dims",
    "module",
    "parameters",
    "recompute",
    "weightless",
    *MODELS,
]
