"""Experiment lists against dxtbx, both ways: panels, goniometers, scans, crystals, images."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal.geometry import (
    Beam,
    Crystal,
    Experiment,
    ExternalLookup,
    Goniometer,
    ImageFiles,
    Panel,
    Scan,
)
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import read_experiments, write_experiments
from braggflux.integrator.io.dials.experiments import same
from braggflux.integrator.prediction.diffraction import DiffractionGeometry

DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")


@pytest.fixture(scope="module")
def dxtbx(dials):
    if DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(DEBIAN_BUILD))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that dxtbx imports
        import dxtbx
        import dxtbx.model.experiment_list
    return dxtbx


def load(dxtbx, path):
    return dxtbx.model.experiment_list.ExperimentListFactory.from_json_file(
        str(path), check_format=False
    )


def assert_same_models(ours: Experiment, theirs) -> None:
    """Our dataclasses hold what dxtbx computes."""
    if ours.beam.s0_at_scan_points is None:
        np.testing.assert_allclose(ours.beam.s0, theirs.beam.get_s0(), rtol=1e-14)
    assert_same_scan_points(
        ours.beam.s0_at_scan_points, theirs.beam, theirs.beam.get_s0_at_scan_point
    )
    assert ours.beam.polarization_fraction == theirs.beam.get_polarization_fraction()
    np.testing.assert_array_equal(
        ours.beam.polarization_normal, theirs.beam.get_polarization_normal()
    )
    assert len(ours.panels) == len(theirs.detector)
    for panel, reference in zip(ours.panels, theirs.detector, strict=True):
        np.testing.assert_allclose(
            panel.d_matrix.ravel(), reference.get_d_matrix(), rtol=1e-12, atol=1e-12
        )
        assert panel.name == reference.get_name()
        assert panel.type == reference.get_type()
        assert panel.image_size == reference.get_image_size()
        assert panel.pixel_size == reference.get_pixel_size()
        assert panel.trusted_range == reference.get_trusted_range()
        assert panel.thickness == reference.get_thickness()
        assert panel.mu == reference.get_mu()
        assert panel.material == reference.get_material()
        assert panel.gain == reference.get_gain()
        assert panel.pedestal == reference.get_pedestal()
        assert panel.mask == tuple(reference.get_mask())
        assert panel.parallax == ("Parallax" in type(reference.get_px_mm_strategy()).__name__)
    if theirs.goniometer is None:
        assert ours.goniometer is None
    else:
        for attribute in ("fixed_rotation", "setting_rotation"):
            np.testing.assert_allclose(
                getattr(ours.goniometer, attribute).ravel(),
                getattr(theirs.goniometer, f"get_{attribute}")(),
                atol=1e-14,
            )
        np.testing.assert_allclose(
            ours.goniometer.lab_axis, theirs.goniometer.get_rotation_axis(), atol=1e-14
        )
        assert_same_scan_points(
            ours.goniometer.setting_rotation_at_scan_points,
            theirs.goniometer,
            theirs.goniometer.get_setting_rotation_at_scan_point,
        )
    if theirs.scan is None:
        assert ours.scan is None
    else:
        assert ours.scan.image_range == theirs.scan.get_image_range()
        np.testing.assert_allclose(ours.scan.oscillation, theirs.scan.get_oscillation())
        z = 1.25
        np.testing.assert_allclose(
            ours.scan.phi_deg(z), theirs.scan.get_angle_from_array_index(z + array_start(theirs))
        )
    if theirs.crystal is not None:
        assert_same_crystal(ours.crystal, theirs.crystal)
    assert ours.identifier == theirs.identifier


def array_start(experiment) -> int:
    return experiment.scan.get_array_range()[0]


def operations_of(group) -> set[str]:
    """Symmetry operations of gemmi or cctbx, translations within the cell."""
    if isinstance(group, gemmi.SpaceGroup):
        return {op.wrap().triplet() for op in group.operations()}
    return {gemmi.Op(op.as_xyz()).wrap().triplet() for op in group.all_ops()}


def assert_same_crystal(ours: Crystal, theirs) -> None:
    np.testing.assert_allclose(ours.A.ravel(), theirs.get_A(), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(
        ours.unit_cell.parameters, theirs.get_unit_cell().parameters(), rtol=1e-9
    )
    assert operations_of(theirs.get_space_group()) == operations_of(ours.space_group)
    assert_same_scan_points(ours.A_at_scan_points, theirs, theirs.get_A_at_scan_point)


def assert_same_scan_points(ours, theirs, get) -> None:
    """Values at the frame boundaries, where a model is refined scan-varying."""
    assert (ours is None) == (theirs.num_scan_points == 0)
    for i in range(theirs.num_scan_points):
        np.testing.assert_allclose(ours[i].ravel(), get(i), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", ["hewl_nai/refined.expt", "small/stills.expt"])
def test_real_files_round_trip(dxtbx, shared, tmp_path, name):
    source = shared / "data" / name
    ours, theirs = read_experiments(source), load(dxtbx, source)
    assert len(ours) == len(theirs)
    for experiment, reference in zip(ours, theirs, strict=True):
        assert_same_models(experiment, reference)
        assert list(experiment.images.paths)[:1] == list(reference.imageset.paths())[:1]

    for path, origin in ((tmp_path / "with.expt", source), (tmp_path / "without.expt", None)):
        write_experiments(path, ours, source=origin)
        for experiment, reference in zip(ours, load(dxtbx, path), strict=True):
            assert_same_models(experiment, reference)
        again = read_experiments(path)
        assert all(same(a.images, b.images) for a, b in zip(ours, again, strict=True))

    passed = json.loads((tmp_path / "with.expt").read_text())
    original = json.loads(source.read_text())
    for block in ("beam", "detector", "goniometer", "scan", "crystal", "profile", "experiment"):
        assert passed[block] == original[block], block


@pytest.fixture
def hard(dxtbx, tmp_path):
    """Nested panels, a kappa goniometer, a late scan start, a crystal in C2; all scan-varying."""
    model = dxtbx.model
    rng = np.random.default_rng(11)
    detector = model.Detector()
    detector.hierarchy().set_frame((1, 0, 0), (0, -1, 0), (-100.0, 110.0, -180.0))
    for g in range(2):
        group = detector.hierarchy().add_group()
        a = 0.05 * (g + 1)
        group.set_local_frame(
            (np.cos(a), np.sin(a), 0), (-np.sin(a), np.cos(a), 0), (3.0 + 80 * g, 1.0, -0.5)
        )
        for p in range(2):
            panel = group.add_panel()
            panel.set_local_frame((0, 1, 0), (-1, 0, 0), (0.3, 60.0 * p, 0.1))
            panel.set_name(f"group{g}panel{p}")
            panel.set_type("SENSOR_PAD")
            panel.set_image_size((300 + p, 200))
            panel.set_pixel_size((0.172, 0.075))
            panel.set_trusted_range((0, 65000))
            panel.set_thickness(0.45)
            panel.set_material("Si")
            panel.set_mu(3.96)
            panel.set_gain(1.5)
            panel.set_pedestal(2.0)
            panel.add_mask(1, 2, 30, 40)
            panel.set_px_mm_strategy(model.ParallaxCorrectedPxMmStrategy(3.96, 0.45))
    from scitbx.array_family import flex

    goniometer = model.MultiAxisGoniometer(
        flex.vec3_double([(1, 0, 0), (0.914, 0.279, -0.297), (1, 0, 0), (0, 0, 1)]),
        flex.double([12.0, -35.0, 70.0, 5.0]),
        flex.std_string(["phi", "kappa", "omega", "two_theta"]),
        2,
    )
    scan = model.Scan((5, 12), (40.0, 0.5))
    crystal = model.Crystal((60.1, 3, 1), (-2, 50.2, 4), (5, 1, 70.3), space_group_symbol="C2")
    points = []
    for _ in range(9):
        rotation = np.eye(3) + rng.normal(scale=1e-3, size=(3, 3))
        points.append(tuple((rotation @ np.reshape(crystal.get_A(), (3, 3))).ravel()))
    crystal.set_A_at_scan_points(points)
    beam = model.Beam(s0=(0.01, -0.02, -1.0))
    beam.set_polarization_normal((0, 0, 1))
    beam.set_polarization_fraction(0.9)
    beam.set_s0_at_scan_points([(0.01, -0.02 - 1e-4 * i, -1.0) for i in range(9)])
    setting = np.reshape(goniometer.get_setting_rotation(), (3, 3))
    goniometer.set_setting_rotation_at_scan_points(
        [tuple((setting + 1e-4 * rng.normal(size=(3, 3))).ravel()) for _ in range(9)]
    )
    experiment = model.Experiment(
        beam=beam, detector=detector, goniometer=goniometer, scan=scan, crystal=crystal
    )
    experiment.identifier = "hard"
    experiments = model.ExperimentList([experiment])
    path = tmp_path / "hard.expt"
    experiments.as_file(str(path))
    return path


def test_hierarchy_and_kappa_goniometer(dxtbx, hard, tmp_path):
    ours, theirs = read_experiments(hard), load(dxtbx, hard)
    assert_same_models(ours[0], theirs[0])
    for name, origin in (("with", hard), ("without", None)):
        path = tmp_path / f"{name}.expt"
        write_experiments(path, ours, source=origin)
        assert_same_models(ours[0], load(dxtbx, path)[0])
    kept = json.loads((tmp_path / "with.expt").read_text())
    assert kept["goniometer"][0]["names"] == ["phi", "kappa", "omega", "two_theta"]
    assert len(kept["detector"][0]["hierarchy"]["children"]) == 2


def test_changed_models_are_written_and_the_rest_is_kept(dxtbx, hard, tmp_path):
    (ours,) = read_experiments(hard)
    panels = tuple(replace(p, origin=p.origin + 0.1) for p in ours.panels)
    changed = replace(ours, panels=panels, crystal=replace(ours.crystal, A=ours.crystal.A * 1.01))
    write_experiments(tmp_path / "new.expt", [changed], source=hard)
    assert_same_models(changed, load(dxtbx, tmp_path / "new.expt")[0])
    old, new = (json.loads(p.read_text()) for p in (hard, tmp_path / "new.expt"))
    assert new["scan"] == old["scan"]
    assert new["goniometer"] == old["goniometer"]


def test_every_tabulated_setting_reaches_dxtbx(dxtbx, tmp_path):
    """Both ways: our Hall symbols are cctbx's, and cctbx's come back as the same operations."""
    beam = Beam(np.array([0.0, 0.0, 1.0]), 1.0)
    matrix = np.diag([0.01, 0.012, 0.015])
    groups = [gemmi.SpaceGroup(sg.xhm()) for sg in gemmi.spacegroup_table()]
    experiments = [
        Experiment(beam, (), crystal=Crystal(matrix, group), identifier=str(i))
        for i, group in enumerate(groups)
    ]
    write_experiments(tmp_path / "all.expt", experiments)
    theirs = load(dxtbx, tmp_path / "all.expt")
    theirs.as_file(str(tmp_path / "theirs.expt"))
    back = read_experiments(tmp_path / "theirs.expt")
    for group, reference, again in zip(groups, theirs, back, strict=True):
        operations = operations_of(reference.crystal.get_space_group())
        assert operations == operations_of(group), group.xhm()
        assert operations == operations_of(again.crystal.space_group), group.xhm()


def minimal(**changes) -> dict:
    blocks = {
        "__id__": "ExperimentList",
        "experiment": [{"__id__": "Experiment", "identifier": "", "beam": 0, "detector": 0}],
        "beam": [{"direction": [0, 0, 1], "wavelength": 1.0}],
        "detector": [
            {
                "panels": [
                    {
                        "fast_axis": [1, 0, 0],
                        "slow_axis": [0, -1, 0],
                        "origin": [0, 0, -100],
                        "pixel_size": [0.1, 0.1],
                        "image_size": [10, 20],
                        "trusted_range": [0, 100],
                    }
                ]
            }
        ],
    }
    return blocks | changes


def written(tmp_path, document) -> Path:
    path = tmp_path / "made.expt"
    path.write_text(json.dumps(document))
    return path


def with_scan(tmp_path, scan, imageset=None, experiments=None) -> Path:
    entry = {"identifier": "", "beam": 0, "detector": 0, "scan": 0}
    document = minimal(scan=[scan])
    if imageset is not None:
        entry["imageset"] = 0
        document["imageset"] = [imageset]
    document["experiment"] = experiments or [entry]
    return written(tmp_path, document)


@pytest.mark.parametrize(
    ("properties", "oscillation"),
    [
        ({"oscillation": [10.0, 10.25, 10.5], "exposure_time": [1, 1, 1]}, (10.0, 0.25)),
        ({"oscillation": [10.0, 9.75, 9.5], "oscillation_width": [-0.25] * 3}, (10.0, -0.25)),
    ],
)
def test_scan_properties(tmp_path, properties, oscillation):
    path = with_scan(tmp_path, {"image_range": [1, 3], "properties": properties})
    assert read_experiments(path)[0].scan == Scan((1, 3), oscillation)


def test_single_image_with_width(tmp_path):
    properties = {"oscillation": [30.0], "oscillation_width": [0.5]}
    path = with_scan(tmp_path, {"image_range": [7, 7], "properties": properties})
    assert read_experiments(path)[0].scan == Scan((7, 7), (30.0, 0.5))


def test_template_is_expanded_relative_to_the_file(dxtbx, tmp_path):
    path = with_scan(
        tmp_path,
        {"image_range": [9, 11], "oscillation": [0, 0.1]},
        {"__id__": "ImageSequence", "template": "images/a_1_####.cbf"},
    )
    (experiment,) = read_experiments(path)
    names = [f"a_1_{n:04d}.cbf" for n in (9, 10, 11)]
    assert experiment.images.paths == tuple(str(tmp_path / "images" / n) for n in names)
    assert experiment.images.indices == (0, 1, 2)

    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for origin in (path, None):
        write_experiments(folder / "new.expt", [experiment], source=origin)
        assert read_experiments(folder / "new.expt")[0].images == experiment.images
        block = json.loads((folder / "new.expt").read_text())["imageset"][0]
        assert block["template"] == str(tmp_path / "images" / "a_1_####.cbf")


@pytest.mark.parametrize("has_source", [True, False])
def test_masks_and_maps_keep_their_files(tmp_path, has_source):
    names = {"mask": "pixels.mask", "gain": "g.pickle", "pedestal": "", "dx": "x", "dy": None}
    imageset = {"__id__": "ImageSequence", "template": "a_###.cbf", **names}
    path = with_scan(tmp_path, {"image_range": [1, 2], "oscillation": [0, 1]}, imageset)
    experiments = read_experiments(path)
    files = {key: str(tmp_path / name) if name else None for key, name in names.items()}
    assert experiments[0].images.lookup == ExternalLookup(**files)
    write_experiments(tmp_path / "copy.expt", experiments, source=path if has_source else None)
    block = json.loads((tmp_path / "copy.expt").read_text())["imageset"][0]
    assert {key: block[key] or None for key in names} == files


def test_scans_that_share_one_image_set_get_their_own_frames(tmp_path):
    entry = {"identifier": "", "beam": 0, "detector": 0, "imageset": 0}
    document = minimal(
        scan=[
            {"image_range": [3, 4], "oscillation": [0, 1]},
            {"image_range": [5, 7], "oscillation": [2, 1]},
        ],
        imageset=[
            {
                "__id__": "ImageSequence",
                "template": "x_master.h5",
                "single_file_indices": [2, 3, 4, 5, 6],
            }
        ],
        experiment=[entry | {"scan": 0}, entry | {"scan": 1}],
    )
    first, second = read_experiments(written(tmp_path, document))
    assert first.images == ImageFiles((str(tmp_path / "x_master.h5"),), (2, 3))
    assert second.images == ImageFiles((str(tmp_path / "x_master.h5"),), (4, 5, 6))
    assert first.beam is second.beam


def test_built_from_dataclasses_alone(dxtbx, tmp_path):
    panel = Panel(
        name="p",
        fast_axis=np.array([1.0, 0.0, 0.0]),
        slow_axis=np.array([0.0, -1.0, 0.0]),
        origin=np.array([-10.0, 12.0, -90.0]),
        pixel_size=(0.1, 0.1),
        image_size=(200, 240),
    )
    experiment = Experiment(
        beam=Beam(np.array([0.0, 0.0, 1.0]), 0.98),
        panels=(panel,),
        goniometer=Goniometer(np.array([1.0, 0.0, 0.0])),
        scan=Scan((1, 10), (0.0, 0.25)),
        crystal=Crystal(np.diag([0.01, 0.01, 0.02]), gemmi.SpaceGroup("P43212")),
        images=ImageFiles(("sim_master.h5",), tuple(range(10))),
        identifier="sim",
    )
    write_experiments(tmp_path / "sim.expt", [experiment])
    (theirs,) = load(dxtbx, tmp_path / "sim.expt")
    assert_same_models(experiment, theirs)
    assert list(theirs.imageset.indices()) == list(range(10))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "not a DIALS experiment list"),
        ({"__id__": "Other"}, "not a DIALS experiment list"),
        (minimal(experiment=[{"beam": 3, "detector": 0}]), "beam 3, and there are 1"),
        (minimal(beam=[{"__id__": "polychromatic", "direction": [0, 0, 1]}]), "monochromatic"),
        (minimal(detector=[{"panels": [{"origin": [0, 0, 0]}]}]), "pixel_size"),
        ({"__id__": "ExperimentList"}, "experiment"),
        (
            minimal(
                crystal=[
                    {
                        "real_space_a": [1, 0, 0],
                        "real_space_b": [0, 1, 0],
                        "real_space_c": [0, 0, 1],
                        "space_group_hall_symbol": "nonsense",
                    }
                ],
                experiment=[{"beam": 0, "detector": 0, "crystal": 0}],
            ),
            "Hall symbol 'nonsense'",
        ),
    ],
)
def test_unusable_documents_are_explained(tmp_path, document, message):
    path = written(tmp_path, document)
    with pytest.raises(UserError, match=message) as error:
        read_experiments(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_scan_points_must_fit_the_scan(hard, tmp_path):
    document = json.loads(hard.read_text())
    document["scan"][0]["image_range"] = [5, 11]
    with pytest.raises(UserError, match="9 scan points for 7 images"):
        read_experiments(written(tmp_path, document))


def test_missing_or_broken_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_experiments(tmp_path / "none.expt")
    (tmp_path / "cut.expt").write_text(json.dumps(minimal())[:-20])
    with pytest.raises(UserError, match="not JSON"):
        read_experiments(tmp_path / "cut.expt")
    (tmp_path / "binary.expt").write_bytes(b"\x93\xd9\xff\xfe")
    with pytest.raises(UserError, match="not JSON"):
        read_experiments(tmp_path / "binary.expt")


def test_source_must_hold_the_experiment(hard, tmp_path):
    (experiment,) = read_experiments(hard)
    with pytest.raises(UserError, match="has 1 experiments"):
        write_experiments(
            tmp_path / "x.expt", [experiment, replace(experiment, identifier="b")], source=hard
        )
    assert not (tmp_path / "x.expt").exists()


@pytest.mark.parametrize("name", ["beam", "goniometer"])
def test_scan_points_that_slicing_left_are_named(hard, tmp_path, caplog, name):
    """dials.slice_sequence cuts those of the crystal alone; DIALS then takes the static values."""
    key = {"beam": "s0_at_scan_points", "goniometer": "setting_rotation_at_scan_points"}[name]
    document = json.loads(hard.read_text())
    document[name][0][key] *= 2
    (experiment,) = read_experiments(written(tmp_path, document))
    assert f"the {name} has 18 scan points for 8 images; its static values" in caplog.text
    if name == "beam":
        np.testing.assert_allclose(experiment.beam.s0, (0.01, -0.02, -1.0), rtol=1e-14)
    else:
        np.testing.assert_allclose(experiment.beam.s0, (0.01, -0.0204, -1.0), rtol=1e-12)
    write_experiments(tmp_path / "copy.expt", [experiment], source=tmp_path / "made.expt")
    assert len(json.loads((tmp_path / "copy.expt").read_text())[name][0][key]) == 18
    geometry = DiffractionGeometry.from_experiment(experiment)
    assert [len(geometry.s0), len(geometry.setting), len(geometry.A)] == [
        1 if name == "beam" else 9,
        1 if name == "goniometer" else 9,
        9,
    ]
