"""Merging on a GPU: nothing is left behind on the CPU, and the result is the same."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.held_out import log_likelihoods, predict
from braggflux.merge.fit.newton import AmplitudeNewton
from braggflux.merge.fit.training import fit, pool_trees, start
from braggflux.merge.io.observations import make_unmerged
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.objective import elbo
from braggflux.merge.model.sums import ObservationSums
from braggflux.merge.problem import build_problem
from braggflux.merge.stream.newton import StreamingNewton
from braggflux.merge.stream.solve import solve_amplitudes
from braggflux.pipelines.workspace.device import choose_device

CELL = gemmi.UnitCell(30, 35, 40, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")


def problem(config):
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 4.0, True)
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(30), 60)
    row = rng.integers(0, len(asu), len(image))
    f2 = rng.exponential(1000.0, len(asu))
    data = make_unmerged(
        source="a",
        miller_index=asu.miller_index[row],
        intensity=f2[row] * np.exp(0.2 * np.sin(image)) + 10 * rng.standard_normal(len(image)),
        sigma=np.full(len(image), 10.0),
        image_label=image,
        metadata={"X": rng.uniform(0, 1, len(image)), "Y": rng.uniform(0, 1, len(image))},
        wavelength=None,
        cell=CELL,
        space_group=SPACE_GROUP,
        name="a",
        has_lp_applied=True,
    )
    return build_problem([data], config)


CONFIGS = {
    "scan": MergeConfig(anomalous=True, network_width=8, epochs=4),
    "stills, double-Wilson": MergeConfig(
        anomalous=True, stills=True, prior="double-wilson", network_width=8, epochs=4
    ),
}


def made(config):
    torch.manual_seed(0)
    p = problem(config)
    merger = Merger(p.unique, p.table, config)
    return merger, p.table


class NoTensorWithoutDevice(TorchFunctionMode):
    """A tensor made without naming a device is on the CPU, whatever the others are on."""

    MAKERS = (
        *(torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.arange),
        *(torch.linspace, torch.tensor, torch.as_tensor, torch.rand, torch.randn),
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.MAKERS and kwargs.get("device") is None:
            raise AssertionError(f"{func.__name__} without a device")
        return func(*args, **kwargs)


def test_the_guard_catches_what_it_should():
    with NoTensorWithoutDevice():
        torch.ones(3, device="cpu").new_zeros(2)
        with pytest.raises(AssertionError, match="zeros without a device"):
            torch.zeros(3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_makes_no_tensor_without_a_device(config):
    merger, table = made(config)
    units = torch.arange(table.n_units)
    with NoTensorWithoutDevice():
        start(merger, table)
        merger.prior.couple()
        pool_trees(merger)
        for rows in (AmplitudeNewton(merger), StreamingNewton(merger)):
            terms = merger.loss(table.batch(units[3:9]), merger.inference())
            (-elbo(terms)).backward()
            rows.step(terms.information, terms.row_weight, 1.0)
        solve_amplitudes(
            merger, ObservationSums(merger, 0).add([(0, table.everything().to("cpu"))])
        )
        predict(merger, table.to("cpu"), table.observations.is_used)
        log_likelihoods(merger, table, table.observations.is_used)


def test_absent_device_is_a_user_error():
    assert choose_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="must be auto, cpu, cuda"):
        MergeConfig(device="tpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cpu_and_gpu_agree(config):
    found = {}
    for device in ("cpu", "cuda"):
        merger, table = made(config)
        merger, table = merger.to(device), table.to(device)
        start(merger, table)
        fit(merger, table, config)
        found[device] = merger.inference().mean.detach().cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-3)
