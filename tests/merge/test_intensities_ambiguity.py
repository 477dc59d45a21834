"""Indexing ambiguity on simulated stills whose true indexing is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simulated_unmerged import toy_model

from braggflux.fixtures.stills import StillsExperiment, StillsSettings
from braggflux.integrator.crystal.ambiguity import indexing_operators
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.held_out import split
from braggflux.merge.fit.training import fit, start
from braggflux.merge.indexing.refine import (
    image_log_likelihoods,
    reassigned,
    refined,
    seeded,
)
from braggflux.merge.io.observations import make_unmerged
from braggflux.merge.model.merger import Merger
from braggflux.merge.problem import build_problem

HEXAGONAL = (50, 50, 60, 90, 90, 120)
CONFIG = MergeConfig(stills=True, network_width=8, epochs=20)


class Case:
    """Stills, the problem made of them, and the operators that undo what was done to them."""

    def __init__(self, tmp_path, n_images, group="P 63", **changes):
        settings = StillsSettings(
            n_images=n_images,
            model=toy_model(tmp_path / "toy.pdb", group, HEXAGONAL),
            **{"d_min": 3.0, "width": 4e-4} | changes,
        )
        self.experiment = e = StillsExperiment(settings)
        chunks = list(e.chunks())

        def column(get):
            return np.concatenate([get(c) for c in chunks])

        label = column(lambda c: c.metadata["BATCH"]).astype(int)
        self.data = make_unmerged(
            source="stills",
            miller_index=column(lambda c: c.miller_index),
            intensity=column(lambda c: c.intensity),
            sigma=column(lambda c: c.sigma),
            image_label=label,
            metadata={
                name: column(lambda c, name=name: c.metadata[name])
                for name in ("ewald_offset", "xobs", "yobs", "BATCH")
            },
            wavelength=column(lambda c: c.wavelength),
            cell=e.cell,
            space_group=e.space_group,
            name="stills",
            has_lp_applied=False,
        )
        self.operators = indexing_operators(e.cell, e.space_group, 0.1)
        self.problem = build_problem([self.data], CONFIG, operators=self.operators)
        self.masks = split(self.problem.table, 0.05, True, 0)
        self.truth = self._truth(column(lambda c: c.operator)[np.unique(label)])

    def _truth(self, applied):
        """Number of the operator that leads back, found by where it takes indices."""
        asu = self.problem.unique.asus[0]
        hkl = asu.asu_index[:: max(1, len(asu) // 50)]
        back = []
        for made in self.experiment.operators:
            moved = hkl @ made
            hits = [
                (asu.refl_id(moved @ m) == asu.refl_id(hkl)).all() for m in self.operators.matrices
            ]
            (number,) = np.flatnonzero(hits)
            back.append(number)
        return np.array(back)[applied]

    def accuracy(self, choice, whole=True):
        """Share of the images as in truth; ``whole``: after the best operator for all."""
        choice = np.asarray(choice)
        ways = range(len(self.operators)) if whole else (0,)
        group = self.experiment.space_group
        return max((self.operators.after(b, group)[choice] == self.truth).mean() for b in ways)

    def true_intensity(self, operator=0):
        """F^2 of each row of the asymmetric unit, under other indices if asked."""
        asu = self.problem.unique.asus[0]
        index, square = self.experiment.truth.expand()
        row = asu.refl_id(index @ self.operators.matrices[operator])
        value = np.full(len(asu), np.nan)
        value[row[row >= 0]] = square[row >= 0]
        return torch.as_tensor(value)


@pytest.fixture(scope="module")
def p63(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("p63"), 1000, reindexed=0.5)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("small"), 120, reindexed=0.5)


@pytest.fixture(scope="module")
def seed(p63):
    return seeded(p63.problem, p63.masks, CONFIG)


@pytest.mark.slow
def test_a_thousand_flipped_images(p63, seed):
    assert 50 < len(p63.data) / 1000 < 100
    assert 0.45 < (p63.truth > 0).mean() < 0.55
    assert p63.accuracy(seed.ambiguity.choice) > 0.99
    assert seed.ambiguity.confidence.mean() > 0.99
    # most images keep their indices
    assert seed.ambiguity.share[0] >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("operator", [0, 1])
def test_a_reference_decides_for_all(p63, operator):
    chosen = seeded(p63.problem, p63.masks, CONFIG, p63.true_intensity(operator)).ambiguity.choice
    wanted = p63.operators.after(operator, p63.experiment.space_group)[p63.truth]
    assert (chosen.numpy() == wanted).mean() > 0.99


def test_four_alternatives(tmp_path):
    case = Case(tmp_path, 400, "P 3", reindexed=0.75)
    assert len(case.operators) == 4
    choice = seeded(case.problem, case.masks, CONFIG).ambiguity.choice
    assert case.accuracy(choice) > 0.98


def test_images_that_were_never_flipped_stay_as_they_are(tmp_path):
    case = Case(tmp_path, 300)
    choice = seeded(case.problem, case.masks, CONFIG).ambiguity.choice
    assert (choice == 0).double().mean() > 0.99


def test_few_images_and_weak_spots(tmp_path):
    case = Case(tmp_path, 150, reindexed=0.5, photons=60.0)
    ambiguity = seeded(case.problem, case.masks, CONFIG).ambiguity
    accuracy = case.accuracy(ambiguity.choice)
    assert accuracy > 0.95
    assert abs(float(ambiguity.confidence.mean()) - accuracy) < 0.05


def trained(case, problem, masks, epochs=5):
    torch.manual_seed(0)
    table = problem.table.with_masks(masks.is_used, masks.is_seen)
    merger = Merger(problem.unique, table, CONFIG)
    start(merger, table)
    fit(merger, table, CONFIG, epochs=epochs)
    return merger


def test_training_corrects_wrong_choices(small):
    choice = torch.as_tensor(small.truth).clone()
    wrong = torch.rand(len(choice), generator=torch.Generator().manual_seed(0)) < 0.2
    choice[wrong] = 1 - choice[wrong]
    problem = small.problem.with_choice(choice, torch.ones(len(choice)))
    merger = trained(small, problem, small.masks)
    problem = reassigned(merger, problem, small.masks)
    assert small.accuracy(problem.ambiguity.choice, whole=False) > 0.95
    problem = refined(merger, problem, small.masks, CONFIG)
    assert small.accuracy(problem.ambiguity.choice, whole=False) > 0.99
    assert problem.ambiguity.changed[0] == pytest.approx(float(wrong.double().mean()), abs=0.05)
    assert problem.ambiguity.changed[-1] < 0.005
    # the table follows the choice
    own = problem.ambiguity.choice[problem.table.observations.image]
    rows = problem.ambiguity.rows[torch.arange(len(own)), own]
    assert torch.equal(problem.table.terms.row, rows)


def test_an_image_has_little_say_in_its_own_favour(small, monkeypatch):
    """Random choices, trained: taking its own observations out takes most of the bias away."""
    generator = torch.Generator().manual_seed(1)
    choice = torch.randint(0, 2, (len(small.truth),), generator=generator)
    problem = small.problem.with_choice(choice, torch.ones(len(choice)))
    merger = trained(small, problem, small.masks, epochs=15)

    def preference():
        score = image_log_likelihoods(merger, problem.table, problem.ambiguity.rows)
        sign = 1 - 2 * torch.nn.functional.one_hot(1 - choice, 2)
        return float((score * sign).sum(1).mean())

    left_out = preference()
    monkeypatch.setattr("braggflux.merge.indexing.refine.MAX_LEVERAGE", 0.0)
    assert abs(left_out) < 0.5 * preference()


def test_the_simulator_refuses_what_cannot_be(tmp_path):
    path = toy_model(tmp_path / "toy.pdb", "P 61 2 2", HEXAGONAL)
    with pytest.raises(UserError, match="no other way to be indexed"):
        StillsExperiment(StillsSettings(n_images=2, model=path, d_min=4.0, reindexed=0.5))
    with pytest.raises(UserError, match="reindexed must be a share"):
        StillsSettings(reindexed=1.5)
