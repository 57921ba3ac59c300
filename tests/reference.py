"""What the rules are compared with: numpy twins in float64 written from the equations, plain autograd, comparisons.

The twins know h_i = f_i(W_i h_{i-1} + b_i), e = dL/dlogits and three ways back (BP: W^T; FA: B in its place; DFA: e B_i
at each block's output). No torch computes anything in them; the model gives its numbers and settings.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from problems import Problem, Record, record, train
from torch import Tensor, nn

import memdfa_lab as ml
from memdfa_lab.core.compat import ANY_CONVOLUTION
from memdfa_lab.core.feedback import Feedback, Regenerated
from memdfa_lab.core.rule import Rule

Array = NDArray[np.float64]
FAULTS = int(os.environ.get("MEMDFA_FAULTS", "2"))  # how many kills a test gets; some tests take multiples
TOLERANCE = 1e-12  # relative to the larger of 1 and the tensor's largest value


# ---------------------------------------------------------------------------------------------------- comparisons


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    """Compare two trees of tensors and plain values, bit for bit."""
    assert type(a) is type(b), f"{where}: {type(a).__name__} against {type(b).__name__}"
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, f"{where}: {a.dtype} against {b.dtype}"
        assert torch.equal(a, b), f"{where}: differs by {(a.double() - b.double()).abs().max():.3g}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(a)} against {sorted(b)}"
        for key in a:
            assert_identical(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{where}: {len(a)} against {len(b)} items"
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_identical(left, right, f"{where}[{i}]")
    else:
        assert a == b, f"{where}: {a!r} against {b!r}"


def assert_same_training(a: Record, b: Record) -> None:
    """Compare losses, weights and buffers, optimizer state and global RNG, bit for bit."""
    for name in ("losses", "tensors", "optimizer", "rng"):
        assert_identical(getattr(a, name), getattr(b, name), name)


def assert_close(a: Any, b: Any, where: str = "") -> None:
    """Compare two lists of arrays or tensors, to TOLERANCE."""
    assert len(a) == len(b), f"{where}: {len(a)} against {len(b)} items"
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        left, right = np.asarray(left), np.asarray(right)
        assert left.shape == right.shape, f"{where}[{i}]: {left.shape} against {right.shape}"
        allowed = TOLERANCE * max(1.0, float(np.abs(right).max()))
        np.testing.assert_allclose(left, right, rtol=0, atol=allowed, err_msg=f"{where}[{i}]")


def assert_close_training(a: Record, b: Record) -> None:
    """Compare losses, weights and buffers, to TOLERANCE."""
    assert_close(a.losses, b.losses, "losses")
    assert_close(a.tensors, b.tensors, "tensors")


@contextmanager
def refuses(error: type[Exception], *hints: str) -> Iterator[None]:
    """Expect the error, with a message of one line that contains each hint."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert message
    assert "\n" not in message, f"more than one line: {message}"
    for hint in hints:
        assert hint in message, f"{hint!r} is not in: {message}"


@contextmanager
def refuses_and_keeps(rule: Rule, error: type[Exception], *hints: str) -> Iterator[None]:
    """Expect the error as `refuses` does, and that it leaves the rule's state as it was, and no gradients."""
    before = copy.deepcopy(rule.state_dict())
    with refuses(error, *hints):
        yield
    assert_identical(rule.state_dict(), before)
    assert all(p.grad is None for p in rule.blocks.parameters())


# ---------------------------------------------------------------------------------------------- plain autograd


def train_plainly(problem: Problem, make_optimizer: Callable[..., torch.optim.Optimizer], steps: int) -> Record:
    """Train as every tutorial does: loss.backward() and one optimizer over all parameters."""
    model = problem.build()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        losses = []
        for x, y in problem.batches(steps):
            optimizer.zero_grad()
            loss = problem.loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return record(losses, model, [optimizer])


def surrogate_gradients(rule: Rule, x: Tensor, y: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Return the loss and DFA's gradients, block by block, as those of one scalar: sum_i <h_i, e B_i> + L."""
    outputs = [x]
    for block in rule.blocks:
        outputs.append(block(outputs[-1].detach()))
    logits = outputs[-1].detach().requires_grad_()  # the last block may be frozen
    e = torch.autograd.grad(rule.loss_fn(logits, y), logits)[0].flatten(1)
    total = loss = rule.loss_fn(outputs[-1], y)
    for i, output in enumerate(outputs[1:-1]):
        B = rule.feedback.dense(i, e.shape[1], output[0].numel(), like=e)
        total = total + (output.flatten(1) * (e @ B)).sum()
    wanted = [[p for p in block.parameters() if p.requires_grad] for block in rule.blocks]
    flat = [p for block in wanted for p in block]
    gradients = iter(torch.autograd.grad(total, flat, materialize_grads=True))  # 0 for a weight that is not used
    return loss.detach(), [[next(gradients) for _ in block] for block in wanted]


# -------------------------------------------------------------------------------------------------- numpy layers


class LinearTwin:
    """a = x W^T + b over the last axis."""

    def __init__(self, W: Array, b: Array | None):
        self.W, self.b = W, b

    def forward(self, x: Array) -> Array:
        self.x = x
        return np.einsum("...i,oi->...o", x, self.W) + (0 if self.b is None else self.b)

    def backward(self, g: Array, B: Array) -> Array:
        flat = g.reshape(-1, g.shape[-1])
        self.dW = np.einsum("no,ni->oi", flat, self.x.reshape(-1, self.x.shape[-1]))
        self.db = flat.sum(0)
        return np.einsum("...o,oi->...i", g, B)


Taps = list[tuple[Any, Any]]  # each position in the kernel, and where in the image it meets the outputs


def _taps(kernel: tuple[int, ...], sizes: Any, stride: Any, dilation: Any) -> Taps:
    taps = []
    for k in np.ndindex(*kernel):
        starts = [d * offset for d, offset in zip(dilation, k, strict=True)]
        ends = [start + s * (size - 1) + 1 for start, s, size in zip(starts, stride, sizes, strict=True)]
        taps.append(((..., *k), (..., *(slice(*cut) for cut in zip(starts, ends, stride, strict=True)))))
    return taps


def _grouped(image: Array, groups: int) -> Array:
    """Return (N, channels, ...) as (N, group, channel of the group, pixel)."""
    return image.reshape(len(image), groups, image.shape[1] // groups, -1)


def _gather(image: Array, W: Array, groups: int, taps: Taps, sizes: Any) -> Array:
    """Return out[n, o, p] = sum over c, k of W[o, c, k] image[n, c, s p + d k], in groups of channels."""
    out = 0
    for k, where in taps:
        weights = W[k].reshape(groups, len(W) // groups, -1)
        out = out + np.einsum("ngcp,goc->ngop", _grouped(image[where], groups), weights)
    return out.reshape(len(image), len(W), *sizes)


def _scatter(g: Array, W: Array, groups: int, taps: Taps, shape: Any) -> Array:
    """Add W[o, c, k] g[n, o, p] to image[n, c, s p + d k]: the transpose of `_gather`."""
    image = np.zeros(shape)
    for k, where in taps:
        weights = W[k].reshape(groups, len(W) // groups, -1)
        image[where] += np.einsum("ngop,goc->ngcp", _grouped(g, groups), weights).reshape(image[where].shape)
    return image


def _correlate(image: Array, g: Array, W: Array, groups: int, taps: Taps) -> Array:
    """Return dW[o, c, k] = sum over n, p of g[n, o, p] image[n, c, s p + d k]."""
    dW = np.zeros_like(W)
    for k, where in taps:
        dW[k] = np.einsum("ngop,ngcp->goc", _grouped(g, groups), _grouped(image[where], groups)).reshape(W.shape[:2])
    return dW


class ConvTwin:
    """A convolution: `_gather` on the padded image."""

    def __init__(self, W: Array, b: Array | None, layer: Any):
        self.W, self.b, self.groups, self.kernel = W, b, layer.groups, W.shape[2:]
        self.stride, self.dilation, self.padding = layer.stride, layer.dilation, layer.padding
        self.output_padding = layer.output_padding
        self.reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]

    def forward(self, x: Array) -> Array:
        named = {"same": [(total // 2, total - total // 2) for total in self.reach], "valid": [(0, 0)] * (x.ndim - 2)}
        sides = named[self.padding] if isinstance(self.padding, str) else [(p, p) for p in self.padding]
        self.padded = np.pad(x, [(0, 0), (0, 0), *sides])
        outer = self.padded.shape[2:]
        sizes = [(n - reach - 1) // s + 1 for n, reach, s in zip(outer, self.reach, self.stride, strict=True)]
        self.taps = _taps(self.kernel, sizes, self.stride, self.dilation)
        self.crop = (..., *(slice(low, n - high) for (low, high), n in zip(sides, outer, strict=True)))
        return self._with_bias(_gather(self.padded, self.W, self.groups, self.taps, sizes))

    def backward(self, g: Array, B: Array) -> Array:
        self.db = g.sum(axis=(0, *range(2, g.ndim)))
        self.dW = _correlate(self.padded, g, self.W, self.groups, self.taps)
        return _scatter(g, B, self.groups, self.taps, self.padded.shape)[self.crop]

    def _with_bias(self, out: Array) -> Array:
        return out if self.b is None else out + self.b.reshape(-1, *[1] * (out.ndim - 2))


class ConvTransposeTwin(ConvTwin):
    """A transposed convolution: `_scatter` into an image that is then cropped; W is (in, out / groups, ...)."""

    def forward(self, x: Array) -> Array:
        self.x, sizes = x, x.shape[2:]
        axes = zip(sizes, self.stride, self.reach, self.output_padding, strict=True)
        outer = [(n - 1) * s + reach + 1 + extra for n, s, reach, extra in axes]
        self.taps = _taps(self.kernel, sizes, self.stride, self.dilation)
        self.crop = (..., *(slice(p, n - p) for p, n in zip(self.padding, outer, strict=True)))
        self.shape = (len(x), self.W.shape[1] * self.groups, *outer)
        return self._with_bias(_scatter(x, self.W, self.groups, self.taps, self.shape)[self.crop])

    def backward(self, g: Array, B: Array) -> Array:
        self.db = g.sum(axis=(0, *range(2, g.ndim)))
        full = np.zeros(self.shape)
        full[self.crop] = g
        self.dW = _correlate(full, self.x, self.W, self.groups, self.taps)
        return _gather(full, B, self.groups, self.taps, self.x.shape[2:])


class PoolTwin:
    """The largest, or the mean, of each window; the gradient goes to the largest, or is shared out."""

    def __init__(self, kernel: int, stride: int, largest: bool):
        self.kernel, self.stride, self.largest = kernel, stride, largest

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        dims = x.ndim - 2
        sizes = [(n - self.kernel) // self.stride + 1 for n in x.shape[2:]]
        taps = _taps((self.kernel,) * dims, sizes, (self.stride,) * dims, (1,) * dims)
        self.where = [where for _, where in taps]
        windows = np.stack([x[where] for where in self.where])
        if not self.largest:
            self.share = np.full(windows.shape, 1 / len(windows))
            return windows.mean(0)
        self.share = (np.arange(len(windows)).reshape(-1, *[1] * x.ndim) == windows.argmax(0)).astype(float)
        return windows.max(0)

    def backward(self, g: Array) -> Array:
        dx = np.zeros(self.shape)
        for where, share in zip(self.where, self.share, strict=True):
            dx[where] += share * g
        return dx


class ElementwiseTwin:
    """h = f(a), whose slope f' follows from h."""

    def __init__(self, f: Callable[[Array], Array], slope: Callable[[Array], Array]):
        self.f, self.slope = f, slope

    def forward(self, a: Array) -> Array:
        self.h = self.f(a)
        return self.h

    def backward(self, g: Array) -> Array:
        return g * self.slope(self.h)


class FlattenTwin:
    """Channels, rows, columns in one, in that order."""

    def __init__(self, start: int):
        self.start = start

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x.reshape(*x.shape[: self.start], -1)

    def backward(self, g: Array) -> Array:
        return g.reshape(self.shape)


WEIGHT_TWINS = (LinearTwin, ConvTwin, ConvTransposeTwin)


def _twin_of(layer: nn.Module) -> Any:
    if isinstance(layer, nn.ReLU):
        return ElementwiseTwin(lambda a: np.maximum(a, 0), lambda h: (h > 0).astype(float))
    if isinstance(layer, nn.Tanh):
        return ElementwiseTwin(np.tanh, lambda h: 1 - h**2)
    if isinstance(layer, nn.Sigmoid):
        return ElementwiseTwin(lambda a: 1 / (1 + np.exp(-a)), lambda h: h * (1 - h))
    if isinstance(layer, nn.Flatten):
        return FlattenTwin(layer.start_dim)
    if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):
        return PoolTwin(layer.kernel_size, layer.stride, isinstance(layer, nn.MaxPool2d))
    W, b = (None if p is None else p.detach().numpy().copy() for p in (layer.weight, layer.bias))
    if isinstance(layer, nn.Linear):
        return LinearTwin(W, b)
    assert isinstance(layer, ANY_CONVOLUTION), layer
    return ConvTransposeTwin(W, b, layer) if layer.transposed else ConvTwin(W, b, layer)


def _loss_and_error(name: str, logits: Array, y: Any) -> tuple[float, Array]:
    """Return L and e = dL/dlogits: each a mean over the batch, so e carries 1/N."""
    N, C = logits.shape
    target = np.eye(C)[y]
    if name == "cross_entropy":
        shifted = logits - logits.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return -(target * log_p).sum() / N, (np.exp(log_p) - target) / N
    if name == "mse":
        return ((logits - target) ** 2).sum() / (N * C), 2 * (logits - target) / (N * C)
    assert name == "bce", name
    p = 1 / (1 + np.exp(-logits))
    return -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum() / (N * C), (p - target) / (N * C)


class Twin:
    """A net in numpy that learns by "bp", "fa" or "dfa" and plain SGD."""

    def __init__(self, problem: Problem, rule: str, feedback: Feedback, lr: float):
        self.rule, self.feedback, self.lr, self.loss = rule, feedback, lr, problem.loss.__name__
        model = problem.build()
        leaves = [m for m in model.modules() if not isinstance(m, nn.Sequential)]
        self.layers = [_twin_of(leaf) for leaf in leaves]
        starts = [i for i, layer in enumerate(self.layers) if isinstance(layer, WEIGHT_TWINS)]
        starts[0] = 0
        ends = [*starts[1:], len(self.layers)]
        self.blocks = [self.layers[start:end] for start, end in zip(starts, ends, strict=True)]
        order = {id(parameter): j for j, parameter in enumerate(model.parameters())}
        self.number = {
            twin: order[id(leaf.weight)]
            for twin, leaf in zip(self.layers, leaves, strict=True)
            if isinstance(twin, WEIGHT_TWINS)
        }

    def _backward(self, layers: list[Any], g: Array) -> Array:
        for layer in reversed(layers):
            if not isinstance(layer, WEIGHT_TWINS):
                g = layer.backward(g)
                continue
            B = layer.W
            if self.rule == "fa":
                B = self.feedback.weight(self.number[layer], torch.from_numpy(layer.W)).numpy()
            g = layer.backward(g, B)
        return g

    def step(self, x: Array, y: Any) -> float:
        h, outputs = x, []
        for block in self.blocks:
            for layer in block:
                h = layer.forward(h)
            outputs.append(h)
        loss, e = _loss_and_error(self.loss, h, y)
        if self.rule == "dfa":
            for i, (block, output) in enumerate(zip(self.blocks[:-1], outputs, strict=False)):
                like = torch.zeros((), dtype=torch.float64)
                B = self.feedback.dense(i, e.shape[1], output[0].size, like=like).numpy()
                self._backward(block, (e @ B).reshape(output.shape))
            self._backward(self.blocks[-1], e)
        else:
            self._backward(self.layers, e)
        for layer in self.number:
            layer.W = layer.W - self.lr * layer.dW
            if layer.b is not None:
                layer.b = layer.b - self.lr * layer.db
        return loss

    def parameters(self) -> list[Array]:
        return [array for layer in self.number for array in (layer.W, layer.b) if array is not None]


def assert_matches_twin(rule: Rule, twin: str, problem: Problem, steps: int = 4) -> None:
    """Train the rule (SGD, lr 0.1, feedback seed 3) and its numpy twin: the same losses and weights, to TOLERANCE."""
    reference = Twin(problem, twin, Regenerated(seed=3), lr=0.1)
    losses = [reference.step(x.numpy(), y.numpy()) for x, y in problem.batches(steps)]
    got = train(rule, problem, steps)
    assert_close(got.losses, losses, "losses")
    assert_close(got.tensors, reference.parameters(), "weights")


def held_by_formula(rule: str, depth: int, batch: int, width: int, inputs: int, classes: int, **how: str) -> int:
    """Return what is in memory at the peak of a step of an MLP of equal hidden layers, by the closed form."""
    f = ml.memory.formula
    numbers = {f.N: batch, f.n: width, f.n_0: inputs, f.L: depth, f.C: classes, f.s: 4, f.k: f.SMALL_BYTES}
    return int((f.resting(rule, **how) + f.peak(rule, **how)).subs({symbol: int(n) for symbol, n in numbers.items()}))
