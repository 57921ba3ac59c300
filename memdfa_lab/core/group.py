"""The processes that train one network together: here one process alone, with nothing to exchange."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Group:
    """One process. `lab.distributed.Group` has the same methods for several, each with its part of the batch."""

    rank, size = 0, 1

    share = 1.0  # by how much this process's gradients of the loss's other terms count in the sum over all

    def error(
        self, compute: Callable[[Tensor, Any], tuple[Tensor, Tensor]], logits: Tensor, y: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of the whole batch, 0-d, and this process's rows of its e = dloss/dlogits, (n, C).

        compute(logits, y) returns the loss and e of some rows.
        """
        return compute(logits, y)

    def start_sum(self, parameters: Sequence[Tensor], update: Callable[[], None]) -> None:
        """Begin to sum these parameters' gradients over the processes, and call `update` when that is done."""
        update()

    def finish_sum(self) -> None:
        """Wait for the sum that was begun, if there is one, and call its `update`."""

    def sum(self, parameters: Sequence[Tensor]) -> None:
        """Sum these parameters' gradients over the processes, unless `start_sum` has done so."""

    @property
    def send_buffers(self) -> list[Tensor]:
        """Memory that is kept to send from."""
        return []
