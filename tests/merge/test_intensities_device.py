"""Merging on a GPU: nothing is left behind on the CPU, and the result is the same."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from integrator.crystal.reciprocal_asu import ReciprocalAsu
from integrator.errors import UserError
from merge.intensities.build import build_problem
from merge.intensities.config import IntensityMergeConfig
from merge.intensities.merger import IntensityMerger
from merge.intensities.row_filter import RowFilter
from merge.intensities.training import fit, make_optimizer, pool_trees, start
from merge.io.observations import make_unmerged
from pipelines.device import choose_device

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
    "scan": IntensityMergeConfig(anomalous=True, network_width=8, epochs=4),
    "stills, double-Wilson": IntensityMergeConfig(
        anomalous=True, stills=True, prior="double-wilson", network_width=8, epochs=4
    ),
}


def made(config):
    torch.manual_seed(0)
    p = problem(config)
    merger = IntensityMerger(p.unique, p.table, config)
    merger.prior.is_coupled = config.prior == "double-wilson"
    return merger, p.table


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_mixes_no_devices(config):
    """On tensors that only pretend to be on a GPU; mixing devices is an error there too."""
    merger, table = made(config)
    mode = FakeTensorMode(allow_non_fake_inputs=False)

    def pretended(tensor):
        with mode:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda:0"
            )

    merger._apply(pretended)
    batch = table.everything()
    moved = {
        name: type(record)(**{k: pretended(v) for k, v in vars(record).items()})
        for name, record in (("observations", batch.observations), ("terms", batch.terms))
    }
    batch = type(batch)(**vars(batch) | moved | {"image": pretended(batch.image)})
    with mode:
        terms = merger.loss(batch, merger.inference())
        assert terms.elbo.device.type == "cuda"
        optimizer, rows = make_optimizer(merger, config), RowFilter(merger)
        (-terms.elbo).backward()
        optimizer.step()
        rows.step(terms.information, terms.row_weight)
        pool_trees(merger)
    assert all(p.device.type == "cuda" for p in merger.parameters())


def test_absent_device_is_a_user_error():
    assert choose_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="must be auto, cpu, cuda"):
        IntensityMergeConfig(device="tpu")


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
