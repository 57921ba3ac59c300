"""MNIST, CIFAR-10, mnist5k (needs no download), folders and .npz files, normalised as by the authors of MEM-DFA."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memdfa_lab.core.checks import check_finite, check_int, check_type, lookup, of_an_extra
from memdfa_lab.core.seeds import mix
from memdfa_lab.lab.sources import KEYS, LOADERS, Arrays, image_folder, read_npz, require, split

SIZES = {"mnist": ((60000, 28, 28), (10000, 28, 28)), "cifar10": ((50000, 32, 32), (10000, 32, 32))}


@dataclass(frozen=True, eq=False)
class Data:
    """Normalised images (N, C, H, W) float32, labels (N,) int64; pixels are x * pixel_range + mean.

    If you fill it yourself, x may be any (N, ...) that the network takes, such as whole numbers for words, and y
    whatever the loss takes.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: Tensor  # (C, 1, 1) for images, of the training pixels
    pixel_range: float  # max - min of the training pixels
    classes: int
    test_exact: Tensor | None = None  # (N,) bool: which test images are the official ones, if the .npz says so

    @property
    def input_shape(self) -> tuple[int, int, int]:
        shape = tuple(self.x_train.shape[1:])
        if len(shape) != 3:
            raise ValueError(f"{self.name} has no images (N, C, H, W), which networks by name take: x is (N, *{shape})")
        return shape

    def batches(
        self, batch_size: int, seed: int = 0, like: Tensor | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches x (N, C, H, W) and y (N,) of the training data without end, in the order of `ml.fit`.

        With `like`, both are on its device, and x is converted by `as_input`. Raises ValueError if
        `drop_last` leaves no batch.
        """
        n = len(self.x_train)
        batches = batches_in(n, batch_size, drop_last)
        for epoch in count():
            for chosen in order(n, seed, epoch).split(batch_size)[:batches]:
                x, y = self.x_train[chosen], self.y_train[chosen]
                yield (x, y) if like is None else (as_input(x, like), y.to(like.device))

    def holdout(self, fraction: float = 0.1, seed: int = 0) -> "Data":
        """Split the training data, class by class, to choose settings without the test data.

        x_test, y_test of the result are the held-out images. The normalisation stays: its few
        constants depend on the held-out pixels, but not on labels or the test set.
        Raises ValueError if the fraction leaves a class without an image on either side, or y_train has no classes.
        """
        if self.y_train.dim() != 1 or self.y_train.is_floating_point():
            given = f"{self.y_train.dtype} {tuple(self.y_train.shape)}"
            raise ValueError(f"holdout splits class by class: y_train must be whole-number labels (N,), got {given}")
        rest, held_out = map(torch.from_numpy, split(self.y_train.cpu().numpy(), fraction, seed))
        x, y = self.x_train, self.y_train
        split_off = replace(self, x_test=x[held_out], y_test=y[held_out], test_exact=None)
        return replace(split_off, name=f"{self.name}-holdout", x_train=x[rest], y_train=y[rest])

    def subset(self, train: int | None = None, test: int | None = None) -> "Data":
        """Keep the first images (None: all), for quick runs; raises ValueError if there are fewer."""
        for n, x in ((train, self.x_train), (test, self.x_test)):
            if n is not None and check_int("a subset", n) > len(x):
                raise ValueError(f"subset of {n} images: {self.name} can give 1 to {len(x)}")
        parts = {key: getattr(self, key)[: train if key.endswith("train") else test] for key in KEYS}
        return replace(self, test_exact=None if self.test_exact is None else self.test_exact[:test], **parts)


def check_data(who: str, data: Any) -> None:
    """Raise TypeError, in the name of the caller `who`, if this is not a data set.

    Raises ValueError if it has no training example or not a y for each x, FloatingPointError if it holds NaN or inf.
    """
    if not hasattr(data, "x_train"):
        raise TypeError(f"{who} takes data as ml.datasets.load returns it, not a {type(data).__name__}")
    for part in ("train", "test"):
        check_pair(f"x_{part}", getattr(data, f"x_{part}"), f"y_{part}", getattr(data, f"y_{part}"))


def check_pair(x_name: str, x: Any, y_name: str, y: Any) -> None:
    """Raise the errors of `check_data` for one x and y; x_test may be empty."""
    for name, tensor in ((x_name, x), (y_name, y)):
        check_type(name, tensor, Tensor, "a tensor (use torch.as_tensor)")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}{' of nested ones' * tensor.is_nested}")
    sizes = [len(tensor) if tensor.dim() else 0 for tensor in (x, y)]
    may_be_empty = x_name == "x_test"
    if sizes[0] != sizes[1] or not (sizes[0] or may_be_empty):
        least = "" if may_be_empty else ", one or more"
        raise ValueError(f"{x_name} and {y_name} must be of as many examples{least}, got {sizes[0]} and {sizes[1]}")
    for name, tensor in ((x_name, x), (y_name, y)):
        if tensor.is_floating_point() and tensor.numel():
            check_finite(f"{name} of the data holds NaN or inf", tensor)


def as_input(x: Tensor, like: Tensor) -> Tensor:
    """Return x on the device of `like`, a weight; and in its dtype, unless x has whole numbers or booleans."""
    return x.to(like) if x.is_floating_point() else x.to(like.device)


def as_target(y: Tensor, like: Tensor) -> Tensor:
    """Return y on the device of `like`, a weight; float64 as float32, unless the weight is float64 too."""
    y = y.to(like.device)
    return y.float() if y.dtype == torch.float64 != like.dtype else y


def batches_in(n: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of batches of n examples in an epoch. Raises ValueError if `drop_last` leaves none."""
    if drop_last and batch_size > n:
        raise ValueError(f"drop_last leaves no batch of {batch_size} from {n} examples: take batch_size {n} or less")
    return n // batch_size if drop_last else -(-n // batch_size)


@lru_cache(maxsize=4)
def order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the order of n examples in an epoch, (n,) int64; it depends on these numbers alone.

    The tensor is shared by all callers, who must not change it.
    """
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))


def names() -> list[str]:
    """Return the names that `load` takes; it also takes the path of an .npz or of a folder of images."""
    return list(LOADERS)


def load(
    name: str | os.PathLike[str] = "mnist5k",
    root: str | os.PathLike[str] | None = None,
    shape: Sequence[int] | None = None,
    *,
    test_fraction: float = 0.2,
    seed: int = 0,
    first_label: int = 0,
) -> Data:
    """Load a data set by name, or from the path of a folder of images or of an .npz, into memory.

    Data that does not fit into memory can be given to `ml.fit` as a Dataset or a DataLoader. `root`: default,
    $MEMDFA_DATA, else memdfa_lab in the user's cache folder. It is searched for NAME.npz, then for torchvision's files;
    if neither is there, torchvision downloads them. `shape` (C, H, W): images are padded with the darkest pixel, and a
    grey channel is repeated. Each value is reduced by the training mean of its channel, then divided by the max - min
    of all training values. The global generator is left alone.

    A folder has a folder of images for each class, or folders train and test (or val) of that kind. Without a test
    folder, `test_fraction` of each class is taken for testing, by `seed`. Images are read in colour, or in grey if C is
    1, and scaled and cropped to (H, W) of the shape; without a shape they must all have one size.

    An .npz has x_train, y_train, x_test, y_test. x is uint8, uint16 or float: images (N, H, W), (N, H, W, C) or (N, C,
    H, W) with C = 1, 3 or 4, rows (N, F), whose columns are the channels, or, with `shape` (C, L), signals (N, C, L).
    Rows of larger whole numbers, such as tokens, stay as they are. y is whole numbers, (N,) or (N, 1), from
    `first_label` on, which become 0..K-1. test_exact (N,), if there, is False for test images that are close copies. An
    alpha channel is left out.

    Raises ValueError for an unknown name, a damaged file, a shape that is not possible, or a failed download.
    """
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
    path = Path(text).expanduser()
    if text.lower().endswith(".npz"):
        signals = isinstance(shape, Sequence) and len(shape) == 2
        return _normalised(path.stem, read_npz(path, signals, check_int("first_label", first_label, 0)), shape)
    if text and text not in LOADERS and path.is_dir():
        with of_an_extra():
            return _normalised(path.resolve().name, image_folder(path, shape, test_fraction, seed), None)
    lookup("data set", text or name, {**LOADERS, "the path of a folder of images or of an .npz": None})
    folder = Path(root or os.environ.get("MEMDFA_DATA") or _cache()).expanduser()
    path = folder / f"{text}.npz"
    if text not in SIZES or not path.exists():
        with of_an_extra():
            return _normalised(text, LOADERS[text](folder), shape)
    arrays = read_npz(path)
    found = tuple((len(arrays[key]), *arrays[key].shape[2:]) for key in ("x_train", "x_test"))
    how = f"train and test (N, H, W) = {found}, not {SIZES[text]}: replace it, or pass its path as the name"
    require(found == SIZES[text], f"{path} is not the whole of {text}: {how}")
    return _normalised(text, arrays, shape)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "memdfa_lab"


def _normalised(name: str, arrays: Arrays, shape: Sequence[int] | None) -> Data:
    """Pad, repeat grey, subtract the training mean of each channel, divide by the training max - min."""
    x_train, y_train, x_test, y_test = (arrays[key] for key in KEYS)
    own = x_train.shape[1:]
    wanted = own if shape is None else tuple(shape) if isinstance(shape, Sequence) else (shape,)
    fits = len(wanted) == len(own) and all(isinstance(w, int) and w >= n for w, n in zip(wanted, own, strict=True))
    fits = wanted == own if len(own) < 3 else fits and own[0] in (1, wanted[0])
    why = (
        "which can be padded to more height and width, and repeated over channels if grey" if len(own) == 3 else "which"
    )
    require(fits, f"{name} cannot have the shape {wanted}: it is {own}, {why}")
    labels, test_labels = (torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test))
    exact = torch.from_numpy(arrays["test_exact"]) if "test_exact" in arrays else None
    classes = len(labels.unique())
    if x_train.dtype == np.int64:  # tokens
        tokens = (torch.from_numpy(x) for x in (x_train, x_test))
        return Data(name, next(tokens), labels, next(tokens), test_labels, torch.zeros(1), 1.0, classes, exact)
    low, high = float(x_train.min()), float(x_train.max())
    require(low < high, f"{name}: all training pixels are {low:g}, so there is nothing to learn")
    margins = [
        margin
        for w, n in zip(wanted[:0:-1], own[:0:-1], strict=True)
        for margin in ((w - n) // 2, w - n - (w - n) // 2)
    ]

    # Keep one channel and bytes as long as possible: MNIST at 3x32x32 is nearly a gigabyte.
    train, test = (F.pad(torch.from_numpy(x.copy()), margins, value=low).float() for x in (x_train, x_test))
    mean = train.mean(dim=[0, *range(2, train.dim())], dtype=torch.float64).float().view(-1, *[1] * (len(own) - 1))
    for x in (train, test):
        x.sub_(mean).div_(high - low)
    if len(own) == 3:
        train, test, mean = (x.expand(*x.shape[:-3], wanted[0], -1, -1).contiguous() for x in (train, test, mean))
    return Data(name, train, labels, test, test_labels, mean, high - low, classes, exact)


def flip_and_crop(padding: int = 4) -> Callable[[Tensor], Tensor]:
    """Return an `augment` for `ml.fit`: each image (C, H, W) is flipped at random, padded, and cropped at random.

    It uses torchvision.transforms.v2. The padding is 0, the training mean.
    """
    return partial(_flipped_and_cropped, padding=check_int("padding", padding, 0))


def _flipped_and_cropped(x: Tensor, padding: int) -> Tensor:
    with of_an_extra():
        from torchvision.transforms import v2

    change = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(x.shape[-2:], padding)])
    return torch.stack([change(image) for image in x])
