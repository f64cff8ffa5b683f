"""What rewrites of a model share: choosing modules, folding back, writing down."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from spikedistill.core.taps import eval_mode
from spikedistill.functional import record
from spikedistill.spec import SpecError

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""Modules of a model: patterns on their names ('stage2*', ('stem.conv', 'stage3*')), or a function of name and module.

Empty for the rewrite's own choice.
"""


def selects(where: Where, name: str, module: nn.Module) -> bool:
    """Whether a module is meant."""
    if callable(where):
        return where(name, module)
    return any(fnmatchcase(name, pattern) for pattern in ([where] if isinstance(where, str) else where))


def written(transform: str, **settings: Any) -> str:
    """The text that `transforms.apply` reads: tt_snn(rank=[8], mode='half')."""
    return f"{transform}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def merge(model: nn.Module) -> nn.Module:
    """Fold what a rewrite added into plain layers, in place: the same function of its input in evaluation mode.

    Tensor-train layers, shared factors and gates on weights become convolutions; gates on neurons become fixed maps.
    A module's method `merged()` says what takes its place; parametrisations of torch are removed, keeping the value.
    Raises SpecError where there is nothing to fold.
    """
    training = model.training
    with eval_mode(model):
        folded = _fold(model, training)
    if not folded:
        raise SpecError([f"merge: {type(model).__name__} has nothing to fold; rewrite it first"])
    record(model, "merge")
    return model


def foldable(model: nn.Module) -> bool:
    """Whether `merge` finds something: a rewrite may put other activations in place, which stay."""
    return any(hasattr(m, "merged") or parametrize.is_parametrized(m) for m in model.modules())


def _fold(module: nn.Module, training: bool, folded: dict[nn.Module, nn.Module] | None = None) -> int:
    count, folded = 0, {} if folded is None else folded  # what has two names keeps them
    for name, child in [*module._modules.items()]:  # named_children leaves out what has two names
        if child is None:
            continue
        if hasattr(child, "merged"):
            if child not in folded:
                folded[child] = cast(Any, child).merged().train(training)
            setattr(module, name, folded[child])
            count += 1
        else:
            count += _fold(child, training, folded)
    if parametrize.is_parametrized(module):
        for tensor in [*cast(nn.ModuleDict, module.parametrizations)]:
            parametrize.remove_parametrizations(module, tensor)
            count += 1
    return count
