"""Your data, your teacher, a student, one or more methods by name.

Run:    spikedistill distill --data fashion-mini --teacher runs/teacher --student small --method bkd --out runs/student
A teacher is trained the same way: --student "small(neuron=relu)" --method ce
Events with images of the same classes, and a teacher trained on those:
        spikedistill distill --data fashion-events --pair fashion-mini --method ckd --teacher runs/teacher --steps 6
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn

from spikedistill import data as data_sets
from spikedistill import models, optim, own, runs, transforms
from spikedistill.cache import Cache
from spikedistill.core.evaluate import evaluate
from spikedistill.core.fit import Stage, Trainee, fit
from spikedistill.core.plan import MergeError, Plan, merge
from spikedistill.core.schedule import Schedule, cosine, steps, warmup
from spikedistill.core.taps import TapError
from spikedistill.methods import METHODS, builder
from spikedistill.origin import changed, origin
from spikedistill.recipes.distilling.fitting import fit_both, fits, frames_left, rehearse, two  # noqa: F401, fits is public
from spikedistill.recipes.distilling.teacher import (
    Calls,
    accuracy,
    cached,
    check_teacher,
    seen_by_teacher,
    streams,
    told,
)
from spikedistill.report.activity import activity
from spikedistill.spec import SpecError, bind, near, parse


class Config(BaseModel):
    """Settings of `distill`. A method's own are given under its name: --bkd.blur 0.4, or "bkd(blur=0.4)"."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, validate_default=True)

    data: str = "fashion-mini"
    """A name of `spikedistill list data`, folder:PATH with a folder of images for each class, or file.py:function."""
    root: str | None = None
    """Folder where the data set's files are."""
    size: Annotated[int, Field(ge=4)] | None = None
    """Height and width that images of a folder are brought to."""
    augment: str = "default"
    """Augmentation of training images, such as "flip|shift(2)", "none", or the data set's default."""
    valid: Annotated[float, Field(gt=0, lt=0.9)] = 0.1
    """Share of the training data held out; every choice is made on it."""
    download: bool = False
    """Let torchvision fetch a set that is not in root."""
    frames: str | None = None
    """What a frame of events holds: number, time, voxel or surface; None for what suits the data."""
    encode: Literal["direct", "bernoulli", "poisson"] = "direct"
    """How images become spikes: direct leaves that to the first layer; rate codes are drawn for every batch."""
    pair: str | None = None
    """Images of the classes of the events, for ckd and static2dvs: fashion-mini, folder:PATH, or another name."""
    pair_root: str | None = None
    """Folder where the files of these images are."""
    pair_size: Annotated[int, Field(ge=4)] | None = None
    """Height and width that these images are brought to, where they are of a folder."""
    pair_classes: Literal["all", "common"] = "all"
    """common drops classes that only the events or only the images have; all says which they are."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training samples that is used, the same of every class; of pairs, of the events alone."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode images, where they do not fit in memory."""
    teacher: str | None = None
    """A run folder, "timm:NAME(pretrained=True)", "hf:NAME(pretrained=True)" (Hugging Face), or file.py:function."""
    student: str = "small"
    """A model of `spikedistill list models` with settings, "small(widths=(32, 64))", or file.py:function."""
    transform: list[str] = []
    """Rewrites of the student before training, "tt_snn(rank=8)"; folded back into plain layers after it."""
    method: list[str] = ["bkd"]
    """Methods of `spikedistill list methods`, or file.py:function, joined by + or commas."""
    steps: Annotated[int, Field(ge=1)] = 4
    """Time steps T of the student; of events, the frames of a sample."""
    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training data."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Images in a batch, over all processes."""
    optimizer: str = "adamw"
    """adamw, sgd, or, to prune while training, stds(threshold=1.0, curve=sine) and sgd_stds(threshold=0.1)."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Highest learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of weights; biases, norms and leaks have none."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls; step: by ten after half and three quarters."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of training over which the learning rate rises."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches per update."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights that is evaluated and kept."""
    select: Literal["best", "last"] = "best"
    """Keep the epoch with the best validation accuracy, or the last."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of initialisation, order and every random draw. The split is the same for every seed."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto: bf16-mixed where the processor or GPU has it, else 32-true."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    devices: Annotated[int, Field(ge=1)] = 1
    """Processes (DDP), one a device; --accelerator cpu takes as many as you like."""
    recompute: bool = False
    """Keep only what lies between the student's stages and compute the rest again in backward: for large T."""
    cache_teacher: str = ""
    """Folder where the teacher's outputs are kept between epochs and runs, or "memory" for this run; empty: nowhere."""
    cache_limit: Annotated[float, Field(gt=0)] = 8.0
    """GiB that they may take; what is over is computed each time."""
    out: str = "runs/distill"
    """Folder of the run. An interrupted run in it goes on; anything else in it is never overwritten."""
    overwrite: bool = False
    """Lose the run that is in `out`."""
    save_every: Annotated[float, Field(ge=0)] = 30.0
    """Seconds between checkpoints within an epoch."""
    test: bool = True
    """Measure on the test data, once, when training has ended; --no-test leaves them untouched."""
    progress: bool = True
    """Show progress."""

    @field_validator("method", "transform", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split(value) if isinstance(value, str) else value


def split(text: str, at: str = ",+") -> list[str]:
    """'kd + bkd(blur=0.4, tau=2)' -> ['kd', 'bkd(blur=0.4, tau=2)']: at commas and + (any of `at`) outside brackets."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter in at and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words if word.strip()]


def read(settings: Mapping[str, Any], config: type[BaseModel] = Config) -> tuple[Any, list[str]]:
    """Settings -> a validated config and every mistake that can be found without loading anything."""
    settings = named(**settings)
    try:
        c, mistakes = config.model_validate(dict(settings)), []
    except ValidationError as error:
        mistakes = []
        for problem in error.errors():
            path = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                mistakes.append(f"{path}: no such setting; {near(path, config.model_fields)}")
            elif problem["type"] == "missing":
                choices = get_args(config.model_fields[path].annotation)
                mistakes.append(f"{path}: it must be given{', one of ' + ', '.join(choices) if choices else ''}")
            else:
                expected = problem["msg"].replace("Input should be ", "it should be ").removeprefix("Value error, ")
                mistakes.append(f"{path}: {problem['input']!r} will not do: {expected}")
        good = {k: v for k, v in settings.items() if k not in {str(p["loc"][0]) for p in error.errors()}}
        try:
            c = config.model_validate(good)
        except ValidationError:
            c = None
    return c, mistakes


def named(**settings: Any) -> dict[str, Any]:
    """The settings, paths as text."""
    return {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in settings.items()}


def repeated(name: str, given: Sequence[Any]) -> list[str]:
    """The mistake of a list that is empty or has something twice."""
    text = ",".join(map(str, given)) or "none"
    return [] if given and len({*given}) == len(given) else [f"{name}: {text}: give each once, such as 0,1,2"]


def check(c: Config, given: Iterable[str] = ()) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The methods with their settings, and the mistakes in a config. `given` names what was passed as an object."""
    chosen, mistakes, extra = [], [], dict(c.model_extra or {})
    for text in c.method:
        try:
            name, positional, keywords = parse(text)
        except SpecError as error:
            mistakes += [f"method: {m}" for m in error.mistakes]
            continue
        if own.is_own(name):
            wrong = own.check(name, keywords, skip=2)
            mistakes += [f"method: {m}" for m in wrong]
            if wrong:
                continue
        elif name not in METHODS:
            flags = {"transform": transforms.TRANSFORMS, "optimizer": optim.OPTIMIZERS}
            flag = next((flag for flag, names in flags.items() if name in names), "")
            hint = f"it is given as --{flag} {name}" if flag else near(name, METHODS)
            mistakes.append(f"method: '{name}' is unknown; {hint}")
            continue
        if positional:
            mistakes.append(f"method: {text}: give settings by name, {name}(key=value)")
        section = extra.pop(name, {})
        if not isinstance(section, Mapping):
            mistakes.append(f"{name}: {section!r} will not do: give settings as {name}.KEY")
            section = {}
        for key in [key for key in section if key in keywords]:
            one, other = (bind(builder(name), {key: of[key]}, name, skip=2)[0] for of in (keywords, section))
            if one != other:
                mistakes.append(
                    f"{name}.{key}: it is {keywords[key]} in '{text}' and {section[key]} here: give it once"
                )
        clean, wrong = bind(builder(name), keywords | dict(section), name, skip=2)
        mistakes += wrong
        chosen.append((name, clean))
    if not c.method:
        mistakes.append(f"method: none is given; {near('', METHODS)}")
    for key, value in extra.items():
        if key in METHODS and isinstance(value, Mapping):
            mistakes.append(f"{key}: settings for a method that is not used; --method is {','.join(c.method)}")
        else:
            mistakes.append(f"{key}: no such setting; {near(key, [*Config.model_fields, *METHODS])}")
    if "data" not in given:
        mistakes += [f"data: {m}" for m in data_sets.check(c.data, **source(c))]
        mistakes += check_streams(c, [name for name, _ in chosen])
    if "student" not in given:
        mistakes += [f"student: {m}" for m in models.check(c.student)]
    if "teacher" not in given:
        mistakes += [f"teacher: {m}" for m in check_teacher(c.teacher, [name for name, _ in chosen])]
    for text in c.transform:
        mistakes += [f"transform: {m}" for m in transforms.check(text, ["shape"], c.select, c.ema)]
    mistakes += [f"optimizer: {m}" for m in optim.check(c.optimizer, c.select, c.ema, [*c.transform, *c.method])]
    try:
        data_sets.parse("none" if c.augment == "default" else c.augment)
    except ValueError as error:
        mistakes.append(f"augment: {error}")
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    if c.accelerator in backends and not backends[c.accelerator].is_available():
        mistakes.append(f"accelerator: this torch sees no {c.accelerator.upper()} device; use cpu or auto")
    return chosen, mistakes


def source(c: Config) -> dict[str, Any]:
    """What both `data.check` and `data.load` take."""
    return data_sets.settings_of(c.model_dump())


def check_streams(c: Config, methods: Sequence[str]) -> list[str]:
    """Methods that learn from images beside the events need both."""
    needy = [m for m in methods if streams(m)]
    if not needy or c.pair is not None:
        return []
    hint = "name them, as in --data fashion-events --pair fashion-mini"
    return [f"pair: {', '.join(needy)} learns from events and from images of the same classes: {hint}"]


def distill(
    student: str | nn.Module = "small",
    teacher: str | nn.Module | None = None,
    data: "str | data_sets.Data" = "fashion-mini",
    methods: str | Sequence[str] = "bkd",
    **settings: Any,
) -> dict[str, Any]:
    """Distil a teacher into a spiking student and return what was measured (the content of `result.json`).

    student, teacher, data: names as on the command line, or your own module and `spikedistill.data.from_tensors(...)`.
    A module that is passed in is trained in place; `spikedistill.load(result["out"])` gives the student of a name.
    settings: the flags of `spikedistill distill`, and method settings as bkd={"blur": 0.4}.
    Raises SpecError listing every mistake in them before anything is loaded.
    """
    objects = named(student=student, teacher=teacher, data=data)
    given = {k: v for k, v in objects.items() if v is not None and not isinstance(v, str)}
    texts = {k: v if isinstance(v, str) else f"<{type(v).__name__}>" for k, v in objects.items() if v is not None}
    c, mistakes = read(texts | {"method": methods} | settings)
    if c is not None:
        mistakes += check(c, given)[1]
        if "data" in given:
            c, wrong = as_given(c, given["data"], settings)
            mistakes += wrong
    if mistakes:
        raise SpecError(mistakes)
    return run(c, **given)  # pyrefly: ignore


def as_given(c: Config, data: Any, settings: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The config with batches and time steps of data given as an object, and the settings that could not change it."""
    size, of_data = data.train.batch_size, {*data_sets.settings_of(c.model_dump()), "augment", "valid"} - {"steps"}
    idle = sorted(of_data & settings.keys())
    mistakes = [f"{key}: the data are given as an object, which has its own; leave it out" for key in idle]
    if settings.get("batch", size) != size:
        mistakes.append(f"batch: the data that are given have batches of {size}: make them with batch_size={c.batch}")
    steps = c.steps if data.steps is None else data.steps
    if settings.get("steps", steps) != steps:
        mistakes.append(f"steps: the data that are given have {steps} frames a sample: make them with steps={c.steps}")
    return c.model_copy(update={"batch": size, "steps": steps}), mistakes


def run(c: Config, student: Any = None, teacher: Any = None, data: Any = None, title: str = "") -> dict[str, Any]:
    """Run a checked config; a model or data set given here is used in place of the one it names."""
    if not c.out:
        raise SpecError(["out: the name of the folder is empty"])
    out = Path(c.out)
    if c.teacher and out.exists() and out.resolve() in (Path(c.teacher).resolve(), Path(c.teacher).resolve().parent):
        raise SpecError([f"out: '{out}' is the folder of the teacher: choose another --out"])
    finished = runs.open_run(out, c.model_dump(exclude={"overwrite"}), c.overwrite, Config().model_dump())
    if finished:
        if (out / "origin.json").exists():
            refuse_others(out, made_of(c, data or load_data(c), teacher))
        if isinstance(student, nn.Module):
            runs.load(out, rewritten(student, c, finished.get("shape", ()), fold=True))
        say(c, f"{out} holds this finished run: nothing to do")
        return finished
    try:
        return train(c, out, student, teacher, data, title)
    except Exception:
        runs.withdraw(out)
        raise


def made_of(c: Config, data: Any, teacher: Any = None) -> dict[str, Any]:
    """The origin of a run. teacher: one that takes the place of the config's."""
    return origin(data, c.teacher if teacher is None else teacher, [c.data, c.student, c.teacher, *c.method])


def refuse_others(out: Path, now: Mapping[str, Any]) -> None:
    """Raise SpecError where the run in a folder was made with other data or another teacher."""
    hint = "choose another --out, or --overwrite to lose it"
    why = f"not what the run in '{out}' was made with, though the name is the same: {hint}"
    if others := [f"{key}: this is {why}" for key in changed(out, now)]:
        raise SpecError(others)


def train(c: Config, out: Path, student: Any, teacher: Any, data: Any, title: str) -> dict[str, Any]:
    """Put everything together, try it on two samples, train, measure, and write the result into the run folder."""
    fabric = make_fabric(c)
    data = data or load_data(c)
    if data.valid is None and not c.test:
        raise SpecError(["test: these data have no validation part, so nothing would be measured with --no-test"])
    shown = seen_by_teacher(data, [parse(m)[0] for m in c.method])
    origin_now = made_of(c, data, teacher)
    refuse_others(out, origin_now)
    student, teacher = networks(c, data, student, teacher, shown)
    probe = two(data)
    fit_both(student, teacher, probe, data, shown)
    plan = planned(c, student, teacher)
    batches = replace(data.train, seed=c.seed)
    updates = c.epochs * -(-batches.batches(fabric.world_size) // c.accumulate)
    stage = Stage(batches, **vars(plan), **training(c, student, updates), valid=data.valid)
    rehearse(stage, probe)
    known = accuracy(teacher, shown, fabric)
    if known is not None:
        say(c, told(known, len(data.classes)))
    frames, calls, cache = frames_left(data, plan.prepare, probe), Calls(teacher), teacher_cache(c)
    data = data_sets.at_frames(data, frames)
    passes = cached(stage.passes, teacher, cache)
    stage = replace(stage, passes=passes, prepare=calls.counting(stage.prepare), valid=data.valid)
    runs.reset_peak_memory()
    if fabric.global_rank == 0:
        runs.begun(out)
        runs.write_json(out / "origin.json", origin_now)
    began = time.perf_counter()
    title = title or f"{out.name} ({'+'.join(parse(m)[0] for m in c.method)})"
    history = fit(stage, out, fabric=fabric, save_every=c.save_every, progress=c.progress, title=title)
    peak = runs.peak_memory(fabric.device) if calls.batches else None  # of training, which is less than measuring takes
    trained, own = models.parameters(student), {id(p) for p in student.parameters()}
    extra = sum(p.numel() for p in Trainee(stage).parameters() if id(p) not in own)
    if transforms.foldable(student):
        transforms.merge(student)
    result = measure(c, student, data, history, fabric)
    result["peak_memory_bytes"] = peak
    result["wall_seconds"] = time.perf_counter() - began
    result["shape"] = list(data.shape)
    result["teacher_calls"] = calls.report(cache)
    result["teacher_accuracy"] = known  # on validation
    result["loss"] = {name: "schedule" if callable(weight) else weight for name, (weight, _) in plan.loss.items()}
    if cache:
        result["teacher_cache"] = cache.counters
    result["parameters"] = {
        "student": models.parameters(student),
        "nonzero": sum(int(p.count_nonzero()) for p in student.parameters()),
        "student_in_training": trained,
        "training_only": extra,
        "teacher": models.parameters(teacher) if teacher is not None else 0,
    }
    result["out"] = str(out)
    if fabric.global_rank == 0:
        about = {"frames": frames} if frames else {}  # of a recording, where the student does not see all
        runs.save(student, out / "student.safetensors", classes=list(data.classes), shape=list(data.shape), **about)
        runs.write_json(out / "result.json", result)
    fabric.barrier()
    return result


def load_data(c: Config) -> Any:
    how = dict(valid=c.valid, batch_size=c.batch, augment=c.augment, workers=c.workers)
    data = data_sets.load(c.data, **source(c), **how)
    if own.is_own(c.data):
        mistakes, size = [], data.train.batch_size
        if size != c.batch:
            mistakes.append(
                f"batch: '{c.data}' makes batches of {size}: let it take batch_size, or give --batch {size}"
            )
        if data.steps not in (None, c.steps):
            hint = f"let it take steps, or give --steps {data.steps}"
            mistakes.append(f"steps: '{c.data}' gives {data.steps} frames a sample: {hint}")
        if mistakes:
            raise SpecError(mistakes)
    return data


def networks(
    c: Config, data: Any, student: Any = None, teacher: Any = None, shown: Any = None
) -> tuple[nn.Module, nn.Module | None]:
    """The student as it is trained, drawn with the seed, and the teacher; what is given takes the place of its name.

    shown: the data that the teacher sees, where they are not the student's.
    """
    torch.manual_seed(c.seed)

    def image(data: Any) -> dict[str, Any]:
        return dict(classes=len(data.classes), channels=data.shape[0], mean=data.mean, std=data.std, steps=c.steps)

    student = rewritten(models.build(student or c.student, **image(data)), c, data.shape)
    if c.recompute:
        models.recompute(student)
    if teacher is None and c.teacher:
        trained, shown = Path(c.teacher).exists(), data if shown is None else shown
        load = partial(runs.load, fast=False, trust_code=True)
        # another last layer for these classes would be drawn, and teach noise
        given = {} if models.keeps_classes(c.teacher) else image(shown)
        teacher = load(c.teacher) if trained else models.build(c.teacher, **given)
        known = runs.about(c.teacher).get("classes") if trained else None
        numbers = [str(i) for i in range(len(shown.classes))]  # what classes without names are called
        if known and known != [*shown.classes] and numbers not in (known, [*shown.classes]):
            theirs = f"{shown.name} has {_some(shown.classes)}; train it on these images"
            if set(known) == set(shown.classes):
                theirs = f"{shown.name} has them in another order"
            raise SpecError([f"teacher: '{c.teacher}' knows the classes {_some(known)}, {theirs}"])
    return student, teacher


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + ", ..." * (len(names) > most)


def measure(c: Config, student: nn.Module, data: Any, history: dict[str, Any], fabric: Any) -> dict[str, Any]:
    """What a result file holds. The test data are touched here and nowhere else, once."""
    result: dict[str, Any] = {}
    if c.test:
        result["test"] = evaluate(student, data.test, fabric=fabric)
        result["test"]["touched"] = "once, after training; every choice was made on the validation split"
    if data.valid is not None:
        result["valid"] = evaluate(student, data.valid, fabric=fabric)
    # in float32: bfloat16 cannot tell means of spikes apart
    result["activity"] = activity(student, data.test if data.valid is None else data.valid)
    result |= {
        "best_epoch": history["best"] + 1,
        "epochs": len(history["epochs"]),
        "train_seconds": history["seconds"],
        "train_cpu_seconds": history["cpu_seconds"],
        "precision": str(fabric._precision.precision),
        "device": str(fabric.device),
        "processes": fabric.world_size,
        "seed": c.seed,
    }
    return result


def teacher_cache(c: Config) -> Cache | None:
    """Where the teacher's outputs are kept, if anywhere. SpecError where there is no such place."""
    if not c.cache_teacher:
        return None
    try:
        return Cache(None if c.cache_teacher == "memory" else c.cache_teacher, c.cache_limit * 2**30)
    except OSError as error:
        raise SpecError([f"cache_teacher: cannot write to '{c.cache_teacher}': {error.strerror}"]) from None


def make_fabric(c: Config) -> Any:
    """Devices and precision of a config, launched."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy = DDPStrategy(find_unused_parameters=True) if c.devices > 1 else "auto"
    fabric = Fabric(accelerator=c.accelerator, strategy=strategy, devices=c.devices, precision=precision(c))
    fabric.launch()
    return fabric


def precision(c: Config) -> Literal["32-true", "bf16-mixed"]:
    """What `auto` means on this machine."""
    if c.precision != "auto":
        return c.precision
    if c.accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if runs.bf16_is_fast() else "32-true"


def training(c: Config, student: nn.Module, updates: int) -> dict[str, Any]:
    """The part of a Stage that is optimisation."""
    falls: dict[str, Schedule] = {"cosine": cosine(), "step": steps(), "constant": lambda p: 1.0}
    optimizer = optim.make(c.optimizer, lr=c.lr, weight_decay=c.weight_decay, updates=updates, student=student)
    names = ("epochs", "clip", "accumulate", "ema", "select", "seed")
    how = {name: getattr(c, name) for name in names}
    rise = c.warmup if c.warmup * updates > 1 else 0.0  # the first update has progress 0, and may be the only one
    return how | {"optim": optimizer, "lr": warmup(rise, falls[c.schedule])}


def rewritten(student: nn.Module, c: Config, shape: Sequence[int], fold: bool = False) -> nn.Module:
    """The student after its transforms, in place; `fold`: as it is after training."""
    try:
        for text in c.transform:
            transforms.apply(student, text, shape=list(shape)[-3:])
    except SpecError as error:
        raise SpecError(f"transform: {m}" for m in error.mistakes) from None
    return transforms.merge(student) if fold and transforms.foldable(student) else student


def planned(c: Config, student: nn.Module, teacher: nn.Module | None) -> Plan:
    """The merged plan of the config's methods. Raises SpecError naming the method that cannot be built."""
    plans, mistakes = [], []
    for name, settings in check(c, ("student", "teacher", "data"))[0]:
        try:
            plans.append(builder(name)(student, teacher, **settings))
        except SpecError as error:
            mistakes += error.mistakes
        except (TapError, ValueError) as error:  # of settings that do not go together
            mistakes.append(f"{name}: {str(error).removeprefix(f'{name}: ')}")
        except Exception as error:
            if not own.is_own(name):
                raise
            mistakes.append(f"{name}: {type(error).__name__}: {error}{own.line(name, error)}")
    if (gates := transforms.plan(student)) is not None:
        plans.append(gates)
    try:
        if not mistakes:
            return merge(*plans)
    except MergeError as error:
        mistakes.append(f"method: {' and '.join(c.method)} do not go together: {error}")
    raise SpecError(mistakes)


def say(c: Config, text: str) -> None:
    if c.progress:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from spikedistill.cli import script

    script(__name__)
