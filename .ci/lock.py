"""Print requirements with hashes of what an environment holds beside the system's packages.

    .venv/bin/python .ci/lock.py > .ci/requirements.lock

torch is left out: which build is wanted depends on the machine (`make env TORCH=...`).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

LEFT_OUT = ("torch", "pip", "braggflux")


def pip(*arguments: str) -> str:
    """Output of a command of this environment's pip."""
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Ask pip which file it would take for each version, and with which hash."""
    installed = json.loads(pip("list", "--local", "--format", "json"))
    wanted = [
        f"{p['name']}=={p['version']}" for p in installed if p["name"].lower() not in LEFT_OUT
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ("--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report")
        pip("install", *options, str(report), *wanted)
        entries = json.loads(report.read_text())["install"]
    version = ".".join(platform.python_version_tuple()[:2])
    print(f"# Python {version}, {sys.platform} {platform.machine()}; made by `make lock`")
    for entry in sorted(entries, key=lambda e: e["metadata"]["name"].lower()):
        data = entry["metadata"]
        digest = entry["download_info"]["archive_info"]["hash"].replace("=", ":")
        print(f"{data['name']}=={data['version']} --hash={digest}")


if __name__ == "__main__":
    main()
