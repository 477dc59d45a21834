"""L/P, zeta and efficiency: against the physics they stand for, and against DIALS."""

import importlib
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from braggflux.integrator.crystal.corrections import lp_correction, quantum_efficiency, zeta_factor

DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")
WAVELENGTH = 1.03752
S0 = np.array([0.012, -0.007, -1.0])
S0 /= np.linalg.norm(S0) * WAVELENGTH
AXIS = np.array([-0.98, 0.05, 0.19])
AXIS /= np.linalg.norm(AXIS)
NORMAL = np.cross(S0, [1.0, 0.2, 0.0])  # perpendicular to the beam
NORMAL /= np.linalg.norm(NORMAL)


def diffracted(n=200) -> np.ndarray:
    directions = np.random.default_rng(8).normal(size=(n, 3))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True) / WAVELENGTH


@pytest.fixture(scope="module")
def dials_module(dials):
    if DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(DEBIAN_BUILD))

    def load(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that DIALS imports
            return importlib.import_module(name)

    return load


def test_lorentz_factor_is_the_speed_of_crossing():
    """Rotate the reciprocal lattice point by a little: how fast does |s0 + r| change?"""
    s1 = diffracted()
    step = 1e-6
    lengths = [
        np.linalg.norm(S0 + Rotation.from_rotvec(sign * step * AXIS).apply(s1 - S0), axis=1)
        for sign in (1, -1)
    ]
    speed = np.abs(lengths[0] - lengths[1]) / (2 * step) * WAVELENGTH
    unpolarized = 0.5 * (1 + (s1 @ S0 * WAVELENGTH**2) ** 2)
    np.testing.assert_allclose(
        lp_correction(s1, S0, AXIS, NORMAL, 0.5) * unpolarized, speed, atol=1e-8
    )


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.999, 1.0])
def test_polarization_is_the_field_seen_across_the_diffracted_beam(fraction):
    """A dipole radiates |E - u (u . E)|^2; the field lies in the plane or along its normal."""
    u = diffracted() * WAVELENGTH
    in_plane = np.cross(NORMAL, S0 * WAVELENGTH)
    power = sum(
        weight * ((field - u * (u @ field)[:, None]) ** 2).sum(axis=1)
        for weight, field in ((fraction, in_plane), (1 - fraction, NORMAL))
    )
    np.testing.assert_allclose(1 / lp_correction(u, S0, None, NORMAL, fraction), power, rtol=1e-12)


def test_synchrotron_beam_does_not_scatter_along_its_polarization():
    horizontal = lp_correction([[1.0, 0, 0]], [0, 0, -1], None, [0, 1, 0], 0.999)
    vertical = lp_correction([[0, 1.0, 0]], [0, 0, -1], None, [0, 1, 0], 0.999)
    assert horizontal == pytest.approx(1 / 0.001)
    assert vertical == pytest.approx(1 / 0.999)


def test_zeta_is_the_widening_of_the_rocking_curve():
    """The lattice point turned about e1 and about the axis: the rates differ by zeta."""
    s1 = diffracted()
    e1 = np.cross(s1, S0)
    e1 /= np.linalg.norm(e1, axis=1, keepdims=True)

    def rate(axes):
        step = 1e-6
        turned = [Rotation.from_rotvec(k * step * axes).apply(s1 - S0) for k in (1, -1)]
        lengths = [np.linalg.norm(S0 + r, axis=1) for r in turned]
        return (lengths[0] - lengths[1]) / (2 * step)

    expected = rate(np.broadcast_to(AXIS, s1.shape)) / rate(e1)
    np.testing.assert_allclose(zeta_factor(s1, S0, AXIS), expected, atol=1e-6)


def test_all_factors_equal_dials(dials_module):
    model = dials_module("dxtbx.model")
    flex = dials_module("dials.array_family.flex")
    integration = dials_module("dials.algorithms.integration")
    gaussian_rs = dials_module("dials.algorithms.profile_model.gaussian_rs")
    s1 = diffracted()
    beam = model.Beam(s0=tuple(S0))
    beam.set_polarization_normal(tuple(NORMAL))
    beam.set_polarization_fraction(0.93)
    goniometer = model.Goniometer(tuple(AXIS))
    detector = model.Detector()
    panel = detector.add_panel()
    panel.set_frame((0.96, 0.28, 0), (0.28, -0.96, 0), (-10, 20, -90))
    panel.set_mu(4.7)
    panel.set_thickness(0.45)
    corrections = integration.CorrectionsMulti()
    corrections.append(integration.Corrections(beam, goniometer, detector))
    rows = flex.int([0] * len(s1))
    vectors = flex.vec3_double(s1.tolist())

    lp = corrections.lp(rows, vectors).as_numpy_array()
    np.testing.assert_allclose(lp_correction(s1, S0, AXIS, NORMAL, 0.93), lp, rtol=1e-12)
    qe = corrections.qe(rows, vectors, flex.size_t([0] * len(s1))).as_numpy_array()
    ours = quantum_efficiency(s1, panel.get_normal(), 4.7, 0.45)
    np.testing.assert_allclose(ours, qe, rtol=1e-12)
    zeta = gaussian_rs.zeta_factor(tuple(AXIS), tuple(S0), vectors).as_numpy_array()
    np.testing.assert_allclose(zeta_factor(s1, S0, AXIS), zeta, rtol=1e-12, atol=1e-15)
