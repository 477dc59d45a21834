"""A trained run, made by a notebook: its pages, by numbers and in a real browser; examples.

All in one file: the run is trained once.
"""

from __future__ import annotations

import doctest
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.intensity_file import read_intensities
from braggflux.pipelines.api import actions, amplitudes, results, simulation
from braggflux.pipelines.api.results import Run
from braggflux.pipelines.maps.anomalous_peaks import peak_heights_from_mtz
from braggflux.pipelines.view.frames import NO_COUNT, OWN
from braggflux.pipelines.workspace.rundir import RunDirectory

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
#: Wide and in light, narrow and in the dark.
VIEWS = ((1280, "light"), (400, "dark"))


def executed(name: str, folder: Path) -> list[dict]:
    """Outputs of a notebook that is run in a folder, by this Python."""
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    specification = {"argv": command, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(specification))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jupyter's packages about each other
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        import nbclient
        import nbformat

        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        place = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Folder and outputs of the notebook that simulates and trains for one epoch."""
    folder = tmp_path_factory.mktemp("pages")
    return folder, executed("frames_to_map", folder)


@pytest.fixture(scope="module")
def tiny(notebook) -> RunDirectory:
    """The run of the notebook."""
    return RunDirectory.open(notebook[0] / "run")


def kinds(outputs: list[dict]) -> list[str]:
    return [kind for output in outputs for kind in output.get("data", {})]


def test_frames_to_map(notebook):
    folder, outputs = notebook
    assert kinds(outputs).count("image/png") == 2
    assert kinds(outputs).count("text/html") >= 3
    shown = "".join(output.get("text", "") for output in outputs)
    assert "epoch 1" in shown
    assert "Traceback" not in shown
    assert (folder / "run" / "report.html").is_file()


def test_merging_with_priors(tmp_path, monkeypatch):
    """Cell by cell in this process: one kernel that imports torch is enough."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((NOTEBOOKS / "merging_with_priors.ipynb").read_text("utf-8"))
    found: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "notebook", "exec", dont_inherit=True), found)
    wilson, double = found["scores"].values()
    # 2026-11-30: .020 and .139, .163 and .311; spread .87
    assert all(double[kind] > wilson[kind] + 0.05 for kind in wilson)
    assert 0.7 < found["spread"] < 1.2


def test_examples_of_the_docstrings(tiny, monkeypatch):
    """In the notebook's folder, where run and frames are."""
    monkeypatch.chdir(tiny.path.parent)
    shutil.rmtree("merged", ignore_errors=True)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    n_examples = 0
    for module in (amplitudes, results, actions, simulation):
        failed, attempted = doctest.testmod(module, optionflags=options)
        assert failed == 0, module.__name__
        assert attempted > 0, module.__name__
        n_examples += attempted
    assert n_examples >= 15
    assert Path("peaks.png").stat().st_size > 1000


def test_tables_and_words_of_a_run(tiny):
    run = Run(str(tiny.path))
    peaks = peak_heights_from_mtz(tiny.merged, tiny.read_config().model)
    found = run.amplitudes.peaks(str(tiny.read_config().model))
    assert found["peak_sigma"].is_monotonic_decreasing
    assert set(found["peak_sigma"]) == {peak.peak_sigma for peak in peaks}
    assert len(run.metrics) == 2
    assert len(run.observations()) == len(read_intensities(tiny.intensities))
    merged = run.amplitudes
    assert len(merged) == len(merged.table()) == len(merged.dataset())
    assert repr(merged).endswith("P 43 21 2, to 2.68 A>")
    assert "epoch 1, finished" in repr(run)
    assert f"{found['peak_sigma'][0]:.2f} sigma" in run._repr_html_()
    [axes] = run.plot_peaks().axes
    assert len(axes.lines) == 6
    assert axes.get_legend().get_title().get_text() == ""  # no reference
    with pytest.raises(UserError, match="run of one data set, which has no name; got 'dark'"):
        Run(tiny.path, "dark")
    with pytest.raises(UserError, match=r"no site 'A/X' in the model; there are A/CYS6:SG"):
        merged.plot_map(tiny.read_config().model, "A/X")


@pytest.fixture(scope="module")
def client(tiny, serve) -> Iterator[object]:
    with serve(tiny.path, tiny.integrated_refl) as found:
        yield found


def fetch(client, path: str) -> dict:
    answer = client.get(path, Accept="application/json")
    assert answer.status == 200, answer.text
    return json.loads(answer.text)


@pytest.fixture(scope="module")
def reflection(client) -> dict:
    """The strongest spot that has mates."""
    page = client.get("/reflections?order=J&down=1&flag=none").text
    row = page.split('href="/reflection/')[1].split('"')[0]
    return fetch(client, f"/reflection/{row}/data")


def test_scaled_mates_are_those_of_unmerged_mtz(tiny, reflection):
    mtz = gemmi.read_mtz_file(str(tiny.unmerged))
    intensity, x = (np.array(mtz.column_with_label(n)) for n in ("I", "XDET"))
    y = np.array(mtz.column_with_label("YDET"))
    shown = [m for m in reflection["mates"] if m["scaled_intensity"] is not None]
    assert shown
    for mate in shown:
        here = (np.abs(x - mate["x"]) < 1e-3) & (np.abs(y - mate["y"]) < 1e-3)
        assert here.sum() == 1
        assert intensity[here] == pytest.approx(mate["scaled_intensity"], rel=1e-4)
        z = (mate["scaled_intensity"] - mate["expected"]) / mate["scaled_sigma"]
        assert z == pytest.approx(mate["z"], abs=0.2)  # the deviance is not quite a square
        assert 0 <= mate["p_outlier"] <= 1


def test_box_and_model_agree(reflection):
    box = reflection["box"]
    counts, model, valid = (np.array(box[name], float) for name in ("counts", "model", "valid"))
    assert counts.shape == model.shape == valid.shape
    total = (counts * valid).sum()
    assert (model * valid).sum() == pytest.approx(total, abs=5 * total**0.5)


def test_the_reference_value_is_found(reflection):
    """The run's own integrated.refl in the place of DIALS' has the same intensity."""
    ours, theirs = reflection["likelihood"], reflection["dials"]["prf"]
    assert theirs["value"] == pytest.approx(ours["mode"], rel=1e-4)
    assert theirs["sigma"] == pytest.approx(ours["sigma"], rel=1e-3)
    step = ours["J"][1] - ours["J"][0]
    assert sum(ours["density"]) * step == pytest.approx(1, abs=1e-6)


def test_a_frame_has_its_spots(client):
    place = "/frames/0/8/0"
    answer, mask = client.get(f"{place}/counts"), client.get(f"{place}/mask")
    shape = tuple(map(int, answer.headers["x-shape"].split(",")))
    counts = np.frombuffer(answer.body, "<u2").reshape(shape)
    own = (np.frombuffer(mask.body, np.uint8).reshape(shape) & OWN) > 0
    good = counts != NO_COUNT
    assert good.mean() > 0.5
    # pixels of predicted spots are brighter than the others
    assert counts[good & own].mean() > 2 * counts[good & ~own].mean()


def test_rings_have_the_resolution_they_say(client):
    found = fetch(client, "/frames/0/0/geometry")
    matrix, s0 = np.array(found["d_matrix"]), np.array(found["s0"])
    assert len(found["rings"]) > 2
    for ring in found["rings"]:
        pixels = np.array(ring["path"]) * found["pixel_size"]
        rays = np.column_stack([pixels, np.ones(len(pixels))]) @ matrix.T
        s1 = rays / np.linalg.norm(rays, axis=1)[:, None] * np.linalg.norm(s0)
        d = 1 / np.linalg.norm(s1 - s0, axis=1)
        assert d == pytest.approx(ring["d"], rel=0.02)


def test_map_has_the_height_of_the_table(tiny, client):
    peaks = peak_heights_from_mtz(tiny.merged, tiny.read_config().model)
    best = max(range(len(peaks)), key=lambda k: peaks[k].peak_sigma)
    found = fetch(client, f"/map/{best}/data")
    ours, reference = found["maps"]
    assert ours["height"] == pytest.approx(peaks[best].peak_sigma, abs=0.01)
    assert max(ours["cube"]) > 0.9 * ours["height"]
    assert "no reference" in reference["reason"]
    assert any(np.allclose(atom["xyz"], 0, atol=0.01) for atom in found["atoms"])


def test_what_deviates_most_is_first(client):
    page = client.get("/reflections?order=z&down=1")
    assert page.status == 200
    cells = [row.split("<td")[7].split(">")[1] for row in page.text.split("<tr>")[2:]]
    z = [abs(float(cell.split("<")[0])) for cell in cells]
    assert z == sorted(z, reverse=True)
    assert z[0] > 0


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_pages_in_a_browser(client, reflection, browser, width, scheme):
    """No script error, nothing beyond the window, every canvas and plot drawn."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        base_url=f"http://127.0.0.1:{client.port}",
    )
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    row = reflection["row"]
    drawn = {
        "/": "table a",
        "/frames?image=8": "#frame",
        "/reflections": "table.list tbody tr",
        f"/reflection/{row}": "#curve svg, #mates svg, canvas.voxels",
        "/map/0": ".sections canvas",
        "/report": "h1",
    }
    for path, what in drawn.items():
        page.goto(path)
        page.wait_for_selector("[aria-busy=true]", state="detached")
        assert page.locator(what).count() > 0, path
        assert not errors, (path, errors)
        if path == "/report":  # it has tests of its own
            continue
        excess = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(excess) == 0, path
        for canvas in page.locator("canvas").element_handles():
            colours = canvas.evaluate(
                "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, "
                "c.height).data.buffer)).size"
            )
            # a box may have the same count everywhere; a frame and a map may not
            assert colours > (0 if "reflection" in path else 10), path
    context.close()


def test_a_day_at_the_viewer(client, reflection, browser):
    """Search, open a reflection, go to its frame, click on its box, look at a site."""
    page = browser.new_page(base_url=f"http://127.0.0.1:{client.port}")
    row = reflection["row"]
    hkl = next(m["hkl"] for m in reflection["mates"] if m["row"] == row)
    page.goto("/reflections")
    page.fill("[name=hkl]", hkl)
    page.click("button:text('show')")
    page.click(f"a[href='/reflection/{row}']")
    page.wait_for_selector("#table tr.here")
    page.click("dd a")
    page.wait_for_selector("#frame[aria-busy=false]")
    page.wait_for_timeout(300)
    # the marked box is in the middle
    box = page.locator("#frame").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_url(f"**/reflection/{row}")
    # a reflection that the report shows
    page.goto("/report")
    link = page.locator(f"a[href^='http://127.0.0.1:{client.port}/reflection/']").first
    shown = link.get_attribute("href")
    link.evaluate("a => a.click()")
    page.wait_for_url(shown)
    page.wait_for_selector("#table tr.here")
    page.click("nav a:text('Maps')")
    page.wait_for_selector(".sections canvas")
    before = page.locator(".sections canvas").first.evaluate("c => c.toDataURL()")
    page.locator("[name=z]").fill("12")
    page.wait_for_timeout(100)
    assert page.locator(".sections canvas").first.evaluate("c => c.toDataURL()") != before
    assert page.locator("#controls label").nth(2).inner_text().endswith("3.6 Å")
    page.close()
