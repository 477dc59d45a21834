"""Serving the pages of a run on 127.0.0.1."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import webbrowser
from pathlib import Path

from braggflux.integrator.errors import UserError

HOST = "127.0.0.1"
HIGHEST_PORT = 65535

logger = logging.getLogger(__name__)


def serve(path: Path, *, port: int, dials: Path | None = None, open_browser: bool = True) -> None:
    """Serve the pages of a run until Ctrl-C.

    Parameters
    ----------
    path : Path
        Run directory.
    port : int
        On 127.0.0.1; 0 for any that is free.
    dials : Path, optional
        DIALS' integrated reflections.
    open_browser : bool
        Show the first page in the user's browser.

    Raises
    ------
    UserError
        The run is not finished or lacks files, a package is missing, or the port is taken.
    """
    try:
        import uvicorn

        from braggflux.pipelines.view.app import build_app
    except ModuleNotFoundError as error:
        raise UserError(
            f"braggflux view needs the package {error.name}, which is not installed: "
            "pip install 'braggflux[view]'"
        ) from error
    app = build_app(path, dials)
    with _listening(port) as listener:
        url = f"http://{HOST}:{listener.getsockname()[1]}/"
        sys.stdout.write(f"{path}: {url} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        if open_browser:
            webbrowser.open(url)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            log_level="warning",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        # what the merge says while the model loads is no news to a reader of pages
        logging.getLogger("braggflux.merge").setLevel(logging.WARNING)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    logger.info("view ended")


def _listening(port: int) -> socket.socket:
    if not 0 <= port <= HIGHEST_PORT:
        raise UserError(f"--port must be 0 to {HIGHEST_PORT}, got {port}")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # a port that the last viewer has just left is free
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            f"port {port} of {HOST} cannot be used ({error.strerror}); "
            "end what uses it, or choose another: --port N"
        ) from error
    return listener
