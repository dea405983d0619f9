"""The one root, and the settings that an embedded run needs before Prefect is imported.

Nothing here imports Prefect at import time: Prefect reads its settings once, when it is first imported, so a command
calls `prepare` before anything else. What the user has set, in the environment, in a `.env` file in the working folder
or in a Prefect profile (Prefect reads all three by itself), always wins over the defaults here.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import statistics
import sys
import tempfile
import time
import tomllib
from contextlib import suppress
from pathlib import Path

from cpdiff_core.config import UserError, check_path

ROOT_VARIABLE = "PREFECT_LOCAL_STORAGE_PATH"
DEFAULT_ROOT = Path("~/.cpdiff")
LOAD_FILE = Path("/proc/loadavg")
"""Its fourth field: threads that run or wait for a processor, of all."""

DEFAULTS = {
    # Without PREFECT_API_URL a server of its own is started; on a slow machine that takes more than the 20 seconds
    # that Prefect allows.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # No outside connection: the server's and the client's usage statistics.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # Errors reach the user as one line; these hide Prefect's tracebacks of the same errors, and those that its
    # temporary server prints when a short run ends.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # Also for what Prefect records of failed runs: nothing is ever unpickled.
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
}

SENDERS = ("EventsWorker", "APILogWorker")
"""Loggers of Prefect's senders, which its level does not reach: at the end of a run on a busy machine they warn that
something is still being sent."""


def prepare(root: Path | None = None, offline: bool = False) -> Path:
    """Set what is not set yet, and return the root: `root`, else PREFECT_LOCAL_STORAGE_PATH, else ~/.cpdiff.

    `offline` forbids the Hugging Face libraries any connection. What Prefect keeps in the home folder lies below the root
    where that cannot be written. Raises RuntimeError if Prefect has been imported.
    """
    if "prefect" in sys.modules:
        raise RuntimeError("prepare() must be called before prefect is imported, which reads the settings only once")
    for name, value in _from_dotenv().items():  # also what is not Prefect's, such as HF_HOME
        os.environ.setdefault(name, value)
    chosen = chosen_settings()
    for name, value in DEFAULTS.items():
        if name not in chosen:
            os.environ[name] = value
    level = (DEFAULTS | chosen)["PREFECT_LOGGING_LEVEL"].upper()
    if level in logging.getLevelNamesMapping():  # Prefect itself complains of another
        for sender in SENDERS:
            logging.getLogger(sender).setLevel(level)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() and _shared():
        os.environ["OMP_WAIT_POLICY"] = "passive"
    wanted = Path(root or chosen.get(ROOT_VARIABLE) or DEFAULT_ROOT)
    try:
        path = wanted.expanduser().absolute()
    except RuntimeError as error:
        raise UserError(
            f"root {str(wanted)!r}: there is no such home folder; set HOME, or give a folder with --root or {ROOT_VARIABLE}"
        ) from error
    os.environ[ROOT_VARIABLE] = str(path)
    if "PREFECT_HOME" not in chosen and not _can_be_written(Path("~/.prefect")):
        os.environ["PREFECT_HOME"] = str(path / ".prefect")
    return path


def _can_be_written(folder: Path) -> bool:
    """Whether `folder` is there, or can be made, and takes a file."""
    try:
        folder.expanduser().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.expanduser()):
            return True
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return False


def _shared() -> bool:
    """Whether others compute on half of the processors or more, as Linux tells; elsewhere False.

    torch's threads wait for one another awake, which is fastest on processors of their own; on shared ones it takes the
    time from the thread that is waited for, and a step takes twice as long, or ten times (docs/LOG.md). Results do not
    depend on it.
    """
    others = []
    for _ in range(5):
        try:
            running = LOAD_FILE.read_text(encoding="ascii").split()[3].partition("/")[0]
        except (OSError, IndexError):
            return False
        others.append(int(running) - 1)
        time.sleep(0.01)
    return statistics.median(others) >= max(1, (os.cpu_count() or 1) / 2)


def chosen_settings() -> dict[str, str]:
    """What the user has set where Prefect looks: the active profile, `.env`, and, above both, the environment."""
    return _from_profile() | _from_dotenv() | dict(os.environ)


def _from_dotenv() -> dict[str, str]:
    file = Path(".env")
    if not file.is_file():
        return {}
    from dotenv import dotenv_values  # comes with Prefect's settings, and reads the file as they do

    return {name.upper(): value for name, value in dotenv_values(file).items() if value is not None}


def _from_profile() -> dict[str, str]:
    try:
        home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
        profiles = tomllib.loads((home / "profiles.toml").read_text(encoding="utf-8"))
        active = os.environ.get("PREFECT_PROFILE", profiles.get("active"))
        return {name: str(value) for name, value in profiles["profiles"][active].items()}
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError):  # none, or one that Prefect itself will complain about
        return {}


def root() -> Path:
    """Where artifacts, locks and resume states lie: PREFECT_LOCAL_STORAGE_PATH as it is set at the moment."""
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH

    return Path(PREFECT_LOCAL_STORAGE_PATH.value()).expanduser().resolve()


def own_root() -> Path | None:
    """The root that this process was told, which is that of every rerun's root; None if it was told none."""
    value = chosen_settings().get(ROOT_VARIABLE)
    return Path(value).expanduser().resolve() if value else None


def nested() -> Path:
    """Where the root of the moment lies below `own_root`; `.` if it is that one, or lies elsewhere."""
    own, path = own_root(), root()
    return path.relative_to(own) if own is not None and path.is_relative_to(own) else Path()


def check_root(path: Path) -> None:
    """Make the root if need be and try it: a folder, a file and a lock. Raises UserError that names the remedy."""
    check_path("root", path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-") as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
        with suppress(FileNotFoundError):
            (path / ("x" * 100) / ("x" * 100)).lstat()  # as deep as what stages write
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path) from error
        raise UserError(
            f"root {str(path)!r}: cannot be used ({error.strerror}); choose a writable folder with --root or "
            f"{ROOT_VARIABLE}"
        ) from error


_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.EEXIST, errno.ENOTDIR)


def _full(path: Path) -> UserError:
    with suppress(OSError):
        disk = os.statvfs(path)
        if disk.f_files and not disk.f_favail and disk.f_bavail:
            return UserError(
                f"root {str(path)!r}: the disk takes no more files, though it has space (no inodes); remove some files or choose "
                f"another disk with --root or {ROOT_VARIABLE}, and run again: finished stages are kept"
            )
    return UserError(
        f"root {str(path)!r}: the disk is full; free some space or choose another disk with --root or "
        f"{ROOT_VARIABLE}, and run again: finished stages are kept"
    )


def disk_fault(error: Exception) -> UserError | None:
    """The user's version of an error in writing below the root, or None if `error` is something else.

    safetensors reports a full disk as an error of its own, so the text is looked at too.
    """
    path = root()
    if isinstance(error, OSError) and (place := Path(str(error.filename))).is_relative_to(path):
        if error.errno == errno.EACCES and place != path:
            return UserError(
                f"root {str(path)!r}: {str(place.relative_to(path))!r} cannot be used ({error.strerror}); choose another folder "
                f"with --root or {ROOT_VARIABLE}, or let all who share this one be of its group and work with umask 002"
            )
        if error.errno in _READ_ONLY:
            return UserError(
                f"root {str(path)!r}: cannot be written ({error.strerror}); choose a writable folder with --root or "
                f"{ROOT_VARIABLE}"
            )
        in_the_way = [part for part in (*reversed(place.parents), place) if part.exists() and not part.is_dir()]
        if error.errno in _NO_FOLDER and in_the_way:
            return UserError(
                f"root {str(path)!r}: cannot be written, for {str(in_the_way[0])!r} is a file where a folder is needed; move "
                f"it away, or choose another folder with --root or {ROOT_VARIABLE}"
            )
    if (isinstance(error, OSError) and error.errno in _FULL) or os.strerror(errno.ENOSPC) in str(error):
        return _full(path)
    return None


_TRIED = re.compile(r"(?:tried|unable) to allocate ([\d.]+ ?[A-Za-z]+)", re.IGNORECASE)


def memory_fault(what: str, error: Exception) -> UserError | None:
    """The user's version of memory that does not suffice, of the machine or of its GPU, or None if `error` is something else.
    torch has a class of its own for the GPU alone; of the machine's it tells by a RuntimeError. what: the stage, in words."""
    text = str(error)
    if not (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in text or "bad_alloc" in text))
    ):  # fmt: skip
        return None
    tried = f" ({found[1]} at once)" if (found := _TRIED.search(text)) else ""
    return UserError(
        f"{what}: does not fit the memory{tried}; lower the batch sizes, widths or lora.rank, use a smaller base model, or a "
        "machine with more; then run again: finished stages are kept"
    )
