"""How a command starts: root and settings first, then a server that comes up beside the heavy imports.

Nothing here imports torch or Prefect before it must: HF_HUB_OFFLINE and Prefect's settings are read at import.
"""

from __future__ import annotations

import atexit
import errno
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cpdiff_core.config import RuntimeConfig, UserError, first_line
from tasks.environment import check_root, prepare
from tasks.server import TemporaryServer, start_server

SERVER_SECONDS = 120.0
INTERRUPTED = "interrupted; run the same command again to go on"


@dataclass(frozen=True)
class Session:
    """What a command that runs flows has started. server: None if the user has one (PREFECT_API_URL)."""

    root: Path
    server: TemporaryServer | None

    def ready(self) -> None:
        """Return when a Prefect server answers. To be called after the heavy imports, before the first flow."""
        from tasks.stage import clean

        gc.freeze()
        gc.enable()

        clean(self.root)
        if self.server is not None:
            self.server.wait(timeout=SERVER_SECONDS)
        else:
            check_users_server()


def begin(root: Path | None, offline: bool) -> Session:
    """Settings, root and server, in this order. Raises UserError for a root that cannot be used.

    What imports make stays to the end, and looking through it for garbage takes seconds: until `ready` nothing is
    collected, after it only what is newer, and at the end of the program, which frees all memory anyway, nothing.
    """
    gc.disable()
    atexit.register(gc.freeze)
    path = prepare(root, offline=offline)
    check_root(path)
    return Session(path, start_server(path))


@contextmanager
def resumable() -> Iterator[None]:
    """Of commands whose finished stages are kept: Ctrl-C at any moment says so. Typer itself would say Aborted."""
    try:
        yield
    except KeyboardInterrupt:
        interrupted(signal.SIGINT)


def interrupted(number: int, frame: object = None) -> NoReturn:
    """End as a program does that a signal has ended, with a line that says how to go on."""
    print(INTERRUPTED, file=sys.stderr)
    sys.exit(128 + number)


_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def told_in_a_line(command: Callable[[], object]) -> None:
    """Run a program's entry point: a user's fault, and a place that cannot be written, are one line and exit code 2."""
    try:
        command()
    except UserError as error:
        fault = str(error)
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        what = f"{str(error.filename)!r}: cannot be used" if error.filename else "what is printed: cannot be written"
        fault = f"{what} ({error.strerror}); choose another place, or give rights or space"
    else:
        return
    print(f"error: {' '.join(fault.split())}", file=sys.stderr)
    sys.exit(2)


def check_users_server() -> None:
    """Raises UserError unless a Prefect server answers at PREFECT_API_URL and lets us in."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        if (fault := client.api_healthcheck()) is None:
            try:
                client.hello()  # its health is told to everybody
            except Exception as error:
                fault = error
        if fault is not None:
            reason = first_line(fault).partition(" for url")[0]
            raise UserError(
                f"PREFECT_API_URL {str(client.api_url)!r}: no Prefect server answers ({reason}); start the server, "
                "correct the address, which ends in /api, or PREFECT_API_AUTH_STRING, or unset it"
            )


def runtime_of(
    device: str, data_dir: Path | None, threads: int | None, *, adapters: int | None = None, progress: bool = True
) -> RuntimeConfig:
    """The options that say where and how fast. Raises UserError for a device that is not there."""
    return RuntimeConfig(
        device=checked_device(device), data_dir=str(data_dir) if data_dir else None, num_threads=threads,
        adapters_per_batch=adapters, progress=progress,
    )  # fmt: skip


def checked_device(device: str) -> str:
    import torch

    try:
        kind = device if device == "auto" else torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"--device {device!r}: is no device; use auto, cpu, cuda or cuda:<index>") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {device!r}: torch sees no CUDA device here; use cpu, or install a CUDA build of torch"
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if kind not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device!r}: is not supported; use auto, cpu, cuda or cuda:<index>")
    return device


def portable(generator: str) -> bool:
    """Whether a generator is named that is ready: builtin/NAME or a folder, else it is an experiment's. Raises UserError
    for a folder that is none. Judged before the heavy imports, for a ready one needs no server."""
    if generator.startswith("builtin/") or os.path.isfile(Path(generator) / "generator.json"):
        return True
    if os.path.isdir(generator):
        raise UserError(f"generator {generator!r}: has no generator.json; make one with `cpdiff export-generator`")
    return False


def embedded(name: str) -> bool:
    """Whether an experiment needs nothing from a hub, judged before the heavy imports, which read HF_HUB_OFFLINE."""
    if not name.endswith(".json"):
        return name.startswith("quickstart")
    try:
        value = json.loads(Path(name).read_text(encoding="utf-8-sig"))
        kinds = {task["data"]["kind"] for task in value["tasks"]}
        return value.get("base_model", {}).get("name", "minilm-l6") == "minilm-l6" and kinds <= {"excerpt", "files"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # whatever is wrong is reported when the file is read in earnest
