"""The paper's own numbers: every cell of Tables 1 to 4 as printed (`paper_tables.json`).

The paper prints no metric names; MRPC and STS-B may mix F1 or Pearson with the combined score,
so the numbers stand beside ours and are never subtracted from them.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cpdiff_core.config import Config, UserError

_TASKS = {
    "SST2": "sst2", "RTE": "rte", "MRPC": "mrpc", "COLA": "cola", "QNLI": "qnli", "STSB": "stsb", "STSBB": "stsb",
    "Average": "average",
}  # fmt: skip
_ARMS = {"generated": "generated", "original": "original (oracle)", "model_soup": "model soup", "full": "full"}
_KEYS = {
    "table3": ("table3_num_checkpoints", "N"), "table4a": ("table4a_normalization", "Norm."),
    "table4b": ("table4b_condition", "Condition"), "table4c": ("table4c_blocks", "LoRA layers"),
}  # fmt: skip


class PaperRow(Config):
    """A row of a table as the paper prints it, for example table1, `BERT r=1`."""

    table: Literal["table1", "table3", "table4a", "table4b", "table4c"] = Field(description="Which table.")
    row: str = Field(description="Which row of it, as `BERT r=1`.")


@lru_cache(maxsize=1)
def paper_tables() -> dict[str, Any]:
    """All tables, as transcribed."""
    value: dict[str, Any] = json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8"))
    return value


def paper_scores(row: PaperRow) -> dict[str, dict[str, float]]:
    """task (or `average`) -> arm -> the printed number. Tables 3 and 4 print the generated arm alone.

    Raises UserError for a row that the table does not have.
    """
    found: dict[str, dict[str, float]] = {}
    if row.table == "table1":
        for cell in paper_tables()["table1"]:
            rank = "full" if cell["rank"] == "full" else f"r={cell['rank']}"
            if row.row == f"{cell['model']} {rank}":
                found[_TASKS[cell["task"]]] = {arm: cell[key] for key, arm in _ARMS.items() if key in cell}
    else:
        name, label = _KEYS[row.table]
        for cells in paper_tables()[name]:
            if row.row == cells[label]:
                found = {_TASKS[task]: {"generated": value} for task, value in cells.items() if task in _TASKS}
    if not found:
        raise UserError(f"paper row {row.row!r}: {row.table} has no such row; see paper_tables.json")
    return found
