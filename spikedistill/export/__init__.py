"""A trained student for other programs: folded, written as NIR, ONNX or torch.export, and checked by reading it back.

fold         a copy without batch norms and without what is for training only
plain        the same in operations of torch alone
form         the module of a format, with `write(student, x, path)` and `readers(path)`
check        run what was written on real samples and compare every spike and logit with the student's
"""

from importlib import import_module
from typing import Any

from spikedistill.export.folding import fold, plain
from spikedistill.export.verify import Comparison, Mismatch, check

FORMATS = {"nir": "to_nir", "onnx": "to_onnx", "torch": "to_torch"}


def form(name: str) -> Any:
    """The module of a format: EXTENSION, TOLERANCE, needs() -> mistakes, write(student, x, path, **how) and
    readers(path, **how) -> {reader: x -> Trace}."""
    return import_module(f"spikedistill.export.{FORMATS[name]}")


__all__ = ["FORMATS", "Comparison", "Mismatch", "check", "fold", "form", "plain"]
