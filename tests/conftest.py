"""Seeds, shared data and installed DIALS: what a missing one means."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Small tensors gain nothing from threads, and on a busy machine lose a factor of ten.
torch.set_num_threads(1)

# A shell that puts the suite into the background lets it ignore Ctrl-C, and so every command that
# a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
SHARED = Path(__file__).resolve().parents[1].parent / "shared"


FRESH = "BRAGGFLUX_TEST_IN_FRESH_PROCESS"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked ``fresh_process`` in an interpreter of its own.

    It forks processes that take gradients, and autograd's threads do not survive a fork: the
    parent must not have taken any.
    """
    if pyfuncitem.get_closest_marker("fresh_process") is None or os.environ.get(FRESH):
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env=os.environ | {FRESH: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return True


def _missing(what: str) -> None:
    """Skip for a user, fail in CI: a green CI must not hide a missing reference."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI=true")
    pytest.skip(f"{what} is missing")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - guards third-party code that uses the global generator


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real and independent data; skip (fail in CI) without it."""
    if not (SHARED / "data").is_dir():
        _missing("../shared/data")
    return SHARED


@pytest.fixture(scope="session")
def dials() -> str:
    """Folder of the DIALS programs; skip (fail in CI) without them."""
    program = shutil.which("dials.integrate")
    if program is None:
        _missing("DIALS (dials.integrate on the PATH)")
    return str(Path(program).parent)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Installed Chromium; skip (fail in CI) without it."""
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        _missing(f"a browser ({', '.join(CHROMIUM)})")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    options += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL without a GPU
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=options)
        yield started
        started.close()
