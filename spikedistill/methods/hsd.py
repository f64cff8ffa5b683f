"""Hybrid step-wise distillation (HSD): an ANN of quantised activations becomes a spiking network that it then teaches.

    step 1, `--transform hsd_quantise --method ce`, or `hsd_step1` in a loop of yours: the ANN, on all frames
    y    = u clip( floor(L x / u + 1/2) / L, 0, 1 )     activation of L levels, ceiling u learned in every layer
    L    = CE( mean_n a[n], y )                         a: logits of the frames

    step 2, `hsd`: the student has the ANN's weights, and integrate-and-fire neurons for its activations
    H[t] = V[t-1] + x[t] / u,  S[t] = 1[H[t] > 1],  V[t] = H[t] - S[t],  V[0] = 1/2;  the layer gives u S[t]
    L    = CE( mean_t z[t], y )  +  weight (1/T) sum_t tau^2 KL( softmax(mean_n a[n] / tau) || softmax(z[t] / tau) )

Reference: Zhong, Hu, Liu, Huang, Ding, Yu, Huang, ACM MM 2024, https://arxiv.org/abs/2409.12507.
Evidence: code
Floor has the gradient of x (straight through), so dy/dx = 1 from -u/2L to u + u/2L. The reset has a gradient. KL is
summed over classes and averaged over steps and batch; code that divides by the number of classes C has weight / C here.
Frames and time steps are apart: by default the ANN sees all N frames, the student the first N/2, which are its T.
`distill` evaluates on the student's frames and writes them into its file, where `predict`, `report` and `export` read
them; a loop of yours cuts recordings with `data.at_frames`. Static images go through as they are.
preset="official_code": both see the first half, KL is divided by C as well, and a layer gives S[t] instead of u S[t].
Differs from the code: the teacher is in evaluation mode and shares nothing with the student; one student pass a step.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.core.plan import Plan
from spikedistill.core.step import Batch, Pass
from spikedistill.functional import classes_of, put, record, wide
from spikedistill.neurons import IF, Triangle
from spikedistill.neurons.functional import time_steps
from spikedistill.objectives import CE, KDPerStep
from spikedistill.spec import Count, NonNegative, Positive, SpecError


def quantised(x: Tensor, u: Tensor, levels: int) -> Tensor:
    """u clip(floor(levels x / u + 1/2) / levels, 0, 1) of currents [...] and a ceiling []; gradients to both."""
    a = levels * wide(x) / u + 0.5
    return (u * ((a.detach().floor() + (a - a.detach())) / levels).clamp(0, 1)).to(x.dtype)


class Quantised(nn.Module):
    """The activation of step 1. levels: L.  ceiling: where u starts."""

    def __init__(self, levels: int = 4, ceiling: float = 8.0):
        super().__init__()
        self.levels, self.ceiling = levels, nn.Parameter(torch.tensor(ceiling))

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        return quantised(x, self.ceiling, self.levels)


class HalfIF(IF):
    """IF with soft reset that starts at half its threshold: that is half a threshold more in the first current."""

    def __init__(self):
        super().__init__(v_reset=None, strict=True, detach_reset=False, surrogate=Triangle(1.0))

    @property
    def start(self) -> float:
        return self.v_th / 2

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x = x.expand(time_steps(x, steps), *x.shape[1:])
        return super().forward(torch.cat([x[:1] + self.start, x[1:]]))


class Integrate(nn.Module):
    """The neuron of step 2, of a fixed ceiling u: currents over u in, spikes times u (if `scaled`) out."""

    def __init__(self, ceiling: Tensor, scaled: bool = True):
        super().__init__()
        self.neuron, self.scaled = HalfIF(), scaled
        self.register_buffer("ceiling", ceiling.detach().clone())

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        spikes = self.neuron(x / self.ceiling, steps)
        return spikes * self.ceiling if self.scaled else spikes


def swap(model: nn.Module, old: type[nn.Module], new: Callable[..., nn.Module], text: str) -> nn.Module:
    """Put new(module) for every module of type `old`, in place, and note it as `text` in `model.spec`.

    Raises SpecError where there is none.
    """
    names = [name for name, m in model.named_modules() if isinstance(m, old)]
    if not names:
        how = "build it with neuron='relu'" if old is nn.ReLU else "quantise it first"
        raise SpecError([f"{text}: {type(model).__name__} has no {old.__name__}; {how}"])
    for name in names:
        put(model, name, new(model.get_submodule(name)))
    record(model, text)
    return model


def hsd_quantise(model: nn.Module, levels: Count = 4, ceiling: Positive = 8.0) -> nn.Module:
    """Quantise and clip every ReLU of an ANN, in place: what step 1 trains.

    levels: L of an activation.  ceiling: u at the start, learned in every layer.
    """
    text = f"hsd_quantise(levels={levels}, ceiling={ceiling})"
    return swap(model, nn.ReLU, lambda _: Quantised(levels, ceiling), text)


def hsd_convert(model: nn.Module, scaled: bool = True) -> nn.Module:
    """Put an integrate-and-fire neuron for every quantised activation, in place: what step 2 trains.

    scaled: a spike has the height u of the ceiling that it replaces, else 1.
    """
    return swap(model, Quantised, lambda m: Integrate(m.ceiling, scaled), f"hsd_convert(scaled={scaled})")


def converted(student: nn.Module, ann: nn.Module, scaled: bool = True) -> nn.Module:
    """Give a student of the ANN's architecture, built with neuron='relu', its weights, and spiking neurons; in place.

    One that has these neurons already is left as it is. Raises SpecError where the two do not fit.
    """
    if any(isinstance(m, Integrate) for m in student.modules()):
        return student
    levels = [m.levels for m in ann.modules() if isinstance(m, Quantised)]
    if not levels or student is ann:
        how = "trained with --transform hsd_quantise --method ce, or by hsd_step1"
        raise SpecError([f"hsd: the teacher is the ANN of step 1, {how}, and the student another module"])
    if not any(isinstance(m, Quantised) for m in student.modules()):
        hsd_quantise(student, levels[0])
    try:
        student.load_state_dict(ann.state_dict())
    except RuntimeError as error:
        raise SpecError([f"hsd: student and teacher are different networks, or init='none': {error}"]) from None
    return hsd_convert(student, scaled)


def frames(batch: Batch, student: Sequence[int], teacher: Sequence[int], both_half: bool = False) -> Batch:
    """The batch with the student's frames of recordings [N, B, ...] as "x" and the teacher's as "frames"."""
    x = batch["x"]
    if x.ndim == 4:
        return batch | {"frames": x}
    half = range(max(1, len(x) // 2))
    ours, theirs = [*(student or half)], [*(teacher or (half if both_half else range(len(x))))]
    if beyond := [i for i in ours + theirs if not -len(x) <= i < len(x)]:
        raise ValueError(f"hsd: there is no frame {beyond[0]}, a recording has {len(x)}")
    return batch | {"x": x[ours], "frames": x[theirs]}


def hsd_step1(ann: nn.Module, *, levels: Count = 4, ceiling: Positive = 8.0) -> Plan:
    """Train an ANN of ReLUs, whose activations are quantised in place, on the mean of its frames."""
    return Plan({"student": Pass(hsd_quantise(ann, levels, ceiling), grad=True)}, {"ce": (1.0, CE())})


def hsd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: NonNegative = 1.0,
    tau: Positive = 2.0,
    init: Literal["teacher", "none"] = "teacher",
    student_frames: Sequence[int] = (),
    teacher_frames: Sequence[int] = (),  # ours
    preset: Literal["paper", "official_code"] = "paper",
) -> Plan:
    """Labels, and at every step the teacher's mean over its frames. Converts the student in place.

    weight: of the distillation term.  tau: temperature; the code has a second trainer with 10.
    init: give the student the teacher's weights and integrate-and-fire neurons; none takes any student as it is.
    student_frames, teacher_frames: numbers of the frames they see; empty for the first half, and for all.
    preset: official_code for the code's frames, reduction and unscaled layers, see above.
    """
    official = preset == "official_code"
    if init == "teacher":
        converted(student, teacher, scaled=not official)
    if official:
        weight /= classes_of(student, None, "hsd")
    return Plan(
        {"student": Pass(student, grad=True), "teacher": Pass(teacher, x="frames")},
        {"ce": (1.0, CE()), "hsd": (weight, KDPerStep(tau))},
        prepare=lambda batch, _: frames(batch, student_frames, teacher_frames, official),
    )
