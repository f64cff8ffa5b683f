"""What a run was made of: data, teacher and files of code in 16 letters each; others of the same name are noticed."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikedistill import data as data_sets
from spikedistill import own, runs
from spikedistill.cache import raw
from spikedistill.data.batches import as_image, seeded


def origin(data: Any, teacher: str | nn.Module | None, texts: Iterable[str | None] = ()) -> dict[str, Any]:
    """{"data", "teacher", "code": {file: print}} as `origin.json` has them. texts: of settings that may name a file."""
    return {"data": fingerprint(data), "teacher": teacher_print(teacher), "code": own.prints(texts)}


def fingerprint(data: Any) -> str:
    """What the data are: of tensors every value, of files their names and sizes, of others `some`; and the split."""
    digest = hashlib.sha256()
    images = data_sets.images_of(data)
    train = [data.train] if images is None else [data.train.events.train, images.train]
    for split in (*train, data.valid, data.test):
        if split is None:
            continue
        digest.update(raw(split.index[None])[0])
        if isinstance(split, data_sets.Tensors):
            digest.update(raw(split.labels[None])[0])
            for i in range(0, len(split.images), 1024):  # without a copy of the whole
                digest.update(raw(torch.as_tensor(split.images[i : i + 1024])[None])[0])
        elif hasattr(split.dataset, "samples"):
            for path, label in split.dataset.samples:
                digest.update(f"{Path(path).name} {Path(path).stat().st_size} {label}\n".encode())
        else:
            digest.update(some(split))
    return digest.hexdigest()[:16]


def some(split: Any, most: int = 64) -> bytes:
    """Of a data set that only gives samples: evenly spaced ones, or the labels of those that no seed makes alike."""

    def read() -> list[tuple[str, int]]:
        found = []
        for i in split.index[:: max(1, len(split.index) // most)][:most].tolist():
            with seeded("origin", i):
                image, label = split.dataset[i]
            found.append((hashlib.sha256(raw(as_image(image)[None])[0]).hexdigest(), int(label)))
        return found

    first, second = read(), read()
    return repr(first if first == second else [label for _, label in first]).encode()


def teacher_print(teacher: str | nn.Module | None) -> str | None:
    """What the teacher's weights are; its name, where the weights are not a file of ours."""
    if isinstance(teacher, nn.Module):
        digest = hashlib.sha256()
        for name, tensor in teacher.state_dict().items():
            digest.update(name.encode())
            digest.update(raw(tensor[None])[0])
        return digest.hexdigest()[:16]
    if teacher is None or not Path(teacher).exists():
        return teacher
    return hashlib.sha256(runs.student_file(teacher).read_bytes()).hexdigest()[:16]


def changed(folder: Path, now: Mapping[str, Any]) -> list[str]:
    """Which of data, teacher and files of code are not what the runs in a folder were made with."""
    before = runs.read_json(folder / "origin.json") if (folder / "origin.json").exists() else {}
    before, now = ({**known, **known.get("code", {}), "code": None} for known in (before, now))
    return [k for k, v in now.items() if v is not None and before.get(k) not in (None, v)]
