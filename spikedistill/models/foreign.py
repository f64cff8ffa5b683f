"""Models of others: ANN teachers from timm, and any module of yours, taken as they are.

A wrapper gives them what our own models have: input in [0, 1], a normalisation and image size of their own, and `dims`.
The model is the child `net`, so its taps are "net." and its own module names: net.layer4, net.blocks.11.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikedistill.core.taps import TapError, eval_mode, time_first
from spikedistill.models.layers import Normalize
from spikedistill.spec import Count, SpecError

Frames = Literal["each", "mean"]


class Foreign(nn.Module):
    """net(normalize(resize(x))) on images [B, C, H, W] in [0, 1] -> [B, classes].

    mean, std: what the model was trained with; None where it normalises itself.
    size: height and width it wants; None leaves images as they are. Bicubic, and without antialiasing unless asked.
    channels: it wants; a grey image is repeated. dims: its taps, by its own module names.
    frames: on [T, B, C, H, W], 'each' runs it on every frame -> [T, B, classes], 'mean' on the mean frame.
    """

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | Sequence[int] | None = None,
        channels: int | None = None,
        *,
        frames: Frames | None = None,
        antialias: bool = False,
        dims: Mapping[str, int] | None = None,
    ):
        super().__init__()
        if len(mean or ()) != len(std or ()):
            raise SpecError([f"mean={mean} and std={std}: give both, of the same length, or neither"])
        self.net, self.channels, self.frames, self.antialias = net, channels, frames, antialias
        self.size = (size, size) if isinstance(size, int) else tuple(size) if size else None
        self.normalize = Normalize(mean, std) if mean and std else nn.Identity()
        known = getattr(net, "dims", {}) if dims is None else dims
        if known:
            self.dims = {f"net.{name}": width for name, width in known.items()}

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        """`steps` is not used: an ANN knows no time."""
        if x.ndim == 5 and self.frames == "each":
            return self.net(self.prepare(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        if x.ndim == 5 and self.frames == "mean":
            x = x.mean(0)
        if x.ndim != 4:
            raise ValueError(
                f"{type(self.net).__name__} takes images [B, C, H, W], got {list(x.shape)}; "
                "for frames [T, B, C, H, W] wrap it with frames='each' or frames='mean'"
            )
        return self.net(self.prepare(x))

    def prepare(self, x: Tensor) -> Tensor:
        """Images as the model wants them."""
        if self.channels and x.shape[1] != self.channels:
            if x.shape[1] != 1:
                raise ValueError(f"{type(self.net).__name__} takes {self.channels} channels, got {x.shape[1]}")
            x = x.expand(-1, self.channels, -1, -1)
        if self.size and x.shape[-2:] != self.size:
            # bicubic overshoots at edges; an image file could not hold that
            x = F.interpolate(x, self.size, mode="bicubic", antialias=self.antialias).clamp(0, 1)
        return self.normalize(x)


def module(
    net: nn.Module,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    channels: int | None = None,
    *,
    frames: Frames | None = None,
    antialias: bool = False,
    dims: Mapping[str, int] | None = None,
) -> Foreign:
    """Any image classifier of yours as a teacher or student. Arguments of `Foreign`."""
    return Foreign(net, mean, std, size, channels, frames=frames, antialias=antialias, dims=dims)


def timm(
    name: str,
    *,
    pretrained: bool = False,
    classes: Count | None = None,
    size: Count | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    frames: Frames | None = None,
    antialias: bool = False,
    **settings: Any,
) -> Foreign:
    """A model of timm by its name there, such as resnet18.a1_in1k, on images of any size in [0, 1].

    pretrained: load its weights, from timm's cache or the network. classes: of a new last layer; None keeps its own.
    size: images are resized to this; by default what the model was made for. mean, std: by default its own.
    frames: 'each' or 'mean' to run it on frames. antialias: when resizing.
    settings: what else timm.create_model takes, such as img_size for transformers.
    Raises SpecError where timm is missing or has no such model.
    """
    library = _library()
    if ":" not in name and not library.is_model(name):
        close = get_close_matches(name, library.list_models(), 3, 0.5)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise SpecError([f"timm has no model '{name}': {hint}timm.list_models() lists its models"])
    if classes is not None:
        settings["num_classes"] = classes
    net = library.create_model(name, pretrained=pretrained, **settings)
    own = net.pretrained_cfg
    channels, *shape = own.get("input_size", (3, 224, 224))
    channels = settings.get("in_chans", channels)
    wanted = size or settings.get("img_size") or shape
    if mean is None and std is None and len(own.get("mean", ())) == channels:
        mean, std = own["mean"], own["std"]
    names = dict(net.named_modules())
    features = getattr(net, "feature_info", None) or []
    dims = {f["module"]: f["num_chs"] for f in features if f.get("module") in names}
    return Foreign(net, mean, std, wanted, channels, frames=frames, antialias=antialias, dims=dims)


def _library() -> Any:
    try:
        return import_module("timm")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise SpecError([f"{NEEDS_TIMM} ({error})"]) from None


NEEDS_TIMM = "timm models need timm: pip install 'spikedistill[vision]'"


@torch.no_grad()
def measure_dims(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Taps of a model that publishes none: name -> channels, in the order in which they fire on `x`.

    The shallowest modules of which at least two give maps [.., C, H, W] of more than one pixel; where it has no maps,
    tokens [.., N, D]. What fires more than once in a call, or gives anything else, is no tap.
    """
    fired: dict[str, list[Any]] = {}
    with ExitStack() as stack, eval_mode(model):
        for name, part in model.named_modules():
            if name:
                hook = part.register_forward_hook(lambda _m, _i, out, name=name: fired.setdefault(name, []).append(out))
                stack.callback(hook.remove)
        logits = model(x)
    steps, batch = logits.shape[:2] if logits.ndim == 3 else (1, logits.shape[0])
    maps, tokens = {}, {}
    for name, outs in fired.items():
        if len(outs) != 1 or not isinstance(outs[0], Tensor) or not outs[0].ndim:
            continue
        try:
            tap = time_first(outs[0], steps, batch, name)
        except TapError:
            continue
        if tap.ndim == 5 and tap[0, 0, 0].numel() > 1:
            maps[name] = tap.shape[2]
        elif tap.ndim == 4:
            tokens[name] = tap.shape[3]
    found = maps or tokens
    for depth in range(max((name.count(".") for name in found), default=0) + 1):
        level = {name: width for name, width in found.items() if name.count(".") == depth}
        if len(level) > 1:
            return level
    return found
