"""A proxy in front of a storage server that can fail as storage does: with 503, or without an answer."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["503", "closed"]


class FlakyStorage(ThreadingHTTPServer):
    """Hands requests on to `target`; from the `fails_after`-th on it fails, until `heal`. `failed` counts those."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._guard = threading.Lock()
        self._left: int | None = None
        self.fault: Fault = "503"
        self.failed = 0

    def fail(self, fault: Fault, after: int) -> None:
        self.fault, self._left, self.failed = fault, after, 0

    def heal(self) -> None:
        self._left = None

    def fails_now(self) -> bool:
        with self._guard:
            if self._left is None:
                return False
            self._left -= 1
            self.failed += self._left < 0
            return self._left < 0


class _Handler(BaseHTTPRequestHandler):
    server: FlakyStorage
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.fails_now():
            self.close_connection = True
            if self.server.fault == "503":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
            return
        there = http.client.HTTPConnection(self.server.target, timeout=30)
        there.request(self.command, self.path, body, dict(self.headers))
        answer = there.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(content)
        there.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def flaky(target: str) -> Iterator[FlakyStorage]:
    with FlakyStorage(target) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
