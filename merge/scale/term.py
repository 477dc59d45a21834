"""A term of the scale model: one part of log K, with its prior, its start and its own steps.

A new term is a class in a file of ``terms`` and a line in :mod:`braggflux.merge.scale.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch, ObservationTable

#: Adds up sums over a batch with those of other processes, in place.
AddUp = Callable[[Sequence[Tensor]], None]


def keep_sums(sums: Sequence[Tensor]) -> None:
    """Leave sums as they are: there is no other process."""


class ScaleTerm(nn.Module, ABC):
    """Part of log K; :class:`~braggflux.merge.scale.model.ScaleModel` is the sum of all.

    Its parameters are moved by Adam. A term whose parameters depend on the observations by more
    than what a batch holds keeps what it needs of the whole table; ``batch.term_rows`` are rows
    of that table.
    """

    @classmethod
    @abstractmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """Make the term for these data, or None where they have no such term."""

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Part of log K of each term of the observations, (T,), or one number for all, ()."""

    def penalty(self) -> Tensor:
        """Minus the log-prior of the parameters, up to a constant, () [nats]."""
        # a number, which adds to tensors of any device
        return torch.zeros((), dtype=torch.float64, device="cpu")

    def start(self, batch: Batch, observed: Tensor, expected: Tensor) -> bool:
        """Set the parameters to what ratios of intensities say before anything is fitted.

        Parameters
        ----------
        batch : Batch
            All observations.
        observed : Tensor, (N,)
            Intensities divided by K as it is; 0 where an observation is not used.
        expected : Tensor, (N,)
            Of them by the amplitudes; 0 likewise.

        Returns
        -------
        bool
            Whether K has changed.
        """
        return False

    def start_unseen(
        self, batch: Batch, was_used: Tensor, observed: Tensor, expected: Tensor
    ) -> bool:
        """Set parameters that no observation in use has determined, as :meth:`start` does.

        Parameters
        ----------
        batch : Batch
            All observations.
        was_used : Tensor, (N,) bool
            The observations that the parameters were fitted to.
        observed, expected : Tensor, (N,)
            Weighted intensities, and what K as it is makes of the amplitudes.

        Returns
        -------
        bool
            Whether K has changed.
        """
        return False

    @property
    def newton_parameters(self) -> tuple[nn.Parameter, ...]:
        """Parameters that :meth:`newton_step` can move in place of Adam."""
        return ()

    def newton_step(self, batch: Batch, information: Tensor, add_up: AddUp = keep_sums) -> None:
        """Move the ``newton_parameters`` by their gradients over their information.

        Parameters
        ----------
        batch : Batch
            The parameters hold the gradients of minus its part of the ELBO [nats].
        information : Tensor, (N,)
            Of each observation on its log K: expected curvature of minus the log-likelihood; 0
            where an observation is not used.
        add_up : callable
            Adds up sums over the batch with those of other processes, in place.
        """

    def restore(self) -> None:
        """Compute anew what depends on buffers that were loaded from a file."""


def parts(values: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Split what all sweeps or datasets have one after the other."""
    return torch.split(values, list(counts))


def log_ratio(above: Tensor, below: Tensor, index: Tensor, n: int) -> Tensor:
    """Log of the ratio of the sums of each group, (n,); 0 where a group has nothing.

    Parameters
    ----------
    above, below : Tensor, (N,)
    index : Tensor, (N,) int64
        Group of each.
    n : int
        Number of groups.
    """
    a = above.new_zeros(n).index_add_(0, index, above)
    b = above.new_zeros(n).index_add_(0, index, below)
    known = (a > 0) & (b > 0)
    return torch.where(known, a / b.clamp_min(1e-30), torch.ones_like(a)).log().clamp(-5.0, 5.0)


@torch.no_grad()
def start_unseen_groups(
    log_scale: Tensor, index: Tensor, was_used: Tensor, observed: Tensor, expected: Tensor
) -> None:
    """Add the ratio observed / expected to the log-scale, (n,), of groups without a used member.

    Parameters are those of :meth:`ScaleTerm.start_unseen`; ``index`` is the group of each
    observation, (N,).
    """
    n = len(log_scale)
    new = index.new_zeros(n).index_add_(0, index, was_used.long()) == 0
    change = log_ratio(observed, expected, index, n)
    log_scale[new] += change[new]
