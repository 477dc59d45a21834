"""One look at every observation with the scales as they are: sums for each unique reflection.

What files and statistics need of the observations, and what the data say of each amplitude, are
sums over the observations of a row. They are gathered batch after batch in one table of the rows
and two random halves of the images (the convention of R_split: White et al. 2012, J. Appl. Cryst.
45, 335), and may be added to later.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from braggflux.merge.data.table import Batch
from braggflux.merge.model.merger import Merger

COLUMNS = (
    *("n", "weight", "weighted", "intensity", "deviation", "slope", "information"),
    *("plain_weight", "plain_weighted"),
)
#: Residuals beyond this many standard deviations are outliers where no robust weight is used.
N_SIGMA = 5.0


class ObservationSums:
    """Sums of each row over the observations of the batches seen.

    Parameters
    ----------
    merger : Merger
        Its present scales and q(F) are used for all.
    seed : int
        Of the halves.

    Attributes
    ----------
    by_half : Tensor, (2, R, 9)
        Columns :data:`COLUMNS`. Of spots, neither blank nor stray: ``n``, and of the scaled
        intensities, in units of the table, sums of ``1 / variance``, of ``I / variance``, of ``I``
        and of ``|I - <F^2>|``. Of all: slope of the
        log-likelihood against log <F^2>, and its expected curvature. Of spots that are no outliers
        sums of ``1 / D`` and ``I / D``, see :meth:`half_set_means`.
    """

    def __init__(self, merger: Merger, seed: int) -> None:
        self.merger, self.seed = merger, seed
        q = merger.inference()
        self.spread, self.concentration = q.spread.detach(), q.concentration.detach()
        self.usual = merger.prior.spread().detach()
        self.by_half = self.spread.new_zeros(2, len(self.spread), len(COLUMNS))

    def add(self, batches: Iterable[tuple[int, Batch]]) -> ObservationSums:
        """Add the used observations of numbered batches."""
        for number, batch in batches:
            self._add(number, batch)
        return self

    def __getitem__(self, name: str) -> Tensor:
        """One column of both halves together, (R,)."""
        return self.by_half[:, :, COLUMNS.index(name)].sum(0)

    def mean(self, half: int | None = None) -> tuple[Tensor, Tensor]:
        """Inverse-variance mean of the scaled intensities and its sigma, (R,); NaN without any."""
        sums = self.by_half.sum(0) if half is None else self.by_half[half]
        total = torch.where(sums[:, 1] > 0, sums[:, 1], torch.nan)
        return sums[:, 2] / total, total**-0.5

    def half_set_means(self) -> Tensor:
        """Mean scaled intensity of the rows in each half, (2, R), NaN without any.

        Without robust weights, which draw the observations of both halves to the same q(F): what
        they have in common then is noise too.
        """
        weight, weighted = (
            self.by_half[:, :, COLUMNS.index(k)] for k in ("plain_weight", "plain_weighted")
        )
        return weighted / torch.where(weight > 0, weight, torch.nan)

    def _add(self, number: int, batch: Batch) -> None:
        if batch.observation_of_term is not None or batch.cluster is not None:
            raise ValueError("batches of a store have neither harmonics nor common errors")
        used = batch.observations.is_used
        half = self._half_of_image(number, batch)[batch.image]
        into = (half * len(self.spread) + batch.terms.row)[used]
        # one pass over the rows for all sums
        columns = torch.stack(self._columns(batch), -1)[used]
        self.by_half.view(-1, len(COLUMNS)).index_add_(0, into, columns)

    def _columns(self, batch: Batch) -> list[Tensor]:
        """Compute what each observation adds, (N,) each."""
        likelihood, o, row = self.merger.likelihood, batch.observations, batch.terms.row
        with torch.no_grad():
            known = self.merger.scale(batch)
            scale = known.log_k.exp()
            mean = scale * self.spread[row]
            spread, usual = mean**2 / self.concentration[row], scale * self.usual[row]
        mean.requires_grad_()
        with torch.enable_grad():
            expected = likelihood.expectation(o.measured, mean, spread, scale, known, usual)
            (slope,) = torch.autograd.grad(likelihood(batch, expected).sum(), mean)
        with torch.no_grad():
            mean, variance = mean.detach(), expected.variance.detach()
            share = likelihood.share_of_spots(batch, expected)
            robust = likelihood.weight(batch, expected) * share
            is_spot = (share > 0.5).double()
            plain = is_spot * ((o.intensity - mean) ** 2 < N_SIGMA**2 * variance)
            plain = plain / variance * scale**2
            value, weight = o.intensity / scale, is_spot * robust / variance * scale**2
            return [
                is_spot,
                weight,
                weight * value,
                is_spot * value,
                is_spot * (value - self.spread[row]).abs(),
                slope * mean,
                robust * mean**2 / variance,
                plain,
                plain * value,
            ]

    def _half_of_image(self, number: int, batch: Batch) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed << 32) + number)
        half = torch.randint(0, 2, (batch.n_images,), generator=generator)
        return half.to(batch.image.device)
