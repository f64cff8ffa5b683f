"""Outputs of frozen passes, kept between epochs and runs: what a sample gives is asked of a model once.

A sample is known by the bytes that reach the model, however it was augmented; a pass by its model's code, settings and
weights, taps, T, precision, kind of device and versions of torch and spikedistill. Both are 128-bit hashes. A model has
to be a function of its input; its code is the files that its classes and functions are from, not what those import.
FOLDER/<pass>.outputs is a line of JSON that says what a record holds, then records of one size, only ever appended
under a lock: 16 bytes of key, CRC-32 of the rest, the bytes of each tensor.
"""

import inspect
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from spikedistill import __version__
from spikedistill.core.output import Output
from spikedistill.core.taps import infer
from spikedistill.neurons.kernels import sparse

HEAD = 20  # bytes of a record before its tensors
COUNTERS = ("asked", "hits", "full", "computed", "computed_seconds", "seconds", "cpu_seconds")
LIBRARIES = {"torch", *sys.stdlib_module_names}  # whose versions stand for their code
# of a module, what torch needs and says nothing of its outputs, how it was built (with the path of its file), state of
# spikingjelly's neurons, which is reset before every call, and an address that torch.compile keeps
APART = {*vars(nn.Module()), "spec", "_memories", "_torchdynamo_wrapper_id"} - {"_parameters", "_buffers", "_modules"}


class Cache:
    """Give it to a Pass. folder: where, shared with other processes; None keeps all in memory. limit: bytes.

    Where the limit is reached, it warns once and goes on without storing: `full`. asked, hits: samples, so far, in
    `calls`. computed, computed_seconds: samples that models were run on, in `ran` calls of them, and how long that
    took. seconds, cpu_seconds: of that, what no other run has to spend again, for the outputs are in the folder.
    """

    def __init__(self, folder: str | Path | None = None, limit: float = 8 * 2**30):
        self.folder, self.limit = Path(folder) if folder else None, limit
        self.tables: dict[str, Table] = {}
        self.prints: dict[int, tuple[nn.Module, tuple[list[Tensor], list], str]] = {}
        self.calls, self.ran, self.asked, self.hits, self.computed = 0, 0, 0, 0, 0
        self.stores, self.full = True, False
        self.computed_seconds, self.seconds, self.cpu_seconds = 0.0, 0.0, 0.0
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def counters(self) -> dict[str, Any]:
        """What a result file holds of it. A run that goes on after an interruption sets what it had counted."""
        return {name: getattr(self, name) for name in COUNTERS}

    @counters.setter
    def counters(self, counted: Mapping[str, Any]) -> None:
        vars(self).update({name: counted[name] for name in COUNTERS if name in counted})

    @sparse.limited(-1)  # its choice would make what a sample gives hang on the rest of the batch
    def infer(self, model: nn.Module, x: Tensor, steps: int | None = None, taps: Sequence[str] = ()) -> Output:
        """As `taps.infer`. The model sees the missing samples alone where that changes no bit, else the whole batch."""
        dim = 1 if x.ndim == 5 else 0
        samples, taps = x.detach().movedim(dim, 0), sorted(taps)
        mark = self.fingerprint(model)
        what = [mark, steps, getattr(model, "steps", None), taps, x.dtype, samples.shape[1:]]
        kind = x.device.type
        what += [kind, torch.__version__, __version__]
        what += [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)]
        name = blake2b(repr(what).encode(), digest_size=16).hexdigest()
        table = self.tables.setdefault(name, Table(self.folder and self.folder / f"{name}.outputs"))
        keys = [blake2b(row, digest_size=16).digest() for row in raw(samples)]
        rows = table.read(keys)
        missing = [i for i, key in enumerate(keys) if key not in rows]
        self.calls += 1
        self.asked, self.hits = self.asked + len(keys), self.hits + len(keys) - len(missing)
        if not keys:
            self.ran += 1
            return infer(model, x, steps, taps)
        if missing:
            eights = -(-len(missing) // 8) * 8
            whole = eights >= len(keys) or not table.separable
            ask = [*range(len(keys))] if whole else (missing * 8)[:eights]
            began, cpu = time.perf_counter(), time.process_time()
            out = infer(model, x if whole else x.index_select(dim, torch.tensor(ask, device=x.device)), steps, taps)
            if kind == "cuda":
                torch.cuda.synchronize(x.device)
            took, cpu = time.perf_counter() - began, time.process_time() - cpu
            self.ran, self.computed = self.ran + 1, self.computed + len(ask)
            self.computed_seconds += took
            if table.separable is None and len(keys) > 8:
                self.ran += 1
                few = infer(model, x.narrow(dim, 0, 8), steps, taps)
                table.separable = all(torch.equal(a[:, :8], b) for a, b in zip(parts(out), parts(few)))
            # what it wrote while it ran is its state, and no other model
            self.prints[id(model)] = model, written(model), mark
            fields, found = encode(out, taps)
            new = {keys[i]: row for i, row in zip(ask, found) if keys[i] not in rows}
            if self._store(table, fields, new) and self.folder:
                self.seconds, self.cpu_seconds = self.seconds + took, self.cpu_seconds + cpu
            if whole:
                return out
            rows |= new
            return decode(np.stack([rows[key] for key in keys]), fields, x.device)
        return decode(np.stack([rows[key] for key in keys]), table.fields, x.device)

    def _store(self, table: "Table", fields: list, new: dict[bytes, np.ndarray]) -> bool:
        used = sum(t.bytes for t in self.tables.values())
        if self.folder:
            used = sum(file.stat().st_size for file in self.folder.glob("*.outputs"))
        why = f"has reached its limit of {self.limit / 2**30:g} GiB"
        if self.stores and used + sum(HEAD + len(row) for row in new.values()) <= self.limit:
            try:
                table.append(fields, new)
                return True
            except OSError as error:
                why = f"cannot be written ({error.strerror})"
        if self.stores:
            warnings.warn(f"the cache in {self.folder or 'memory'} {why}: it is read, but stores no more", stacklevel=2)
        self.stores, self.full = False, True
        return False

    def fingerprint(self, model: nn.Module) -> str:
        """Of code, settings and tensors; taken again when a tensor was written to or exchanged."""
        now, before = written(model), self.prints.get(id(model))
        if before is None or before[1][1] != now[1]:
            mark = blake2b(repr(described(model, {})).encode(), digest_size=16).hexdigest()
            before = self.prints[id(model)] = model, now, mark
        return before[2]


def written(model: nn.Module) -> tuple[list[Tensor], list]:
    """The tensors of a model, held so that their ids stay theirs, and what changes where one is written to."""
    loose = [v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor)]
    tensors = [t for t in (*model.parameters(), *model.buffers(), *loose) if t.layout is torch.strided]
    return tensors, [(id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]


def described(value: Any, seen: dict[int, Any], deep: int = 4) -> Any:
    """A value as numbers, text and lists of them, the same in every process and folder.

    Tensors by their bytes, functions by name, file, code and what they hold, classes by name and files, other objects
    by class and attributes, down to `deep` objects within each other. seen: what was described so far.
    """
    if plain(value):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        data = value.tobytes() if isinstance(value, np.ndarray) else raw(value.to_dense()[None])[0]
        return [str(value.dtype), [*value.shape], blake2b(data, digest_size=16).hexdigest()]
    if id(value) in seen:
        return seen[id(value)][0]
    seen[id(value)] = f"again {len(seen)}", value

    def each(*values: Any) -> list:
        return [described(v, seen, deep) for v in values]

    kind = type(value)
    if isinstance(value, Mapping):
        return [kind.__name__, *each(*value, *value.values())]
    if isinstance(value, (list, tuple)):
        return [kind.__name__, *each(*value)]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, each(*value)))
    if isinstance(value, partial):
        return ["partial", *each(value.func, value.args, value.keywords)]
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, MethodType):
        return each(value.__func__, value.__self__)
    if isinstance(value, CodeType):
        return [value.co_code.hex(), *value.co_names, *each(*value.co_consts)]
    if isinstance(value, type):
        own = [k for k in value.__mro__ if not of_library(k)]
        return [named(value), *(source(k) or each(*filter(inspect.isfunction, vars(k).values())) for k in own)]
    if isinstance(value, FunctionType):
        if of_library(value):
            return named(value)
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [named(value), source(value), *each(value.__code__, value.__defaults__, value.__kwdefaults__, held)]
    if isinstance(value, nn.Module):
        return each(kind, {k: v for k, v in sorted(vars(value).items()) if k not in APART})
    if of_library(kind) or not hasattr(value, "__dict__"):
        return [*each(kind), re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))]
    return [*each(kind), *(described(v, seen, deep - 1) for v in sorted(vars(value).items()) if deep)]


def plain(value: Any) -> bool:
    """Whether it is numbers and text alone, which look the same in every process."""
    if isinstance(value, dict):
        return all(map(plain, [*value, *value.values()]))
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def of_library(thing: Any) -> bool:
    return (thing.__module__ or "").partition(".")[0] in LIBRARIES


def named(thing: Any) -> str:
    return f"{thing.__module__}".partition("@")[0] + f".{thing.__qualname__}"  # own files are modules STEM@FOLDER


def source(thing: Any) -> str:
    """A print of the file that a class or function is from; empty where there is none, as in a notebook."""
    try:
        file = inspect.getsourcefile(thing)
        return _print(file, os.stat(file).st_mtime_ns) if file else ""
    except (TypeError, OSError):
        return ""


@cache
def _print(file: str, changed: int) -> str:
    return blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()


class Table:
    """The records of one pass: key -> bytes of its tensors, in a file or, without one, in memory."""

    def __init__(self, file: Path | None):
        self.file, self.fields, self.start, self.bytes = file, [], 0, 0
        self.number: dict[bytes, int] = {}
        self.records: Any = []
        self.separable: bool | None = None  # whether a sample gives the same in any batch, found with the first batch

    def read(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Those of the keys that are known, and are as they were written."""
        if any(key not in self.number for key in keys):
            self.refresh()
        found = {key: self.records[self.number[key]] for key in keys if key in self.number}
        good = {k: r[HEAD:] for k, r in found.items() if crc32(r[HEAD:]) == int.from_bytes(r[16:HEAD].tobytes(), "big")}
        for key in found.keys() - good.keys():
            del self.number[key]
        return good

    def append(self, fields: list, new: dict[bytes, np.ndarray]) -> None:
        if not self.file:
            self.fields = fields
            for key, row in new.items():
                self.number[key] = len(self.records)
                self.records.append(np.frombuffer(record(key, row), np.uint8))
                self.bytes += HEAD + len(row)
            return
        with locked(self.file.with_name("lock")):
            self.refresh()
            if self.fields != fields:  # no file yet, or its first line is damaged
                draft = self.file.with_suffix(".new")
                draft.write_bytes(json.dumps({"format": 1, "fields": fields}).encode() + b"\n")
                os.replace(draft, self.file)
                self.refresh()
            with open(self.file, "r+b") as file:
                file.truncate(self.start + len(self.records) * self.size)  # what a killed process began
                file.seek(0, os.SEEK_END)
                file.write(b"".join(record(key, row) for key, row in new.items() if key not in self.number))

    @property
    def size(self) -> int:
        return HEAD + sum(width(field) for field in self.fields)

    def refresh(self) -> None:
        """See what is in the file by now."""
        if not self.file:
            return
        try:
            with open(self.file, "rb") as file:
                first = file.readline()
                fields = json.loads(first)["fields"] if first.endswith(b"\n") else []
                total = os.fstat(file.fileno()).st_size
        except (OSError, ValueError, KeyError, TypeError):
            fields, first, total = [], b"", 0
        if fields != self.fields:
            self.fields, self.start, self.records, self.number = fields, len(first), [], {}
        count = (total - self.start) // self.size
        if count < len(self.records):
            self.records, self.number = [], {}
        if count > len(self.records):
            known, shape = len(self.records), (count, self.size)
            self.records = np.memmap(self.file, np.uint8, "r", self.start, shape)
            self.number |= {self.records[n, :16].tobytes(): n for n in range(known, count)}


def record(key: bytes, row: np.ndarray) -> bytes:
    return key + crc32(row.data).to_bytes(4, "big") + row.tobytes()


def raw(x: Tensor) -> np.ndarray:  # [B, ...] -> [B, bytes]
    return x.detach().cpu().contiguous().reshape(len(x), x.numel() // max(1, len(x))).view(torch.uint8).numpy()


def parts(out: Output) -> list[Tensor]:
    return [out.logits, *out.taps.values()]


def width(field: list) -> int:
    return int(np.prod(field[2])) * getattr(torch, field[1]).itemsize


def encode(out: Output, taps: Sequence[str]) -> tuple[list, np.ndarray]:
    """Each tensor as [name or null, dtype, shape of a sample, its order of axes in memory], and the bytes [B, n]."""
    fields, rows = [], []
    for name, x in [(None, out.logits), *((tap, out.taps[tap]) for tap in taps)]:
        x = x.transpose(0, 1)  # [B, T, ...]
        order = sorted(range(1, x.ndim), key=lambda d, x=x: (-x.stride(d) if x.shape[d] > 1 else -float("inf"), d))
        x = x.permute(0, *order)
        fields.append([name, str(x.dtype).removeprefix("torch."), [*x.shape[1:]], order])
        rows.append(raw(x))
    return fields, np.concatenate(rows, 1)


def decode(rows: np.ndarray, fields: list, device: torch.device) -> Output:
    """The tensors of `encode`, in the same order in memory, for sums over them depend on it."""
    found, at = {}, 0
    for name, dtype, shape, order in fields:
        end = at + width([name, dtype, shape])
        x = torch.from_numpy(np.ascontiguousarray(rows[:, at:end])).view(getattr(torch, dtype)).view(-1, *shape)
        axes, at = [0, *order], end
        if order[0] == 1:  # time outside the batch
            x, axes = x.transpose(0, 1).contiguous(), [1, 0, *order[1:]]
        found[name] = x.permute([axes.index(d) for d in range(x.ndim)]).transpose(0, 1).to(device)
    return Output(found.pop(None), found)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where a cache is in memory

    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
