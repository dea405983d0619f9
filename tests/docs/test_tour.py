"""docs/tour.ipynb: every code cell runs, in order, without a network, and the kept outputs belong to these cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"


def test_every_cell_of_the_tour_runs_and_prints_what_the_notebook_shows(tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    marker = "-- end of cell --"
    source = f"\nprint({marker!r})\n".join("".join(cell["source"]) for cell in cells)
    (tmp_path / "tour.py").write_text(source, encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "tour.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout.split(f"{marker}\n")
    assert len(printed) == len(cells)
    for cell, text in zip(cells, printed, strict=True):
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        # Figures differ between machines by rounding; what they are figures of must not.
        assert words(shown) == words(text)


def words(text: str) -> list[str]:
    return [word for word in text.split() if not any(c.isdigit() for c in word) and word not in ("negative", "positive")]
