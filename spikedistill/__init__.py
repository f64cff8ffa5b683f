"""Train spiking neural networks by knowledge distillation.

`distill` runs methods by name; `fit(Stage(...))` is the loop one level down; `methods`, `objectives`, `functional`,
`neurons`, `models`, `data` are the parts, each of which works without the others. Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikedistill.core.evaluate import evaluate
    from spikedistill.core.fit import Stage, fit
    from spikedistill.core.output import Output, rate
    from spikedistill.core.plan import Plan, merge
    from spikedistill.core.step import Pass, Step
    from spikedistill.recipes.distill import distill
    from spikedistill.report.activity import activity
    from spikedistill.runs import load
    from spikedistill.spec import SpecError

__version__ = "0.1.0"

_HOME = {
    "Output": "core.output",
    "Pass": "core.step",
    "Plan": "core.plan",
    "SpecError": "spec",
    "Stage": "core.fit",
    "Step": "core.step",
    "activity": "report.activity",
    "distill": "recipes.distill",
    "evaluate": "core.evaluate",
    "fit": "core.fit",
    "load": "runs",
    "merge": "core.plan",
    "rate": "core.output",
}
_MODULES = (
    "core",
    "data",
    "export",
    "functional",
    "inference",
    "methods",
    "models",
    "neurons",
    "objectives",
    "recipes",
    "report",
    "runs",
)

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"spikedistill.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"spikedistill.{name}")
    raise AttributeError(f"module 'spikedistill' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
