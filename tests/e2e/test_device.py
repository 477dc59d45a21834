"""A run on a device that is not the CPU's: nothing is left behind, and no step waits for it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tagged_device
import torch
from tagged_device import DEVICE, OnDevice, Tagged

from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.merge.fit.full_batch import restart_doubted
from braggflux.merge.output.datasets import MergedDataset
from braggflux.pipelines.integration.device_batches import device_batches
from braggflux.pipelines.integration.epoch_outputs import merge_epoch
from braggflux.pipelines.integration.examples import write_examples
from braggflux.pipelines.integration.extraction import extract
from braggflux.pipelines.integration.final_outputs import (
    integrated_reflections,
    write_unmerged,
)
from braggflux.pipelines.integration.problem import build
from braggflux.pipelines.integration.trainer import Trainer, estimates

pytestmark = pytest.mark.slow

BATCH = 512
EPOCHS, MERGE_STEPS = 3, 5
#: Operators on tensors of the device, seen 2026-11-30: 2,592 a training step of 512 boxes with its
#: gradients and Adam's loop over the parameters, 1,514 a merge step.
MOST_OPERATORS = {"training": 2900, "merge": 1700}
#: Bytes that the operators make for a box of 7 x 9 x 11 voxels, seen 2026-11-30: 978,000 with
#: gradients, 757,000 without.
MOST_BYTES = {"training": 1_080_000, "inference": 840_000}


@pytest.fixture(scope="module")
def config(configure, tmp_path_factory):
    options = {
        "training__epochs": EPOCHS,
        "training__batch_size": BATCH,
        "training__merge_steps": MERGE_STEPS,
    }
    return configure(tmp_path_factory.mktemp("device") / "run", **options)


@pytest.fixture(scope="module")
def make_trainer(config, tmp_path_factory):
    """Trainers of one problem, each with a copy of the untrained model, on a device."""
    store = extract(config, tmp_path_factory.mktemp("device") / "shoeboxes.h5")
    problem = build(store, config)

    def make(device):
        torch.manual_seed(0)
        return Trainer(replace(problem, model=deepcopy(problem.model)), config, device)

    yield make
    store.close()


@dataclass(frozen=True)
class DeviceRun:
    """A start, an epoch and its outputs on the device, and what was watched of each part."""

    trainer: Trainer
    merged: MergedDataset
    n_training_steps: int
    training: OnDevice
    inference: OnDevice
    merging: OnDevice


@pytest.fixture(scope="module")
def device_run(make_trainer, config, tmp_path_factory):
    """Steps of :meth:`Trainer.run_epoch` one by one, then all outputs."""
    folder = tmp_path_factory.mktemp("device")
    with OnDevice():
        trainer = make_trainer(DEVICE)
        everything = [*trainer.model.parameters(), *trainer.model.buffers()]
        assert all(isinstance(value, Tagged) for value in everything)
        trainer.start()
        trainer.epoch = 1
        with OnDevice() as training:
            trainer._integrator_pass(None)
        with OnDevice() as inference:
            trainer.table = trainer.integrate_all()
        table = trainer.merge_table()
        trainer.model.merger.count(table)
        restart_doubted(trainer.model.merger, table)
        with OnDevice() as merging:
            trainer.merge_fit.steps(table, MERGE_STEPS, lambda k: k / MERGE_STEPS / EPOCHS)
        trainer._update_prior(table)
        trainer._full_batch_terms(table)
        [merged] = merge_epoch(trainer)
        assert len(integrated_reflections(trainer)) == len(trainer.problem.store)
        write_unmerged(trainer, folder / "unmerged.mtz", 0, config.data_sets[0])
        write_examples(trainer, folder / "examples.npz")
    n_steps = trainer.dataset.n_batches(BATCH)
    return DeviceRun(trainer, merged, n_steps, training, inference, merging)


def test_the_guard_catches_what_it_should():
    with OnDevice() as watch:
        here, there = torch.ones(3), torch.ones(3).to(DEVICE)
        assert (there.device, here.device) == (DEVICE, torch.device("cpu"))
        assert (there + torch.tensor(2.0)).device == DEVICE, "a number may come from anywhere"
        for made in (torch.zeros(2, device=DEVICE), there.new_zeros(2), there[1:].exp()):
            assert isinstance(made, Tagged)
        with pytest.raises(AssertionError, match=r"aten\.add\.Tensor of tensors on tagged:0 and"):
            here + there
        with pytest.raises(AssertionError, match="index"):
            there[torch.tensor([0, 1])]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert not watch.waits
        waiting = [there.sum().item, lambda: float(there[0]), lambda: bool(there.any())]
        waiting += [lambda: there[there > 0], there.nonzero, there.cpu, there.tolist, there.unique]
        for n, wait in enumerate(waiting, 1):
            wait()
            assert sum(watch.waits.values()) == n
        there[0] = 3.0
        assert there.cpu().tolist() == [3.0, 1.0, 1.0]


def test_a_run_keeps_to_its_device(device_run, make_trainer):
    """The numbers are those of the CPU."""
    on_cpu = make_trainer(torch.device("cpu"))
    on_cpu.start()
    on_cpu.run_epoch()
    found = estimates(device_run.trainer.table)
    for name, values in estimates(on_cpu.table).items():
        # batches of another size round otherwise: one number in 1,309 was 1.3e-4 off on 2026-11-30
        torch.testing.assert_close(found[name], values, rtol=2e-4, atol=1e-4)
    [expected] = merge_epoch(on_cpu)
    for name, values in vars(expected.table).items():
        if isinstance(values, np.ndarray):
            ours = getattr(device_run.merged.table, name)
            np.testing.assert_allclose(ours, values, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("left_behind", ["table_row", "observations", "log_prior_sd"])
def test_what_is_left_behind_is_noticed(left_behind, make_trainer):
    """The same run with one tensor on the CPU fails: the test above can fail."""
    with OnDevice():
        trainer = make_trainer(DEVICE)
        model = trainer.model
        if left_behind == "observations":
            model.observations = model.observations.to("cpu")
        elif left_behind == "table_row":
            model.table_row = model.table_row.cpu()
        else:
            width = model.integrator.background.log_prior_sd
            model.integrator.background.log_prior_sd = torch.nn.Parameter(width.detach().cpu())
        batch = next(trainer.dataset.batches(BATCH)).to(DEVICE)
        with pytest.raises(AssertionError, match="on tagged:0 and on the CPU"):
            model.joint_terms(batch)


def test_no_step_waits(device_run):
    """Waits do not grow with the steps; 2026-11-30: none in a step (before, 38 and 11).

    What remains: four sums for the log, five columns of the table, the counts of a fit.
    """
    watched = (device_run.training, device_run.inference, device_run.merging)
    assert device_run.n_training_steps > 2
    for watch, most in zip(watched, (4, 5, 4), strict=True):
        assert watch.waits.total() <= most, watch.waits
    assert all("trainer.py" in line for watch in watched[:2] for line in watch.waits)
    assert max(device_run.merging.waits.values()) == 1


def test_bytes_of_a_box(device_run):
    """Results of the operators for each box of 7 x 9 x 11 voxels, gradients too."""
    n = len(device_run.trainer.dataset)
    assert device_run.training.n_bytes / n < MOST_BYTES["training"]
    assert device_run.inference.n_bytes / n < MOST_BYTES["inference"]


def test_an_epoch_reads_every_box_twice(make_trainer, monkeypatch):
    """Once to train, once to integrate; frames themselves are read by the extraction alone."""
    trainer = make_trainer(torch.device("cpu"))
    trainer.start()
    rows: list[torch.Tensor] = []
    read = ShoeboxStore.read

    def counted(self, index, **options):
        rows.append(index)
        return read(self, index, **options)

    monkeypatch.setattr(ShoeboxStore, "read", counted)
    trainer.run_epoch()
    times = torch.bincount(torch.cat(rows), minlength=len(trainer.problem.store))
    assert (times[trainer.dataset.rows] == 2).all()
    assert times.sum() == 2 * len(trainer.dataset)


def test_operators_of_a_step(device_run):
    """Each is a kernel or more to launch: their number bounds small steps on a GPU."""
    training = device_run.training.n_operators / device_run.n_training_steps
    assert training < MOST_OPERATORS["training"]
    assert device_run.merging.n_operators / MERGE_STEPS < MOST_OPERATORS["merge"]


@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "read ahead"])
def test_batches_on_the_device_are_those_of_the_cpu(is_resident, make_trainer):
    """Resident boxes are copied once; read ahead, each batch is."""
    dataset = make_trainer(torch.device("cpu")).dataset
    expected = list(dataset.batches(200, torch.Generator().manual_seed(1)))
    with OnDevice():
        batches = device_batches(dataset, DEVICE, is_resident=is_resident)
        with OnDevice() as watch:
            found = list(batches(200, torch.Generator().manual_seed(1)))
        assert not watch.waits
        boxes = [k for k in watch.uploads if "boxes_in_memory" in k or "records" in k]
        assert bool(boxes) is not is_resident, watch.uploads
        assert len(found) == len(expected) > 3
        for ours, theirs in zip(found, expected, strict=True):
            assert isinstance(ours.counts, Tagged)
            assert torch.equal(ours.counts.cpu(), theirs.counts)
            assert torch.equal(ours.is_valid.cpu(), theirs.is_valid)
            assert torch.equal(ours.metadata.refl_row.cpu(), theirs.metadata.refl_row)


def test_stores_too_large_are_read_ahead(make_trainer):
    dataset = make_trainer(torch.device("cpu")).dataset
    boxes = dataset.store.in_memory
    dataset.store.in_memory = None
    try:
        with OnDevice():
            first = next(device_batches(dataset, DEVICE)(50))
        assert torch.equal(first.counts.inner, boxes.read(dataset.rows[:50], 0).counts)
    finally:
        dataset.store.in_memory = boxes


def test_the_device_is_of_no_use_outside_its_mode():
    with pytest.raises((NotImplementedError, AssertionError)):
        torch.ones(3).to(tagged_device.DEVICE)
