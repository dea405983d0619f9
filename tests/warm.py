"""Child processes forked from one that has imported what they need: a second each instead of five to ten."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from typing import Any

import pytest


def warm_parent(modules: Sequence[str]) -> Any:
    """The context of processes forked from a server that has imported `modules`, to be asked for before every start.

    A process has one such server. One that runs with other modules is stopped first, since its children would find
    imported what they must not have; children that it has started go on.
    """
    server = forkserver._forkserver
    context = multiprocessing.get_context("forkserver")
    if server._preload_modules != list(modules):
        server._stop()
        context.set_forkserver_preload(list(modules))
    with pytest.MonkeyPatch.context() as patch:
        # What the server is to import it looks for there alone, and leaves out without a word what it does not find.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context
