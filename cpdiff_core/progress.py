"""Live progress of a long loop: stage, step, loss and time left, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from cpdiff_core.config import RuntimeConfig


class Progress:
    """A bar that loops advance. `step` is cheap; the loss is shown as it is given, a float."""

    def __init__(self, bar: tqdm) -> None:  # type: ignore[type-arg]
        self._bar = bar

    def step(self, count: int = 1, loss: float | None = None) -> None:
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        self._bar.update(count)


@contextmanager
def track(stage: str, total: int, runtime: RuntimeConfig, done: int = 0, unit: str = "step") -> Iterator[Progress]:
    """Show `stage` advancing to `total`. On a terminal a moving bar, elsewhere a line every ten seconds."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total, initial=done, desc=f"  {stage}", unit=unit, disable=not runtime.progress,
        mininterval=interval, maxinterval=interval, delay=2.0, leave=False, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        yield Progress(bar)
