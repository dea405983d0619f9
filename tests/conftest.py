"""Fixtures of all tests: one Prefect server for the session, one artifact root per test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser

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


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium. Its console is empty at the end, and it has asked for nothing but files."""
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    complaints, requests = found.complaints(), found.requests()
    found.driver.quit()
    assert complaints == []
    assert [url for url in requests if not url.startswith("file:///")] == []
