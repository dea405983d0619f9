"""Tables in a user's files, read as they are written.

In CSV and JSON nothing is guessed: the text `007` stays `007`, `NA` and `None` are words, a date is the text that stands
there. Every row has as many fields as the header, or it is named with its line. Parquet brings its own types.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from cpdiff_core.config import first_line

PARQUET = ".parquet"
TEXT_READING = 2
"""Raised when CSV or JSON files are read differently than before; part of what such data is."""


class UnreadableTable(ValueError):
    """Why a file is no table, with the remedy, for the end of an error's line."""


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a CSV, JSON lines or Parquet file, by its ending. Cells of CSV are text, '' where one is empty.

    Raises UnreadableTable for another ending and for what cannot be read.
    """
    reader = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json, PARQUET: _read_parquet}.get(path.suffix.lower())
    if reader is None:
        raise UnreadableTable("is not CSV (.csv), JSON lines (.jsonl) or Parquet (.parquet)")
    return reader(path)


def _read_csv(path: Path) -> pd.DataFrame:
    options: dict[str, Any] = {"header": None, "dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    try:
        # The header is a row like the others: pandas would take rows that are longer than it for rows with a name.
        table = pd.read_csv(path, **options).fillna("")
    except UnicodeDecodeError as error:
        raise UnreadableTable("cannot be read (it is not UTF-8 text); save it as UTF-8") from error
    except pd.errors.EmptyDataError as error:
        raise UnreadableTable("has no rows") from error
    except pd.errors.ParserError as error:
        reason = re.sub(r"^.*C error: ", "", first_line(error))
        raise UnreadableTable(f"cannot be read ({reason}); put texts with commas or line breaks between quotes") from error
    names = [str(name) for name in table.iloc[0]]
    if len(names) == 1 and (mark := re.search(r"[;\t|]", names[0])):
        raise UnreadableTable(f"has a single column {names[0]!r}; separate its columns by commas, not by {mark[0]!r}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UnreadableTable(f"has two columns {twice[0]!r}; rename one")
    return table.iloc[1:].reset_index(drop=True).set_axis(names, axis=1)


def _read_json(path: Path) -> pd.DataFrame:
    remedy = "give an object per line, or one array of objects"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableTable("cannot be read (it is not UTF-8 text); save it as UTF-8") from error
    rows: list[Any] = []
    before = 0  # lines
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            for before, line in enumerate(text.split("\n")):  # noqa: B007 - an error is told with its line
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        raise UnreadableTable(f"cannot be read (line {before + error.lineno} is not JSON: {error.msg}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested without end
        raise UnreadableTable(f"cannot be read ({first_line(error)}); {remedy}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UnreadableTable(f"cannot be read (row {number} is no object); {remedy}")
    return pd.DataFrame(rows, dtype=object)


def _read_parquet(path: Path) -> pd.DataFrame:
    import datasets
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would tell every fault once more, and before ours
    try:
        if read_metadata(path).num_rows == 0:
            raise UnreadableTable("has no rows")
        # A cache folder of its own: the library's shared cache is keyed by name and time, not by content.
        with tempfile.TemporaryDirectory() as scratch:
            table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=scratch, keep_in_memory=True)
            return table.to_pandas()  # type: ignore[no-any-return]
    except (ArrowException, OSError, datasets.exceptions.DatasetGenerationError, NotImplementedError) as error:
        reason = first_line(error.__cause__ or error)
        raise UnreadableTable(f"cannot be read ({reason}); check the file") from error
