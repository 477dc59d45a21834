"""Prior of the amplitudes: what a merger, a fit and an output ask of it.

Priors stand on each other. Wilson's, at the bottom, knows the mean intensity of every unique
reflection. Each one above knows more of some rows (a model's amplitude, a relative) and leaves the
others to the prior below. :mod:`braggflux.merge.prior.registry` builds the one that a
configuration names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from braggflux.integrator.distributions.nakagami import Nakagami

Kind = TypeVar("Kind", bound="AmplitudePrior")
#: Rows with a parent and the rows of their parents.
Level = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CoupledWidth:
    """Widths of the amplitudes: own, and in common with the root of their tree, (R,).

    Parameters
    ----------
    own_variance : Tensor
        Of what a row does not share with its root; 0 for the root itself.
    shared : Tensor
        Standard deviation of the root, times the slopes on the way from it.
    """

    own_variance: Tensor
    shared: Tensor

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of each amplitude for itself."""
        return (self.own_variance + self.shared**2).sqrt()


class AmplitudePrior(nn.Module, ABC):
    """p(F) of all unique reflections, (R,).

    A merger needs the divergence of q(F) from it (``kl``) and the mean of F^2 (``spread``); the
    Newton steps of q(F) its curvature (``stiffness``); outputs and predictions the ``width`` of
    amplitudes whose relatives are uncertain too.
    """

    @abstractmethod
    def spread(self) -> Tensor:
        """Mean of F^2 before any data, relative or model, epsilon Sigma, (R,)."""

    @abstractmethod
    def kl(self, q: Nakagami) -> Tensor:
        """Divergence KL[q(F) || p(F)] of each row, (R,) [nats]."""

    @abstractmethod
    def stiffness(self, mean_square: Tensor) -> Tensor:
        """Curvature in log F^2 beside that of Wilson's prior, (R,), at F^2 = ``mean_square``."""

    @abstractmethod
    def precision(self) -> Tensor:
        """Least precision of F that the prior gives to a row without a parent, (R,)."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """Minus the log-prior of the prior's own parameters, up to a constant, () [nats]."""

    @abstractmethod
    def start(self, intensity: Tensor, is_observed: Tensor) -> None:
        """Start the prior's parameters from merged intensities, (R,) each."""

    @property
    def is_coupled(self) -> bool:
        """Whether amplitudes are tied to those of their relatives now."""
        return False

    @property
    def levels(self) -> list[Level]:
        """Rows at each step below the rows without parent, and their parents; none by default."""
        return []

    def couple(self) -> None:
        """Tie amplitudes to those of their relatives from now on; a prior without has none."""

    def uncouple(self) -> None:
        """Let each amplitude be for itself again."""

    def rows_with_relatives(self) -> Tensor:
        """Rows that are tied to others now, (R,) bool."""
        return torch.zeros_like(self.spread(), dtype=torch.bool)

    @torch.no_grad()
    def width(self, q: Nakagami, information: Tensor) -> CoupledWidth:
        """Widths of q(F) with the uncertainty of the relatives.

        Parameters
        ----------
        q : Nakagami
            Of all rows, (R,).
        information : Tensor, (R,)
            The data's, of log F^2.
        """
        alone = q.variance.sqrt()
        return CoupledWidth(torch.zeros_like(alone), alone)

    def part(self, kind: type[Kind]) -> Kind:
        """Return the prior of one class, this one or below.

        Raises
        ------
        LookupError
            There is none.
        """
        if isinstance(self, kind):
            return self
        raise LookupError(f"{type(self).__name__} stands on no {kind.__name__}")

    def has(self, kind: type[AmplitudePrior]) -> bool:
        """Whether this prior, or one below it, is of a class."""
        return isinstance(self, kind)


class PriorOver(AmplitudePrior, ABC):
    """A prior that knows more of some rows and leaves the rest to the prior ``below``.

    A new one overrides ``kl``, ``stiffness`` and ``precision``; all else is passed on.

    Parameters
    ----------
    below : AmplitudePrior
    """

    def __init__(self, below: AmplitudePrior) -> None:
        super().__init__()
        self.below = below

    def spread(self) -> Tensor:
        """Mean of F^2 before any data, relative or model, epsilon Sigma, (R,)."""
        return self.below.spread()

    def penalty(self) -> Tensor:
        """Minus the log-prior of the parameters, up to a constant, () [nats]."""
        return self.below.penalty()

    def start(self, intensity: Tensor, is_observed: Tensor) -> None:
        """Start the parameters from merged intensities, (R,) each."""
        self.below.start(intensity, is_observed)

    @property
    def is_coupled(self) -> bool:
        """Whether amplitudes are tied to those of their relatives now."""
        return self.below.is_coupled

    @property
    def levels(self) -> list[Level]:
        """Rows at each step below the rows without parent, and their parents."""
        return self.below.levels

    def couple(self) -> None:
        """Tie amplitudes to those of their relatives from now on."""
        self.below.couple()

    def uncouple(self) -> None:
        """Let each amplitude be for itself again."""
        self.below.uncouple()

    def rows_with_relatives(self) -> Tensor:
        """Rows that are tied to others now, (R,) bool."""
        return self.below.rows_with_relatives()

    def width(self, q: Nakagami, information: Tensor) -> CoupledWidth:
        """Widths of q(F) with the uncertainty of the relatives; see the base class."""
        return self.below.width(q, information)

    def part(self, kind: type[Kind]) -> Kind:
        """Return the prior of one class, this one or below; LookupError if there is none."""
        return self if isinstance(self, kind) else self.below.part(kind)

    def has(self, kind: type[AmplitudePrior]) -> bool:
        """Whether this prior, or one below it, is of a class."""
        return isinstance(self, kind) or self.below.has(kind)
