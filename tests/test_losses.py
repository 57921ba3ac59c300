"""The losses by name: torch's own on one-hot labels, in value, gradient and dtype; labels that are none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memdfa_lab.lab.losses import LOSSES

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
