"""How every figure looks and how it is written: PNG and SVG, the same bytes in every computation.

Colours are Okabe and Ito's, which colour-blind readers tell apart; every series has a marker or a line style of its
own too, so that the figures survive a black-and-white printer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))


@contextmanager
def drawing() -> Iterator[None]:
    """Figures made and saved in here look alike, need no screen, and are closed at the end.

    An SVG's ids are a hash of its contents and of `svg.hashsalt`; without a salt, matplotlib draws one at random.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look: Any = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "cpdiff", "figure.dpi": 100, "savefig.dpi": 130,
    }  # fmt: skip
    with matplotlib.rc_context(look):
        try:
            yield
        finally:
            plt.close("all")


def save_figure(figure: Any, out: Path, name: str) -> None:
    """Write `name`.png and `name`.svg into `out`, cropped to what is drawn."""
    figure.savefig(out / f"{name}.png", bbox_inches="tight")
    figure.savefig(out / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
