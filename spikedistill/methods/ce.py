"""Cross-entropy on the time-mean logits: direct training without a teacher.

    L = CE( mean_t z[t], y )          counts: CE( sum_t z[t], y ), for output layers that spike

Reference: the standard direct training that every paper compares with; z[t] are the logits of step t.
Evidence: code
"""

from torch import nn

from spikedistill.core.plan import Plan
from spikedistill.core.step import Pass
from spikedistill.objectives import CE
from spikedistill.spec import Share


def ce(
    student: nn.Module, teacher: nn.Module | None = None, *, label_smoothing: Share = 0.0, counts: bool = False
) -> Plan:
    """Train on the labels alone.

    label_smoothing: share of the target that is spread over all classes.
    counts: take the sum over time for the logits, which is what a head that spikes needs.
    """
    term = CE(label_smoothing=label_smoothing, counts=counts)
    return Plan({"student": Pass(student, grad=True)}, {"ce": (1.0, term)})
