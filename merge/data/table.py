"""Observations of all datasets in one sorted table, and batches of whole images from it.

An observation is the sum of its *terms*: the harmonics that fall on one spot in a polychromatic
beam, a single one otherwise. Observations are sorted by *exposure group* (an image, or the
images that several datasets recorded together) and within it by cluster, so that a batch of
images is a few contiguous pieces and no loop runs over reflections or images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from braggflux.integrator.records import TensorRecord
from braggflux.merge.data.feature_scaling import FeatureScaling
from braggflux.merge.data.measurement import Measurement
from braggflux.merge.data.sweeps import SweepTable

MIN_BATCHES = 8


@dataclass(frozen=True)
class Observations(TensorRecord):
    """Measured intensities, (N,) each.

    Parameters
    ----------
    measured : Measurement
        In units of the table's ``unit_intensity``.
    image : Tensor, int64
        Counted through all datasets.
    dataset, exposure_group, cluster : Tensor, int64
        ``cluster``: observations with an error in common; not decreasing along the table.
    is_used : Tensor, bool
        Enters the likelihood; others are held out.
    is_seen : Tensor, bool
        The image encoder may look at it.
    signal : Tensor, (N, 2) float32
        What the encoder sees of the intensity.
    """

    measured: Measurement
    image: Tensor
    dataset: Tensor
    exposure_group: Tensor
    cluster: Tensor
    is_used: Tensor
    is_seen: Tensor
    signal: Tensor

    @property
    def intensity(self) -> Tensor:
        """Maximum-likelihood intensity, (N,)."""
        return self.measured.mode

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the intensity as it was observed, (N,)."""
        return self.measured.observed_variance.sqrt()


@dataclass(frozen=True)
class Terms(TensorRecord):
    """Harmonics of the observations, (T,) each, in the order of the observations.

    Parameters
    ----------
    observation : Tensor, int64
        Row of :class:`Observations`.
    row : Tensor, int64
        Unique reflection.
    base_log_scale : Tensor
        What is known of the log-scale before anything is learned.
    inv_d2 : Tensor
        [1/A^2]
    wavelength : Tensor
        [A]; 0 where there is none.
    ewald_offset : Tensor
        [1/A], in units of its standard deviation; 0 where there is none.
    features : Tensor, (T, m) float32
        Metadata, each about within [-2, 2].
    """

    observation: Tensor
    row: Tensor
    base_log_scale: Tensor
    inv_d2: Tensor
    wavelength: Tensor
    ewald_offset: Tensor
    features: Tensor


@dataclass(frozen=True)
class Batch:
    """Some exposure groups of a table, with local numbers.

    ``rows`` are those of the observations in the table. ``terms.observation``, ``image`` and
    ``cluster`` count from 0 within the batch; ``cluster`` and ``observation_of_term`` are None
    where every observation is alone in its cluster, or has one term. ``share``, (), is that of the
    used observations of the table. ``place``, (n_images,), and ``n_together`` say where its images
    are among those of all processes, where several share a batch.
    """

    observations: Observations
    terms: Terms
    rows: Tensor
    image: Tensor
    n_images: int
    cluster: Tensor | None
    observation_of_term: Tensor | None
    share: Tensor
    place: Tensor | None = None
    n_together: int = 0

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor | TensorRecord)
        }
        return replace(self, **moved)

    @property
    def term_rows(self) -> Tensor:
        """Row in the table of the observation of each term, (T,)."""
        return self.rows[self.terms.observation]

    @property
    def first_rows(self) -> Tensor:
        """Unique reflection of the index that the file gives, (N,)."""
        return self.of_first_terms(self.terms.row)

    def of_first_terms(self, values: Tensor) -> Tensor:
        """Select each observation's first term, that of the file's index: (T, ...) to (N, ...)."""
        if self.observation_of_term is None:
            return values
        first = torch.ones_like(self.terms.observation, dtype=torch.bool)
        first[1:] = self.terms.observation.diff() > 0
        return values[first]


@dataclass(frozen=True)
class ObservationTable:
    """All observations.

    Parameters
    ----------
    observations : Observations
    terms : Terms
    first_observation, first_term : Tensor, (U + 1,) int64
        Where each exposure group starts.
    images_of_dataset : tuple of int
        Of each dataset, of a group (:mod:`braggflux.merge.data.grouping`) of each member.
    unit_intensity : float
        Intensities of the files are divided by it.
    feature_names : tuple of str
    feature_scaling : FeatureScaling
    sweeps : SweepTable or None
        Of rotation data with a physical scale.
    """

    observations: Observations
    terms: Terms
    first_observation: Tensor
    first_term: Tensor
    images_of_dataset: tuple[int, ...]
    unit_intensity: float
    feature_names: tuple[str, ...]
    feature_scaling: FeatureScaling
    sweeps: SweepTable | None = None

    @property
    def n_units(self) -> int:
        """Number of exposure groups."""
        return len(self.first_observation) - 1

    @cached_property
    def n_used(self) -> Tensor:
        """Number of used observations, (), float64; 1 where there is none."""
        return self.observations.is_used.sum().double().clamp_min(1)

    @cached_property
    def has_clusters(self) -> bool:
        """Some observations share a cluster."""
        cluster = self.observations.cluster
        return bool(len(cluster)) and int(cluster[-1]) + 1 < len(cluster)

    @property
    def has_harmonics(self) -> bool:
        """Some observations have several terms."""
        return len(self.terms) > len(self.observations)

    def everything(self) -> Batch:
        """Return the whole table as one batch."""
        n, device = len(self.observations), self.first_observation.device
        return self._batch(self.observations, self.terms, torch.arange(n, device=device))

    def batch(self, groups: Tensor) -> Batch:
        """Batch of the given exposure groups, (U',), each once."""
        groups = groups.to(self.first_observation.device).sort().values
        rows = _ranges(self.first_observation, groups)
        term_rows = _ranges(self.first_term, groups)
        terms = self.terms[term_rows]
        position = torch.searchsorted(rows, terms.observation)
        values = {f.name: getattr(terms, f.name) for f in fields(Terms)}
        terms = Terms(**values | {"observation": position})
        return self._batch(self.observations[rows], terms, rows)

    def part(self, groups: Tensor, own: slice) -> Batch | None:
        """Batch of some of the given exposure groups; None where there is none.

        What is drawn at random for its images is that of the whole batch.
        """
        groups = groups.to(self.first_observation.device).sort().values
        if not len(groups[own]):
            return None
        batch = self.batch(groups[own])
        images = self.observations.image
        together = torch.unique(images[_ranges(self.first_observation, groups)])
        place = torch.searchsorted(together, torch.unique(images[batch.rows]))
        return replace(batch, place=place, n_together=len(together))

    def rows(
        self, index: Tensor, measured: Measurement | None = None, is_used: Tensor | None = None
    ) -> Batch:
        """Batch of any observations, (B,), each once; ``measured`` and ``is_used`` may be others.

        Its images keep their numbers, and nothing in it waits for the device.

        Raises
        ------
        ValueError
            Observations have clusters or harmonics: take whole exposure groups.
        """
        if self.has_clusters or self.has_harmonics:
            raise ValueError("observations with clusters or harmonics are not taken one by one")
        observations = self.observations[index]
        if measured is not None:
            observations = replace(observations, measured=measured)
        if is_used is not None:
            observations = replace(observations, is_used=is_used)
        terms = replace(
            self.terms[index], observation=torch.arange(len(index), device=index.device)
        )
        share = observations.is_used.sum().double() / self.n_used
        images, n_images = observations.image, sum(self.images_of_dataset)
        return Batch(observations, terms, index, images, n_images, None, None, share)

    def measured_as(self, measured: Measurement, is_used: Tensor) -> ObservationTable:
        """Copy with other measurements, (N,), of which those of ``is_used`` are used."""
        observations = replace(self.observations, measured=measured, is_used=is_used)
        return replace(self, observations=observations)

    def unit_batches(self, batch_size: int | None, generator: torch.Generator) -> list[Tensor]:
        """Random exposure groups of at most about ``batch_size`` observations each; each once.

        At least ``MIN_BATCHES`` of them: a pass over few data must not be a single step.
        """
        order = torch.randperm(self.n_units, generator=generator)
        n_obs = len(self.observations)
        n_batches = 1 if batch_size is None else max(MIN_BATCHES, round(n_obs / batch_size))
        return list(torch.tensor_split(order, min(n_batches, self.n_units)))

    def to(self, device: torch.device | str) -> ObservationTable:
        """Copy to a device."""
        names = ("observations", "terms", "first_observation", "first_term")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def with_masks(self, is_used: Tensor, is_seen: Tensor) -> ObservationTable:
        """Copy with other held-out observations."""
        observations = replace(self.observations, is_used=is_used, is_seen=is_seen)
        return replace(self, observations=observations)

    def with_rows(self, row: Tensor, log_ratio: Tensor) -> ObservationTable:
        """Copy whose terms are of other unique reflections, times a known factor, (T,) each."""
        values = {f.name: getattr(self.terms, f.name) for f in fields(Terms)}
        values |= {"row": row, "base_log_scale": self.terms.base_log_scale + log_ratio}
        return replace(self, terms=Terms(**values))

    def _batch(self, observations: Observations, terms: Terms, rows: Tensor) -> Batch:
        images, image = torch.unique(observations.image, return_inverse=True)
        cluster = None
        if self.has_clusters:
            cluster = torch.zeros_like(observations.cluster)
            cluster[1:] = (observations.cluster.diff() != 0).cumsum(0)
        return Batch(
            observations,
            terms,
            rows,
            image,
            len(images),
            cluster,
            terms.observation if self.has_harmonics else None,
            observations.is_used.sum().double() / self.n_used,
        )


def _ranges(first: Tensor, chosen: Tensor) -> Tensor:
    """Rows ``first[c] .. first[c + 1] - 1`` of every chosen c, one after the other."""
    start, count = first[chosen], first[chosen + 1] - first[chosen]
    before = count.cumsum(0) - count
    position = torch.arange(int(count.sum()), device=first.device)
    return position + torch.repeat_interleave(start - before, count)
