"""Fixtures of all tests: one Prefect server for the session, one artifact root per test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.environment import DEFAULTS

for name, value in (DEFAULTS | {"HF_HUB_OFFLINE": "1"}).items():  # before anything imports prefect
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The URL of a Prefect server with an empty database, to which Prefect is pointed. It takes ten seconds to start;
    tests of the core never ask for it."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield str(PREFECT_API_URL.value())


@pytest.fixture
def artifact_root(tmp_path: Path, prefect_server: str) -> Iterator[Path]:
    """An empty artifact root that every stage called in the test uses."""
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    path = tmp_path / "root"
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: path}):
        yield path
