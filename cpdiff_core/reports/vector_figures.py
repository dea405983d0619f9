"""Every vector as a figure, PNG and SVG: what the page's plots show, for print and for readers without JavaScript."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cpdiff_core.reports.drawing import COLOURS, drawing, save_figure
from cpdiff_core.reports.explorer import Explorer

_MARKERS = {
    "star": "*", "circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v", "hexagon": "h", "plus": "+",
    "cross": "x",
}  # fmt: skip
_COLOURS = (COLOURS[0], "0.45", "0.1", COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[4], COLOURS[5], "#7a5c2e")
"""By the numbers of page.css."""


def draw_vectors(out: Path, explorer: Explorer) -> list[str]:
    """Write `vectors` and, if there is one, `map` into `out`; the names of those written, without ending."""
    written = ["vectors", *(["map"] if explorer.has_map else [])]
    with drawing():
        for name in written:
            save_figure(_draw(explorer, name == "map"), out, name)
    return written


def _draw(explorer: Explorer, of_map: bool) -> Any:
    import matplotlib.pyplot as plt

    tasks = list(explorer.ylabels)
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.5 * columns, 3.0 * rows), squeeze=False)
    named: dict[str, Any] = {}
    for axis in grid.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(grid.flat, tasks, strict=False):
        axis.set_title(task, fontsize=10, loc="left")
        for number, series in enumerate(explorer.series):
            places = _places(explorer, task, number, of_map)
            if places and not series["off"]:
                colour, marker = _COLOURS[series["colour"]], _MARKERS[series["shape"]]
                face = {} if marker in "+x" else {"facecolors": "none" if series["hollow"] else colour, "edgecolors": colour}
                named[series["name"]] = axis.scatter(
                    *zip(*places, strict=True), s=34 * series["size"], marker=marker, linewidths=0.9,
                    zorder=3 if series["candidate"] else 2, **(face or {"color": colour}),
                )  # fmt: skip
        if of_map:
            axis.set_xticks([])
            axis.set_yticks([])
        else:
            axis.set_xscale("symlog", linthresh=1.0)
            axis.axvline(1.0, color="0.6", linewidth=0.8, linestyle=":")
            axis.set_ylabel(explorer.ylabels[task][explorer.first_split], fontsize=7)
            axis.set_xlabel("novelty (1: typical of training)", fontsize=8)
    figure.set_layout_engine("tight")
    figure.legend(
        named.values(), named.keys(), loc="upper center", ncol=min(4, len(named)), bbox_to_anchor=(0.5, 0.0), fontsize=8,
        frameon=False,
    )  # fmt: skip
    return figure


def _places(explorer: Explorer, task: str, series: int, of_map: bool) -> list[tuple[float, float]]:
    mine = [vector for vector in explorer.vectors if vector["task"] == task and vector["series"] == series]
    if of_map:
        rest = [place for number, place in explorer.map.get(task, []) if number == series]
        return [*rest, *(vector["place"] for vector in mine if vector["place"] is not None)]
    y = explorer.first_split
    return [(v["relative"], v[y]) for v in mine if v["relative"] is not None and v[y] is not None]
