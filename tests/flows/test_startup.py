"""How a command starts: what imports make is not looked through for garbage."""

from __future__ import annotations

import atexit
import gc
from pathlib import Path

import pytest

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
