"""Models of others: ANN teachers from timm and Hugging Face, students of spikingjelly and snnTorch, modules of yours.

A wrapper gives them what our own models have: input in [0, 1], a normalisation and image size of their own, and `dims`.
The model is the child `net`, so its taps are "net." and its own module names: net.layer4, net.blocks.11.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikedistill.core.taps import TapError, eval_mode, time_first
from spikedistill.models.layers import Normalize, sequence
from spikedistill.neurons import listened
from spikedistill.spec import Count, SpecError

Frames = Literal["each", "mean"]


class Foreign(nn.Module):
    """net(normalize(resize(x))) on images [B, C, H, W] in [0, 1] -> [B, classes].

    mean, std: what the model was trained with; None where it normalises itself.
    size: height and width it wants; None leaves images as they are. Bicubic, and without antialiasing unless asked.
    channels: it wants; a grey image is repeated. dims: its taps, by its own module names.
    frames: on [T, B, C, H, W], 'each' runs it on every frame -> [T, B, classes], 'mean' on the mean frame.
    bf16: run it in bfloat16 (autocast), whatever the rest runs in; logits come out in float32.
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
        bf16: bool = False,
    ):
        super().__init__()
        self.bf16 = bf16
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
            return self.run(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if x.ndim == 5 and self.frames == "mean":
            x = x.mean(0)
        if x.ndim != 4:
            raise ValueError(
                f"{type(self.net).__name__} takes images [B, C, H, W], got {list(x.shape)}; "
                "for frames [T, B, C, H, W] wrap it with frames='each' or frames='mean'"
            )
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The model on images [B, C, H, W]."""
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            logits = self.net(self.prepare(x))
        return logits.float() if self.bf16 else logits

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
    bf16: bool = False,
) -> Foreign:
    """Any image classifier of yours as a teacher or student. Arguments of `Foreign`."""
    return Foreign(net, mean, std, size, channels, frames=frames, antialias=antialias, dims=dims, bf16=bf16)


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
    bf16: bool = False,
    **settings: Any,
) -> Foreign:
    """A model of timm by its name there, such as resnet18.a1_in1k, on images of any size in [0, 1].

    pretrained: load its weights, from timm's cache or the network. classes: of a new last layer; None keeps its own.
    size: images are resized to this; by default what the model was made for. mean, std: by default its own.
    frames: 'each' or 'mean' to run it on frames. antialias: when resizing. bf16: run it in bfloat16.
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
    if dims and hasattr(net, "num_prefix_tokens"):  # a transformer: its features are tokens, its head takes a vector
        head = net.get_classifier()
        head = head[0] if isinstance(head, tuple) else head  # of two, that of the class token
        dims |= {f"{name}.input": net.num_features for name, part in names.items() if part is head}
    return Foreign(net, mean, std, wanted, channels, frames=frames, antialias=antialias, dims=dims, bf16=bf16)


class _Logits(nn.Module):
    """A classifier of Hugging Face that returns its logits and nothing else."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def hf(
    name: str,
    *,
    pretrained: bool = False,
    classes: Count | None = None,
    size: Count | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    frames: Frames | None = None,
    antialias: bool = False,
    bf16: bool = False,
) -> Foreign:
    """An image classifier of Hugging Face by its name there, or the folder it was saved in, on images in [0, 1].

    pretrained: load its weights, from the folder, the cache or the network. classes: of a new last layer; None keeps
    its own. size: images are resized to this; by default what the model was made for. mean, std: by default its own.
    frames: 'each' or 'mean' to run it on frames. antialias: when resizing. bf16: run it in bfloat16.
    Raises SpecError where transformers is missing or knows no such model.
    """
    library = _library("transformers")
    how: dict[str, Any] = {} if classes is None else {"num_labels": classes}
    try:
        config = library.AutoConfig.from_pretrained(name, **how)
        kind = library.AutoModelForImageClassification
        if pretrained:
            net = kind.from_pretrained(name, config=config, ignore_mismatched_sizes=True, use_safetensors=True)
        else:
            net = kind.from_config(config)
        own = _preprocessing(library, name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise SpecError([f"Hugging Face has no image classifier '{name}' that can be loaded: {reason[:300]}"]) from None
    wanted = size or _side(own.get("crop_size") or own.get("size")) or getattr(config, "image_size", None)
    if mean is None and std is None and own.get("do_normalize", True):
        mean, std = own.get("image_mean"), own.get("image_std")
    channels = getattr(config, "num_channels", 3)
    return Foreign(_Logits(net), mean, std, wanted, channels, frames=frames, antialias=antialias, bf16=bf16)


def _preprocessing(library: Any, name: str) -> dict[str, Any]:
    """What the model's file says of its images; read as it is, because the processors themselves need torchvision."""
    try:
        return library.image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        return {}


def _side(size: Any) -> Any:
    if isinstance(size, Mapping):
        both = size.get("height"), size.get("width")
        return both if all(both) else size.get("shortest_edge")
    return size


def _library(name: str = "timm") -> Any:
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise SpecError([f"{NEEDS[name]} ({error})"]) from None


NEEDS = {
    "timm": "timm models need timm: pip install 'spikedistill[vision]'",
    "transformers": "Hugging Face models need transformers: pip install 'spikedistill[text]'",
}


class Spiking(nn.Module):
    """A spiking network of spikingjelly, snnTorch or your own as a student: images or frames -> logits [T, B, classes].

    net: its state is reset before every call, by `reset(net)`, by default the `reset()` or `reset_mem()` of its layers.
    steps: T for images. mode: 'sequence' calls net once with [T, B, C, H, W], 'step' T times with [B, C, H, W]; it
    returns logits per step, or a tuple that begins with them. mean, std: of a normalisation put before it.

    Taps: in mode 'sequence' net.<module>; in mode 'step' taps.<module>, the outputs of all steps (where a layer returns
    a tuple, its first), collected only while somebody asks for them. dims: their channels, by the names of net's
    modules; `distill` measures them where none are given.
    """

    def __init__(
        self,
        net: nn.Module,
        steps: int = 4,
        *,
        mode: Literal["sequence", "step"] = "sequence",
        reset: Callable[[nn.Module], None] | None = None,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        dims: Mapping[str, int] | None = None,
    ):
        super().__init__()
        if mode not in ("sequence", "step"):
            raise SpecError([f"mode='{mode}' is unknown; valid: sequence, step"])
        self.net, self.steps, self.mode, self.reset = net, steps, mode, reset or reset_state
        self.normalize = Normalize(mean, std) if len(mean) else nn.Identity()
        if mode == "step":
            self.taps = _mirror(net)
        if dims is not None:
            self.dims = {f"{'net' if mode == 'sequence' else 'taps'}.{name}": width for name, width in dims.items()}

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        x = self.normalize(sequence(x)) if x.ndim == 4 else self.normalize(x)
        x = x.expand(steps or self.steps, *x.shape[1:]) if len(x) == 1 else x
        self.reset(self.net)
        if self.mode == "sequence":
            return _first(self.net(x))
        asked = [name for name, tap in self.taps.named_modules() if name and listened(tap)]
        seen: dict[str, list[Tensor]] = {name: [] for name in asked}
        with ExitStack() as stack:
            for name, outs in seen.items():
                layer = self.net.get_submodule(name)
                hook = layer.register_forward_hook(lambda _m, _i, out, outs=outs: outs.append(_first(out)))
                stack.callback(hook.remove)
            logits = torch.stack([_first(self.net(now)) for now in x])
        for name, outs in seen.items():
            if len(outs) == len(x) and all(isinstance(out, Tensor) for out in outs):
                self.taps.get_submodule(name)(torch.stack(outs))
        return logits


class _Tap(nn.Module):
    """A place for the outputs of a layer; returns what it is given. Its children are those of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _mirror(net: nn.Module) -> nn.Module:
    """A tree of `_Tap`s with the names of a network's modules."""
    tap = _Tap()
    for name, child in net.named_children():
        tap.add_module(name, _mirror(child))
    return tap


def reset_state(net: nn.Module) -> None:
    """Forget every membrane potential, in the ways of spikingjelly (`reset`) and snnTorch (`reset_mem`)."""
    for layer in net.modules():
        for name in ("reset_mem", "reset"):
            if callable(forget := getattr(layer, name, None)):
                forget()
                break


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def measure_dims(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Taps of a model that publishes none: name -> channels, in the order in which they fire on `x`.

    The shallowest modules of which at least two give maps [.., C, H, W] of more than one pixel; of a transformer, whose
    maps are only its patches, its `_blocks`; where there is neither, the shallowest with tokens [.., N, D]. Behind
    tokens comes "head.input", the vector [.., D] that the last layer takes, be it the class token or a mean. What fires
    more than once in a call, or gives anything else, is no tap.
    """
    fired: dict[str, list[tuple[Any, Any]]] = {}
    modules = {name: part for name, part in model.named_modules() if name}
    with ExitStack() as stack, eval_mode(model):
        for name, part in modules.items():
            hook = part.register_forward_hook(
                lambda _m, args, out, name=name: fired.setdefault(name, []).append((args[0] if args else None, out))
            )
            stack.callback(hook.remove)
        logits = model(x)
    steps, batch = logits.shape[:2] if logits.ndim == 3 else (1, logits.shape[0])
    once = {name: calls[0] for name, calls in fired.items() if len(calls) == 1}
    took, gave = ({name: _size(call[side], steps, batch) for name, call in once.items()} for side in (0, 1))
    maps = {name: size[2] for name, size in gave.items() if len(size) == 5 and size[3:] != (1, 1)}
    tokens = {name: size[3] for name, size in gave.items() if len(size) == 4}
    inner = [name for name in tokens if len(took[name]) == 4 and [*modules[name].children()]]
    found = {name: tokens[name] for name in _blocks(modules, [*gave], [*maps], inner)} or maps or tokens
    depths = sorted({name.count(".") for name in found})
    levels = ({name: width for name, width in found.items() if name.count(".") == depth} for depth in depths)
    found = next((level for level in levels if len(level) > 1), found)
    if not found.keys() & tokens.keys():
        return found
    ends = [n for n in gave if len(took[n]) == 3 and gave[n][2:] == logits.shape[-1:] and [*modules[n].parameters()]]
    heads = [name for name in ends if not any(other.startswith(f"{name}.") for other in ends)]
    return found | {f"{name}.input": took[name][2] for name in heads[-1:]}


def _size(x: Any, steps: int, batch: int) -> tuple[int, ...]:
    """The shape of what a module takes or gives, time first; () where it is no tensor or fits neither T nor B."""
    try:
        return tuple(time_first(x, steps, batch, "").shape) if isinstance(x, Tensor) and x.ndim else ()
    except TapError:
        return ()


def _blocks(modules: Mapping[str, nn.Module], order: list[str], maps: list[str], inner: list[str]) -> list[str]:
    """The blocks of a transformer; none of another network. All are names, in the order in which they fire.

    inner: modules with layers of their own from tokens to tokens. Blocks are those of one class and depth: the
    shallowest of which there are two, of these the most, of as many the last. All maps come before them, save those
    inside, such as attention. A single block makes a transformer after one convolution, of the patches; after more it
    pools the maps of a convolutional network, which are its taps.
    """
    patches = [name for name in maps if not any(name.startswith(f"{block}.") for block in inner)]
    if not maps or not inner or any(order.index(name) > order.index(inner[0]) for name in patches):
        return []
    alike: dict[tuple[int, type], list[str]] = {}
    for name in inner:
        alike.setdefault((name.count("."), type(modules[name])), []).append(name)
    blocks = max(reversed(alike.values()), key=lambda names: (len(names) > 1, -names[0].count("."), len(names)))
    convolutions = sum(isinstance(modules[name], nn.Conv2d) for name in patches)
    return blocks if len(blocks) > 1 or convolutions < 2 else []


def has_foreign_neurons(model: nn.Module) -> bool:
    """Whether its neurons are another library's, whose state is reset and kept by `Spiking` alone."""
    return any(isinstance(m, Spiking) for m in model.modules())
