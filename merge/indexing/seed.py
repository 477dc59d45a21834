r"""First choice of each still's indexing operator, from intensities alone.

Brehm & Diederichs (2014, Acta Cryst. D70, 101) compare images with each other; here every image is
compared with the mean of all the others, under a mixture whose components are the operators:

    t_i | image g has operator a  ~  Normal(M_row(i, a), v_i),     M ~ Normal(0, tau^2)

t is the square root of the normalised intensity less its mean at that resolution: what all
operators share is taken out, and a strong spot has not all the say. Responsibilities r_ga and
means M alternate (expectation maximisation). M never contains the image that is compared with it:
otherwise every image would vote for what it was assigned to by chance. From random r the state in
which all alternatives look alike is left by itself, since it is unstable; several starts compete
by the predictive likelihood of every image given the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

N_STARTS = 5
N_STEPS = 300
N_FIRST_STEPS = 25  # of a random start, before it may end
#: Images that take part in the starts; all others are compared with what these agree on.
N_IMAGES = 4000
SETTLED = 1e-4  # mean change of the responsibilities that ends the iteration
N_SHELLS = 20
N_NOISE_STEPS = 8
LIMIT = 3.0  # of t, in its standard deviations


@dataclass(frozen=True)
class StandardIntensities:
    """Standardised intensities, by which the operators are told apart.

    Parameters
    ----------
    value : Tensor, (N,)
        t, with mean 0 and standard deviation 1.
    variance : Tensor, (N,)
        Of its measurement.
    is_merged : Tensor, (N,) bool
        Contributes to M.
    is_scored : Tensor, (N,) bool
        Says something of its image's operator.
    row : Tensor, (N, A) int64
        Unique reflection under each operator; -1 for none.
    image : Tensor, (N,) int64
        0 .. n_images - 1
    n_images : int
    """

    value: Tensor
    variance: Tensor
    is_merged: Tensor
    is_scored: Tensor
    row: Tensor
    image: Tensor
    n_images: int

    def of_images(self, chosen: Tensor) -> StandardIntensities:
        """Keep some images, (n_images,) bool, with new numbers."""
        kept = chosen[self.image]
        number = chosen.long().cumsum(0) - 1
        return StandardIntensities(
            self.value[kept],
            self.variance[kept],
            self.is_merged[kept],
            self.is_scored[kept],
            self.row[kept],
            number[self.image[kept]],
            int(chosen.sum()),
        )


@dataclass(frozen=True)
class Mixture:
    """State of the alternation: r (G, A), shares (A,), log-likelihood of the images (G, A)."""

    responsibility: Tensor
    share: Tensor
    log_likelihood: Tensor

    @property
    def evidence(self) -> float:
        """Predictive log-likelihood of all images, operators unknown [nats]."""
        return float(torch.logsumexp(self.log_likelihood + self.share.log(), 1).sum())


@dataclass(frozen=True)
class Agreement:
    """Sums over the images of known operators, for each reflection.

    Parameters
    ----------
    total, weight : Tensor, (R,)
        Sums of w t and of w.
    noise : Tensor
        Variance of t about M beside that of its measurement.
    share : Tensor, (A,)
        Of the operators.
    """

    total: Tensor
    weight: Tensor
    noise: Tensor
    share: Tensor

    def compare(self, data: StandardIntensities) -> Tensor:
        """Probability of each operator for images that took no part, (G, A)."""
        score = torch.zeros(data.n_images, len(self.share), dtype=torch.float64)
        for a in range(len(self.share)):
            row = data.row[:, a]
            is_known = (row >= 0) & (row < len(self.weight))
            row = torch.where(is_known, row, 0)
            left = self.weight[row] + _prior_weight(self.noise)
            variance = self.noise + data.variance + 1.0 / left
            z2 = (data.value - self.total[row] / left) ** 2 / variance
            density = torch.where(is_known, -0.5 * (z2 + variance.log()), 0.0)
            score[:, a].index_add_(0, data.image, density)
        return torch.softmax(score + self.share.log(), 1)


def agreement(data: StandardIntensities, responsibility: Tensor) -> Agreement:
    """Merge images with the responsibilities (G, A) that they have settled on."""
    noise = torch.tensor(0.5, dtype=torch.float64)
    for _ in range(N_NOISE_STEPS):
        noise = _log_likelihood(data, responsibility, noise)[1]
    share = (responsibility.sum(0) + 1.0) / (len(responsibility) + responsibility.shape[1])
    return Agreement(*means(data, responsibility, noise), noise, share)


def standardise(
    intensity: Tensor, sigma: Tensor, inv_d2: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Return t and the variance of its measurement, (N,) each.

    Parameters
    ----------
    intensity, sigma : Tensor, (N,)
        Over the mean level of the image.
    inv_d2, offset : Tensor, (N,)
        Resolution and distance from the Ewald sphere, by which mean intensities are divided.
    """
    for coordinate in (inv_d2, offset.abs()):
        mean = _bin_means(intensity, coordinate)
        intensity, sigma = intensity / mean, sigma / mean
    # d sqrt(I) = dI / (2 sqrt I), and no more certain than a spot of one sigma
    root = intensity.clamp_min(0.0).sqrt()
    variance = sigma**2 / (4 * torch.maximum(intensity, sigma)).clamp_min(1e-12)
    root = root - _bin_means(root, inv_d2, floor=None)
    spread = root.std().clamp_min(1e-12)
    return (root / spread).clamp(-LIMIT, LIMIT), variance / spread**2


def _bin_means(value: Tensor, coordinate: Tensor, floor: float | None = 0.02) -> Tensor:
    """Mean in each of equally filled bins of the coordinate, (N,); at least ``floor`` of all."""
    if float(coordinate.max() - coordinate.min()) == 0.0:
        return torch.ones_like(value) if floor is not None else value.mean().expand_as(value)
    sample = coordinate[:: max(1, len(coordinate) // 100_000)]
    edges = torch.quantile(sample, torch.linspace(0, 1, N_SHELLS + 1, dtype=sample.dtype))
    number = torch.bucketize(coordinate, edges[1:-1])
    total = torch.zeros(N_SHELLS, dtype=value.dtype).index_add_(0, number, value)
    mean = total / torch.bincount(number, minlength=N_SHELLS).clamp_min(1)
    if floor is not None:
        mean = mean.clamp_min(floor * float(value.mean().abs()) + 1e-12)
    return mean[number]


def seed_operators(
    data: StandardIntensities, generator: torch.Generator, reference: Tensor | None = None
) -> Mixture:
    """Operator of each image, as a mixture.

    Parameters
    ----------
    data : StandardIntensities
    generator : torch.Generator
    reference : Tensor, (R,), optional
        Known t of each unique reflection, NaN where there is none: a further start.
    """
    few = data
    if data.n_images > N_IMAGES:
        chosen = torch.zeros(data.n_images, dtype=torch.bool)
        chosen[torch.randperm(data.n_images, generator=generator)[:N_IMAGES]] = True
        few = data.of_images(chosen)
    n_operators = data.row.shape[1]
    # as they came: another program may have resolved the ambiguity
    as_given = torch.zeros(few.n_images, n_operators, dtype=torch.float64)
    as_given[:, 0] = 1.0
    starts = [alternate(few, as_given)]
    for _ in range(N_STARTS - 1):
        noise = torch.rand(few.n_images, n_operators, generator=generator, dtype=torch.float64)
        starts.append(alternate(few, torch.softmax(4 * noise, 1)))
    if reference is not None:
        starts.append(alternate(few, _compared(few, reference)))
    best = max(starts, key=lambda m: m.evidence)
    if few is data:
        return best
    first = torch.full((data.n_images, n_operators), 1.0 / n_operators, dtype=torch.float64)
    first[chosen] = best.responsibility
    # what the others say of themselves must not dilute M before they were compared with it
    weight = chosen.double()
    return alternate(data, first, weight)


def alternate(
    data: StandardIntensities, responsibility: Tensor, weight: Tensor | None = None
) -> Mixture:
    """Iterate from given responsibilities, (G, A), until they settle.

    ``weight`` (G,) is that of each image in the first means.
    """
    n_first = 2 if weight is not None else N_FIRST_STEPS
    share = torch.full((data.row.shape[1],), 1.0 / data.row.shape[1], dtype=torch.float64)
    noise = torch.tensor(0.5, dtype=torch.float64)
    for step in range(N_STEPS):
        held = responsibility if weight is None else responsibility * weight[:, None]
        weight = None
        score, noise = _log_likelihood(data, held, noise)
        new = torch.softmax(score + share.log(), 1)
        change = float((new - responsibility).abs().mean())
        responsibility = new
        # shares only once the operators differ: an early lead of one of them is chance
        if step > n_first - 5:
            share = (responsibility.sum(0) + 1.0) / (len(responsibility) + len(share))
        if step > n_first and change < SETTLED:
            break
    return Mixture(responsibility, share, score)


def _compared(data: StandardIntensities, reference: Tensor) -> Tensor:
    """Responsibilities by the correlation of each image with known values."""
    score = torch.zeros(data.n_images, data.row.shape[1], dtype=torch.float64)
    for a in range(data.row.shape[1]):
        row = data.row[:, a]
        known = reference[row.clamp_min(0)]
        product = data.value * known / (0.5 + data.variance)
        usable = data.is_scored & (row >= 0) & ~known.isnan()
        score[:, a].index_add_(0, data.image, torch.where(usable, product, 0.0))
    return torch.softmax(score, 1)


def means(
    data: StandardIntensities, responsibility: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of w t and of w of each unique reflection, the prior not included, (R,) each."""
    n_rows = int(data.row.max()) + 1
    total = torch.zeros(n_rows, dtype=torch.float64)
    weight = torch.zeros(n_rows, dtype=torch.float64)
    for a in range(data.row.shape[1]):
        row = data.row[:, a]
        own = _own_weight(data, responsibility, noise, a)
        total.index_add_(0, row.clamp_min(0), own * data.value)
        weight.index_add_(0, row.clamp_min(0), own)
    return total, weight


def _prior_weight(noise: Tensor) -> Tensor:
    """1 / tau^2: t has variance 1, which noise and M share."""
    return 1.0 / (1.0 - noise).clamp_min(0.05)


def _own_weight(
    data: StandardIntensities, responsibility: Tensor, noise: Tensor, a: int
) -> Tensor:
    usable = data.is_merged & (data.row[:, a] >= 0)
    return usable * responsibility[data.image, a] / (noise + data.variance)


def _log_likelihood(
    data: StandardIntensities, responsibility: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each image under each operator given the others, (G, A), and new noise."""
    total, weight = means(data, responsibility, noise)
    prior = _prior_weight(noise)
    score = torch.zeros_like(responsibility)
    own = [_own_weight(data, responsibility, noise, a) for a in range(data.row.shape[1])]
    square, count = noise.new_zeros(()), noise.new_zeros(())
    for a in range(data.row.shape[1]):
        row = data.row[:, a]
        itself = sum(
            own[b] * (data.row[:, b] == row) for b in range(data.row.shape[1])
        )  # an index may be its own image under an operator
        left = (weight[row.clamp_min(0)] - itself).clamp_min(0.0) + prior
        mean = (total[row.clamp_min(0)] - itself * data.value) / left
        variance = noise + data.variance + 1.0 / left
        z2 = (data.value - mean) ** 2 / variance
        usable = data.is_scored & (row >= 0)
        density = torch.where(usable, -0.5 * (z2 + variance.log()), 0.0)
        score[:, a].index_add_(0, data.image, density)
        r = responsibility[data.image, a] * usable
        square, count = square + (r * z2).sum(), count + r.sum()
    # z^2 of the variance's free part, damped
    ratio = (square / count.clamp_min(1.0)).clamp(0.5, 2.0)
    return score, (noise * ratio).clamp(0.05, 0.95)
