"""Events to frames against loops, what is refused, the files of the well-known sets, and frames kept on disk."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.data import DataError, MissingData, Tensors, check, events, from_events, has_steps, load
from spikedistill.data.events import EVENT, frames, read_bin, write_bin

SENSOR = (6, 8)


def made(n=200, sensor=SENSOR, seed=0, longest=1000):
    g = np.random.default_rng(seed)
    e = np.empty(n, EVENT)
    e["t"] = np.sort(g.integers(0, longest, n))
    e["x"], e["y"], e["p"] = g.integers(0, sensor[1], n), g.integers(0, sensor[0], n), g.integers(0, 2, n)
    return e


def by_loops(e, steps, kind, sensor=SENSOR, tau=None):
    out = np.zeros((steps, 2, *sensor))
    start, stop = int(e["t"][0]), int(e["t"][-1]) + 1
    if kind == "surface":
        for k in range(steps):
            end = start + (stop - start) * (k + 1) / steps
            for t, x, y, p in e.tolist():
                if (t - start) * steps // (stop - start) <= k:
                    out[k, p, y, x] = math.exp(-(end - t) / (tau or (stop - start) / steps))
        return out
    for i, (t, x, y, p) in enumerate(e.tolist()):
        if kind == "number":
            out[i * steps // len(e), p, y, x] += 1
        elif kind == "time":
            out[(t - start) * steps // (stop - start), p, y, x] += 1
        else:
            for k in range(steps):
                out[k, p, y, x] += max(0, 1 - abs(k - (t - start) * (steps - 1) / (stop - start)))
    return out


@pytest.mark.parametrize("kind", events.KINDS)
@pytest.mark.parametrize(("n", "steps"), [(200, 1), (200, 5), (3, 7), (1, 1), (1, 4)])
def test_frames_equal_loops(kind, n, steps):
    e = made(n, seed=n + steps)
    got = frames(e, SENSOR, steps, kind)
    assert got.shape == (steps, 2, *SENSOR) and got.dtype == torch.float32
    assert np.allclose(got, by_loops(e, steps, kind), atol=1e-5)
    as_dict = {name: e[name].tolist() for name in "ptxy"}
    as_floats = {name: e[name].astype(np.float64) for name in "xyp"} | {"t": e["t"].astype(np.uint64)}
    assert torch.equal(frames(as_dict, SENSOR, steps, kind), got)
    assert torch.equal(frames(as_floats, SENSOR, steps, kind), got)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 9999), st.sampled_from(["number", "time", "voxel"]))
@settings(max_examples=60, deadline=None)
def test_no_event_is_lost(n, steps, seed, kind):
    e = made(n, seed=seed, longest=1 + seed % 50)  # with many at the same time
    for size in (None, (3, 8), (4, 5), (1, 1)):
        got = frames(e, SENSOR, steps, kind, size=size)
        assert np.allclose(got.sum((0, 2, 3)), [(e["p"] == 0).sum(), (e["p"] == 1).sum()], atol=1e-3)
    if kind == "number":
        sizes = frames(e, SENSOR, steps, kind).sum((1, 2, 3))
        assert sizes.max() - sizes.min() <= 1


def test_polarity_is_the_channel():
    e = np.array([(0, 2, 1, 1), (1, 3, 4, 0), (2, 2, 1, 1)], EVENT)
    got = frames(e, SENSOR, 1, "time")[0]
    assert got[1, 1, 2] == 2 and got[0, 4, 3] == 1 and got.sum() == 3
    flipped = e.copy()
    flipped["p"] = 1 - e["p"]
    assert torch.equal(frames(flipped, SENSOR, 1, "time")[0], got.flip(0))


def test_voxels_by_hand():
    e = {"t": [0.0, 0.75, 3.0], "x": [0, 1, 2], "y": [0, 0, 0], "p": [1, 1, 0]}
    got = frames(e, SENSOR, 4, "voxel")
    assert got[0, 1, 0, 0] == 1 and got[3, 0, 0, 2] == 1
    assert got[0, 1, 0, 1] == 0.25 and got[1, 1, 0, 1] == 0.75


def test_surface_by_hand():
    e = {"t": [0, 50, 99], "x": [0, 1, 0], "y": [0, 0, 0], "p": [1, 1, 1]}
    got = frames(e, SENSOR, 2, "surface", tau=10)
    assert math.isclose(got[0, 1, 0, 0], math.exp(-5), rel_tol=1e-5) and got[0, 1, 0, 1] == 0
    assert math.isclose(got[1, 1, 0, 0], math.exp(-0.1), rel_tol=1e-5)  # the last event only
    assert math.isclose(got[1, 1, 0, 1], math.exp(-5), rel_tol=1e-5)
    assert got.min() >= 0 and got.max() <= 1


def test_smaller_frames_put_pixels_together():
    e = made()
    full, half = (frames(e, SENSOR, 4, size=size) for size in (None, (3, 4)))
    assert torch.equal(half, full.unflatten(2, (3, 2)).unflatten(4, (4, 2)).sum((3, 5)))


def test_span():
    e = made()
    got = frames(e, SENSOR, 4, span=(0, 4000))
    assert torch.equal(got[0], frames(e, SENSOR, 1)[0]) and got[1:].sum() == 0
    with pytest.raises(DataError, match="outside 0 to 100"):
        frames(e, SENSOR, 4, span=(0, 100))


@pytest.mark.parametrize("kind", events.KINDS)
def test_no_events_make_empty_frames(kind):
    assert frames(made(0), SENSOR, 3, kind).shape == (3, 2, *SENSOR) and frames(made(0), SENSOR, 3, kind).sum() == 0


def changed(**values):
    e = {name: made()[name].astype(np.int64) for name in "txyp"}
    for name, (at, value) in values.items():
        e[name][at] = value
    return e


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (changed(t=(70, -1)), r"here: timestamps run backwards 1 times, first at event 70"),
        (changed(p=(3, 2)), r"here: polarities go from 0 to 2, they must be 0 \(OFF\) or 1 \(ON\)$"),
        ({**changed(), "p": made()["p"] * 2 - 1.0}, r"here: polarities go from -1 to 1.*\(p \+ 1\) // 2"),
        (changed(x=(3, 8)), "here: x goes from 0 to 8, outside a sensor 8 pixels wide"),
        (changed(y=(3, -1)), "here: y goes from -1 to 5, outside a sensor 6 pixels high"),
        ({"t": [1], "x": [1], "pol": [1]}, "here: events have no field y, p; their fields are t, x, pol"),
        ({**changed(), "t": [1, 2]}, r"here: t, x, y, p have shapes \(2,\), \(200,\)"),
        ({**changed(), "x": made()["x"] + 0.5}, "here: x is float64, it must hold whole numbers"),
        ({**changed(), "t": made()["t"] * np.nan}, "here: 200 timestamps are NaN"),
        (np.zeros((5, 4)), r"here: events are a structured array or a dict with t, x, y, p, not ndarray \[5, 4\]"),
        ([1, 2], "not list"),
    ],
)
def test_events_that_are_refused(bad, says):
    with pytest.raises(DataError, match=says):
        frames(bad, SENSOR, 2, where="here")


def test_settings_that_are_refused():
    with pytest.raises(DataError, match=r"'tmie': did you mean 'time'\? Valid: number, time, voxel, surface"):
        frames(made(), SENSOR, 2, "tmie")
    with pytest.raises(DataError, match="steps must be at least 1"):
        frames(made(), SENSOR, 0)
    with pytest.raises(DataError, match="frames of 7x8 pixels do not fit a sensor of 6x8"):
        frames(made(), SENSOR, 2, size=(7, 8))


# --- any data set of events --------------------------------------------------------------------------------------


def clips(n=40, seed=0):
    return [(made(30 + i, seed=seed + i), i % 2) for i in range(n)]


def test_from_events():
    data = from_events(clips(), clips(10, 99), ("a", "b"), SENSOR, steps=3, batch_size=8, augment="flip|drop_time")
    assert data.shape == (2, *SENSOR) and data.steps == 3 and data.classes == ("a", "b")
    assert (data.mean, data.std) == ((0.0, 0.0), (1.0, 1.0)) and isinstance(data.train, Tensors)
    assert data.summary() == "events: 36 train, 4 valid, 10 test; 2 classes; 3 frames of 2x6x8; augment flip|drop_time"
    assert data.train.images.dtype == torch.uint8
    batch = next(iter(data.test))
    assert batch["x"].shape == (3, 10, 2, *SENSOR) and batch["x"].dtype == torch.float32
    for i, (e, label) in enumerate(clips(10, 99)):
        assert torch.equal(batch["x"][:, i], frames(e, SENSOR, 3)) and batch["y"][i] == label
    learn = next(iter(data.train))
    assert learn["x"].shape == (3, 8, 2, *SENSOR) and learn["x"].max() > 1


def test_ready_frames():
    ready = [(torch.full((3, 2, *SENSOR), i), i % 2) for i in range(20)]
    data = from_events(ready, ready, ("a", "b"), SENSOR, steps=3)
    assert torch.equal(next(iter(data.test))["x"][0, :, 0, 0, 0], torch.arange(20.0))
    many = [(np.full((3, 2, *SENSOR), 50 * i, np.int64), i % 2) for i in range(20)]
    data = from_events(many, many, ("a", "b"), SENSOR, steps=3)
    assert data.test.images.dtype == torch.int16 and next(iter(data.test))["x"].max() == 950
    shares = from_events(clips(), clips(), ("a", "b"), SENSOR, steps=3, frames="voxel")
    assert shares.test.images.dtype == torch.float32


def test_from_events_errors():
    def says(source, **how):
        with pytest.raises(DataError) as error:
            from_events(source, clips(), ("a", "b"), SENSOR, **{"steps": 3, "name": "mine"} | how)
        return str(error.value)

    bad = clips()
    bad[7] = (changed(t=(70, -1)), 1)
    assert says(bad).startswith("mine: train, sample 7: timestamps run backwards")
    assert "mine: train, sample 0: frames [3, 2, 5, 8] do not fit T = 3 and a sensor of 6x8" in says(
        [(torch.zeros(3, 2, 5, 8), 0)] * 4
    )
    assert "do not fit T = 3" in says([(torch.zeros(4, 2, 6, 8), 0)] * 4)
    assert "frames hold values that are negative" in says([(torch.full((3, 2, 6, 8), -1.0), 0)] * 4)
    assert "neither events with t, x, y, p nor frames [T,C,H,W], but Tensor [2, 6, 8]" in says(
        [(torch.zeros(2, 6, 8), 0)]
    )
    assert "train labels go from 0 to 2: not from 0 to 1" in says([(made(), i % 3) for i in range(9)])
    assert "sample 0: a dict, not a pair" in says([{"events": made()}])
    assert "there are no samples" in says([])
    assert "jitter(0.1) is for images: these data are events" in says(clips(), augment="flip|jitter(0.1)")
    mixed = [(torch.zeros(3, 2, *SENSOR), 0), (torch.zeros(3, 1, *SENSOR), 0)]
    assert "sample 1: frames [3, 1, 6, 8], the first sample's are [3, 2, 6, 8]" in says(mixed)


# --- 40-bit events -----------------------------------------------------------------------------------------------


def test_bytes_by_hand(tmp_path):
    path = tmp_path / "1.bin"
    path.write_bytes(bytes([3, 5, 0x80, 0, 7, 33, 0, 0x01, 0x02, 0x03]))
    e = read_bin(path, (34, 34))
    assert e["x"].tolist() == [3, 33] and e["y"].tolist() == [5, 0]
    assert e["p"].tolist() == [1, 0] and e["t"].tolist() == [7, 0x010203]
    with pytest.raises(DataError, match=r"1\.bin: x goes from 3 to 33, outside a sensor 30 pixels wide"):
        read_bin(path, (34, 30))


def test_a_clock_that_went_round(tmp_path):
    path = tmp_path / "1.bin"
    path.write_bytes(bytes([1, 1, 0, 0, 9, 0, 240, 0, 0, 0, 2, 2, 0, 0, 4, 0, 240, 0, 0, 0, 3, 3, 0, 0, 4]))
    e = read_bin(path, (34, 34))
    assert e["t"].tolist() == [9, 8192 + 4, 16384 + 4] and e["x"].tolist() == [1, 2, 3]


def test_write_and_read(tmp_path):
    e = made(500, (180, 240), longest=1 << 23)
    write_bin(tmp_path / "a.bin", e)
    assert np.array_equal(read_bin(tmp_path / "a.bin", (180, 240)), e)
    with pytest.raises(DataError, match=r"b\.bin: timestamps go from .* from 0 to 2\^23 - 1"):
        write_bin(tmp_path / "b.bin", {"t": [1 << 23], "x": [0], "y": [0], "p": [0]})


@pytest.mark.parametrize(
    ("n", "says"),
    [(0, "the file is empty"), *((n, f"{n} bytes, not a whole number of events of 5 bytes") for n in (4, 501))],
)
def test_files_cut_short(tmp_path, n, says):
    write_bin(tmp_path / "a.bin", made(200))
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:n])
    with pytest.raises(DataError, match=rf"a\.bin: {says}: it was cut short"):
        read_bin(tmp_path / "a.bin", SENSOR)


# --- the well-known sets -----------------------------------------------------------------------------------------


def nmnist(root, n=6, parts=("Train", "Test"), sensor=(34, 34)):
    for part in parts:
        for label in range(2):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for i in range(n):
                write_bin(folder / f"{i + 1}.bin", made(50 + i, sensor, seed=100 * label + i))
    return root


def test_nmnist(tmp_path):
    nmnist(tmp_path, 12)
    data = load("nmnist", root=tmp_path, steps=4)
    assert data.classes == ("0", "1") and data.shape == (2, 34, 34) and data.steps == 4 and data.augment == "shift(2)"
    assert (data.train.samples, data.valid.samples, data.test.samples) == (22, 2, 24)
    for at, (label, i) in {0: (0, 0), 9: (0, 9), 12: (1, 0)}.items():  # in the order of their numbers, 10 after 9
        want = frames(made(50 + i, (34, 34), seed=100 * label + i), (34, 34), 4, "time")
        assert torch.equal(data.test.images[at].float(), want) and data.test.labels[at] == label
    assert load("nmnist", root=tmp_path).steps == 10
    assert load("nmnist", root=tmp_path, frames="number", size=17).shape == (2, 17, 17)
    assert check("nmnist", root=tmp_path, steps=4, frames="voxel", size=34, augment="noise(0.1)") == []


def test_nmnist_errors(tmp_path):
    assert "give it as root. Download Train.zip and Test.zip" in check("nmnist")[0]
    (tmp_path / "Train.zip").write_bytes(b"")
    says = check("nmnist", root=tmp_path)[0]
    assert (
        "no folder Train in" in says and "Train.zip must be unpacked" in says and f"unpack them in {tmp_path}" in says
    )
    nmnist(tmp_path, parts=("Train",))
    assert "no folder Test in" in check("nmnist", root=tmp_path)[0]
    with pytest.raises(MissingData, match="no folder Test"):
        load("nmnist", root=tmp_path)
    nmnist(tmp_path, parts=("Test",))
    (tmp_path / "Test" / "7").mkdir()
    with pytest.raises(DataError, match="class '7' is not among the training classes"):
        load("nmnist", root=tmp_path)
    (tmp_path / "Test" / "7").rmdir()
    (tmp_path / "Train" / "7").mkdir()
    with pytest.raises(DataError, match=r"class '7' has no \.bin files"):
        load("nmnist", root=tmp_path)
    (tmp_path / "Train" / "7").rmdir()
    (tmp_path / "Test" / "1").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="Test: class '1', which the training data have, is not there"):
        load("nmnist", root=tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "Test" / "1")
    write_bin(tmp_path / "Train" / "1" / "3.bin", outside())
    with pytest.raises(DataError, match=r"1/3\.bin: y goes from .* outside a sensor 34 pixels high"):
        load("nmnist", root=tmp_path)


def outside():
    e = made(9)
    e["y"][4] = 34
    return e


def test_settings_of_load(tmp_path):
    assert "frames of 40x40 pixels do not fit a sensor of 34x34" in check("nmnist", root=tmp_path, size=40)[0]
    assert "steps must be at least 1" in check("nmnist", root=tmp_path, steps=0)[0]
    assert "valid: number, time, voxel, surface" in check("nmnist", root=tmp_path, frames="tim")[0]
    assert "steps is for events" in check("fashion-mini", steps=4)[0]
    assert "jitter(0.1) is for images" in check("nmnist", root=nmnist(tmp_path), augment="jitter(0.1)")[0]
    assert "noise is for events: these data are images" in check("fashion-mini", augment="flip|noise")[0]
    with pytest.raises(DataError, match="noise is for events"):
        load("fashion-mini", augment="noise")
    assert has_steps("nmnist") and has_steps("fashion-events") and not has_steps("mnist")


def test_ncaltech101(tmp_path):
    for name in ("airplanes", "BACKGROUND_Google"):
        folder = tmp_path / "Caltech101" / name
        folder.mkdir(parents=True)
        for i in range(1, 21):
            write_bin(folder / f"image_{i:04}.bin", made(20 + i, (180, 240), seed=i))
    data = load("n-caltech101", root=tmp_path, valid=0)
    assert data.classes == ("BACKGROUND_Google", "airplanes") and data.shape == (2, 48, 48) and data.steps == 10
    assert data.train.samples == 36 and data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.test.images.sum((1, 2, 3, 4)).tolist() == [39, 40] * 2  # the last tenth of each class; nothing lost
    assert "unpack it in" in check("n-caltech101", root=tmp_path / "no")[0]


# --- frames kept on disk -----------------------------------------------------------------------------------------


def test_frames_are_made_once(tmp_path, monkeypatch):
    nmnist(tmp_path)
    first = load("nmnist", root=tmp_path, steps=4)
    kept = sorted((tmp_path / "frames").iterdir())
    assert [p.name[:24] for p in kept] == ["nmnist-test-time-T4-34x3", "nmnist-train-time-T4-34x"]
    monkeypatch.setattr(events, "frames", None)  # not to be called
    again = load("nmnist", root=tmp_path, steps=4)
    assert torch.equal(first.train.images, again.train.images) and torch.equal(first.test.labels, again.test.labels)
    with pytest.raises(TypeError):
        load("nmnist", root=tmp_path, steps=5)


def test_frames_are_made_again(tmp_path):
    nmnist(tmp_path)
    first = load("nmnist", root=tmp_path, steps=4)
    for damage in (b"", b"PK\x03\x04 and no more", (tmp_path / "frames").joinpath("x").name.encode() * 999):
        for path in (tmp_path / "frames").iterdir():
            path.write_bytes(damage)
        assert torch.equal(load("nmnist", root=tmp_path, steps=4).test.images, first.test.images)
    write_bin(tmp_path / "Test" / "0" / "1.bin", made(999, (34, 34)))  # another file of the same name
    assert load("nmnist", root=tmp_path, steps=4).test.images[0].sum() == 999
    assert not [p for p in (tmp_path / "frames").iterdir() if p.suffix != ".npz"]


def test_pickles_are_not_read(tmp_path):
    nmnist(tmp_path)
    first = load("nmnist", root=tmp_path)
    for path in (tmp_path / "frames").iterdir():
        np.savez(path, frames=np.array([{}], dtype=object), labels=np.zeros(1))
    assert torch.equal(load("nmnist", root=tmp_path).test.images, first.test.images)


def test_a_folder_that_cannot_be_written(tmp_path):
    nmnist(tmp_path)
    (tmp_path / "frames").write_text("in the way")
    assert load("nmnist", root=tmp_path).test.samples == 12


# --- spikingjelly's data sets, through a stand-in ----------------------------------------------------------------


class Folder:
    """Like torchvision's DatasetFolder: classes and files in the order of their letters."""

    def __init__(self, root, data_type, train=None):
        assert data_type == "event"
        self.train = train
        names = [str(i) for i in range(11)] if train is not None else events.CIFAR10
        self.classes = sorted(names)
        self.samples = sorted(
            (f"{root}/events_np/{c}/{c}_{i}.npz", self.classes.index(c)) for c in names for i in range(12)
        )

    def __getitem__(self, i):
        path, label = self.samples[i]
        number = int(path.split("_")[-1].removesuffix(".npz"))
        e = made(20 + number, (128, 128), seed=number)
        return {name: e[name] for name in "txyp"}, label


@pytest.fixture
def spikingjelly(monkeypatch, tmp_path):
    package, datasets = types.ModuleType("spikingjelly"), types.ModuleType("spikingjelly.datasets")
    package.__spec__, package.__path__ = types.SimpleNamespace(name="spikingjelly"), []
    datasets.CIFAR10DVS = datasets.DVS128Gesture = Folder
    for module in (package, datasets):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(events, "cached", lambda folder, name, files, make: make())
    (tmp_path / "events_np").mkdir()
    return tmp_path


def test_cifar10_dvs(spikingjelly):
    data = load("cifar10-dvs", root=spikingjelly)
    assert data.shape == (2, 48, 48) and data.steps == 10 and data.classes == events.CIFAR10
    assert data.test.labels.tolist() == list(range(10)) and data.test.images.sum((1, 2, 3, 4)).tolist() == [31] * 10
    both = torch.cat([data.train.images, data.valid.images]).sum((1, 2, 3, 4))
    assert sorted(both.tolist()) == sorted(list(range(20, 31)) * 10)  # numbers 0 .. 10 of each class


def test_dvs128_gesture(spikingjelly):
    data = load("dvs128-gesture", root=spikingjelly, steps=2)
    assert data.shape == (2, 128, 128) and data.steps == 2 and len(data.classes) == 11
    assert data.test.labels.tolist() == [i // 12 for i in range(132)]  # gesture 10 comes last, not after 1


def test_spikingjelly_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(events.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'spikedistill[events]'" in check("cifar10-dvs", root=tmp_path)[0]
    monkeypatch.setattr(events.importlib.util, "find_spec", lambda name: object())
    says = check("cifar10-dvs", root=tmp_path)[0]
    assert "airplane.zip, automobile.zip, " in says and f"not in {tmp_path / 'download'}" in says
    assert "give it as root" in check("dvs128-gesture")[0]
    (tmp_path / "events_np").mkdir()
    assert check("cifar10-dvs", root=tmp_path) == []
    (tmp_path / "events_np.building").write_text("")
    assert "was interrupted" in check("cifar10-dvs", root=tmp_path)[0]


def test_a_spikingjelly_that_does_not_load(monkeypatch, tmp_path):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    (tmp_path / "events_np").mkdir()
    monkeypatch.setattr(events.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(events.importlib, "import_module", broken)
    with pytest.raises(DataError, match=r"spikedistill\[events\].*nms does not exist"):
        load("cifar10-dvs", root=tmp_path)


def test_tonic_is_never_imported():
    """It is GPL: a user may bring it, we do not."""
    assert "tonic" not in sys.modules
    sources = (path.read_text() for path in events.Path(events.__file__).parents[1].rglob("*.py"))
    assert not any(f"import {name}" in text or f"from {name}" in text for text in sources for name in ("tonic",))
