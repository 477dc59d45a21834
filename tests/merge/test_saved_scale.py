"""Scale models used again: the same scales for the same observation, or one line of refusal."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
import pytest
import torch

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.integrator.torch_file import save_torch
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.training import fit, start, start_amplitudes
from braggflux.merge.io.observations import make_unmerged
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.saved_scale import FILE_NAME, load_scale, save_scale
from braggflux.merge.problem import build_problem

CELL = gemmi.UnitCell(40, 50, 60, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")
ASU = ReciprocalAsu(CELL, SPACE_GROUP, 4.0, False)
CONFIG = MergeConfig(network_width=8, epochs=20, held_out=0.0)


def observed(f, seed, n_images=20, n_per_image=150):
    """Images with scales that do not depend on the seed."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(n_images), n_per_image)
    row = rng.integers(0, len(ASU), len(image))
    x, y = rng.uniform(0, 1000, (2, len(image)))
    scale = np.exp(0.4 * np.sin(image / 3.0) + 0.3 * x / 1000)
    sigma = np.full(len(image), 10.0)
    return make_unmerged(
        source="a",
        miller_index=ASU.miller_index[row],
        intensity=scale * f[row] ** 2 + sigma * rng.standard_normal(len(image)),
        sigma=sigma,
        image_label=image,
        metadata={"X": x, "Y": y, "BATCH": image},
        wavelength=None,
        cell=CELL,
        space_group=SPACE_GROUP,
        name="a",
        has_lp_applied=True,
    )


@pytest.fixture(scope="module")
def amplitude():
    return np.sqrt(np.random.default_rng(7).exponential(1000.0, len(ASU)))


def fitted(data, config, saved=None):
    torch.manual_seed(0)
    feature_scaling = None if saved is None else saved.feature_scaling
    problem = build_problem([data], config, feature_scaling=feature_scaling)
    merger = Merger(problem.unique, problem.table, config)
    if saved is None:
        start(merger, problem.table)
    else:
        saved.check(problem.table)
        saved.load_into(merger)
        start_amplitudes(merger, problem.table)
    fit(merger, problem.table, config, with_scales=saved is None)
    return merger, problem


@pytest.fixture(scope="module")
def dark(amplitude, tmp_path_factory):
    """Folder with the scale model of a fit, and its merger and problem."""
    folder = tmp_path_factory.mktemp("dark")
    merger, problem = fitted(observed(amplitude, 1), CONFIG)
    save_scale(folder / FILE_NAME, merger, problem.table, CONFIG)
    return folder, merger, problem


def f_in_file_units(merger, problem):
    f = merger.inference().mean.detach().numpy() * problem.table.unit_intensity**0.5
    return f, merger.n_obs.numpy() > 3


@pytest.mark.slow
def test_light_comes_out_on_the_scale_of_dark(dark, amplitude):
    folder, merger, problem = dark
    light = observed(1.25 * amplitude, 2)
    again, other = fitted(light, CONFIG, load_scale(folder))
    first, seen = f_in_file_units(merger, problem)
    second, seen_too = f_in_file_units(again, other)
    chosen = seen & seen_too & (first > np.median(first))
    assert np.median(second[chosen] / first[chosen]) == pytest.approx(1.25, rel=0.01)
    # scales and error model are those of the file, to the last bit
    for part in ("scale", "likelihood"):
        for (name, a), (_, b) in zip(
            getattr(merger, part).state_dict().items(),
            getattr(again, part).state_dict().items(),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    assert again.likelihood.error_parameters == merger.likelihood.error_parameters
    # the amplitudes of a fit of its own agree, but on a scale of its own
    own, _ = fitted(light, CONFIG)
    free = own.inference().mean.detach().numpy()
    assert np.corrcoef(free[chosen], second[chosen])[0, 1] > 0.995


@pytest.mark.parametrize("stills", [False, True])
def test_an_observation_has_the_same_scale_among_others(amplitude, tmp_path, stills):
    """Metadata and intensities are standardised as in the first fit, not by the new data."""
    config = replace(CONFIG, stills=stills, epochs=5)
    data = observed(amplitude, 1)
    merger, problem = fitted(data, config)
    save_scale(tmp_path / "m.pt", merger, problem.table, config)
    saved = load_scale(tmp_path / "m.pt")
    # for stills any number of images, for scans all of them: here the strong half of X
    rows = data.image < 7 if stills else data.metadata["X"] > 500
    part = data.select(rows)
    again, other = fitted(part, config, saved)
    merger.scale.forget_images()  # parameters of single images are not saved
    with torch.no_grad():
        whole = merger.scale(problem.table.everything()).log_k.numpy()
        alone = again.scale(other.table.everything()).log_k.numpy()
    whole = whole[np.argsort(problem.source)][rows]  # in the order of the file
    alone = alone[np.argsort(other.source)]
    np.testing.assert_allclose(alone, whole, rtol=0, atol=1e-5)


def test_settings_of_the_model_come_with_it(dark):
    saved = load_scale(dark[0])
    config = saved.configured(MergeConfig(network_width=64, epochs=3, dof=4.0, seed=5))
    assert (config.network_width, config.dof) == (8, None)
    assert (config.epochs, config.seed) == (3, 5)


def test_what_does_not_fit_is_refused(dark, amplitude, tmp_path):
    saved = load_scale(dark[0])
    fewer = build_problem(
        [observed(amplitude, 2, n_images=19)], CONFIG, feature_scaling=saved.feature_scaling
    )
    with pytest.raises(UserError, match=r"1 dataset\(s\) of 20 image.*of 19 image"):
        saved.check(fewer.table)
    with pytest.raises(UserError, match="fitted without --stills"):
        saved.configured(replace(CONFIG, stills=True))
    lacking = observed(amplitude, 2)
    del lacking.metadata["Y"]
    with pytest.raises(UserError, match="unknown metadata Y"):
        build_problem([lacking], CONFIG, feature_scaling=saved.feature_scaling)
    torch.save({"scale.x": torch.zeros(1)}, tmp_path / "old.pt")
    content = torch.load(dark[0] / FILE_NAME, weights_only=True) | {"version": 1}
    save_torch(tmp_path / "first.pt", content)
    (tmp_path / "text.pt").write_text("no model\n")
    damaged = (dark[0] / FILE_NAME).read_bytes()
    (tmp_path / "cut.pt").write_bytes(damaged[: len(damaged) // 2])
    for name, words in (
        ("old.pt", "earlier version .it has no checksum.*merge the data of that fit again"),
        ("first.pt", "not a scale model of version 3"),
        ("text.pt", "damaged or of an earlier version"),
        ("cut.pt", "damaged or of an earlier version"),
        ("none.pt", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            load_scale(tmp_path / name)
    other = Merger(fewer.unique, fewer.table, CONFIG)
    with pytest.raises(UserError, match="does not fit these data"):
        saved.load_into(other)
