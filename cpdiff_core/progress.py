"""Live progress of a long loop: stage, step, loss and time left, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from cpdiff_core.config import RuntimeConfig

_LINE_SECONDS = 10.0
"""Where stderr is no terminal, a line this often."""


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere. `step` is cheap."""

    def __init__(self, bar: tqdm, lines: bool) -> None:  # type: ignore[type-arg]
        self._bar = bar
        self._lines = lines
        self._last = time.monotonic()

    def step(self, count: int = 1, loss: float | None = None) -> None:
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        self._bar.update(count)
        if self._lines and time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            print(str(self._bar), file=sys.stderr, flush=True)


@contextmanager
def track(stage: str, total: int, runtime: RuntimeConfig, done: int = 0, unit: str = "step") -> Iterator[Progress]:
    """Show `stage` advancing to `total`."""
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total, initial=done, desc=f"  {stage}", unit=unit, disable=not runtime.progress, mininterval=0.5, delay=2.0,
        leave=False, dynamic_ncols=terminal, file=sys.stderr if terminal else _Nowhere(),
    ) as bar:  # fmt: skip
        yield Progress(bar, lines=runtime.progress and not terminal)


class _Nowhere:
    """tqdm redraws its bar with carriage returns, which would fill a log file with one endless line."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
