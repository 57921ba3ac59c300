"""The processes that train one network together. This one is a single process, which has nothing to exchange."""

from collections.abc import Callable, Sequence

from torch import Tensor

Compute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # the loss, detached, and e, of these logits and y


class Group:
    """One process. `lab.distributed.Group` has the same methods for several, each with its part of the batch.

    Attributes:
        share: This process's weight in the last step, for gradients of the loss with respect to anything but the
            logits. The gradient of the whole loss is the sum over processes of `share` times each process's gradient.
    """

    rank, size, share = 0, 1, 1.0

    def error(
        self, loss_fn: Callable[..., Tensor], compute: Compute, logits: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of the whole batch, 0-d, and this process's rows of its e = dloss/dlogits, (n, C).

        `logits` (n, C) and y are this process's. `compute(logits, y)` returns the loss, detached, and e, of the
        examples that it is given, by `loss_fn`. If it is called more than once, the last call counts.
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
        """The buffers that are kept for sending."""
        return []
