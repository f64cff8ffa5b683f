"""Rewrites of a model before it is trained: model -> model, in place, the names of its stages kept.

    apply(student, "tt_snn(rank=8, mode='parallel')")      then train it with any method
    merge(student)                                         afterwards: back to plain layers

A rewrite is written into `model.spec["transforms"]`, and `apply_spec` repeats it on a freshly built model, so that a
saved one can be loaded. What a rewrite adds to the training, `plan(student)` says.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from spikedistill.core.plan import Plan
from spikedistill.methods.hsd import hsd_convert, hsd_quantise  # 2024 Zhong et al., ACM MM, arXiv:2409.12507
from spikedistill.methods.joint_a_snn import (  # 2023 Guo et al., Pattern Recognition, arXiv:2305.02099
    factorise,
    factors,
)
from spikedistill.spec import SpecError, bind, near, parse, settings
from spikedistill.transforms import unstructured_pruning as pruning
from spikedistill.transforms.rewrite import foldable, merge
from spikedistill.transforms.tt_snn import TTConv2d, tt_snn  # 2024 Lee et al., DATE, arXiv:2401.08001
from spikedistill.transforms.unstructured_pruning import unstructured_pruning  # 2024 Shi et al., ICLR

TRANSFORMS: dict[str, Callable[..., nn.Module]] = {
    "factorise": factorise,
    "hsd_convert": hsd_convert,
    "hsd_quantise": hsd_quantise,
    "merge": merge,
    "tt_snn": tt_snn,
    "unstructured_pruning": unstructured_pruning,
}


def check(text: str, given: Sequence[str] = (), select: str = "last", ema: float | None = None) -> list[str]:
    """The mistakes in the text of a transform, found without a model. `given`: settings that the caller will add.

    select, ema: what is kept, which has to suit it: which epoch, or an average.
    """
    function, _, mistakes = _read(text, dict.fromkeys(given))
    if function is pruning.unstructured_pruning and select == "best":
        mistakes.append(f"{text} prunes until training ends: it needs --select last, an earlier epoch is pruned less")
    if function is pruning.unstructured_pruning and ema:
        mistakes.append(f"{text} fine-tunes what its gates leave, and an average of gates leaves another: drop --ema")
    return mistakes


def apply(model: nn.Module, text: str, **given: Any) -> nn.Module:
    """Rewrite a model as a text says, 'tt_snn(rank=8)', and return it.

    given: what a caller knows and a transform may want, such as shape=[3, 32, 32], the image; the text goes first.
    Raises SpecError with every mistake, and where the transform would change nothing.
    """
    function, chosen, mistakes = _read(text, given)
    if mistakes:
        raise SpecError(mistakes)
    return function(model, **chosen)


def apply_spec(model: nn.Module, spec: Mapping[str, Any]) -> nn.Module:
    """Repeat on a freshly built model the rewrites that a spec lists."""
    for text in spec.get("transforms", ()):
        apply(model, text)
    return model


def plan(model: nn.Module) -> Plan | None:
    """What the rewritten parts of a model add to its training, to be merged with a method's plan; None if nothing."""
    return pruning.plan(model) if pruning.gates_of(model) else None


def in_factors(model: nn.Module) -> bool:
    """Whether kernels are products of factors, so that zeros in these are none in the folded kernel."""
    return bool(factors(model)) or any(isinstance(m, TTConv2d) for m in model.modules())


def _read(text: str, given: Mapping[str, Any]) -> tuple[Callable[..., nn.Module], dict[str, Any], list[str]]:
    """Function, settings and mistakes. A given value of None stands for one that is known to come."""
    try:
        name, positional, keywords = parse(text)
    except SpecError as error:
        return merge, {}, error.mistakes
    if name not in TRANSFORMS:
        return merge, {}, [f"transform '{name}' is unknown; {near(name, TRANSFORMS)}"]
    mistakes = [f"transform '{text}': give settings by name, {name}(key=value)"] if positional else []
    known = settings(TRANSFORMS[name], skip=1)
    added = {key: value for key, value in given.items() if key in known and key not in keywords}
    clean, wrong = bind(TRANSFORMS[name], keywords | {k: v for k, v in added.items() if v is not None}, name, skip=1)
    missing = [k for k, p in known.items() if p.default is p.empty and k not in keywords and k not in added]
    wrong += [f"{name}.{key}: is needed; write {name}({key}=...)" for key in missing]
    return TRANSFORMS[name], clean, mistakes + wrong


__all__ = ["TRANSFORMS", "apply", "apply_spec", "check", "foldable", "in_factors", "merge", "plan", *TRANSFORMS]
