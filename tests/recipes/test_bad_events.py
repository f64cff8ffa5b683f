"""Damaged files of events from the command line: a sentence that names the file or the class, before training."""

import numpy as np
import pytest
from PIL import Image

from spikedistill.data import DataError, from_events
from spikedistill.data.events import write_bin
from tests.recipes.test_paired import QUICK, STUDENT, mistakes_of

SENSOR = {"nmnist": (34, 34), "n-caltech101": (180, 240)}


def recording(seed, sensor, n=60):
    rng = np.random.default_rng(seed)
    places = {axis: rng.integers(0, side, n) for axis, side in zip("yx", sensor)}
    return places | {"t": np.sort(rng.integers(0, 300_000, n)), "p": rng.integers(0, 2, n)}


def recordings(folder, name, count=6):
    folder.mkdir(parents=True)
    for i in range(count):
        write_bin(folder / f"{i}.bin", recording(i, SENSOR[name]))


def cut(file):
    file.write_bytes(file.read_bytes()[:-2])


def emptied(file):
    file.write_bytes(b"")


def swapped(file):
    rows = np.fromfile(file, np.uint8).reshape(-1, 5)
    rows[[3, 40]] = rows[[40, 3]]
    rows.tofile(file)


def larger(file):
    write_bin(file, recording(0, (60, 60)))


@pytest.mark.parametrize(
    ("damage", "where", "says"),
    [
        (cut, "Train/1/3.bin", "298 bytes, not a whole number of events of 5 bytes: it was cut short"),
        (emptied, "Test/0/1.bin", "the file is empty: it was cut short"),
        (swapped, "Test/1/0.bin", "timestamps run backwards 2 times, first at event 4"),
        (larger, "Train/0/5.bin", "outside a sensor 34 pixels wide (height x width 34x34)"),
        (lambda file: [p.unlink() for p in file.iterdir()], "Train/1", "class '1' has no .bin files"),
        (lambda file: file.rename(file.with_name("9")), "Test/1", "class '1', which the training data have, is not there"),
        (lambda file: recordings(file, "nmnist"), "Test/2", "class '2' is not among the training classes"),
    ],
)  # fmt: skip
def test_files_and_classes(tmp_path, capsys, damage, where, says):
    for part in ("Train", "Test"):
        for name in "01":
            recordings(tmp_path / "data" / part / name, "nmnist")
    damage(tmp_path / "data" / where)
    words = ["--data", "nmnist", "--root", str(tmp_path / "data"), "--student", STUDENT, "--method", "ce", *QUICK]
    text = mistakes_of(capsys, "distill", *words, "--out", str(tmp_path / "out"))
    assert says in text and where.removesuffix("/1") in text, text
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (("cat", "fox"), "only n-caltech101 has 'dog'; only folder:{} has 'fox'"),
        (("cat", "dog", "wolf"), "only folder:{} has 'wolf'"),
        (("Cat", "dog"), "only n-caltech101 has 'cat' (there is 'Cat')"),
    ],
)
@pytest.mark.parametrize("command", [("distill", "--method", "static2dvs"), ("run", "ckd_events", "--seeds", "0")])
def test_a_class_in_one_modality_only(tmp_path, capsys, images, says, command):
    for name in ("cat", "dog"):
        recordings(tmp_path / "events" / "Caltech101" / name, "n-caltech101")
    for name in images:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    words = ["--data", "n-caltech101", "--root", str(tmp_path / "events"), "--pair", f"folder:{tmp_path / 'images'}"]
    text = mistakes_of(capsys, *command, *words, *QUICK, "--student", STUDENT, "--out", str(tmp_path / "out"))
    assert says.format(tmp_path / "images") in text and "--pair-classes common" in text
    assert not [*tmp_path.glob("out/**/metrics.jsonl")]


@pytest.mark.parametrize(
    ("low", "high", "says"), [(-1, 1, r"write \(p \+ 1\) // 2"), (0, 2, "go from 0 to 2, they must be")]
)
def test_polarities(low, high, says):
    """A file of 40-bit events has a single bit for them; other data sets of a user may have anything."""
    good = [(recording(i, (8, 8)), i % 2) for i in range(8)]
    bad = [*good[:5], (good[5][0] | {"p": np.where(good[5][0]["p"], high, low)}, 1)]
    with pytest.raises(DataError, match=rf"mine: test, sample 5: polarities .*{says}"):
        from_events(good, bad, ("a", "b"), (8, 8), name="mine")
