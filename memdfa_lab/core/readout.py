"""The small classifier whose loss teaches a block: what it sees of the block's output, and its losses."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.matrices import LARGE_BYTES
from memdfa_lab.core.signal import MODES

POOLS = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by how many dimensions a batch has
OF_SIGNALS = nn.Conv1d, nn.ConvTranspose1d
Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """What a readout sees of a block's output, of this shape for one example, to give logits of that shape.

    `units`: the dimension of the units in a batch of outputs, 1 or -1; the classes are in the same one. `each`: whether
    each position is classified by itself. Otherwise one dense layer sees the output, averaged to `positions` along each
    dimension.
    """

    shape: Shape
    logits: Shape
    units: int
    each: bool
    positions: int

    def sizes(self) -> tuple[int, int]:
        """Return how many numbers the linear layer takes and gives."""
        if self.each:
            return self.of_units(self.shape), self.of_units(self.logits)
        return self.of_units(self.shape) * prod(self.grid()), prod(self.logits)

    def mixed(self) -> Shape:
        """Return the shape of the weights of the second layer."""
        units, dims = self.of_units(self.shape), len(self.shape)
        if dims + 1 not in CONVOLUTIONS:
            return (prod(self.shape),) * 2
        return (units, units) if self.units == -1 else (units, units, *[3] * (dims - 1))

    def of_units(self, shape: Shape) -> int:
        """Return the size of the dimension of units; 1 if there is none."""
        return shape[min(self.units, 0)] if shape else 1

    def grid(self) -> list[int]:
        """Return to how many positions the output is averaged along each dimension."""
        others = self.shape[:-1] if self.units == -1 else self.shape[1:]
        return [min(self.positions, size) if len(self.shape) + 1 in POOLS else size for size in others]


def view_of(block: nn.Module, shape: Shape, logits: Shape, positions: int, feedback: Feedback) -> View:
    """Return what a readout sees of a block's output; `feedback.positions` says where units are, as it does for B.

    Raises ValueError if the classes may be in either dimension.
    """
    units = 1 if len(shape) < 2 else _units(block, shape, feedback.positions)
    shared = feedback.class_dim((0, *logits), (0, *shape))  # 0 stands for N
    of_images = len(shape) == len(logits) in (3, 4) and feedback.positions != "dense"
    return View(shape, logits, shared or units, shared is not None or of_images, positions)


def _units(block: nn.Module, shape: Shape, positions: str) -> int:
    """Return the dimension of the units where the shapes alone do not say it."""
    layers = [part for part in block.modules() if isinstance(part, (nn.Linear, *OF_SIGNALS))]
    words = len(shape) == 2 and not (layers and isinstance(layers[-1], OF_SIGNALS))
    return -1 if positions == "classes last" or (words and positions != "classes first") else 1


class Readout(nn.Linear):
    """A linear layer on what its view shows of a block's output.

    `mixed`: the shape of the weights of a second layer, `mix`, whose output gives the similarities; None for none.
    """

    def __init__(self, inputs: int, classes: int, mixed: Sequence[int] | None = None):
        super().__init__(inputs, classes)
        self.mix = None
        if mixed is not None:
            units, dense = mixed[0], len(mixed) == 2
            layer = nn.Linear if dense else partial(CONVOLUTIONS[len(mixed)], kernel_size=3, padding=1)
            self.mix = layer(units, units, bias=False)

    def classify(self, h: Tensor, view: View) -> Tensor:
        """Return the logits (N, ...) for a block's output h (N, ...).

        Where h has other positions than the logits, as images of another size, those of h are interpolated.
        """
        if not view.each:
            h, size = h.movedim(view.units, 1) if h.dim() > 2 else h, view.grid()
            pool: Any = POOLS.get(h.dim())
            seen = h if pool is None else pool(h, size if len(size) > 1 else size[0])
            return self(seen.reshape(len(h), -1)).view(len(h), *view.logits)  # type: ignore[no-any-return]
        out: Tensor = self(h.movedim(view.units, -1)).movedim(-1, 1)
        wanted = view.logits[:-1] if view.units == -1 else view.logits[1:]
        out = out if out.shape[2:] == wanted else F.interpolate(out, wanted, mode=MODES[len(wanted)])
        return out.movedim(1, view.units)

    def features(self, h: Tensor, view: View) -> Tensor:
        """Return the second layer's features of each example: the standard deviation of each unit over positions."""
        has_positions = h.dim() in CONVOLUTIONS
        out: Tensor = self.mix(h if has_positions else h.reshape(len(h), -1))  # type: ignore[misc]
        if not has_positions or prod(view.shape) == view.of_units(view.shape):
            return out.flatten(1)
        return out.flatten(1, -2).std(1) if view.units == -1 else out.flatten(2).std(2)

    def dissimilarity(self, features: Tensor, y: Tensor) -> Tensor:
        """Return the mean squared difference between how alike examples are and how alike their labels y (N,) are.

        The similarity of a pair is the cosine of its features (N, units), each row centred. For one-hot labels it is
        1 within a class and -1 / (classes - 1) between classes (Nøkland and Eidnes 2019).
        """
        centred = F.normalize(features - features.mean(1, keepdim=True), dim=1)
        apart = -1 / max(self.out_features - 1, 1)
        alike = (y[:, None] == y).to(features.dtype).mul_(1 - apart).add_(apart)
        return F.mse_loss(centred @ centred.t(), alike)


def check_fit(readouts: Sequence[Readout], views: Sequence[View], x: Tensor) -> None:
    """Raise ValueError if a readout does not fit what it would see on x (N, ...)."""
    for i, (readout, view) in enumerate(zip(readouts, views, strict=True)):
        was, now = (readout.in_features, readout.out_features), view.sizes()
        if was != now:
            raise ValueError(
                f"block {i}'s readout was made for {was[0]} inputs and {was[1]} logits, and a batch of shape "
                f"{tuple(x.shape)} now gives {now[0]} and {now[1]}; no weight was changed: keep to one size of x, or "
                "take MemDFA"
            )


def warn_of(views: Sequence[View], similarity: bool, by_position: bool) -> None:
    """Warn if readouts will take more than 1 GiB or, `by_position`, see positions that they should perhaps not see."""
    whole = [i for i, view in enumerate(views) if not view.each and 1 < len(view.shape) == len(view.logits)]
    if whole and by_position:
        view = views[whole[0]]
        warnings.warn(
            f"the readout of block {whole[0]} sees all of its output {view.shape} at once, whose positions are not "
            f"those of the logits {view.logits}: where a position must not see later ones, take MemDFA",
            stacklevel=2,
        )
    sizes = [prod(view.sizes()) + (prod(view.mixed()) if similarity else 0) for view in views]
    if 4 * sum(sizes) > LARGE_BYTES:
        i = max(range(len(sizes)), key=sizes.__getitem__)
        fewer = ", leave similarity out" if similarity else ""
        warnings.warn(
            f"the readouts have {sum(sizes):,} numbers ({sum(sizes) / 2**28:.2f} GiB), and that of block {i} has "
            f"{sizes[i]:,}, for an output {views[i].shape}: let it put out less{fewer}, or take MemDFA",
            stacklevel=2,
        )
