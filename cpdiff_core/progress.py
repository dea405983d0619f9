"""Live progress of a long loop, on stderr and to an observer; and the wish that the loop should stop.

`observed` gives every loop inside it an observer, which is told about once a second how far the loop is and answers
whether it should go on. A loop that should not saves its state (`ResumeState.due` is true then) and ends with
`Cancelled` at its next step.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from tqdm import tqdm

from cpdiff_core.config import RuntimeConfig

_LINE_SECONDS = 10.0
"""Where stderr is no terminal, a line this often."""

_OBSERVED_SECONDS = 1.0


class Cancelled(BaseException):
    """Someone has asked the loop to stop. No Exception, so that nothing takes it for a fault and tries again."""


class Observer(Protocol):
    def __call__(self, stage: str, done: int, total: int, loss: float | None) -> bool:
        """Called about once a second. False asks the loop to stop."""


_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)
_to_stop: ContextVar[bool] = ContextVar("to_stop", default=False)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Loops inside tell `observer` where they are, and stop when it says so."""
    first, second = _observer.set(observer), _to_stop.set(False)
    try:
        yield
    finally:
        _observer.reset(first)
        _to_stop.reset(second)


stop_all = threading.Event()
"""Set while the loops of all threads are to stop: those that a thread started when it is itself interrupted."""


def is_cancelled() -> bool:
    """Whether the loop around has been asked to stop, and has not yet."""
    return _to_stop.get() or stop_all.is_set()


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere. `step` is cheap."""

    def __init__(self, stage: str, total: int, done: int, bar: tqdm, lines: bool) -> None:  # type: ignore[type-arg]
        self._stage, self._total, self._done = stage, total, done
        self._bar = bar
        self._lines = lines
        self._last = self._observed = time.monotonic()
        self._tell = _observer.get()

    def step(self, count: int = 1, loss: float | None = None) -> None:
        """`count` more are done. Raises Cancelled at the step after the one at which the observer said stop."""
        if is_cancelled():
            raise Cancelled(f"{self._stage}: stopped at {self._done} of {self._total}")
        self._done += count
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        self._bar.update(count)
        if self._lines and time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            print(str(self._bar), file=sys.stderr, flush=True)
        if self._tell is not None and time.monotonic() - self._observed >= _OBSERVED_SECONDS:
            if not self._tell(self._stage, self._done, self._total, loss):
                _to_stop.set(True)
            self._observed = time.monotonic()


@contextmanager
def track(stage: str, total: int, runtime: RuntimeConfig, done: int = 0, unit: str = "step") -> Iterator[Progress]:
    """Show `stage` advancing to `total`."""
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total, initial=done, desc=f"  {stage}", unit=unit, disable=not runtime.progress, mininterval=0.5, delay=2.0,
        leave=False, dynamic_ncols=terminal, file=sys.stderr if terminal else _Nowhere(),
    ) as bar:  # fmt: skip
        yield Progress(stage, total, done, bar, lines=runtime.progress and not terminal)


class _Nowhere:
    """tqdm redraws its bar with carriage returns, which would fill a log file with one endless line."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
