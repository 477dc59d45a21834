r"""Background under a spot, and the intensity that goes with it, by Fisher scoring.

The background of a voxel is a plane in the logarithm about the mean background of its pixel,

    b_p = b0_p exp(theta . phi_p),   phi = (1, x, y, frame) scaled to [-1, 1] over the box,
    theta ~ Normal(0, diag(tau^2)),

where ``b0`` is the mean image of the non-Bragg counts times the level of the frame. Given the
profile the posterior of (J, theta) has no closed form but is log-concave: a few rounds of Fisher
scoring reach its maximum, and the inverse information is its covariance. No network is needed.
Intensities of neighbouring spots are solved along with them (``neighbours``).

A box whose counts contradict that prior (salt, a crystallite of ice, a reflex: a place that shines
for some frames; or one that shone on others and raised the mean image) is solved again, with a
curved surface of wide prior about one level in place of the mean image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from braggflux.integrator.types import ReflectionMetadata

CONTRADICTED = 38.0
"""Squared deviation of the coefficients from their prior: chi^2 of four has 1e-7 above it."""
PROFILE_ERROR = 0.05
"""Share of a spot's photons that a wrong profile may leave to the background."""
CURVED_SD, CURVED_ROUNDS = 2.0, 6
"""Prior width of all coefficients of a curved surface, and rounds of scoring from a flat one."""


@dataclass(frozen=True)
class BackgroundFit:
    """Posterior of what lies beside the spot, and the information it leaves for J.

    Parameters
    ----------
    background : Tensor, (B, P)
        Photons per voxel at the posterior maximum.
    coefficients : Tensor, (B, M)
    covariance : Tensor, (B, M, M)
    intensity : Tensor, (B,)
        Maximum-likelihood photons, may be negative.
    information_fraction : Tensor, (B,)
        Information on J with theta and the neighbours estimated, over that with both known, in
        (0, 1].
    neighbours : Tensor, (B, P)
        Photons of the neighbours per voxel, from intensities that are not negative.
    deficit : Tensor, (B, P)
        What estimates below zero would take from them: to be added to the counts, so that faint
        neighbours are subtracted without bias.
    """

    background: Tensor
    coefficients: Tensor
    covariance: Tensor
    intensity: Tensor
    information_fraction: Tensor
    neighbours: Tensor
    deficit: Tensor

    @property
    def beside(self) -> Tensor:
        """Photons per voxel that are not the spot's own, (B, P)."""
        return self.background + self.neighbours

    @property
    def q_background(self) -> MultivariateNormal:
        """Posterior of the coefficients as a distribution."""
        return MultivariateNormal(self.coefficients, self.covariance)


class BackgroundModel(nn.Module):
    """Plane in the log background with a learned prior width (empirical Bayes)."""

    n_coefficients = 4

    basis: Tensor
    basis_products: Tensor
    curved_basis: Tensor
    curved_products: Tensor

    def __init__(
        self, box: tuple[int, int, int], level_sd: float, slope_sd: float, n_rounds: int
    ) -> None:
        super().__init__()
        self.n_rounds = n_rounds
        axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in box]
        t, y, x = torch.meshgrid(*axes, indexing="ij")
        self.register_buffer(
            "basis", torch.stack([torch.ones_like(x), x, y, t], -1).reshape(-1, 4)
        )
        second = torch.stack([x * x, y * y, t * t, x * y, x * t, y * t], -1).reshape(-1, 6)
        self.register_buffer("curved_basis", torch.cat([self.basis, second], 1), persistent=False)
        for name, basis in (("basis", self.basis), ("curved", self.curved_basis)):
            products = basis[:, :, None] * basis[:, None, :]
            self.register_buffer(f"{name}_products", products.flatten(1), persistent=False)
        self.log_prior_sd = nn.Parameter(torch.tensor([level_sd, *[slope_sd] * 3]).log())

    def kl(self, fit: BackgroundFit) -> Tensor:
        """KL[q(theta) || Normal(0, tau^2)], (B,)."""
        precision = torch.exp(-2 * self.log_prior_sd)
        second_moment = fit.covariance.diagonal(dim1=1, dim2=2) + fit.coefficients**2
        return 0.5 * (
            (second_moment * precision).sum(-1)
            - self.n_coefficients
            + 2 * self.log_prior_sd.sum()
            - torch.logdet(fit.covariance)
        )

    @torch.no_grad()
    def fit(
        self,
        counts: Tensor,
        is_valid: Tensor,
        profile: Tensor,
        mean_background: Tensor,
        start: Tensor,
        neighbours: Tensor | None = None,
        *,
        may_curve: bool = True,
    ) -> BackgroundFit:
        """Fisher scoring for the intensities and theta.

        Without gradients: at the maximum the derivative of the likelihood with respect to theta
        vanishes, so the profile's gradient of the pixel likelihood is complete without it.

        Parameters
        ----------
        counts, is_valid, profile, mean_background : Tensor, (B, P)
        start : Tensor, (B, 1 + K)
            Photons of the spot and of its neighbours.
        neighbours : Tensor, (B, K, P), optional
            Profiles of the neighbours.
        may_curve : bool
            Look for boxes that need a curved surface.
        """
        spots = all_spots(profile, neighbours)
        valid = is_valid.to(counts.dtype)
        data = (counts, valid, spots, mean_background, start)
        prior_sd = self.log_prior_sd.double().exp()
        plane = self._scoring(*data, (self.basis, self.basis_products), prior_sd, self.n_rounds)
        if not may_curve:
            return plane
        is_odd = self._is_contradicted(plane, prior_sd, mean_background, valid)
        if counts.device.type == "cpu":
            rows = torch.nonzero(is_odd)[:, 0]
        else:  # how many there are is known on the device alone, and a GPU would be waited for
            rows = torch.arange(len(counts), device=counts.device)
        return self._curved(plane, rows, is_odd[rows], data) if len(rows) else plane

    def _is_contradicted(
        self, plane: BackgroundFit, prior_sd: Tensor, mean_background: Tensor, valid: Tensor
    ) -> Tensor:
        """Whether a box has more or less background than the prior allows, (B,) bool.

        The posterior mean of coefficients drawn from the prior has the covariance of the prior
        less that of the posterior. What the profile of a strong spot lacks is no background.
        """
        theta, posterior = plane.coefficients.double(), plane.covariance.double()
        # a box that says nothing leaves the prior as it is: the margin keeps this solvable
        spread = 1.02 * torch.diag(prior_sd**2) - posterior
        deviation = (theta * torch.linalg.solve(spread, theta[:, :, None])[:, :, 0]).sum(1)
        moved = ((plane.background - mean_background).abs() * valid).sum(1)
        return (deviation > CONTRADICTED) & (moved > PROFILE_ERROR * plane.intensity)

    def _curved(
        self, plane: BackgroundFit, rows: Tensor, is_odd: Tensor, data: tuple[Tensor, ...]
    ) -> BackgroundFit:
        """Give the odd ones of some boxes a curved surface; coefficients stay the plane's."""
        counts, valid, spots, mean_background, start = (a[rows] for a in data)
        level = mean_background.mean(1, keepdim=True).expand_as(mean_background)
        surface = self.curved_basis, self.curved_products
        prior_sd = torch.full_like(self.curved_basis[0], CURVED_SD).double()
        own = (counts, valid, spots, level, start)
        curved = self._scoring(*own, surface, prior_sd, CURVED_ROUNDS)
        # what the surface does not follow widens the likelihood, as in a quasi-Poisson model
        rate = curved.intensity.clamp_min(0.0)[:, None] * spots[:, 0] + curved.beside
        dispersion = (valid * (counts - rate) ** 2 / rate).sum(1) / valid.sum(1).clamp_min(1.0)
        fraction = (curved.information_fraction / dispersion.clamp_min(1.0)).clamp_min(1e-3)
        curved = replace(curved, information_fraction=fraction)
        columns = {}
        for name in (f.name for f in fields(plane)):
            old, new = getattr(plane, name), getattr(curved, name)
            if name not in ("coefficients", "covariance"):
                chosen = torch.where(is_odd.reshape(-1, *[1] * (new.dim() - 1)), new, old[rows])
                old = old.index_copy(0, rows, chosen)
            columns[name] = old
        return BackgroundFit(**columns)

    def _scoring(
        self,
        counts: Tensor,
        valid: Tensor,
        spots: Tensor,
        mean_background: Tensor,
        start: Tensor,
        surface: tuple[Tensor, Tensor],
        prior_sd: Tensor,
        n_rounds: int,
    ) -> BackgroundFit:
        """Fit with a surface (basis (P, M) and its products) in the log background.

        Parameters
        ----------
        counts, valid, mean_background : Tensor, (B, P)
        spots : Tensor, (B, 1 + K, P)
        start : Tensor, (B, 1 + K)
        surface : Tensor, (P, M), and Tensor, (P, M^2)
        prior_sd : Tensor, (M,)
        n_rounds : int
        """
        basis, m = surface[0], len(prior_sd)
        theta, intensity = counts.new_zeros(len(counts), m), start
        prior = prior_sd**-2
        for _ in range(n_rounds + 1):
            background = _rate(theta, basis, mean_background)
            reference = intensity.clamp_min(0.0)
            rate = torch.einsum("bs,bsp->bp", reference, spots) + background
            information, score = _normal_equations(
                spots, background, valid / rate, counts - rate, surface
            )
            information.diagonal(dim1=1, dim2=2)[:, 1 : 1 + m] += prior
            score[:, 1 : 1 + m] -= prior * theta.double()
            # a spot without signal pixels has no information; the ridge keeps it solvable
            ridge = 1e-9 * torch.eye(score.shape[1], dtype=torch.float64, device=score.device)
            step = torch.linalg.solve(information + ridge, score).to(counts.dtype)
            intensity = reference + torch.cat([step[:, :1], step[:, 1 + m :]], 1)
            theta = theta + step[:, 1 : 1 + m].clamp(-1.0, 1.0)
        covariance = torch.linalg.inv(information[:, 1:, 1:] + ridge[1:, 1:])[:, :m, :m]
        positive = intensity[:, 1:].clamp_min(0.0)
        return BackgroundFit(
            _rate(theta, basis, mean_background),
            theta,
            covariance.to(counts.dtype),
            intensity[:, 0],
            _schur_fraction(information + ridge).to(counts.dtype),
            torch.einsum("bk,bkp->bp", positive, spots[:, 1:]),
            torch.einsum("bk,bkp->bp", positive - intensity[:, 1:], spots[:, 1:]),
        )


def _normal_equations(
    spots: Tensor,
    background: Tensor,
    weight: Tensor,
    residual: Tensor,
    surface: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fisher information and score of (J, theta, neighbours' J), float64.

    The derivative of the rate is rho for an intensity and ``b phi`` for theta. The sums over
    voxels are products of matrices.
    """
    (basis, products), n = surface, len(spots)
    level = weight * background
    own = (spots * weight[:, None]) @ spots.transpose(1, 2)  # (B, S, S)
    mixed = (spots * level[:, None]) @ basis  # (B, S, M)
    plane = ((level * background) @ products).reshape(n, basis.shape[1], -1)
    first, rest = mixed[:, :1], mixed[:, 1:]
    rows = [
        torch.cat([own[:, :1, :1], first, own[:, :1, 1:]], 2),
        torch.cat([first.transpose(1, 2), plane, rest.transpose(1, 2)], 2),
        torch.cat([own[:, 1:, :1], rest, own[:, 1:, 1:]], 2),
    ]
    pull = (spots @ (weight * residual)[:, :, None])[:, :, 0]
    score = torch.cat([pull[:, :1], (level * residual) @ basis, pull[:, 1:]], 1)
    return torch.cat(rows, 1).double(), score.double()


def _rate(theta: Tensor, basis: Tensor, mean_background: Tensor) -> Tensor:
    return mean_background * torch.exp((theta @ basis.T).clamp(-8.0, 8.0))


def all_spots(profile: Tensor, neighbours: Tensor | None) -> Tensor:
    """Profiles of a spot, (B, P), and its neighbours, (B, K, P), together: (B, 1 + K, P)."""
    own = profile[:, None]
    return own if neighbours is None else torch.cat([own, neighbours], 1)


def _schur_fraction(information: Tensor) -> Tensor:
    """``1 - I_Jb I_bb^-1 I_bJ / I_JJ``: what is left when the background is estimated too."""
    cross = information[:, 1:, :1]
    lost = (cross * torch.linalg.solve(information[:, 1:, 1:], cross)).sum((1, 2))
    own = information[:, 0, 0].clamp_min(1e-30)
    return (1 - lost / own).clamp(1e-3, 1.0)


class MeanBackground(nn.Module):
    """Mean background of every pixel times the level of every frame.

    Parameters
    ----------
    images : list of list of Tensor, (slow, fast)
        For each sweep and panel, mean non-Bragg photons of each pixel over the scan.
    frame_levels : list of Tensor, (n_images,)
        For each sweep, level of each frame relative to the mean.
    box : (D, H, W)
    """

    floor = 1e-3  # photons; a voxel without any background would make zero-count rates singular

    images: Tensor
    n_frames: Tensor
    summed_levels: Tensor
    end_levels: Tensor

    def __init__(
        self, images: list[list[Tensor]], frame_levels: list[Tensor], box: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.box = box
        self.n_panels = max(len(panels) for panels in images)
        every = [image for panels in images for image in panels]
        height, width = (max(i.shape[axis] for i in every) for axis in (0, 1))
        stack = torch.full((len(images) * self.n_panels, height, width), self.floor)
        for e, panels in enumerate(images):
            for p, image in enumerate(panels):
                stack[e * self.n_panels + p, : image.shape[0], : image.shape[1]] = image
        self.register_buffer("images", stack.clamp_min(self.floor), persistent=False)
        n_frames = torch.tensor([len(level) for level in frame_levels])
        summed = torch.zeros(len(frame_levels), int(n_frames.max()) + 1, dtype=torch.float64)
        for e, level in enumerate(frame_levels):
            summed[e, 1 : len(level) + 1] = level.double().cumsum(0)
        ends = torch.stack([torch.stack([f[0], f[-1]]) for f in frame_levels]).double()
        self.register_buffer("n_frames", n_frames, persistent=False)
        self.register_buffer("summed_levels", summed, persistent=False)
        self.register_buffer("end_levels", ends, persistent=False)  # of the first and last frame

    def forward(self, metadata: ReflectionMetadata) -> Tensor:
        """Mean background photons of each voxel, (B, D, H, W)."""
        index = []
        for axis, size in ((1, self.images.shape[1]), (2, self.images.shape[2])):
            offset = torch.arange(self.box[axis], device=metadata.corner.device)
            index.append((metadata.corner[:, axis, None] + offset).clamp(0, size - 1))
        panel = (metadata.experiment * self.n_panels + metadata.panel)[:, None, None]
        image = self.images[panel, index[0][:, :, None], index[1][:, None, :]]  # (B, H, W)
        return image[:, None] * self._layer_levels(metadata)[:, :, None, None]

    def _layer_levels(self, metadata: ReflectionMetadata) -> Tensor:
        """Sum of the levels of the frames of each layer, (B, D).

        Beyond the scan the level is that of the nearest frame: positive, though never compared
        with a count.
        """
        per_layer = metadata.frames_per_layer[:, None]
        layers = torch.arange(self.box[0] + 1, device=per_layer.device)
        edge = metadata.corner[:, :1] + layers * per_layer
        sweep = metadata.experiment[:, None]
        inside = torch.minimum(edge.clamp_min(0), self.n_frames[sweep])
        beyond = edge - inside
        first, last = self.end_levels[metadata.experiment].unbind(-1)
        total = self.summed_levels[sweep, inside]
        total = total + beyond.clamp_max(0) * first[:, None] + beyond.clamp_min(0) * last[:, None]
        return total.diff(dim=1).to(self.images.dtype)
