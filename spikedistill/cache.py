"""Outputs of frozen passes, kept between epochs and runs: what a sample gives is asked of a model once.

A sample is known by the bytes that reach the model, however it was augmented; a pass by its model's class, settings and
weights, taps, T, precision, kind of device and version of torch. Both are 128-bit hashes; a model must be a function of
its input. FOLDER/<pass>.outputs is a line of JSON that says what a record holds, then records of one size, only ever
appended under a lock: 16 bytes of key, CRC-32 of the rest, the bytes of each tensor.
"""

import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from spikedistill.core.output import Output
from spikedistill.core.taps import infer
from spikedistill.neurons.kernels import sparse

HEAD = 20  # bytes of a record before its tensors


class Cache:
    """Give it to a Pass. folder: where, shared with other processes; None keeps all in memory. limit: bytes.

    Where the limit is reached, it warns once and goes on without storing. asked, hits: samples, so far, in `calls`.
    computed, seconds, cpu_seconds: samples that models were run on, in `ran` calls of them, and how long that took.
    """

    def __init__(self, folder: str | Path | None = None, limit: float = 8 * 2**30):
        self.folder, self.limit = Path(folder) if folder else None, limit
        self.tables: dict[str, Table] = {}
        self.prints: dict[int, tuple[nn.Module, list, str]] = {}
        self.asked, self.hits, self.computed, self.full = 0, 0, 0, False
        self.calls, self.ran, self.seconds, self.cpu_seconds = 0, 0, 0.0, 0.0
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    @sparse.limited(-1)  # its choice would make what a sample gives hang on the rest of the batch
    def infer(self, model: nn.Module, x: Tensor, steps: int | None = None, taps: Sequence[str] = ()) -> Output:
        """As `taps.infer`. The model sees the missing samples alone where that changes no bit, else the whole batch."""
        dim = 1 if x.ndim == 5 else 0
        samples, taps = x.detach().movedim(dim, 0), sorted(taps)
        what = [self.fingerprint(model), steps, getattr(model, "steps", None), taps, x.dtype, samples.shape[1:]]
        kind = x.device.type
        what += [kind, torch.__version__, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)]
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
            self.ran, self.computed = self.ran + 1, self.computed + len(ask)
            self.seconds += time.perf_counter() - began
            self.cpu_seconds += time.process_time() - cpu
            if table.separable is None and len(keys) > 8:
                self.ran += 1
                few = infer(model, x.narrow(dim, 0, 8), steps, taps)
                table.separable = all(torch.equal(a[:, :8], b) for a, b in zip(parts(out), parts(few)))
            fields, found = encode(out, taps)
            new = {keys[i]: row for i, row in zip(ask, found) if keys[i] not in rows}
            self._store(table, fields, new)
            if whole:
                return out
            rows |= new
            return decode(np.stack([rows[key] for key in keys]), fields, x.device)
        return decode(np.stack([rows[key] for key in keys]), table.fields, x.device)

    def _store(self, table: "Table", fields: list, new: dict[bytes, np.ndarray]) -> None:
        used = sum(t.bytes for t in self.tables.values())
        if self.folder:
            used = sum(file.stat().st_size for file in self.folder.glob("*.outputs"))
        why = f"has reached its limit of {self.limit / 2**30:g} GiB"
        if not self.full and used + sum(HEAD + len(row) for row in new.values()) <= self.limit:
            try:
                return table.append(fields, new)
            except OSError as error:
                why = f"cannot be written ({error.strerror})"
        if not self.full:
            warnings.warn(f"the cache in {self.folder or 'memory'} {why}: it is read, but stores no more", stacklevel=2)
        self.full = True

    def fingerprint(self, model: nn.Module) -> str:
        """Class, settings (plain attributes of every module) and weights; hashed again when a weight was written to."""
        tensors = [*model.parameters(), *model.buffers()]
        now = [(t.data_ptr(), t._version) for t in tensors]
        before = self.prints.get(id(model))
        if before is None or before[1] != now:
            digest = blake2b(f"{type(model).__module__} {model!r}".encode(), digest_size=16)
            for name, module in model.named_modules():  # what a repr does not show
                own = sorted((k, v) for k, v in vars(module).items() if k[0] != "_" and k != "training" and plain(v))
                digest.update(f"{name} {own!r}".encode())
            for name, t in [*model.named_parameters(), *model.named_buffers()]:
                digest.update(f"{name} {t.dtype} {[*t.shape]}".encode())
                digest.update(raw(t[None])[0])
            before = self.prints[id(model)] = model, now, digest.hexdigest()
        return before[2]


def plain(value: Any) -> bool:
    """Whether it is numbers and text alone, which look the same in every process."""
    if isinstance(value, dict):
        return all(map(plain, [*value, *value.values()]))
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


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
