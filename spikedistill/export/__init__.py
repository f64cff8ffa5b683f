"""A trained student for other programs: folded, written as NIR, ONNX or torch.export, and checked by reading it back.

fold         a copy without batch norms and without what is for training only
plain        the same in operations of torch alone
FORMATS      name -> module with `write(student, x, path)` and `readers(path)`
check        run what was written on real samples and compare every spike and logit with the student's
"""

from spikedistill.export import to_nir, to_onnx, to_torch
from spikedistill.export.fold import fold, plain
from spikedistill.export.verify import Comparison, Mismatch, check

FORMATS = {"nir": to_nir, "onnx": to_onnx, "torch": to_torch}
"""Each: EXTENSION, needs() -> mistakes, write(student, x, path, **how), readers(path) -> {reader: x -> Trace}."""

__all__ = ["FORMATS", "Comparison", "Mismatch", "check", "fold", "plain", "to_nir", "to_onnx", "to_torch"]
