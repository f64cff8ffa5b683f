"""Networks: the families of the literature by name, models of timm, and functions of your own files.

`build("sew_resnet18(width=32)", classes=10)` makes one from text; the builders are plain functions, to be called too.
"""

import ast
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from spikedistill.models import foreign
from spikedistill.models.foreign import Foreign, measure_dims, module
from spikedistill.models.ms_resnet import ms_resnet18, ms_resnet34  # Hu 2021; Lee 2024 (TT-SNN)
from spikedistill.models.resnet19 import ann_resnet18, ann_resnet34  # He 2016: ANN teachers
from spikedistill.models.resnet19 import resnet19  # Zheng 2021 (tdBN); Deng 2022 (TET)
from spikedistill.models.sew_resnet import sew_resnet18, sew_resnet34, sew_resnet50  # Fang 2021
from spikedistill.models.small import small  # 28x28 and 32x32 images, in minutes
from spikedistill.models.spikformer import spikformer  # Zhou 2023
from spikedistill.models.vggsnn import plif_net  # Fang 2021 (PLIF): 6conv2fc
from spikedistill.models.vggsnn import vggsnn  # Deng 2022 (TET)
from spikedistill.neurons import make
from spikedistill.spec import SpecError, bind, near, parse, settings

MODELS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function
    for function in (
        small,
        vggsnn,
        plif_net,
        sew_resnet18,
        sew_resnet34,
        sew_resnet50,
        resnet19,
        ms_resnet18,
        ms_resnet34,
        spikformer,
        ann_resnet18,
        ann_resnet34,
    )
}

GIVEN = ("classes", "channels", "steps", "mean", "std")
"""What data and run say of a model. It goes to builders that take it; what the text says comes first."""


def build(model: str | nn.Module, **given: Any) -> nn.Module:
    """A model from text; a module is returned as it is.

    model: 'sew_resnet18(width=32)', a name of MODELS with settings; 'timm:resnet18(pretrained=True)'; or
    'path/to/file.py:function', a function of yours that returns a module and is called with what it takes of `given`.
    given: settings that the text leaves open. Those of GIVEN are left out where the builder does not take them.
    The result has `spec`, plain data: build(spec["model"], **spec["settings"]) makes the same module again.
    Raises SpecError with every mistake.
    """
    if isinstance(model, nn.Module):
        return model
    kind, ref, asked, mistakes = _read(model)
    if kind == "file":
        function = _imported(*ref, mistakes)
        names = settings(function)
        some = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
        clean = {k: v for k, v in given.items() if k in names or some} | asked
        name = f"{ref[0]}:{ref[1]}"
    elif kind == "timm":
        name, clean = model, {"name": ref[0]} | {k: v for k, v in given.items() if k == "classes"} | asked
        function = foreign.timm
    else:
        name = ref[0]
        function = MODELS.get(name, small)
        known = settings(function)
        clean = {k: v for k, v in given.items() if k in known or k not in GIVEN} | asked
        clean, wrong = bind(function, clean, name)
        mistakes += [m for m in wrong if m not in mistakes]
    if mistakes:
        raise SpecError(mistakes)
    built = function(**clean)
    return built


def check(model: str) -> list[str]:
    """The mistakes in the text of a model, found without building it or importing a file of yours."""
    return _read(model)[-1]
