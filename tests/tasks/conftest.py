"""Real processes for the tests of the cache rule."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from warm import warm_parent

sys.path.insert(0, str(Path(__file__).parent))  # child processes too import toy_stages by its name

Start = Callable[..., BaseProcess]


@pytest.fixture
def start(artifact_root: Path, prefect_server: str) -> Iterator[Start]:
    """`start(function, *arguments)` runs a function of toy_stages in a process of its own, in the test's root."""
    from toy_stages import in_child

    started = []

    def begin(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
        process = warm_parent(["toy_stages"]).Process(target=in_child, args=(artifact_root, prefect_server, function, arguments))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture
def scheduler(start: Start) -> str:
    """The address of a Dask scheduler without workers."""
    from toy_stages import run_scheduler

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start(run_scheduler, port)
    return f"tcp://127.0.0.1:{port}"
