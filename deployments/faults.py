"""A user's fault is one line in the UI: no traceback in the logs, and the form's words in place of command-line options."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, get_type_hints

from prefect.exceptions import ParameterTypeError

from cpdiff_core.config import UserError

P = ParamSpec("P")
R = TypeVar("R")

_SETTINGS = {
    "data-dir": "CPDIFF_DATA_DIR of the worker",
    "root": "PREFECT_LOCAL_STORAGE_PATH of the worker",
    "out": "name",
    "example": "examples",
    "seeds": "num_seeds",
    "threads": "num_threads",
}


def in_words_of_the_form(text: str) -> str:
    """Options of the command line by what they are in a form: fields, or settings of the worker's environment."""
    text = text.replace("--root or PREFECT_LOCAL_STORAGE_PATH", "PREFECT_LOCAL_STORAGE_PATH of the worker")
    return re.sub(r"(?<!\S)--([a-z][a-z-]*)", lambda match: _SETTINGS.get(match[1], match[1].replace("-", "_")), text)


def form(body: Callable[P, R]) -> Callable[P, R]:
    """The function of a form's flow. What it raises as UserError is told in the words of the form."""

    @wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return body(*args, **kwargs)
        except UserError as error:
            raise UserError(in_words_of_the_form(str(error))) from error

    # Prefect looks up names in annotations where the function was made, which is here: it gets them looked up.
    run.__signature__ = inspect.signature(body, eval_str=True)  # type: ignore[attr-defined]
    run.__annotations__ = get_type_hints(body, include_extras=True)
    return run


def _without_preface(text: str) -> str:
    """Of Prefect's list of wrong parameters what is wrong: `experiment: ...`."""
    lines = text.removeprefix("Flow run received invalid parameters:").strip().splitlines()
    return "; ".join(line.removeprefix(" - ").removeprefix("- ").replace(": Value error, ", ": ", 1) for line in lines)


_FINISHED = re.compile(r"Finished in state (\w+)(?:\(\)|\(type=\w+\))?")


class _OneLine(logging.Filter):
    """Prefect logs every exception of a run with its traceback, which says nothing to whom a field was wrong, two lines for
    the hook of every stage, which say nothing to anybody, and of every stage that it has finished, but not which it was."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.INFO and str(record.msg).startswith(("Running hook", "Hook '")):
            return False
        stage = getattr(record, "task_run_name", None)
        if stage and str(record.msg).startswith("Finished in state "):
            record.msg = stage + ": " + in_words_of_the_form(_FINISHED.sub(r"\1", str(record.msg)))
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, UserError | ParameterTypeError):
            record.msg, record.args, record.exc_info = in_words_of_the_form(_without_preface(str(error))), (), None
        return True


def show_one_line() -> None:
    """Users' faults in the logs of this process's runs as one line, as the server gets them."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(item, _OneLine) for item in logger.filters):
            logger.addFilter(_OneLine())
