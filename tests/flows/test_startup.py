"""How a command starts: what imports make is not looked through for garbage, a server that is none is told in a line."""

from __future__ import annotations

import atexit
import gc
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from httpx import ReadTimeout
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from cpdiff_core.config import UserError
from deployments import deploy
from flows import startup


def test_what_imports_make_is_never_looked_through(
    tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "prepare", lambda root, offline: tmp_path)  # the real one comes before prefect
    monkeypatch.setattr(startup, "start_server", lambda root: None)
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    try:
        session = startup.begin(None, offline=True)
        assert not gc.isenabled()
        assert registered == [gc.freeze]
        session.ready()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 100_000, "prefect alone makes more"
    finally:
        gc.enable()
        gc.unfreeze()


class _Locked(BaseHTTPRequestHandler):
    """Answers as a Prefect server with a password does whom it does not know."""

    def do_GET(self) -> None:
        self.send_response({"/api/health": 200, "/api/hello": 401}.get(self.path, 404))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def locked() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Locked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("path", "reason"), [("/api", "401 Unauthorized"), ("", "404 Not Found"), (None, "Connection refused")])
@pytest.mark.parametrize("start", [startup.check_users_server, deploy.main], ids=["cpdiff", "deploy"])
def test_server_that_lets_nobody_in_a_wrong_path_and_a_dead_port_are_a_line(locked, path, reason, start, monkeypatch) -> None:
    url = "http://127.0.0.1:9/api" if path is None else locked + path
    monkeypatch.setenv("PREFECT_API_URL", url)
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(UserError, match=rf"{url}.*{reason}.*/api") as caught:
        start()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_server_that_sends_nothing_is_a_line_although_its_fault_has_no_words(monkeypatch) -> None:
    monkeypatch.setattr(SyncPrefectClient, "api_healthcheck", lambda self: ReadTimeout(""))
    url = "http://127.0.0.1:9/api"
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(UserError, match=r"no Prefect server answers \(ReadTimeout\)"):
        startup.check_users_server()
