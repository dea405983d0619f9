"""A temporary Prefect server that starts while the rest of the program is still being imported.

Without PREFECT_API_URL Prefect would start one itself, at the first flow, and wait for it. Starting it first thing and
waiting last hides most of that time behind the import of torch, and the server's own code is imported in its own
process only. The server ends with the process that started it, even if that one is killed.
"""

from __future__ import annotations

import gc
import http.client
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from cpdiff_core.config import UserError
from tasks.environment import chosen_settings

TIMEOUT_SETTING = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
LOG_NAME = ".server.log"


class TemporaryServer:
    """Started when it is made; `log` takes what it prints."""

    def __init__(self, log: Path) -> None:
        self.log = log
        # Found even where the package is not installed.
        python_path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        # The socket listens before the server is there, so that early requests wait instead of failing.
        with socket.create_server(("127.0.0.1", 0)) as listener, log.open("ab") as output:
            self.port = listener.getsockname()[1]
            self._process = subprocess.Popen(
                # -P: a file of the working folder must not stand in for a module of ours or of Python's.
                [sys.executable, "-P", "-m", "tasks.server", str(listener.fileno())],
                env=os.environ | {"PREFECT_UI_ENABLED": "0", "PYTHONPATH": os.pathsep.join(filter(None, python_path))},
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us; the server is still needed to record how it ended
            )

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def wait(self, timeout: float) -> None:
        """Return when the server answers. Raises UserError if it does not within `timeout` seconds."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", "/api/health")
            reason = f"status {connection.getresponse().status}"
            if reason == "status 200":
                return
        except OSError as error:
            reason = str(error)
        finally:
            connection.close()
        raise UserError(
            f"Prefect's temporary server: does not answer ({reason}); see {str(self.log)!r}, or start a server with "
            "`prefect server start` and set PREFECT_API_URL"
        )

    def stop(self) -> None:
        """End the server and wait for it. Not needed at the end of a program: it then ends by itself, in about two
        seconds that nobody has to wait for."""
        self._process.communicate(timeout=30)


def start_server(root: Path) -> TemporaryServer | None:
    """Start a temporary server and point Prefect to it; None if the user has one (PREFECT_API_URL).

    To be called after `prepare` and before prefect is imported; call `wait` on it before the first flow.
    """
    if chosen_settings().get("PREFECT_API_URL"):
        return None
    server = TemporaryServer(root / LOG_NAME)
    os.environ["PREFECT_API_URL"] = server.api_url
    return server


def serve(listener: int) -> None:
    """The server process: serve Prefect's API on the open socket `listener` until stdin ends."""
    gc.disable()  # what imports make stays, as in `flows.startup`
    import uvicorn
    from prefect.server.api.server import create_app

    # As Prefect starts its own temporary server: no pages, and only the services that record what has happened.
    app = create_app(ephemeral=True, final=True)
    gc.freeze()
    gc.enable()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))

    def stop_with_parent() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=stop_with_parent, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=listener)])


if __name__ == "__main__":
    serve(int(sys.argv[1]))
