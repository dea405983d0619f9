"""Locks between processes and threads that die with their holder.

Prefect's transactions ask a lock manager for the key of the stage that they compute. `FlockManager` gives them a
kernel lock (flock) on a file under `<root>/.locks`: when the holder is killed, even with SIGKILL, the kernel lets
go. (Prefect's own file lock stays behind in that case and blocks the key for ever.) `hold` takes several of the
same locks at once, for a pass that trains many stages' members together.

`mark_used` and `to_remove` keep apart those who use an artifact and those who remove one: every process keeps a shared
lock on one byte of `<root>/.locks/in-use` for each artifact that it has asked for, until it ends.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cpdiff_core.config import UserError
from tasks.environment import disk_fault, root

POLL_SECONDS = 0.1

_open_files: set[int] = set()  # of all locks held by this process, so that a forked child can let go of them
_open_files_guard = threading.Lock()
_in_this_thread = threading.local()  # .keys: the keys that `hold` has taken in this thread

# Record locks (fcntl) end when *any* descriptor of the file is closed by the process, so each root's file is opened
# once and never closed. A forked child has the descriptor and none of the locks.
_in_use: dict[Path, int] = {}
_marked: set[tuple[Path, str]] = set()


def _let_go_in_child() -> None:
    """A forked child shares the open files and would keep the locks of a killed parent alive."""
    for file in _open_files:
        os.close(file)
    _open_files.clear()
    _marked.clear()
    _open_files_guard.release()


os.register_at_fork(
    before=_open_files_guard.acquire,
    after_in_parent=_open_files_guard.release,
    after_in_child=_let_go_in_child,
)


def _try_lock(key: str) -> int | None:
    """An open, locked file, or None if another process or thread has the lock. The file is never deleted: a
    process that waits on a deleted file would hold a lock that nobody else sees."""
    path = root() / ".locks" / f"{key.replace('/', '.')}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_files_guard:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _open_files.add(file)
    except OSError as error:
        raise disk_fault(error) or error from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        _close(file)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise UserError(
            f"root {str(root())!r}: its file system has no locks ({error.strerror}); use another"
        ) from error
    return file


def _close(file: int) -> None:
    with _open_files_guard:
        _open_files.discard(file)
        os.close(file)


def _unlock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would not do if the file had been inherited
    _close(file)


def _poll(condition: Callable[[], bool], timeout: float | None) -> bool:
    deadline = None if timeout is None else time.monotonic() + timeout
    while not condition():
        if deadline is not None and time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def mark_used(key: str) -> None:
    """Keep the artifact of `key` from being removed while this process lives. Waits while it is being removed."""
    path = root()
    if (path, key) in _marked:
        return
    fcntl.lockf(_in_use_file(path), fcntl.LOCK_SH, 1, _place(key))
    _marked.add((path, key))


@contextmanager
def to_remove(key: str) -> Iterator[bool]:
    """Gives whether the artifact of `key` may be removed inside: no other process has asked for it and none computes
    it. Until the end those who ask for it wait."""
    path, place = root(), _place(key)
    file = _in_use_file(path)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError:
        yield False
        return
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(hold([key], timeout=0))
            except TimeoutError:
                yield False
            else:
                yield True
    finally:
        fcntl.lockf(file, fcntl.LOCK_SH if (path, key) in _marked else fcntl.LOCK_UN, 1, place)


def _in_use_file(path: Path) -> int:
    with _open_files_guard:
        if path not in _in_use:
            try:
                (path / ".locks").mkdir(parents=True, exist_ok=True)
                _in_use[path] = os.open(path / ".locks" / "in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise disk_fault(error) or error from error
        return _in_use[path]


def _place(key: str) -> int:
    """The byte of the file that stands for `key`; the file itself stays empty."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


class FlockManager:
    """The locks that Prefect's transactions use (prefect.locking.protocol.LockManager).

    The folder is `<root>/.locks` with the root of the moment, so a process may work in two roots. `holder` is
    Prefect's name for one transaction. `hold_timeout` is ignored: a holder keeps its lock until it is done or dead.
    `on_acquired` is called with the key under its lock, before Prefect looks for a record.
    """

    def __init__(self, on_acquired: Callable[[str], None] | None = None) -> None:
        self._on_acquired = on_acquired
        self._files: dict[tuple[str, str], int] = {}  # (key, holder) -> locked file

    def __reduce__(self) -> tuple[type[FlockManager], tuple[Callable[[str], None] | None]]:
        return FlockManager, (self._on_acquired,)  # workers elsewhere get one of their own, without our files

    def acquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        if key in getattr(_in_this_thread, "keys", ()):
            raise RuntimeError(f"{key} is held by this thread; leave `hold` before its stage is called")
        mark_used(key)

        def acquired() -> bool:
            if self.is_lock_holder(key, holder):
                return True
            file = _try_lock(key)
            if file is None:
                return False
            self._files[key, holder] = file
            return True

        if not _poll(acquired, acquire_timeout):
            return False
        if self._on_acquired is not None:
            self._on_acquired(key)
        return True

    def release_lock(self, key: str, holder: str) -> None:
        """Raises ValueError if `holder` does not hold the lock of `key`."""
        if not self.is_lock_holder(key, holder):
            raise ValueError(f"{holder} does not hold the lock of {key}")
        _unlock(self._files.pop((key, holder)))

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return (key, holder) in self._files

    def is_locked(self, key: str) -> bool:
        file = _try_lock(key)
        if file is not None:
            _unlock(file)
        return file is None

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        return _poll(lambda: not self.is_locked(key), timeout)

    async def aacquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        return await asyncio.to_thread(self.acquire_lock, key, holder, acquire_timeout, hold_timeout)

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        return await asyncio.to_thread(self.wait_for_lock, key, timeout)


@contextmanager
def hold(keys: Iterable[str], timeout: float | None = None) -> Iterator[None]:
    """Hold the locks of all `keys` at once; they are taken in sorted order, so two passes cannot block each other.

    Raises TimeoutError if that takes longer than `timeout` seconds; None waits. A stage whose key is held must not
    be called inside: it would wait for itself (RuntimeError if it is called in the same thread).
    """
    taken: dict[str, int] = {}

    def take(key: str) -> bool:
        file = _try_lock(key)
        if file is not None:
            taken[key] = file
        return file is not None

    before: frozenset[str] = getattr(_in_this_thread, "keys", frozenset())
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        for key in sorted(set(keys)):
            if not _poll(lambda key=key: take(key), None if deadline is None else deadline - time.monotonic()):  # type: ignore[misc]
                raise TimeoutError(f"{key} is being computed by another process or thread")
        _in_this_thread.keys = before | frozenset(taken)
        yield
    finally:
        _in_this_thread.keys = before
        for file in taken.values():
            _unlock(file)
