"""Installed, the program is one name with all its data, beside distributions of any other name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from braggflux.pipelines.workspace.provenance import package_version

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("integrator", "merge", "pipelines", "fixtures", ".src")
FILES = ("pyproject.toml", "README.md", "LICENSE")
DATA = {
    "braggflux/py.typed",
    "braggflux/pipelines/report/templates/report.html.j2",
    "braggflux/pipelines/report/templates/report.css",
    "braggflux/pipelines/report/vendor/plotly-cartesian.min.js",
    "braggflux/pipelines/report/vendor/LICENSE.plotly",
    "braggflux/pipelines/report/vendor/LICENSE.3dmol",
    "braggflux/pipelines/view/static/frames.js",
    "braggflux/pipelines/view/templates/frames.html.j2",
    "braggflux/pipelines/config/reference_full.yaml",
    "braggflux/fixtures/reference/9b7c.pdb",
}


def run(*command: str | Path, **options) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def modules_of(root: Path) -> set[str]:
    """Modules of the source tree as they are to be installed."""
    paths = [p for part in PARTS[:-1] for p in (root / part).rglob("*.py")]
    return {f"braggflux/{p.relative_to(root)}" for p in paths} | {"braggflux/__init__.py"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, links as links: building writes into the tree."""
    copy = tmp_path_factory.mktemp("source") / "braggflux"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


def build_wheel(source: Path, folder: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", "--wheel-dir", folder, source)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_one_name_and_all_that_it_needs(wheel, tree):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"braggflux-{package_version()}.dist-info"
    assert {name.split("/")[0] for name in names} == {"braggflux", info}
    assert {name for name in names if name.endswith(".py")} == modules_of(tree)
    assert names >= DATA


def test_a_source_distribution_builds_the_same_wheel(wheel, tree, tmp_path):
    program = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, tmp_path, cwd=tree)
    [path] = tmp_path.glob("braggflux-*.tar.gz")
    with tarfile.open(path) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
    shutil.unpack_archive(path, tmp_path)
    again = build_wheel(path.with_name(path.name.removesuffix(".tar.gz")), tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert set(one.namelist()) == set(other.namelist())


def foreign_wheel(folder: Path, name: str) -> Path:
    """Distribution ``name`` with the top-level package ``name``, like those on PyPI."""
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": "WHOSE = 'theirs'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(file, text)
    return path


def test_it_lives_beside_packages_called_like_its_parts(wheel, tmp_path):
    """Install `fixtures`, `integrator` and `merge` of others, use both, and take theirs away."""
    others = ("fixtures", "integrator", "merge")
    wheels = [foreign_wheel(tmp_path, name) for name in others]
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", site, wheel, *wheels)
    environment = os.environ | {"PYTHONPATH": str(site)}
    program = (
        "import braggflux, braggflux.{0} as ours, {0} as theirs;"
        "print(theirs.WHOSE, ours.__file__, theirs.__file__)"
    )
    for name in others:
        command = (sys.executable, "-c", program.format(name))
        whose, ours, theirs = run(*command, env=environment, cwd=tmp_path).split()
        assert whose == "theirs"
        assert Path(ours).parent == site / "braggflux" / name
        assert Path(theirs).parent == site / name
    for name in others:
        shutil.rmtree(site / name)
        shutil.rmtree(site / f"{name}-1.0.dist-info")
    version = run(site / "bin" / "braggflux", "--version", env=environment, cwd=tmp_path)
    assert version == f"braggflux {package_version()}\n"
    assert "stills" in run(
        *(site / "bin" / "braggflux", "simulate", "--help"), env=environment, cwd=tmp_path
    )
