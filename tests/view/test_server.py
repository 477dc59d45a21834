"""Who is answered, with what; bad ends of the command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from simulated_run import write_run

from braggflux.pipelines import cli
from braggflux.pipelines.view.app import POLICY
from braggflux.pipelines.view.server import HOST


@pytest.mark.parametrize("path", ["/", "/reflections", "/reflection/7", "/frames?image=20"])
def test_pages_are_guarded(client, path):
    answer = client.get(path)
    assert answer.status == 200
    assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in answer.headers


def test_names_are_text(client):
    page = client.get("/").text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;b&gt;" in page
    query = "/reflections?hkl=%22%3E%3Cscript%3Ealert(2)%3C/script%3E&order=d"
    answer = client.get(query)
    assert answer.status == 400
    assert "<script>alert" not in answer.text
    assert "three numbers" in answer.text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:8750", ""])
def test_other_hosts_are_refused(client, host):
    """A page of another site may resolve its own name to 127.0.0.1."""
    answer = client.get("/", Host=host)
    assert answer.status == 400
    assert "observations" not in answer.text


def test_this_machine_is_answered(client):
    assert client.get("/", Host=f"localhost:{client.port}").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
        "/static/..%5capp.py",
        "/static/",
        "/reflection/../../etc/passwd",
        "/reflection/-1",
        "/reflection/500",
        "/reflection/99999999999999999999999",
        "/frames/0/400/0/mask",
        "/frames/1/0/0/boxes",
        "/frames/0/0/9/counts",
        "/map/0",
        "/report",
    ],
)
def test_nothing_else_is_read(client, path):
    answer = client.get(path)
    assert answer.status in {400, 404}
    assert "import" not in answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(client, method):
    assert client.get("/reflections", method).status == 405


def test_a_mistake_is_one_line_for_scripts_too(client):
    answer = client.get("/reflection/500/data", Accept="application/json")
    assert answer.status == 400
    assert json.loads(answer.text) == {"error": "no row 500: intensities.h5 has 500, from 0"}


def test_data_of_a_reflection_without_a_model(client):
    found = json.loads(client.get("/reflection/7/data").text)
    assert "no shoeboxes.h5" in found["reason"]
    assert len(found["likelihood"]["J"]) == len(found["likelihood"]["density"]) == 161
    assert found["likelihood"]["expected"] is None
    assert "no integrated.refl of DIALS" in found["dials"]["reason"]
    assert 7 in [mate["row"] for mate in found["mates"]]
    # what is not integrated has no J
    assert json.loads(client.get("/reflection/3/data").text)["likelihood"] is None


def test_boxes_of_a_frame(client):
    found = json.loads(client.get("/frames/0/50/0/boxes").text)
    assert len(found["row"]) == len(found["hkl"]) > 0
    assert client.get("/frames/0/50/0/mask").headers["x-shape"] == "619,487"


def fails(capsys, *command: object) -> str:
    assert cli.main([*map(str, command)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_ends(tmp_path, capsys):
    assert "is not a run directory" in fails(capsys, "view", tmp_path)
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.yaml").write_text("seed: 0\n")
    (merged / "provenance.json").write_text('{"ended": "2026-11-30T01:00:00"}')
    assert "holds a result of merge" in fails(capsys, "view", merged)
    run = write_run(tmp_path)
    assert "--port" in fails(capsys, "view", run.path, "--port", "many")
    assert "0 to 65535" in fails(capsys, "view", run.path, "--port", "70000")
    missing = tmp_path / "absent.refl"
    assert "does not exist" in fails(capsys, "view", run.path, "--dials", missing)
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = fails(capsys, "view", run.path, "--port", port, "--no-browser")
    assert f"port {port} of 127.0.0.1 cannot be used" in text
    record = json.loads(run.provenance_file.read_text())
    del record["sessions"][-1]["ended"]
    run.provenance_file.write_text(json.dumps(record))
    assert "is not finished" in fails(capsys, "view", run.path)
    run.intensities.unlink()
    assert "is not finished" in fails(capsys, "view", run.path)


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    text = fails(capsys, "view", write_run(tmp_path).path)
    assert "needs the package uvicorn" in text
    assert "pip install 'braggflux[view]'" in text


@pytest.mark.slow
def test_interrupted_it_ends_quietly(tmp_path):
    run = write_run(tmp_path)
    command = [sys.executable, "-m", "braggflux.pipelines.cli", "view", str(run.path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert "http://127.0.0.1:" in process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 0
    assert error.strip().endswith("view ended")
    assert "Traceback" not in error
