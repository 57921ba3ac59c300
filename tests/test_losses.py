"""The losses by name: torch's own on one-hot labels, in value, gradient and dtype; labels that are none."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memdfa_lab.lab.losses import LOSSES, as_mean, token_cross_entropy

ON_ONE_HOT = {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ON_ONE_HOT)
def test_a_loss_is_torchs_on_one_hot_labels(name, dtype):
    y = torch.tensor([2, 0, 2, 3])
    ours, theirs = (torch.linspace(-2, 3, 20, dtype=dtype).view(4, 5).requires_grad_() for _ in range(2))
    loss, wanted = LOSSES[name](ours, y), ON_ONE_HOT[name](theirs, F.one_hot(y, 5).to(dtype))
    loss.backward()
    wanted.backward()
    assert loss.dtype == dtype
    assert torch.equal(loss, wanted)
    assert torch.equal(ours.grad, theirs.grad)


def test_mean_squared_error_by_hand():
    output = torch.tensor([[1.0, 3.0], [-1.0, 0.0]])
    assert LOSSES["mse"](output, torch.tensor([1, 0])) == (1 + 4 + 4 + 0) / 4


@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_are_no_classes_are_refused(name):
    for wrong in ([0, 5], [-1, 0]):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            LOSSES[name](torch.zeros(2, 5), torch.tensor(wrong))


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")  # torch warns before it raises
@pytest.mark.parametrize("name", ON_ONE_HOT)
def test_labels_of_another_shape_or_dtype_are_refused(name):
    with pytest.raises((RuntimeError, ValueError), match="size"):
        LOSSES[name](torch.zeros(4, 5), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="dtype"):
        LOSSES[name](torch.zeros(2, 5), torch.tensor([0.0, 1.0]))


class Doubled(nn.CrossEntropyLoss):
    """A loss with a forward of its own."""

    def forward(self, logits, y):
        return 2 * super().forward(logits, y)


def hooked():
    loss_fn = nn.CrossEntropyLoss()
    loss_fn.register_forward_hook(lambda module, given, loss: 2 * loss)
    return loss_fn


@pytest.mark.parametrize("loss_fn", [*LOSSES.values(), nn.CrossEntropyLoss(), partial(F.cross_entropy, weight=None)])
def test_the_weight_of_a_part_is_what_its_mean_divides_by(loss_fn):
    assert as_mean(loss_fn).weight(torch.tensor([0, 1, 1])) == 3


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 20.0, 300.0])])
@pytest.mark.parametrize("y", [[2, 255, 1, 1], [255, 255, 255, 255]])
def test_ignored_labels_weigh_nothing(weight, y):
    y, mean = torch.tensor(y, dtype=torch.uint8), as_mean(nn.CrossEntropyLoss(weight, ignore_index=255))
    logits = torch.linspace(-2, 3, 12).view(4, 3)
    total = F.cross_entropy(logits, y, weight, ignore_index=255, reduction="sum")
    assert mean.weight(y) == (0 if y[0] == 255 else 3 if weight is None else 340)
    assert mean.weight(y) * F.cross_entropy(logits, y, weight, ignore_index=255).nan_to_num() == pytest.approx(total)


OTHERS = {
    "a sum": partial(F.cross_entropy, reduction="sum"),
    "a sum, as torch wrote it once": partial(F.cross_entropy, size_average=False),
    "a module's sum": nn.CrossEntropyLoss(reduction="sum"),
    "options without names": partial(F.cross_entropy, torch.zeros(2, 3)),
    "weights and smoothing": nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1),
    "a subclass": Doubled(),
    "hooks": hooked(),
    "a function": lambda logits, y: F.cross_entropy(logits, y),
    "another of torch's": nn.NLLLoss(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_loss_that_may_be_no_mean_is_not_taken_for_one(name):
    assert as_mean(OTHERS[name]) is None


def test_the_loss_of_tokens_is_cross_entropy_with_the_classes_last():
    logits, y = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12).view(3, 4) % 6
    y[1, 2] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(token_cross_entropy(logits, y), expected)
    weight = as_mean(token_cross_entropy).weight
    parts = [(logits[:1], y[:1]), (logits[1:], y[1:])]
    total = sum(token_cross_entropy(*part).item() * weight(part[1]) for part in parts)
    assert total / 11 == pytest.approx(expected.item())
