"""torch.autocast on tensors without data, which torch's own passes by: the same casts, by the names of functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memdfa_lab.core import precision
from memdfa_lab.core.compat import run_backward, tree_map_only

# What the CPU's autocast runs in the lower precision, and what in float32 (torch's docs, "CPU Ops that can autocast")
LOWER = {"linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "prelu"}
LOWER |= {"scaled_dot_product_attention", *(f"conv{way}{n}d" for way in ("", "_transpose") for n in (1, 2, 3))}
FLOAT32 = {"avg_pool3d", "adaptive_avg_pool3d", "binary_cross_entropy", "binary_cross_entropy_with_logits", "prod"}
FLOAT32 |= {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "ctc_loss"}
FLOAT32 |= {"soft_margin_loss", "multi_margin_loss", "poisson_nll_loss", "cosine_embedding_loss", "cdist", "trace"}
FLOAT32 |= {"reflect", "replicate"}  # the ways to pad


class Autocast(TorchFunctionMode):
    """Within it, functions compute as in torch.autocast("cpu", dtype, cache_enabled=False)."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward and kwargs.get("gradient") is not None:
            with self:  # torch takes a mode off while it runs a function
                return run_backward(args[0], kwargs["gradient"])
        name = str(getattr(func, "__name__", "")).strip("_")
        if name == "pad":
            name = str(kwargs.get("mode", args[2] if len(args) > 2 else "constant"))
        to = self.dtype if name in LOWER else torch.float32 if name in FLOAT32 else None
        if to is not None and "out" not in kwargs:

            def cast(tensor: Tensor) -> Tensor:
                return tensor.to(to) if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor

            # from the last on, as torch does: gradients come back in the order of the casts
            kwargs = tree_map_only(Tensor, cast, kwargs)
            args = [tree_map_only(Tensor, cast, value) for value in reversed(args)][::-1]
        return func(*args, **kwargs)


@contextmanager
def without_data(dtype: torch.dtype) -> Iterator[None]:
    """Compute within in this precision on tensors without data, where rules see that autocast is on."""
    with torch.autocast("cpu", dtype, cache_enabled=False), Autocast(dtype):
        yield


precision.without_data = without_data
