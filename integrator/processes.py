"""The processes of one run: ``torchrun`` starts them, sums and the start of an epoch are shared.

Every process holds the whole model and the table of all observations, and computes its share of
each batch of shoeboxes and of the merge's observations. Gradients and the few sums that go with
them are added up over the processes, so that all take the same step. The first process alone
writes files. A run of one process does nothing of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from braggflux.integrator.errors import UserError, brief

#: The first process may cut boxes, or write files, for so long while the others wait.
PATIENCE = timedelta(hours=24)


Made = TypeVar("Made")


@dataclass(frozen=True)
class Processes:
    """Number of this process and how many there are.

    Parameters
    ----------
    rank, size : int
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Processes:
        """Read what ``torchrun`` has told this process; one process without it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def share(self, n: int) -> slice:
        """Rows of ``n`` that this process computes."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Join the other processes, by NCCL on GPUs and Gloo otherwise.

        Raises
        ------
        UserError
            Another process has ended before the run has.
        """
        if self.is_alone:
            yield
            return
        backend = "nccl" if device.type == "cuda" else "gloo"
        with _explained():
            dist.init_process_group(backend, timeout=PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over the processes, in place; one message for each type."""
        if self.is_alone:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            own = [t for t in tensors if t.dtype == dtype]
            message = torch.cat([t.flatten() for t in own])
            with _explained():
                dist.all_reduce(message)
            for tensor, total in zip(own, message.split([t.numel() for t in own]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def add_up_gradients(
        self, parameters: Sequence[nn.Parameter], others: Sequence[Tensor]
    ) -> None:
        """Add up the gradients of parameters, and other tensors with them."""
        if self.is_alone:
            return
        for parameter in parameters:
            if parameter.grad is None:  # this process had no row of the batch
                parameter.grad = torch.zeros_like(parameter)
        self.add_up([*(p.grad for p in parameters if p.grad is not None), *others])

    def put_together(self, columns: dict[str, Tensor], own: Tensor) -> None:
        """Set the rows of all processes in columns, (N,) each, of which ``own`` are this one's."""
        if self.is_alone:
            return
        first = next(iter(columns.values()))
        is_set = torch.zeros(len(first), dtype=torch.int64)
        is_set[own] = 1
        is_set = is_set.to(first.device)
        given = {name: torch.where(is_set > 0, v, 0) for name, v in columns.items()}
        self.add_up([is_set, *given.values()])
        for name, values in given.items():
            columns[name].copy_(torch.where(is_set > 0, values, columns[name]))

    @torch.no_grad()
    def copy_from_first(self, module: nn.Module) -> None:
        """Set parameters and saved buffers to those of the first process, to the bit."""
        if self.is_alone:
            return
        for value in module.state_dict().values():
            with _explained():
                dist.broadcast(value, 0)

    def copy_random_state(self, device: torch.device) -> None:
        """Draw from now on what the first process draws, which has written files meanwhile."""
        if self.is_alone:
            return
        on_gpu = device.type == "cuda"
        state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
        message = state.to(device)
        with _explained():
            dist.broadcast(message, 0)
        if on_gpu:
            torch.cuda.set_rng_state(message.cpu(), device)
        else:
            torch.set_rng_state(message)

    def from_first(self, make: Callable[[], Made]) -> Made:
        """Give all processes what the first one makes."""
        if self.is_alone:
            return make()
        message: list[Any] = [make() if self.is_first else None]
        with _explained():
            dist.broadcast_object_list(message, 0)
        return message[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if not self.is_alone:
            with _explained():
                dist.barrier()


ALONE = Processes()


@contextmanager
def _explained() -> Iterator[None]:
    """Say in one line that a message did not come because its sender is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = brief(error)
        raise UserError(
            f"another process of this run has ended ({reason}); look for its message above, then "
            "give the same command again (run: with --resume), with any number of processes"
        ) from error
