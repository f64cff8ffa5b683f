"""Answers of a trained student: over all its time steps, as soon as it is sure, or while the events come in."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill import runs
from spikedistill.core.taps import infer
from spikedistill.export.folding import SYNAPSES, fold
from spikedistill.models.foreign import has_foreign_neurons
from spikedistill.models.layers import Network
from spikedistill.neurons import Neuron
from spikedistill.spec import SpecError
from spikedistill.transforms.tt_snn import needs_all_steps


def prepare(model: nn.Module, shape: Sequence[int] | None = None, *, bf16: bool | None = None) -> nn.Module:
    """A frozen copy of a model that answers faster, with the same layers under the same names.

    Batch norms are folded into the weights before them, weights lie channels last, and convolutions and linear layers
    compute in bfloat16; membrane potentials stay in float32, and so do the logits. For inference alone: it has no
    gradient, and what it exports or trains would be the rounded weights.

    shape: (channels, height, width) of an input; without it norms are not folded, nor in a model of others that takes
    neither an image nor frames of it.  bf16: None for where the processor multiplies it itself. Spikes are those of the
    model up to rounding, to 8 bits with bf16. A model with modules of others keeps its weights and computes under
    autocast, as it may read them without calling their layer.
    """
    copy = _folded(model, shape) if shape else deepcopy(model).eval()
    copy.requires_grad_(False)
    for p in copy.parameters():
        if p.ndim == 4:  # Module.to would try those of 3D convolutions too
            p.data = p.data.to(memory_format=torch.channels_last)
    if runs.bf16_is_fast() if bf16 is None else bf16:
        if _calls_its_layers(copy):
            for module in copy.modules():
                if isinstance(module, SYNAPSES):
                    module.bfloat16().register_forward_pre_hook(_as_weight)
        else:
            copy.forward = partial(_under_autocast, copy)
        copy.register_forward_hook(_as_float)
    return copy


def _folded(model: nn.Module, shape: Sequence[int]) -> nn.Module:
    """`fold` by way of an image, or of frames; not folded where a model of others takes neither."""
    image = torch.zeros(1, *shape, device=_device(model))
    try:
        return fold(model, image)
    except Exception:
        if isinstance(model, Network):
            raise
    try:
        return fold(model, torch.stack([image, image]))  # of one, a loop over time would call its layers once
    except Exception:
        return deepcopy(model).eval()


def _calls_its_layers(model: nn.Module) -> bool:
    """Whether no weight is read but by the forward of its layer: ours and torch's do so, except for attention."""
    known = ("spikedistill.", "torch.nn.")
    modules = [*model.modules()]
    return all(type(m).__module__.startswith(known) and not isinstance(m, nn.MultiheadAttention) for m in modules)


def _under_autocast(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return type(model).forward(model, x, *args, **kwargs)


def _as_weight(synapse: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(synapse.weight.dtype), *args[1:])


def _as_float(_model: nn.Module, _args: Any, logits: Tensor) -> Tensor:
    return logits.float()


def _device(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters()), None)


ALL_AT_ONCE = "it answers for all steps at once"


class _Carrying(nn.Module):
    """A neuron layer that goes on from the potential it ended with. Raises SpecError where it is called again before
    `fired` is False: that would be another population, with a potential of its own.
    """

    def __init__(self, neuron: Neuron, name: str):
        super().__init__()
        self.neuron, self.name = neuron, name
        self.v: Tensor | None = None
        self.fired = False

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        if self.fired:
            raise SpecError([f"'{self.name}' of this student fires more than once a step: {ALL_AT_ONCE}"])
        self.fired = True
        x = x if steps is None or len(x) == steps else x.expand(steps, *x.shape[1:])
        spikes, self.v = self.neuron.run(x, self.v)
        return spikes


class Stream:
    """A student that is fed one time step after another: `stream(frame)` gives the logits of that step.

    The same as the whole sequence in one call, up to rounding. The model is copied; its potentials are kept here.
    Raises SpecError for a model whose neurons are another library's, as their state is not ours to keep, for one whose
    layers change after half of the steps, whose number a stream does not know, and, when it is fed, for one that calls
    a neuron twice, takes more than one step for a frame, or cannot take it.

        stream = Stream(model)
        for frame in frames:                  # [B, C, H, W], event counts, or the same image again
            logits = stream(frame)            # [B, classes]
        stream.reset()                        # before the next sequence
    """

    def __init__(self, model: nn.Module):
        if has_foreign_neurons(model):
            raise SpecError([f"the neurons of this student are another library's: {ALL_AT_ONCE}"])
        if needs_all_steps(model):
            raise SpecError([f"layers of this student change after half of its steps: {ALL_AT_ONCE}"])
        self.model = deepcopy(model).eval()
        layers: dict[nn.Module, _Carrying] = {}
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if isinstance(module, Neuron):  # one of two names is one layer
                self.model.set_submodule(name, layers.setdefault(module, _Carrying(module, name)))
        self.layers = [*layers.values()]
        self.how = {"steps": 1} if takes_steps(model) else {}

    @torch.no_grad()
    def __call__(self, frame: Tensor) -> Tensor:
        """One time step [B, C, H, W] -> its logits [B, classes]. ValueError where B changed without a reset."""
        for layer in self.layers:
            layer.fired = False
            if layer.v is not None and layer.v.shape[0] != frame.shape[0]:
                raise ValueError(f"a stream of {layer.v.shape[0]} sequences was fed {frame.shape[0]}: reset() it first")
        try:
            logits = self.model(frame[None], **self.how) if self.layers else self.model(frame)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError([f"this student takes no single frame, {ALL_AT_ONCE}: {error}"]) from error
        if logits.ndim == 3 and len(logits) > 1:
            raise SpecError([f"this student takes {len(logits)} time steps for a frame: {ALL_AT_ONCE}"])
        return logits[-1] if logits.ndim == 3 else logits

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sequences of the batch. rows: their numbers, or a mask [B]."""
        for layer in self.layers:
            layer.v = None if layer.v is None else layer.v[rows]

    def reset(self) -> None:
        for layer in self.layers:
            layer.v = None


@dataclass(frozen=True)
class Answers:
    """label and confidence (softmax of the mean logits) of each sample, and the time steps it took. All [B]."""

    label: Tensor
    confidence: Tensor
    steps: Tensor

    @staticmethod
    def of(logits: Tensor, steps: int) -> "Answers":
        """From logits [B, classes], the mean over `steps` steps."""
        confidence, label = logits.float().softmax(-1).max(-1)
        return Answers(label, confidence, torch.full_like(label, steps))


def takes_steps(model: nn.Module) -> bool:
    """Whether a model can be told how many time steps to take."""
    return "steps" in signature(type(model).forward).parameters  # of the class: `prepare` gives a copy its own forward


def whole(model: nn.Module, x: Tensor, steps: int | None = None) -> Answers:
    """All time steps in one call. x: images [B, C, H, W], or frames [T, B, C, H, W].

    steps: how often an image is shown; None for as often as the model itself shows it. One without time, or whose
    forward takes no `steps`, answers as it does: the steps of the answer say so.
    """
    logits = infer(model, x, steps if x.ndim == 4 and takes_steps(model) else None).logits
    return Answers.of(logits.float().mean(0), len(logits))


def stepwise(stream: Stream, x: Tensor, steps: int, confidence: float | None = None) -> Answers:
    """One time step after another; a sample whose answer is as sure as `confidence` takes part in no further one.

    x: images [B, C, H, W], shown up to `steps` times, or once where no neuron remembers them; or frames
    [T, B, C, H, W], T >= steps.
    """
    stream.reset()
    count = x.shape[0] if x.ndim == 4 else x.shape[1]
    left, total = torch.arange(count, device=x.device), None
    label, sure = torch.zeros_like(left), torch.zeros(count, device=x.device)
    found = Answers(label, sure, torch.zeros_like(left))
    for t in range(steps if x.ndim == 5 or stream.layers else 1):
        logits = stream((x if x.ndim == 4 else x[t])[left]).float()
        total = logits if total is None else total + logits
        now = Answers.of(total / (t + 1), t + 1)
        for mine, new in zip(vars(found).values(), vars(now).values()):
            mine[left] = new
        if confidence is not None:
            unsure = now.confidence < confidence
            stream.keep(unsure)
            left, total = left[unsure], total[unsure]
            if not len(left):
                break
    stream.reset()
    return found
