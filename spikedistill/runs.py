"""Run folders: what is in one, who may write there, and the student file that carries no code.

config.json          the resolved settings; `spikedistill distill --config RUN/config.json --out NEW` runs it again
machine.json         versions, processor, command, when it began
metrics.jsonl        one line an epoch
checkpoint.pt        where an interrupted run goes on
student.safetensors  weights, and how to build the model in the file's metadata
result.json          the measured result, written last: a folder with it is finished
"""

import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import is_zipfile

import torch
from torch import nn

from spikedistill.spec import SpecError

FILES = ("config.json", "machine.json", "origin.json")  # written before anything is trained
FILES += ("metrics.jsonl", "checkpoint.pt", "student.safetensors", "result.json")
BEFORE = ".before"  # where a run that is to be overwritten lies until the new one trains
FORMAT = 1
NEEDED = 64 * 2**20  # bytes: less room than this and a run would die in the middle


def open_run(
    out: Path, config: dict[str, Any], overwrite: bool = False, defaults: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any] | None:
    """Make a folder ready for a run and return its result where this very run is finished there already.

    A folder with the same config is gone on with; `defaults` are of settings that an earlier version did not have.
    Raises SpecError, touching nothing, for a folder with another config or with foreign files, one that cannot be
    written, or a disk that is nearly full. `overwrite` puts what a run left there aside, and no other file: `begun`
    removes it, `withdraw` brings it back.
    """
    config = json.loads(json.dumps(config))  # as it is read back: a tuple is a list there
    try:
        out.mkdir(parents=True, exist_ok=True)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes, the first
            if (out / BEFORE).exists():  # the process that put it there was killed
                withdraw(out)
            if overwrite and (out / "config.json").exists():
                (out / BEFORE).mkdir(exist_ok=True)
                _move(out, out / BEFORE)
        probe = out / ".write-test"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise SpecError([f"out: cannot write to '{out}': {error.strerror or error}"]) from None
    if (free := shutil.disk_usage(out).free) < NEEDED:
        raise SpecError([f"out: the disk of '{out}' is full ({free / 2**20:.0f} MiB left, {NEEDED // 2**20} needed)"])
    if not (out / "config.json").exists():
        if there := strangers(out):
            raise SpecError([f"out: '{out}' holds {', '.join(there)} but no config.json: choose another folder"])
        write_json(out / "machine.json", machine())
        write_json(out / "config.json", config)  # last: who sees it finds the other, too
        return None
    if changes := differences({**defaults, **read_json(out / "config.json")}, config, out):
        hint = "choose another --out, or --overwrite to lose it"
        raise SpecError([f"out: '{out}' holds a run with other settings ({changes}); {hint}"])
    if mistakes := damaged(out):
        raise SpecError(mistakes)
    return read_json(out / "result.json") if (out / "result.json").exists() else None


def strangers(out: Path) -> list[str]:
    """What of a run is in a folder, though it has no config.json; machine.json is written before that."""
    return sorted(p.name for p in out.iterdir() if p.name in FILES and p.name != "machine.json")


def damaged(out: Path) -> list[str]:
    """The mistake where a run cannot go on from its checkpoint."""
    file = out / "checkpoint.pt"
    cut = file.exists() and not is_zipfile(file)
    return [f"out: '{file}' is damaged: delete it, and the run begins again"] if cut else []


def begun(out: Path) -> None:
    """Remove what `open_run` has put aside: from here on the new run is worth keeping."""
    shutil.rmtree(out / BEFORE, ignore_errors=True)


def withdraw(out: Path) -> None:
    """Take back what `open_run` did where nothing was trained: the mended command finds the folder as it was."""
    if not any((out / name).exists() for name in FILES[3:]):
        for name in FILES[:3]:
            (out / name).unlink(missing_ok=True)
        if (out / BEFORE).exists():
            _move(out / BEFORE, out)
            begun(out)


def _move(source: Path, target: Path) -> None:
    for name in FILES:
        if (source / name).exists():
            os.replace(source / name, target / name)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> str:
    """What of two configs is not the same and changes what is trained, in words; empty where nothing.

    Where data and teacher lie may change where origin.json in `folder` says what they are: `origin.changed` compares.
    """
    known = read_json(folder / "origin.json") if (folder / "origin.json").exists() else {}
    neutral = NEUTRAL + (("root", "pair_root") if known.get("data") else ())
    neutral += ("teacher",) if known.get("teacher") and now.get("teacher") else ()
    differs = [k for k in sorted(before.keys() | now) if k not in neutral and before.get(k) != now.get(k)]
    return "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in differs[:6])


NEUTRAL = ("out", "overwrite", "progress", "save_every", "cache_teacher", "cache_limit", "workers", "download")
"""Settings that do not change what is trained."""


def machine() -> dict[str, Any]:
    """Versions and hardware, for a reader who wants to know where a number comes from."""
    packages = ("spikedistill", "torch", "lightning-fabric", "numpy")
    info: dict[str, Any] = {
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "system": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name.replace("cli.py", "spikedistill"), *sys.argv[1:]],
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def bf16_is_fast() -> bool:
    """Whether the processor multiplies bf16 itself (AVX-512 BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so perhaps absent
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def reset_peak_memory() -> None:
    """Start measuring anew, where the system can: on Linux and on CUDA."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use: of tensors on CUDA, else of the whole process (torch itself takes a few hundred MB of it).

    From VmHWM where there is one: ru_maxrss begins with the memory of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_json(path: Path, value: Any) -> None:
    """Write it whole or not at all, whoever else writes it at the same time, on this machine or another."""
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SpecError([f"'{path}' cannot be read: {error}"]) from None


def save(model: nn.Module, path: Path, **about: Any) -> None:
    """Write a model's weights with what is needed to build it again. `about` is kept as text beside it."""
    from safetensors.torch import save_file

    spec = getattr(model, "spec", None)
    info = {"format": FORMAT, "spikedistill": metadata.version("spikedistill"), "spec": spec} | about
    # clones, because safetensors refuses tensors that share memory, such as one that has two names
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.part")
    save_file(tensors, temporary, {"spikedistill": json.dumps(info)})
    os.replace(temporary, path)


def about(path: str | Path) -> dict[str, Any]:
    """What a student file (or the one of a run folder) says of itself. Raises SpecError where it is not one of ours."""
    from safetensors import SafetensorError, safe_open

    path = student_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            raise SpecError(
                [f"'{path}' is not a student file: it is a pickle, which can hold code and is never loaded"]
            )
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("spikedistill")
        info = json.loads(text) if text else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError([f"'{path}' is not a student file, or is damaged: {error}"]) from None
    if not isinstance(info, dict) or type(info.get("format")) is not int:
        raise SpecError([f"'{path}' was not written by spikedistill: it does not say how to build its model"])
    if info["format"] > FORMAT:
        raise SpecError([f"'{path}' is of a newer format ({info['format']}); this version reads up to {FORMAT}"])
    if info["format"] < 1:
        raise SpecError([f"'{path}' is of a format that never was ({info['format']})"])
    return info


def student_file(path: str | Path) -> Path:
    path = Path(path)
    file = path / "student.safetensors" if path.is_dir() else path
    if not file.is_file():
        why = "the run is not finished" if (path / "config.json").exists() else "it is no run folder"
        raise SpecError([f"'{path}' holds no student.safetensors: {why if path.exists() else 'it does not exist'}"])
    return file


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    fast: bool = True,
    bf16: bool | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """The trained model of a run folder or student file, in evaluation mode, on the CPU.

    model: the module to fill, for one that was built by your own code; it is returned as it is.  fast: made ready for
    inference by `inference.prepare`: norms folded, bfloat16 where the processor multiplies it itself, no gradient.
    fast=False gives the model as it was trained, in float32, to go on training, to distil from or to look into.
    bf16: of a fast one, whether it computes in bfloat16; None for where the processor multiplies it itself.
    trust_code: import the file.py that built the student, where its `--student file.py:function` did; nothing else in
    a file can make anything run.
    Raises SpecError where the file is not ours, is damaged, of a newer version, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from spikedistill import models

    file, info = student_file(path), about(path)
    build = None if model is not None else _builder(file, info, trust_code)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise SpecError([f"'{file}' is damaged: {error}"]) from None
    if build:
        ours = info["spec"]["model"].split("(")[0].strip() in models.MODELS
        if ours and not info["spec"].get("transforms"):  # code of others and rewrites may not know this device
            with torch.device("meta"):
                _fits(file, build(), tensors)  # before any memory is taken
        model = build()
    assert model is not None
    _fits(file, model, tensors)
    model.load_state_dict(tensors)
    if not fast or build is None:
        return model.eval()
    from spikedistill.inference import prepare

    try:
        return prepare(model, _shape(info), bf16=bf16)
    except (RuntimeError, ValueError, TypeError) as error:
        raise SpecError([f"'{file}' does not run on the shape it names, {info['shape']}: {error}"]) from None


def _builder(file: Path, info: dict[str, Any], trust_code: bool) -> Callable[[], nn.Module]:
    """What builds the model that a file describes. SpecError where it describes none, or would import code."""
    from spikedistill import models, transforms

    spec = info.get("spec")
    if spec is None:
        raise SpecError([f"'{file}' holds a model of your own code: build it and call load('{file}', model)"])
    wanted = {"model": str, "settings": dict, "transforms": list}
    given = {"transforms": []} | spec if isinstance(spec, dict) else {}
    if any(type(given.get(key)) is not kind for key, kind in wanted.items()):
        raise SpecError([f"'{file}' is damaged: it does not say how to build its model"])
    if ".py:" in spec["model"] and not trust_code:
        hint = "if you trust it, load with trust_code=True (--trust-code)"
        raise SpecError([f"'{file}' is built by code, {spec['model']}, which would be imported: {hint}"])
    text = re.sub(r"pretrained\s*=\s*True", "pretrained=False", spec["model"])  # its weights come from the file

    def build() -> nn.Module:
        try:
            return transforms.apply_spec(models.build(text, **spec["settings"]), spec)
        except SpecError as error:
            raise SpecError(
                [f"'{file}' does not describe a model of this version: {m}" for m in error.mistakes]
            ) from None
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, OverflowError, MemoryError) as error:
            raise SpecError([f"'{file}' does not describe a model that can be built: {error}"]) from None

    return build


def _fits(file: Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """SpecError unless the tensors of a file are those of the model: names, shapes and types."""
    own = model.state_dict()
    mistakes = [f"missing tensor {k}" for k in own.keys() - tensors.keys()]
    mistakes += [f"unexpected tensor {k}" for k in tensors.keys() - own.keys()]
    for k in own.keys() & tensors.keys():
        if tensors[k].shape != own[k].shape:
            mistakes.append(f"{k} is {list(tensors[k].shape)}, the model has {list(own[k].shape)}")
        elif tensors[k].dtype != own[k].dtype:
            mistakes.append(f"{k} is {tensors[k].dtype}, the model has {own[k].dtype}")
    if mistakes:
        raise SpecError([f"'{file}' does not fit its model {type(model).__name__}: {'; '.join(sorted(mistakes)[:5])}"])


def _shape(info: dict[str, Any]) -> list[int] | None:
    """(channels, height, width) of what a student file says it was trained on; None where it does not say."""
    shape = info.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        return None
    return shape if math.prod(shape) <= 2**26 else None  # a damaged file must not take all memory
