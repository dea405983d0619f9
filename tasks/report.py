"""One line on stderr for every stage that ends, and the count of them."""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Mapping

from tqdm import tqdm

_counts: Counter[str] = Counter()
_guard = threading.Lock()


def tally() -> dict[str, int]:
    """How many stages have ended in this process: `computed`, `cached` and `failed`."""
    with _guard:
        return {name: _counts[name] for name in ("computed", "cached", "failed")}


def stage_ended(count: str, word: str, label: str, remark: str = "") -> None:
    """Count a stage under `count` and print its line, above the progress bars of stages that still run."""
    with _guard:
        _counts[count] += 1
        tqdm.write(f"{word:<10} {label:<48} {remark}".rstrip(), file=sys.stderr)
        sys.stderr.flush()


def warn(text: str) -> None:
    """Print a line about something that is odd and no fault."""
    with _guard:
        tqdm.write(f"WARNING: {text}", file=sys.stderr)
        sys.stderr.flush()


@functools.cache
def warn_once(text: str) -> None:
    """`warn`, the first time in this process."""
    warn(text)


def add(counts: Mapping[str, int]) -> None:
    """Count the stages that ended on a worker elsewhere."""
    with _guard:
        _counts.update(counts)


def call_ended(name: str, number: int, of: int) -> None:
    """Print a line for a call that ended on a worker elsewhere."""
    with _guard:
        tqdm.write(f"{name} {number} of {of}", file=sys.stderr)
        sys.stderr.flush()
