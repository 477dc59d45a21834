"""Scale of an observation, I = K F^2: log K is a sum of terms, and what a network adds.

Terms are listed in :mod:`braggflux.merge.scale.registry`, each in a file of ``terms``. All have
Gaussian priors; K is positive by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from braggflux.merge.data.table import Batch
from braggflux.merge.scale.base import Scale
from braggflux.merge.scale.metadata_network import MetadataNetwork
from braggflux.merge.scale.term import AddUp, ScaleTerm, keep_sums
from braggflux.merge.scale.terms.b_factor import BFactor
from braggflux.merge.scale.terms.falloff import Falloff
from braggflux.merge.scale.terms.frames import FrameScale


class ScaleModel(nn.Module):
    """Scale of all datasets.

    Parameters
    ----------
    terms : mapping of str to ScaleTerm
        Summed in this order.
    network : MetadataNetwork or None
    """

    def __init__(
        self, terms: Mapping[str, ScaleTerm], network: MetadataNetwork | None = None
    ) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.network = network

    def __iter__(self) -> Iterator[ScaleTerm]:
        """Terms in the order of their sum."""
        return iter(cast(Iterable[ScaleTerm], self.terms.values()))

    def forward(self, batch: Batch, described_by: Batch | None = None) -> Scale:
        """Scale of each term of the observations, and what the network says of the errors.

        ``described_by`` is the batch whose reflections describe the images, if not ``batch``.
        """
        first, *rest = self
        log_k = first(batch)
        for term in rest:
            log_k = log_k + term(batch)
        if self.network is None:
            return Scale(log_k)
        said = self.network(batch, described_by)
        return replace(said, log_k=log_k + said.log_k)

    def penalty(self) -> Tensor:
        """Minus the log-prior of all parameters, up to a constant, () [nats]."""
        first, *rest = self
        total = first.penalty()
        for term in rest:
            total = total + term.penalty()
        return total if self.network is None else total + self.network.penalty()

    @property
    def frames(self) -> FrameScale | None:
        """Scale of the frames of rotation data, if that is how they are scaled."""
        return next((t for t in self if isinstance(t, FrameScale)), None)

    @torch.no_grad()
    def start(self, batch: Batch, observed: Tensor, expected: Tensor) -> None:
        """Start each term from what the others leave.

        Parameters
        ----------
        batch : Batch
            All observations.
        observed, expected : Tensor, (N,)
            Intensities as measured, and those of the amplitudes; 0 where not used.
        """
        k = self._scale_of_first_terms(batch)
        for term in self:
            if term.start(batch, observed / k, expected):
                k = self._scale_of_first_terms(batch)

    def _scale_of_first_terms(self, batch: Batch) -> Tensor:
        return batch.of_first_terms(self(batch).log_k).exp()

    @torch.no_grad()
    def start_unseen(
        self, batch: Batch, was_used: Tensor, observed: Tensor, expected: Tensor
    ) -> bool:
        """Start what no observation in use determined; see :meth:`ScaleTerm.start_unseen`."""
        given = batch, was_used, observed, expected
        changed = [term.start_unseen(*given) for term in self]
        return any(changed)

    @property
    def newton_parameters(self) -> tuple[nn.Parameter, ...]:
        """Parameters that :meth:`newton_step` can move in place of Adam."""
        return tuple(p for term in self for p in term.newton_parameters)

    def newton_step(self, batch: Batch, information: Tensor, add_up: AddUp = keep_sums) -> None:
        """Take the Newton steps of all terms; see :meth:`ScaleTerm.newton_step`."""
        for term in self:
            term.newton_step(batch, information, add_up)

    def fresh_crystal_factor(self, inv_d2: Tensor) -> Tensor:
        """Turn intensities at the mean dose into those at the start of the first scan.

        1 where there is no B along a scan, or where the scale keeps all falloff with resolution.

        Parameters
        ----------
        inv_d2 : Tensor, (R,)
            [1/A^2]
        """
        if any(isinstance(term, Falloff) and term.is_there for term in self):
            return torch.ones_like(inv_d2)
        for term in self:
            if isinstance(term, BFactor):
                return term.fresh_crystal_factor(inv_d2)
        return torch.ones_like(inv_d2)

    def on_the_sphere(self, batch: Batch) -> Tensor:
        """Log K of each term if its lattice point lay on the Ewald sphere, (T,)."""
        terms = replace(batch.terms, ewald_offset=torch.zeros_like(batch.terms.ewald_offset))
        if self.network is not None:
            terms = replace(terms, features=self.network.on_the_sphere(terms.features))
        return self(replace(batch, terms=terms), described_by=batch).log_k

    def forget_images(self) -> None:
        """Do without parameters of single images: of stills that are too many for them."""
        if self.network is not None:
            self.network.forget_images()

    def describe_unseen(self, exposure_group: Tensor, is_used: Tensor) -> None:
        """Describe exposure groups, (N,), without a used observation by the mean of others."""
        if self.network is not None:
            self.network.describe_unseen(exposure_group, is_used)

    def restore(self) -> None:
        """Compute anew what depends on buffers that were loaded from a file."""
        for term in self:
            term.restore()
