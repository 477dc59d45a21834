"""Training: block-coordinate ascent on the one ELBO, an epoch at a time.

An epoch is

1. a pass over the shoeboxes in shuffled minibatches; each step moves the integrator (networks,
   profile, background priors) along the gradient of the joint ELBO, in which the merge's
   likelihood of every observation takes part (``staged``: along its own evidence alone);
2. a pass without gradients: the photon-count distribution of every observation at the posterior
   means;
3. full-batch steps for the merge (scales, error model, Wilson prior, q(F)) on these distributions,
   sigma_A of a model from moments, and r of relatives (Bijvoet mates, data sets) from half sets.

The merge's parameters are fitted to all observations at once because most structure factors are
seen by a handful of observations only: stochastic steps for them would be noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.processes import ALONE, Processes
from braggflux.integrator.shoebox.dataset import ShoeboxDataset
from braggflux.integrator.types import IntensityTable, ShoeboxBatch
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.fit.full_batch import FullBatchFit, restart_doubted
from braggflux.merge.fit.half_set_correlation import half_set_correlation
from braggflux.merge.fit.sigma_a import set_sigma_a
from braggflux.merge.fit.training import fit, pool_trees, start, start_amplitudes
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.reference import Reference
from braggflux.merge.scale.terms.frames import MIN_OBSERVATIONS
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.integration.device_batches import byte_limit, device_batches
from braggflux.pipelines.integration.joint_model import ElboTerms, assemble_elbo
from braggflux.pipelines.integration.problem import Problem
from braggflux.pipelines.workspace.stage_times import StageTimes

GRADIENT_CLIP = 10.0
#: Of a checkpoint; more is damage.
MOST_EPOCHS = 10**9
#: Newton steps of the amplitudes at epoch 0, with the scales that they were started from.
FIRST_STEPS = 20
#: Boxes that a CPU works on at once: their arrays stay in its cache, which is twice as fast.
CPU_ROWS = 512
#: Fits of the merge, each of an epoch's steps, where the integrator is not trained.
MERGES_ALONE = 3
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EpochResult:
    """Number and metrics of an epoch."""

    epoch: int
    metrics: dict[str, float | int | None]


class Trainer:
    """Optimisers, random state and the latest table of a run.

    Parameters
    ----------
    problem : Problem
        Its model is moved to ``device``.
    config : RunConfig
    device : torch.device
    exchange : callable, optional
        Staged coupling: sends the table from integrator to merge through a file and back.
    stages : StageTimes, optional
        Takes the time of the parts of an epoch.
    processes : Processes
        Those of the run, joined; each computes its share of every batch.
    """

    def __init__(
        self,
        problem: Problem,
        config: RunConfig,
        device: torch.device,
        exchange: Callable[[IntensityTable], IntensityTable] | None = None,
        stages: StageTimes | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.stages = stages or StageTimes()
        self.problem = problem
        self.config = config
        self.device = device
        self.exchange = exchange
        self.model = problem.model.to(device)
        self.model.observations = self.model.observations.to(device)
        self.epoch = 0
        self.dataset = ShoeboxDataset(problem.store, byte_limit=byte_limit(device))
        self.batches = device_batches(self.dataset, device)
        self.generator = torch.Generator().manual_seed(config.training.seed)
        self.table: IntensityTable | None = None
        self._integration: dict[str, float] | None = None  # of the latest training pass
        profile = self.model.integrator.profile
        shape = {id(profile.log_mean), id(profile.basis)}
        networks = [p for p in self.model.integrator.parameters() if id(p) not in shape]
        self.integrator_optimizer = torch.optim.Adam(
            [
                {"params": networks, "start": config.integrator.learning_rate},
                {
                    "params": [profile.log_mean, profile.basis],
                    "start": config.integrator.profile_learning_rate,
                },
            ]
        )
        self.merge_fit = FullBatchFit(self.model.merger, config.merge, processes)
        #: Of each step of the latest training pass, all processes together [nats].
        self.step_elbos: list[float] = []

    @property
    def coupled(self) -> bool:
        """Whether the merge's gradients reach the integrator."""
        return self.config.training.coupling == "joint"

    def start(self, progress: Progress | None = None) -> EpochResult:
        """Integrate with the starting profile and start the merge: epoch 0."""
        began = time.monotonic()
        with self.stages("integration pass", 0):
            self.table = self._exchanged(self.integrate_all(progress))
        with self.stages("merge steps", 0):
            return self._first_merge(began)

    def _first_merge(self, began: float) -> EpochResult:
        """Start the merge from the first table; fit it where no epochs follow."""
        table = self.merge_table()
        self._start_merger(table)
        if self.model.merger.unique.ties_datasets:
            # data sets start alike: r is estimated about amplitudes that outliers have not taken
            pool_trees(self.model.merger)
            self._fit_amplitudes(table)
        self._update_prior(table)
        # mates start alike
        self._fit_amplitudes(table)
        if not self.config.training.epochs:
            for k in range(MERGES_ALONE):
                self._merge_steps(table, k, MERGES_ALONE)
        self.processes.copy_from_first(self.model)
        return self._result(0, began, self._full_batch_terms(table), None)

    def _fit_amplitudes(self, table: ObservationTable) -> None:
        fit(self.model.merger, table, self.config.merge, epochs=FIRST_STEPS, with_scales=False)

    def _start_merger(self, table: ObservationTable) -> None:
        """Start scales and amplitudes; where frames have few spots, amplitudes alone.

        The mean ratio of two or three spots to their reflections says more of the spots than of
        their frame.
        """
        merger = self.model.merger
        frames, n_used = merger.scale.frames, int(table.observations.is_used.sum())
        if frames is not None and n_used < MIN_OBSERVATIONS * sum(frames.n_frames):
            merger.count(table)
            start_amplitudes(merger, table)
        else:
            start(merger, table)

    def run_epoch(self, progress: Progress | None = None) -> EpochResult:
        """One epoch of training."""
        began = time.monotonic()
        self.epoch += 1
        self.processes.copy_random_state(self.device)
        with self.stages("training pass", self.epoch):
            gradient_norm = self._integrator_pass(progress)
        with self.stages("integration pass", self.epoch):
            self.table = self._exchanged(self.integrate_all())
        with self.stages("merge steps", self.epoch):
            table = self.merge_table()
            self._merge_steps(table, self.epoch - 1, self.config.training.epochs)
            # sums in another order differ by rounding: all go on from the same numbers
            self.processes.copy_from_first(self.model)
            terms = self._full_batch_terms(table)
        return self._result(self.epoch, began, terms, gradient_norm)

    def _integrator_pass(self, progress: Progress | None) -> float:
        """Train for a pass; returns the mean norm of the gradients."""
        self._set_rates(self.integrator_optimizer)
        self.model.merger.requires_grad_(False)
        batch_size = self.config.training.batch_size
        n_batches = self.dataset.n_batches(batch_size)
        parameters = [p for g in self.integrator_optimizer.param_groups for p in g["params"]]
        # fetched once: a number asked for in a step would make the host wait for the device
        norms: list[Tensor] = []
        elbos: list[Tensor] = []
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        batches = self.batches(batch_size, self.generator, self.processes)
        for k, batch in enumerate(batches):
            self.model.zero_grad(set_to_none=True)
            n_rows = min(batch_size, len(self.dataset) - k * batch_size)
            elbo, sums = self._add_gradients(batch, n_rows)
            self.processes.add_up_gradients(parameters, [elbo])
            totals += sums
            elbos.append(elbo)
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP))
            self.integrator_optimizer.step()
            if progress is not None:
                progress(k + 1, n_batches)
        self.model.merger.requires_grad_(True)
        self.processes.add_up([totals])
        names = ("nll", "kl_profile", "kl_background")
        self._integration = dict(zip(names, totals.tolist(), strict=True))
        self.step_elbos = torch.stack(elbos).tolist() if elbos else []
        return sum(torch.stack(norms).tolist()) / len(norms) if norms else 0.0

    def _add_gradients(self, batch: ShoeboxBatch, n_rows: int) -> tuple[Tensor, Tensor]:
        """Add the gradients of this process' share of a batch of ``n_rows`` boxes.

        Returns
        -------
        elbo : Tensor, ()
        sums : Tensor, (3,)
            Negative log-likelihood of the pixels, divergences of profile and background.
        """
        # all processes draw for the whole batch, so that their number changes nothing
        shape = n_rows, self.model.integrator.profile.n_latent
        noise = torch.randn(shape, device=self.device)[self.processes.share(n_rows)]
        elbo = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        first = 0
        # the ELBO is a sum: parts of a batch add up to its gradient
        for part in self._parts(batch):
            own = noise[first : first + len(part)]
            first += len(part)
            terms, _ = self.model.joint_terms(part, coupled=self.coupled, noise=own)
            (-terms.elbo / n_rows).backward()
            elbo = elbo + terms.elbo.detach()
            own_sums = (terms.nll, terms.kl_profile, terms.kl_background)
            sums = sums + torch.stack([value.detach() for value in own_sums])
        return elbo, sums

    def _merge_steps(self, table: ObservationTable, number: int, n_fits: int) -> None:
        """Take the steps of one of the ``n_fits`` fits of the merge."""
        merger, n = self.model.merger, self.config.training.merge_steps
        merger.count(table)
        restart_doubted(merger, table)
        self.merge_fit.steps(table, n, lambda k: (number + k / n) / n_fits)
        self._update_prior(table)

    def _update_prior(self, table: ObservationTable) -> None:
        """Set sigma_A of a model, and r of relatives unless it is given."""
        merger, r = self.model.merger, self.config.merge.correlation
        if merger.prior.has(Reference):
            set_sigma_a(merger, table)
        if merger.prior.is_coupled and r is not None:
            merger.prior.part(DoubleWilson).one_minus_r2.fill_(1 - r**2)
        elif merger.prior.is_coupled:
            half_set_correlation(merger, table, self.config.training.seed)

    @torch.no_grad()
    def _full_batch_terms(self, table: ObservationTable) -> ElboTerms:
        merger = self.model.merger
        terms = merger.loss(table.everything(), merger.inference())
        merger.information = terms.information  # the outputs' widths ask for it
        return assemble_elbo(None, terms)

    def merge_table(self) -> ObservationTable:
        """Latest intensity table as the merge sees it, on the device."""
        return self.model.observe(self.table.to(self.device))

    def _exchanged(self, table: IntensityTable) -> IntensityTable:
        return table if self.exchange is None else self.exchange(table)

    @torch.no_grad()
    def integrate_all(self, progress: Progress | None = None) -> IntensityTable:
        """Table of every observation at the posterior means, in the order of the store."""
        columns = self._empty_columns()
        batch_size = self.config.training.batch_size
        n_batches = self.dataset.n_batches(batch_size)
        for k, batch in enumerate(self.batches(batch_size, None, self.processes)):
            for part in self._parts(batch):
                _, table = self.model.integrate(
                    part, sample=False, use_expected=self.coupled and self.epoch > 0
                )
                collect(columns, table)
            if progress is not None:
                progress(k + 1, n_batches)
        rows = self.dataset.rows_of_batches(batch_size, None, self.processes)
        self.processes.put_together(columns, torch.cat(rows))
        return self._assemble({name: values.cpu() for name, values in columns.items()})

    def _parts(self, batch: ShoeboxBatch) -> Iterator[ShoeboxBatch]:
        """Parts of a batch that the device works on at once."""
        if self.device.type != "cpu":
            yield from [batch] if len(batch) else []
            return
        for first in range(0, len(batch), CPU_ROWS):
            yield batch[slice(first, first + CPU_ROWS)]

    def _empty_columns(self) -> dict[str, Tensor]:
        """Estimates of no row yet, on the device; rows that no batch holds stay rejected."""
        n = len(self.problem.store)
        likelihood = ShiftedPoisson(torch.zeros(n), torch.ones(n), torch.ones(n))
        columns = likelihood.columns() | {
            "background": torch.zeros(n),
            "flags": self.problem.flags,
        }
        return {name: values.to(self.device, copy=True) for name, values in columns.items()}

    def _assemble(self, columns: dict[str, Tensor]) -> IntensityTable:
        likelihood = ShiftedPoisson(*(columns[f.name] for f in fields(ShiftedPoisson)))
        return IntensityTable(
            self.problem.metadata, likelihood, columns["background"], columns["flags"]
        )

    def _set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Cosine decay to a tenth over the epochs of the run."""
        share = (self.epoch - 1) / max(self.config.training.epochs - 1, 1)
        decay = 0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * min(share, 1.0))))
        for group in optimizer.param_groups:
            group["lr"] = group["start"] * decay

    def _result(
        self, epoch: int, began: float, terms: ElboTerms, gradient_norm: float | None
    ) -> EpochResult:
        merger = self.model.merger
        n = max(int(self.table.is_integrated.sum()), 1)
        pixels = self._integration
        metrics: dict[str, float | int | None] = {
            "epoch": epoch,
            "wall_s": round(time.monotonic() - began, 2),
            "gpu_mem_mb": _gpu_memory(self.device),
            "lr": self.integrator_optimizer.param_groups[0].get("lr") if epoch else None,
            "merge_elbo": float(terms.elbo.detach()) / n,
            "merge_nll": float(terms.nll.detach()) / n,
            "kl_structure_factor": float(terms.kl_structure_factor.detach()) / n,
            "scale_penalty": float(terms.scale_penalty.detach()) / n,
            "pixel_nll": pixels and pixels["nll"] / n,
            "kl_profile": pixels and pixels["kl_profile"] / n,
            "kl_background": pixels and pixels["kl_background"] / n,
            "grad_norm": gradient_norm,
            **merger.likelihood.error_parameters,
        }
        if merger.prior.has(Reference):
            metrics["sigma_a"] = float(merger.prior.part(Reference).sigma_a2.sqrt().mean())
        if merger.unique.ties_datasets and merger.prior.is_coupled:
            prior = merger.prior.part(DoubleWilson)
            is_mate = merger.joined[prior.child] == prior.parent
            metrics["one_minus_r2"] = float(prior.one_minus_r2[~is_mate].mean())
        return EpochResult(epoch, metrics)

    def state_dict(self) -> dict[str, object]:
        """Everything that the next epoch depends on."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "integrator_optimizer": self.integrator_optimizer.state_dict(),
            "merge_fit": self.merge_fit.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "table": estimates(self.table),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go back to a checkpoint."""
        epoch = state["epoch"]
        if type(epoch) is not int or not 0 <= epoch <= MOST_EPOCHS:
            raise ValueError(f"epoch is {epoch!r}")
        self.epoch = epoch
        self.model.load_state_dict(state["model"])
        self.integrator_optimizer.load_state_dict(state["integrator_optimizer"])
        self.merge_fit.load_state_dict(state["merge_fit"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        self.table = self._assemble(dict(state["table"]))


def estimates(table: IntensityTable) -> dict[str, Tensor]:
    """Columns of a table that the integrator estimates; the metadata are known beforehand."""
    return table.likelihood.columns() | {"background": table.background, "flags": table.flags}


def collect(columns: dict[str, Tensor], part: IntensityTable) -> None:
    """Write the estimates of some rows into the columns of all, in place."""
    for name, values in estimates(part).items():
        columns[name][part.metadata.refl_row] = values.detach().to(columns[name].dtype)


def _gpu_memory(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**20
