"""A server on a free port, and pages read from it."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import uvicorn
from simulated_run import write_run

from braggflux.pipelines.view.app import build_app
from braggflux.pipelines.view.server import HOST, _listening


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class Client(NamedTuple):
    port: int

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Ask for a path as it is written: no client tidies it up."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        given = {"Host": f"{HOST}:{self.port}", "Accept": "text/html"} | headers
        connection.putrequest(method, path, skip_host=True)
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        names = {k.lower(): v for k, v in response.getheaders()}
        answer = Answer(response.status, names, response.read())
        connection.close()
        return answer


@contextmanager
def serving(path: Path, dials: Path | None = None) -> Iterator[Client]:
    """Serve a run in a thread."""
    app = build_app(path, dials)
    with _listening(0) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serve() -> Callable[..., object]:
    return serving


@pytest.fixture(scope="session")
def client(tmp_path_factory) -> Iterator[Client]:
    """A run with intensities alone, under a name that would be a script."""
    folder = tmp_path_factory.mktemp("view")
    run = write_run(folder, name="<script>alert(1)<b>")
    with serving(run.path) as found:
        yield found
