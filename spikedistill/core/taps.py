"""Taps: the outputs of named submodules during one call of a model; "head.input" is what the submodule head takes."""

from collections.abc import Container, Sequence
from contextlib import ExitStack
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from spikedistill.core.output import Output


class TapError(ValueError):
    """A tap that the model does not have, or that says nothing when the model runs."""


def source(tap: str, names: Container[str]) -> str:
    """The submodule whose output a tap is, or whose input where it ends in ".input" and no submodule is called so."""
    return tap if tap in names else tap.removesuffix(".input")


def check_taps(model: nn.Module, taps: Sequence[str], who: str = "the model") -> None:
    """Raise TapError, naming the nearest valid tap, unless every tap is a submodule of `model`."""
    names = [name for name, _ in model.named_modules() if name]
    published = [*getattr(model, "dims", {})]
    for tap in taps:
        if source(tap, names) not in names:
            near = get_close_matches(tap, [*published, *names], 1, 0.5)
            hint = f"did you mean '{near[0]}'? " if near else ""
            valid = ", ".join(published or names[:20])
            raise TapError(f"{who} ({type(model).__name__}) has no tap '{tap}': {hint}its taps are {valid}")


def call(model: nn.Module, x: Tensor, steps: int | None = None, taps: Sequence[str] = ()) -> Output:
    """Run a model and collect taps.

    `steps` is passed on where it is given, so a model without time needs no such argument. Logits may be [B, C] (an
    ANN, T = 1) or [T, B, C], and come as float32 at least. A tap may be [T, B, ...], merged [T*B, ...] or without time
    [B, ...]; all come time first.
    Raises TapError for an unknown tap, or one that fired not once but never or several times.
    """
    check_taps(model, taps)
    caught: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for tap, seen in caught.items():
            if tap in modules:
                hook = modules[tap].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            else:
                given = modules[source(tap, modules)]
                hook = given.register_forward_pre_hook(lambda _m, args, seen=seen: seen.extend(args[:1]))
            stack.callback(hook.remove)
        returned = model(x) if steps is None else model(x, steps=steps)
    logits = returned
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{type(model).__name__} must return logits [B, C] or [T, B, C], it returned {got}")
    logits = logits[None] if logits.ndim == 2 else logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a softmax of bfloat16 is off by percents
    out = {}
    for tap, seen in caught.items():
        if len(seen) != 1 or not isinstance(seen[0], Tensor):
            what = f"fired {len(seen)} times" if len(seen) != 1 else f"gave a {type(seen[0]).__name__}"
            raise TapError(f"tap '{tap}' of {type(model).__name__} {what} in one call: a tap is one tensor a call")
        is_output = seen[0] is returned  # told by identity, which the cast would have ended
        out[tap] = logits if is_output else time_first(seen[0], logits.shape[0], logits.shape[1], tap)
    return Output(logits, out)


def time_first(x: Tensor, steps: int, batch: int, tap: str) -> Tensor:
    """Bring a tap to [T, B, ...] (T = 1 where it is the same at every step)."""
    if x.ndim > 1 and x.shape[1] == batch and x.shape[0] in (steps, 1):
        return x
    if x.shape[0] == batch:
        return x[None]
    if x.shape[0] == steps * batch:
        return x.unflatten(0, (steps, batch))
    raise TapError(f"tap '{tap}' has shape {list(x.shape)}, which fits neither T={steps} nor B={batch}")


def published(model: nn.Module, tap: str, who: str, vector: bool = False) -> tuple[str, int]:
    """A tap and its channels from `model.dims`. TapError where there is none.

    Where `tap` is empty: the last that is an output or, with `vector`, an input, of which a transformer publishes its
    head's; the last of all where there is none such.
    """
    dims: dict[str, int] = getattr(model, "dims", {})
    names = dict(model.named_modules())
    kind = [name for name in dims if (source(name, names) != name) == vector] or [*dims]
    tap = tap or next(reversed(kind), "")
    if tap not in dims:
        what = f"publishes no tap '{tap}'" if tap else "publishes no taps"
        near = get_close_matches(tap, dims, 1, 0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(dims)}" if dims else "set its `dims`"
        raise TapError(f"{who} ({type(model).__name__}) {what}: {hint}")
    return tap, dims[tap]


class eval_mode:
    """Within it, a model is in evaluation mode; after it, every submodule is in its own mode again."""

    def __init__(self, model: nn.Module):
        self.modes = [(m, m.training) for m in model.modules()]
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        for module, mode in self.modes:
            module.training = mode


@torch.no_grad()
def infer(model: nn.Module, x: Tensor, steps: int | None = None, taps: Sequence[str] = ()) -> Output:
    """`call` in evaluation mode and without a graph."""
    with eval_mode(model):
        return call(model, x, steps, taps)
